"""Motion measured from the frames themselves: where a clip's bright mass goes, and whether it was asked to go there."""

import torch


def centroids(clips: torch.Tensor, floor: float = 0.1) -> torch.Tensor:
    """The centre of brightness in each frame.

    Args:
        clips: [B, C, F, H, W] in [-1, 1], background -1; values outside count as the nearest inside.
        floor: brightness in [0, 1] that counts as background, lest faint noise draw the centre to the middle.

    Returns:
        [B, F, 2], (x, y) in pixels from the frame's centre, y downwards; (0, 0) for a frame without brightness.
    """
    height, width = clips.shape[-2:]
    brightness = (clips.float().mean(1).clamp(-1, 1) + 1) / 2
    mass = (brightness - floor).clamp(min=0)
    total = mass.sum((-2, -1)).clamp(min=torch.finfo(mass.dtype).tiny)
    x = torch.arange(width, device=clips.device) + 0.5 - width / 2
    y = torch.arange(height, device=clips.device) + 0.5 - height / 2
    return torch.stack([(mass.sum(-2) * x).sum(-1) / total, (mass.sum(-1) * y).sum(-1) / total], -1)


def displacements(clips: torch.Tensor) -> torch.Tensor:
    """How far the centre of brightness moves from each frame to the next: [B, F - 1, 2], (x, y) in pixels."""
    return centroids(clips).diff(dim=1)


def mean_velocity(clips: torch.Tensor) -> torch.Tensor:
    """The slope of the least-squares line through the centres: [B, 2], (x, y) in pixels per frame.

    Raises:
        ValueError: the clips have a single frame.
    """
    frames = clips.shape[2]
    if frames < 2:
        raise ValueError(f"motion needs clips of at least two frames, got {frames}")
    time = torch.arange(frames, device=clips.device) - (frames - 1) / 2
    return torch.einsum("f,bfc->bc", time / time.square().sum(), centroids(clips))


def direction_accuracy(velocity: torch.Tensor, directions: torch.Tensor, minimum_speed: float = 0.0) -> float:
    """Share of clips that move within 45 degrees of the asked direction, and faster than `minimum_speed` along it.

    Args:
        velocity: [B, 2], from `mean_velocity`.
        directions: [B, 2], the asked directions as unit vectors.
        minimum_speed: pixels per frame along the asked direction below which a clip counts as standing still.
    """
    along = (velocity * directions).sum(-1)
    across = (velocity - along[:, None] * directions).norm(dim=-1)
    return ((along > across) & (along > minimum_speed)).double().mean().item()


def speed_error(velocity: torch.Tensor, directions: torch.Tensor, speeds: torch.Tensor) -> float:
    """Mean of |measured / nominal - 1|, measured along the asked direction: 1 for frozen clips, 2 for reversed ones.

    Args:
        velocity: [B, 2], from `mean_velocity`.
        directions: [B, 2], the asked directions as unit vectors.
        speeds: [B], nominal speeds in pixels per frame, above 0.
    """
    along = (velocity * directions).sum(-1)
    return (along / speeds - 1).abs().double().mean().item()
