"""Trained adapters as LoRA files, one for each expert, in the layouts that other programs read.

| format | keys of a module | read by |
|---|---|---|
| diffusers | `transformer.blocks.0.attn1.to_q.lora_{A,B}.weight` | diffusers, LightX2V |
| comfyui | `diffusion_model.blocks.0.self_attn.q.lora_{down,up}.weight` and `.alpha` | ComfyUI, diffusers, LightX2V |
| lightx2v | the same without `.alpha` | LightX2V, ComfyUI, diffusers |

Readers differ in what they take for alpha where a file does not say, and some ignore what it says. So alpha / rank is
folded into the second matrix in every format, and an alpha that is written equals the rank: every reader's scale is 1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from megatron_pdmd.conversion.export import replaced_folder
from megatron_pdmd.errors import require_space

LoraFormat = Literal["diffusers", "comfyui", "lightx2v"]
_MANIFEST = "lora_files.json"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
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


def export_loras(
    destination: Path,
    adapters: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    alpha: float,
    lora_format: LoraFormat = "diffusers",
    dtype: torch.dtype | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Writes `<name>.safetensors` for each expert and `lora_files.json`, which says how they are to be sampled.

    Args:
        destination: a new or empty folder, or an earlier export of LoRA files, which is replaced.
        adapters: expert's name -> adapter, as `lora_tensors` takes it; first phase first.
        alpha: of all adapters.
        lora_format: see the module's table.
        dtype: of the files.
        sampling: kept in `lora_files.json`: noise levels, shift, boundary.

    Returns:
        The file of each expert.

    Raises:
        ValueError: an occupied destination, or no space on the disk.
    """
    destination = Path(destination)
    require_space(
        destination,
        sum(t.numel() * t.element_size() for adapter in adapters.values() for t in adapter.values()),
        "--hf",
    )
    with replaced_folder(destination, lambda folder: (folder / _MANIFEST).is_file()) as partial:
        for name, adapter in adapters.items():
            tensors = lora_tensors(adapter, alpha=alpha, lora_format=lora_format, dtype=dtype)
            save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
        files = [f"{name}.safetensors" for name in adapters]
        manifest = {"lora_format": lora_format, "files": files, **(sampling or {})}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return {name: destination / f"{name}.safetensors" for name in adapters}
