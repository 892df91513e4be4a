"""The Wan diffusion transformer: noisy latents, times and conditions to the flow eps - x0.

Numerics, mixed precision included, are those of diffusers' WanTransformer3DModel: norms, modulation and the time
embedder in fp32, all else in the model's dtype.
"""

import copy
import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megatron_pdmd.models.conditions import Conditions
from megatron_pdmd.models.layers.attention import Positions, attention_backend, attention_operators
from megatron_pdmd.models.layers.block_attention import block_attention_for
from megatron_pdmd.models.layers.rope import RotaryEmbedding
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, compute_dtype
from megatron_pdmd.models.lora import AdapterConfig
from megatron_pdmd.models.wan.block import WanBlock
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.embeddings import ConditionEmbedder, PatchEmbedding, unpatchify
from megatron_pdmd.parallel.context import ContextMethod, ContextParallel, SequenceSplit, context_method
from megatron_pdmd.parallel.topology import Topology, existing_topology
from pdmd_kernels import modulated_layer_norm


class WanModel(nn.Module):
    """A Wan model with random weights, sharded over the tensor-parallel group.

    Build it under `torch.device("meta")` for a model without weights.

    Args:
        config: the model's shape.
        dtype: of the parameters; norms, modulation tables and the time embedder stay in at least fp32.
        topology: the process groups; by default the current ones, or a single rank if there are none.
        attention_backend_name: "sdpa" or "flash" (`--attention-backend`).
        recompute_granularity: what the backward pass computes again: "full" all but every block's input, "selective"
            all but that and the attentions' outputs, which cost most in long clips.
        context_parallel_method: "ulysses", "ring" or "auto" (`--context-parallel-method`).

    Attributes:
        adapters: the low-rank adapters the model carries, by name.

    Raises:
        ValueError: the shape does not fit the topology, or the backend cannot be used.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        dtype: torch.dtype = torch.float32,
        topology: Topology | None = None,
        attention_backend_name: str = "sdpa",
        recompute_granularity: Literal["full", "selective"] | None = None,
        context_parallel_method: Literal["auto", "ulysses", "ring"] = "auto",
    ):
        super().__init__()
        if recompute_granularity not in (None, "full", "selective"):
            raise ValueError(f"--recompute-granularity {recompute_granularity}: unknown; choose full or selective")
        topology = topology or existing_topology()
        parallel, sequence = TensorParallel.of(topology), SequenceSplit.of(topology)
        method = check_layout(config, parallel.size, sequence.context, context_parallel_method)
        backend = attention_backend(attention_backend_name)
        context = ContextParallel.of(topology, method, backend, block_attention_for)
        size, exact = config.hidden_size, compute_dtype(dtype)
        self.config = config
        self.dtype = dtype
        self.parallel = parallel
        self.sequence = sequence
        self.context = context
        self.recompute_granularity = recompute_granularity
        self.adapters: dict[str, AdapterConfig] = {}
        self.rope = RotaryEmbedding(config.attention_head_dim, max_positions=config.rope_max_seq_len)
        self.patch_embedding = PatchEmbedding(config.in_channels, size, config.patch_size, dtype=dtype)
        self.condition_embedder = ConditionEmbedder(
            size, freq_dim=config.freq_dim, text_dim=config.text_dim, dtype=dtype
        )
        self.blocks = nn.ModuleList(
            WanBlock(config, parallel=parallel, dtype=dtype, context=context) for _ in range(config.num_layers)
        )
        self.proj_out = nn.Linear(size, config.out_channels * math.prod(config.patch_size), dtype=dtype)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, size, dtype=exact) / math.sqrt(size))
        embedder = self.condition_embedder
        for module in (self.patch_embedding, embedder.time_embedder, embedder.time_proj, self.proj_out):
            parallel.mark_replicated(module)
        parallel.mark_replicated_parameter(self.scale_shift_table)

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions | Tensor, adapter: str | None = None) -> Tensor:
        """Predicts the flow.

        Args:
            x_t: noisy latents [B, C, F, H, W], in any floating dtype.
            t: times in [0, 1], one per sample [B] or one per token [B, S].
            conditions: `Conditions`, or text embeddings [B, L, D] alone.
            adapter: name of the low-rank adapter to apply; None for the base weights.

        Returns:
            The flow [B, out_channels, F, H, W] in the dtype of x_t, whole on every rank.

        Raises:
            ValueError: sizes that do not fit the model or each other, or an unknown adapter.
        """
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"adapter {adapter!r}: the model has {sorted(self.adapters) or 'none'}; add it first")
        conditions = Conditions.of(conditions)
        x = self._joined_input(x_t, conditions)
        grid = self._token_grid(x)
        self._check_batch(x, t, conditions.text, math.prod(grid))
        rope = self.rope(grid, device=x.device, dtype=compute_dtype(self.dtype))
        positions = Positions(self.sequence.context_part(rope), len(rope))
        tokens = self.patch_embedding(self.sequence.split(self.patch_embedding.patches(x)))
        t = t.unsqueeze(1) if t.ndim == 1 else self.sequence.split(t)
        time, modulation = self.condition_embedder.time(t)
        text = self.condition_embedder.text_embedder(conditions.text.to(self.dtype))
        text = self.parallel.enter_replicated(text)
        for block in self.blocks:
            tokens = self._run(block, tokens, text, modulation, positions, adapter)
        shift, scale = (self.scale_shift_table + time.unsqueeze(-2)).unbind(-2)
        tokens = modulated_layer_norm(tokens, shift, scale, eps=self.config.eps)
        tokens = self.sequence.join(self.proj_out(tokens), len(rope))
        return unpatchify(tokens, grid, self.config.patch_size).to(x_t.dtype)

    def __deepcopy__(self, memo: dict) -> "WanModel":
        """A copy with weights of its own in the same process groups, its parameters marked as the original's."""
        for shared in (self.parallel, self.parallel.group, self.sequence, self.context):
            memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for parameter, original in zip(twin.parameters(), self.parameters(), strict=True):
            parameter.__dict__.update(original.__dict__)
        return twin

    def _run(self, block: WanBlock, *arguments: Any) -> Tensor:
        """A block's output, with what its backward needs kept or computed again."""
        if self.recompute_granularity is None or not torch.is_grad_enabled():
            return block(*arguments)
        options = {}
        if self.recompute_granularity == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, attention_operators())
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    def _joined_input(self, x_t: Tensor, conditions: Conditions) -> Tensor:
        """Latents and what joins them along channels, in the model's dtype."""
        parts = [part for part in (x_t, conditions.mask, conditions.image_latents) if part is not None]
        for part in parts:
            if part.ndim != 5 or part.shape[2:] != x_t.shape[2:] or len(part) != len(x_t):
                raise ValueError(
                    f"latents {_size(x_t)} and what is joined to them, {_size(part)}: expected [B, C, F, H, W] tensors"
                    " that differ in channels only"
                )
        channels = sum(part.shape[1] for part in parts)
        if channels != self.config.in_channels:
            raise ValueError(
                f"the model takes {self.config.in_channels} channels, got {channels} (latents {x_t.shape[1]}, mask and"
                f" image latents {channels - x_t.shape[1]}); give the conditions this model was trained with"
            )
        parts = [part.to(self.dtype) for part in parts]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _token_grid(self, x: Tensor) -> tuple[int, ...]:
        sizes, patch = x.shape[2:], self.config.patch_size
        if any(size % step for size, step in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of frames, height, width {_size(x[0, 0])} are not multiples of patches {patch}")
        return tuple(size // step for size, step in zip(sizes, patch, strict=True))

    def _check_batch(self, x: Tensor, t: Tensor, text: Tensor, tokens: int) -> None:
        if t.shape not in ((len(x),), (len(x), tokens)):
            raise ValueError(f"times {_size(t)}: expected one per sample [{len(x)}] or per token [{len(x)}, {tokens}]")
        if text.ndim != 3 or len(text) != len(x) or text.shape[2] != self.config.text_dim:
            raise ValueError(f"text {_size(text)}: expected [{len(x)}, tokens, {self.config.text_dim}]")


def _size(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def check_layout(config: WanConfig, tensor: int, context: int, method: str) -> ContextMethod:
    """Refuses ranks that a model's heads and units do not divide over, and chooses the context-parallel method.

    Args:
        config: the model's shape.
        tensor: tensor-parallel ranks.
        context: context-parallel ranks.
        method: `--context-parallel-method`.

    Raises:
        ValueError: names the flag and the nearest sizes that work.
    """
    common = math.gcd(config.num_attention_heads, config.ffn_dim)
    if common % tensor:
        works = [size for size in range(1, common + 1) if common % size == 0]
        nearest = {*[size for size in works if size < tensor][-1:], *[size for size in works if size > tensor][:1]}
        raise ValueError(
            f"--tensor-model-parallel-size {tensor} does not divide the model's {config.num_attention_heads} heads and"
            f" {config.ffn_dim} feed-forward units; use {' or '.join(map(str, sorted(nearest)))}"
        )
    return context_method(method, context, tensor, config.num_attention_heads)
