"""The five numbers that say how well clips of moving digits answer their prompts and match real clips."""

from collections.abc import Sequence

import torch

from megatron_pdmd.evaluation.clip_classifier import ClipClassifier
from megatron_pdmd.evaluation.metrics import diversity, frechet_distance
from megatron_pdmd.evaluation.motion import direction_accuracy, mean_velocity, speed_error
from megatron_pdmd.evaluation.moving_digits import DIRECTIONS, FRAMES, HEIGHT, SPEEDS, WIDTH, Motion, sample_clips

STILL = 0.15  # pixels per frame; real clips drift this much across their direction, so less is no motion


def evaluate_clips(
    clips: torch.Tensor, prompts: list[str], classifier: ClipClassifier, real_features: torch.Tensor
) -> dict[str, float | None]:
    """Measures clips against their prompts and against real clips.

    Args:
        clips: [N, 1, F, H, W], on any device; values outside [-1, 1] are clipped, as they are when a frame is shown.
        prompts: N of the task's prompts.
        classifier: reads digits, and gives the features of diversity and Frechet distance.
        real_features: [M, D], `clip_features` of the real clips (or of other samples to be compared with).

    Returns:
        `digit_accuracy` and `direction_accuracy` in [0, 1]; `speed_error`, mean |measured / nominal - 1|; `diversity`,
        the mean feature distance between clips of the same prompt, None if no prompt comes twice; `frechet_distance` to
        the real features, None for a single clip.

    Raises:
        ValueError: shapes or counts do not fit, a value is not finite, or a prompt is not of this task.
    """
    _check_clips(clips, prompts)
    clips = clips.to(_device(classifier))
    motions = [Motion.from_prompt(prompt) for prompt in prompts]
    features, digits = _read_clips(classifier, clips)
    velocity = mean_velocity(clips)
    directions = torch.tensor([DIRECTIONS[m.direction] for m in motions], device=clips.device)
    speeds = torch.tensor([SPEEDS[m.speed] for m in motions], device=clips.device)
    asked = torch.tensor([m.digit for m in motions], device=clips.device)
    return {
        "digit_accuracy": (digits == asked).double().mean().item(),
        "direction_accuracy": direction_accuracy(velocity, directions, minimum_speed=STILL),
        "speed_error": speed_error(velocity, directions, speeds),
        "diversity": diversity(features, motions) if len(set(motions)) < len(motions) else None,
        "frechet_distance": frechet_distance(features, real_features.to(features.device)) if len(clips) > 1 else None,
    }


def check_measurable(prompts: Sequence[str], latent_shape: Sequence[int], clips: int) -> None:
    """Refuses a run whose samples could not be measured at its end.

    Args:
        prompts: the run's, whose first are sampled.
        latent_shape: [C, F, H, W] of a sample.
        clips: number of samples.

    Raises:
        ValueError: names the flag.
    """
    wanted = (1, FRAMES, HEIGHT, WIDTH)
    if tuple(latent_shape) != wanted:
        raise ValueError(
            f"--task moving_digits: its clips are {list(wanted)} (channels, frames, height, width), the run's are "
            f"{list(latent_shape)}; give --frames {FRAMES} --height {HEIGHT} --width {WIDTH}, or --task none"
        )
    if clips < 2:
        raise ValueError(f"--clips {clips}: the distance between two sets needs at least 2")
    for prompt in dict.fromkeys(prompts[:clips]):
        try:
            Motion.from_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"--prompts: {error}; use the task's prompts, or --task none") from None


def real_clips(prompts: list[str], images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Real clips of the prompts, [N, 1, F, H, W], the same for the same seed.

    Args:
        prompts: N of the task's prompts.
        images: [M, 28, 28] in [0, 1], the handwritten digits to draw from.
        labels: [M], the class of each.
        seed: draws the digits and their paths.
    """
    motions = [Motion.from_prompt(prompt) for prompt in prompts]
    return sample_clips(motions, images, labels, torch.Generator().manual_seed(seed))


def clip_features(classifier: ClipClassifier, clips: torch.Tensor) -> torch.Tensor:
    """The classifier's features of clips [N, 1, F, H, W] clipped to [-1, 1]: [N, D], where the classifier is."""
    return _read_clips(classifier, clips)[0]


def frechet_noise_floor(
    prompts: list[str], images: torch.Tensor, labels: torch.Tensor, classifier: ClipClassifier, seed: int
) -> float:
    """The Frechet distance between two independent sets of real clips, one clip per prompt in each.

    No generator can be told from real clips below it. The arguments are those of `real_clips`.
    """
    sets = real_clips(prompts * 2, images, labels, seed)
    return frechet_distance(*clip_features(classifier, sets).chunk(2))


def _check_clips(clips: torch.Tensor, prompts: list[str]) -> None:
    if clips.shape[1:] != (1, FRAMES, HEIGHT, WIDTH):
        wanted = f"[N, 1, {FRAMES}, {HEIGHT}, {WIDTH}]"
        raise ValueError(f"samples of shape {list(clips.shape)} are not clips of moving digits, {wanted}")
    if len(clips) != len(prompts):
        raise ValueError(f"{len(clips)} samples need as many prompts, got {len(prompts)}")
    bad = int((~clips.isfinite().flatten(1).all(1)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(clips)} samples hold NaN or infinity; generate them again in fp32 to see where from"
        )


@torch.no_grad()
def _read_clips(
    classifier: ClipClassifier, clips: torch.Tensor, batch_size: int = 250
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] and the digits read [N], where the classifier is."""
    batches = (batch.to(_device(classifier)).clamp(-1, 1) for batch in clips.split(batch_size))
    features = torch.cat([classifier.features(batch) for batch in batches])
    return features, classifier.heads(features)[0].argmax(-1)


def _device(classifier: ClipClassifier) -> torch.device:
    return next(classifier.parameters()).device
