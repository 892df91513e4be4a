"""Sample sheets: when they are drawn, by whom, and that nobody's memory or patience runs out over them."""

import gc
import os
import socket
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from megatron_pdmd.config import CheckpointConfig, Config, LoggingConfig, ModelConfig
from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.training import sheets as sheets_module
from megatron_pdmd.training.checkpoints.checkpointing import CheckpointWriter
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.phase import PhaseTrainer
from megatron_pdmd.training.sheets import SampleSheets

SHORT = ("--train-iters", "1", "--fake-updates", "1")


def sheet(run: Path, iteration: int) -> np.ndarray:
    return iio.imread(run / "samples" / f"iter_{iteration:07d}.png").astype(int)


def test_a_run_from_text_draws_sheets_and_exports(launch, prompt_file, tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--prompts", str(prompt_file), *SHORT, "--export", "--tensorboard"]
    assert launch(run, *more, sheets=True) == 0
    for iteration in (1, 2):
        assert sheet(run, iteration).ndim == 3 and sheet(run, iteration).std() > 0
        assert len(iio.imread(run / "samples" / f"iter_{iteration:07d}.gif")) == 2
    assert (run / "hf" / "model_index.json").is_file() and (run / "summary.json").is_file()
    assert list((run / "tensorboard").iterdir())
    assert "no sample sheet" not in capsys.readouterr().out


def test_no_prompts_draw_no_sheets_and_sample_nothing(launch, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("megatron_pdmd.training.sampling.Sampler.teacher", lambda *args, **more: asked.append(args))
    run = tmp_path / "run"
    assert launch(run, *SHORT, "--sample-prompts", "0", "--sample-interval", "1", sheets=True) == 0
    assert not (run / "samples").exists() and not asked


def test_the_sheet_of_a_phases_end_comes_after_its_checkpoint_and_its_memory(launch, tmp_path, monkeypatch):
    events, trainers = [], []

    def note(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def noted(self, *args, **more):
            events.append(f"{kind.__name__}.{name}")
            if kind is PhaseTrainer and name == "__init__":
                trainers.append(weakref.ref(self))
            if kind is SampleSheets:
                gc.collect()
                events.append([trainer() for trainer in trainers])
            return original(self, *args, **more)

        monkeypatch.setattr(kind, name, noted)

    note(PhaseTrainer, "__init__")
    note(CheckpointWriter, "save")
    note(PhaseTrainer, "release")
    note(Networks, "finish_phase")
    note(SampleSheets, "draw")
    assert launch(tmp_path / "run", *SHORT, sheets=True) == 0
    one = ["PhaseTrainer.__init__", "CheckpointWriter.save", "PhaseTrainer.release", "Networks.finish_phase"]
    assert events == [*one, "SampleSheets.draw", [None], *one, "SampleSheets.draw", [None, None]]


def test_each_replica_samples_one_prompt_at_a_time(launch, run_ranks, tmp_path):
    """Two ranks draw half of the sheet each, and the sheet is that of one rank."""
    more = (*SHORT, "--phase", "1", "--sample-prompts", "5")

    def rank() -> list[int]:
        batches, training = [], []
        answer, iterate = Roles.run, PhaseTrainer.run_iteration

        def run(self, request):
            if not training:
                batches.append(len(request.x_t))
            return answer(self, request)

        def run_iteration(self, *args):
            training.append(True)
            try:
                return iterate(self, *args)
            finally:
                training.clear()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Roles, "run", run)
            patch.setattr(PhaseTrainer, "run_iteration", run_iteration)
            assert launch(tmp_path / "ranks", *more, sheets=True) == 0
        return batches

    passes = 2 * 2 + 2 + 2  # the guided teacher's two steps, the student's two, and the teacher's guided last one
    assert run_ranks(rank, 2) == [[1] * passes * 3, [1] * passes * 2]
    assert launch(tmp_path / "whole", *more, sheets=True) == 0
    assert np.abs(sheet(tmp_path / "ranks", 1) - sheet(tmp_path / "whole", 1)).max() <= 1


def test_ranks_wait_for_the_one_that_draws_beyond_the_timeout_of_training(launch, run_ranks, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank() -> int:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        write = SampleSheets._write

        def slowly(self, *args):
            time.sleep(8)
            write(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SampleSheets, "_write", slowly)
            more = (*SHORT, "--phase", "1", "--distributed-timeout-minutes", "0.08")
            return launch(tmp_path / "run", *more, sheets=True)

    assert run_ranks(rank, 2, rendezvous=False) == [0, 0]
    assert sheet(tmp_path / "run", 1).std() > 0


def double(latents: torch.Tensor, prompts: tuple[str, ...]) -> SimpleNamespace:
    """A sampler whose samples are these."""
    return SimpleNamespace(
        prompts=SimpleNamespace(prompts=prompts),
        plan=SimpleNamespace(times=(1.0, 0.0)),
        topology=SimpleNamespace(rank=0),
        teacher=lambda chosen, steps, guidance: latents,
        student=lambda chosen: latents,
        gather=lambda own, count: own,
    )


def drawn(config: Config, sampler: SimpleNamespace, *iterations: int) -> None:
    drawer = sheets_module.SampleSheets(config, sheets_module.FixedSamples(config))
    for iteration in iterations:
        drawer.draw(sampler, iteration)


def test_latents_that_are_no_pixels_cost_the_sheet_and_not_the_run(pipeline, tmp_path, capsys):
    config = Config(model=ModelConfig(pipeline), checkpoint=CheckpointConfig(tmp_path))
    drawn(config, double(torch.zeros(2, 16, 2, 4, 4), ("a", "b")), 7)
    assert "iteration 7: no sample sheet" in capsys.readouterr().out
    assert not (tmp_path / "samples").exists()


def test_clips_are_decoded_one_by_one_and_kept_in_a_tiles_size(pipeline, tmp_path, monkeypatch):
    decoded = []

    def decode(source, latents):
        for clip in latents:
            decoded.append((clip.device.type, torch.get_num_threads()))
            yield torch.ones(1, 3, 2, 1040, 640) * clip.mean()

    source = SimpleNamespace(has_vae=True)
    monkeypatch.setattr(sheets_module, "read_pipeline", lambda path: source)
    monkeypatch.setattr(sheets_module, "decoded_clips", decode)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    config = Config(
        model=ModelConfig(pipeline), checkpoint=CheckpointConfig(tmp_path), logging=LoggingConfig(sample_prompts=2)
    )
    threads = torch.get_num_threads()
    drawn(config, double(torch.full((3, 16, 2, 4, 4), 0.5), ("a", "b", "c")), 1, 2)
    assert decoded == [("cpu", 3)] * 6, "two of the teacher's once, two of the student's twice"
    assert torch.get_num_threads() == threads
    height, width = iio.imread(tmp_path / "samples" / "iter_0000002.gif").shape[1:3]
    assert height < 2 * 520 and width < 2 * 320
