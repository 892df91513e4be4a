"""Pipeline stages on real ranks against the same ranks without them: passes in lockstep, and an update by messages."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_pdmd.conversion import weight_files
from megatron_pdmd.models import Hidden, WanConfig, WanModel, add_adapter, from_hf, to_hf_state_dict
from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.lora import adapter_movement, adapter_parameters, base_parameters, weight_movement
from megatron_pdmd.parallel import Topology, data_parallel, destroy_topology, initialize_topology
from megatron_pdmd.parallel.pipeline.stages import Stage, layer_split
from megatron_pdmd.training.optimizers.optimizer import build_optimizer
from megatron_pdmd.training.phase import PhaseTrainer

CONFIG = WanConfig(num_attention_heads=4, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10,
                   freq_dim=14, ffn_dim=20, num_layers=5, rope_max_seq_len=32)  # fmt: skip
SIZES, SAMPLES, TEXT_TOKENS = (3, 4, 6), 4, 7


@dataclass(frozen=True)
class Layout:
    """How the ranks are used."""

    stages: int
    data: int = 1
    tensor: int = 1
    distributed: bool = False

    @property
    def world(self) -> int:
        return self.stages * self.data * self.tensor

    def start(self) -> Topology:
        return initialize_topology(tensor=self.tensor, pipeline=self.stages, sequence_parallel=self.tensor > 1)

    def __str__(self) -> str:
        sizes = f"pp{self.stages}-dp{self.data}-tp{self.tensor}"
        return f"{sizes}-distributed" if self.distributed else sizes


LAYOUTS = [Layout(4), Layout(2, data=2, distributed=True), Layout(2, tensor=2)]
# What is trained, and in what: the fake score's weights, an adapter.
CASES = {"weights": (torch.bfloat16, None), "adapter": (torch.float32, "phase_1")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder with random weights."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    torch.manual_seed(1)
    weight_files.write_model(path, to_hf_state_dict(WanModel(CONFIG)).items())
    destroy_topology()
    return path


def load(folder, dtype: torch.dtype, adapter: str | None, topology: Topology) -> WanModel:
    stage = Stage.of(topology.pipeline_rank, layer_split(CONFIG.num_layers, topology.pipeline))
    model = from_hf(folder, subfolder=None, dtype=dtype, stage=stage)
    add_adapter(model, "phase_1", rank=2, alpha=4)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "phase_1")[1::2]:
            parameter.fill_(0.1)
    trained = adapter_parameters(model, "phase_1") if adapter else [p for _, p in base_parameters(model)]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def batch(topology: Topology) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x_t, direction = torch.randn(2, SAMPLES, 3, *SIZES, generator=generator)
    t, text = torch.rand(SAMPLES, generator=generator), torch.randn(SAMPLES, TEXT_TOKENS, 10, generator=generator)
    return tuple(part.chunk(topology.data)[topology.data_rank] for part in (x_t, t, text, direction))


def pass_and_backward(model: WanModel, topology: Topology, adapter: str | None) -> torch.Tensor | None:
    """The gradient of the latents where there are any; activations and gradients travel as messages."""
    x_t, t, text, direction = batch(topology)
    x_t.requires_grad_()
    given = (x_t, t, text)
    if not model.stage.is_first:
        given = model.empty_hidden(len(x_t), SIZES, TEXT_TOKENS, "cpu")
        model.relay.receive(given)
        given = Hidden(*(tensor.requires_grad_() for tensor in given))
    made = model.run_stage(given, SIZES, adapter)
    if model.stage.is_last:
        made.backward(direction.to(made.dtype))
    else:
        model.relay.send([tensor.detach() for tensor in made])
        gradients = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in made]
        for gradient in gradients:
            dist.recv(gradient, group=topology.groups.pp, group_src=model.stage.index + 1)
        needed = [(tensor, gradient) for tensor, gradient in zip(made, gradients, strict=True) if tensor.requires_grad]
        torch.autograd.backward(*zip(*needed, strict=True))
    if model.stage.is_first:
        return x_t.grad
    for tensor in given:
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous()
        dist.send(gradient, group=topology.groups.pp, group_dst=model.stage.index - 1)
    return None


def updates(folder, layout: Layout) -> dict[str, dict]:
    """What `update` finds in each case."""
    topology = layout.start()
    return {name: update(folder, layout, topology, *case) for name, case in CASES.items()}


def update(folder, layout: Layout, topology: Topology, dtype: torch.dtype, adapter: str | None) -> dict:
    """Flows, gradients, the norm, what one step makes of the weights, and how far they moved."""
    model, origin = (load(folder, dtype, adapter, topology) for _ in range(2))
    with torch.no_grad():
        flow = model(*batch(topology)[:3], adapter=adapter)
    bf16 = dtype == torch.bfloat16
    ddp = data_parallel(
        model,
        bf16=bf16,
        overlap_grad_reduce=layout.distributed,
        use_distributed_optimizer=layout.distributed,
        overlap_param_gather=layout.distributed,
    )
    optimizer = build_optimizer([ddp], lr=1e-2, clip_grad=0, bf16=bf16)
    optimizer.zero_grad()
    latents = pass_and_backward(model, topology, adapter)
    norm = optimizer.gradient_norm()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {} if layout.distributed else {name: whole(model, p, p.main_grad) for name, p in named.items()}
    optimizer.step(norm)
    optimizer.finish_param_gather()
    moved = adapter_movement(model, adapter) if adapter else weight_movement(model, origin)
    weights = {name: whole(model, parameter, parameter.detach()) for name, parameter in named.items()}
    phase = SimpleNamespace(_topology=topology, _trained=lambda: {"network": SimpleNamespace(module=model)})
    counted = PhaseTrainer.trained_parameters(phase)["network"]
    place = (topology.data_rank, topology.pipeline_rank)
    return {"place": place, "flow": flow, "latents": latents, "norm": norm, "gradients": gradients,
            "weights": weights, "moved": moved, "counted": counted}  # fmt: skip


def whole(model: WanModel, parameter: torch.nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    return model.parallel.unshard(tensor, partition_dim(parameter)).clone()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stages_do_what_the_same_ranks_do_without_a_pipeline(layout, folder, run_ranks):
    flat = replace(layout, stages=1)
    expected, found = (run_ranks(updates, one.world, folder, one) for one in (flat, layout))
    for case in CASES:
        compare([result[case] for result in found], [result[case] for result in expected], layout.stages)


def compare(results: list[dict], expected: list[dict], stages: int) -> None:
    """All but sums over the stages must be equal to the bit."""
    references, held = {result["place"][0]: result for result in expected}, {}
    for result in results:
        reference = references[result["place"][0]]
        assert torch.equal(result["flow"], reference["flow"]), "a pass in lockstep"
        assert result["latents"] is None or torch.equal(result["latents"], reference["latents"])
        assert torch.equal(result["norm"], results[0]["norm"])
        for kind in ("gradients", "weights"):
            for name, tensor in result[kind].items():
                assert torch.equal(tensor, reference[kind][name]), name
        held[result["place"][1]] = result["weights"].keys()
    names = [name for stage in held.values() for name in stage]
    assert len(held) == stages and sorted(names) == sorted(expected[0]["weights"])
    assert {result["counted"] for result in results} == {sum(w.numel() for w in expected[0]["weights"].values())}
    for kind in ("norm", "moved"):
        value = expected[0][kind]
        assert value > 0 and (results[0][kind] - value).abs() <= 4 * torch.finfo(torch.float32).eps * value, kind
