"""The distributed optimizer takes the steps of plain torch on the whole batch, without a first moment and in parts."""

import pytest
import torch
import torch.distributed as dist

from megatron_pdmd.parallel import data_parallel, initialize_topology, no_sync, release_data_parallel, without_cuda
from megatron_pdmd.training.checkpoints.sharded_state import with_prefix
from megatron_pdmd.training.optimizers.optimizer import build_optimizer

LR, CLIP, STEPS, BATCH = 1e-2, 0.1, 4, 8
OVERLAPS = [(False, False), (True, False), (False, True), (True, True)]


class Net(torch.nn.Module):
    """Linears around a norm and a table that stay in fp32: with bf16, a parameter group holds both kinds."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)
        self.table = torch.nn.Parameter(torch.randn(1, 16))
        self.up.to(dtype)
        self.down.to(dtype)

    def forward(self, x):
        hidden = self.norm(self.up(x).to(self.norm.weight.dtype)) * self.table
        return self.down(hidden.to(x.dtype))


def batch(step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 6, generator=generator).to(dtype), torch.randn(BATCH, 5, generator=generator).to(dtype)


def loss_of(module, x, y):
    return (module(x) - y).square().mean()


def train_plainly(dtype, betas):
    """Norms and weights of plain torch on the whole batch in one process."""
    module = Net(torch.float32).to(dtype)
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer, norms = torch.optim.AdamW(groups, lr=LR, betas=betas), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(module, *batch(step, dtype)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP))
        optimizer.step()
    return norms, [p.detach() for p in module.parameters()]


def make(dtype, betas=(0.0, 0.999), *, distributed=True, overlaps=(False, False)):
    module = Net(dtype)
    ddp = data_parallel(
        module,
        bf16=dtype == torch.bfloat16,
        overlap_grad_reduce=overlaps[0],
        use_distributed_optimizer=distributed,
        overlap_param_gather=overlaps[1],
    )
    optimizer = build_optimizer([ddp], lr=LR, betas=betas, clip_grad=CLIP, bf16=dtype == torch.bfloat16)
    return module, ddp, optimizer


def train(module, ddp, optimizer, steps):
    """Two micro-batches for each step, this rank's share of the batch; norms."""
    norms, dtype = [], module.up.weight.dtype
    for step in steps:
        optimizer.zero_grad()
        shares = (t.chunk(dist.get_world_size())[dist.get_rank()].chunk(2) for t in batch(step, dtype))
        first, last = zip(*shares, strict=True)
        with no_sync([ddp]):
            (loss_of(module, *first) / 2).backward()
        (loss_of(module, *last) / 2).backward()
        norms.append(optimizer.gradient_norm())
        optimizer.step(norms[-1])
    optimizer.finish_param_gather()
    return norms


@pytest.mark.parametrize(("ranks", "overlaps"), [*((2, overlaps) for overlaps in OVERLAPS), (4, (True, True))])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_the_steps_are_those_of_torch_on_the_whole_batch(
    run_ranks, assert_as_accurate_as_torch, ranks, overlaps, betas
):
    def rank():
        initialize_topology()
        parts = make(torch.float32, betas, overlaps=overlaps)
        return train(*parts, range(STEPS)), [p.detach() for p in parts[0].parameters()]

    plain, reference = train_plainly(torch.float32, betas), train_plainly(torch.float64, betas)
    results = run_ranks(rank, ranks)
    assert all(norm > CLIP for norm in reference[0])
    for kind in range(2):
        for values in zip(results[0][kind], plain[kind], reference[kind], strict=True):
            assert_as_accurate_as_torch(*values)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result[kind], results[0][kind], strict=True))


def test_bf16_weights_are_those_of_the_plain_optimizer_on_the_same_ranks(run_ranks):
    """Both reduce in fp32 and round the same fp32 master weights; only the norm's summands are ordered otherwise."""

    def rank():
        initialize_topology()
        results = []
        for distributed in (True, False):
            parts = make(torch.bfloat16, distributed=distributed)
            norms = train(*parts, range(STEPS))
            results.append((torch.stack(norms), [p.detach().clone() for p in parts[0].parameters()]))
        return results

    for ours, plain in run_ranks(rank, 2):
        assert (ours[0] - plain[0]).norm() <= 4 * torch.finfo(torch.float32).eps * plain[0].norm()
        for a, b in zip(ours[1], plain[1], strict=True):
            assert (a.float() - b.float()).norm() <= torch.finfo(torch.bfloat16).eps * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_rank_keeps_its_share_of_the_state_and_no_first_moment(run_ranks, dtype):
    def rank():
        initialize_topology()
        module, ddp, optimizer = make(dtype)
        train(module, ddp, optimizer, [0])
        kept = {t.untyped_storage() for state in optimizer._optimizer.state.values() for t in state.values()}
        shards = [*optimizer.sharded_state().values(), *optimizer.master_weights().values()]
        written = sum(shard.written_bytes for shard in shards)
        return sum(storage.nbytes() for storage in kept), written, sum(p.numel() for p in module.parameters())

    results = run_ranks(rank, 2)
    elements = results[0][2]
    assert sum(kept for kept, _, _ in results) == 4 * elements
    masters = elements - 3 * 16 if dtype == torch.bfloat16 else 0
    assert sum(written for _, written, _ in results) == 4 * (elements + masters)
    assert all(kept < 0.7 * 4 * elements for kept, _, _ in results)


def test_a_non_finite_gradient_is_seen_by_all_before_anything_moves(run_ranks):
    def rank():
        initialize_topology()
        module, _, optimizer = make(torch.float32)
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        loss = loss_of(module, *batch(0, torch.float32))
        (loss * (float("nan") if dist.get_rank() == 1 else 1.0)).backward()
        norm = optimizer.gradient_norm()
        same = all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
        return torch.isfinite(norm).item(), same, optimizer.step_count

    assert run_ranks(rank, 2) == [(False, True, 0)] * 2


@pytest.mark.parametrize("overlaps", [(False, False), (True, True)])
def test_only_the_last_backward_and_the_step_communicate(run_ranks, overlaps):
    def rank():
        initialize_topology()
        module, ddp, optimizer = make(torch.float32, overlaps=overlaps)
        counts = []
        for step in range(2):  # in the first, megatron-core learns which gradients come when
            optimizer.zero_grad()
            group, calls = ddp.bucket_groups[0], []
            reduce, gather = group.start_grad_sync, group.start_param_sync
            group.start_grad_sync = lambda *a, r=reduce, c=calls, **k: (c.append("reduce"), r(*a, **k))[1]
            group.start_param_sync = lambda *a, g=gather, c=calls, **k: (c.append("gather"), g(*a, **k))[1]
            with no_sync([ddp]):
                loss_of(module, *batch(step, torch.float32)).backward()
            quiet = list(calls)
            loss_of(module, *batch(step, torch.float32)).backward()
            early = list(calls)
            optimizer.step(optimizer.gradient_norm())
            counts.append((quiet, early, calls))
            group.start_grad_sync, group.start_param_sync = reduce, gather
        return counts[1]

    early = ["reduce"] if overlaps[0] else []
    assert run_ranks(rank, 2) == [([], early, ["reduce", "gather"])] * 2


def test_a_released_network_can_be_trained_again_by_another_optimizer(run_ranks):
    def rank():
        initialize_topology()
        module, ddp, optimizer = make(torch.bfloat16, overlaps=(False, True))
        train(module, ddp, optimizer, [0])
        before = [p.detach().clone() for p in module.parameters()]
        release_data_parallel(ddp)
        names = ("main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad")
        left = [name for p in module.parameters() for name in names if hasattr(p, name)]
        assert not module._forward_pre_hooks
        again = data_parallel(module, bf16=True, use_distributed_optimizer=True)
        second = build_optimizer([again], lr=LR, clip_grad=CLIP, bf16=True)
        same = all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
        train(module, again, second, [1])
        moved = not any(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
        return left, same, moved

    assert run_ranks(rank, 2) == [([], True, True)] * 2


def sharded_model_state(module):
    """megatron-core's description of the model: each parameter whole, equal on the data ranks."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return {
        name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=dist.get_rank())
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_megatron_cores_own_sharded_state_goes_there_and_back(run_ranks, tmp_path, dtype, betas):
    """Saved by two ranks and loaded by one, to the bit."""
    kind = {"distrib_optim_sharding_type": "fully_reshardable"}

    def state_of(optimizer):
        shards = optimizer.sharded_state() | with_prefix("master", optimizer.master_weights())
        return {name: shard.staged() for name, shard in shards.items()}

    def save():
        from megatron.core import dist_checkpointing

        initialize_topology()
        module, ddp, optimizer = make(dtype, betas)
        train(module, ddp, optimizer, range(2))
        model = sharded_model_state(module)
        with without_cuda():
            state = {"model": model, "optimizer": optimizer._optimizer.sharded_state_dict(model, metadata=kind)}
            dist_checkpointing.save(state, str(tmp_path))
        return state_of(optimizer)

    def load():
        from megatron.core import dist_checkpointing

        initialize_topology()
        module, _, optimizer = make(dtype, betas)
        optimizer.prepare_to_load(1)
        model = sharded_model_state(module)
        with without_cuda():
            own = optimizer._optimizer.sharded_state_dict(model, is_loading=True, metadata=kind)
            state = dist_checkpointing.load({"model": model, "optimizer": own}, str(tmp_path))
            optimizer._optimizer.load_state_dict(state["optimizer"])
        return state_of(optimizer), [group["step"] for group in optimizer._optimizer.param_groups]

    parts, ((loaded, steps),) = run_ranks(save, 2), run_ranks(load, 1)
    assert set(steps) == {2}
    assert loaded.keys() == parts[0].keys()
    for name, shard in loaded.items():
        whole = torch.zeros(shard.shape)
        for part in parts:
            for box in part[name].boxes:
                whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.tensor.shape, strict=True))] += box.tensor
        assert torch.equal(shard.boxes[0].tensor, whole) and whole.any(), name
