"""The door: derivatives of every contraction by every argument, on every backend, and what each way through it costs."""

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from samples import OPERATIONS, every_activation, every_outside, make_problem
from scipy.interpolate import BSpline

from kan_fast import ops
from kan_fast.backends import get

SMALL = (3, 2, 2)


def closed(problem, operation, n, backend, with_scale=True):
    """(function of the differentiable arguments, those arguments): what gradcheck wants."""
    args = [*problem.args(operation, n, with_scale), backend]
    free = [p for p, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad]

    def function(*values):
        full = list(args)
        for position, value in zip(free, values, strict=True):
            full[position] = value
        result = getattr(ops, operation)(*full)
        return tuple(part for part in result if part.numel()) if isinstance(result, tuple) else result

    return function, tuple(args[p] for p in free)


@every_outside
@every_activation
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_of_every_argument(place64, operation, activation, outside):
    """First and second derivatives, backward and forward, against finite differences; x is off the knots.

    fast_mode compares one random projection of each Jacobian; one combination is compared entry by entry.
    """
    fast_mode = (activation, outside) != ("silu", "zero")
    for k, n in ((3, 0), (2, 1))[: 2 if activation == "silu" else 1]:
        problem = make_problem(
            place64, shape=SMALL, grid_size=3, k=k, activation=activation, outside=outside, requires_grad=True, kind="uneven"
        )
        for with_scale in (True, False)[: 2 if operation in ("contract_output", "contract_weight") else 1]:
            function, values = closed(problem, operation, n, place64.backend, with_scale)
            assert torch.autograd.gradcheck(
                function, values, check_forward_ad=True, check_batched_grad=not fast_mode, fast_mode=fast_mode
            )
            if n == 0:
                assert torch.autograd.gradgradcheck(
                    function, values, check_fwd_over_rev=True, check_rev_over_rev=True, atol=1e-4, fast_mode=fast_mode
                )


@pytest.mark.parametrize("subset", [("x",), ("spline_weight",), ("base_weight",), ("g",), ("x", "g"), ("spline_weight", "g")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_of_some_arguments(operation, subset):
    """What is not asked for is not computed, and what is saved depends on it: every subset must still be right."""
    problem = make_problem(shape=SMALL, grid_size=3)
    problem = problem._replace(**{name: getattr(problem, name).requires_grad_() for name in subset})
    function, values = closed(problem, operation, 1, "reference")
    if values:
        assert torch.autograd.gradcheck(function, values, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, values)


def test_third_derivative_of_the_spline_against_scipy(place64):
    problem = make_problem(place64, shape=(40, 1, 1), grid_size=6, k=5, activation="none", kind="uneven")
    x = (problem.x / 4).requires_grad_()  # within the range, which SciPy goes on from
    args = problem._replace(x=x).args("contract_output", 0, False)
    value = ops.contract_output(*args, place64.backend)
    curve = BSpline(problem.grid[0].cpu().numpy(), problem.spline_weight[0, :, 0].cpu().numpy(), 5)
    at = x.detach().cpu().numpy()
    for n in range(1, 5):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        true = curve.derivative(n)(at)
        # Two float64 evaluations with cancelling differences, as in test_spline.py.
        assert np.abs(value.detach().cpu().numpy() - true).max() <= 1e-11 * np.abs(true).max()


def test_orders_higher_than_the_spline(place64):
    """The activation goes on where the spline has ended."""
    problem = make_problem(place64, shape=(5, 2, 1), k=1, activation="tanh", requires_grad=True)
    value = ops.contract_output(*problem.args("contract_output", 0, False), place64.backend)
    for _ in range(6):
        (value,) = torch.autograd.grad(value.sum(), problem.x, create_graph=True)
    base = problem.x
    true = torch.tanh(base) * problem.base_weight.reshape(1, -1)
    for _ in range(6):
        (true,) = torch.autograd.grad(true.sum(), base, create_graph=True)
    torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-9)


class Calls:
    """Counts what reaches a backend."""

    def __init__(self, monkeypatch, backend):
        self.seen = []
        module = get(backend)
        for name in OPERATIONS:
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name, function):
        def counted(*args):
            self.seen.append(name)
            return function(*args)

        return counted


@pytest.mark.parametrize(
    ("wanted", "calls"),
    [
        (("x", "spline_weight", "base_weight"), ["contract_output", "contract_backward"]),
        (("x", "spline_weight"), ["contract_output", "contract_backward"]),
        (("spline_weight", "base_weight"), ["contract_output", "contract_weight"]),
        (("base_weight",), ["contract_output", "contract_weight"]),
        (("x",), ["contract_output", "contract_input"]),
    ],
)
def test_the_first_backward_is_one_call(monkeypatch, wanted, calls):
    problem = make_problem()
    problem = problem._replace(**{name: getattr(problem, name).requires_grad_() for name in wanted})
    counter = Calls(monkeypatch, "native" if "native" in _available() else "reference")
    backend = "native" if "native" in _available() else "reference"
    ops.contract_output(*problem.args("contract_output", 0, False), backend).sum().backward()
    assert counter.seen == calls
    for name in ("x", "spline_weight", "base_weight"):
        assert (getattr(problem, name).grad is not None) == (name in wanted)


def _available():
    from kan_fast import available_backends

    return available_backends("cpu")


def test_only_what_backward_reads_is_saved():
    """Without grad of x the weights are not kept alive by the graph."""
    problem = make_problem()
    problem.spline_weight.requires_grad_()
    y = ops.contract_output(*problem.args("contract_output", 0, False), "reference")
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert {t.shape for t in saved} == {problem.x.shape, problem.grid.shape}


def test_mixed_dtypes_give_gradients_of_each_arguments_dtype(place):
    problem = make_problem(place, torch.bfloat16, x_dtype=torch.float32, requires_grad=True)
    y = ops.contract_output(*problem.args("contract_output", 0), place.backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert problem.x.grad.dtype == problem.scale.grad.dtype == torch.float32
    assert problem.spline_weight.grad.dtype == problem.base_weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_grid_that_requires_grad_raises(operation):
    problem = make_problem(requires_grad=True)
    problem.grid.requires_grad_()
    with pytest.raises(RuntimeError, match="^grid: the knots are not differentiable"):
        getattr(ops, operation)(*problem.args(operation, 0), "reference")
    problem = make_problem()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(problem.grid, torch.ones_like(problem.grid))
        with pytest.raises(RuntimeError, match="^grid: the knots are not differentiable"):
            getattr(ops, operation)(*problem._replace(grid=dual).args(operation, 0), "reference")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_silent_zero_in_forward_mode(place64, operation):
    """Tangents pass through the function and through the bare operator alike, alone and below a graph."""
    for requires_grad in (False, True):
        problem = make_problem(place64, requires_grad=requires_grad)
        tangent = torch.randn_like(problem.x)
        _, wanted = torch.func.jvp(
            lambda x, p=problem: getattr(ops, operation)(*p._replace(x=x).args(operation, 0), place64.backend),
            (problem.x.detach(),),
            (tangent,),
        )
        for door in (getattr(ops, operation), getattr(torch.ops.kan_fast, operation)):
            with forward_ad.dual_level():
                x = forward_ad.make_dual(problem.x, tangent)
                result = door(*problem._replace(x=x).args(operation, 0), place64.backend)
                for part, want in zip(_tuple(result), _tuple(wanted), strict=True):
                    got = forward_ad.unpack_dual(part).tangent
                    assert got.abs().sum() > 0
                    torch.testing.assert_close(got, want)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


# torch 2.14 reads .grad of its own views in there.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators(place, operation):
    """torch's own checks: schema, autograd registration, fake kernel, AOT dispatch with dynamic shapes."""
    for activation, requires_grad in (("silu", True), ("none", False)):
        problem = make_problem(place, torch.float32, (4, 3, 2), activation=activation, requires_grad=requires_grad)
        args = problem.args(operation, 0, with_scale=requires_grad)
        torch.library.opcheck(getattr(torch.ops.kan_fast, operation).default, (*args, place.backend))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators_of_the_library(operation):
    """The C++ operators have fake kernels of their own."""
    if "native" not in _available():
        assert get("native").reason_not(torch.device("cpu"), torch.float32) is not None
        return
    for activation in (0, 1):
        problem = make_problem(None, torch.float32, (4, 3, 2), activation=("none", "silu")[activation])
        args = problem.args(operation, 0)
        args = (*args[:-3], activation, 0, 0)
        operator = getattr(torch.ops.kan_fast_native, operation).default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_auto_is_resolved_when_the_operator_runs():
    problem = make_problem(dtype=torch.float32, requires_grad=True)
    args = problem.args("contract_output", 0)
    best = _available()[0]
    torch.testing.assert_close(
        torch.ops.kan_fast.contract_output(*args, "auto"), ops.contract_output(*args, best), rtol=0, atol=0
    )
    with torch.no_grad():
        torch.testing.assert_close(
            torch.ops.kan_fast.contract_output(*args, "auto"), ops.contract_output(*args, best), rtol=0, atol=0
        )


def test_fake_tensors_in_eager_mode(place):
    """Tensors without values reach a fake kernel and never a real one."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    problem = make_problem(place, torch.float32, requires_grad=True)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in problem.args("contract_output", 0)]
        y = ops.contract_output(*fake, place.backend)
        assert isinstance(y, FakeTensor)
        assert y.shape == (17, 4)
        (dx,) = torch.autograd.grad(y.sum(), fake[0])
        assert isinstance(dx, FakeTensor)
    with torch.no_grad():  # fake tensors outside of their mode
        assert isinstance(ops.contract_output(*fake, place.backend), FakeTensor)
