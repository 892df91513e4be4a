"""A trace against the program itself, run on latents of a real size."""

from dataclasses import replace

import pytest
import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan
from megatron_pdmd.distillation.roles import Backward
from megatron_pdmd.distillation.step import Iteration, MicroBatch
from megatron_pdmd.distillation.tracing import TracedPass, trace
from megatron_pdmd.distillation.updates import Update, updates_of

SHAPE = (2, 3, 4, 6)
METHODS = {
    "sgts": MethodConfig(),
    "chains": MethodConfig(gradient_truncation="none", num_steps=6, phase_steps=(3, 3)),
    "no guidance": MethodConfig(guidance_scale=(1.0,), fake_rollout="full"),
    "one phase": MethodConfig(phase_steps=(4,), dmd_weighting="mean_abs"),
}


def iteration_of(method: MethodConfig, phase: int) -> Iteration:
    schedule = FlowMatchingSchedule(method.timestep_shift)
    plan = PhasePlan.build(method.num_steps, method.phase_steps, schedule, 0.8)
    return Iteration(method, plan, plan.phases[phase - 1], schedule, SHAPE, torch.device("cpu"))


def asked(update: Update, iteration: Iteration) -> tuple[list[tuple[TracedPass, ...]], tuple[str, ...]]:
    """What a program of two samples really asks for, and the names of its numbers."""
    batch = MicroBatch([3, 7], torch.randn(2, 5), torch.randn(2, 5))
    program, groups, reply = update.program(iteration, batch), [], None
    while True:
        try:
            request = program.send(reply)
        except StopIteration as finished:
            return groups, tuple(finished.value)
        reply = None
        if not isinstance(request, Backward):
            groups.append(
                tuple(
                    TracedPass(p.role, p.key, p.conditions is batch.negative, p.gradient, p.x_t.requires_grad)
                    for p in request
                )
            )
            reply = tuple(torch.randn_like(p.x_t).requires_grad_(p.gradient) for p in request)


@pytest.mark.parametrize("name", METHODS)
def test_a_trace_has_the_passes_that_a_program_makes(name):
    method, seen = METHODS[name], set()
    for phase in range(1, len(method.phase_steps) + 1):
        iteration = iteration_of(method, phase)
        for index in range(4):
            for update in updates_of(method, 5, phase, index):
                found = trace(lambda small, batch, _, own=update: own.program(small, batch), iteration)
                groups, metrics = asked(update, iteration)
                assert (list(found.groups), found.metrics) == (groups, metrics)
                seen.add(found.groups)
    assert len(seen) > len(method.phase_steps)  # the draws make a difference


def test_an_update_on_a_start_that_is_there_asks_for_its_own_phase_alone():
    method = replace(METHODS["sgts"], phase_start_reuse=6)
    iteration = iteration_of(method, 2)
    first, *_ = updates_of(method, 5, 2, 0)
    start = trace(lambda small, batch, _: small.phase_start(first.shared, batch), iteration)
    assert [one.key for one in start.passes] == [1, 1] and not start.metrics
    own = trace(lambda small, batch, latents: first.program(small, batch, latents), iteration)
    assert {one.key for one in own.passes if one.role == "generator"} == {2}
    assert own.metrics == ("fake_loss",)
