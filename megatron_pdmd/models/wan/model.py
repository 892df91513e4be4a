"""The Wan diffusion transformer: noisy latents, times and conditions to the flow eps - x0.

Numerics, mixed precision included, are those of diffusers' WanTransformer3DModel: norms, modulation and the time
embedder in fp32, all else in the model's dtype.
"""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_pdmd.models.conditions import Conditions
from megatron_pdmd.models.layers.attention import attention_backend
from megatron_pdmd.models.layers.modulation import modulated_layer_norm
from megatron_pdmd.models.layers.rope import RotaryEmbedding
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, compute_dtype
from megatron_pdmd.models.lora import AdapterConfig
from megatron_pdmd.models.wan.block import WanBlock
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.embeddings import ConditionEmbedder, PatchEmbedding, unpatchify
from megatron_pdmd.parallel.topology import Topology


class WanModel(nn.Module):
    """A Wan model with random weights, sharded over the tensor-parallel group.

    Build it under `torch.device("meta")` for a model without weights.

    Args:
        config: the model's shape.
        dtype: of the parameters; norms, modulation tables and the time embedder stay in at least fp32.
        topology: the process groups; by default the current ones, or a single rank if there are none.
        attention_backend_name: "sdpa" or "flash" (`--attention-backend`).
        recompute_granularity: "full" keeps only every block's input for the backward pass and computes the rest again.

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
        recompute_granularity: Literal["full"] | None = None,
    ):
        super().__init__()
        if recompute_granularity not in (None, "full"):
            raise ValueError(f"--recompute-granularity {recompute_granularity}: not supported here; choose full")
        parallel = TensorParallel.of(topology)
        _check_divisible(config, parallel.size)
        size, exact = config.hidden_size, compute_dtype(dtype)
        self.config = config
        self.dtype = dtype
        self.parallel = parallel
        self.recompute_granularity = recompute_granularity
        self.adapters: dict[str, AdapterConfig] = {}
        self.rope = RotaryEmbedding(config.attention_head_dim, max_positions=config.rope_max_seq_len)
        self.patch_embedding = PatchEmbedding(config.in_channels, size, config.patch_size, dtype=dtype)
        self.condition_embedder = ConditionEmbedder(
            size, freq_dim=config.freq_dim, text_dim=config.text_dim, dtype=dtype
        )
        backend = attention_backend(attention_backend_name)
        self.blocks = nn.ModuleList(
            WanBlock(config, parallel=parallel, dtype=dtype, backend=backend) for _ in range(config.num_layers)
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
        tokens = self.patch_embedding(self.parallel.split_sequence(self.patch_embedding.patches(x)))
        t = t.unsqueeze(1) if t.ndim == 1 else self.parallel.split_sequence(t)
        time, modulation = self.condition_embedder.time(t)
        text = self.condition_embedder.text_embedder(conditions.text.to(self.dtype))
        text = self.parallel.enter_replicated(text)
        recompute = self.recompute_granularity == "full" and torch.is_grad_enabled()
        for block in self.blocks:
            arguments = (tokens, text, modulation, rope, adapter)
            if recompute:
                tokens = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(*arguments)
        shift, scale = (self.scale_shift_table + time.unsqueeze(-2)).unbind(-2)
        tokens = modulated_layer_norm(tokens, shift, scale, eps=self.config.eps)
        tokens = self.parallel.join_sequence(self.proj_out(tokens))
        return unpatchify(tokens, grid, self.config.patch_size).to(x_t.dtype)

    def __deepcopy__(self, memo: dict) -> "WanModel":
        """A copy with weights of its own in the same process groups, its parameters marked as the original's."""
        memo[id(self.parallel.group)] = self.parallel.group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for parameter, original in zip(twin.parameters(), self.parameters(), strict=True):
            parameter.__dict__.update(original.__dict__)
        return twin

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
        grid = tuple(size // step for size, step in zip(sizes, patch, strict=True))
        if self.parallel.sequence_parallel and math.prod(grid) % self.parallel.size:
            raise ValueError(
                f"--sequence-parallel: {math.prod(grid)} tokens do not divide over {self.parallel.size} tensor-parallel"
                " ranks; change the clip's size or drop the flag"
            )
        return grid

    def _check_batch(self, x: Tensor, t: Tensor, text: Tensor, tokens: int) -> None:
        if t.shape not in ((len(x),), (len(x), tokens)):
            raise ValueError(f"times {_size(t)}: expected one per sample [{len(x)}] or per token [{len(x)}, {tokens}]")
        if text.ndim != 3 or len(text) != len(x) or text.shape[2] != self.config.text_dim:
            raise ValueError(f"text {_size(text)}: expected [{len(x)}, tokens, {self.config.text_dim}]")


def _size(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _check_divisible(config: WanConfig, ranks: int) -> None:
    for name in ("num_attention_heads", "ffn_dim"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"--tensor-model-parallel-size {ranks} does not divide the model's {name} {getattr(config, name)};"
                " choose one that does"
            )
