"""Networks as one native call: the same numbers as layer by layer, and layer by layer wherever somebody looks closer."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from samples import KINDS, every_activation, every_outside, make_grid
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from kan_fast import KAN, KANLayer
from kan_fast.activations import ACTIVATIONS
from kan_fast.backends import native
from kan_fast.nn import network as module
from kan_fast.spline import OUTSIDE

pytestmark = pytest.mark.skipif(
    native.reason_not(torch.device("cpu"), torch.float32) is not None, reason="the native backend is not built"
)


class Calls:
    """How often each of the operators ran."""

    def __init__(self, monkeypatch):
        self.output = self.backward = 0
        for name in ("output", "backward"):
            monkeypatch.setattr(native, f"network_{name}", self._counted(name, getattr(native, f"network_{name}")))

    def _counted(self, name, operation):
        def counted(*args):
            setattr(self, name, getattr(self, name) + 1)
            return operation(*args)

        return counted

    def taken(self):
        """(outputs, backwards) since the last question."""
        result = self.output, self.backward
        self.output = self.backward = 0
        return result


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def _every_size_pays(monkeypatch):
    """Which sizes pay depends on the instruction set; tests that are about it ask for `pays`."""
    monkeypatch.setattr(module.stack, "_pays", lambda *args: True)


def make(widths, dtype=torch.float64, grid_size=5, k=3, kind="uniform", activation="silu", outside="zero", bias=False):
    """A network, its knots of a kind, its biases not zero."""
    activation = None if activation == "none" else activation
    options = {"base_activation": activation, "outside": outside, "bias": bias, "dtype": dtype}
    model = KAN(widths, grid_size, k, **options)
    with torch.no_grad():
        for layer in model.layers:
            layer.grid.copy_(make_grid(kind, layer.in_features, grid_size, k))
            if bias:
                layer.bias.normal_()
    return model


def layered(model):
    """The same network layer by layer."""
    other = copy.deepcopy(model)
    other.fused = False
    return other


def inputs(batch, widths, dtype=torch.float64, reach=2.5):
    """x (B, I), inside the range and beyond all knots, and a cotangent (B, O)."""
    return (torch.rand(batch, widths[0], dtype=dtype) * 2 - 1) * reach, torch.randn(batch, widths[-1], dtype=dtype)


def gradients(model, x, g, **options):
    """y, then the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y, [x, *model.parameters()], g, **options)


def assert_same(ours, theirs, **options):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **options)


def true_gradients(model, x, g):
    """y, dx and the gradients of every layer's weights, by SciPy's splines and NumPy's sums."""
    layers = list(model.layers)
    values = [x.double()]
    for layer in layers:
        y = truth.contract_output(values[-1], None, layer.spline_weight, layer.base_weight, layer.grid, *options_of(layer), 0)
        values.append(torch.as_tensor(y if layer.bias is None else y + truth.doubled(layer.bias)))
    found, cotangent = [], g.double()
    for layer, h in zip(reversed(layers), reversed(values[:-1]), strict=True):
        args = h, layer.spline_weight, layer.base_weight, cotangent, layer.grid, *options_of(layer), 0
        dx, d_spline, d_base = truth.contract_backward(*args)
        of_layer = {"spline_weight": d_spline, "base_weight": d_base, "bias": truth.doubled(cotangent).sum(0)}
        found = [of_layer[name] for name, _ in layer.named_parameters()] + found
        cotangent = torch.as_tensor(dx)
    return [truth.doubled(values[-1]), truth.doubled(cotangent), *found]


def options_of(layer):
    return ("none" if layer.base_activation is None else layer.base_activation), layer.outside


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
    import torch.autograd.forward_ad as forward_ad

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


def test_masks(calls):
    model = make([2, 5, 3, 1])
    model.layers[1].edge_mask = torch.rand(5, 3) > 0.5
    x, g = inputs(20, [2, 1])
    assert_same(gradients(model, x, g), gradients(layered(model), x, g))
    assert calls.taken() == (1, 1)


class Doubled(KANLayer):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def _hooked(register):
    def change(model):
        getattr(model.layers[1], register)(lambda *args: None)

    return change


def _subclass(model):
    model.layers[0].__class__ = Doubled


def _patched(model):
    layer = model.layers[0]
    layer.forward = lambda x: 2 * KANLayer.forward(layer, x)


LAYER_BY_LAYER = {
    "turned off": lambda model: setattr(model, "fused", False),
    "forward hook": lambda model: model.layers[0].register_forward_hook(lambda layer, args, y: 2 * y),
    "forward pre-hook": lambda model: model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] / 2,)),
    "backward hook": _hooked("register_full_backward_hook"),
    "backward pre-hook": _hooked("register_full_backward_pre_hook"),
    "subclass": _subclass,
    "patched": _patched,
    "compiled layer": lambda model: model.layers[0].compile(backend="eager"),
    "parametrized": lambda model: nn.utils.parametrize.register_parametrization(model.layers[0], "spline_weight", Scaled()),
    "reference": lambda model: setattr(model.layers[0], "backend", "reference"),
    "function": lambda model: setattr(model.layers[1], "base_activation", torch.sin),
    "other activation": lambda model: setattr(model.layers[1], "base_activation", "tanh"),
    "other outside": lambda model: setattr(model.layers[0], "outside", "clamp"),
    "another module": lambda model: model.layers.insert(1, nn.Tanh()),
}


@pytest.mark.parametrize("change", LAYER_BY_LAYER.values(), ids=LAYER_BY_LAYER.keys())
def test_layers_run_one_by_one_where_more_than_numbers_is_asked_of_them(calls, change):
    model = make([2, 5, 1], torch.float32)
    x, _ = inputs(7, [2, 1], torch.float32)
    model(x)
    assert calls.taken() == (1, 0)
    change(model)
    y = model(x)
    assert calls.taken() == (0, 0)
    want = x
    for layer in model.layers:
        want = layer(want)
    assert torch.equal(y, want)


def test_global_hooks_see_every_layer(calls):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        make([2, 5, 1])(inputs(3, [2, 1])[0])
    finally:
        handle.remove()
    assert seen == [KANLayer, KANLayer, KAN]
    assert calls.taken() == (0, 0)


@pytest.mark.parametrize("widths", [[2, 17, 1], [17, 2, 1], [2, 5, 17], [2, 1], [0, 3, 1], [2, 3, 0], [2, *[3] * 17]], ids=str)
def test_widths_beyond_the_kernels(calls, widths):
    model = make(widths)
    x, g = inputs(5, widths)
    assert_same(gradients(model, x, g), gradients(layered(model), x, g))
    assert calls.taken() == (0, 0)


def test_which_sizes_pay(monkeypatch, calls):
    monkeypatch.undo()
    counted = Calls(pytest.MonkeyPatch())
    with torch.no_grad():
        KAN([2, 5, 1])(torch.zeros(64, 2))
        assert counted.taken() == (1, 0)
        KAN([16, 16, 16], 100)(torch.zeros(64, 16))
        assert counted.taken() == (0, 0)


def test_compile_and_export_see_the_layers(calls):
    model = make([2, 5, 1], torch.float32)
    x, _ = inputs(7, [2, 1], torch.float32)
    want = model(x)
    calls.taken()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    program = torch.export.export(model, (x,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["kan_fast.contract_output.default"] * 2
    torch.testing.assert_close(program.module()(x), want)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (7, 1)
    assert calls.taken() == (0, 0)


@pytest.mark.parametrize(("activation", "bias"), [("silu", False), ("none", True), ("gelu", True), ("none", False)])
def test_operators_have_schemas_and_fakes(activation, bias):
    model = make([2, 5, 3], torch.float32, activation=activation, bias=bias)
    tensors, *_ = module._operands(model.layers, torch.zeros(1, 2))
    tensors = [tensor.detach() for tensor in tensors]
    x, g = inputs(6, [2, 3], torch.float32)
    codes = ACTIVATIONS.index(activation), 0, bias
    operators = torch.ops.kan_fast_native
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(operators.network_output.default, (x, tensors, *codes), test_utils=checks)
    for wanted in itertools.product((False, True), repeat=2):
        torch.library.opcheck(operators.network_backward.default, (x, tensors, g, *codes, *wanted), test_utils=checks)
    with pytest.raises((RuntimeError, ValueError), match="layers must hold"):
        operators.network_output(x, tensors[:-1], *codes)
    with pytest.raises((RuntimeError, ValueError), match="float32 or float64"):
        operators.network_output(x.bfloat16(), tensors, *codes)


def test_copies_and_files_compute_the_same(calls):
    model = make([2, 5, 1], torch.float32, outside="linear", bias=True)
    x, _ = inputs(7, [2, 1], torch.float32)
    y = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = make([2, 5, 1], torch.float32, outside="linear", bias=True)
    fresh.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), fresh]
    copies += [KAN.from_layers(list(model.layers))]
    calls.taken()
    assert all(torch.equal(other(x), y) for other in copies)
    assert calls.taken() == (len(copies), 0)
    # Networks that were pickled before there was such an attribute.
    del copies[0].__dict__["fused"]
    assert torch.equal(copies[0](x), y)
    assert not pickle.loads(pickle.dumps(KAN([2, 5, 1], fused=False))).fused


def test_knots_and_weights_may_change_between_calls(calls):
    model = make([2, 5, 1], torch.float32)
    x, g = inputs(30, [2, 1], torch.float32, reach=1)
    model(x)
    layer = model.layers[0]
    layer.set_grid(make_grid("uneven", 2, 9, 3), torch.randn(2, 12, 5))
    assert_same(gradients(model, x, g), gradients(layered(model), x, g), rtol=1e-4, atol=1e-5)
    model.double()
    assert_same(gradients(model, x.double(), g.double()), gradients(layered(model), x.double(), g.double()))
    assert calls.taken() == (3, 2)


def test_training_is_the_same():
    """Thirty steps of Adam: rounding alone tells the two ways apart, and in float64 that stays small."""
    torch.manual_seed(0)
    model = make([2, 5, 5, 1], bias=True)
    other = layered(model)
    x = torch.rand(128, 2, dtype=torch.float64) * 2 - 1
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2)
    losses = []
    for network in (model, other):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(30):
            optimizer.zero_grad()
            loss = (network(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.5
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()], rtol=1e-8, atol=1e-8)


def test_checkpointing(calls):
    model = make([2, 5, 1])
    x, g = inputs(9, [2, 1])
    want = gradients(model, x, g)
    got = gradients(_checkpointed(model), x, g)
    assert_same(got, want)


def _checkpointed(model):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)

    return Checkpointed()


def test_the_environment_turns_it_off():
    code = (
        "import torch, kan_fast; from kan_fast.backends import native; "
        "native.network_output = None; print(kan_fast.KAN([2, 5, 1])(torch.zeros(3, 2)).shape)"
    )
    for value, works in (("0", True), ("1", False)):
        environment = {**os.environ, "KAN_FAST_FUSED_NETWORK": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == works, done.stderr
