"""Whole iterations of both phases on many ranks, against the plain baseline of tools/plain_iteration.py in fp64."""

from dataclasses import dataclass

import pytest
import torch
from iterations import GENERATORS, ITERATIONS, Scene, logged, numbers, train

SAMPLES = 2
LATENTS = (3, 3, 6, 10)  # 45 tokens, which neither 2, 4 nor 8 ranks divide
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """How the ranks are used."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    method: str = "auto"
    data: int = 1
    micro_batches: int = 1  # of each data rank
    kernels: str = "auto"

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def flags(self) -> list[str]:
        return [
            f"--tensor-model-parallel-size={self.tensor}",
            f"--context-parallel-size={self.context}",
            f"--context-parallel-method={self.method}",
            f"--kernel-backend={self.kernels}",
            f"--micro-batch-size={SAMPLES // (self.data * self.micro_batches)}",
            *(["--sequence-parallel"] if self.sequence_parallel else []),
        ]

    def __str__(self) -> str:
        layout = f"tp{self.tensor}{'sp' * self.sequence_parallel}-cp{self.context}{self.method}-dp{self.data}"
        return layout if self.kernels == "auto" else f"{layout}-{self.kernels}"


LAYOUTS = [
    Layout(micro_batches=2),
    Layout(kernels="reference"),
    Layout(data=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=4),
    Layout(context=2, method="ring"),
    Layout(context=4, method="ulysses"),
    Layout(tensor=2, sequence_parallel=True, context=2, method="ring", data=2),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory, load_tool, fp64_mode) -> Scene:
    folder, tool = tmp_path_factory.mktemp("scene"), load_tool("plain_iteration")
    return Scene(folder, tool, fp64_mode, layers=1, latents=LATENTS, samples=SAMPLES)


# Several ranks take long: one generator in each dtype, and of four ranks and more one of the two.
CASES = [
    pytest.param(layout, dtype, generator, id=f"{layout}-{dtype}-{generator}")
    for layout in LAYOUTS
    for dtype in DTYPES
    for generator in GENERATORS
    if layout.world == 1 or ((dtype == "bf16") == (generator == "full") and (layout.world == 2 or dtype == "bf16"))
]


@pytest.mark.parametrize(("layout", "dtype", "generator"), CASES)
def test_iterations_of_both_phases_equal_the_plain_run(
    layout, dtype, generator, scene, run_ranks, tmp_path, assert_as_accurate_as_torch
):
    bf16 = ["--bf16"] if dtype == "bf16" else []
    arguments = [*scene.flags, *layout.flags, *bf16, *GENERATORS[generator], f"--save={tmp_path / 'run'}"]
    run_ranks(train, layout.world, arguments)
    rows = logged(tmp_path / "run")
    plain, exact = (scene.run_plainly(generator, DTYPES[dtype], is_exact).numbers for is_exact in (False, True))
    # Each number in units of its reference, so that the small ones count as much as the large ones.
    assert_as_accurate_as_torch((numbers(rows) / exact).float(), (plain / exact).float(), torch.ones_like(exact))


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(micro_batches=2)], ids=str)
def test_iterations_whose_updates_share_a_start_equal_the_plain_run(
    layout, scene, run_ranks, tmp_path, assert_as_accurate_as_torch
):
    """Which makes the same start anew for every update."""
    more = ["--phase-start-reuse=3"]
    arguments = [*scene.flags, *layout.flags, *GENERATORS["lora"], *more, f"--save={tmp_path / 'run'}"]
    run_ranks(train, layout.world, arguments)
    rows = logged(tmp_path / "run")
    plain, exact = (scene.run_plainly("lora", torch.float32, is_exact, *more).numbers for is_exact in (False, True))
    assert_as_accurate_as_torch((numbers(rows) / exact).float(), (plain / exact).float(), torch.ones_like(exact))
    alone = scene.run_plainly("lora", torch.float32, True).numbers
    assert torch.equal(exact[:ITERATIONS], alone[:ITERATIONS]) and not torch.equal(exact, alone)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_fused_and_plain_kernels_end_with_the_weights_of_the_plain_run(
    kernels, scene, run_ranks, tmp_path, assert_as_accurate_as_torch
):
    arguments = [*scene.flags, *Layout(kernels=kernels).flags, *GENERATORS["full"], f"--save={tmp_path / 'run'}"]
    (ours,) = run_ranks(train, 1, arguments)
    plain, exact = (scene.run_plainly("full", torch.float32, is_exact).changes for is_exact in (False, True))
    assert ours.keys() == exact.keys()
    for name, change in exact.items():
        assert change.norm() > 0, name
        assert_as_accurate_as_torch(ours[name], plain[name], change)


@pytest.mark.parametrize("flag", ["--lr", "--fake-lr"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_role_that_does_not_learn_would_be_noticed(generator, flag, scene):
    exact = scene.run_plainly(generator, torch.float32, True).numbers
    plain, still = (
        scene.run_plainly(generator, torch.float32, False, *more).numbers for more in ((), (f"{flag}=1e-12",))
    )
    rounding, change = ((numbers / exact - 1).norm() for numbers in (plain, still))
    assert change > 1e4 * rounding
