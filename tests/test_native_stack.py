"""When a network is one native call, and when its layers run one by one."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from networks import Calls, assert_same, gradients, inputs, layered, make
from samples import make_grid
from torch import nn

from kan_fast import KAN, KANLayer, stack
from kan_fast.activations import ACTIVATIONS
from kan_fast.backends import native
from kan_fast.nn import network as module

pytestmark = pytest.mark.skipif(
    native.reason_not(torch.device("cpu"), torch.float32) is not None, reason="the native backend is not built"
)


PAYS = stack._pays


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def _every_size_pays(monkeypatch):
    """Which sizes pay depends on the instruction set."""
    monkeypatch.setattr(stack, "_pays", lambda *args: True)


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
    """A few rows of small weights on every machine; tables of 100 intervals for 512 edges on none."""
    monkeypatch.setattr(stack, "_pays", PAYS)
    with torch.no_grad():
        KAN([2, 5, 1])(torch.zeros(64, 2))
        assert calls.taken() == (1, 0)
        for rows in (64, 10_000):
            KAN([16, 16, 16], 100)(torch.zeros(rows, 16))
        assert calls.taken() == (0, 0)


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
