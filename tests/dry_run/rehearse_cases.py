"""Rehearses several runs, each in a process forked after the slow imports; reads and writes JSON.

    python rehearse_cases.py < CASES        a list of lists of flags; --json is set here

Prints a list of [exit code, stderr, report], one for each case.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from megatron_pdmd.planning import fake_cuda


def main() -> None:
    fake_cuda.install()
    # Only now: these import torch.
    import megatron.core.distributed
    import megatron.core.optimizer  # noqa: F401  (imported once here, shared by every case)

    from megatron_pdmd.dry_run import rehearsal

    cases = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as name:
        running: dict[int, int] = {}
        codes: dict[int, int] = {}
        for number, flags in enumerate(cases):
            if len(running) == 2:
                _reap(running, codes)
            pid = os.fork()
            if pid == 0:
                _rehearse(rehearsal.main, flags, Path(name) / str(number))
            running[pid] = number
        while running:
            _reap(running, codes)
        results = []
        for number in range(len(cases)):
            report, errors = Path(name) / f"{number}.json", Path(name) / f"{number}.err"
            found = json.loads(report.read_text()) if report.exists() else None
            results.append([codes[number], errors.read_text(), found])
    json.dump(results, sys.stdout)


def _reap(running: dict[int, int], codes: dict[int, int]) -> None:
    pid, status = os.wait()
    codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)


def _rehearse(main, flags: list[str], place: Path) -> None:
    """Be one case. Never returns."""
    code = 1
    try:
        for stream, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(place.with_suffix(ending), os.O_WRONLY | os.O_CREAT), stream)
        code = main([*flags, "--json", str(place.with_suffix(".json"))])
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
