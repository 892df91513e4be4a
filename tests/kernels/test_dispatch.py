"""Who runs an op, what is refused, and torch's own checks of the registered ops."""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import pdmd_kernels
from pdmd_kernels import backend as backends
from pdmd_kernels.reference import primitives
from pdmd_kernels.schemas import SCHEMAS

NEEDS_NATIVE = pytest.mark.skipif(
    "native" not in pdmd_kernels.available_backends(), reason="the native kernels are not built"
)
X, ONE = torch.zeros(2, 3), torch.ones(2)
ROWS, GATE = torch.zeros(2, 4, 6), torch.zeros(2, 1, 6)
WEIGHT, ROPE = torch.ones(6), torch.zeros(4, 1, 2)
QK = {"eps": 1e-6, "size": 6, "heads": 3}


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "message"),
    [
        ("diffuse", (X, torch.zeros(2, 1), ONE, ONE), {}, r"noise is \[2, 1\]"),
        ("diffuse", (X, X, torch.ones(3), ONE), {}, r"a is \[3\]"),
        ("diffuse", (X, X.to("meta"), ONE, ONE), {}, "noise is on meta"),
        ("diffuse", (X, X, ONE, ONE.to("meta")), {}, "b is on meta"),
        ("diffuse", (X.long(), X, ONE, ONE), {}, "x_s is torch.int64"),
        ("diffuse", (torch.tensor(1.0), X, ONE, ONE), {}, "x_s is a scalar"),
        ("diffuse", (X, X, ONE.clone().requires_grad_(), ONE), {}, "a requires a gradient"),
        ("subinterval_noise", (X, torch.ones(3, dtype=torch.int64), ONE, ONE), {}, r"noise is \[3\] seeds"),
        ("euler_step", (X, torch.zeros(3, 3), ONE, ONE), {}, r"flow is \[3, 3\]"),
        ("subinterval_loss", (X, X[:1], X, ONE, ONE, ONE, ONE), {}, r"x_s is \[1, 3\]"),
        ("subinterval_loss", (X, X, X, ONE, ONE, ONE, ONE[:1]), {}, r"weight is \[1\]"),
        ("subinterval_loss", (X, X.clone().requires_grad_(), X, *[ONE] * 4), {}, "x_s or noise requires a gradient"),
        ("dmd_gradient", (X, X, ONE), {"x_s": X}, "come together"),
        ("dmd_gradient", (X, X[:, :1], ONE), {}, r"fake_flow is \[2, 1\]"),
        ("dmd_gradient", (X, X, ONE), {"unconditional": X[:1]}, r"unconditional is \[1, 3\]"),
        ("normal", (ONE, 3), {}, "seeds is torch.float32"),
        ("normal", (ONE.long(), -1), {}, "numel is -1"),
        ("normal", (ONE.long(), 1, -1), {}, "offset is -1"),
        ("normal", (ONE.long(), 1, 2**63 - 1), {}, "offset is"),
        ("modulated_layer_norm", (X, GATE, GATE), {"eps": 1e-6}, r"x is \[2, 3\]"),
        ("modulated_layer_norm", (ROWS, GATE.bfloat16(), GATE), {"eps": 1e-6}, "shift is torch.bfloat16"),
        ("modulated_layer_norm", (ROWS, GATE, torch.zeros(2, 2, 6)), {"eps": 1e-6}, r"scale is \[2, 2, 6\]"),
        ("modulated_layer_norm", (ROWS, GATE, ROWS), {"eps": 1e-6}, "give both in one shape"),
        ("gated_residual", (ROWS, ROWS.bfloat16(), GATE), {}, "h is torch.bfloat16"),
        ("gated_residual", (ROWS, ROWS, GATE.to("meta")), {}, "gate is on meta"),
        ("gated_residual", (ROWS, ROWS[:, :2], GATE), {}, r"h is \[2, 2, 6\]"),
        ("qk_norm_rope", (ROWS, ROWS[:1], WEIGHT, WEIGHT), QK, r"key is \[1, 4, 6\]"),
        ("qk_norm_rope", (ROWS, ROWS.bfloat16(), WEIGHT, WEIGHT), QK, "key is torch.bfloat16"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT, WEIGHT.to("meta")), QK, "key_weight is on meta"),
        ("gelu_tanh", (ROWS.long(),), {}, "x is torch.int64"),
        ("qk_norm_rope", (ROWS, ROWS[..., :4], WEIGHT, WEIGHT), QK, r"key is \[2, 4, 4\]"),
        ("qk_norm_rope", (ROWS, ROWS[:, :2], WEIGHT, WEIGHT), QK | {"rope": ROPE}, r"key is \[2, 2, 6\]"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT[:3], WEIGHT), QK, r"query_weight is \[3\]"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT, WEIGHT), QK | {"heads": 4}, "heads is 4"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT, WEIGHT), QK | {"size": 12}, "size is 12"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT, WEIGHT), QK | {"rope": ROPE[:3]}, "rope is"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT, WEIGHT), QK | {"rope": ROPE.double()}, "rope is torch.float64"),
        ("qk_norm_rope", (ROWS, ROWS, WEIGHT, WEIGHT), QK | {"heads": 2, "rope": ROPE}, "head_dim even"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(op, args, kwargs, message, backend):
    with pytest.raises(ValueError, match=message):
        getattr(pdmd_kernels, op)(*args, **kwargs)


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'cuda' does not exist; choose one of auto"), pdmd_kernels.use_backend("cuda"):
        pass


@pytest.mark.parametrize(("name", "flag"), [("native", "_HAS_NATIVE"), ("triton", "_HAS_TRITON")])
def test_a_backend_that_is_missing_is_refused(name, flag, monkeypatch):
    monkeypatch.setattr(backends, flag, False)
    assert name not in pdmd_kernels.available_backends("cpu") + pdmd_kernels.available_backends("cuda")
    with pytest.raises(ValueError, match=f"kernel backend {name}"), pdmd_kernels.use_backend(name):
        pass


def test_a_backend_for_other_devices_is_refused_by_the_op(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    with (
        pdmd_kernels.use_backend("triton"),
        pytest.raises(ValueError, match="triton does not run on cpu tensors"),
    ):
        pdmd_kernels.diffuse(X, X, ONE, ONE)


@pytest.fixture
def warnings_are_new() -> Iterator[None]:
    """What is said once is said again in the test, and after it."""
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


def said_once(call: Callable[[], object], words: str) -> None:
    """Checks that the first of two calls warns."""
    with pytest.warns(UserWarning, match=words):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_without_triton_the_plain_twins_stand_in_and_say_so_once(monkeypatch, warnings_are_new):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    said_once(lambda: backends.select(on_a_gpu), "triton is not there")
    assert backends.select(on_a_gpu) is primitives


def test_without_the_cuda_kernel_of_an_op_triton_stands_in_and_says_so_once(monkeypatch, warnings_are_new):
    monkeypatch.setattr(backends, "_COMPILED_FOR_CUDA", ())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said_once(lambda: backends.warn_if_not_compiled("adamw_beta1_zero"), "adamw_beta1_zero was not built.*CUDACXX")
    monkeypatch.setattr(backends, "_COMPILED_FOR_CUDA", ("adamw_beta1_zero",))
    backends._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.warn_if_not_compiled("adamw_beta1_zero")


def test_the_choice_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), pdmd_kernels.use_backend("reference"):
        raise KeyError
    assert backends._CHOSEN.get() == "auto"


@NEEDS_NATIVE
def test_fp64_runs_on_the_plain_twin_beside_the_native_kernels():
    x = torch.randn(2, 3, dtype=torch.float64)
    with pdmd_kernels.use_backend("native"):
        assert torch.equal(pdmd_kernels.diffuse(x, x, ONE, ONE), pdmd_kernels.reference.diffuse(x, x, ONE, ONE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_results_in_a_dtype_that_kernels_do_not_write_come_from_the_plain_twin(dtype, backend):
    x = torch.linspace(-3, 3, 6).view(2, 3)
    assert torch.equal(pdmd_kernels.subinterval_noise(x, x, ONE, ONE, dtype), (2 * x).to(dtype))
    assert torch.equal(pdmd_kernels.euler_step(x, x, ONE, ONE, dtype)[1], (2 * x).to(dtype))


def samples() -> dict[str, tuple]:
    """Arguments for each op, small and awkward."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, rows, gate, weight = random(2, 5), random(2, 3, 8), random(2, 1, 8), random(8)
    one, seeds, per_token, rope = random(2).abs(), torch.tensor([3, 4]), random(2, 3).abs(), random(3, 2, 2)
    return {
        "random_words": (seeds, 7, 2),
        "normal": (seeds, 7, 2),
        "subinterval_noise": (x, seeds, one, one, torch.bfloat16),
        "subinterval_loss": (x, x, x, one, one, one, one),
        "dmd_gradient": (x, x, 2.0, x, one, x, x, one, 1e-6),
        "euler_step": (x, x, one, one, torch.bfloat16),
        "modulated_layer_norm": (rows, gate, gate, 1e-6),
        "modulated_layer_norm_backward": (rows, rows, gate, per_token, per_token, [True, True]),
        "gated_residual": (rows, rows, gate),
        "gated_residual_backward": (rows, rows, gate, [True, False]),
        "sum_of_squares": (rows,),
        "rms_rope": (rows, weight, per_token, rope, 2),
        "rms_rope_backward_dots": (rows, rows, weight, per_token, None, 2),
        "rms_rope_backward_dx": (rows, rows, weight, per_token, per_token, rope, 2),
        "rms_norm_rope": (rows, weight, rope, 2, 1e-6),
        "rms_norm_rope_backward": (rows, rows, weight, per_token, rope, 2),
        "gelu_tanh": (x,),
        "gelu_tanh_backward": (x, x),
        "adamw_beta1_zero": ([x], [x.clone()], [x.abs()], [x.bfloat16()], 0.1, 0.9, 1e-8, 0.0, 1, None),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_torch_finds_no_fault_with_an_op(name):
    torch.library.opcheck(getattr(torch.ops.pdmd, name).default, samples()[name])


def differentiable_samples() -> dict[str, tuple]:
    """Arguments for each op that the C++ library differentiates."""
    primitive = samples()
    rows, weight, rope, heads, eps = primitive["rms_norm_rope"]
    arguments = {
        "modulated_layer_norm": primitive["modulated_layer_norm"],
        "gated_residual": primitive["gated_residual"],
        "qk_norm_rope": (rows, rows.flip(1), weight, weight.flip(0), rope, heads, eps),
        "gelu_tanh": primitive["gelu_tanh"],
    }
    return {
        name: tuple(a.clone().requires_grad_(a is not rope) if isinstance(a, Tensor) else a for a in call)
        for name, call in arguments.items()
    }


@NEEDS_NATIVE
@pytest.mark.parametrize("name", ["modulated_layer_norm", "gated_residual", "qk_norm_rope", "gelu_tanh"])
def test_torch_finds_no_fault_with_an_op_that_the_library_differentiates(name):
    op = getattr(torch.ops.pdmd, f"differentiable_{name}").default
    torch.library.opcheck(op, differentiable_samples()[name])


@NEEDS_NATIVE
def test_a_second_derivative_is_refused():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(pdmd_kernels.gelu_tanh(x).sum(), x, create_graph=True)


@NEEDS_NATIVE
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_native_op_called_directly_refuses_a_tensor_that_would_crash_it(name):
    arguments = list(samples()[name])
    last = max(i for i, a in enumerate(arguments) if is_tensor_or_list_of(a))
    for wrong in (torch.zeros(7, 7, 7, 7), torch.zeros(2, dtype=torch.complex64)):
        if name in ("sum_of_squares", "gelu_tanh") and wrong.ndim == 4:
            continue  # they take any shape
        arguments[last] = wrong if isinstance(arguments[last], Tensor) else [wrong]
        with pytest.raises(ValueError):
            getattr(torch.ops.pdmd, name).default(*arguments)


def is_tensor_or_list_of(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and len(value) > 0 and isinstance(value[0], Tensor))


def test_an_op_called_for_a_device_without_kernels_keeps_its_shapes():
    gate = GATE.to("meta")
    y, mean, rstd = torch.ops.pdmd.modulated_layer_norm(ROWS.to("meta"), gate, gate, 1e-6)
    assert (y.shape, mean.shape, rstd.dtype) == (ROWS.shape, ROWS.shape[:2], torch.float32)


@pytest.mark.parametrize(
    "op", ["diffuse", "gated_residual", "modulated_layer_norm", "qk_norm_rope", "subinterval_loss"]
)
def test_gradients_pass_torchs_numerical_check(op):
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, gate, weight, rope = random(2, 3, 4), random(2, 1, 4), random(4), random(3, 1, 2)
    calls = {
        "diffuse": (lambda x, y: pdmd_kernels.diffuse(x, y, ONE, 3 * ONE), (random(2, 3), random(2, 3))),
        "gated_residual": (pdmd_kernels.gated_residual, (rows, random(2, 3, 4), gate)),
        "modulated_layer_norm": (
            lambda *args: pdmd_kernels.modulated_layer_norm(*args, eps=1e-6),
            (rows, gate, random(2, 1, 4)),
        ),
        "qk_norm_rope": (
            lambda *args: pdmd_kernels.qk_norm_rope(*args, eps=1e-6, size=4, heads=2, rope=rope),
            (rows, random(2, 3, 4), weight, random(4)),
        ),
        "subinterval_loss": (
            lambda x: pdmd_kernels.subinterval_loss(x, X.double(), X, ONE, ONE, ONE, 2 * ONE),
            (random(2, 3),),
        ),
    }
    function, inputs = calls[op]
    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs))
