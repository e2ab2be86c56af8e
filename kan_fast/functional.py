"""kan_linear: the layer as a function."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from kan_fast import ops
from kan_fast.autocast import autocast_dtype
from kan_fast.backends import choose
from kan_fast.checks import check_layout, expect

BaseActivation = str | Callable[[Tensor], Tensor] | None


def kan_linear(
    x: Tensor,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    base_activation: BaseActivation = "silu",
    outside: str = "zero",
    backend: str = "auto",
) -> Tensor:
    """y[..., o] = bias[o] + sum_i (base_weight[i, o] * act(x[..., i]) + sum_f spline_weight[i, f, o] * B_f(x[..., i]))

    x (..., in), spline_weight (in, G + k, out), grid (in, G + 2k + 1), base_weight (in, out) or None for no base
    branch, bias (out) or None -> (..., out). grid_size G and spline_order k follow from the shapes.

    Knots must not decrease from one to the next and are not looked at on the way: KANLayer.set_grid checks them.

    float32, float64, bfloat16 or float16; the result has the dtype of the weights. x may be of another of these dtypes,
    but float64 goes only with float64. Intervals, bases and sums are computed in float32 (float64 for float64), and the
    knots are float32 or float64. Under autocast weights and result take the autocast dtype, as in nn.Linear; x and
    the knots do not.

    base_activation: "silu", "identity", "gelu" (erf form), "relu", "tanh" (all fused), or any callable (x) -> same
    shape, which is applied outside of the kernel. outside: "zero" (bases end at their last knots), "linear" or "clamp"
    (the spline goes on from the edge of the range [t_k, t_{G+k}] with value and slope, or with the value alone).
    backend: "auto", "native", "triton" or "reference".

    Raises ValueError or TypeError for arguments that do not fit, RuntimeError for a backend that cannot serve the
    tensors, with the reason, and for a grid that requires grad.

    Source: Z. Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, eq. (2.10).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not (
        isinstance(spline_weight, Tensor)
        and isinstance(grid, Tensor)
        and (base_weight is None or isinstance(base_weight, Tensor))
        and (bias is None or isinstance(bias, Tensor))
    ):
        _refuse(spline_weight=spline_weight, grid=grid, base_weight=base_weight, bias=bias)
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(x, spline_weight)
        spline_weight = spline_weight.to(dtype)
        base_weight = None if base_weight is None else base_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not torch.compiler.is_compiling():  # a compiled or exported program chooses when it runs
        backend = choose(backend, x.device, spline_weight.dtype)
    if base_weight is None:
        activation, base = "none", None
    elif isinstance(base_activation, str):
        activation, base = base_activation, None
    elif base_activation is None:
        raise ValueError("base_weight: expected None with base_activation None, got a tensor")
    else:
        activation, base = "none", _activated(base_activation, x).to(base_weight.dtype) @ base_weight
    rows = x if x.dim() == 2 else as_rows(x)
    y = ops.contract_output(
        rows, None, spline_weight, base_weight if base is None else None, grid, activation, outside, 0, backend
    )
    if rows is not x:
        y = y.view(*x.shape[:-1], y.shape[1])
    if base is not None:
        y = y + base
    return y if bias is None else _with_bias(y, bias)


def _refuse(**arguments: Any) -> NoReturn:
    """Say which of the weights and knots is no tensor."""
    for name, value in arguments.items():
        optional = name in ("base_weight", "bias")
        fits = isinstance(value, Tensor) or (optional and value is None)
        expect(fits, name, "a tensor or None" if optional else "a tensor", value)
    raise AssertionError("all are tensors")


def _activated(base_activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    expect(callable(base_activation), "base_activation", "a name, a function or None", base_activation)
    value = base_activation(x)
    if value.shape != x.shape:
        raise ValueError(f"base_activation: expected a result of x's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    return value


def _with_bias(y: Tensor, bias: Tensor) -> Tensor:
    if bias.shape != y.shape[-1:]:
        raise ValueError(f"bias: expected shape (out_features) = ({y.shape[-1]},), got {tuple(bias.shape)}")
    if bias.dtype != y.dtype:
        raise TypeError(f"bias: expected {y.dtype} as the spline weights have, got {bias.dtype}")
    return y + bias


def as_rows(x: Tensor) -> Tensor:
    """x (..., in) as a matrix (rows, in). Raises ValueError for a scalar, TypeError for a sparse tensor."""
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., in_features), got a scalar")
    check_layout("x", x)
    return x.flatten(0, -2) if x.dim() > 1 else x[None]
