"""Names and shapes of Wan's weights: ours are diffusers', and original Wan checkpoints are renamed on the way in."""

import math
import re
from collections.abc import Iterable

from megatron_pdmd.models.wan.config import WanConfig

# (original Wan, diffusers) for the part of a name after `blocks.<i>.` and for names outside of the blocks.
_BLOCK_NAMES = (
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.o", "attn2.to_out.0"),
    *((f"self_attn.{letter}", f"attn1.to_{letter}") for letter in "qkv"),
    *((f"cross_attn.{letter}", f"attn2.to_{letter}") for letter in "qkv"),
    *((f"self_attn.norm_{letter}", f"attn1.norm_{letter}") for letter in "qk"),
    *((f"cross_attn.norm_{letter}", f"attn2.norm_{letter}") for letter in "qk"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
_OUTER_NAMES = (
    ("patch_embedding", "patch_embedding"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)
_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.+?)(?P<parameter>\.(weight|bias))?")


def tensor_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Name -> whole shape of every tensor of a model, known without building it."""
    size, patch = config.hidden_size, config.patch_size
    tensors = {
        "scale_shift_table": (1, 2, size),
        "patch_embedding.weight": (size, config.in_channels, *patch),
        "patch_embedding.bias": (size,),
        **_linear("condition_embedder.time_embedder.linear_1", size, config.freq_dim),
        **_linear("condition_embedder.time_embedder.linear_2", size, size),
        **_linear("condition_embedder.time_proj", 6 * size, size),
        **_linear("condition_embedder.text_embedder.linear_1", size, config.text_dim),
        **_linear("condition_embedder.text_embedder.linear_2", size, size),
        **_linear("proj_out", config.out_channels * math.prod(patch), size),
    }
    block = _block_shapes(config)
    for index in range(config.num_layers):
        tensors |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return tensors


def _block_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    size = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 6, size)}
    for attention in ("attn1", "attn2"):
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            tensors |= _linear(f"{attention}.{linear}", size, size)
        tensors |= {f"{attention}.norm_{letter}.weight": (size,) for letter in "qk"}
    if config.cross_attn_norm:
        tensors |= {f"norm2.{parameter}": (size,) for parameter in ("weight", "bias")}
    return tensors | _linear("ffn.net.0.proj", config.ffn_dim, size) | _linear("ffn.net.2", size, config.ffn_dim)


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def count_blocks(names: Iterable[str]) -> int:
    """How many blocks the tensors of a model belong to, whichever release named them."""
    return len({match["block"] for name in names if (match := _NAME.fullmatch(name)) and match["block"]})


def from_original_name(name: str) -> str:
    """diffusers' name of an original Wan tensor; a name that is not one of Wan's is returned as it is."""
    return _rename(name, dict(_BLOCK_NAMES), dict(_OUTER_NAMES))


def to_original_name(name: str) -> str:
    """The original Wan name of a tensor that diffusers names so; an unknown name is returned as it is."""
    blocks, outer = ({ours: theirs for theirs, ours in names} for names in (_BLOCK_NAMES, _OUTER_NAMES))
    return _rename(name, blocks, outer)


def is_original(names: set[str]) -> bool:
    """Whether a checkpoint's tensors are named as in the original Wan release."""
    return "head.head.weight" in names


def _rename(name: str, block_names: dict[str, str], outer_names: dict[str, str]) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    block, module, parameter = match["block"] or "", match["module"], match["parameter"] or ""
    names = block_names if block else outer_names
    return f"{block}{names.get(module, module)}{parameter}"
