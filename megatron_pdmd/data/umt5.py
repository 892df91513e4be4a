"""Wan's text encoder as it lies in a folder: its config.json held against the headers of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import TRANSFORMERS_STEM, read_model_header, require_tensors
from megatron_pdmd.limits import shown

_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
_LARGEST_NUMBER = 1_000_000  # transformers makes lists of some; the longest known, the vocabulary, has 256384
_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor, under either name or both
_UNUSED = ("decoder.", "lm_head.")  # of a folder that holds the whole UMT5


def read_umt5_config(folder: Path) -> dict[str, Any]:
    """The config.json of a pipeline's text encoder, which its weights have the shapes of.

    Args:
        folder: the pipeline's; its `tokenizer/` must be there too.

    Raises:
        ValueError: a part is missing or damaged, it is another encoder, or config and weights do not fit each other.
    """
    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder}: no {part}/ in it; name a Hugging Face pipeline folder with a text encoder")
    path = folder / "text_encoder" / "config.json"
    config = read_json_object(path)
    if config.get("model_type") != "umt5":
        kind = shown(repr(config.get("model_type")))
        raise ValueError(f"{path}: describes a model of type {kind}; Wan's text encoder is 'umt5'")
    for name in _SIZES:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {name} is {shown(repr(value))}; expected a positive integer")
    for name, value in config.items():
        if isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER:
            raise ValueError(f"{path}: {shown(repr(name))} is {shown(repr(value))}; no text encoder has such a number")
    _check_tensors(folder / "text_encoder", config)
    return config


def _check_tensors(folder: Path, config: Mapping[str, Any]) -> None:
    header = read_model_header(folder, TRANSFORMERS_STEM)
    found = {name: tensor for name, tensor in header.items() if not name.startswith(_UNUSED)}
    blocks = len({name.split(".")[2] for name in found if name.startswith("encoder.block.")})
    if blocks != config["num_layers"]:
        raise ValueError(
            f"{folder}: config.json says {config['num_layers']} layers, the weights have {blocks};"
            " do they belong together?"
        )
    tables = [name for name in _TABLES if name in found] or _TABLES[:1]
    table = (config["vocab_size"], config["d_model"])
    require_tensors(folder, found, _tensor_shapes(config) | dict.fromkeys(tables, table))


def _tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the encoder's tensors, but for the table of tokens."""
    width, hidden, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]
    gated = str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated-")
    block = {
        **{f"layer.0.SelfAttention.{letter}.weight": (inner, width) for letter in "qkv"},
        "layer.0.SelfAttention.o.weight": (width, inner),
        "layer.0.SelfAttention.relative_attention_bias.weight": (config["relative_attention_num_buckets"], heads),
        "layer.0.layer_norm.weight": (width,),
        **{f"layer.1.DenseReluDense.{wi}.weight": (hidden, width) for wi in (("wi_0", "wi_1") if gated else ("wi",))},
        "layer.1.DenseReluDense.wo.weight": (width, hidden),
        "layer.1.layer_norm.weight": (width,),
    }
    tensors: dict[str, tuple[int, ...]] = {"encoder.final_layer_norm.weight": (width,)}
    for index in range(config["num_layers"]):
        tensors |= {f"encoder.block.{index}.{name}": shape for name, shape in block.items()}
    return tensors
