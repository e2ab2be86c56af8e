"""Results without values: what compilers and fake tensors see of the contractions.

Arguments and checks are those of backends/reference.py; every result is new and contiguous.
"""

from collections.abc import Sequence

from torch import Tensor

from kan_fast.checks import check_problem, tensors_of_a_layer


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
    """-> (B, O) of spline_weight's dtype"""
    check_problem(x, scale, spline_weight, base_weight, None, grid, None, activation, outside, n)
    return spline_weight.new_empty(x.shape[0], spline_weight.shape[2])


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
    """-> (B, I) of x's dtype"""
    check_problem(x, None, spline_weight, base_weight, g, grid, None, activation, outside, n)
    return x.new_empty(x.shape)


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
    """-> (I, G + k, O) and (I, O), or (0, O) with activation "none", of g's dtype"""
    check_problem(x, scale, None, None, g, grid, spline_order, activation, outside, n)
    in_features, out_features = x.shape[1], g.shape[1]
    d_spline = g.new_empty(in_features, grid.shape[1] - spline_order - 1, out_features)
    return d_spline, g.new_empty(0 if activation == "none" else in_features, out_features)


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
    """-> contract_input's and contract_weight's"""
    dx = contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n)
    spline_order = grid.shape[1] - spline_weight.shape[1] - 1
    return dx, *contract_weight(x, None, g, grid, spline_order, activation, outside, n)


def network_output(x: Tensor, layers: Sequence[Tensor], activation: str, outside: str, bias: bool) -> Tensor:
    """-> (B, O) of x's dtype"""
    return x.new_empty(x.shape[0], layers[-tensors_of_a_layer(activation, bias)].shape[2])


def network_backward(
    x: Tensor, layers: Sequence[Tensor], g: Tensor, activation: str, outside: str, bias: bool, need_x: bool, need_weights: bool
) -> list[Tensor]:
    """-> as x where need_x, as all of `layers` but the grids where need_weights"""
    each = tensors_of_a_layer(activation, bias)
    weights = [weight.new_empty(weight.shape) for at, weight in enumerate(layers) if at % each != 1]
    return [x.new_empty(x.shape)] * need_x + weights * need_weights
