"""Is a layer right? Its outputs and gradients against the float64 reference, before anything is timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import cases
from benchmarks.steps import parameters_of

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
    return [y, *torch.autograd.grad(y, [x, *parameters_of(module)], cotangent)]


def with_backend(layer: kan_fast.KANLayer, backend: str, dtype: torch.dtype | None = None) -> kan_fast.KANLayer:
    """A copy of the layer on another backend, and cast if a dtype is given."""
    other = copy.deepcopy(layer)
    other.backend = backend
    return other if dtype is None else other.to(dtype)


@dataclass(frozen=True)
class Verdict:
    """Relative errors to float64 (worst of y and all gradients), and whether they are allowed."""

    error: float
    reference_error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


def judge(layer: kan_fast.KANLayer, x: Tensor, cotangent: Tensor) -> Verdict:
    """Compare on x (batch, in) and cotangent (batch, out): the first ROWS rows are used.

    Allowed for each of y, dx and the parameters' gradients: twice the error of the reference backend in the layer's
    own dtype, plus 4 eps max|t| / h, which is what the rounding of the knots alone may move the local coordinate by, plus
    half a unit of the last place of a 16-bit dtype, to which a result is rounded however it was made: over few numbers the
    reference's own error can happen to be a small part of that.
    """
    x, cotangent = x[:ROWS], cotangent[:ROWS]
    truth_layer = with_backend(layer, "reference", torch.float64)
    truth = outputs_and_gradients(truth_layer, x.double(), cotangent.double())
    reference = outputs_and_gradients(with_backend(layer, "reference"), x, cotangent)
    ours = outputs_and_gradients(layer, x, cotangent)
    grid = layer.grid
    knots = grid.abs().max().item() / grid.diff(dim=1).clamp_min(FLOAT32_EPS).min().item()
    rounding = 4 * FLOAT32_EPS * knots
    if layer.spline_weight.dtype.itemsize == 2:
        rounding += torch.finfo(layer.spline_weight.dtype).eps / 2
    errors = [relative_error(value, exact) for value, exact in zip(ours, truth, strict=True)]
    reference_errors = [relative_error(value, exact) for value, exact in zip(reference, truth, strict=True)]
    allowances = [2 * error + rounding for error in reference_errors]
    worst = max(range(len(errors)), key=lambda i: errors[i] / allowances[i])
    return Verdict(errors[worst], reference_errors[worst], allowances[worst])


def judge_network(model: nn.Module, batch: int) -> str | None:
    """What is wrong with the KAN layers of a network, each on its own on uniform inputs; None if nothing."""
    for name, part in model.named_modules():
        if isinstance(part, kan_fast.KANLayer):
            weight = part.spline_weight
            x = cases.uniform_input(min(batch, ROWS), part.in_features, dtype=weight.dtype, device=str(weight.device))
            cotangent = cases.uniform_input(len(x), part.out_features, dtype=weight.dtype, device=str(weight.device), seed=1)
            verdict = judge(part, x, cotangent)
            if not verdict.right:
                return f"wrong: {name}: error {verdict.error:.1e} to float64, allowed {verdict.allowed:.1e}"
    return None


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
