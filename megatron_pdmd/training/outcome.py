"""What a finished run leaves: Hugging Face folders of its experts, the task's metrics, and summary.json."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.conversion.export import TrainedExpert, export_pipeline
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder
from megatron_pdmd.diffusion.phases import PhasePlan, deployment_boundary
from megatron_pdmd.distillation.step import guidance_scale
from megatron_pdmd.evaluation.clip_classifier import load_classifier
from megatron_pdmd.evaluation.heldout_digits import load_heldout_digits
from megatron_pdmd.evaluation.moving_digits_report import clip_features, evaluate_clips, real_clips
from megatron_pdmd.files.whole import write_json
from megatron_pdmd.models.lora import merged_weights
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.sampling import Sampler


def export_run(config: Config, source: PipelineFolder, plan: PhasePlan, networks: Networks, destination: Path) -> None:
    """Writes a pipeline folder with each phase's expert, adapters merged, in the dtype of training.

    Called on all ranks, which share the work.

    Raises:
        ValueError: see `conversion.export.export_pipeline`; on all ranks.
    """
    experts = []
    for phase in plan.phases:
        delivered = networks.delivered(phase.index)
        experts.append(TrainedExpert(phase.steps, phase.expert, merged_weights(delivered.model, delivered.adapter)))
    export_pipeline(
        source,
        destination,
        experts,
        shift=config.method.timestep_shift,
        boundary_ratio=deployment_boundary(plan),
        prompt_length=config.data.prompt_length,
        latent_size=(config.data.frames, config.data.height, config.data.width),
    )


def evaluate_moving_digits(config: Config, sampler: Sampler) -> dict[str, dict[str, Any]]:
    """Metrics of real clips, the teacher with many and with few steps, and the student. Called on all ranks.

    The reference is one set of real clips of held-out digits, `real` another, so its distance is the floor. The teacher
    with few steps is sampled with and without guidance, and `teacher_4` is the one nearer to the real clips.

    Returns:
        On rank 0, metrics by sampler, named with its number of steps; elsewhere nothing.
    """
    options, few = config.evaluation, config.method.num_steps
    chosen = [i % len(sampler.prompts) for i in range(options.clips)]
    guidance = functools.partial(guidance_scale, config.method)
    clips = {}
    for name, sample in (
        (f"teacher_{options.teacher_steps}", lambda: sampler.teacher(chosen, options.teacher_steps, guidance)),
        (f"teacher_{few}_guided", lambda: sampler.teacher(chosen, few, guidance)),
        (f"teacher_{few}_unguided", lambda: sampler.teacher(chosen, few, lambda expert: 1.0)),
        (f"student_{few}", lambda: sampler.student(chosen)),
    ):
        clips[name] = sampler.gather(sample(), len(chosen))
        if sampler.topology.rank == 0:
            print(f"sampled {len(chosen)} clips of {name}", flush=True)
    with together(patient_group()):
        return _measure(config, clips, [sampler.prompts.prompts[i] for i in chosen], sampler.topology)


def _measure(
    config: Config, clips: dict[str, torch.Tensor | None], texts: list[str], topology: Topology
) -> dict[str, dict[str, Any]]:
    """The metrics of sampled and of real clips, on rank 0, whose device reads them."""
    if topology.rank != 0:
        return {}
    options, few, seed = config.evaluation, config.method.num_steps, config.training.seed
    classifier = load_classifier(options.classifier).to(topology.device)
    images, labels = load_heldout_digits(options.heldout_digits)
    reference = clip_features(classifier, real_clips(texts, images, labels, seed))
    clips = {"real": real_clips(texts, images, labels, seed + 1)} | clips
    results = {name: evaluate_clips(own, texts, classifier, reference) for name, own in clips.items()}
    student = results.pop(f"student_{few}")
    both = (results[f"teacher_{few}_guided"], results[f"teacher_{few}_unguided"])
    nearer = min(both, key=lambda metrics: metrics["frechet_distance"])
    return results | {f"teacher_{few}": nearer, f"student_{few}": student}


def write_summary(folder: Path, content: dict[str, Any]) -> None:
    """Writes summary.json as a whole or not at all; a number that is not finite, which JSON has not, becomes null."""
    write_json(folder / "summary.json", _without_infinities(content))


def _without_infinities(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_infinities(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_infinities(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def phase_summaries(plan: PhasePlan, iterations: Sequence[int]) -> list[dict[str, Any]]:
    """What each phase was: its expert, steps, interval and iterations."""
    return [
        {"phase": p.index, "expert": p.expert, "steps": list(p.steps), "end": p.end, "iterations": count}
        for p, count in zip(plan.phases, iterations, strict=True)
    ]
