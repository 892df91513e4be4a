"""Trained adapters as LoRA files, one for each expert, in the layouts that other programs read.

| format | keys of a module | read by |
|---|---|---|
| diffusers | `transformer.blocks.0.attn1.to_q.lora_{A,B}.weight` | diffusers, LightX2V |
| comfyui | `diffusion_model.blocks.0.self_attn.q.lora_{down,up}.weight` and `.alpha` | ComfyUI, diffusers, LightX2V |
| lightx2v | the same without `.alpha` | LightX2V, ComfyUI, diffusers |

Readers differ in what they take for alpha where a file does not say, and some ignore what it says. So alpha / rank is
folded into the second matrix in every format, and an alpha that is written equals the rank: every reader's scale is 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from megatron_pdmd.files.safetensors_files import read_tensors, require_finite

LoraFormat = Literal["diffusers", "comfyui", "lightx2v"]
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PARTS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_TO_ORIGINAL = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])$", r"_attn.\1"),
    (r"_attn\.to_out\.0$", "_attn.o"),
    (r"_attn\.add_([kv])_proj$", r"_attn.\1_img"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^proj_out$", "head.head"),
)


def original_module_name(module: str) -> str:
    """The original Wan code's name for a module of diffusers' transformer, as in `blocks.0.self_attn.q`."""
    for pattern, replacement in _TO_ORIGINAL:
        module = re.sub(pattern, replacement, module)
    return module


def lora_tensors(
    adapter: Mapping[str, torch.Tensor], *, alpha: float, lora_format: LoraFormat, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file.

    Args:
        adapter: `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], under diffusers' names.
        alpha: the adapter's output is scaled by alpha / rank.
        lora_format: see the module's table.
        dtype: of the file; None keeps the adapter's.
    """
    modules = sorted(name.removesuffix(_DOWN) for name in adapter if name.endswith(_DOWN))
    assert {f"{module}{end}" for module in modules for end in (_DOWN, _UP)} == adapter.keys(), "pairs of A and B"
    tensors = {}
    for module in modules:
        down, up = adapter[module + _DOWN], adapter[module + _UP]
        rank = down.shape[0]
        dtype_of_file = dtype or up.dtype
        down = down.detach().to("cpu", dtype_of_file).contiguous()
        up = (up.detach().float() * (alpha / rank)).to("cpu", dtype_of_file).contiguous()
        if lora_format == "diffusers":
            tensors |= {f"transformer.{module}{_DOWN}": down, f"transformer.{module}{_UP}": up}
            continue
        prefix = f"diffusion_model.{original_module_name(module)}"
        tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
        # diffusers accepts an alpha for the blocks' modules only; without one the scale is 1 all the same.
        if lora_format == "comfyui" and module.startswith("blocks."):
            tensors[f"{prefix}.alpha"] = torch.tensor(float(rank))
    return tensors


def read_lora(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A LoRA file of any of the formats, for a model that it fits.

    Args:
        path: the file.
        shapes: the model's tensors under diffusers' names.

    Returns:
        Module's name -> A [rank, in] and B [out, rank], B with the file's alpha / rank.

    Raises:
        ValueError: a file that is damaged or empty, a key that is no module's or lacks its pair, a shape that does not
            fit, or a number that is not finite.
    """
    tensors = read_tensors(path)
    require_finite(tensors.items(), path)
    found: dict[str, dict[str, torch.Tensor]] = {}
    modules = _modules_by_key(shapes)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in modules:
            raise ValueError(f"{path}: '{key}' belongs to no module of the teacher; is it the one that was distilled?")
        found.setdefault(modules[match["module"]], {})[_PARTS[match["part"]]] = tensor
    if not found:
        raise ValueError(f"{path}: holds no tensor; export the LoRA files again")
    return {module: _pair(path, module, parts, shapes[f"{module}.weight"]) for module, parts in found.items()}


def _modules_by_key(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a module may be called in a file -> its name in the model."""
    modules = [
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    ]
    named = {f"transformer.{module}": module for module in modules}
    return named | {f"diffusion_model.{original_module_name(module)}": module for module in modules}


def _pair(
    path: Path, module: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    if not {"A", "B"} <= parts.keys():
        raise ValueError(f"{path}: module '{module}' has not both of its matrices; export the LoRA files again")
    down, up, alpha = parts["A"], parts["B"], parts.get("alpha")
    fit = (
        down.ndim == up.ndim == 2 and (up.shape[0], down.shape[1]) == tuple(shape) and up.shape[1] == down.shape[0] > 0
    )
    if not fit or (alpha is not None and alpha.numel() != 1):
        raise ValueError(
            f"{path}: module '{module}' has matrices {list(down.shape)} and {list(up.shape)}, "
            f"the teacher's weight is {list(shape)}; is it the one that was distilled?"
        )
    return down, up if alpha is None else up * (alpha.float().item() / down.shape[0])
