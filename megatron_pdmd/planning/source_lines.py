"""Which lines of this project a call is in: what a rehearsal tells of a fault."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

# The rehearsal's own files call everything.
_OURS, _NOT_TOLD = ("megatron_pdmd", "pdmd_kernels"), ("megatron_pdmd.planning", "megatron_pdmd.dry_run")
_SHOWN = 3


def lines_of_caller(frame: FrameType) -> str:
    """The project's lines that a frame was called from, the innermost first."""

    def outwards(inner: FrameType | None) -> Iterator[tuple[FrameType, int]]:
        while inner is not None:
            yield inner, inner.f_lineno
            inner = inner.f_back

    return _told(outwards(frame))


def lines_of_error(trace: TracebackType | None) -> str:
    """The project's lines that an error went through, the one that it came up in first."""
    return _told(reversed(list(_steps(trace))))


def summary_of_error(error: BaseException) -> str:
    """Its type and the beginning of what it says, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"


def frames_of_error(trace: TracebackType | None) -> Iterator[FrameType]:
    """The frames that an error went through, the innermost first."""
    return (frame for frame, _ in reversed(list(_steps(trace))))


def _steps(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _told(steps: Iterable[tuple[FrameType, int]]) -> str:
    found: list[str] = []
    for frame, line in steps:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in _OURS and not module.startswith(_NOT_TOLD):
            path = Path(frame.f_code.co_filename)
            depth = len(module.split(".")) + (path.name == "__init__.py")
            found.append(f"{'/'.join(path.parts[-depth:])}:{line}")
        if len(found) == _SHOWN:
            break
    return ", called from ".join(found)
