"""The layer in plain PyTorch: the oracle of the tests, and the backend of every device that has no kernels.

All three contractions are products with the matrix of features phi^(n), which is built in full: (B, I, G + k) numbers.
"""

import torch
from torch import Tensor

from kan_fast.activations import activation as activation_function
from kan_fast.autocast import beneath_autocast
from kan_fast.checks import check_problem
from kan_fast.spline import bases


def reason_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such tensors; None, because it always can."""
    return None


@beneath_autocast
def contract_output(
    x: Tensor,
    scale: Tensor | None,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
) -> Tensor:
    """y[b, o] = sum_{i, f} scale[b, i] * phi_f^(n)(x[b, i]) * weight[i, f, o]

    x (B, I), scale (B, I) or None, spline_weight (I, G + k, O), base_weight (I, O) or None,
    grid (I, G + 2k + 1) -> (B, O) of spline_weight's dtype.
    """
    check_problem(x, scale, spline_weight, base_weight, None, grid, None, activation, outside, n)
    base, spline = _features(x, scale, grid, _order(spline_weight, grid), activation, outside, n)
    y = spline.flatten(1) @ spline_weight.to(spline.dtype).flatten(0, 1)
    if base is not None and base_weight is not None:
        y = y + base @ base_weight.to(base.dtype)
    return y.to(spline_weight.dtype)


@beneath_autocast
def contract_input(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
) -> Tensor:
    """dx[b, i] = sum_{f, o} phi_f^(n)(x[b, i]) * weight[i, f, o] * g[b, o]

    x (B, I), spline_weight (I, G + k, O), base_weight (I, O) or None, g (B, O), grid (I, G + 2k + 1)
    -> (B, I) of x's dtype.
    """
    check_problem(x, None, spline_weight, base_weight, g, grid, None, activation, outside, n)
    base, spline = _features(x, None, grid, _order(spline_weight, grid), activation, outside, n)
    g = g.to(spline.dtype)
    pulled_back = (g @ spline_weight.to(g.dtype).flatten(0, 1).t()).view_as(spline)
    dx = (spline * pulled_back).sum(2)
    if base is not None and base_weight is not None:
        dx = dx + base * (g @ base_weight.to(g.dtype).t())
    return dx.to(x.dtype)


@beneath_autocast
def contract_weight(
    x: Tensor,
    scale: Tensor | None,
    g: Tensor,
    grid: Tensor,
    spline_order: int,
    activation: str,
    outside: str,
    n: int,
) -> tuple[Tensor, Tensor]:
    """d_weight[i, f, o] = sum_b scale[b, i] * phi_f^(n)(x[b, i]) * g[b, o]

    x (B, I), scale (B, I) or None, g (B, O), grid (I, G + 2k + 1) -> d_spline (I, G + k, O) and
    d_base (I, O), or (0, O) with activation "none", both of g's dtype.
    """
    check_problem(x, scale, None, None, g, grid, spline_order, activation, outside, n)
    base, spline = _features(x, scale, grid, spline_order, activation, outside, n)
    wide = g.to(spline.dtype)
    d_spline = (spline.flatten(1).t() @ wide).view(*spline.shape[1:], g.shape[1])
    d_base = g.new_empty(0, g.shape[1]) if base is None else base.t() @ wide
    return d_spline.to(g.dtype), d_base.to(g.dtype)


def contract_backward(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(contract_input of order n + 1, *contract_weight of order n): the whole first backward."""
    dx = contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1)
    return dx, *contract_weight(x, None, g, grid, _order(spline_weight, grid), activation, outside, n)


def _order(spline_weight: Tensor, grid: Tensor) -> int:
    return grid.shape[1] - spline_weight.shape[1] - 1


def _features(
    x: Tensor, scale: Tensor | None, grid: Tensor, spline_order: int, activation: str, outside: str, n: int
) -> tuple[Tensor | None, Tensor]:
    """scale * phi^(n)(x): base (B, I) or None, and spline (B, I, G + k), in float32, or float64 for float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    spline = bases(x, grid.to(dtype), spline_order, outside, n)
    base = None if activation == "none" else activation_function(activation, x, n)
    if scale is not None:
        scale = scale.to(dtype)
        spline = spline * scale[..., None]
        base = None if base is None else base * scale
    return base, spline
