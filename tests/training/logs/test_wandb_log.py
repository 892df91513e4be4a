"""Log entries at Weights & Biases: through a recording double with wandb's own names, and offline where installed."""

import importlib.machinery
import importlib.util
import json
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from megatron_pdmd.config import LoggingConfig
from megatron_pdmd.training.logs.wandb_log import WandbLog, check_wandb

INSTALLED = importlib.util.find_spec("wandb") is not None
# wandb 0.31's signatures of what is called, by `inspect.signature`.
CALLS = {
    "init": {"entity", "project", "dir", "id", "name", "config", "allow_val_change", "mode", "resume"},
    "define_metric": {"name", "step_metric", "step_sync", "hidden", "summary", "overwrite"},
    "log": {"data", "step", "commit"},
    "finish": {"exit_code"},
}
OPTIONS = LoggingConfig(wandb_project="pdmd")


class Error(Exception):
    """wandb.Error."""


class Recorder(ModuleType):
    """The package wandb and its runs; refuses keywords that wandb does not have."""

    Error = Error

    def __init__(self, refusal: str | None = None):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls = []
        self._refusal = refusal

    def init(self, **options):
        if self._refusal:
            raise Error(self._refusal)
        return self._note("init", **options)

    def define_metric(self, *names, **options):
        return self._note("define_metric", *names, **options)

    def log(self, *data, **options):
        return self._note("log", *data, **options)

    def finish(self, **options):
        return self._note("finish", **options)

    def _note(self, name, /, *positional, **options):
        assert options.keys() <= CALLS[name], name
        self.calls.append((name, *positional, *([options] if options else [])))
        return self


@pytest.fixture
def wandb(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def test_entries_go_to_one_run_that_later_launches_continue(wandb, tmp_path):
    options = replace(OPTIONS, wandb_save_dir=tmp_path / "files")
    for iteration in (1, 2):
        log = WandbLog(options, tmp_path, {"training": {"seed": 42}})
        log.write({"iteration": iteration, "fake_loss": 0.5})
        log.close()
    first, second = wandb.calls[:4], wandb.calls[4:]
    name, asked = first[0]
    assert name == "init" and (tmp_path / "files").is_dir()
    assert asked.pop("id") == second[0][1].pop("id") == (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert (
        asked
        == second[0][1]
        == {
            "project": "pdmd",
            "name": tmp_path.name,
            "dir": str(tmp_path / "files"),
            "config": {"training": {"seed": 42}},
            "allow_val_change": True,
            "resume": "allow",
        }
    )
    assert first[1] == ("define_metric", "*", {"step_metric": "iteration"})
    assert [call for call in wandb.calls if call[0] == "log"] == [
        ("log", {"iteration": iteration, "fake_loss": 0.5}) for iteration in (1, 2)
    ]
    assert first[3] == second[3] == ("finish",)


def test_the_run_can_be_named(wandb, tmp_path):
    WandbLog(replace(OPTIONS, wandb_exp_name="a14b"), tmp_path, {})
    assert wandb.calls[0][1]["name"] == "a14b" and wandb.calls[0][1]["dir"] == str(tmp_path)


def test_what_wandb_refuses_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", Recorder("api_key not configured (no-tty). call wandb.login()"))
    with pytest.raises(ValueError, match=r"--wandb-project pdmd: api_key not configured"):
        WandbLog(OPTIONS, tmp_path, {})


def test_a_run_logs_what_metrics_jsonl_has(wandb, launch, tmp_path):
    assert launch(tmp_path / "run", "--wandb-project", "pdmd", "--exit-interval", "2") == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    entries = [call[1] for call in wandb.calls if call[0] == "log"]
    assert [{k: v if math.isfinite(v) else None for k, v in entry.items()} for entry in entries] == rows
    assert wandb.calls[0][1]["config"]["training"]["train_iters"] == [3, 3]
    assert wandb.calls[-1] == ("finish",)


@pytest.mark.skipif(INSTALLED, reason="wandb is installed; the double stands for it elsewhere")
def test_without_the_package_a_launch_ends_before_it_loads_anything(launch, tmp_path, capsys):
    check_wandb(LoggingConfig())
    with pytest.raises(SystemExit) as stop:
        launch(tmp_path / "run", "--wandb-project", "pdmd")
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    told = capsys.readouterr()
    assert told.err == "error: --wandb-project pdmd: wandb is not installed; pip install wandb, or drop the flag\n"
    assert told.out == ""


@pytest.mark.skipif(not INSTALLED, reason="needs wandb; the recording double runs everywhere")
def test_offline_wandb_takes_the_entries(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert launch(tmp_path / "run", "--wandb-project", "pdmd", "--exit-interval", "1") == 3
    assert launch(tmp_path / "run", "--wandb-project", "pdmd") == 0
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
