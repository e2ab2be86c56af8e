"""Stacks of narrow layers as one native call: what is between the layers never leaves the CPU's cache or a block of a GPU.

Values and first derivatives are one operator each. Where more is asked of a backward (to be differentiated itself, in
reverse or forward mode, or batched), it is composed of the layers' own operations (ops.py), which have every further
derivative. Transforms and compilers never come here: `serves` says so, and layers then run one by one.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from kan_fast import ops
from kan_fast.backends import choose, get
from kan_fast.checks import tensors_of_a_layer
from kan_fast.derivatives import Contraction, refuse_grid
from kan_fast.functional import as_rows
from kan_fast.operators import dispatched

_C = torch._C
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = _C._any_requires_grad

Layers = Sequence[Tensor]

# Inputs and outputs of a layer, layers of a stack: kMaxWidth and kMaxDepth of csrc/kernels.h.
MAX_WIDTH = 16
MAX_DEPTH = 16
# Time over that of the layers one by one, forward and step, two threads, where their own kernels would be others:
#   AVX-512, float32        64 rows     256 rows       AVX2, float32  64 rows     256 rows
#   [2, 10, 10, 1], G = 20  0.64, 0.74  0.66, 0.77     G = 5          0.68, 0.73  0.70, 0.81
#                   G = 50  0.96, 1.07  1.24, 1.36     G = 20         0.94, 0.98  1.31, 1.39
#   [16, 16, 16],   G = 5   1.27, 1.15  1.03, 1.06     G = 5          1.44, 1.36  1.37, 1.58
# So a few rows of small weights (float32 [2, 10, 10, 1] at G = 5: 4 KB) pay by the calls that they save.
_FEW_ROWS = 128
_FEW_BYTES = 8192
# Read once: 0 and every network is computed layer by layer.
_ENABLED = os.environ.get("KAN_FAST_FUSED_NETWORK", "1") != "0"


def serves(x: Tensor) -> bool:
    """Whether x is one for the native kernels, float32 or float64, and nobody traces, transforms or casts what is computed."""
    return (
        _ENABLED
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and (x.is_cpu or x.is_cuda)
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and not _is_compiling()
        and not _transformed(x)
        and not _C._is_any_autocast_enabled()
        and _C._get_tracing_state() is None
        and choose("auto", x.device, x.dtype) == "native"
    )


def network(x: Tensor, layers: Layers, activation: str, outside: str, bias: bool) -> Tensor | None:
    """x (..., I) through all layers -> (..., O), differentiable in x and the layers' weights any number of times.

    None where the layers one by one are faster.
    layers: of every layer in turn spline_weight, grid, base_weight unless activation is "none", bias (out) where `bias`; at
    most MAX_DEPTH layers of 1 to MAX_WIDTH inputs and outputs, of x's dtype but for the grids. x must be one that this
    module `serves`. Raises what the layers raise.
    """
    rows = x if x.dim() == 2 else as_rows(x)
    if not _pays(rows, layers, activation, outside, bias):
        return None
    if _is_grad_enabled() and _any_requires_grad(x, *layers):
        y = _Network.apply(rows, activation, outside, bias, *layers)
    else:
        y = _output(rows, layers, activation, outside, bias)
    result: Tensor = y if rows is x else y.view(*x.shape[:-1], y.shape[1])
    return result


def _pays(x: Tensor, layers: Layers, activation: str, outside: str, bias: bool) -> bool:
    if not x.is_cpu and x.dtype is not torch.float32:
        return False  # no CUDA kernel
    if x.is_cpu and x.shape[0] <= _FEW_ROWS:
        size = 0
        for at in range(0, len(layers), tensors_of_a_layer(activation, bias)):
            size += layers[at].nbytes
        if size <= _FEW_BYTES:
            return True
    try:
        return get("native").network_pays(x, layers, activation, outside, bias)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):
        return False  # something does not fit; the layers say what


def _transformed(x: Tensor) -> bool:
    """Whether more than the values of a call are wanted: by a transform, forward mode, a tracer."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or dispatched(x)


def _output(x: Tensor, layers: Layers, activation: str, outside: str, bias: bool) -> Tensor:
    try:
        return get("native").network_output(x, layers, activation, outside, bias)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):
        _layer_inputs(x, layers, activation, outside, bias, len(layers))  # says what is wrong as the layers do
        raise


class _Network(Contraction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, outside: str, bias: bool, *layers: Tensor) -> Tensor:
        ctx.options = activation, outside, bias
        if True in ctx.needs_input_grad[5 :: tensors_of_a_layer(activation, bias)]:
            refuse_grid()
        ctx.save_for_backward(x, *layers)
        return _output(x, layers, activation, outside, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *layers = ctx.saved_tensors
        activation, outside, bias = ctx.options
        need_x, _, _, _, *need = ctx.needs_input_grad
        composed = _is_grad_enabled() or _transformed(g)
        gradients = _gradients if composed else get("native").network_backward
        found = gradients(x, layers, g, activation, outside, bias, need_x, True in need)
        results = [found[0] if need_x else None, None, None, None]
        if True not in need:
            return *results, *(None for _ in need)
        each = tensors_of_a_layer(activation, bias) - 1
        for at in range(int(need_x), len(found), each):
            results += found[at], None, *found[at + 1 : at + each]  # None: the grid's
        return tuple(results)


def _split(layer: Layers, activation: str, bias: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """spline_weight, base_weight, grid, bias"""
    return layer[0], None if activation == "none" else layer[2], layer[1], layer[-1] if bias else None


def _layer_inputs(x: Tensor, layers: Layers, activation: str, outside: str, bias: bool, end: int) -> list[Tensor]:
    """What enters each layer of layers[:end], and what leaves the last, by the layers' own operations."""
    values = [x]
    step = tensors_of_a_layer(activation, bias)
    for at in range(0, end, step):
        spline_weight, base_weight, grid, shift = _split(layers[at : at + step], activation, bias)
        y = ops.contract_output(values[-1], None, spline_weight, base_weight, grid, activation, outside, 0, "native")
        values.append(y if shift is None else y + shift)
    return values


def _gradients(
    x: Tensor, layers: Layers, g: Tensor, activation: str, outside: str, bias: bool, need_x: bool, need_weights: bool
) -> list[Tensor]:
    """As network_backward of backends/native.py, differentiable."""
    step = tensors_of_a_layer(activation, bias)
    last = len(layers) - step
    values = _layer_inputs(x, layers, activation, outside, bias, last)
    found: list[Tensor] = []
    for at in range(last, -1, -step):
        spline_weight, base_weight, grid, _ = _split(layers[at : at + step], activation, bias)
        h = values[at // step]
        options = activation, outside
        d_weights: tuple[Tensor, ...] = ()
        dx = None
        if need_weights and (at > 0 or need_x):
            dx, *d_weights = ops.contract_backward(h, spline_weight, base_weight, g, grid, *options, 0, "native")  # type: ignore[assignment]
        elif need_weights:
            spline_order = grid.shape[1] - spline_weight.shape[1] - 1
            d_weights = ops.contract_weight(h, None, g, grid, spline_order, *options, 0, "native")
        else:
            dx = ops.contract_input(h, spline_weight, base_weight, g, grid, *options, 1, "native")
        if need_weights:
            shift = [g.sum(0)] if bias else []
            found = [*d_weights[: 1 + (base_weight is not None)], *shift, *found]
        if dx is not None:
            g = dx
    return [g, *found] if need_x else found
