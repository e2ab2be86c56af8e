"""Contractions over a list of edges: time and memory follow the number of edges, not in * out.

An edge e leads from an input i(e) to an output o(e) and has its own weights. With the features phi of an input (the base
activation, then the bases; n-th derivatives) the form of kan_fast.ops becomes

    T_n(x; s, W, g) = sum_{b, e, f} s[b, i(e)] phi_f^(n)(x[b, i(e)]) W[e, f] g[b, o(e)]

and its partial contractions, like those, have one another as derivatives, so every order is right:

    edge_output(x, s, W)[b, o] = sum_{e -> o, f} s phi^(n) W
    edge_input (x, W, g)[b, i] = sum_{e <- i, f} phi^(n) W g
    edge_weight(x, s, g)[e, f] = sum_b s phi^(n) g

Plain PyTorch, on every device. Features and products exist in chunks of CHUNK_ELEMENTS numbers only; sums run over an
edge list in a fixed order, so results are the same bits on every run. Like the contractions of kan_fast.ops they are
operators torch.ops.kan_fast.edge_* to tracers, with derivatives in every mode; WHOLE has them without chunks, for exporters.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kan_fast import batching
from kan_fast.activations import activation as activation_function
from kan_fast.autocast import beneath_autocast
from kan_fast.chunks import chunks
from kan_fast.derivatives import Contraction, Maybe, enter, forward_rule, refuse_grid, save, saved, total, weighted
from kan_fast.operators import dispatched, register
from kan_fast.spline import bases

_is_compiling = torch.compiler.is_compiling
_operators = torch.ops.kan_fast


class Edges(NamedTuple):
    """What the contractions need to know of edges that are sorted by output.

    used (U,): inputs that have edges; place (E,): the edge's input among them. outputs (E,); per_output (out,): number of
    edges. by_input (E,): the edges sorted by input, edges of one input in order; per_used (U,): their number. All int64.
    """

    used: Tensor
    place: Tensor
    outputs: Tensor
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
    return Edges(used, place, outputs, torch.bincount(outputs, minlength=out_features), by_input, per_input[used])


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


def edge_output(x: Tensor, scale: Maybe, weight: Tensor, edges: Edges, features: Features, n: int = 0) -> Tensor:
    """x (B, in), scale (B, in) or None, weight (E, features.width()) -> (B, out) of weight's dtype; differentiable."""
    return _edge_output(x, scale, weight, *_rest(edges, features, n))


def edge_input(x: Tensor, weight: Tensor, g: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
    """x (B, in), weight (E, features.width()), g (B, out) -> (B, in) of x's dtype; differentiable."""
    return _edge_input(x, weight, g, *_rest(edges, features, n))


def edge_weight(x: Tensor, scale: Maybe, g: Tensor, edges: Edges, features: Features, n: int) -> Tensor:
    """x (B, in), scale (B, in) or None, g (B, out) -> (E, features.width()) of g's dtype; differentiable."""
    return _edge_weight(x, scale, g, *_rest(edges, features, n))


# Operators have no tuples: three tensors, then these.
_REST = (
    "Tensor? grid, Tensor used, Tensor place, Tensor outputs, Tensor per_output, Tensor by_input, Tensor per_used,"
    " str activation, int spline_order, str outside, int n"
)


def _rest(edges: Edges, features: Features, n: int) -> tuple[Any, ...]:
    return features.grid, *edges, features.activation, features.spline_order, features.outside, n


def _packed(rest: tuple[Any, ...]) -> tuple[Edges, Features, int]:
    grid, *index, activation, spline_order, outside, n = rest
    return Edges(*index), Features(activation, grid, spline_order, outside), n


def _edge_output(*args: Any) -> Tensor:
    result: Tensor = _operators.edge_output(*args) if _is_compiling() else enter(_EdgeOutput, args)
    return result


def _edge_input(*args: Any) -> Tensor:
    result: Tensor = _operators.edge_input(*args) if _is_compiling() else enter(_EdgeInput, args)
    return result


def _edge_weight(*args: Any) -> Tensor:
    result: Tensor = _operators.edge_weight(*args) if _is_compiling() else enter(_EdgeWeight, args)
    return result


@beneath_autocast
def _compute_output(x: Tensor, scale: Maybe, weight: Tensor, *rest: Any) -> Tensor:
    edges, features, n = _packed(rest)
    y = [x.new_zeros(0, len(edges.per_output), dtype=weight.dtype)]
    for _, phi, parts in _blocks(x, scale, edges, features, n):
        sums = _segment_sums(_values(phi, weight.to(phi.dtype), edges.place, parts), edges.per_output)
        y.append(sums.t().to(weight.dtype))
    return torch.cat(y)


@beneath_autocast
def _compute_input(x: Tensor, weight: Tensor, g: Tensor, *rest: Any) -> Tensor:
    edges, features, n = _packed(rest)
    place, outputs = edges.place[edges.by_input], edges.outputs[edges.by_input]
    dx = [x.new_zeros(0, len(edges.used))]
    for rows, phi, parts in _blocks(x, None, edges, features, n):
        values = _values(phi, weight.to(phi.dtype)[edges.by_input], place, parts)
        values = values * g[rows].to(phi.dtype).t().index_select(0, outputs)
        dx.append(_segment_sums(values, edges.per_used).t().to(x.dtype))
    return x.new_zeros(x.shape).index_copy(1, edges.used, torch.cat(dx))


@beneath_autocast
def _compute_weight(x: Tensor, scale: Maybe, g: Tensor, *rest: Any) -> Tensor:
    edges, features, n = _packed(rest)
    sum_of_blocks = None
    for rows, phi, parts in _blocks(x, scale, edges, features, n):
        wide = g[rows].to(phi.dtype).t()
        sums = [
            torch.bmm(phi.index_select(0, edges.place[part]).mT, wide.index_select(0, edges.outputs[part])[..., None])
            for part in parts
        ]
        block = torch.cat(sums)[..., 0] if sums else phi.new_zeros(0, features.width())
        sum_of_blocks = block if sum_of_blocks is None else sum_of_blocks + block
    if sum_of_blocks is None:
        return g.new_zeros(len(edges.place), features.width())
    return sum_of_blocks.to(g.dtype)


def _blocks(x: Tensor, scale: Maybe, edges: Edges, features: Features, n: int) -> Iterator[tuple[slice, Tensor, list[slice]]]:
    """Rows of x, scale * phi^(n) there (U, rows, F), and slices of the edges whose products with the rows fit a chunk."""
    width = features.width()
    num_edges, num_used = len(edges.place), len(edges.used)
    for rows in chunks(len(x), max(num_edges, num_used * width)):
        phi = _features(x[rows], None if scale is None else scale[rows], edges, features, n)
        yield rows, phi, list(chunks(num_edges, phi.shape[1] * width))


def _features(x: Tensor, scale: Maybe, edges: Edges, features: Features, n: int) -> Tensor:
    """x (B, in), scale (B, in) or None -> scale * phi^(n), (U, B, F)"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    phi = features.at(x.index_select(1, edges.used).to(dtype), edges.used, n)
    return phi if scale is None else phi * scale.index_select(1, edges.used).to(dtype).t()[..., None]


def _values(phi: Tensor, weight: Tensor, place: Tensor, parts: list[slice]) -> Tensor:
    """phi (U, B, F), weight (E, F), place (E) -> every edge's value (E, B)"""
    values = [torch.bmm(phi.index_select(0, place[part]), weight[part, :, None])[..., 0] for part in parts]
    return torch.cat(values) if values else phi.new_zeros(0, phi.shape[1])


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive rows: values (E, B), lengths (S) with sum E -> (S, B). index_add would use atomics on GPUs."""
    if not values.numel():
        return values.new_zeros(len(lengths), values.shape[1])
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def _whole_output(x: Tensor, scale: Maybe, weight: Tensor, *rest: Any) -> Tensor:
    edges, features, n = _packed(rest)
    phi = _features(x, scale, edges, features, n)
    values = (phi.index_select(0, edges.place) * weight.to(phi.dtype)[:, None]).sum(2)
    return _scatter(values, edges.outputs, edges.per_output.shape[0]).t().to(weight.dtype)


def _whole_input(x: Tensor, weight: Tensor, g: Tensor, *rest: Any) -> Tensor:
    edges, features, n = _packed(rest)
    phi = _features(x, None, edges, features, n)
    values = (phi.index_select(0, edges.place) * weight.to(phi.dtype)[:, None]).sum(2)
    values = values * g.to(phi.dtype).t().index_select(0, edges.outputs)
    return _scatter(values, edges.used.index_select(0, edges.place), x.shape[1]).t().to(x.dtype)


def _whole_weight(x: Tensor, scale: Maybe, g: Tensor, *rest: Any) -> Tensor:
    edges, features, n = _packed(rest)
    phi = _features(x, scale, edges, features, n)
    wide = g.to(phi.dtype).t().index_select(0, edges.outputs)
    return (phi.index_select(0, edges.place) * wide[..., None]).sum(1).to(g.dtype)


def _scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of the rows of equal index: values (E, B), index (E,) -> (size, B)"""
    return values.new_zeros(size, values.shape[1]).scatter_add(0, index[:, None].expand(values.shape), values)


class _Edge(Contraction):
    """Arguments: three tensors, the grid, the edges, the rest."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if ctx.needs_input_grad[3]:
            refuse_grid()
        save(ctx, *inputs[:10])
        ctx.options = inputs[10:]


def _known(ctx: Any, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """What setup_context saved: three tensors, edges, features, n."""
    *three, grid = tensors[:4]
    return *three, *_packed((grid, *tensors[4:], *ctx.options))


def _scaled_jvp(operation: Callable[..., Tensor]) -> Any:
    """Of an operation (x, scale, third, edges, features, n) that is linear in scale and in the third tensor."""

    @forward_rule
    def jvp(ctx: Any, known: Any, dx: Maybe, d_scale: Maybe, d_third: Maybe, d_grid: Maybe, *_: None) -> Maybe:
        if d_grid is not None:
            refuse_grid()
        x, scale, third, edges, features, n = _known(ctx, known)
        return total(
            None if dx is None else operation(x, weighted(scale, dx), third, edges, features, n + 1),
            None if d_scale is None else operation(x, d_scale, third, edges, features, n),
            None if d_third is None else operation(x, scale, d_third, edges, features, n),
        )

    return jvp


class _EdgeOutput(_Edge):
    @staticmethod
    def forward(*args: Any) -> Any:
        return (_operators.edge_output if dispatched(args[0]) else _compute_output)(*args)

    @staticmethod
    def backward(ctx: Any, g: Maybe) -> Any:
        dx = d_scale = d_weight = None
        if g is not None:
            x, scale, weight, edges, features, n = _known(ctx, saved(ctx))
            need_x, need_scale, need_weight, *_ = ctx.needs_input_grad
            if need_x:
                dx = weighted(scale, edge_input(x, weight, g, edges, features, n + 1))
            if need_scale:
                d_scale = edge_input(x, weight, g, edges, features, n)
            if need_weight:
                d_weight = edge_weight(x, scale, g, edges, features, n)
        return dx, d_scale, d_weight, *(None,) * 11

    jvp = _scaled_jvp(edge_output)

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.by_rows(_edge_output, info.batch_size, in_dims, args, rows=(0, 1))


class _EdgeInput(_Edge):
    @staticmethod
    def forward(*args: Any) -> Any:
        return (_operators.edge_input if dispatched(args[0]) else _compute_input)(*args)

    @staticmethod
    def backward(ctx: Any, a: Maybe) -> Any:
        dx = d_weight = dg = None
        if a is not None:
            x, weight, g, edges, features, n = _known(ctx, saved(ctx))
            need_x, need_weight, need_g, *_ = ctx.needs_input_grad
            dx = a * edge_input(x, weight, g, edges, features, n + 1) if need_x else None
            d_weight = edge_weight(x, a, g, edges, features, n) if need_weight else None
            dg = edge_output(x, a, weight, edges, features, n) if need_g else None
        return dx, d_weight, dg, *(None,) * 11

    @forward_rule
    def jvp(ctx: Any, known: Any, dx: Maybe, d_weight: Maybe, dg: Maybe, d_grid: Maybe, *_: None) -> Maybe:
        if d_grid is not None:
            refuse_grid()
        x, weight, g, edges, features, n = _known(ctx, known)
        return total(
            None if dx is None else dx * edge_input(x, weight, g, edges, features, n + 1),
            None if d_weight is None else edge_input(x, d_weight, g, edges, features, n),
            None if dg is None else edge_input(x, weight, dg, edges, features, n),
        )

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.by_rows(_edge_input, info.batch_size, in_dims, args, rows=(0, 2))


class _EdgeWeight(_Edge):
    @staticmethod
    def forward(*args: Any) -> Any:
        return (_operators.edge_weight if dispatched(args[0]) else _compute_weight)(*args)

    @staticmethod
    def backward(ctx: Any, a: Maybe) -> Any:
        dx = d_scale = dg = None
        if a is not None:
            x, scale, g, edges, features, n = _known(ctx, saved(ctx))
            need_x, need_scale, need_g, *_ = ctx.needs_input_grad
            if need_x:
                dx = weighted(scale, edge_input(x, a, g, edges, features, n + 1))
            if need_scale:
                d_scale = edge_input(x, a, g, edges, features, n)
            if need_g:
                dg = edge_output(x, scale, a, edges, features, n)
        return dx, d_scale, dg, *(None,) * 11

    jvp = _scaled_jvp(edge_weight)

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.by_rows(_edge_weight, info.batch_size, in_dims, args, rows=())


def _fake_output(x: Tensor, scale: Maybe, weight: Tensor, *rest: Any) -> Tensor:
    edges, _, _ = _packed(rest)
    return weight.new_empty(x.shape[0], edges.per_output.shape[0])


def _fake_input(x: Tensor, weight: Tensor, g: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_weight(x: Tensor, scale: Maybe, g: Tensor, *rest: Any) -> Tensor:
    edges, features, _ = _packed(rest)
    return g.new_empty(edges.place.shape[0], features.width())


register(f"edge_output(Tensor x, Tensor? scale, Tensor weight, {_REST}) -> Tensor", _EdgeOutput, _compute_output, _fake_output)
register(f"edge_input(Tensor x, Tensor weight, Tensor g, {_REST}) -> Tensor", _EdgeInput, _compute_input, _fake_input)
register(f"edge_weight(Tensor x, Tensor? scale, Tensor g, {_REST}) -> Tensor", _EdgeWeight, _compute_weight, _fake_weight)

# Operator -> the same without chunks, of operators that exporters know.
WHOLE: dict[Any, Callable[..., Tensor]] = {
    _operators.edge_output.default: _whole_output,
    _operators.edge_input.default: _whole_input,
    _operators.edge_weight.default: _whole_weight,
}
