"""Networks for the tests of whole networks as one call, their truth, and a count of the calls."""

import copy

import torch
import truth
from samples import make_grid

from kan_fast import KAN
from kan_fast.backends import native


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
