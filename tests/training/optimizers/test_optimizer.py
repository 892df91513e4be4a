"""One role's optimizer against torch.optim.AdamW, in one process."""

import copy

import pytest
import torch

from megatron_pdmd.parallel import data_parallel
from megatron_pdmd.training.checkpoints.sharded_state import with_prefix
from megatron_pdmd.training.optimizers.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("topology")

LR = 1e-2
STEPS = 5


def make_module(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)).to(dtype)


def make_batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 5, generator=generator).to(dtype)


def loss_of(module, step):
    dtype = next(module.parameters()).dtype
    x, y = make_batch(step, dtype)
    return (module(x) - y).square().mean()


def make_optimizer(module, *, bf16=False, distributed=False, **options):
    wrapped = data_parallel(module, bf16=bf16, use_distributed_optimizer=distributed)
    return build_optimizer([wrapped], lr=LR, bf16=bf16, **options)


def update(module, optimizer, step):
    optimizer.zero_grad()
    loss_of(module, step).backward()
    norm = optimizer.gradient_norm()
    optimizer.step(norm)
    return norm


def torch_adamw(parameters, weight_decay=0.01, **options):
    """Torch's fused AdamW with Megatron's rule of what is decayed."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, fused=True, **options)


def torch_update(module, optimizer, step, clip_grad):
    optimizer.zero_grad()
    loss_of(module, step).backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip_grad)
    optimizer.step()
    return norm


def live(optimizer):
    """The tensors of the state and of the masters by name; on one rank each is whole."""
    shards = optimizer.sharded_state() | with_prefix("master", optimizer.master_weights())
    return {name: one.tensor for name, shard in shards.items() for one in shard.boxes}


def copied(optimizer):
    return {name: tensor.clone() for name, tensor in live(optimizer).items()}


def load(optimizer, state, step_count):
    """What reading a checkpoint does."""
    optimizer.prepare_to_load(step_count)
    assert live(optimizer).keys() == state.keys()
    for name, tensor in live(optimizer).items():
        tensor.copy_(state[name])


def assert_same(module, other):
    for (name, ours), theirs in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("distributed", [False, True])
def test_steps_with_a_first_moment_are_those_of_torch_to_the_bit(distributed):
    module, betas = make_module(), (0.9, 0.95)
    plain = copy.deepcopy(module)
    optimizer = make_optimizer(module, betas=betas, weight_decay=0.1, clip_grad=0.0, distributed=distributed)
    reference = torch_adamw(plain.parameters(), weight_decay=0.1, betas=betas)
    for step in range(STEPS):
        update(module, optimizer, step)
        torch_update(plain, reference, step, float("inf"))
    assert_same(module, plain)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip_grad", [0.1, 0.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0, 0.999)])
def test_steps_follow_torch(assert_as_accurate_as_torch, betas, clip_grad, distributed):
    modules = {
        kind: make_module(torch.float64 if kind == "reference" else torch.float32)
        for kind in ("ours", "plain", "reference")
    }
    modules["reference"].load_state_dict(modules["plain"].state_dict())
    options = {"betas": tuple(map(float, betas)), "weight_decay": 0.1}
    ours = make_optimizer(modules["ours"], clip_grad=clip_grad, distributed=distributed, **options | {"betas": betas})
    others = {kind: torch_adamw(modules[kind].parameters(), **options) for kind in ("plain", "reference")}
    for step in range(STEPS):
        norm = update(modules["ours"], ours, step)
        norms = {kind: torch_update(modules[kind], others[kind], step, clip_grad or float("inf")) for kind in others}
        assert norm.dtype == torch.float32
        assert norm > 0.1
        assert_as_accurate_as_torch(norm, norms["plain"], norms["reference"])
    for values in zip(*(modules[kind].parameters() for kind in ("ours", "plain", "reference")), strict=True):
        assert_as_accurate_as_torch(*(value.detach() for value in values))


def test_a_step_is_the_closed_form():
    """Two steps with beta_1 = 0, written out: w <- w (1 - lr wd) - lr g / (sqrt(v / (1 - beta_2^t)) + eps)."""
    weight = torch.nn.Parameter(torch.tensor([[3.0, -2.0]]))
    module = torch.nn.ParameterList([weight])
    optimizer = make_optimizer(module, weight_decay=0.5, clip_grad=0.0, eps=0.25)
    expected, v = weight.detach().double().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for t, g in enumerate(torch.tensor([[[0.5, -4.0]], [[1.5, 2.0]]], dtype=torch.float64), start=1):
        optimizer.zero_grad()
        (weight * g.float()).sum().backward()
        optimizer.step(optimizer.gradient_norm())
        v = 0.999 * v + 0.001 * g**2
        expected = expected * (1 - LR * 0.5) - LR * g / ((v / (1 - 0.999**t)).sqrt() + 0.25)
    assert (weight.double() - expected).norm() <= 4 * torch.finfo(torch.float32).eps * expected.norm()


def test_biases_and_norms_are_not_decayed():
    module = make_module()
    before = copy.deepcopy(module)
    optimizer = make_optimizer(module, weight_decay=0.5)
    optimizer.zero_grad()
    optimizer.step(optimizer.gradient_norm())
    for (name, now), old in zip(module.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, old if old.ndim == 1 else old * (1 - LR * 0.5)), name


@pytest.mark.parametrize("distributed", [False, True])
def test_without_a_first_moment_no_memory_is_spent_on_one(distributed):
    module = make_module()
    optimizer = make_optimizer(module, distributed=distributed)
    update(module, optimizer, 0)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    assert sum(shard.written_bytes for shard in optimizer.sharded_state().values()) == weights
    kept = {t.untyped_storage() for state in optimizer._optimizer.state.values() for t in state.values()}
    assert sum(storage.nbytes() for storage in kept) == weights


def test_the_norm_can_be_judged_before_anything_moves():
    module = make_module()
    optimizer = make_optimizer(module)
    update(module, optimizer, 0)
    before = copy.deepcopy(module)
    state = copied(optimizer)
    optimizer.zero_grad()
    (loss_of(module, 1) * float("inf")).backward()
    assert not torch.isfinite(optimizer.gradient_norm())
    assert_same(module, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in live(optimizer).items())
    untouched = copy.deepcopy(module)
    other = make_optimizer(untouched)
    load(other, state, optimizer.step_count)
    update(module, optimizer, 2)
    update(untouched, other, 2)
    assert_same(module, untouched)


def test_set_lr_takes_effect_from_the_next_step():
    module = make_module()
    optimizer = make_optimizer(module)
    before = copy.deepcopy(module)
    optimizer.set_lr(0.0)
    update(module, optimizer, 0)
    assert_same(module, before)
    optimizer.set_lr(LR)
    update(module, optimizer, 1)
    assert not torch.equal(module[0].weight, before[0].weight)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_bf16_weights_are_roundings_of_fp32_masters_stepped_by_torch(assert_as_accurate_as_torch, beta1):
    module = make_module(torch.bfloat16)
    plain = copy.deepcopy(module)
    masters = [p.detach().float().requires_grad_() for p in plain.parameters()]
    exact = [p.detach().double().requires_grad_() for p in plain.parameters()]
    optimizer = make_optimizer(module, bf16=True, clip_grad=0.0, betas=(beta1, 0.999))
    references = [torch_adamw(which, betas=(beta1, 0.999)) for which in (masters, exact)]
    for step in range(STEPS):
        plain.load_state_dict(module.state_dict())
        update(module, optimizer, step)
        loss_of(plain, step).backward()
        for parameter, master, finer in zip(plain.parameters(), masters, exact, strict=True):
            master.grad, finer.grad, parameter.grad = parameter.grad.float(), parameter.grad.double(), None
        for reference in references:
            reference.step()
    state = live(optimizer)
    for (name, parameter), master, finer in zip(module.named_parameters(), masters, exact, strict=True):
        assert_as_accurate_as_torch(state[f"master.{name}"], master.detach(), finer.detach())
        assert torch.equal(state[f"master.{name}"].bfloat16(), parameter)


def test_masters_can_follow_weights_changed_from_outside():
    module, target = make_module(torch.bfloat16), make_module(torch.bfloat16)
    torch.nn.init.normal_(target[0].weight)
    optimizer = make_optimizer(module, bf16=True, weight_decay=0.0)
    module.load_state_dict(target.state_dict())
    optimizer.reload_master_weights()
    optimizer.zero_grad()
    optimizer.step(optimizer.gradient_norm())
    assert_same(module, target)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
@pytest.mark.parametrize("done", [0, 3])
def test_a_resumed_run_is_the_same_to_the_bit(bf16, betas, done, distributed):
    module = make_module(torch.bfloat16 if bf16 else torch.float32)
    optimizer = make_optimizer(module, bf16=bf16, betas=betas, distributed=distributed)
    for step in range(done):
        update(module, optimizer, step)
    weights = copy.deepcopy(module.state_dict())
    state = copied(optimizer)
    assert optimizer.step_count == done

    resumed = make_module(torch.bfloat16 if bf16 else torch.float32)
    torch.nn.init.zeros_(resumed[0].weight)
    second = make_optimizer(resumed, bf16=bf16, betas=betas, distributed=distributed)
    update(resumed, second, 17)
    resumed.load_state_dict(weights)
    load(second, state, done)
    for step in range(done, done + STEPS):
        update(module, optimizer, step)
        update(resumed, second, step)
    assert_same(module, resumed)
    assert second.step_count == optimizer.step_count
    for name, tensor in live(optimizer).items():
        assert torch.equal(tensor, live(second)[name]), name


def test_optimizers_of_several_roles_do_not_touch_each_other():
    generator, fake = make_module(), make_module()
    alone = copy.deepcopy(generator)
    optimizers = make_optimizer(generator, betas=(0.0, 0.9)), make_optimizer(fake, betas=(0.9, 0.999))
    untouched = copy.deepcopy(fake)
    for step in range(STEPS):
        update(generator, optimizers[0], step)
    assert_same(fake, untouched)
    update(fake, optimizers[1], 0)
    alone_optimizer = make_optimizer(alone, betas=(0.0, 0.9))
    for step in range(STEPS):
        update(alone, alone_optimizer, step)
    assert_same(generator, alone)


def test_modules_of_one_optimizer_share_a_norm_and_are_named_by_position():
    pair = make_module(), make_module()
    optimizer = build_optimizer([data_parallel(module) for module in pair], lr=LR)
    optimizer.zero_grad()
    for step, module in enumerate(pair):
        loss_of(module, step).backward()
    expected = torch.cat([p.main_grad.flatten() for module in pair for p in module.parameters()]).double().norm()
    norm = optimizer.gradient_norm()
    assert abs(norm.double() - expected) <= 4 * torch.finfo(torch.float32).eps * expected
    optimizer.step(norm)
    assert {"0.0.weight.exp_avg_sq", "1.2.bias.exp_avg_sq"} < optimizer.sharded_state().keys()


def test_a_dtype_that_would_train_badly_is_refused():
    with pytest.raises(ValueError, match=r"0\.weight is torch\.bfloat16; train it in fp32, or in bf16 with --bf16"):
        make_optimizer(make_module(torch.bfloat16))


def test_megatron_core_is_left_as_it_was_found():
    from megatron.core import optimizer as megatron_optimizer

    before = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    make_optimizer(make_module())
    assert (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER) == before
