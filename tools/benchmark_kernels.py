"""Times the C++ kernels on this CPU against eager torch, torch.compile's code and a plain memory copy.

    python tools/benchmark_kernels.py --save DIR
    python tools/benchmark_kernels.py --quick --no-compile --json FILE
    python tools/benchmark_kernels.py --ops subinterval --objective-memory

Sizes are those of Wan 14B at 81 x 480 x 832: latents of 16 x 21 x 60 x 104, 32,760 tokens of 5120 channels. The table
has medians; each round times a kernel and a copy, so that both see the same machine. GB/s counts the bytes that the op
must move at least, and stands beside those of Tensor.copy_ into a tensor that exists. The C allocator is told to keep
freed memory, so that after the first round, which is not counted, the results of every side lie in memory that it has
had before: nobody pays for new pages, as in a training step. Eager torch is each op's plain twin, given the noise where
the kernel draws it again. The folder takes kernels.csv and kernels.png.

Drawing noise is bound by arithmetic, not by memory: see kernels/csrc/cpu/philox.h for the instructions of a normal.
--objective-memory shows what one fake update's objective allocates at its peak, by torch's profiler.
"""

import csv
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernel_cases import SETUPS, Case, Sizes, nbytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pdmd_kernels
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, check_writable, write_json
from megatron_pdmd.limits import check_range, shown

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MOST_THREADS = 4096
LARGEST_COPY = 2**28
"""Bytes; several times the caches, and little beside the activations."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Times the C++ kernels on this CPU."""

    ops: tuple[str, ...] = ()
    """Rows to measure, by the beginning of their name; all by default."""
    dtype: str = "bf16"
    """Of flows and activations: bf16 or fp32. Latents are fp32."""
    threads: int = 2
    """Threads of torch."""
    repeats: int = 7
    """Rounds, of which the medians are taken; one more comes first and is not counted."""
    seconds: float = 4.0
    """For each side of a row: after these no round starts, if three have been counted."""
    compile: bool = True
    """Also time torch.compile's code for the plain twin."""
    objective_memory: bool = False
    """Also measure what one fake update's objective allocates at its peak, fused and eager."""
    quick: bool = False
    """Small sizes, to see that it runs; the numbers mean little."""
    save: Path | None = None
    """Folder for kernels.csv and kernels.png."""
    json: Path | None = None
    """JSON file for the rows of the table."""


@dataclass(frozen=True)
class Row:
    """Medians of one op; times in ms, rates in GB/s."""

    name: str
    native_ms: float
    eager_ms: float
    compiled_ms: float | None
    speedup: float
    speedup_over_compiled: float | None
    gb_per_s: float
    copy_gb_per_s: float
    share_of_copy: float


def benchmark(options: BenchmarkOptions) -> list[Row]:
    """The rows of the table.

    Raises:
        ValueError: options out of range, or the native kernels are not built.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {shown(options.dtype)} does not exist; choose bf16 or fp32")
    check_range("--threads", options.threads, 1, MOST_THREADS)
    check_range("--repeats", options.repeats, 1, 10**6)
    check_range("--seconds", options.seconds, 0, 86400)
    unknown = [op for op in options.ops if not any(name.startswith(op) or op.startswith(name) for name in SETUPS)]
    if unknown:
        raise ValueError(f"--ops {shown(unknown[0])} does not exist; choose from {', '.join(SETUPS)}")
    wanted = options.ops or tuple(SETUPS)
    setups = dict.fromkeys(setup for name, setup in SETUPS.items() if any(matches(name, op) for op in wanted))
    sizes, rows = Sizes(DTYPES[options.dtype], options.quick), []
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with pdmd_kernels.use_backend("native"):
        for setup in setups:
            for case in setup(sizes, options.compile):
                if any(case.name.startswith(op) for op in wanted):
                    rows.append(measure(case, options.repeats, options.seconds))
    return rows


def matches(name: str, op: str) -> bool:
    return name.startswith(op) or op.startswith(name)


def keep_freed_memory() -> None:
    """Has the C allocator take large blocks from its heap too, and return none by itself; no effect without glibc."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def release_freed_memory() -> None:
    """Returns it to the system, before another side fragments what this one has used."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def measure(case: Case, repeats: int, seconds: float) -> Row:
    """Times the kernel and the copy in turns, then each of the other sides."""
    source = torch.ones(max(min(case.bytes // 2, LARGEST_COPY), 1), dtype=torch.uint8)
    target = torch.empty_like(source)
    medians = timed({"native": case.kernel, "copy": lambda: target.copy_(source)}, repeats, seconds)
    medians |= timed({"eager": case.eager}, repeats, seconds)
    if case.compiled is not None:
        medians |= timed({"compiled": case.compiled}, repeats, seconds)
    compiled = medians.get("compiled")
    return Row(
        name=case.name,
        native_ms=1e3 * medians["native"],
        eager_ms=1e3 * medians["eager"],
        compiled_ms=None if compiled is None else 1e3 * compiled,
        speedup=medians["eager"] / medians["native"],
        speedup_over_compiled=None if compiled is None else compiled / medians["native"],
        gb_per_s=case.bytes / medians["native"] / 1e9,
        copy_gb_per_s=2 * nbytes(source) / medians["copy"] / 1e9,
        share_of_copy=medians["copy"] / medians["native"] * case.bytes / (2 * nbytes(source)),
    )


def objective_memory(options: BenchmarkOptions) -> dict[str, int]:
    """Bytes that one fake update's objective has allocated at its peak, given x_s, seeds and the model's output.

    Returns:
        "fused", "eager", and "minimum": those of x_t, which the model keeps, and of the output's gradient.
    """
    sizes = Sizes(DTYPES[options.dtype], options.quick)
    x_s, output = sizes.latents(), sizes.latents(sizes.dtype).requires_grad_()
    factors, seeds = [sizes.factor() for _ in range(4)], torch.arange(len(x_s))

    def update(namespace: object, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        eps = noise()
        x_t = namespace.subinterval_noise(x_s, eps, *factors[:2], sizes.dtype)
        loss = namespace.subinterval_loss(output, x_s, eps, *factors).mean()
        return x_t, torch.autograd.grad(loss, output)[0]

    with pdmd_kernels.use_backend("native"):
        fused = peak_bytes(lambda: update(pdmd_kernels, lambda: seeds))
    eager = peak_bytes(lambda: update(pdmd_kernels.reference, lambda: torch.randn_like(x_s)))
    return {"fused": fused, "eager": eager, "minimum": 2 * nbytes(output)}


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that is allocated at once while a function runs, its results included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        results = function()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    del results
    return peak


def timed(functions: dict[str, Callable[[], object]], repeats: int, seconds: float) -> dict[str, float]:
    """Medians of what each takes, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        if i >= 3 and sum(map(sum, times.values())) > seconds:
            break
    release_freed_memory()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def table_of(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
    table.add_column("op", no_wrap=True)
    for heading in ("native ms", "eager ms", "compiled ms", "x eager", "x compiled", "GB/s", "of copy"):
        table.add_column(heading, justify="right")
    for row in rows:
        compiled = (row.compiled_ms, row.speedup_over_compiled)
        milliseconds, ratio = ("-" if value is None else f"{value:.2f}" for value in compiled)
        cells = f"{row.native_ms:.2f}", f"{row.eager_ms:.2f}", milliseconds, f"{row.speedup:.2f}", ratio
        table.add_row(row.name, *cells, f"{row.gb_per_s:.1f}", f"{row.share_of_copy:.0%}")
    return table


def save_rows(rows: Sequence[Row], folder: Path, title: str) -> None:
    """kernels.csv and kernels.png, the speed-up over eager torch and the share of a copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(11, 0.4 * len(rows) + 1.6), layout="constrained")
    names = [row.name for row in rows]
    axes[0].barh(names, [row.speedup for row in rows], color="tab:blue", label="over eager torch")
    if any(row.speedup_over_compiled for row in rows):
        over = [row.speedup_over_compiled or 0 for row in rows]
        axes[0].barh(names, over, height=0.35, color="tab:orange", label="over torch.compile")
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].set_xlabel("times faster")
    axes[0].legend()
    axes[0].invert_yaxis()
    axes[1].barh(names, [100 * row.share_of_copy for row in rows], color="tab:green")
    axes[1].axvline(100, color="black", linewidth=0.8)
    axes[1].set_xlabel("% of a memory copy's bandwidth")
    figure.suptitle(title)
    figure.savefig(folder / "kernels.png", dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; exits with 2 for bad input."""
    with user_errors():
        options = parse_options(BenchmarkOptions, __doc__, arguments)
        if options.json is not None:
            check_file_destination(options.json, "--json")
        if options.save is not None:
            check_writable(options.save, "--save")
        rows = benchmark(options)
        memory = objective_memory(options) if options.objective_memory else None
        size = "quick sizes" if options.quick else "Wan 14B, 81 x 480 x 832"
        title = f"{size}, {options.dtype}, {options.threads} threads, {torch.ops.pdmd.cpu_capability()}"
        if options.save is not None:
            save_rows(rows, options.save, title)
        if options.json is not None:
            content = {"title": title, "rows": [asdict(row) for row in rows], "objective_bytes": memory}
            write_json(options.json, content)
    console = Console()
    console.print(table_of(rows, title))
    if memory is not None:
        values = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in memory.items())
        console.print(f"peak of one fake update's objective beside x_s and the output: {values}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
