"""Names of Wan's weights: ours are diffusers', and original Wan checkpoints are renamed on the way in."""

import re

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
