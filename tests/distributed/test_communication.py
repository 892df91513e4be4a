"""What a pass of the sharded DiT communicates, counted on real ranks, is what the formulas say and no more."""

import dataclasses
import math
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_pdmd.models import WAN_PRESETS, WanConfig, WanModel, adapter_parameters, add_adapter
from megatron_pdmd.parallel import initialize_topology, without_cuda
from megatron_pdmd.parallel.communication import CommunicationCounter
from megatron_pdmd.planning.communication import ModelLayout, PassShape, backward_volume, forward_volume

CONFIG = WanConfig(num_attention_heads=4, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10,
                   freq_dim=14, ffn_dim=80, num_layers=3, rope_max_seq_len=32)  # fmt: skip
LATENTS, TEXT = (3, 3, 6, 10), 7
LAYOUTS = [
    ModelLayout(),
    ModelLayout(tensor=2),
    ModelLayout(tensor=2, sequence_parallel=True),
    ModelLayout(context=2),
    ModelLayout(context=3, method="ring"),
    ModelLayout(tensor=2, context=2, sequence_parallel=True),
    ModelLayout(tensor=2, context=2, method="ring"),
]


@pytest.mark.parametrize(
    ("adapter", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["all weights", "adapter in bf16"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_a_pass_communicates_what_the_formula_says(run_ranks, recompute, layout, adapter, dtype):
    def on_a_rank():
        initialize_topology(tensor=layout.tensor, context=layout.context, sequence_parallel=layout.sequence_parallel)
        with without_cuda():
            options = {"context_parallel_method": layout.method, "recompute_granularity": recompute}
            model = WanModel(CONFIG, dtype=dtype, **options)
        if adapter:
            model.requires_grad_(False)
            add_adapter(model, "phase_1", rank=2, alpha=2)
            assert all(parameter.requires_grad for parameter in adapter_parameters(model, "phase_1"))
        x_t, text = torch.randn(2, *LATENTS), torch.randn(2, TEXT, CONFIG.text_dim)
        with CommunicationCounter() as forward:
            flow = model(x_t, torch.rand(2), text, adapter="phase_1" if adapter else None)
        with CommunicationCounter() as backward:
            flow.square().mean().backward()
        return forward.volume, backward.volume

    tokens = math.prod(LATENTS[1:]) // math.prod(CONFIG.patch_size)
    shape = PassShape(samples=2, tokens=tokens, text=TEXT, element_bytes=dtype.itemsize)
    expected = (
        forward_volume(CONFIG, layout, shape),
        backward_volume(CONFIG, layout, shape, adapter=adapter, recompute=recompute is not None),
    )
    for counted in run_ranks(on_a_rank, layout.tensor * layout.context):
        assert counted == expected


def test_a_call_is_counted_with_what_it_moves(run_ranks):
    def on_a_rank():
        x = torch.ones(4, dtype=torch.bfloat16)
        with CommunicationCounter() as counter:
            torch.distributed.all_reduce(x)
            torch.distributed.all_gather_into_tensor(torch.empty(8), torch.ones(4))
            torch.distributed.reduce_scatter_tensor(torch.empty(4), torch.ones(8))
            torch.distributed.broadcast(torch.ones(3), 1)
        return counter.volume

    for volume in run_ranks(on_a_rank, 2):
        assert volume.calls == {"all-reduce": 1, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}
        assert volume.bytes == {"all-reduce": 8, "all-gather": 32, "reduce-scatter": 32, "broadcast": 12}


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_dry_run_of_the_14b_model_on_fake_ranks_communicates_the_same(run_ranks, method):
    """Two blocks at 81 x 480 x 832, TP 8 with sequence parallelism, CP 4 or 5: 64 or 80 ranks, fake tensors."""
    config = dataclasses.replace(WAN_PRESETS["wan2.1-t2v-14b"], num_layers=2)
    layout = ModelLayout(tensor=8, context=5 if method == "ulysses" else 4, sequence_parallel=True, method=method)

    def on_a_fake_rank():
        os.environ["WORLD_SIZE"] = str(8 * layout.context * 2)
        initialize_topology(tensor=8, context=layout.context, sequence_parallel=True, backend="fake")
        with FakeTensorMode(), without_cuda():
            model = WanModel(config, dtype=torch.bfloat16, context_parallel_method=method)
            inputs = torch.empty(1, 16, 21, 60, 104), torch.empty(1), torch.empty(1, 512, config.text_dim)
            with CommunicationCounter() as forward:
                flow = model(*inputs)
            with CommunicationCounter() as backward:
                flow.sum().backward()
        return forward.volume, backward.volume

    shape = PassShape(samples=1, tokens=32760, text=512, element_bytes=2)
    expected = forward_volume(config, layout, shape), backward_volume(config, layout, shape, adapter=False)
    assert run_ranks(on_a_fake_rank, 1, rendezvous=False) == [expected]
