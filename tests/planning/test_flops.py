"""FLOPs of the real model's passes, counted by torch's counter, are the formula's to the last one."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_pdmd.models import WAN_PRESETS, WanConfig, WanModel, add_adapter
from megatron_pdmd.parallel import without_cuda
from megatron_pdmd.planning.flops import PassSize, backward_flops, forward_flops

CONFIG = WanConfig(num_attention_heads=3, attention_head_dim=12, in_channels=5, out_channels=3, text_dim=10,
                   freq_dim=14, ffn_dim=80, num_layers=3, rope_max_seq_len=32)  # fmt: skip
SIZE = PassSize(samples=2, tokens=3 * 3 * 5, text=7)


def counted(count_flops, model: WanModel, latents: torch.Tensor, adapter: str | None) -> tuple[int, int]:
    """FLOPs of a forward and of the backward pass."""
    text = torch.randn(SIZE.samples, SIZE.text, CONFIG.text_dim)
    with sdpa_kernel(SDPBackend.MATH):
        with count_flops() as forward:
            flow = model(latents, torch.rand(SIZE.samples), text, adapter=adapter)
        with count_flops() as backward:
            flow.square().mean().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("latents_have_gradient", [False, True])
@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapter"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_formula_is_what_the_model_computes(layers, rank, latents_have_gradient, count_flops):
    config = WanConfig(**{**vars(CONFIG), "num_layers": layers})
    with without_cuda():
        model = WanModel(config)
    if rank:
        model.requires_grad_(False)
        add_adapter(model, "phase_1", rank=rank, alpha=2)
    latents = torch.randn(SIZE.samples, CONFIG.in_channels, 3, 6, 10, requires_grad=latents_have_gradient)
    expected = (
        forward_flops(config, SIZE, adapter_rank=rank),
        backward_flops(config, SIZE, adapter_rank=rank, latents_have_gradient=latents_have_gradient),
    )
    assert counted(count_flops, model, latents, "phase_1" if rank else None) == expected


def test_a_pass_of_the_14b_model_is_its_formula_written_out():
    """81 x 480 x 832 pixels: the docstring's terms, with the numbers of Wan2.2-A14B."""
    s, text, d, f = 21 * 30 * 52, 512, 5120, 13824
    block = 8 * s * d**2 + 4 * s**2 * d + 4 * (s + text) * d**2 + 4 * s * text * d + 4 * s * d * f
    outside = 2 * s * d * (64 + 64) + 2 * text * d * (4096 + d) + 2 * d * (256 + d) + 12 * d**2
    size = PassSize(samples=1, tokens=s, text=text)
    assert forward_flops(WAN_PRESETS["wan2.2-t2v-a14b"], size) == 40 * block + outside
