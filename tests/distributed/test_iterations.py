"""Whole iterations of both phases on many ranks, against the plain baseline of tools/plain_iteration.py in fp64."""

import functools
import json
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel

from megatron_pdmd import pretrain
from megatron_pdmd.arguments import parse_arguments
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models import WanConfig, WanModel, adapter_state_dict, add_adapter, to_hf_state_dict

# 45 tokens, which neither 2, 4 nor 8 ranks divide, and heads that all of them do.
MODEL = WanConfig(num_attention_heads=8, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10, freq_dim=14,
                  ffn_dim=80, num_layers=1, rope_max_seq_len=32)  # fmt: skip
LATENTS, SAMPLES, PROMPTS, PROMPT_LENGTH, BOUNDARY, ITERATIONS = (3, 3, 6, 10), 2, 6, 7, 0.8, 3
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
LAST_EXPERT = "low_noise"
NUMBERS = ("fake_loss", "fake_grad_norm", "dmd_gradient", "score_gap", "generator_grad_norm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GENERATORS = {  # an adapter whose B starts at zero has the smaller gradients
    "lora": ["--generator=lora", "--lr=2"],
    "full": ["--generator=full", "--lr=0.1"],
}


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
def plain(load_tool):
    """The module tools/plain_iteration.py."""
    return load_tool("plain_iteration")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A run on a random teacher of two experts. With Adam's usual eps its steps would be signs of rounding errors."""
    folder = tmp_path_factory.mktemp("teacher")
    for seed, name in enumerate(EXPERTS.values()):
        new_teacher(seed).save_pretrained(folder / name)
    components = {name: ["diffusers", "WanTransformer3DModel"] for name in EXPERTS.values()}
    index = {"_class_name": "WanPipeline", "boundary_ratio": BOUNDARY, **components}
    (folder / "model_index.json").write_text(json.dumps(index))
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(PROMPTS, PROMPT_LENGTH, MODEL.text_dim, generator=generator)
    negative = torch.randn(PROMPT_LENGTH, MODEL.text_dim, generator=generator)
    PromptEmbeddings(tuple("abcdef"), (text,), negative).save(folder / "prompts")
    options = {
        "teacher": folder,
        "prompts": folder / "prompts",
        "prompt-length": PROMPT_LENGTH,
        "frames": LATENTS[1],
        "height": LATENTS[2],
        "width": LATENTS[3],
        "timestep-shift": 3,
        "guidance-scale": "2,3",
        "fake-updates": 2,
        "lora-rank": 4,
        "lora-alpha": 8,
        "fake-lr": 0.002,
        "adam-eps": 0.01,
        "clip-grad": 0.5,
        "train-iters": ITERATIONS,
        "global-batch-size": SAMPLES,
        "save-interval": 0,
        "log-interval": 1,
        "sample-prompts": 0,
    }
    return [f"--{name}={value}" for name, value in options.items()] + ["--no-export", "--no-tensorboard"]


def new_teacher(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{k: v for k, v in MODEL.to_hf().items() if not k.startswith("_")})
    with torch.no_grad():  # norms' weights are ones by default, which would hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def run_plainly(plain, flags, fp64_mode):
    """The function ``run_plainly(generator, dtype, exact=False, *more_flags)``.

    It returns the numbers of every iteration, and what training added to the weights of the last phase's generator.
    """

    @functools.cache
    def run(
        generator: str, dtype: torch.dtype, exact: bool = False, *more: str
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, _ = parse_arguments([*flags, *GENERATORS[generator], *more])
        data = PromptEmbeddings.load(config.data.prompts)

        def load_teacher(expert: str) -> WanTransformer3DModel:
            path = config.model.teacher / EXPERTS[expert]
            model = WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype)
            if not exact:
                return model
            with fp64_mode:
                twin = WanTransformer3DModel.from_config(model.config).double()
            twin.load_state_dict(model.state_dict())
            return twin

        adapted = WanModel(MODEL)
        add_adapter(adapted, "new", rank=config.method.lora_rank, alpha=1.0, seed=config.training.seed)
        adapter = {
            name.removesuffix(".lora_A.weight"): tensor
            for name, tensor in adapter_state_dict(adapted, "new").items()
            if "lora_A" in name
        }
        prompts = (data.embeddings, data.negative)
        if exact:
            prompts = tuple(part.to(dtype).double() for part in prompts)
        distillation = plain.PlainDistillation(
            config, load_teacher, BOUNDARY, prompts, LATENTS, adapter, fp64_mode if exact else None
        )
        rows = []
        for phase in (1, 2):
            distillation.start_phase(phase)
            rows += [distillation.run_iteration(index) for index in range(ITERATIONS)]
        start = dict(load_teacher(LAST_EXPERT).named_parameters())
        end = distillation.generators[2].named_parameters()
        changes = {name: (p - start[name]).detach() for name, p in end if name in start}
        return numbers(rows), changes

    return run


def numbers(rows: list[dict[str, float]]) -> torch.Tensor:
    """The losses and gradient norms of every iteration, [iterations, 5]."""
    return torch.tensor([[row[name] for name in NUMBERS] for row in rows], dtype=torch.float64)


def train(arguments: list[str]) -> dict[str, torch.Tensor]:
    """One rank of a run; returns what it added to the last phase's generator."""
    changes = {}

    def keep_weights(plan, topology, networks, trainer):
        start = to_hf_state_dict(networks.teacher[LAST_EXPERT])
        end = to_hf_state_dict(networks.delivered(2).model)
        changes.update({name: end[name] - tensor for name, tensor in start.items()})

    pretrain.finish = keep_weights
    assert pretrain.main(arguments) == 0
    return changes


# Four ranks and more take long: one generator in each dtype.
CASES = [
    pytest.param(layout, dtype, generator, id=f"{layout}-{dtype}-{generator}")
    for layout in LAYOUTS
    for dtype in DTYPES
    for generator in GENERATORS
    if layout.world < 4 or (dtype == "bf16") == (generator == "full")
]


@pytest.mark.parametrize(("layout", "dtype", "generator"), CASES)
def test_iterations_of_both_phases_equal_the_plain_run(
    layout, dtype, generator, flags, run_plainly, run_ranks, tmp_path, assert_as_accurate_as_torch
):
    bf16 = ["--bf16"] if dtype == "bf16" else []
    arguments = [*flags, *layout.flags, *bf16, *GENERATORS[generator], f"--save={tmp_path / 'run'}"]
    run_ranks(train, layout.world, arguments)
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    assert [row["phase"] for row in rows] == [1] * ITERATIONS + [2] * ITERATIONS
    assert rows[-1]["skipped_updates"] == 0
    plain, exact = (run_plainly(generator, DTYPES[dtype], is_exact)[0] for is_exact in (False, True))
    # Each number in units of its reference, so that the small ones count as much as the large ones.
    assert_as_accurate_as_torch((numbers(rows) / exact).float(), (plain / exact).float(), torch.ones_like(exact))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_fused_and_plain_kernels_end_with_the_weights_of_the_plain_run(
    kernels, flags, run_plainly, run_ranks, tmp_path, assert_as_accurate_as_torch
):
    arguments = [*flags, *Layout(kernels=kernels).flags, *GENERATORS["full"], f"--save={tmp_path / 'run'}"]
    (ours,) = run_ranks(train, 1, arguments)
    plain, exact = (run_plainly("full", torch.float32, is_exact)[1] for is_exact in (False, True))
    assert ours.keys() == exact.keys()
    for name, change in exact.items():
        assert change.norm() > 0, name
        assert_as_accurate_as_torch(ours[name], plain[name], change)


@pytest.mark.parametrize("flag", ["--lr", "--fake-lr"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_role_that_does_not_learn_would_be_noticed(generator, flag, run_plainly):
    exact, _ = run_plainly(generator, torch.float32, True)
    plain, still = (run_plainly(generator, torch.float32, False, *more)[0] for more in ((), (f"{flag}=1e-12",)))
    rounding, change = ((numbers / exact - 1).norm() for numbers in (plain, still))
    assert change > 1e4 * rounding
