"""How thoroughly inputs are spoilt, and how many there were.

`make test` draws a few of each kind, the same ones every time; `--hypothesis-profile thorough` draws many new ones.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
from fault_judge import TALLY
from fault_programs import run_program
from fault_world import built_world
from hypothesis import HealthCheck, Phase, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=2, derandomize=True, phases=[Phase.generate], **_COMMON)
settings.register_profile("thorough", max_examples=25, phases=[Phase.generate], **_COMMON)
if settings.get_current_profile_name() not in ("quick", "thorough"):
    settings.load_profile("quick")

_KEY = "inputs_tried"


@pytest.fixture(scope="session")
def loras(load_tool: Callable[[str], ModuleType]) -> None:
    """The world's run as LoRA files, in the world's `loras/`."""
    flags = ["export", "--load", "run", "--hf", "loras", "--weights", "lora"]
    outcome = run_program(load_tool("convert_checkpoint"), flags, built_world().folder)
    assert outcome.code == 0, outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_KEY] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    TALLY.update(node.workeroutput.get(_KEY, {}) if hasattr(node, "workeroutput") else {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY:
        told = ", ".join(f"{verdict} {count}" for verdict, count in sorted(TALLY.items()))
        terminalreporter.write_line(f"inputs tried: {TALLY.total()}: {told}")
