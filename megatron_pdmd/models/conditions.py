"""What a model is conditioned on, apart from the noisy latents and their time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch of B samples; every field has the batch first.

    Attributes:
        text: embeddings of the prompts, [B, L, D], zero-padded to the length the model was trained with.
        image_latents: latents of the conditioning frames, [B, C', F, H, W], joined to x_t along channels.
        mask: which latent frames are given, [B, C'', F, H, W], joined between x_t and `image_latents`.
    """

    text: Tensor
    image_latents: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, conditions: "Conditions | Tensor") -> "Conditions":
        """Accepts the text embeddings alone in place of conditions."""
        return conditions if isinstance(conditions, cls) else cls(text=conditions)

    @classmethod
    def cat(cls, parts: Sequence["Conditions"]) -> "Conditions":
        """Joins batches; a field must be present in all of them or in none."""
        joined = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            present = [value for value in values if value is not None]
            if present and len(present) != len(values):
                raise ValueError(
                    f"conditions: {field.name} is given for some samples only; give it for all or for none"
                )
            joined[field.name] = torch.cat(present) if present else None
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> "Conditions":
        """The chosen samples; the index must keep the batch dimension (a slice or an index tensor)."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditions":
        """The same conditions on another device or in another floating dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def _map(self, function) -> "Conditions":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Conditions(**{name: None if value is None else function(value) for name, value in values.items()})
