"""What a finished run leaves: Hugging Face folders of its experts, the task's metrics, and summary.json."""

import functools
import json
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
from megatron_pdmd.models.lora import merged_weights
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
    )


def evaluate_moving_digits(config: Config, sampler: Sampler) -> dict[str, dict[str, Any]]:
    """Metrics of real clips, the teacher with many and with few steps, and the student. Called on all ranks.

    The reference is one set of real clips of held-out digits, `real` another, so its distance is the floor. The teacher
    with few steps is sampled with and without guidance, and `teacher_4` is the one nearer to the real clips.

    Returns:
        Metrics by sampler, named with its number of steps.
    """
    options, method = config.evaluation, config.method
    classifier = load_classifier(options.classifier).to(sampler.topology.device)
    images, labels = load_heldout_digits(options.heldout_digits)
    chosen = [i % len(sampler.prompts) for i in range(options.clips)]
    texts = [sampler.prompts.prompts[i] for i in chosen]
    reference = clip_features(classifier, real_clips(texts, images, labels, config.training.seed))
    measure = functools.partial(evaluate_clips, prompts=texts, classifier=classifier, real_features=reference)
    guidance, few = functools.partial(guidance_scale, method), method.num_steps
    results = {"real": measure(real_clips(texts, images, labels, config.training.seed + 1))}
    for name, steps, scale in (
        (f"teacher_{options.teacher_steps}", options.teacher_steps, guidance),
        (f"teacher_{few}_guided", few, guidance),
        (f"teacher_{few}_unguided", few, lambda expert: 1.0),
    ):
        results[name] = measure(_told(name, sampler, sampler.teacher(chosen, steps, scale)))
    both = (results[f"teacher_{few}_guided"], results[f"teacher_{few}_unguided"])
    results[f"teacher_{few}"] = min(both, key=lambda metrics: metrics["frechet_distance"])
    results[f"student_{few}"] = measure(_told(f"student_{few}", sampler, sampler.student(chosen)))
    return results


def _told(name: str, sampler: Sampler, clips: torch.Tensor) -> torch.Tensor:
    if sampler.topology.rank == 0:
        print(f"sampled {len(clips)} clips of {name}", flush=True)
    return clips


def write_summary(folder: Path, content: dict[str, Any]) -> None:
    """Writes summary.json as a whole or not at all."""
    partial = folder / "summary.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "summary.json")


def phase_summaries(plan: PhasePlan, iterations: Sequence[int]) -> list[dict[str, Any]]:
    """What each phase was: its expert, steps, interval and iterations."""
    return [
        {"phase": p.index, "expert": p.expert, "steps": list(p.steps), "end": p.end, "iterations": count}
        for p, count in zip(plan.phases, iterations, strict=True)
    ]
