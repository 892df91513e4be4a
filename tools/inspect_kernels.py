"""Compiles every GPU kernel ahead of time, without a GPU, and checks what the compiler made of it.

    python tools/inspect_kernels.py
    python tools/inspect_kernels.py --targets sm_90 --json kernels.json

Each Triton kernel is compiled as its launcher would start it at Wan sizes (latents of 81 frames of 480 x 832, 32,760
tokens of 5120 channels), in bf16 and fp32. A kernel passes if it spills no register and moves, in accesses of at least
128 bits, exactly its minimum a tensor element: every full-size input read once, every full-size output written once.
Where a program walks over rows or heads, the bytes are those of that loop; what it reads once for all of them, and one
number a row, is not counted. Rotations that each head reads again from the cache are part of the minimum. CUDA kernels
are compiled where nvcc is found. Exit code 1: a kernel failed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json
from megatron_pdmd.limits import shown

CUDA_SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "csrc" / "cuda" / "adamw_beta1_zero.cu"
TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
WIDE = 16
"""Bytes of a 128-bit access."""
TABLE_WIDTH = 120
"""Columns of the table in a file."""
OUTPUTS = {
    "stream_kernel": ("out",),
    "subinterval_noise_kernel": ("out",),
    "subinterval_loss_kernel": ("grad",),
    "posterior_error_kernel": (),
    "dmd_gradient_kernel": ("gradient",),
    "euler_step_kernel": ("x_next", "copy"),
    "modulated_layer_norm_kernel": ("y",),
    "modulated_layer_norm_backward_kernel": ("dx", "dshift", "dscale"),
    "modulation_sums_kernel": ("dshift", "dscale"),
    "gated_residual_kernel": ("y",),
    "gated_residual_backward_kernel": ("dh", "dgate"),
    "sum_of_squares_kernel": (),
    "rms_rope_kernel": ("y",),
    "rms_rope_backward_dots_kernel": (),
    "rms_rope_backward_dx_kernel": ("dx",),
    "rms_norm_rope_kernel": ("y",),
    "rms_norm_rope_backward_kernel": ("dx",),
    "adamw_beta1_zero_kernel": ("param", "exp_avg_sq", "copy"),
}
"""What a kernel writes, by parameter; all other tensors are read."""
UPDATED = ("param", "exp_avg_sq")
"""What is read before it is written."""
CACHED = {"rms_norm_rope_kernel": ("rope",), "rms_norm_rope_backward_kernel": ("rope",)}
"""Small tensors that each element reads, from the cache."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Compiles the GPU kernels ahead of time and checks registers, spills and bytes per element."""

    targets: str = ",".join(TARGETS)
    """Architectures, separated by commas."""
    dtypes: str = ",".join(DTYPES)
    """bf16, fp32 or both."""
    only: str = ""
    """Ops to be compiled, separated by commas; all where empty."""
    json: Path | None = None
    """JSON file for the table."""


@dataclass(frozen=True)
class Minimum:
    """Bytes that a kernel has to move for each element, and the elements of one iteration of one program."""

    loaded: int
    stored: int
    elements: int
    in_loop: bool


@dataclass
class Finding:
    """What the compiler made of one kernel for one target."""

    op: str
    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    widest_load: int = 0
    widest_store: int = 0
    loaded: float = 0.0
    stored: float = 0.0
    minimum_loaded: int = 0
    minimum_stored: int = 0
    faults: list[str] = field(default_factory=list)


def cases(dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """The arguments of each op's launcher at Wan sizes, on the meta device."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    latents, output, one = make(1, 16, 21, 60, 104), make(1, 16, 21, 60, 104, dtype=dtype), make(1)
    seeds = make(1, dtype=torch.int64)
    x, row, weight, rope = (
        make(1, 32760, 5120, dtype=dtype),
        make(1, 32760),
        make(5120, dtype=dtype),
        make(32760, 64, 2),
    )
    shared, own = make(1, 1, 6, 5120)[:, :, 0], make(1, 32760, 6, 5120)[:, :, 0]
    master, model = make(5120, 13824), make(5120, 13824, dtype=torch.bfloat16)
    factors = (one, one, one, one)
    step = (1e-5, 0.999, 1e-8, 0.01, 3, make())
    return {
        "normal": [(seeds, latents.numel())],
        "subinterval_noise": [(latents, noise, one, one, dtype) for noise in (seeds, latents)],
        "subinterval_loss": [(output, latents, noise, *factors) for noise in (seeds, latents)],
        "dmd_gradient": [
            (output, output, 4.0, output, one, latents, latents, one, 1e-6),
            (output, None, 1.0, output, one, None, None, None, 1e-6),
        ],
        "euler_step": [(latents, output, one, one, dtype)],
        "modulated_layer_norm": [(x, factor, factor, 1e-6) for factor in (shared, own)],
        "modulated_layer_norm_backward": [
            *((x, x, shared, row, row, mask) for mask in ((True, True), (True, False), (False, True))),
            (x, x, own, row, row, (True, True)),
        ],
        "gated_residual": [(x, x, factor) for factor in (shared, own)],
        "gated_residual_backward": [(x, x, factor, (True, True)) for factor in (shared, own)],
        "sum_of_squares": [(x,)],
        "rms_rope": [(x, weight, row, table, 40) for table in (rope, None)],
        "rms_rope_backward_dots": [(x, x, weight, row, table, 40) for table in (rope, None)],
        "rms_rope_backward_dx": [(x, x, weight, row, row, table, 40) for table in (rope, None)],
        "rms_norm_rope": [(x, weight, table, 40, 1e-6) for table in (rope, None)],
        "rms_norm_rope_backward": [(x, x, weight, row, table, 40) for table in (rope, None)],
        "adamw_beta1_zero": [([master], [master.to(dtype)], [master], [model], *step)],
    }


def minimum_of(launch: Any) -> Minimum:
    """The least a launch can move: full-size tensors once, and what is read from the cache for every element."""
    name, tensors = launch.kernel.__name__, {k: v for k, v in launch.arguments.items() if isinstance(v, torch.Tensor)}
    largest = max(tensor.numel() for tensor in tensors.values())
    full = {k: v.element_size() for k, v in tensors.items() if v.numel() == largest or k in CACHED.get(name, ())}
    outputs = OUTPUTS[name]
    return Minimum(
        loaded=sum(size for k, size in full.items() if k not in outputs or k in UPDATED),
        stored=sum(size for k, size in full.items() if k in outputs),
        elements=launch.arguments["BLOCK"] * launch.arguments.get("ROWS", 1),
        in_loop="rows" in launch.arguments or "heads" in launch.arguments,
    )


def compiled(launch: Any, target: str) -> tuple[bytes, int]:
    """The cubin of a launch, specialised as Triton would specialise it, and its shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdmd_kernels.triton.launching import COMPILE_OPTIONS

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            hints[(index,)] = [["tt.divisibility", 16]]
    hints = {index: hint for index, hint in hints.items() if index not in constants}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": launch.num_warps, **COMPILE_OPTIONS}
    kernel = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)
    return kernel.asm["cubin"], kernel.metadata.shared


def disassembled(cubin: bytes, folder: Path) -> dict[str, tuple[dict[str, int], list[str]]]:
    """Of each function in a cubin: its resources (REG, STACK, LOCAL, SHARED) and its lines of SASS."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)

    def run(*command: str) -> str:
        return subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout

    usage = re.findall(r"Function (\w+):\s*\n\s*(.*)", run(str(tools / "cuobjdump"), "--dump-resource-usage"))
    sections = re.split(r"\.section\s+\.text\.(\w+)", run(str(tools / "nvdisasm"), "-c"))
    code = dict(zip(sections[1::2], map(str.splitlines, sections[2::2]), strict=True))
    return {
        name: ({key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}, code[name])
        for name, text in usage
    }


def accesses(lines: list[str], kind: str) -> list[int]:
    """Widths in bytes of the instructions of a kind (LDG, STG, or LDL and STL)."""
    widths = {".256": 32, ".128": 16, ".64": 8, "16": 2, "8": 1}
    found = re.findall(rf"\b(?:{kind})((?:\.[A-Z0-9]+)*)", "\n".join(lines))
    return [next((width for mark, width in widths.items() if suffix.endswith(mark)), 4) for suffix in found]


def busiest_loop(lines: list[str]) -> list[str]:
    """The lines of the loop that moves the most in 128-bit accesses, none if there is no loop."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    loops: list[list[str]] = [[]]
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\S*\s.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], i) < i:
            loops.append(lines[labels[target[1]] : i])
    return max(loops, key=lambda loop: sum(width for width in accesses(loop, "LDG|STG") if width >= WIDE))


def measure(finding: Finding, lines: list[str], minimum: Minimum, threads: int) -> None:
    """Fills in the widths and the bytes per element, and lists what is wrong."""
    body = busiest_loop(lines) if minimum.in_loop else lines
    loads, stores = accesses(body, "LDG"), accesses(body, "STG")
    finding.widest_load, finding.widest_store = max(loads, default=0), max(stores, default=0)
    wide = [threads * sum(width for width in widths if width >= WIDE) for widths in (loads, stores)]
    least = (minimum.loaded, minimum.stored)
    # A compiler may unroll the loop; how often is told by what is stored, or by what is loaded where nothing is.
    told = 1 if minimum.stored else 0
    iterations = max(round(wide[told] / (least[told] * minimum.elements)), 1) if minimum.in_loop else 1
    finding.loaded, finding.stored = (count / (minimum.elements * iterations) for count in wide)
    finding.minimum_loaded, finding.minimum_stored = least
    if finding.spills:
        finding.faults.append(f"{finding.spills} spills")
    if (finding.loaded, finding.stored) != least:
        finding.faults.append("not the minimum")


def inspect_triton(targets: list[str], dtypes: list[str], ops: list[str], folder: Path) -> Iterator[Finding]:
    """One finding for each launch that the ops' launchers make, each dtype and target; equal launches once."""
    import triton

    from pdmd_kernels.triton import launcher
    from pdmd_kernels.triton.launching import recorded_launches

    seen = set()
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        for dtype, op in ((dtype, op) for dtype in dtypes for op in ops):
            for arguments in cases(DTYPES[dtype])[op]:
                with recorded_launches() as launches:
                    launcher(op)(*arguments)
                for launch, target in ((launch, target) for launch in launches for target in targets):
                    cubin, shared = compiled(launch, target)
                    if (target, cubin) in seen:
                        continue
                    seen.add((target, cubin))
                    ((usage, lines),) = disassembled(cubin, folder).values()
                    spills = len(accesses(lines, "LDL|STL")) + usage["LOCAL"]
                    name = launch.kernel.__name__
                    finding = Finding(op, name, dtype, target, usage["REG"], spills, shared)
                    measure(finding, lines, minimum_of(launch), 32 * launch.num_warps)
                    yield finding


def inspect_cuda(nvcc: str, targets: list[str], folder: Path) -> Iterator[Finding]:
    """One finding for each instance of the CUDA kernel and each target."""
    for target in targets:
        architecture = target + ("a" if int(target.removeprefix("sm_")) >= 90 else "")
        cubin = folder / "cuda.cubin"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-o", str(cubin), str(CUDA_SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        for name, (usage, lines) in disassembled(cubin.read_bytes(), folder).items():
            dtype, copy = "bf16" if "kernelIt" in name else "fp32", "Lb1" in name
            spills = len(accesses(lines, "LDL|STL")) + usage["LOCAL"]
            kernel = "adamw_beta1_zero.cu" + (" with copy" if copy else "")
            finding = Finding("adamw_beta1_zero", kernel, dtype, target, usage["REG"], spills, usage["SHARED"])
            minimum = Minimum(8 + DTYPES[dtype].itemsize, 10 if copy else 8, 256 * 8, in_loop=True)
            measure(finding, lines, minimum, 256)
            yield finding


def report(findings: list[Finding]) -> Table:
    """The findings as a table: widths in bits and bytes per element, loaded and stored, and shared memory in bytes."""
    table = Table(title="GPU kernels, compiled ahead of time")
    columns = ("kernel", "for", "reg", "spill", "smem", "bits", "B/element", "minimum", "verdict")
    for column in columns:
        table.add_column(column, no_wrap=column != "verdict")
    for f in findings:
        table.add_row(
            f.kernel.removesuffix("_kernel"),
            f"{f.dtype} {f.target}",
            str(f.registers),
            str(f.spills),
            str(f.shared),
            f"{8 * f.widest_load}/{8 * f.widest_store}",
            f"{f.loaded:g}+{f.stored:g}",
            f"{f.minimum_loaded}+{f.minimum_stored}",
            "; ".join(f.faults) or "pass",
        )
    return table


def chosen(given: str, known: Callable[[], list[str]], flag: str) -> list[str]:
    """The names in a comma-separated list; all that are known where it is empty.

    Raises:
        ValueError: a name is not known.
    """
    names = [name.strip() for name in given.split(",") if name.strip()] or known()
    for name in names:
        if name not in known():
            raise ValueError(f"{flag}: {shown(name)!r} is not known; choose from {', '.join(known())}")
    return names


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a kernel failed; exits with 2 for bad input."""
    with user_errors():
        options = parse_options(InspectOptions, __doc__, arguments)
        targets = chosen(options.targets, lambda: list(TARGETS), "--targets")
        dtypes = chosen(options.dtypes, lambda: list(DTYPES), "--dtypes")
        ops = chosen(options.only, lambda: list(cases(torch.float32)), "--only")
        if options.json is not None:
            check_file_destination(options.json, "--json")
    console, nvcc = Console(), shutil.which("nvcc")
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    findings = []
    with tempfile.TemporaryDirectory() as folder, console.status("compiling") as status:
        for finding in inspect_triton(targets, dtypes, ops, Path(folder)):
            findings.append(finding)
            status.update(f"compiled {finding.kernel} in {finding.dtype} for {finding.target}")
        if nvcc is not None and "adamw_beta1_zero" in ops:
            findings += inspect_cuda(nvcc, targets, Path(folder))
    console.print(report(findings))
    if nvcc is None:
        console.print("nvcc was not found: the CUDA kernels were not compiled")
    if options.json is not None:
        write_json(options.json, [asdict(finding) for finding in findings])
    return 1 if any(finding.faults for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
