"""LoRA files load in diffusers, every tensor of them, and fuse to the weights that merging gives."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.lora_files import lora_tensors, original_module_name, read_lora
from megatron_pdmd.conversion.lora_folder import export_loras
from megatron_pdmd.conversion.pipeline_folder import read_pipeline

RANK, ALPHA = 4, 1.0
FORMATS = ["diffusers", "comfyui", "lightx2v"]


def _adapter(weights: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Random matrices for every linear of the blocks and the layers around them."""
    generator, adapter = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not name.endswith(".weight"):
            continue
        adapter[f"{module}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
        adapter[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator)
    return adapter


def _merged(weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    down, up = (adapter[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
    return weight.double() + ALPHA / RANK * up @ down


@pytest.mark.parametrize("lora_format", FORMATS)
def test_diffusers_fuses_to_the_merged_weights(lora_format: str, tmp_path: Path, two_experts: Path) -> None:
    names = ("transformer", "transformer_2")
    base = {name: load_file(two_experts / name / "diffusion_pytorch_model.safetensors") for name in names}
    adapters = {
        expert: _adapter(base[name], seed)
        for seed, (expert, name) in enumerate(zip(("high", "low"), names, strict=True))
    }
    sampling = FewStepSampling(((1.0,), (0.5,)), 3.0)
    files = export_loras(
        tmp_path / "loras", adapters, alpha=ALPHA, source=read_pipeline(two_experts), bases=names, sampling=sampling,
        lora_format=lora_format,
    )  # fmt: skip
    unused = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipeline = WanPipeline.from_pretrained(two_experts, **unused)
    pipeline.load_lora_weights(files["high"].parent, weight_name=files["high"].name, adapter_name="high")
    pipeline.load_lora_weights(
        files["low"].parent, weight_name=files["low"].name, adapter_name="low", load_into_transformer_2=True
    )
    pipeline.fuse_lora(components=list(names))
    pipeline.unload_lora_weights()
    for name, adapter in zip(names, adapters.values(), strict=True):
        fused = getattr(pipeline, name).state_dict()
        modules = {key.rsplit(".lora_", 1)[0] for key in adapter}
        assert len(modules) == 2 * 10 + 6
        for key, weight in base[name].items():
            module = key.removesuffix(".weight")
            expected = _merged(weight, adapter, module) if module in modules else weight.double()
            reference = expected.float().double()
            in_fp32 = (
                weight + (ALPHA / RANK * adapter[f"{module}.lora_B.weight"]) @ adapter[f"{module}.lora_A.weight"]
                if module in modules
                else weight
            )
            allowed = 2 * torch.linalg.vector_norm(in_fp32 - expected) + 2e-7 * torch.linalg.vector_norm(expected)
            assert torch.linalg.vector_norm(fused[key] - reference) <= allowed, key


def test_names_of_the_original_code() -> None:
    pairs = {
        "blocks.3.attn1.to_q": "blocks.3.self_attn.q",
        "blocks.3.attn2.to_out.0": "blocks.3.cross_attn.o",
        "blocks.3.attn2.add_k_proj": "blocks.3.cross_attn.k_img",
        "blocks.11.ffn.net.0.proj": "blocks.11.ffn.0",
        "blocks.11.ffn.net.2": "blocks.11.ffn.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
    }
    assert {name: original_module_name(name) for name in pairs} == pairs


@pytest.mark.parametrize("lora_format", FORMATS)
def test_every_readers_scale_is_one(lora_format: str) -> None:
    module = "blocks.0.attn1.to_q"
    adapter = {f"{module}.lora_A.weight": torch.randn(4, 8), f"{module}.lora_B.weight": torch.randn(6, 4)}
    tensors = lora_tensors(adapter, alpha=8.0, lora_format=lora_format, dtype=torch.bfloat16)
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert [alpha.item() for alpha in alphas] == ([4.0] if lora_format == "comfyui" else [])
    up = next(tensor for name, tensor in tensors.items() if name.endswith(("lora_B.weight", "lora_up.weight")))
    assert torch.equal(up, (2 * adapter[f"{module}.lora_B.weight"]).bfloat16())


@pytest.mark.parametrize("lora_format", FORMATS)
def test_files_are_read_back_under_the_models_names(lora_format: str, tmp_path: Path, one_expert: Path) -> None:
    weights = load_file(one_expert / "transformer" / "diffusion_pytorch_model.safetensors")
    shapes, adapter = {name: tuple(weight.shape) for name, weight in weights.items()}, _adapter(weights, 3)
    save_file(lora_tensors(adapter, alpha=ALPHA, lora_format=lora_format), tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", shapes)
    assert {f"{module}.lora_{letter}.weight" for module in found for letter in "AB"} == adapter.keys()
    for module, (down, up) in found.items():
        assert torch.equal(down, adapter[f"{module}.lora_A.weight"])
        assert torch.equal(up, ALPHA / RANK * adapter[f"{module}.lora_B.weight"])


def test_an_alpha_of_another_program_is_applied(tmp_path: Path) -> None:
    key = "diffusion_model.blocks.0.self_attn.q"
    down, up = torch.randn(4, 8), torch.randn(6, 4)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", {"blocks.0.attn1.to_q.weight": (6, 8)})
    assert torch.equal(found["blocks.0.attn1.to_q"][1], up / 2)


KEY = "transformer.proj_out"
GOOD = {f"{KEY}.lora_A.weight": torch.ones(4, 8), f"{KEY}.lora_B.weight": torch.ones(6, 4)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensor"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 8)}, "'proj_out' has not both"),
        (
            {**GOOD, "transformer.blocks.7.attn1.to_q.lora_A.weight": torch.ones(4, 8)},
            "blocks.7.* belongs to no module",
        ),
        ({**GOOD, f"{KEY}.diff": torch.ones(6)}, "diff' belongs to no module"),
        ({**GOOD, f"{KEY}.lora_A.weight": torch.ones(4, 9)}, r"matrices \[4, 9\] and \[6, 4\].* \[6, 8\]"),
        ({**GOOD, f"{KEY}.lora_A.weight": torch.ones(3, 8)}, "matrices"),
        ({**GOOD, f"{KEY}.lora_A.weight": torch.ones(0, 8), f"{KEY}.lora_B.weight": torch.ones(6, 0)}, "matrices"),
        ({**GOOD, f"{KEY}.alpha": torch.ones(2)}, "matrices"),
        (
            {**GOOD, f"{KEY}.lora_B.weight": torch.full((6, 4), torch.nan)},
            "lora_B.weight' holds values that are not finite",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tensors: dict, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path / 'lora.safetensors'}.*{message}"):
        read_lora(tmp_path / "lora.safetensors", {"proj_out.weight": (6, 8), "proj_out.bias": (6,)})
