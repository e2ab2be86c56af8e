"""Problems for the contractions, and the rule by which a result is compared with the truth."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import truth
from conftest import Place
from torch import Tensor

from kan_fast.activations import ACTIVATIONS
from kan_fast.backends import get, reference
from kan_fast.spline import OUTSIDE, uniform_grid

KINDS = ("uniform", "uneven", "repeated")
OPERATIONS = ("contract_output", "contract_input", "contract_weight", "contract_backward")

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_outside = pytest.mark.parametrize("outside", OUTSIDE)


class Problem(NamedTuple):
    """Arguments of all contractions, leaves of autograd where they are differentiable."""

    x: Tensor
    scale: Tensor
    spline_weight: Tensor
    base_weight: Tensor | None
    g: Tensor
    grid: Tensor
    spline_order: int
    activation: str
    outside: str

    def args(self, operation: str, n: int, with_scale: bool = True) -> tuple[Any, ...]:
        """Positional arguments of one contraction."""
        scale = self.scale if with_scale else None
        options = self.activation, self.outside, n
        if operation == "contract_output":
            return self.x, scale, self.spline_weight, self.base_weight, self.grid, *options
        if operation == "contract_weight":
            return self.x, scale, self.g, self.grid, self.spline_order, *options
        return self.x, self.spline_weight, self.base_weight, self.g, self.grid, *options


def make_grid(kind: str, in_features: int, grid_size: int, k: int) -> Tensor:
    """Knots (I, G + 2k + 1) in float32 with the range [-1, 1]: equal steps, random steps, or one repeated inner knot."""
    grid = uniform_grid(in_features, grid_size, k, (-1.0, 1.0))
    if kind == "uniform":
        return grid
    step = 2 / grid_size
    grid = grid + step * (torch.rand(grid.shape) - 0.5) * 0.8
    grid[:, k], grid[:, k + grid_size] = -1.0, 1.0
    if kind == "repeated" and grid_size > 2:
        grid[:, k + 2] = grid[:, k + 1]
    return grid


def make_problem(
    place: Place | None = None,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int, int] = (17, 3, 4),
    grid_size: int = 5,
    k: int = 3,
    kind: str = "uniform",
    activation: str = "silu",
    outside: str = "zero",
    x_dtype: torch.dtype | None = None,
    requires_grad: bool = False,
) -> Problem:
    """x (B, I) is drawn from the range of the grid and beyond all of its knots, and kept off the knots."""
    batch, in_features, out_features = shape
    device = torch.device("cpu") if place is None else place.device
    grid = make_grid(kind, in_features, grid_size, k)
    reach = 1.0 + 2.0 * (k + 1) / grid_size
    x = off_knots((torch.rand(batch, in_features) * 2 - 1) * reach, grid, x_dtype or dtype)
    leaf = {"device": device, "dtype": dtype}

    def parameter(*size: int) -> Tensor:
        return torch.randn(*size).to(**leaf).requires_grad_(requires_grad)

    return Problem(
        x.to(device).requires_grad_(requires_grad),
        torch.randn(batch, in_features).to(device, x_dtype or dtype).requires_grad_(requires_grad),
        parameter(in_features, grid_size + k, out_features),
        None if activation == "none" else parameter(in_features, out_features),
        parameter(batch, out_features),
        grid.to(device, torch.promote_types(dtype, torch.float32)),
        k,
        activation,
        outside,
    )


def off_knots(x: Tensor, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, moved off the knots by more than the band where two ways of computing may disagree.

    Derivatives jump at knots, and a backend may find the interval of x by (x - t_0) / h in float32, which is off by a few
    roundings of size eps max|t|: 16 of them are the band. relu' jumps at 0, a knot like others.
    """
    x = x.to(dtype)
    band = 16 * torch.finfo(torch.float32).eps * (max(1.0, float(grid.abs().max())) if grid.numel() else 1.0)
    knots = torch.cat([grid, torch.zeros(grid.shape[0], 1)], 1).double()
    for _ in range(8):
        near = ((x.double()[..., None] - knots).abs() <= band).any(-1)
        if not near.any():
            return x
        step = (x.double().abs() * 2 * torch.finfo(dtype).eps).clamp(min=2.5 * band)
        x = torch.where(near, (x.double() + step).to(dtype), x)
    raise AssertionError("knots too dense for the band")


def assert_close_to_truth(place: Place, problem: Problem, operation: str, n: int, with_scale: bool = True) -> None:
    """Error to the float64 truth at most twice that of the reference in the same dtype, plus a floor.

    The floor has two parts, both in units of the compute dtype's eps (float32, or float64 for float64).
    - Sums: a sum of K terms in any order errs by at most (K - 1) eps sum|term|, typically sqrt(K) eps: 4 eps sum|term|.
    - The local coordinate: a knot or an x rounded by eps max|t| moves every phi^(n) by that times phi^(n+1), to which the
      features of one order higher are summed up: 4 eps max|t| sum|phi^(n+1) term|.
    A result in a narrower dtype is rounded once more, by half its own eps; one eps allows for a tie.
    Maxima over the tensor are compared: the error of one element may be zero in the reference by luck.
    """
    args = problem.args(operation, n, with_scale)
    higher = problem.args(operation, n + 1, with_scale)
    true = _as_tuple(getattr(truth, operation)(*args))
    size = _as_tuple(getattr(truth, operation)(*args, magnitude=True))
    slope = _as_tuple(getattr(truth, operation)(*higher, magnitude=True))
    ours = _as_tuple(getattr(get(place.backend), operation)(*args))
    theirs = _as_tuple(getattr(reference, operation)(*args))
    wide = problem.spline_weight.dtype == torch.float64
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    # The truth sees float64 knots and knows nothing of float32; the reference at float64 has rounding errors of its own.
    reach = max(1.0, float(problem.grid.abs().max())) if problem.grid.numel() else 1.0
    assert len(ours) == len(true)
    for mine, oracle, exact, total, total_slope in zip(ours, theirs, true, size, slope, strict=True):
        assert tuple(mine.shape) == exact.shape
        assert mine.dtype == oracle.dtype
        assert mine.device == problem.x.device
        if exact.size == 0:
            continue
        floor = 4 * eps * total.max() + 4 * eps * reach * total_slope.max()
        # Where a saturated tanh leaves the truth an exact 0, its 1 - tanh^2 has the error of float64 itself.
        floor += 64 * torch.finfo(torch.float64).eps
        if mine.dtype not in (torch.float32, torch.float64):
            floor += torch.finfo(mine.dtype).eps * np.abs(exact).max()
        error = np.abs(truth.doubled(mine) - exact).max()
        allowed = 2 * np.abs(truth.doubled(oracle) - exact).max() + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, largest value {np.abs(exact).max():.3g}"


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
