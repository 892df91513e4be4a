"""Times one iteration of the trainer against the same iteration written plainly (plain_iteration.py).

    python tools/benchmark_step.py
    python tools/benchmark_step.py --sizes tiny --dtypes fp32 --repeats 20 --csv runs/step.csv

Both sides start from the same weights and meet the same prompts, noise, times and passes, with as many threads. Each
repeat times ours, then the plain one, then every pass of that iteration alone; the tables show medians. `overhead` is
our iteration over the sum of its own passes, `passes ms`. A learning pass is one with its backward.
"""

import csv
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from plain_iteration import PlainDistillation
from rich.console import Console
from rich.table import Table

from megatron_pdmd.config import Config, DataConfig, MethodConfig, TrainingConfig
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan
from megatron_pdmd.distillation.roles import Pass, Roles
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json, written_whole
from megatron_pdmd.limits import check_range
from megatron_pdmd.models import WanConfig, adapter_state_dict, from_hf
from megatron_pdmd.parallel import destroy_topology, initialize_topology
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.phase import PhaseTrainer
from pdmd_kernels import use_backend

TINY_WAN = Path(__file__).resolve().parents[1] / "examples" / "tiny_wan"
PROMPTS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ITERATION = 1  # every repeat runs this one, so that all have the same passes
# Eq. 13's loss may differ by this much between the sides in bf16; more means that they do not compute the same.
AGREEMENT = 0.05


@dataclass(frozen=True)
class Size:
    """A teacher and a batch.

    Attributes:
        model: shape of a random teacher; None for the bundled one.
        latents: [C, F, H, W] of a sample.
        text: tokens and width of a prompt's embedding.
        batch: samples of an update.
        fake_updates: for each generator update.
    """

    model: WanConfig | None
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    batch: int
    fake_updates: int


SIZES = {
    "tiny": Size(None, latents=(1, 5, 16, 16), text=(32, 64), batch=8, fake_updates=5),
    "d512": Size(
        WanConfig(num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=8, text_dim=256),
        latents=(16, 5, 16, 24),
        text=(64, 256),
        batch=1,
        fake_updates=1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Times the last phase's iterations of both sides."""

    sizes: tuple[Literal["tiny", "d512"], ...] = ("tiny", "d512")
    """The bundled teacher on its quickstart's batch, and 8 layers of width 512 on 480 tokens."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Numbers of the networks."""
    generator: Literal["lora", "full"] = "lora"
    """Trained parameters of the generator."""
    kernel_backend: Literal["auto", "native", "reference"] = "auto"
    """Who runs our elementwise ops."""
    threads: int = 0
    """Threads of both sides; 0 takes torch's own choice."""
    repeats: int = 10
    """Iterations of each side that are timed, after one that is not."""
    csv: Path | None = None
    """CSV file for the first table."""
    json: Path | None = None
    """JSON file for both tables."""

    def prepare(self) -> None:
        """Refuses counts that cannot be, and files that cannot be written.

        Raises:
            ValueError: names the flag.
        """
        check_range("--repeats", self.repeats, 1, 10**6)
        check_range("--threads", self.threads, 0, 4096)
        if not self.sizes or not self.dtypes:
            raise ValueError("--sizes, --dtypes: name at least one of each")
        for flag, path in (("--csv", self.csv), ("--json", self.json)):
            if path is not None:
                check_file_destination(path, flag)


@dataclass(frozen=True)
class IterationTime:
    """A row of the first table; times in milliseconds."""

    size: str
    dtype: str
    passes: int
    ours_ms: float
    plain_ms: float
    ratio: float
    passes_ms: float
    overhead: float


@dataclass(frozen=True)
class PassTime:
    """A row of the second table: one kind of pass, run alone."""

    size: str
    dtype: str
    kind: str
    count: int
    ours_ms: float
    plain_ms: float
    ratio: float


@dataclass(frozen=True)
class Setup:
    """What both sides are built from."""

    config: Config
    source: PipelineFolder
    dtype: torch.dtype
    prompts: PromptEmbeddings
    latents: tuple[int, int, int, int]

    @classmethod
    def of(cls, size: Size, dtype: str, generator: str, folder: Path) -> "Setup":
        """The setup of a size; a random teacher is written to the folder."""
        source = read_pipeline(TINY_WAN if size.model is None else write_random_teacher(size.model, folder))
        method = MethodConfig(generator=generator, fake_updates=size.fake_updates)
        training = TrainingConfig(micro_batch_size=size.batch, global_batch_size=size.batch, bf16=dtype == "bf16")
        config = Config(method=method, training=training, data=DataConfig(prompt_length=size.text[0]))
        text = torch.randn(PROMPTS + 1, *size.text, generator=torch.Generator().manual_seed(0))
        prompts = PromptEmbeddings(tuple(f"prompt {n}" for n in range(PROMPTS)), (text[1:],), text[0])
        return cls(config, source, DTYPES[dtype], prompts, size.latents)


def write_random_teacher(model: WanConfig, folder: Path) -> Path:
    """Writes a pipeline folder with a random network."""
    torch.manual_seed(0)
    arguments = {name: value for name, value in model.to_hf().items() if not name.startswith("_")}
    WanTransformer3DModel(**arguments).save_pretrained(folder / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    write_json(folder / "model_index.json", index)
    return folder


class PassRecorder:
    """Answers passes as the roles do and keeps what was asked."""

    def __init__(self, roles: Roles):
        self.roles = roles
        self.passes: list[Pass] = []

    def run(self, request: Pass) -> torch.Tensor:
        """The answer to a pass."""
        self.passes.append(request)
        return self.roles.run(request)


class ObservedPhase(PhaseTrainer):
    """A phase whose passes and optimizer steps can be run alone."""

    def record(self, index: int) -> tuple[dict[str, float], list[Pass]]:
        """Runs an iteration and returns its numbers and its passes."""
        roles, recorder = self._roles, PassRecorder(self._roles)
        self._roles = recorder
        try:
            return self.run_iteration(index), recorder.passes
        finally:
            self._roles = roles

    def flow(self, request: Pass) -> torch.Tensor:
        """The answer to a pass."""
        return self._roles.run(request)

    def step(self, request: Pass) -> None:
        """The optimizer step that follows a pass with gradient."""
        network = self._generator if request.role == "generator" else self._fake_score[request.key]
        network.optimizer.step(network.optimizer.gradient_norm())
        network.optimizer.zero_grad()


def build_ours(setup: Setup) -> tuple[ObservedPhase, Networks]:
    """The trainer of the last phase."""
    config, source = setup.config, setup.source
    topology = initialize_topology()
    teacher = {name: from_hf(source.path, folder, dtype=setup.dtype) for name, folder in source.experts.items()}
    networks = Networks(teacher, config.method, config.training.seed)
    schedule = FlowMatchingSchedule(config.method.timestep_shift)
    plan = PhasePlan.build(config.method.num_steps, config.method.phase_steps, schedule, source.boundary_ratio)
    *earlier, phase = plan.phases
    for one in earlier:
        networks.add_expert(one.index, one.expert)
    iteration = Iteration(config.method, plan, phase, schedule, setup.latents, topology.device)
    networks.start_phase(phase.index, phase.expert, iteration.experts())
    return ObservedPhase(config, iteration, networks, setup.prompts, topology), networks


class PlainPhase:
    """The plain side, with the passes of ours run alone."""

    def __init__(self, setup: Setup, networks: Networks):
        source = setup.source

        def load_teacher(expert: str) -> WanTransformer3DModel:
            return WanTransformer3DModel.from_pretrained(
                source.path, subfolder=source.experts[expert], torch_dtype=setup.dtype
            )

        self.run = PlainDistillation(
            setup.config,
            load_teacher,
            source.boundary_ratio,
            (setup.prompts.embeddings, setup.prompts.negative),
            setup.latents,
            new_adapter(networks) if setup.config.method.generator == "lora" else None,
        )
        for phase in range(1, len(setup.config.method.phase_steps) + 1):
            self.run.start_phase(phase)

    def flow(self, request: Pass) -> torch.Tensor:
        """The answer to a pass."""
        ask = {
            "generator": self.run.generator_flow,
            "teacher": self.run.teacher_flow,
            "fake_score": self.run.fake_flow,
        }
        with torch.set_grad_enabled(request.gradient):
            return ask[request.role](request.key, request.x_t, request.t, request.conditions)

    def step(self, request: Pass) -> None:
        """The optimizer step that follows a pass with gradient."""
        of_fakes = self.run.fake_optimizer
        (self.run.generator_optimizer if request.role == "generator" else of_fakes[request.key]).step()


def new_adapter(networks: Networks) -> dict[str, torch.Tensor]:
    """A of a new adapter by its linear's name, the same for every phase."""
    model = networks.delivered(1).model
    ending = ".lora_A.weight"
    state = adapter_state_dict(model, "phase_1")
    return {name.removesuffix(ending): tensor.clone() for name, tensor in state.items() if name.endswith(ending)}


def time_passes(side: ObservedPhase | PlainPhase, passes: list[Pass]) -> dict[str, list[float]]:
    """Milliseconds of each pass run alone, and of the optimizer steps, by kind."""
    times: dict[str, list[float]] = {}
    for request in passes:

        def run(request: Pass = request) -> None:
            flow = side.flow(request)
            if request.gradient:
                flow.backward(torch.ones_like(flow))

        role = request.role.replace("_", " ")
        times.setdefault(f"{role}{' learning' * request.gradient} pass", []).append(milliseconds(run))
        if request.gradient:
            times.setdefault(f"{role} optimizer", []).append(milliseconds(lambda request=request: side.step(request)))
    return times


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1000


def check_agreement(ours: dict[str, float], plain: dict[str, float]) -> None:
    """Makes sure that both sides computed the same thing from the same weights."""
    for name in ("fake_loss", "dmd_gradient"):
        if abs(ours[name] - plain[name]) > AGREEMENT * abs(plain[name]):
            raise RuntimeError(f"{name} is {ours[name]:.6g} here and {plain[name]:.6g} plainly: not the same iteration")


def benchmark(size: str, dtype: str, options: BenchmarkOptions, folder: Path) -> tuple[IterationTime, list[PassTime]]:
    """Times one size in one dtype."""
    setup = Setup.of(SIZES[size], dtype, options.generator, folder)
    ours, networks = build_ours(setup)
    plain = PlainPhase(setup, networks)
    numbers, passes = ours.record(ITERATION)
    check_agreement(numbers, plain.run.run_iteration(ITERATION))
    pairs, alone = [], []
    for _ in range(options.repeats):
        our_ms = milliseconds(lambda: ours.run_iteration(ITERATION))
        pairs.append((our_ms, milliseconds(lambda: plain.run.run_iteration(ITERATION))))
        alone.append((time_passes(ours, passes), time_passes(plain, passes)))
    ours.release()
    sums = [sum(sum(kind) for kind in times.values()) for times, _ in alone]
    row = IterationTime(
        size,
        dtype,
        len(passes),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
        statistics.median(sums),
        statistics.median(a / total for (a, _), total in zip(pairs, sums, strict=True)),
    )
    kinds = []
    for kind, first in alone[0][0].items():
        own, other = (statistics.median(t for times in alone for t in times[side][kind]) for side in (0, 1))
        kinds.append(PassTime(size, dtype, kind, len(first), own, other, own / other))
    return row, kinds


def table_of(rows: list[IterationTime] | list[PassTime], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=title)
    for field in fields(rows[0]):
        table.add_column(field.name.replace("_", " "), justify="left" if field.type is str else "right")
    for row in rows:
        values = asdict(row)
        digits = {name: 3 if name in ("ratio", "overhead") else 2 for name in values}
        table.add_row(*(f"{v:.{digits[name]}f}" if isinstance(v, float) else str(v) for name, v in values.items()))
    return table


def write_csv(path: Path, rows: list[IterationTime]) -> None:
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(IterationTime)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_times(path: Path, options: BenchmarkOptions, rows: list[IterationTime], kinds: list[PassTime]) -> None:
    content = {
        "threads": torch.get_num_threads(),
        "generator": options.generator,
        "iterations": [asdict(row) for row in rows],
        "passes": [asdict(row) for row in kinds],
    }
    write_json(path, content)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; exits with 2 for bad input."""
    with user_errors():
        options = parse_options(BenchmarkOptions, __doc__, arguments)
        options.prepare()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, kinds = [], []
    for size, dtype in itertools.product(options.sizes, options.dtypes):
        with tempfile.TemporaryDirectory() as folder, use_backend(options.kernel_backend):
            row, own_kinds = benchmark(size, dtype, options, Path(folder))
        rows.append(row)
        kinds += own_kinds
    destroy_topology()
    if options.csv is not None:
        write_csv(options.csv, rows)
    if options.json is not None:
        write_times(options.json, options, rows, kinds)
    console, threads = Console(), torch.get_num_threads()
    console.print(table_of(rows, f"One iteration, {threads} thread{'s' * (threads > 1)}"))
    console.print(table_of(kinds, "Its passes alone"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
