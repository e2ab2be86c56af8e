"""Rules by which torch.func.vmap passes through the contractions.

A batch of inputs with shared weights folds into the rows. A batch of weights or cotangents with shared inputs folds
into the outputs. What is left (per-sample gradients, ensembles) is one call per sample; outside of other transforms
each result is written straight into its place, so that memory is that of the whole result and one sample.

A rule takes the operation that it batches, so that outer transforms see it again, and `in_dims`, which says for every
argument where its batch is, or None. It returns the result with the batch in front, and the zeros that say so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operation = Callable[..., Any]
Dims = tuple[int | None, ...]


def contract_output(operation: Operation, size: int, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """x (B, I), scale, spline_weight (I, F, O), base_weight, grid, ... -> (size, B, O)"""
    args, batched = _batch_in_front(in_dims, args)
    x, scale, spline_weight, base_weight, grid, *options = args
    x_batched, scale_batched, spline_batched, base_batched, grid_batched, *_ = batched
    if not (spline_batched or base_batched or grid_batched):
        rows = _rows(x, x_batched, size), _rows(scale, scale_batched, size)
        y = operation(*rows, spline_weight, base_weight, grid, *options)
        return y.unflatten(0, (size, x.shape[-2])), 0
    if not (x_batched or scale_batched or grid_batched):
        weights = _columns(spline_weight, spline_batched, size), _columns(base_weight, base_batched, size)
        y = operation(x, scale, *weights, grid, *options)
        return _unfold_columns(y, size, spline_weight.shape[-1]), 0
    return _one_by_one(operation, size, args, batched), 0


def contract_input(operation: Operation, size: int, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """x (B, I), spline_weight (I, F, O), base_weight, g (B, O), grid, ... -> (size, B, I)"""
    args, batched = _batch_in_front(in_dims, args)
    x, spline_weight, base_weight, g, grid, *options = args
    x_batched, spline_batched, base_batched, g_batched, grid_batched, *_ = batched
    if not (spline_batched or base_batched or grid_batched):
        dx = operation(_rows(x, x_batched, size), spline_weight, base_weight, _rows(g, g_batched, size), grid, *options)
        return dx.unflatten(0, (size, x.shape[-2])), 0
    return _one_by_one(operation, size, args, batched), 0


def contract_weight(
    operation: Operation, size: int, in_dims: Dims, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """x (B, I), scale, g (B, O), grid, ... -> (size, I, F, O) and (size, I, O)"""
    args, batched = _batch_in_front(in_dims, args)
    x, scale, g, grid, *options = args
    x_batched, scale_batched, g_batched, grid_batched, *_ = batched
    if not (x_batched or scale_batched or grid_batched):
        d_spline, d_base = operation(x, scale, _columns(g, g_batched, size), grid, *options)
        out_features = g.shape[-1]
        return (_unfold_columns(d_spline, size, out_features), _unfold_columns(d_base, size, out_features)), (0, 0)
    return _one_by_one(operation, size, args, batched), (0, 0)


def contract_backward(
    operations: tuple[Operation, Operation], size: int, in_dims: Dims, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor], Dims]:
    """Its two halves (contract_input, contract_weight), because they fold differently."""
    args, batched = _batch_in_front(in_dims, args)
    x, spline_weight, base_weight, g, grid, activation, outside, n, backend = args
    dims = tuple(0 if here else None for here in batched)
    x_dim, _, _, g_dim, grid_dim, *_ = dims
    input_args = x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend
    spline_order = grid.shape[-1] - spline_weight.shape[-2] - 1
    weight_args = x, None, g, grid, spline_order, activation, outside, n, backend
    weight_dims = x_dim, None, g_dim, grid_dim, *(None,) * 5
    dx, _ = contract_input(operations[0], size, dims, input_args)
    if x_dim is g_dim is grid_dim is None:  # the weights alone are batched, and the second half does not read them
        halves = operations[1](*weight_args)
        return (dx, *halves), (0, None, None)
    weights, _ = contract_weight(operations[1], size, weight_dims, weight_args)
    return (dx, *weights), (0, 0, 0)


def by_rows(
    operation: Operation, size: int, in_dims: Dims, args: tuple[Any, ...], rows: tuple[int, ...]
) -> tuple[Tensor, int]:
    """Any operation of one result: arguments at `rows` are (B, C), as is the result where they alone are batched."""
    args, batched = _batch_in_front(in_dims, args)
    if not rows or any(here for place, here in enumerate(batched) if place not in rows):
        return _one_by_one(operation, size, args, batched), 0
    folded = list(args)
    for place in rows:
        folded[place] = _rows(args[place], batched[place], size)
    y: Tensor = operation(*folded)
    return y.unflatten(0, (size, args[rows[0]].shape[-2])), 0


def _batch_in_front(in_dims: Dims, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    moved = (arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims, strict=True))
    return tuple(moved), tuple(dim is not None for dim in in_dims)


def _rows(tensor: Tensor | None, batched: bool, size: int) -> Tensor | None:
    """(size, B, C), or (B, C) to be repeated, -> (size * B, C)"""
    if tensor is None:
        return None
    return (tensor if batched else tensor.expand(size, *tensor.shape)).flatten(0, 1)


def _columns(tensor: Tensor | None, batched: bool, size: int) -> Tensor | None:
    """(size, ..., O), or (..., O) to be repeated, -> (..., size * O)"""
    if tensor is None:
        return None
    return (tensor if batched else tensor.expand(size, *tensor.shape)).movedim(0, -2).flatten(-2)


def _unfold_columns(tensor: Tensor, size: int, out_features: int) -> Tensor:
    """(..., size * O) -> (size, ..., O)"""
    unfolded: Tensor = tensor.unflatten(-1, (size, out_features))
    return unfolded.movedim(-2, 0)


def _one_by_one(operation: Operation, size: int, args: tuple[Any, ...], batched: tuple[bool, ...]) -> Any:
    """The operation on one sample after the other; results stacked in front."""

    def call(sample: int) -> Any:
        return operation(*(arg[sample] if here else arg for arg, here in zip(args, batched, strict=True)))

    if size == 0:
        empty = operation(*(arg.new_zeros(arg.shape[1:]) if here else arg for arg, here in zip(args, batched, strict=True)))
        return _map(lambda result: result.new_empty(0, *result.shape), empty)
    first = call(0)
    tensors = [first] if isinstance(first, Tensor) else first
    watched = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    if watched or any(tensor.requires_grad for tensor in tensors):
        results = [first, *(call(sample) for sample in range(1, size))]
        if isinstance(first, Tensor):
            return torch.stack(results)
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    whole = _map(lambda result: result.new_empty(size, *result.shape), first)
    for sample in range(size):
        result = first if sample == 0 else call(sample)
        places = _map(lambda tensor, at=sample: tensor[at], whole)
        _map(lambda place, part: place.copy_(part), places, result)
    return whole


def _map(function: Callable[..., Tensor], *results: Any) -> Any:
    """Apply to a tensor, or to each of a tuple of tensors."""
    if isinstance(results[0], Tensor):
        return function(*results)
    return tuple(function(*parts) for parts in zip(*results, strict=True))
