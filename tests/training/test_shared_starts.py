"""Latents at the phase's start that updates share: made once a group and micro-batch, and let go with the group."""

import json
import weakref
from collections import Counter as Tally

from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.distillation.step import Iteration

FLAGS = ("--phase-start-reuse", "2", "--fake-updates", "3", "--fake-warmup", "1", "--train-iters", "1,2")


def test_a_start_is_made_once_and_lives_as_long_as_its_group(launch, tmp_path, monkeypatch):
    """Phase 2 has groups of updates (0, 1), (2, 3), (generator) and then (0, 1), (2, generator), of 2 micro-batches."""
    made, frozen, starts, run = [], Tally(), [], Roles.run
    phase_start = Iteration.phase_start

    def watched(self, counter, batch):
        others = [one for one, start in starts if start() is not None and one != counter]
        x = yield from phase_start(self, counter, batch)
        if self.phase.index == 2:
            assert others == []
            made.append((counter.iteration, counter.update, batch.samples[0]))
            starts.append((counter, weakref.ref(x)))
        return x

    def counted(self, request):
        frozen[request.key] += request.role == "generator" and len(self.generator) == 2
        return run(self, request)

    monkeypatch.setattr(Iteration, "phase_start", watched)
    monkeypatch.setattr(Roles, "run", counted)
    assert launch(tmp_path / "run", *FLAGS) == 0
    groups = [(0, 0), (0, 2), (0, -1), (1, 0), (1, 2)]
    assert made == [(*group, first) for group in groups for first in (0, 2)]
    assert frozen[1] == 2 * len(made)
    assert all(start() is None for _, start in starts)


def test_reuse_changes_nothing_in_the_first_phase(finished):
    def logged(*more: str) -> list[dict]:
        lines = (finished(*more) / "metrics.jsonl").read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name != "milliseconds"} for line in lines]

    alone, shared = logged(), logged("--phase-start-reuse", "3")
    assert shared[:3] == alone[:3]
    assert all(one["fake_loss"] != other["fake_loss"] for one, other in zip(shared[3:], alone[3:], strict=True))
