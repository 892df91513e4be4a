"""Runs the checks of interpreted/ with Triton's interpreter, which must be chosen before Triton's import."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
CHECKS = sorted((HERE / "interpreted").glob("check_*.py"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ElementTree.Element], str]:
    """Every check's junit entry, and the run's output."""
    pytest.importorskip("triton")
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kernel_checks", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, f"--junitxml={report}", *map(str, CHECKS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parents[2],
    )
    assert report.is_file(), run.stdout + run.stderr
    return list(ElementTree.parse(report).iter("testcase")), run.stdout


@pytest.mark.parametrize("file", [check.stem for check in CHECKS])
def test_kernels_agree_with_their_twins(outcomes: tuple[list[ElementTree.Element], str], file: str) -> None:
    cases, output = outcomes
    cases = [case for case in cases if case.get("classname", "").endswith(file)]
    failed = [case.get("name") for case in cases if len(case)]
    assert cases and not failed, f"failed: {failed}\n{output}"
