"""Low-rank adapters on a model's parallel linears: W' = W + (alpha / rank) B A; https://arxiv.org/abs/2106.09685.

A model may carry many adapters and each call names the one to apply, so teacher and generator share base weights, and
a pass that is computed again in backward uses the adapter it was first computed with. Whole (unsharded) tensors cross
this file's border; calls that gather them are collective over the tensor-parallel group.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_pdmd.models.layers.linear import ColumnLinear, RowLinear, linear_init
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, partition_dim
from megatron_pdmd.parallel.pipeline.relay import Relay

# Endings of the names of every attention and feed-forward linear.
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

AdaptableLinear = ColumnLinear | RowLinear


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter is: its rank, alpha (the update is scaled by alpha / rank), the endings of its linears' names."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"--lora-rank {self.rank}: expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"--lora-alpha {self.alpha}: expected a positive number")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


class AdaptableModel(Protocol):
    """What these functions need of a model, besides being a module."""

    adapters: dict[str, AdapterConfig]
    parallel: TensorParallel
    relay: Relay


def add_adapter(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] = DEFAULT_TARGETS,
    seed: int = 0,
) -> None:
    """Adds an adapter that changes nothing yet: A is Kaiming-uniform, as peft draws it, and B is zero.

    A depends on the seed and the linear's name alone, not on the layout or on other adapters.

    Args:
        model: an `AdaptableModel`.
        name: what calls will name it by, a Python identifier.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        targets: linears whose name is one of these or ends with one after a dot.
        seed: of A.

    Raises:
        ValueError: a bad name or rank, a name that is taken, or targets that match nothing.
    """
    if not name.isidentifier():
        raise ValueError(f"adapter {name!r}: use letters, digits and underscores only")
    if name in model.adapters:
        raise ValueError(f"adapter {name!r} exists already; remove it first")
    config = AdapterConfig(rank=rank, alpha=alpha, targets=tuple(targets))
    for target in config.targets:
        if not any(_matches(linear_name, (target,)) for linear_name, _ in _linears(model)):
            raise ValueError(f"adapter {name!r}: no linear's name ends with {target!r}; check the targets")
    for linear_name, linear in _linears(model):
        if not _matches(linear_name, config.targets):
            continue
        digest = hashlib.sha256(f"{seed}/{linear_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        a = torch.empty(rank, linear.input_size, device="cpu")
        linear_init(a, generator=generator)
        linear.add_adapter(name, a, torch.zeros(linear.output_size, rank, device="cpu"), config.scale)
    model.adapters[name] = config


def remove_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter and its parameters.

    Raises:
        ValueError: there is no such adapter.
    """
    for _, linear in _adapted(model, name):
        linear.remove_adapter(name)
    del model.adapters[name]


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """This rank's parameters of an adapter, A before B, in the order of the model's linears.

    Raises:
        ValueError: there is no such adapter.
    """
    return [parameter for _, parameter in named_adapter_parameters(model, name)]


def named_adapter_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The same with the names that `adapter_state_dict` gives them.

    Raises:
        ValueError: there is no such adapter.
    """
    for linear_name, linear in _adapted(model, name):
        yield f"{linear_name}.lora_A.weight", linear.lora_A[name]
        yield f"{linear_name}.lora_B.weight", linear.lora_B[name]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the model without its adapters."""
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            yield name, parameter


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The whole A and B of an adapter as `<linear>.lora_A.weight` and `<linear>.lora_B.weight`, detached.

    Of all pipeline stages, which call it together.

    Raises:
        ValueError: there is no such adapter.
    """
    own = {key: _whole(model, parameter) for key, parameter in named_adapter_parameters(model, name)}
    return {key: tensor.gather() for key, tensor in _of_all_stages(model, own).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Copies whole tensors, named as `adapter_state_dict` names them, into an adapter that the model has.

    Raises:
        ValueError: there is no such adapter, or names or shapes do not fit it.
    """
    expected = {}
    for linear_name, linear in _adapted(model, name):
        a_dim, b_dim = linear.adapter_partition_dims
        expected[f"{linear_name}.lora_A.weight"] = (linear.lora_A[name], a_dim)
        expected[f"{linear_name}.lora_B.weight"] = (linear.lora_B[name], b_dim)
    if difference := sorted(expected.keys() ^ state.keys()):
        kind = "misses" if difference[0] in expected else "has an unknown"
        raise ValueError(
            f"adapter {name!r}: the file {kind} {difference[0]} ({len(difference)} such); check its targets"
        )
    for key, (parameter, dim) in expected.items():
        local = model.parallel.shard(state[key], dim)
        if local.shape != parameter.shape:
            raise ValueError(
                f"adapter {name!r}: {key} is {list(local.shape)}, not {list(parameter.shape)}; check the rank"
            )
        parameter.copy_(local)


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of a sharded model in full, which can be planned with before it is there.

    Attributes:
        shape, dtype: of the whole tensor.
        gather: makes it; a collective call over the tensor-parallel group where it is sharded, and over the pipeline
            where that has stages. What was neither merged nor gathered is the parameter's own memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], Tensor]


def merged_weights(model: nn.Module, name: str | None) -> dict[str, WholeTensor]:
    """The model's whole tensors, with an adapter merged into them in fp32 where one is named, made when asked for.

    Those of all pipeline stages, which call it together, sorted by name: their order does not depend on the layout.

    Raises:
        ValueError: there is no such adapter.
    """
    adapted = {} if name is None else {f"{key}.weight": linear for key, linear in _adapted(model, name)}
    deltas = {key: functools.partial(linear.adapter_delta, name) for key, linear in adapted.items()}
    return _of_all_stages(model, {key: _whole(model, p, deltas.get(key)) for key, p in base_parameters(model)})


def _whole(model: nn.Module, parameter: nn.Parameter, delta: Callable[[], Tensor] | None = None) -> WholeTensor:
    """A parameter of this rank's stage in full; with `delta`, plus what that makes, which is split alike."""

    @torch.no_grad()
    def gather() -> Tensor:
        tensor = parameter.detach()
        if delta is not None:
            exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            tensor = (exact + delta()).to(tensor.dtype)
        return model.parallel.unshard(tensor, partition_dim(parameter))

    dim, shape = partition_dim(parameter), list(parameter.shape)
    if dim is not None:
        shape[dim] *= model.parallel.size
    return WholeTensor(tuple(shape), parameter.dtype, gather)


def _of_all_stages(model: nn.Module, own: Mapping[str, WholeTensor]) -> dict[str, WholeTensor]:
    """The tensors of all pipeline stages, which call it together, sorted by name."""
    device = next(model.parameters()).device

    def gather(stage: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = own[name].gather() if name in own else torch.empty(shape, dtype=dtype, device=device)
        return model.relay.from_stage(stage, tensor)

    found = {}
    stages = model.relay.words_of_all({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()})
    for stage, held in enumerate(stages):
        for name, looks in held.items():
            found[name] = WholeTensor(*looks, functools.partial(gather, stage, name, *looks))
    return dict(sorted(found.items()))


@torch.no_grad()
def merge_low_rank(model: nn.Module, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Adds B A to weights of an unsharded model in place, in fp32, rounded once to the weight's dtype.

    Args:
        model: has no other ranks.
        matrices: linear's name -> A [rank, in] and B [out, rank], scaled.
    """
    weights = dict(base_parameters(model))
    for name, (a, b) in matrices.items():
        weight = weights[f"{name}.weight"]
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(exact + b.to(exact) @ a.to(exact))


@torch.no_grad()
def adapter_movement(model: nn.Module, name: str) -> Tensor:
    """How far an adapter moves its model: |(alpha / rank) B A| / |W| over all its linears, a scalar on the device.

    |B A|^2 = tr((B^T B)(A A^T)) takes rank x rank products alone. Collective over the tensor-parallel group, each rank
    of which has a part of the rows or columns of both, and over the pipeline's stages.

    Raises:
        ValueError: there is no such adapter.
    """
    change, base = [], []
    for _, linear in _adapted(model, name):
        a, b = linear.lora_A[name], linear.lora_B[name]
        change.append(linear.lora_scale[name] ** 2 * ((b.T @ b) * (a @ a.T)).sum())
        base.append(_squared_norm(linear.weight))
    return _relative(model, change, base)


@torch.no_grad()
def weight_movement(model: nn.Module, start: nn.Module) -> Tensor:
    """How far a network is from another of its kind: |W - W0| / |W0| over all weights, adapters aside.

    A scalar on the device; collective over the tensor-parallel group and the pipeline's stages.
    """
    change, base = [], []
    for (_, weight), (_, origin) in zip(base_parameters(model), base_parameters(start), strict=True):
        copies = 1 if partition_dim(weight) is not None else model.parallel.size  # a replicated weight counts once
        change.append(_squared_norm(weight.float() - origin.float()) / copies)
        base.append(_squared_norm(origin) / copies)
    return _relative(model, change, base)


def _squared_norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()


def _relative(model: nn.Module, change: list[Tensor], base: list[Tensor]) -> Tensor:
    own = torch.stack([torch.stack(change).sum(), torch.stack(base).sum()])
    sums = model.relay.all_reduce(model.parallel.all_reduce(own))
    return (sums[0].clamp(min=0) / sums[1]).sqrt()


def merged_state_dict(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The model's whole state with an adapter merged: W + (alpha / rank) B A in fp32, then cast to W's dtype."""
    return {key: tensor.gather() for key, tensor in merged_weights(model, name).items()}


def _linears(model: nn.Module) -> Iterator[tuple[str, AdaptableLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptableLinear):
            yield name, module


def _adapted(model: nn.Module, name: str) -> Iterator[tuple[str, AdaptableLinear]]:
    if name not in model.adapters:
        raise ValueError(f"adapter {name!r}: the model has {sorted(model.adapters) or 'none'}; add it first")
    return ((linear_name, linear) for linear_name, linear in _linears(model) if name in linear.lora_scale)


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
