"""The Wan diffusion transformer: noisy latents, times and conditions to the flow eps - x0.

Numerics, mixed precision included, are those of diffusers' WanTransformer3DModel: norms, modulation and the time
embedder in fp32, all else in the model's dtype.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

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
from megatron_pdmd.parallel.pipeline.relay import Relay
from megatron_pdmd.parallel.pipeline.stages import Stage
from megatron_pdmd.parallel.topology import Topology, existing_topology
from pdmd_kernels import modulated_layer_norm


class Hidden(NamedTuple):
    """What one pipeline stage hands the next; the gradients of the same tensors come back.

    Attributes:
        tokens: this rank's share of them, [B, S, d].
        text: embedded [B, L, d], already entered into the parallel region: what comes back is this tensor rank's part
            of its gradient, which is summed over them on the first stage.
        time: embedded for the head, [B, 1 or S, d].
        modulation: the time's part of each block's modulation, [B, 1 or S, 6, d].
    """

    tokens: Tensor
    text: Tensor
    time: Tensor
    modulation: Tensor


class WanModel(nn.Module):
    """A Wan model with random weights, sharded over the tensor-parallel group, or one pipeline stage of it.

    Build it under `torch.device("meta")` for a model without weights.

    Args:
        config: the model's shape.
        dtype: of the parameters; norms, modulation tables and the time embedder stay in at least fp32.
        topology: the process groups; by default the current ones, or a single rank if there are none.
        attention_backend_name: "sdpa" or "flash" (`--attention-backend`).
        recompute_granularity: what the backward pass computes again: "full" all but every block's input, "selective"
            all but that and the attentions' outputs, which cost most in long clips.
        context_parallel_method: "ulysses", "ring" or "auto" (`--context-parallel-method`).
        stage: the pipeline stage to build; None for the whole model. Parameters have the names that they have there.

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
        stage: Stage | None = None,
    ):
        super().__init__()
        if recompute_granularity not in (None, "full", "selective"):
            raise ValueError(f"--recompute-granularity {recompute_granularity}: unknown; choose full or selective")
        topology = topology or existing_topology()
        parallel, sequence = TensorParallel.of(topology), SequenceSplit.of(topology)
        method = check_layout(config, parallel.size, sequence.context, context_parallel_method)
        backend = attention_backend(attention_backend_name)
        context = ContextParallel.of(topology, method, backend, block_attention_for)
        self.config = config
        self.dtype = dtype
        self.parallel = parallel
        self.sequence = sequence
        self.context = context
        self.stage = stage or Stage.of(0, [config.num_layers])
        self.relay = Relay.of(topology)
        self.recompute_granularity = recompute_granularity
        self.adapters: dict[str, AdapterConfig] = {}
        self.rope = RotaryEmbedding(config.attention_head_dim, max_positions=config.rope_max_seq_len)
        if self.stage.is_first:
            self._add_embeddings()
        self.blocks = nn.ModuleDict(
            {
                str(layer): WanBlock(config, parallel=parallel, dtype=dtype, context=context)
                for layer in self.stage.layers
            }
        )
        if self.stage.is_last:
            self._add_head()

    def _add_embeddings(self) -> None:
        config, size = self.config, self.config.hidden_size
        self.patch_embedding = PatchEmbedding(config.in_channels, size, config.patch_size, dtype=self.dtype)
        self.condition_embedder = embedder = ConditionEmbedder(
            size, freq_dim=config.freq_dim, text_dim=config.text_dim, dtype=self.dtype
        )
        for module in (self.patch_embedding, embedder.time_embedder, embedder.time_proj):
            self.parallel.mark_replicated(module)

    def _add_head(self) -> None:
        config, size, exact = self.config, self.config.hidden_size, compute_dtype(self.dtype)
        self.proj_out = nn.Linear(size, config.out_channels * math.prod(config.patch_size), dtype=self.dtype)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, size, dtype=exact) / math.sqrt(size))
        self.parallel.mark_replicated(self.proj_out)
        self.parallel.mark_replicated_parameter(self.scale_shift_table)

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions | Tensor, adapter: str | None = None) -> Tensor:
        """Predicts the flow. A pipeline's stages are called together, with the same inputs and without gradient.

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
        given, sizes = (x_t, t, Conditions.of(conditions)), x_t.shape[2:]
        whole = self.stage.count == 1
        return (self.run_stage(given, sizes, adapter) if whole else self._relayed(*given, adapter)).to(x_t.dtype)

    def run_stage(
        self,
        given: tuple[Tensor, Tensor, Conditions | Tensor] | Hidden,
        latent_sizes: Sequence[int],
        adapter: str | None,
    ) -> Hidden | Tensor:
        """This stage's part of a forward pass.

        Args:
            given: on the first stage x_t, t and conditions as `forward` takes them, else what the stage before made.
            latent_sizes: frames, rows and columns of the latents.
            adapter: name of the low-rank adapter to apply; None for the base weights.

        Returns:
            What the next stage is given; of the last stage the flow [B, out_channels, F, H, W] in the model's dtype,
            whole on every rank of the stage.

        Raises:
            ValueError: sizes that do not fit the model or each other, or an unknown adapter.
        """
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"adapter {adapter!r}: the model has {sorted(self.adapters) or 'none'}; add it first")
        hidden = given if isinstance(given, Hidden) else self.embed(*given)
        hidden = self.run_blocks(hidden, latent_sizes, adapter)
        return self.head(hidden, latent_sizes) if self.stage.is_last else hidden

    def embed(self, x_t: Tensor, t: Tensor, conditions: Conditions | Tensor) -> Hidden:
        """What the first block is given, from what `forward` is given.

        Raises:
            ValueError: sizes that do not fit the model or each other.
        """
        conditions = Conditions.of(conditions)
        x = self._joined_input(x_t, conditions)
        self._check_batch(x, t, conditions.text, math.prod(self._token_grid(x.shape[2:])))
        tokens = self.patch_embedding(self.sequence.split(self.patch_embedding.patches(x)))
        t = t.unsqueeze(1) if t.ndim == 1 else self.sequence.split(t)
        time, modulation = self.condition_embedder.time(t)
        text = self.condition_embedder.text_embedder(conditions.text.to(self.dtype))
        return Hidden(tokens, self.parallel.enter_replicated(text), time, modulation)

    def run_blocks(self, hidden: Hidden, latent_sizes: Sequence[int], adapter: str | None) -> Hidden:
        """The tokens after this stage's blocks, and the rest of `hidden` as it was.

        Raises:
            ValueError: latents longer than the model knows.
        """
        grid = self._token_grid(latent_sizes)
        rope = self.rope(grid, device=hidden.tokens.device, dtype=compute_dtype(self.dtype))
        positions = Positions(self.sequence.context_part(rope), len(rope))
        tokens, text, _, modulation = hidden
        for block in self.blocks.values():
            tokens = self._run(block, tokens, text, modulation, positions, adapter)
        return hidden._replace(tokens=tokens)

    def head(self, hidden: Hidden, latent_sizes: Sequence[int]) -> Tensor:
        """The flow [B, out_channels, F, H, W] in the model's dtype, from what the last block made."""
        grid = self._token_grid(latent_sizes)
        shift, scale = (self.scale_shift_table + hidden.time.unsqueeze(-2)).unbind(-2)
        tokens = modulated_layer_norm(hidden.tokens, shift, scale, eps=self.config.eps)
        tokens = self.sequence.join(self.proj_out(tokens), math.prod(grid))
        return unpatchify(tokens, grid, self.config.patch_size)

    def empty_hidden(
        self,
        samples: int,
        latent_sizes: Sequence[int],
        text_tokens: int,
        device: torch.device | str,
        time_tokens: int | None = 1,
    ) -> Hidden:
        """Uninitialised tensors to receive what a stage is given.

        Args:
            samples: B.
            latent_sizes: frames, rows and columns of the latents.
            text_tokens: L.
            device: of the tensors.
            time_tokens: times of each sample; None for one per token.
        """
        size, empty = self.config.hidden_size, partial(torch.empty, dtype=self.dtype, device=device)
        tokens = self.sequence.padded(math.prod(self._token_grid(latent_sizes))) // self.sequence.size
        times = time_tokens or tokens
        return Hidden(
            tokens=empty(samples, tokens, size),
            text=empty(samples, text_tokens, size),
            time=empty(samples, times, size),
            modulation=empty(samples, times, 6, size),
        )

    def _relayed(self, x_t: Tensor, t: Tensor, conditions: Conditions, adapter: str | None) -> Tensor:
        """The flow on all stages, which pass on what they compute and wait for each other."""
        assert not torch.is_grad_enabled(), "gradients do not come back through a relay"
        sizes, given = x_t.shape[2:], (x_t, t, conditions)
        if not self.stage.is_first:
            times = 1 if t.ndim == 1 else None
            given = self.empty_hidden(len(x_t), sizes, conditions.text.shape[1], x_t.device, times)
            self.relay.receive(given)
        made = self.run_stage(given, sizes, adapter)
        if not self.stage.is_last:
            self.relay.send(made)
            made = x_t.new_empty(len(x_t), self.config.out_channels, *sizes, dtype=self.dtype)
        return self.relay.from_last(made)

    def __deepcopy__(self, memo: dict) -> "WanModel":
        """A copy with weights of its own in the same process groups, its parameters marked as the original's."""
        for shared in (self.parallel, self.parallel.group, self.sequence, self.context, self.relay):
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

    def _token_grid(self, latent_sizes: Sequence[int]) -> tuple[int, ...]:
        sizes, patch = list(latent_sizes), self.config.patch_size
        if any(size % step for size, step in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of frames, height, width {sizes} are not multiples of patches {patch}")
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
