"""The shape of a Wan diffusion transformer, under the names of diffusers' WanTransformer3DModel."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.limits import shown

_CLASS_NAME = "WanTransformer3DModel"
# The names of Wan's own config.json, where they differ.
_ORIGINAL_NAMES = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
_ORIGINAL_EXTRA = {"dim", "model_type", "text_len"}
# Far above every published model, and small enough for a model without weights to be described in an instant.
_LARGEST: Mapping[str, int] = {"num_layers": 1000, "attention_head_dim": 4096, "num_attention_heads": 4096}
_LARGEST_COUNT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """A Wan model's shape.

    Attributes:
        patch_size: latent frames, rows and columns in one token.
        num_attention_heads: heads of every attention.
        attention_head_dim: channels of a head.
        in_channels: latent channels in, conditions joined along channels included.
        out_channels: latent channels of the flow.
        text_dim: width of the text embeddings.
        freq_dim: width of the sinusoidal time embedding.
        ffn_dim: hidden width of the feed-forward.
        num_layers: number of blocks.
        cross_attn_norm: the layer norm before cross-attention is affine; without it there is none.
        qk_norm: only "rms_norm_across_heads" exists.
        eps: of every norm.
        image_dim: width of the image embeddings of Wan2.1's image-to-video models, which are not supported.
        added_kv_proj_dim: as `image_dim`.
        rope_max_seq_len: the longest axis in tokens.
        pos_embed_seq_len: as `image_dim`.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        patch = self.patch_size
        if not isinstance(patch, tuple) or len(patch) != 3 or not all(_is_count(size, 1000) for size in patch):
            raise ValueError(
                f"patch_size {shown(repr(patch))}: expected three positive integers (frames, rows, columns)"
            )
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim"):
            self._require_count(name)
        for name in ("freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len", "hidden_size"):
            self._require_count(name)
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} {getattr(self, name)}: expected an even number")
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm {shown(repr(self.qk_norm))}: only 'rms_norm_across_heads' is supported")
        if not isinstance(self.cross_attn_norm, bool):
            raise ValueError(f"cross_attn_norm {shown(repr(self.cross_attn_norm))}: expected true or false")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 < self.eps < 1:
            raise ValueError(f"eps {shown(repr(self.eps))}: expected a number between 0 and 1")
        for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} {shown(repr(getattr(self, name)))}: image embeddings (Wan2.1 image-to-video) are not"
                    " supported; use a text-to-video or a Wan2.2 model"
                )

    @property
    def hidden_size(self) -> int:
        """Width d of the token embeddings."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def read(cls, path: Path) -> "WanConfig":
        """Reads a config.json; see `from_hf`.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        content = read_json_object(path)
        try:
            return cls.from_hf(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "WanConfig":
        """Reads a diffusers config.json, or the one of an original Wan folder.

        Raises:
            ValueError: another model's config, missing or unknown entries, or values that cannot be.
        """
        class_name = config.get("_class_name", _CLASS_NAME)
        if class_name not in (_CLASS_NAME, "WanModel"):
            raise ValueError(
                f"config: _class_name {shown(repr(class_name))} is not a Wan transformer; expected {_CLASS_NAME}"
            )
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in config.items() if not name.startswith("_")}
        if "dim" in values:
            values = _from_original(values)
        unknown = sorted(name for name, value in values.items() if name not in known and value is not None)
        if unknown:
            named = ", ".join(shown(repr(name)) for name in unknown[:5])
            raise ValueError(f"config: unknown entries {named}; is this a Wan transformer's config?")
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise ValueError(f"config: missing entries {', '.join(missing)}; add them to config.json")
        values = {name: value for name, value in values.items() if name in known}
        if isinstance(values.get("patch_size"), list):
            values["patch_size"] = tuple(values["patch_size"])
        if values.get("out_channels", 0) is None:
            values["out_channels"] = values.get("in_channels", 16)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that diffusers reads."""
        return {"_class_name": _CLASS_NAME, **asdict(self), "patch_size": list(self.patch_size)}

    def _require_count(self, name: str) -> None:
        value, largest = getattr(self, name), _LARGEST.get(name, _LARGEST_COUNT)
        if not _is_count(value):
            raise ValueError(f"{name} {shown(repr(value))}: expected a positive integer")
        if value > largest:
            raise ValueError(f"{name} {shown(repr(value))}: no Wan model has more than {largest}; is this its config?")


def _is_count(value: Any, largest: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """Wan's own entries under diffusers' names."""
    values = {_ORIGINAL_NAMES.get(name, name): value for name, value in config.items() if name not in _ORIGINAL_EXTRA}
    heads = values.get("num_attention_heads")
    if not _is_count(heads) or not _is_count(config["dim"]) or config["dim"] % heads:
        raise ValueError(
            f"config: dim {shown(repr(config['dim']))} is not a multiple of num_heads {shown(repr(heads))}"
        )
    if config.get("model_type") == "i2v" and values.get("in_channels") == 36 and "image_dim" in values:
        raise ValueError("config: model_type i2v with image embeddings (Wan2.1) is not supported; use a Wan2.2 model")
    return {**values, "attention_head_dim": config["dim"] // heads}


_WAN_14B = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)

# Published models; an A14B name stands for either of its two experts.
WAN_PRESETS: Mapping[str, WanConfig] = {
    "wan2.1-t2v-1.3b": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan2.1-t2v-14b": _WAN_14B,
    "wan2.2-t2v-a14b": _WAN_14B,
    "wan2.2-i2v-a14b": WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40, in_channels=36),
    "wan2.2-ti2v-5b": WanConfig(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
}
