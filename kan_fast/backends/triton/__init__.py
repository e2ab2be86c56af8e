"""The contractions in Triton, for CUDA and ROCm devices; interpreted on CPU tensors when TRITON_INTERPRET=1.

    launch.py            from tensors to launches: tiles, arguments
    recipes.py           launches remembered, so that most calls need no plan
    tiles.py             which tile each kernel works in, and why
    tuning.py            optional: tiles chosen by measuring, kept on disk
    kernels/             the kernels, file by file as in csrc/, and kan_fast/spline.py and activations.py in Triton
    interpreter.py       repairs of Triton's interpreter

These kernels were believed before a GPU saw them: interpreted against the float64 reference, and compiled offline for
several architectures with their registers, spills and tensor instructions checked. Importing this package does not
import Triton; the first call does.
"""

import functools
import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kan_fast.checks import check_problem

if TYPE_CHECKING:
    from kan_fast.backends.triton.launch import Problem

_OLDEST = (3, 6)  # tuples and constexpr functions as the kernels use them


def reason_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of `dtype` on `device`; None if it can."""
    reason = _missing()
    if reason is not None:
        return reason
    if interpreted():
        return None if device.type in ("cpu", "cuda") else f"it has no kernels for {device.type}"
    if device.type == "cpu":
        return "CPU tensors are served by Triton's interpreter alone, with TRITON_INTERPRET=1 in the environment"
    if device.type != "cuda":
        return f"it has no kernels for {device.type}"
    if not torch.cuda.is_available():
        built_for_gpu = torch.version.cuda or torch.version.hip
        return "torch sees no CUDA device" if built_for_gpu else f"torch {torch.__version__} has no CUDA"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {major}.{minor}"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they are first used, as Triton does."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return None  # built from source under another name
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < _OLDEST:
        return f"it needs triton {_OLDEST[0]}.{_OLDEST[1]} or newer, found {found}"
    if interpreted() and importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs the package numpy, which is not installed"
    return None


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
    problem = _problem(x, spline_weight.shape[1], spline_weight.shape[2], grid, activation, outside, n, spline_weight.dtype)
    if 0 in (problem.batch, problem.out_features) or not (problem.spline or problem.base) or problem.in_features == 0:
        y = _unknown(x, scale).sum(1, keepdim=True, dtype=spline_weight.dtype)
        return y.expand(problem.batch, problem.out_features).contiguous()
    y = spline_weight.new_empty((problem.batch, problem.out_features))
    weights = {"spline_weight": spline_weight.contiguous(), "base_weight": _contiguous(base_weight)}
    _run("contract_output", problem, {"x": x, "scale": scale, **weights, "grid": grid.contiguous(), "y": y})
    return y


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
    problem = _problem(x, spline_weight.shape[1], spline_weight.shape[2], grid, activation, outside, n, spline_weight.dtype)
    if 0 in (problem.batch, problem.in_features, problem.out_features) or not (problem.spline or problem.base):
        return _unknown(x, None) + (g * 0).sum(1, keepdim=True, dtype=x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    weights = {"spline_weight": spline_weight.contiguous(), "base_weight": _contiguous(base_weight)}
    _run("contract_input", problem, {"x": x, **weights, "g": g, "grid": grid.contiguous(), "dx": dx})
    return dx


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
    d_base (I, O), or (0, O) with activation "none", both of g's dtype. Sums over the batch in a fixed order.
    """
    check_problem(x, scale, None, None, g, grid, spline_order, activation, outside, n)
    features = grid.shape[1] - spline_order - 1
    problem = _problem(x, features, g.shape[1], grid, activation, outside, n, g.dtype)
    shape = problem.in_features, features, problem.out_features
    d_base = g.new_empty((problem.in_features if problem.base else 0, problem.out_features))
    empty = 0 in (problem.batch, problem.in_features, problem.out_features)
    if empty or not problem.spline:
        unknown = _unknown(x, scale).sum(0, dtype=g.dtype)[:, None, None] + (g * 0).sum(0)  # 0 times NaN or infinity is NaN
        d_spline = unknown.expand(shape).contiguous()
    else:
        d_spline = g.new_empty(shape)
    if empty:
        d_base.zero_()
    elif problem.spline or problem.base:
        operands = {"x": x, "scale": scale, "g": g, "grid": grid.contiguous(), "d_spline": d_spline, "d_base": d_base}
        _run("contract_weight", problem, operands)
    return d_spline, d_base


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
    """(contract_input of order n + 1, *contract_weight of order n): the whole first backward.

    Two kernels, each a product of its own: sharing the features between them would save less than a tenth of their work.
    """
    dx = contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1)
    spline_order = grid.shape[1] - spline_weight.shape[1] - 1
    return dx, *contract_weight(x, None, g, grid, spline_order, activation, outside, n)


def _problem(
    x: Tensor, features: int, out_features: int, grid: Tensor, activation: str, outside: str, n: int, weight_dtype: torch.dtype
) -> "Problem":
    from kan_fast.backends.triton.launch import Problem, target_of

    order = grid.shape[1] - features - 1
    batch, in_features = x.shape
    target = target_of(x.device)
    return Problem(batch, in_features, features, out_features, order, activation, outside, n, weight_dtype, target)


def _run(name: str, problem: "Problem", operands: dict[str, Tensor | None]) -> None:
    from kan_fast.backends.triton import recipes

    recipes.execute(name, problem, operands)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unknown(x: Tensor, scale: Tensor | None) -> Tensor:
    """What a feature that is 0 everywhere contributes: 0, or NaN for an x that is NaN; (B, I)."""
    value = torch.where(x.isnan(), x, 0)
    return value if scale is None else value * scale
