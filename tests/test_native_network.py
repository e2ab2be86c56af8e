"""Networks as one native call: values and derivatives are those of the layers."""

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import truth
from hypothesis import given
from hypothesis import strategies as st
from networks import Calls, assert_same, gradients, inputs, layered, make, true_gradients
from samples import KINDS, every_activation, every_outside
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from kan_fast import stack
from kan_fast.activations import ACTIVATIONS
from kan_fast.backends import native
from kan_fast.spline import OUTSIDE

pytestmark = pytest.mark.skipif(
    native.reason_not(torch.device("cpu"), torch.float32) is not None, reason="the native backend is not built"
)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def _every_size_pays(monkeypatch):
    """Which sizes pay depends on the instruction set."""
    monkeypatch.setattr(stack, "_pays", lambda *args: True)


@every_outside
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_against_scipy(calls, dtype, activation, outside):
    """float64 to a few hundred roundings; float32 to twice the error of the plain PyTorch reference and a floor.

    A rounding of a layer's output passes through slopes of up to about 10 in each of the layers behind it, so the floor is
    that of sums, 4 eps times the largest value, times 100.
    """
    for k, kind in ((3, "uniform"), (3, "uneven"), (2, "repeated"), (1, "uneven"), (4, "uniform"), (5, "uneven")):
        model = make([3, 5, 4, 2], dtype, k=k, kind=kind, activation=activation, outside=outside, bias=k == 3)
        x, g = inputs(41, [3, 2], dtype)
        ours, true = gradients(model, x, g), true_gradients(model, x, g)
        assert calls.taken() == (1, 1)
        oracle = layered(model)
        for layer in oracle.layers:
            layer.backend = "reference"
        theirs = gradients(oracle, x, g)
        if k == 1 or (activation == "relu" and outside != "zero"):
            # Slopes jump at knots, which hidden values may meet within a rounding: values alone have a truth there.
            ours, true, theirs = ours[:1], true[:1], theirs[:1]
        for mine, exact, other in zip(ours, true, theirs, strict=True):
            error, allowed = (np.abs(truth.doubled(value) - exact).max() for value in (mine, other))
            floor = 400 * torch.finfo(dtype).eps * max(1.0, np.abs(exact).max())
            assert error <= 2 * allowed + floor, (k, kind, error, allowed, floor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(6))
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_by_layer_gives_the_same(calls, k, kind):
    cases = ([2, 5, 1], 5, False), ([2, 5, 5, 1], 1, True), ([3, 10, 10, 2], 9, False), ([1, 16, 16], 40, True)
    for widths, grid_size, bias in cases:
        outside, activation = OUTSIDE[(k + grid_size) % 3], ACTIVATIONS[(k + grid_size) % 6]
        model = make(widths, torch.float64, grid_size, k, kind, activation, outside, bias)
        x, g = inputs(70, widths)
        ours = gradients(model, x, g)
        assert calls.taken() == (1, 1)
        assert_same(ours, gradients(layered(model), x, g), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [0, 1, 2, 15, 16, 17, 31, 33, 64, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_batches(calls, batch, dtype):
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for widths in ([2, 5, 1], [1, 1, 1], [9, 3, 16]):
        model = make(widths, dtype, bias=True)
        x, g = inputs(batch, widths, dtype)
        ours = gradients(model, x, g)
        assert calls.taken() == (1, 1)
        assert_same(ours, gradients(layered(model), x, g), rtol=tolerance, atol=tolerance)


@given(
    batch=st.integers(0, 300),
    widths=st.lists(st.integers(1, 16), min_size=3, max_size=6),
    grid_size=st.integers(1, 40),
    k=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_any_network(batch, widths, grid_size, k, seed):
    torch.manual_seed(seed)
    kind, outside, activation = KINDS[seed % 3], OUTSIDE[seed % 7 % 3], ACTIVATIONS[seed % 11 % 6]
    model = make(widths, torch.float64, grid_size, k, kind, activation, outside, seed % 2 == 0)
    x, g = inputs(batch, widths)
    assert_same(gradients(model, x, g), gradients(layered(model), x, g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(calls, outside, bias):
    model = make([2, 3, 2], k=3, activation="silu", outside=outside, bias=bias, kind="uneven")
    names = [name for name, _ in model.named_parameters()]

    def function(x, *parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    x = inputs(5, [2, 2], reach=1.2)[0].requires_grad_()
    args = x, *(parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    assert torch.autograd.gradcheck(function, args, check_batched_grad=True, check_forward_ad=True)
    assert calls.backward > 0
    assert torch.autograd.gradgradcheck(function, args, check_batched_grad=True, check_fwd_over_rev=True)


def test_derivatives_of_any_order(calls):
    """Third derivatives by x, and their gradients by the weights."""
    model = make([1, 4, 1], k=5, bias=True)
    results = []
    for network in (model, layered(model)):
        x = torch.linspace(-1.5, 1.5, 23, dtype=torch.float64)[:, None].requires_grad_()
        value, found = network(x), []
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            found.append(value)
        results.append([*found, *torch.autograd.grad(value.square().sum(), list(network.parameters()), allow_unused=True)])
    assert calls.taken() == (1, 0)
    assert results[0][0].abs().max() > 0.1
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_what_needs_no_gradient_gets_none(calls):
    model = make([2, 5, 3, 1], bias=True)
    other = layered(model)
    x, g = inputs(20, [2, 1])
    want = gradients(other, x, g)
    leaf = x.clone().requires_grad_()
    # x alone: frozen weights.
    assert_same(torch.autograd.grad(model.requires_grad_(False)(leaf), leaf, g), want[1:2])
    model.requires_grad_(True)
    # Weights alone.
    assert_same(torch.autograd.grad(model(x), list(model.parameters()), g), want[2:])
    assert calls.taken() == (2, 2)
    # One weight alone.
    model.requires_grad_(False)
    model.layers[1].spline_weight.requires_grad_(True)
    model(x).backward(g)
    torch.testing.assert_close(model.layers[1].spline_weight.grad, want[2 + 3])
    assert model.layers[0].spline_weight.grad is None
    # Nothing.
    assert not model.requires_grad_(False)(x).requires_grad
    # In the differentiable backward too.
    model.layers[1].spline_weight.requires_grad_(True)
    for needed in ([leaf], [model.layers[1].spline_weight], [leaf, model.layers[1].spline_weight]):
        twins = [leaf] * (needed[0] is leaf) + [other.layers[1].spline_weight] * (needed[-1] is not leaf)
        got = torch.autograd.grad(model(leaf), needed, g, create_graph=True)
        assert_same(got, torch.autograd.grad(other(leaf), twins, g, create_graph=True))
    model.requires_grad_(False)
    (got,) = torch.autograd.grad(model(leaf), leaf, g, create_graph=True)
    torch.testing.assert_close(got, want[1])


def test_no_gradient_by_the_knots():
    model = make([2, 5, 1])
    model.layers[1].grid.requires_grad_(True)
    with pytest.raises(RuntimeError, match="knots are not differentiable"):
        model(inputs(3, [2, 1])[0])


def test_batched_cotangents_and_transforms(calls):
    model = make([2, 5, 3], bias=True)
    other = layered(model)
    x, _ = inputs(6, [2, 3])
    x.requires_grad_()
    many = torch.randn(4, 6, 3, dtype=torch.float64)
    for network in (model, other):
        network.zero_grad()
    got, want = (
        torch.autograd.grad(network(x), [x, *network.parameters()], many, is_grads_batched=True) for network in (model, other)
    )
    assert_same(got, want)
    y = model(x)
    by_vmap = vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(many)
    torch.testing.assert_close(by_vmap, want[0])
    calls.taken()
    for function in (
        lambda network: vmap(network)(x),
        lambda network: jvp(network, (x,), (torch.ones_like(x),))[1],
        lambda network: grad(lambda x: network(x).square().sum())(x),
        lambda network: torch.func.jacrev(network)(x),
        lambda network: torch.func.hessian(lambda x: network(x).sum())(x[0]),
    ):
        torch.testing.assert_close(function(model), function(other))
    assert calls.taken() == (0, 0)


def test_forward_mode_over_the_backward():
    """Tangents that appear after the forward."""
    model = make([2, 5, 3])
    x, g = inputs(6, [2, 3])
    x.requires_grad_()
    y, tangent = model(x), torch.randn_like(g)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(g, tangent), retain_graph=True)
        got = forward_ad.unpack_dual(dx).tangent
    torch.testing.assert_close(got, torch.autograd.grad(y, x, tangent)[0])


def test_shapes_and_strides(calls):
    model = make([4, 5, 2], torch.float32)
    other = layered(model)
    wide = torch.randn(12, 8)
    for x in (wide[:, ::2], wide[:4].t(), wide[0, :4], wide[:, :4].reshape(2, 3, 2, 4), wide.new_zeros(0, 3, 4)):
        g = torch.randn(*x.shape[:-1], 2).transpose(0, -1).contiguous().transpose(0, -1)
        assert_same(gradients(model, x, g), gradients(other, x, g), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(x), other(x))
    # A cotangent without strides of its own.
    x = wide[:, :4]
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(model(leaf).sum(), leaf)[0], torch.autograd.grad(other(leaf).sum(), leaf)[0], rtol=1e-4, atol=1e-5
    )
    assert calls.output == calls.taken()[1] * 2 - 1


def test_float64_knots_and_dtypes(calls):
    model = make([2, 5, 1], torch.float32)
    for layer in model.layers:
        layer.grid = layer.grid.double()
    x, _ = inputs(9, [2, 1], torch.float32)
    torch.testing.assert_close(model(x), layered(model)(x))
    assert calls.taken() == (1, 0)
    for cast in (torch.bfloat16, torch.float16):
        narrow = make([2, 5, 1], torch.float32).to(cast)
        assert narrow(x.to(cast)).dtype == cast
        assert torch.equal(narrow(x), layered(narrow)(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert calls.taken() == (0, 0)


def test_nan_infinity_and_far_outside(calls):
    for outside in OUTSIDE:
        model = make([2, 5, 5, 1], torch.float32, outside=outside, bias=True)
        x, g = inputs(40, [2, 1], torch.float32)
        x[3, 1], x[7, 0], x[20, 0] = torch.nan, 1e30, -1e30
        ours, theirs = gradients(model, x, g), gradients(layered(model), x, g)
        assert calls.taken() == (1, 1)
        y = ours[0]
        assert y[3].isnan().all()
        assert (y.isnan().any(1) == theirs[0].isnan().any(1)).all()
        finite = ~theirs[0].isnan().any(1)
        torch.testing.assert_close(y[finite], theirs[0][finite], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[1][finite], theirs[1][finite], rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_numbers_do_not_spread_by_padding():
    """Five rows fill a vector with lanes that no row has."""
    model = make([1, 3, 1], torch.float32, k=1, activation="none")
    with torch.no_grad():
        model.layers[0].spline_weight[0, 2:4] = torch.inf  # bases about zero, where padding lies
    x = torch.tensor([-0.95, -0.9, 0.9, 0.95, 0.97])[:, None]
    g = torch.ones(5, 1)
    for mine, other in zip(gradients(model, x, g), gradients(layered(model), x, g), strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)
        assert other.isfinite().any()


def test_threads_give_the_same_from_run_to_run(calls):
    model = make([2, 5, 5, 1], torch.float32, bias=True)
    x, g = inputs(20_000, [2, 1], torch.float32, reach=1)
    one = gradients(model, x, g)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = [gradients(model, x, g) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for run in three[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, three[0], strict=True))
    assert torch.equal(one[0], three[0][0])
    assert_same(one, three[0], rtol=1e-3, atol=1e-2)


def test_errors_are_those_of_the_layers():
    model = make([2, 5, 1])
    for x in (torch.zeros(3, 4, dtype=torch.float64), torch.zeros((), dtype=torch.float64), torch.zeros(3, 2)):
        with pytest.raises((ValueError, TypeError)) as theirs:
            layered(model)(x)
        with pytest.raises(theirs.type) as ours:
            model(x)
        assert str(ours.value) == str(theirs.value)
    model.layers[1].base_weight = nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="base_weight"):
        model(torch.zeros(3, 2, dtype=torch.float64))


def test_weights_changed_in_place_before_the_backward_are_an_error():
    model = make([2, 5, 1])
    y = model(inputs(3, [2, 1])[0])
    with torch.no_grad():
        model.layers[0].spline_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
