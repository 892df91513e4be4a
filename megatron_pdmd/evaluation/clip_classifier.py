"""The small network that reads clips of moving digits: which digit it is, and features for the Frechet distance."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from megatron_pdmd.evaluation.moving_digits import DIGITS, FRAMES, HEIGHT, WIDTH
from megatron_pdmd.evaluation.samples import load_tensors


class ClipClassifier(nn.Module):
    """Convolutions over each frame, then one linear over all frames, so that the features see form and motion alike."""

    def __init__(self, features: int = 48, channels: tuple[int, int, int] = (16, 24, 32)):
        super().__init__()
        narrow, middle, wide = channels
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, narrow, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(narrow, middle, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(middle, middle, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(middle, wide, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.frame_features = nn.Linear(wide * (HEIGHT // 4) * (WIDTH // 4), features)
        self.clip_features = nn.Linear(features * FRAMES, features)
        self.digit = nn.Linear(features, len(DIGITS))
        self.displacement = nn.Linear(features, 2)

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        """[B, 1, F, H, W] in [-1, 1] -> [B, features]."""
        frames = clips.float().transpose(1, 2).flatten(0, 1)
        hidden = F.gelu(self.frame_features(self.convolutions(frames).flatten(1)))
        return self.clip_features(hidden.unflatten(0, (-1, FRAMES)).flatten(1))

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Digit logits [B, 10] and the digit's displacement per frame in pixels [B, 2]."""
        return self.heads(self.features(clips))

    def heads(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` returns, from features [B, features]."""
        hidden = F.gelu(features)
        return self.digit(hidden), self.displacement(hidden)


def load_classifier(path: Path) -> ClipClassifier:
    """The trained classifier, in evaluation mode and fp32.

    Raises:
        ValueError: the file is missing, unreadable or of another network.
    """
    classifier = ClipClassifier()
    tensors = load_tensors(path, "examples/tiny_wan/classifier.safetensors of the repository is one")
    shapes, own = ({name: tensor.shape for name, tensor in t.items()} for t in (tensors, classifier.state_dict()))
    if shapes != own:
        raise ValueError(f"{path} does not fit this classifier; use the file that came with this examples/tiny_wan")
    classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return classifier.eval().requires_grad_(False)
