"""Contractions over a list of edges: time and memory follow the number of edges, not in * out.

An edge e leads from an input i(e) to an output o(e) and has its own weights. With the features phi of an input (the base
activation, then the bases; n-th derivatives) the form of kan_fast.ops becomes

    T_n(x; s, W, g) = sum_{b, e, f} s[b, i(e)] phi_f^(n)(x[b, i(e)]) W[e, f] g[b, o(e)]

and its partial contractions, like those, have one another as derivatives, so every order is right:

    edge_output(x, s, W)[b, o] = sum_{e -> o, f} s phi^(n) W
    edge_input (x, W, g)[b, i] = sum_{e <- i, f} phi^(n) W g
    edge_weight(x, s, g)[e, f] = sum_b s phi^(n) g

Plain PyTorch, on every device. Features and products exist in chunks of CHUNK_ELEMENTS numbers only; sums run over an
edge list in a fixed order, so results are the same bits on every run.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kan_fast.activations import activation as activation_function
from kan_fast.spline import bases
from kan_fast.traverse import chunks


class Edges(NamedTuple):
    """An edge list, sorted by output, and what the contractions need to know of it.

    inputs, outputs (E,): ends of the edges. used (U,): inputs that have edges; place (E,): the edge's input among them.
    per_output (out,): number of edges. by_input (E,): the edges sorted by input, edges of one input in order; per_used
    (U,): their number. All int64.
    """

    inputs: Tensor
    outputs: Tensor
    used: Tensor
    place: Tensor
    per_output: Tensor
    by_input: Tensor
    per_used: Tensor


def edge_list(pairs: Tensor, in_features: int, out_features: int) -> Edges:
    """pairs (2, E) int64: inputs and outputs, sorted by output."""
    inputs, outputs = pairs
    per_input = torch.bincount(inputs, minlength=in_features)
    used = per_input.nonzero()[:, 0]
    place = (torch.cumsum(per_input > 0, 0) - 1)[inputs]
    by_input = torch.argsort(inputs, stable=True)
    return Edges(inputs, outputs, used, place, torch.bincount(outputs, minlength=out_features), by_input, per_input[used])


class Features(NamedTuple):
    """The features of an input: the activation `activation` ("none" for none) if any, and the bases on `grid` if any.

    grid (in, G + 2k + 1) or None.
    """

    activation: str
    grid: Tensor | None
    spline_order: int
    outside: str

    def width(self) -> int:
        """Number of features per input."""
        num_bases = 0 if self.grid is None else self.grid.shape[1] - self.spline_order - 1
        return num_bases + (self.activation != "none")

    def at(self, x: Tensor, used: Tensor, n: int) -> Tensor:
        """n-th derivatives at x (B, U), the inputs `used` -> (U, B, width())"""
        parts = []
        if self.activation != "none":
            parts.append(activation_function(self.activation, x, n)[..., None])
        if self.grid is not None:
            parts.append(bases(x, self.grid[used].to(x.dtype), self.spline_order, self.outside, n))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(0, 1).contiguous()


def edge_output(x: Tensor, scale: Tensor | None, weight: Tensor, edges: Edges, features: Features, n: int = 0) -> Tensor:
    """x (B, in), scale (B, in) or None, weight (E, features.width()) -> (B, out) of weight's dtype; differentiable."""
    result: Tensor = _EdgeOutput.apply(x, scale, weight, edges, features, n)
    return result


def edge_input(x: Tensor, weight: Tensor, g: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
    """x (B, in), weight (E, features.width()), g (B, out) -> (B, in) of x's dtype; differentiable."""
    result: Tensor = _EdgeInput.apply(x, weight, g, edges, features, n)
    return result


def edge_weight(x: Tensor, scale: Tensor | None, g: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
    """x (B, in), scale (B, in) or None, g (B, out) -> (E, features.width()) of g's dtype; differentiable."""
    result: Tensor = _EdgeWeight.apply(x, scale, g, edges, features, n)
    return result


def _blocks(
    x: Tensor, scale: Tensor | None, edges: Edges, features: Features, n: int
) -> Iterator[tuple[slice, Tensor, list[slice]]]:
    """Rows of x, scale * phi^(n) there (U, rows, F), and slices of the edges whose products with the rows fit a chunk."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = features.width()
    num_edges, num_used = len(edges.inputs), len(edges.used)
    for rows in chunks(len(x), max(num_edges, num_used * width)):
        part = x[rows].index_select(1, edges.used).to(dtype)
        phi = features.at(part, edges.used, n)
        if scale is not None:
            phi = phi * scale[rows].index_select(1, edges.used).to(dtype).t()[..., None]
        yield rows, phi, list(chunks(num_edges, phi.shape[1] * width))


def _values(phi: Tensor, weight: Tensor, place: Tensor, parts: list[slice]) -> Tensor:
    """phi (U, B, F), weight (E, F), place (E) -> every edge's value (E, B)"""
    values = [torch.bmm(phi.index_select(0, place[part]), weight[part, :, None])[..., 0] for part in parts]
    return torch.cat(values) if values else phi.new_zeros(0, phi.shape[1])


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive rows: values (E, B), lengths (S) with sum E -> (S, B). index_add would use atomics on GPUs."""
    if not values.numel():
        return values.new_zeros(len(lengths), values.shape[1])
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def _one_by_one(apply: Callable[..., Tensor], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """The rule of torch.func.vmap: one call per sample."""
    dims = [dim if isinstance(arg, Tensor) else None for dim, arg in zip(in_dims, args, strict=True)]
    results = [
        apply(*(arg if dim is None else arg.select(dim, sample) for arg, dim in zip(args, dims, strict=True)))
        for sample in range(size)
    ]
    return torch.stack(results), 0


class _EdgeOutput(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor | None, weight: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
        y = [x.new_zeros(0, len(edges.per_output), dtype=weight.dtype)]
        for _, phi, parts in _blocks(x, scale, edges, features, n):
            sums = _segment_sums(_values(phi, weight.to(phi.dtype), edges.place, parts), edges.per_output)
            y.append(sums.t().to(weight.dtype))
        return torch.cat(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, weight, *ctx.options = inputs
        ctx.save_for_backward(x, scale, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        edges, features, n = ctx.options
        need_x, need_scale, need_weight, *_ = ctx.needs_input_grad
        dx = d_scale = d_weight = None
        if need_x:
            dx = edge_input(x, weight, g, edges, features, n + 1)
            dx = dx if scale is None else scale * dx
        if need_scale:
            d_scale = edge_input(x, weight, g, edges, features, n)
        if need_weight:
            d_weight = edge_weight(x, scale, g, edges, features, n)
        return dx, d_scale, d_weight, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(edge_output, info.batch_size, in_dims, args)


class _EdgeInput(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, g: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
        place, outputs = edges.place[edges.by_input], edges.outputs[edges.by_input]
        dx = [x.new_zeros(0, len(edges.used))]
        for rows, phi, parts in _blocks(x, None, edges, features, n):
            values = _values(phi, weight.to(phi.dtype)[edges.by_input], place, parts)
            values = values * g[rows].to(phi.dtype).t().index_select(0, outputs)
            dx.append(_segment_sums(values, edges.per_used).t().to(x.dtype))
        return torch.zeros_like(x).index_copy(1, edges.used, torch.cat(dx))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, g, *ctx.options = inputs
        ctx.save_for_backward(x, weight, g)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Any:
        x, weight, g = ctx.saved_tensors
        edges, features, n = ctx.options
        need_x, need_weight, need_g, *_ = ctx.needs_input_grad
        dx = a * edge_input(x, weight, g, edges, features, n + 1) if need_x else None
        d_weight = edge_weight(x, a, g, edges, features, n) if need_weight else None
        dg = edge_output(x, a, weight, edges, features, n) if need_g else None
        return dx, d_weight, dg, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(edge_input, info.batch_size, in_dims, args)


class _EdgeWeight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor | None, g: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
        total = None
        for rows, phi, parts in _blocks(x, scale, edges, features, n):
            wide = g[rows].to(phi.dtype).t()
            sums = [
                torch.bmm(phi.index_select(0, edges.place[part]).mT, wide.index_select(0, edges.outputs[part])[..., None])
                for part in parts
            ]
            block = torch.cat(sums)[..., 0] if sums else phi.new_zeros(0, features.width())
            total = block if total is None else total + block
        if total is None:
            return g.new_zeros(len(edges.inputs), features.width())
        return total.to(g.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, g, *ctx.options = inputs
        ctx.save_for_backward(x, scale, g)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Any:
        x, scale, g = ctx.saved_tensors
        edges, features, n = ctx.options
        need_x, need_scale, need_g, *_ = ctx.needs_input_grad
        dx = d_scale = dg = None
        if need_x:
            dx = edge_input(x, a, g, edges, features, n + 1)
            dx = dx if scale is None else scale * dx
        if need_scale:
            d_scale = edge_input(x, a, g, edges, features, n)
        if need_g:
            dg = edge_output(x, scale, a, edges, features, n)
        return dx, d_scale, dg, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(edge_weight, info.batch_size, in_dims, args)
