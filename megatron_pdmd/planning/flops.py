"""What the passes of a DiT compute, by formula: the model's own FLOPs, as MFU counts them.

Only matrix products count, 2 for each product and sum of two numbers. Padding is left out, and so is what recomputation
or a fused attention's backward pass computes again. With S tokens, L text tokens, width d, feed-forward width f and n
blocks, patches of p numbers in and q out, text of D and sinusoids of w channels, a forward pass of one sample needs

- embeddings and head: 2 S d (p + q) + 2 L d (D + d) + 2 d (w + d) + 12 d^2;
- a block: self-attention 8 S d^2 + 4 S^2 d, cross-attention 4 (S + L) d^2 + 4 S L d, feed-forward 4 S d f;
- an adapter of rank r: 2 N r (inputs + outputs) for each of a block's linears, on its N tokens.

A backward pass needs as much for the gradient of every factor that has one: the weights that learn, and the inputs that
depend on any.
"""

import math
from dataclasses import dataclass

from megatron_pdmd.models.wan.config import WanConfig


@dataclass(frozen=True)
class PassSize:
    """What goes through a model in one pass.

    Attributes:
        samples: B.
        tokens: S of one sample, without padding.
        text: tokens L of the text.
    """

    samples: int
    tokens: int
    text: int


@dataclass(frozen=True)
class _Linear:
    """`count` linears of a kind, each on so many tokens; those of the blocks carry adapters."""

    tokens: int
    inputs: int
    outputs: int
    count: int = 1
    adapted: bool = False

    def forward(self, rank: int) -> int:
        return 2 * self.count * self.tokens * (self.inputs * self.outputs + rank * (self.inputs + self.outputs))

    def input_gradient(self, rank: int) -> int:
        return 2 * self.count * self.tokens * self.inputs * (self.outputs + rank)

    def weight_gradient(self) -> int:
        return 2 * self.count * self.tokens * self.inputs * self.outputs

    def adapter_gradient(self, rank: int) -> int:
        """Of both factors, and of what stands between them."""
        return 2 * self.count * self.tokens * rank * (self.inputs + 2 * self.outputs)


def forward_flops(config: WanConfig, size: PassSize, *, adapter_rank: int = 0) -> int:
    """FLOPs of a forward pass, of all ranks that share it together.

    Args:
        config: the model's shape.
        size: of the pass.
        adapter_rank: of the adapter that the pass applies; 0 where it applies none.
    """
    linears = _linears(config, size).values()
    products = sum(linear.forward(adapter_rank if linear.adapted else 0) for linear in linears)
    return size.samples * (products + _attention(config, size))


def backward_flops(
    config: WanConfig, size: PassSize, *, adapter_rank: int = 0, latents_have_gradient: bool = False
) -> int:
    """FLOPs of a backward pass, of all ranks that share it together.

    Args:
        config: the model's shape.
        size: of the pass.
        adapter_rank: of the adapter that learns, and nothing else; 0 where all weights do.
        latents_have_gradient: whether the latents came from a pass that learns too.
    """
    constant = {"time_in", "text_in"}  # inputs that depend on nothing that learns
    if adapter_rank:
        constant |= {"time", "text", "block_text"}
    if not latents_have_gradient:
        constant |= {"patches", "first_block_in"} if adapter_rank else {"patches"}
    total = 2 * _attention(config, size)
    for name, linear in _linears(config, size).items():
        rank = adapter_rank if linear.adapted else 0
        if name not in constant:
            total += linear.input_gradient(rank)
        if rank:
            total += linear.adapter_gradient(rank)
        elif not adapter_rank:
            total += linear.weight_gradient()
    return size.samples * total


def _linears(config: WanConfig, size: PassSize) -> dict[str, _Linear]:
    """Every linear of the model, by where its input comes from."""
    d, blocks, patch = config.hidden_size, config.num_layers, math.prod(config.patch_size)
    return {
        "patches": _Linear(size.tokens, config.in_channels * patch, d),
        "time_in": _Linear(1, config.freq_dim, d),
        "time": _Linear(1, d, 7 * d),  # the embedder's second, and the modulation of the blocks
        "text_in": _Linear(size.text, config.text_dim, d),
        "text": _Linear(size.text, d, d),
        "first_block_in": _Linear(size.tokens, d, d, 3, adapted=True),
        "block_in": _Linear(size.tokens, d, d, 3 * (blocks - 1), adapted=True),
        "block_inside": _Linear(size.tokens, d, d, 3 * blocks, adapted=True),
        "block_text": _Linear(size.text, d, d, 2 * blocks, adapted=True),
        "feed_forward_in": _Linear(size.tokens, d, config.ffn_dim, blocks, adapted=True),
        "feed_forward": _Linear(size.tokens, config.ffn_dim, d, blocks, adapted=True),
        "head": _Linear(size.tokens, d, config.out_channels * patch),
    }


def _attention(config: WanConfig, size: PassSize) -> int:
    """Scores and weighted sums of both attentions of all blocks, for one sample."""
    return 4 * config.num_layers * size.tokens * (size.tokens + size.text) * config.hidden_size
