"""Data-, tensor- and sequence-parallel training on real ranks against one process with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist

from megatron_pdmd.parallel import data_parallel, finish_gradient_sync, initialize_topology, no_sync, without_cuda
from megatron_pdmd.training.optimizers.optimizer import build_optimizer

LR = 1e-2
STEPS = 3
BATCH = 8
CLIP = 0.1


def make_module(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)).to(dtype)


def make_batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 6, generator=generator).to(dtype), torch.randn(BATCH, 5, generator=generator).to(dtype)


def loss_of(module, x, y):
    return (module(x) - y).square().mean()


def train_in_one_process(dtype):
    """Return (gradients of the first step before clipping, norms, weights) of plain torch on the whole batch."""
    module = make_module(torch.float32).to(dtype)
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.0, 0.999))
    gradients, norms = None, []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(module, *make_batch(step, dtype)).backward()
        gradients = gradients or [p.grad.clone() for p in module.parameters()]
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP))
        optimizer.step()
    return gradients, norms, [p.detach() for p in module.parameters()]


def train_on_ranks(micro_batches, overlap):
    """The same on the ranks of the current world, each with its share of the batch."""
    topology = initialize_topology()
    module = make_module()
    ddp = data_parallel(module, overlap_grad_reduce=overlap)
    optimizer = build_optimizer([ddp], lr=LR, clip_grad=CLIP)
    gradients, norms = None, []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (t.chunk(topology.data)[topology.data_rank] for t in make_batch(step))
        *first, last = zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)
        with no_sync([ddp]):
            for part in first:
                (loss_of(module, *part) / micro_batches).backward()
        (loss_of(module, *last) / micro_batches).backward()
        norms.append(optimizer.gradient_norm())
        gradients = gradients or [p.main_grad.clone() for p in module.parameters()]
        optimizer.step(norms[-1])
    return gradients, norms, [p.detach() for p in module.parameters()]


@pytest.mark.parametrize(("world_size", "micro_batches", "overlap"), [(2, 1, False), (2, 2, True), (4, 1, True)])
def test_ranks_with_parts_of_the_batch_take_the_steps_of_one_with_all_of_it(
    run_ranks, assert_as_accurate_as_torch, world_size, micro_batches, overlap
):
    plain, reference = train_in_one_process(torch.float32), train_in_one_process(torch.float64)
    results = run_ranks(train_on_ranks, world_size, micro_batches, overlap)
    assert all(norm > CLIP for norm in reference[1])
    for kind in range(3):
        for ours, same_dtype, exact in zip(results[0][kind], plain[kind], reference[kind], strict=True):
            assert_as_accurate_as_torch(ours, same_dtype, exact)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result[kind], results[0][kind], strict=True))


def test_bf16_ranks_agree_and_reduce_in_fp32(run_ranks):
    def reduced():
        topology = initialize_topology()
        module = make_module(torch.bfloat16)
        ddp = data_parallel(module, bf16=True)
        optimizer = build_optimizer([ddp], lr=LR, bf16=True)
        optimizer.zero_grad()
        x, y = (t.chunk(2)[topology.data_rank] for t in make_batch(0, torch.bfloat16))
        loss_of(module, x, y).backward()
        optimizer.step(optimizer.gradient_norm())
        masters = [shard.boxes[0].tensor for shard in optimizer.master_weights().values()]
        return [p.main_grad for p in module.parameters()], masters

    results = run_ranks(reduced, 2)
    halves = []
    for x, y in zip(*(t.chunk(2) for t in make_batch(0, torch.bfloat16)), strict=True):
        module = make_module(torch.bfloat16)
        halves.append([g.float() for g in torch.autograd.grad(loss_of(module, x, y), list(module.parameters()))])
    for ours, first, second in zip(results[0][0], *halves, strict=True):
        assert ours.dtype == torch.float32
        expected = (first + second) / 2
        assert (ours - expected).norm() <= 4 * torch.finfo(torch.float32).eps * expected.norm()
    for kind in range(2):
        assert all(torch.equal(a, b) for a, b in zip(results[0][kind], results[1][kind], strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_accumulation_does_not_communicate(run_ranks, overlap):
    def accumulate():
        topology = initialize_topology()
        module = make_module()
        ddp = data_parallel(module, overlap_grad_reduce=overlap)
        ddp.zero_grad_buffer()
        x, y = (t.chunk(2)[topology.data_rank] for t in make_batch(0))
        local = torch.autograd.grad(loss_of(module, x, y), list(module.parameters()))
        with no_sync([ddp]):
            for _ in range(2):
                loss_of(module, x, y).backward()
        kept = all(torch.equal(p.main_grad, 2 * g) for p, g in zip(module.parameters(), local, strict=True))
        loss_of(module, x, y).backward()
        finish_gradient_sync([ddp])
        mean = torch.cat([g.flatten() for g in local])
        dist.all_reduce(mean)
        mean *= 3 / 2  # three passes, two ranks
        ours = torch.cat([p.main_grad.flatten() for p in module.parameters()])
        return kept, ((ours - mean).norm() / mean.norm()).item()

    for kept, error in run_ranks(accumulate, 2):
        assert kept
        assert error <= 2 * torch.finfo(torch.float32).eps


class TensorParallelMLP(torch.nn.Module):
    """LayerNorm, column- and row-parallel linears: what a block does under tensor and sequence parallelism."""

    def __init__(self, width, hidden, topology):
        from megatron.core import tensor_parallel
        from megatron.core.transformer import TransformerConfig

        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=width,
            num_attention_heads=topology.tensor,
            tensor_model_parallel_size=topology.tensor,
            sequence_parallel=topology.sequence_parallel,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        options = {"config": config, "init_method": torch.nn.init.xavier_normal_, "bias": False, "skip_bias_add": True}
        self.norm = torch.nn.LayerNorm(width)
        for parameter in self.norm.parameters():
            parameter.sequence_parallel = topology.sequence_parallel
        self.up = tensor_parallel.ColumnParallelLinear(width, hidden, gather_output=False, **options)
        self.down = tensor_parallel.RowParallelLinear(hidden, width, input_is_parallel=True, **options)

    def forward(self, x_SBD):
        hidden, _ = self.up(self.norm(x_SBD))
        return self.down(torch.tanh(hidden))[0]


WIDTH, HIDDEN, SEQUENCE = 6, 8, 4


def plain_mlp(dtype):
    torch.manual_seed(3)
    module = torch.nn.Sequential(
        torch.nn.LayerNorm(WIDTH),
        torch.nn.Linear(WIDTH, HIDDEN, bias=False),
        torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, WIDTH, bias=False),
    )
    with torch.no_grad():
        module[0].weight.normal_()
        module[0].bias.normal_()
    return module.to(dtype)


def train_tensor_parallel(sequence_parallel):
    """Return this rank's (norm, updated weights) after one step."""
    topology = initialize_topology(tensor=2, sequence_parallel=sequence_parallel)
    module, whole = TensorParallelMLP(WIDTH, HIDDEN, topology), plain_mlp(torch.float32)
    shard = topology.tensor_rank
    with torch.no_grad():
        module.norm.load_state_dict(whole[0].state_dict())
        module.up.weight.copy_(whole[1].weight.chunk(2, dim=0)[shard])
        module.down.weight.copy_(whole[3].weight.chunk(2, dim=1)[shard])
    optimizer = build_optimizer([data_parallel(module)], lr=LR, clip_grad=1.0)
    optimizer.zero_grad()
    x = torch.randn(SEQUENCE, 2, WIDTH, generator=torch.Generator().manual_seed(4))
    if sequence_parallel:
        x = x.chunk(2, dim=0)[shard]
    (module(x) - 1).square().sum().backward()
    norm = optimizer.gradient_norm()
    optimizer.step(norm)
    return norm, module.norm.weight.detach(), module.up.weight.detach(), module.down.weight.detach()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_take_the_step_of_the_whole_model(
    run_ranks, assert_as_accurate_as_torch, sequence_parallel
):
    def whole_step(dtype):
        module = plain_mlp(dtype)
        groups = [
            {"params": [module[1].weight, module[3].weight], "weight_decay": 0.01},
            {"params": list(module[0].parameters()), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.0, 0.999))
        x = torch.randn(SEQUENCE, 2, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
        (module(x) - 1).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return norm, module[0].weight.detach(), module[1].weight.detach(), module[3].weight.detach()

    (norm, scale, up0, down0), (norm1, scale1, up1, down1) = run_ranks(train_tensor_parallel, 2, sequence_parallel)
    assert torch.equal(norm, norm1)
    assert torch.equal(scale, scale1)
    ours = norm, scale, torch.cat([up0, up1], dim=0), torch.cat([down0, down1], dim=1)
    for values in zip(ours, whole_step(torch.float32), whole_step(torch.float64), strict=True):
        assert_as_accurate_as_torch(*values)


def test_tensor_parallel_ranks_draw_apart_inside_a_fork_and_alike_outside(run_ranks):
    def draw():
        from megatron.core import tensor_parallel

        initialize_topology(tensor=2)
        with without_cuda():
            tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        outside = torch.rand(4)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside = torch.rand(4)
        return outside, inside

    (outside0, inside0), (outside1, inside1) = run_ranks(draw, 2)
    assert torch.equal(outside0, outside1)
    assert not torch.equal(inside0, inside1)


def test_a_non_finite_gradient_on_one_rank_is_seen_by_all(run_ranks):
    def norm_of_one_bad_rank():
        topology = initialize_topology()
        module = make_module()
        before = copy.deepcopy(module.state_dict())
        optimizer = build_optimizer([data_parallel(module)], lr=LR)
        optimizer.zero_grad()
        loss = loss_of(module, *make_batch(0))
        (loss * (float("nan") if topology.data_rank == 1 else 1.0)).backward()
        norm = optimizer.gradient_norm()
        return torch.isfinite(norm).item(), all(torch.equal(before[k], v) for k, v in module.state_dict().items())

    assert run_ranks(norm_of_one_bad_rank, 2) == [(False, True)] * 2
