"""B-splines in PyTorch: the mathematics that csrc/bspline.h and the Triton kernels repeat.

Same names in the same order in all three places: find_span, basis. Here follow the parts that only
Python needs: knots of a uniform grid, a check of given knots, all bases of an input, and the value of
splines.

Knots of one input are t_0 <= ... <= t_{G+2k}, with G = grid_size and k = spline_order. Basis f is
non-zero on the half-open interval [t_f, t_{f+k+1}), f < G + k, and the range of the grid is
[a, b] = [t_k, t_{G+k}]. Formulas: C. de Boor, "A Practical Guide to Splines", chapters IX and X.
"""

import torch
from torch import Tensor

# How a spline goes on outside the range [a, b] of its grid: the position in the tuple is the code in csrc/.
OUTSIDE = ("zero", "linear", "clamp")


def find_span(x: Tensor, grid: Tensor, spline_order: int, outside: str) -> Tensor:
    """Index of the knot interval of every x.

    x (B, I), grid (I, G + 2k + 1), both of one dtype -> (B, I) int64: the last j with t_j <= x, so that
    [t_j, t_{j+1}) holds x and is not empty. outside="zero": -1 left of the first knot, G + 2k from the
    last knot on. Otherwise x is taken to lie in [a, b] and j among the G intervals of the range, x = b
    in the last of them that is not empty. NaN counts as beyond the last knot.
    """
    span = torch.searchsorted(grid.contiguous(), x.t().contiguous(), right=True).t() - 1
    if outside == "zero":
        return span
    grid_size = grid.shape[1] - 2 * spline_order - 1
    end = grid[:, spline_order + grid_size]
    last = torch.searchsorted(grid, end[:, None].contiguous()).t() - 1  # last j with t_j < b
    return span.clamp(min=spline_order).minimum(last)


def basis(x: Tensor, grid: Tensor, span: Tensor, spline_order: int, n: int) -> Tensor:
    """n-th derivative of the k + 1 bases that are non-zero on an interval.

    x (B, I), grid (I, G + 2k + 1), span (B, I) -> (B, I, k + 1): bases span - k, ..., span. The ones that
    do not exist (index below 0 or above G + k - 1) come out as some finite number.

    The de Boor triangle: each step makes the values of order d from those of order d - 1. For a derivative
    the last n steps take differences instead (de Boor, X.(15)).
    """
    k = spline_order
    if n > k:
        return x.new_zeros(*x.shape, k + 1)
    inputs = torch.arange(grid.shape[0], device=grid.device)
    offsets = range(1 - k, k + 1)
    # Indices that leave the grid belong only to bases that do not exist: any knot will do.
    knots = {offset: grid[inputs, (span + offset).clamp(0, grid.shape[1] - 1)] for offset in offsets}
    values = [torch.ones_like(x)]
    for d in range(1, k + 1):
        # ratio q belongs to the basis of order d - 1 that starts at knot span - d + 1 + q.
        ratios = []
        for q in range(d):
            width = knots[q + 1] - knots[q + 1 - d]
            # 0/0 counts as 0, in the gradient too: autograd multiplies by the slope of the branch that is not taken.
            ratios.append(torch.where(width > 0, values[q] / torch.where(width > 0, width, 1), 0))
        if d <= k - n:
            rising = [ratios[q] * (x - knots[q + 1 - d]) for q in range(d)]
            falling = [ratios[q] * (knots[q + 1] - x) for q in range(d)]
        else:
            rising = [d * ratio for ratio in ratios]
            falling = [-d * ratio for ratio in ratios]
        inner = [rising[q] + falling[q + 1] for q in range(d - 1)]
        values = [falling[0], *inner, rising[-1]]
    return torch.stack(values, -1)


def bases(x: Tensor, grid: Tensor, spline_order: int, outside: str, n: int) -> Tensor:
    """n-th derivative of every basis, with what happens outside the range of the grid.

    x (B, I), grid (I, G + 2k + 1), both of one dtype -> (B, I, G + k). NaN gives NaN.
    """
    if outside == "zero":
        values = _scattered_basis(x, x, grid, spline_order, outside, n)
    else:
        k = spline_order
        nearest = x.clamp(grid[:, k], grid[:, grid.shape[1] - 1 - k])
        beyond = (x != nearest)[..., None]
        values = _scattered_basis(x, nearest, grid, k, outside, n)
        if outside == "linear" and n == 0:
            slope = _scattered_basis(x, nearest, grid, k, outside, 1)
            values = torch.where(beyond, values + slope * (x - nearest)[..., None], values)
        elif n > 1 or (n == 1 and outside == "clamp"):
            values = values.masked_fill(beyond, 0)
    return values.masked_fill(x.isnan()[..., None], torch.nan)


def _scattered_basis(x: Tensor, at: Tensor, grid: Tensor, spline_order: int, outside: str, n: int) -> Tensor:
    """basis() at the points `at`, put in place among all G + k bases: (B, I, G + k)."""
    k = spline_order
    num_bases = grid.shape[1] - k - 1
    span = find_span(at, grid, k, outside)
    index = span[..., None] + torch.arange(-k, 1, device=x.device)
    exists = (index >= 0) & (index < num_bases)
    local = basis(at, grid, span, k, n).masked_fill(~exists, 0)
    return at.new_zeros(*x.shape, num_bases).scatter_add(2, index.clamp(0, num_bases - 1), local)


def evaluate(x: Tensor, coefficients: Tensor, grid: Tensor, spline_order: int, outside: str = "zero", n: int = 0) -> Tensor:
    """n-th derivative of one spline per input.

    x (B, I), coefficients (I, G + k), grid (I, G + 2k + 1), all of one dtype -> (B, I).
    """
    return torch.einsum("bif,if->bi", bases(x, grid, spline_order, outside, n), coefficients)


def uniform_grid(
    in_features: int,
    grid_size: int,
    spline_order: int,
    grid_range: tuple[float, float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Knots of `grid_size` equal intervals on `grid_range`, and `spline_order` more of that width on either side.

    -> (in_features, grid_size + 2 * spline_order + 1), every row the same. The ends of the range are exact.
    """
    a, b = (torch.tensor(end, device=device, dtype=torch.float64) for end in grid_range)
    step = torch.arange(-spline_order, grid_size + spline_order + 1, device=device, dtype=torch.float64)
    knots = torch.lerp(a, b, step / grid_size)
    return knots.to(dtype).repeat(in_features, 1)


def check_grid(grid: Tensor, in_features: int, spline_order: int) -> None:
    """Raise unless `grid` holds finite, non-decreasing knots with a range that is not empty.

    grid (in_features, G + 2k + 1) with G >= 1. Raises TypeError for a dtype other than float32 and float64,
    ValueError for the rest. Reads the values, so it waits for the device: not for the hot path.
    """
    if grid.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grid: expected float32 or float64 knots, got {grid.dtype}")
    fewest = 2 * spline_order + 2
    if grid.dim() != 2 or grid.shape[0] != in_features or grid.shape[1] < fewest:
        raise ValueError(
            f"grid: expected shape (in_features, grid_size + 2 * spline_order + 1) = ({in_features}, {fewest} or more)"
            f" with spline_order = {spline_order}, got {tuple(grid.shape)}"
        )
    if not grid.isfinite().all():
        raise ValueError("grid: expected finite knots, got NaN or infinity")
    falls = (grid.diff(dim=1) < 0).nonzero()
    if len(falls):
        i, j = falls[0].tolist()
        raise ValueError(
            f"grid: expected knots that do not decrease, got {grid[i, j]:g} followed by {grid[i, j + 1]:g} for input {i}"
        )
    a, b = grid[:, spline_order], grid[:, grid.shape[1] - 1 - spline_order]
    empty = (a == b).nonzero()
    if len(empty):
        i = int(empty[0])
        raise ValueError(f"grid: expected an increasing range, got [{a[i]:g}, {b[i]:g}] for input {i}")
