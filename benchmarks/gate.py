"""Is a layer, or a network of them, right? Outputs and gradients against the float64 reference, before anything is timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import steps

Module = TypeVar("Module", bound=nn.Module)
ROWS = 512  # of the batch that the gate looks at: float64 in plain PyTorch is slow
FLOAT32_EPS = 2.0**-23


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The largest |value - truth| over the largest |truth|; NaN or infinity anywhere counts as infinite error."""
    value = value.detach().to("cpu", torch.float64)
    truth = truth.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    scale = truth.abs().max().item() if truth.numel() else 0.0
    difference = (value - truth).abs().max().item() if truth.numel() else 0.0
    return difference / scale if scale else difference


def outputs_and_gradients(module: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """[y, dx, one gradient a parameter]."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *steps.parameters_of(module)], cotangent)]


def with_backend(module: Module, backend: str, dtype: torch.dtype | None = None) -> Module:
    """A copy of a layer or network with its KANLayers on another backend, and cast if a dtype is given."""
    other = copy.deepcopy(module)
    for layer in kan_layers(other):
        layer.backend = backend
    return other if dtype is None else other.to(dtype)


def kan_layers(module: nn.Module) -> list[kan_fast.KANLayer]:
    return [part for part in module.modules() if isinstance(part, kan_fast.KANLayer)]


@dataclass(frozen=True)
class Verdict:
    """Relative errors to float64 (worst of y and all gradients), and whether they are allowed."""

    error: float
    reference_error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed and math.isfinite(self.error)

    def over(self) -> float:
        """The error in units of the allowed one."""
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


def judge(layer: kan_fast.KANLayer, x: Tensor, cotangent: Tensor) -> Verdict:
    """Compare on x (batch, in) and cotangent (batch, out): the first ROWS rows are used.

    Allowed for each of y, dx and the parameters' gradients: twice the error of the reference backend in the layer's
    own dtype, plus what `rounding` says.
    """
    return max(_verdicts(layer, x[:ROWS], cotangent[:ROWS], outputs_and_gradients), key=Verdict.over)


def rounding(layer: kan_fast.KANLayer) -> float:
    """A relative error that says nothing, since over few numbers the reference's own can happen to be a small part of it.

    4 eps max|t| / h, which is what the rounding of the knots alone may move the local coordinate by, plus half a unit of the
    last place of a 16-bit dtype, to which a result is rounded however it was made.
    """
    grid, dtype = layer.grid, layer.spline_weight.dtype
    knots = grid.abs().max().item() / grid.diff(dim=1).clamp_min(FLOAT32_EPS).min().item()
    return 4 * FLOAT32_EPS * knots + (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0)


def judge_network(model: nn.Module, x: Tensor, cotangent: Tensor) -> str | None:
    """What is wrong with a network of KANLayers on the x and cotangent that it is timed with; None if nothing.

    The calls that are timed are judged, all their rows, since narrow layers are one fused call that is chosen by them:
    forward without gradients, and forward plus backward with and without the gradient of x. Allowed is twice the error of
    the same network on the reference backend, plus the `rounding` of every layer, each of which moves what the next one sees.
    """
    if not kan_layers(model):
        return None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = ["y", "y with gradients", "dx", *names, *(f"{name} without dx" for name in names)]
    for name, verdict in zip(found, _verdicts(model, x, cotangent, _timed_results), strict=True):
        if not verdict.right:
            return f"wrong: {name}: error {verdict.error:.1e} to float64, allowed {verdict.allowed:.1e}"
    return None


def _timed_results(model: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    return [
        steps.forward(model, x)(),
        *outputs_and_gradients(model, x, cotangent),
        *steps.parameter_step(model, x, cotangent)(),
    ]


def _verdicts(
    module: nn.Module, x: Tensor, cotangent: Tensor, results: Callable[[nn.Module, Tensor, Tensor], list[Tensor]]
) -> list[Verdict]:
    """One for each of the results, against those of the same module on the reference backend in float64."""
    truth = results(with_backend(module, "reference", torch.float64), x.double(), cotangent.double())
    reference = results(with_backend(module, "reference"), x, cotangent)
    least = sum(map(rounding, kan_layers(module)))
    verdicts = []
    for ours, plain, exact in zip(results(module, x, cotangent), reference, truth, strict=True):
        plain_error = relative_error(plain, exact)
        verdicts.append(Verdict(relative_error(ours, exact), plain_error, 2 * plain_error + least))
    return verdicts


def first_and_second(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """d sum(y) / dx (batch, in), and its first column's derivative along x's first column (batch,)."""
    x = x.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x)
    return first.detach(), second[:, 0]


def second_derivative_error(module: nn.Module, ours: kan_fast.KANLayer | None, x: Tensor) -> float:
    """Relative error of a module's second derivative on x (batch, in): the first ROWS rows are used.

    ours: our layer of the same function, whose float64 reference is the truth. None for another function: the truth is then
    the central difference, in float64, of the first derivatives of a copy of the module, compared by medians, since a
    difference across a knot says nothing.
    """
    x = x[:ROWS]
    found = first_and_second(module, x)[1]
    if ours is not None:
        return relative_error(found, first_and_second(with_backend(ours, "reference", torch.float64), x.double())[1])
    exact, step = copy.deepcopy(module).double(), torch.zeros_like(x, dtype=torch.float64)
    step[:, 0] = 1e-5
    above, below = (first_and_second(exact, x.double() + sign * step)[0][:, 0] for sign in (1, -1))
    difference = (above - below) / 2e-5
    scale = difference.abs().median().item() or 1.0
    return (found.double() - difference).abs().median().item() / scale


# Of a rival: rounding, and bases that are ill-conditioned, stay below; a derivative that is missing or wrong is of order 1.
RIVALS_SECOND_DERIVATIVE = 0.05


def judge_second_derivative(module: nn.Module, ours: kan_fast.KANLayer | None, x: Tensor) -> tuple[float, str | None]:
    """(error, what is wrong or None). A kan_fast layer is held to twice the error of the reference in its own dtype."""
    error = second_derivative_error(module, ours, x)
    allowed = RIVALS_SECOND_DERIVATIVE
    if isinstance(module, kan_fast.KANLayer):
        plain = second_derivative_error(with_backend(module, "reference"), ours, x)
        # The knots' rounding, as in `judge`, grows by 1 / h with every derivative.
        allowed = 2 * plain + max(1e-4, 2 * torch.finfo(module.spline_weight.dtype).eps)
    return error, None if error <= allowed else f"wrong: second derivative off by {error:.1e}, allowed {allowed:.1e}"
