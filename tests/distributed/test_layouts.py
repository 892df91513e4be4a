"""The sharded DiT against diffusers' whole one: flow, gradient of the latents, and every parameter's gradient."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from megatron_pdmd.models import WanConfig, add_adapter, from_hf, load_adapter_state_dict
from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.lora import DEFAULT_TARGETS, adapter_movement, weight_movement
from megatron_pdmd.parallel import Topology, data_parallel, finish_gradient_sync, initialize_topology

# 45 tokens, which neither 2, 4 nor 8 ranks divide, and heads that all of them do.
CONFIG = WanConfig(num_attention_heads=8, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10,
                   freq_dim=14, ffn_dim=80, num_layers=2, rope_max_seq_len=32)  # fmt: skip
BATCH, LATENTS, TEXT_TOKENS = 2, (3, 3, 6, 10), 7
PEFT = LoraConfig(r=3, lora_alpha=6.0, target_modules=list(DEFAULT_TARGETS))


@dataclass(frozen=True)
class Layout:
    """How the ranks are used."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    method: str = "auto"
    data: int = 1
    recompute: str | None = None

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.data

    def start(self) -> Topology:
        return initialize_topology(tensor=self.tensor, context=self.context, sequence_parallel=self.sequence_parallel)

    def __str__(self) -> str:
        parts = [f"tp{self.tensor}{'sp' * self.sequence_parallel}", f"cp{self.context}{self.method}", f"dp{self.data}"]
        return "-".join([*parts, *([self.recompute] if self.recompute else [])])


LAYOUTS = [
    Layout(),
    Layout(data=2),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=4, sequence_parallel=True, data=2, recompute="full"),
    Layout(context=2, method="ulysses", recompute="selective"),
    Layout(context=2, method="ring", data=2),
    Layout(context=4, method="ring", recompute="selective"),
    Layout(context=4, method="ulysses", data=2),
    Layout(tensor=4, context=2, method="ring"),
    Layout(tensor=2, sequence_parallel=True, context=2, method="ulysses", data=2),
    Layout(tensor=2, sequence_parallel=True, context=4, method="ring"),
    Layout(tensor=4, sequence_parallel=True, context=2, method="ulysses"),
]


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(BATCH, *LATENTS, generator=generator)
    t = torch.rand(BATCH, generator=generator)
    text = torch.randn(BATCH, TEXT_TOKENS, CONFIG.text_dim, generator=generator)
    direction = torch.randn(BATCH, *LATENTS, generator=generator)
    # The reference sees the inputs as the dtype under test rounds them.
    return x_t.to(dtype), t, text.to(dtype), direction.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole model's folder as diffusers writes it, with norms that are not ones."""
    torch.manual_seed(0)
    model = plain_model(None, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("whole")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_state():
    """A whole adapter, its B not zero, in numbers that bf16 holds."""
    model = plain_model(None, torch.float32)
    model.add_adapter(PEFT)
    generator = torch.Generator().manual_seed(2)
    return {
        name.replace(".default", ""): (0.2 * torch.randn(p.shape, generator=generator)).bfloat16().float()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }


def plain_model(path, dtype):
    if path is None:
        return WanTransformer3DModel(**{k: v for k, v in CONFIG.to_hf().items() if not k.startswith("_")})
    return WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype)


def run_plainly(path, dtype, adapter_state, reference):
    """The same as `run_ours` by diffusers and peft, in `dtype` or, inside the mode given, in fp64."""
    model, compute = plain_model(path, dtype), dtype
    if reference:
        compute = torch.float64
        with reference:
            exact = plain_model(None, compute).double()
        exact.load_state_dict(model.state_dict())
        model = exact
    if adapter_state:
        model.add_adapter(PEFT)
        state = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter_state.items()}
        model.load_state_dict(state, strict=False)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(compute)
    x_t, t, text, direction = batch(dtype)
    x_t, text, direction = (part.to(compute) for part in (x_t, text, direction))
    x_t.requires_grad_()
    with reference or contextlib.nullcontext():
        flow = model(x_t, t.to(torch.promote_types(compute, torch.float32)) * 1000, text, return_dict=False)[0]
    (flow * direction).sum(dtype=torch.promote_types(compute, torch.float32)).div(BATCH).backward()
    gradients = {
        name.replace("default.weight", "phase_1"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_" in name) == bool(adapter_state)
    }
    return flow.detach(), x_t.grad, gradients


def run_ours(path, dtype, layout, adapter_state):
    """Return (flow, gradient of the latents, gradients of the trained parameters) of the global batch's mean."""
    topology = layout.start()
    options = {"context_parallel_method": layout.method, "recompute_granularity": layout.recompute}
    model = from_hf(path, subfolder=None, dtype=dtype, **options)
    if adapter_state:
        model.requires_grad_(False)
        add_adapter(model, "phase_1", rank=PEFT.r, alpha=PEFT.lora_alpha)
        load_adapter_state_dict(model, "phase_1", adapter_state)
    ddp = data_parallel(model, bf16=dtype == torch.bfloat16)
    ddp.zero_grad_buffer()
    x_t, t, text, direction = (part.chunk(topology.data)[topology.data_rank] for part in batch(dtype))
    x_t.requires_grad_()
    flow = model(x_t, t, text, adapter="phase_1" if adapter_state else None)
    (flow * direction).sum(dtype=torch.float32).div(len(flow)).backward()
    finish_gradient_sync([ddp])
    gradients = {
        name: model.parallel.unshard(parameter.main_grad, partition_dim(parameter)).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    # A rank's mean is over its own samples, the reference's over all.
    return flow.detach(), x_t.grad / topology.data, gradients


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_equals_the_whole_model(
    layout, folder, adapter_state, references, run_ranks, assert_as_accurate_as_torch
):
    def on_a_rank():
        results = {
            case: run_ours(folder, dtype, layout, state) for case, (dtype, state) in cases(adapter_state).items()
        }
        return layout.start().data_rank, results

    for rank, (data_rank, results) in enumerate(run_ranks(on_a_rank, layout.world)):
        for case, (dtype, _) in cases(adapter_state).items():
            ours = results[case]
            plain, exact = references[case]
            assert ours[2].keys() == exact[2].keys()
            part = slice(data_rank * len(ours[0]), (data_rank + 1) * len(ours[0]))
            checks = {"flow": (ours[0], plain[0][part], exact[0][part])}
            checks["latents"] = (ours[1], plain[1][part], exact[1][part])
            checks |= {name: (ours[2][name].to(dtype), plain[2][name], exact[2][name]) for name in exact[2]}
            for name, values in checks.items():
                try:
                    assert_as_accurate_as_torch(*values)
                except AssertionError as error:
                    raise AssertionError(f"rank {rank}, {case}, {name}: {error}") from None


def cases(adapter_state):
    return {
        f"{role} in {dtype}": (dtype, state)
        for dtype in (torch.float32, torch.bfloat16)
        for role, state in (("fake score", None), ("adapter", adapter_state))
    }


@pytest.fixture(scope="module")
def references(folder, adapter_state, fp64_mode):
    """(plain torch in the same dtype, fp64) of each case, one part for each data rank when it is compared."""
    return {
        case: (run_plainly(folder, dtype, state, None), run_plainly(folder, dtype, state, fp64_mode))
        for case, (dtype, state) in cases(adapter_state).items()
    }


def movements(folder, adapter_state, layout):
    """How far an adapter, and a network with other weights, are from the network of the folder."""
    layout.start()
    model, moved = (from_hf(folder, subfolder=None) for _ in range(2))
    add_adapter(model, "phase_1", rank=PEFT.r, alpha=PEFT.lora_alpha)
    load_adapter_state_dict(model, "phase_1", adapter_state)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.mul_(2.0 if "ffn" in name else 1.5)  # a bias counted twice would show
    return adapter_movement(model, "phase_1").item(), weight_movement(moved, model).item()


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence_parallel=True), Layout(tensor=4)], ids=str)
def test_movement_of_a_sharded_network_is_the_whole_ones(layout, folder, adapter_state, run_ranks):
    (expected,) = run_ranks(movements, 1, folder, adapter_state, Layout())
    for found in run_ranks(movements, layout.world, folder, adapter_state, layout):
        assert found == pytest.approx(expected, rel=1e-6)
