"""What is demanded of arguments. Errors name the argument, what was expected and what came.

check_problem holds the demands of the three contractions, in Python, for backends that do not check by themselves;
csrc/ops.cpp makes the same demands of the native backend.
"""

import math
import operator
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kan_fast.activations import ACTIVATIONS
from kan_fast.spline import OUTSIDE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def expect(fits: bool, name: str, wanted: str, value: Any) -> None:
    """Raise TypeError for an argument that is no `wanted` thing: `fits` says so."""
    if not fits:
        raise unexpected(name, wanted, value)


def unexpected(name: str, wanted: str, value: Any) -> TypeError:
    """The error that says which argument is no `wanted` thing, and what it is."""
    shown = repr(value) if value is None or isinstance(value, str | int | float) else type(value).__name__
    return TypeError(f"{name}: expected {wanted}, got {shown}")


def check_path(name: str, value: Any) -> str | os.PathLike[str]:
    """value, a file's path. An int, which open() takes for a file that is open already, is none."""
    expect(isinstance(value, str | os.PathLike), name, "a path", value)
    path: str | os.PathLike[str] = value
    return path


def check_int(name: str, value: Any, least: int) -> int:
    """value as an int of at least so much."""
    expect(hasattr(value, "__index__") and not isinstance(value, bool), name, "an int", value)
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor or array of floats, or of several numbers
        raise unexpected(name, "an int", value) from error
    if number < least:
        raise ValueError(f"{name}: expected {least} or more, got {number}")
    return number


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Raise TypeError for what float() does not take as a number, ValueError for NaN and numbers below `least`."""
    expect(hasattr(value, "__float__"), name, "a number", value)
    try:
        enough = bool(value >= least)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor or array of several numbers
        raise unexpected(name, "a number", value) from error
    if not enough:
        raise ValueError(f"{name}: expected {least:g} or more, got {value}")


def check_iterable(name: str, value: Any, wanted: str) -> None:
    """Raise TypeError for what a loop cannot go through."""
    expect(hasattr(value, "__iter__") or hasattr(value, "__getitem__"), name, wanted, value)


def check_plain(layer: nn.Module, name: str = "", weights: tuple[str, ...] = ("spline_weight", "base_weight", "bias")) -> None:
    """Raise ValueError where a weight of a layer, known by its `name` in a model, is no parameter but computed from others.

    For tools that write into weights, or carry them elsewhere: a write into a computed one changes nothing that lasts.
    """
    for weight in weights:
        if weight in layer._parameters:
            continue
        if parametrize.is_parametrized(layer, weight):
            found, remedy = "a parametrized one", "torch.nn.utils.parametrize.remove_parametrizations(layer, {!r})"
        else:
            found = "one that a hook computes before every call"
            remedy = "torch.nn.utils.prune.remove(layer, {!r}), or remove_weight_norm and its like,"
        full = f"{name}.{weight}" if name else weight
        raise ValueError(f"{full}: expected a plain parameter, got {found}: {remedy.format(weight)} makes it one")


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise TypeError for sparse tensors and other layouts without strides."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor (layout torch.strided), got layout {tensor.layout}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError for a dtype that no backend computes with."""
    if dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype}")


def check_problem(
    x: Tensor,
    scale: Tensor | None,
    spline_weight: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor | None,
    grid: Tensor,
    spline_order: int | None,
    activation: str,
    outside: str,
    n: int,
) -> None:
    """Raise TypeError or ValueError where an argument does not fit the others.

    x (B, I), scale (B, I), spline_weight (I, F, O), base_weight (I, O), g (B, O), grid (I, F + k + 1).
    Arguments that an operation does not have are None; spline_order is given where spline_weight is not.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"base_activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if outside not in OUTSIDE:
        raise ValueError(f"outside: expected one of {', '.join(OUTSIDE)}, got {outside!r}")
    if n < 0:
        raise ValueError(f"n: expected a derivative order of 0 or more, got {n}")
    weight = g if spline_weight is None else spline_weight
    assert weight is not None
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (batch, in_features), got {tuple(x.shape)}")
    batch, in_features = x.shape
    if spline_weight is not None:
        if spline_weight.dim() != 3:
            raise ValueError(
                "spline_weight: expected shape (in_features, grid_size + spline_order, out_features),"
                f" got {tuple(spline_weight.shape)}"
            )
        if spline_weight.shape[0] != in_features:
            raise ValueError(
                f"x: expected in_features = {spline_weight.shape[0]} as spline_weight has, got shape {tuple(x.shape)}"
            )
    out_features = weight.shape[-1]
    if grid.dim() != 2 or grid.shape[0] != in_features:
        raise ValueError(
            "grid: expected shape (in_features, grid_size + 2 * spline_order + 1) with"
            f" in_features = {in_features} as x has, got {tuple(grid.shape)}"
        )
    if spline_weight is not None:
        spline_order = grid.shape[1] - spline_weight.shape[1] - 1
    assert spline_order is not None
    grid_size = grid.shape[1] - 2 * spline_order - 1
    if spline_order < 0 or grid_size < 1:
        bases = "" if spline_weight is None else f" and {spline_weight.shape[1]} bases"
        raise ValueError(
            "grid: expected grid_size + 2 * spline_order + 1 knots with spline_order >= 0 and grid_size >= 1,"
            f" got {grid.shape[1]} knots{bases}, that is spline_order = {spline_order} and grid_size = {grid_size}"
        )
    if spline_weight is not None and (activation == "none") != (base_weight is None):
        wanted = "None with base_activation 'none'" if activation == "none" else f"a tensor with base_activation {activation!r}"
        raise ValueError(f"base_weight: expected {wanted}, got {'None' if base_weight is None else tuple(base_weight.shape)}")
    for name, tensor, shape, meaning in (
        ("scale", scale, (batch, in_features), "(batch, in_features)"),
        ("base_weight", base_weight, (in_features, out_features), "(in_features, out_features)"),
        ("g", g, (batch, out_features), "(batch, out_features)"),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {meaning} = {shape}, got {tuple(tensor.shape)}")
    _check_dtypes(x, scale, weight, spline_weight, base_weight, g, grid)


def _check_dtypes(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    spline_weight: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor | None,
    grid: Tensor,
) -> None:
    if grid.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grid: expected float32 or float64 knots, got {grid.dtype}")
    tensors = (("x", x), ("scale", scale), ("spline_weight", spline_weight), ("base_weight", base_weight), ("g", g))
    for name, tensor in tensors:
        if tensor is None:
            continue
        check_layout(name, tensor)
        check_dtype(name, tensor.dtype)
        if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(f"{name}: float64 goes only with float64, got x of {x.dtype} and {name} of {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x has, got {tensor.device}")
    if grid.device != x.device:
        raise ValueError(f"grid: expected device {x.device} as x has, got {grid.device}")
    for name, tensor in (("base_weight", base_weight), ("g", g)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(f"{name}: expected {weight.dtype} as the spline weights have, got {tensor.dtype}")


def tensors_of_a_layer(activation: str, bias: bool) -> int:
    """How many a layer has among those of a stack: spline_weight, grid, base_weight unless "none", bias (see stack.py)."""
    return 2 + (activation != "none") + bias
