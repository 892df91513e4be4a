"""Presets have the published models' sizes, and configs go to diffusers and back."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from megatron_pdmd.models import WAN_PRESETS, WanConfig, WanModel

PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}
# The config.json of the original Wan2.1-T2V-1.3B release.
ORIGINAL = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960,
    "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16,
    "text_len": 512,
}  # fmt: skip


def test_presets_are_the_published_models():
    assert PARAMETERS.keys() == WAN_PRESETS.keys()
    assert WAN_PRESETS["wan2.1-t2v-14b"] == WAN_PRESETS["wan2.2-t2v-a14b"]
    for name, config in WAN_PRESETS.items():
        with torch.device("meta"):
            model = WanModel(config, dtype=torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name], name


def test_a_config_survives_the_way_through_diffusers():
    config = WanConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=20, num_layers=1, patch_size=(1, 4, 4))
    arguments = {name: value for name, value in config.to_hf().items() if not name.startswith("_")}
    assert WanConfig.from_hf(dict(WanTransformer3DModel(**arguments).config)) == config


def test_an_original_config_is_read():
    assert WanConfig.from_hf(ORIGINAL) == WAN_PRESETS["wan2.1-t2v-1.3b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [1, 0, 2]}, "patch_size"),
        ({"patch_size": None}, "patch_size None: expected three positive integers"),
        ({"patch_size": "122"}, "patch_size '122'"),
        ({"patch_size": [1, [2], 2]}, "patch_size"),
        ({"patch_size": [1, 2, 10**12]}, "patch_size"),
        ({"num_layers": 10**6}, "num_layers 1000000: no Wan model has more than 1000"),
        ({"num_layers": 30.0}, "num_layers 30.0: expected a positive integer"),
        ({"text_dim": {"a": list(range(1000))}}, "text_dim"),
        ({"num_attention_heads": 4096, "attention_head_dim": 4096}, "hidden_size 16777216: no Wan model"),
        ({"rope_max_seq_len": 10**12}, "rope_max_seq_len"),
        ({"cross_attn_norm": "yes"}, "cross_attn_norm 'yes': expected true or false"),
        ({"eps": 1e300}, "eps 1e[+]300"),
        ({"_class_name": [1]}, "is not a Wan transformer"),
        ({"num_layers": 0}, "num_layers 0: expected a positive integer"),
        ({"ffn_dim": "wide"}, "ffn_dim 'wide'"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"attention_head_dim": 27}, "attention_head_dim 27: expected an even number"),
        ({"freq_dim": 255}, "freq_dim 255"),
        ({"eps": 0}, "eps 0"),
        ({"qk_norm": None}, "qk_norm None"),
        ({"image_dim": 1280}, "image_dim 1280: image embeddings"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim"),
        ({"guidance_embeds": True}, "unknown entries 'guidance_embeds'"),
        ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel' is not a Wan transformer"),
    ],
)
def test_bad_configs_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        WanConfig.from_hf(WAN_PRESETS["wan2.1-t2v-1.3b"].to_hf() | change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_missing_entries_are_named():
    with pytest.raises(ValueError, match="missing entries num_attention_heads, num_layers"):
        WanConfig.from_hf({"ffn_dim": 20})


def test_an_original_config_with_a_width_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="dim 1537 is not a multiple of num_heads 12"):
        WanConfig.from_hf(ORIGINAL | {"dim": 1537})
