"""What the passes of a sharded DiT communicate, by formula.

With T tensor- and C context-parallel ranks, P = S / C tokens in a rank's part of the padded sequence, text of L tokens,
width d, and e bytes an element, a block's forward pass needs for B samples

- T > 1: 3 all-reduces of B P d e, or with sequence parallelism 3 all-gathers and 3 reduce-scatters of as much; one
  all-reduce of the sums of squares of query and key for each attention, 2 B P and B (P + L) numbers in fp32;
- Ulysses: all-to-all of B P d / T e, for query, key and value at once and for the output;
- ring: C - 1 times 2 B P d / T e, keys and values.

Backward needs the same, with gathers and scatters exchanged; the ring also carries the gradients of keys and values, in
fp32. The flow is gathered once a pass. https://arxiv.org/abs/2205.05198, arXiv:2309.14509, arXiv:2310.01889.
"""

import math
from dataclasses import dataclass

from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.parallel.communication import Volume
from megatron_pdmd.parallel.context import ContextMethod

_FP32 = 4


@dataclass(frozen=True)
class ModelLayout:
    """How a model is split over the ranks of one data-parallel replica.

    Attributes:
        tensor: tensor-parallel ranks T.
        context: context-parallel ranks C.
        sequence_parallel: activations between the linears are split over the tensor-parallel ranks.
        method: of context parallelism.
    """

    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    method: ContextMethod = "ulysses"

    @property
    def parts(self) -> int:
        """Ranks that share a sequence outside of the linears."""
        return self.context * (self.tensor if self.sequence_parallel else 1)


@dataclass(frozen=True)
class PassShape:
    """What goes through a model in one pass.

    Attributes:
        samples: B.
        tokens: of one sample, without padding.
        text: tokens L of the text.
        element_bytes: e, of the model's dtype.
    """

    samples: int
    tokens: int
    text: int
    element_bytes: int


def forward_volume(config: WanConfig, layout: ModelLayout, shape: PassShape) -> Volume:
    """What one rank communicates in a forward pass."""
    volume = _blocks_forward(config, layout, shape)
    if layout.parts > 1:
        outputs = config.out_channels * math.prod(config.patch_size)
        volume.add("all-gather", shape.samples * _padded(layout, shape) * outputs * shape.element_bytes)
    return volume


def backward_volume(
    config: WanConfig, layout: ModelLayout, shape: PassShape, *, adapter: bool, recompute: bool = False
) -> Volume:
    """What one rank communicates in the backward pass of all weights, or of an adapter on frozen ones.

    Before the first linears of a model with an adapter nothing learns, so the first block's input has no gradient to
    sum; the text's is summed once for all blocks, where the text embedder learns. The latents need no gradient.
    Recomputation, full or selective, communicates the blocks' forward passes again.
    """
    activations = _activations(config, layout, shape)
    volume = _attention_volume(config, layout, shape, backward=True) * config.num_layers
    entered, left = 3 * config.num_layers - adapter, 3 * config.num_layers
    volume.add(
        "reduce-scatter" if layout.sequence_parallel else "all-reduce", activations, entered * (layout.tensor > 1)
    )
    volume.add("all-gather", activations, left * layout.sequence_parallel)
    if layout.tensor > 1 and not adapter:
        volume.add("all-reduce", shape.samples * shape.text * config.hidden_size * shape.element_bytes)
    return volume + _blocks_forward(config, layout, shape) if recompute else volume


def _blocks_forward(config: WanConfig, layout: ModelLayout, shape: PassShape) -> Volume:
    activations = _activations(config, layout, shape)
    volume = _attention_volume(config, layout, shape)
    volume.add("reduce-scatter" if layout.sequence_parallel else "all-reduce", activations, 3 * (layout.tensor > 1))
    volume.add("all-gather", activations, 3 * layout.sequence_parallel)
    return volume * config.num_layers


def _attention_volume(config: WanConfig, layout: ModelLayout, shape: PassShape, *, backward: bool = False) -> Volume:
    """Of one block: the norms of query and key, and self-attention over the context-parallel ranks."""
    volume, part = Volume(), _padded(layout, shape) // layout.context
    if layout.tensor > 1:
        volume.add("all-reduce", shape.samples * 2 * part * _FP32)
        volume.add("all-reduce", shape.samples * (part + shape.text) * _FP32)
    heads = _activations(config, layout, shape) // layout.tensor
    if layout.context > 1 and layout.method == "ulysses":
        volume.add("all-to-all", 3 * heads)
        volume.add("all-to-all", heads)
    elif layout.context > 1:
        volume.add("send", 2 * heads, calls=layout.context - 1)
        if backward:
            volume.add("send", 2 * heads * _FP32 // shape.element_bytes, calls=layout.context - 1)
    return volume


def _activations(config: WanConfig, layout: ModelLayout, shape: PassShape) -> int:
    """Bytes of the tokens of one context part, whole in their width."""
    tokens = _padded(layout, shape) // layout.context
    return shape.samples * tokens * config.hidden_size * shape.element_bytes


def _padded(layout: ModelLayout, shape: PassShape) -> int:
    return -(-shape.tokens // layout.parts) * layout.parts
