"""flash-attn behind the interface of `attention.py`; the only file that imports it."""

from torch import Tensor

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


def flash_attention_available() -> bool:
    """Whether the flash-attn package can be imported."""
    return flash_attn_func is not None


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of [B, S, heads, head_dim] on [B, L, heads, head_dim] in bf16 or fp16, on a GPU."""
    return flash_attn_func(query, key, value)
