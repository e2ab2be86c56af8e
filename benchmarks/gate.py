"""Is a layer right? Its outputs and gradients against the float64 reference, before anything is timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kan_fast
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
    own dtype, plus 4 eps max|t| / h, which is what the rounding of the knots alone may move the local coordinate by.
    """
    x, cotangent = x[:ROWS], cotangent[:ROWS]
    truth_layer = with_backend(layer, "reference", torch.float64)
    truth = outputs_and_gradients(truth_layer, x.double(), cotangent.double())
    reference = outputs_and_gradients(with_backend(layer, "reference"), x, cotangent)
    ours = outputs_and_gradients(layer, x, cotangent)
    grid = layer.grid
    knots = grid.abs().max().item() / grid.diff(dim=1).clamp_min(FLOAT32_EPS).min().item()
    rounding = 4 * FLOAT32_EPS * knots
    errors = [relative_error(value, exact) for value, exact in zip(ours, truth, strict=True)]
    reference_errors = [relative_error(value, exact) for value, exact in zip(reference, truth, strict=True)]
    allowances = [2 * error + rounding for error in reference_errors]
    worst = max(range(len(errors)), key=lambda i: errors[i] / allowances[i])
    return Verdict(errors[worst], reference_errors[worst], allowances[worst])
