"""The one door to the contractions: their derivatives, and what transforms and compilers see of them.

Three contractions of one trilinear form (phi^(n): n-th derivative of the features, W: spline and base weights)

    contract_output(x, s, W, n)[b, o]    = sum_{i, f} s[b, i] phi_f^(n)(x[b, i]) W[i, f, o]
    contract_input (x, W, g, n)[b, i]    = sum_{f, o} phi_f^(n)(x[b, i]) W[i, f, o] g[b, o]
    contract_weight(x, s, g, n)[i, f, o] = sum_b s[b, i] phi_f^(n)(x[b, i]) g[b, o]

and a fourth operation that fuses the first backward, contract_backward(x, W, g, n) = contract_input of order n + 1
and contract_weight of order n. The derivative of each is made of the others, so every order of differentiation stays
among them. Each formula stands once, in an autograd.Function; who arrives how:

- nothing to differentiate: the function of the backend is called directly;
- eager autograd, torch.func, forward mode: the Function;
- torch.compile, torch.export, fake tensors, other dispatch modes: the operator torch.ops.kan_fast.* (operators.py), whose
  kernels for autograd and torch.func are the same Function, so that even forward mode through it is right.

Arguments, shapes and dtypes are those of backends/reference.py, then the name of the backend; operators take "auto" too.
"""

from typing import Any

import torch
from torch import Tensor

from kan_fast import batching
from kan_fast.backends import choose, fake, get
from kan_fast.derivatives import Contraction, Maybe, enter, forward_rule, refuse_grid, save, saved, total, weighted
from kan_fast.operators import dispatched, forward_mode, register

_is_compiling = torch.compiler.is_compiling
_operators = torch.ops.kan_fast


def contract_output(
    x: Tensor,
    scale: Tensor | None,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
    backend: str,
) -> Tensor:
    """sum_{i, f} scale * phi_f^(n)(x) * weight -> (B, O), differentiable in x, scale and both weights."""
    args = x, scale, spline_weight, base_weight, grid, activation, outside, n, backend
    result: Tensor = _operators.contract_output(*args) if _is_compiling() else enter(_ContractOutput, args)
    return result


def contract_input(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
    backend: str,
) -> Tensor:
    """sum_{f, o} phi_f^(n)(x) * weight * g -> (B, I), differentiable in x, g and both weights."""
    args = x, spline_weight, base_weight, g, grid, activation, outside, n, backend
    result: Tensor = _operators.contract_input(*args) if _is_compiling() else enter(_ContractInput, args)
    return result


def contract_weight(
    x: Tensor,
    scale: Tensor | None,
    g: Tensor,
    grid: Tensor,
    spline_order: int,
    activation: str,
    outside: str,
    n: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """sum_b scale * phi_f^(n)(x) * g -> (I, G + k, O) and (I, O), differentiable in x, scale and g."""
    args = x, scale, g, grid, spline_order, activation, outside, n, backend
    result: tuple[Tensor, Tensor] = _operators.contract_weight(*args) if _is_compiling() else enter(_ContractWeight, args)
    return result


def contract_backward(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(contract_input of order n + 1, *contract_weight of order n), differentiable in x, g and both weights."""
    args = x, spline_weight, base_weight, g, grid, activation, outside, n, backend
    result: tuple[Tensor, Tensor, Tensor] = (
        _operators.contract_backward(*args) if _is_compiling() else enter(_ContractBackward, args)
    )
    return result


def _order(spline_weight: Tensor, grid: Tensor) -> int:
    return grid.shape[1] - spline_weight.shape[1] - 1


def _weights(d_spline: Maybe, d_base: Maybe, shape: Any, activation: str) -> tuple[Tensor, Maybe, str]:
    """A direction in weight space as (spline_weight, base_weight, activation): a missing part is zero."""
    if d_spline is None:
        assert d_base is not None
        d_spline = d_base.new_zeros(()).expand(shape)
    return d_spline, d_base, "none" if d_base is None else activation


def _run(name: str, args: tuple[Any, ...]) -> Any:
    """The operation itself, below autograd: by the operator where somebody watches, else by the backend."""
    if dispatched(args[0]):
        return getattr(_operators, name)(*args)
    return getattr(get(args[-1]), name)(*args[:-1])


class _ContractOutput(Contraction):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _run("contract_output", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, spline_weight, base_weight, grid, *ctx.options = inputs
        need_x, need_scale, _, _, need_grid, *_ = ctx.needs_input_grad
        if need_grid:
            refuse_grid()
        if need_x or need_scale or forward_mode():
            save(ctx, x, scale, spline_weight, base_weight, grid)
        else:  # linear in the weights, so their gradients do not read them
            ctx.order = _order(spline_weight, grid)
            save(ctx, x, scale, None, None, grid)

    @staticmethod
    def backward(ctx: Any, g: Maybe) -> Any:
        if g is None:
            return (None,) * 9
        x, scale, spline_weight, base_weight, grid = saved(ctx)
        activation, outside, n, backend = ctx.options
        need_x, need_scale, need_spline, need_base, *_ = ctx.needs_input_grad
        dx = d_scale = d_spline = d_base = None
        if need_x and scale is None and (need_spline or need_base):
            dx, d_spline, d_base = contract_backward(x, spline_weight, base_weight, g, grid, *ctx.options)
        else:
            if need_x:
                dx = contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend)
                dx = weighted(scale, dx)
            if need_scale:
                d_scale = contract_input(x, spline_weight, base_weight, g, grid, *ctx.options)
            if need_spline or need_base:
                order = ctx.order if spline_weight is None else _order(spline_weight, grid)
                d_spline, d_base = contract_weight(x, scale, g, grid, order, *ctx.options)
        return dx, d_scale, d_spline if need_spline else None, d_base if need_base else None, None, None, None, None, None

    @forward_rule
    def jvp(ctx: Any, known: Any, dx: Maybe, d_scale: Maybe, d_spline: Maybe, d_base: Maybe, d_grid: Maybe, *_: None) -> Maybe:
        if d_grid is not None:
            refuse_grid()
        x, scale, spline_weight, base_weight, grid = known
        activation, outside, n, backend = ctx.options
        by_x = by_scale = by_weight = None
        if dx is not None:
            scaled = weighted(scale, dx)
            by_x = contract_output(x, scaled, spline_weight, base_weight, grid, activation, outside, n + 1, backend)
        if d_scale is not None:
            by_scale = contract_output(x, d_scale, spline_weight, base_weight, grid, *ctx.options)
        if d_spline is not None or d_base is not None:
            d_spline, d_base, activation = _weights(d_spline, d_base, spline_weight.shape, activation)
            by_weight = contract_output(x, scale, d_spline, d_base, grid, activation, outside, n, backend)
        return total(by_x, by_scale, by_weight)

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.contract_output(contract_output, info.batch_size, in_dims, args)


class _ContractInput(Contraction):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _run("contract_input", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, spline_weight, base_weight, g, grid, *ctx.options = inputs
        need_x, need_spline, need_base, need_g, need_grid, *_ = ctx.needs_input_grad
        if need_grid:
            refuse_grid()
        ctx.order = _order(spline_weight, grid)
        if not (need_x or need_g or forward_mode()):
            spline_weight = base_weight = None
        if not (need_x or need_spline or need_base or forward_mode()):
            g = None
        save(ctx, x, spline_weight, base_weight, g, grid)

    @staticmethod
    def backward(ctx: Any, a: Maybe) -> Any:
        if a is None:
            return (None,) * 9
        x, spline_weight, base_weight, g, grid = saved(ctx)
        activation, outside, n, backend = ctx.options
        need_x, need_spline, need_base, need_g, *_ = ctx.needs_input_grad
        dx = d_spline = d_base = dg = None
        if need_x:
            dx = a * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend)
        if need_spline or need_base:
            d_spline, d_base = contract_weight(x, a, g, grid, ctx.order, *ctx.options)
        if need_g:
            dg = contract_output(x, a, spline_weight, base_weight, grid, *ctx.options)
        return dx, d_spline if need_spline else None, d_base if need_base else None, dg, None, None, None, None, None

    @forward_rule
    def jvp(ctx: Any, known: Any, dx: Maybe, d_spline: Maybe, d_base: Maybe, dg: Maybe, d_grid: Maybe, *_: None) -> Maybe:
        if d_grid is not None:
            refuse_grid()
        x, spline_weight, base_weight, g, grid = known
        activation, outside, n, backend = ctx.options
        by_x = by_weight = by_g = None
        if dx is not None:
            by_x = dx * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend)
        if dg is not None:
            by_g = contract_input(x, spline_weight, base_weight, dg, grid, *ctx.options)
        if d_spline is not None or d_base is not None:
            d_spline, d_base, activation = _weights(d_spline, d_base, spline_weight.shape, activation)
            by_weight = contract_input(x, d_spline, d_base, g, grid, activation, outside, n, backend)
        return total(by_x, by_weight, by_g)

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.contract_input(contract_input, info.batch_size, in_dims, args)


class _ContractWeight(Contraction):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _run("contract_weight", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, g, grid, *ctx.options = inputs
        need_x, need_scale, _, need_grid, *_ = ctx.needs_input_grad
        if need_grid:
            refuse_grid()
        ctx.set_materialize_grads(False)
        ctx.out_features = g.shape[1]
        save(ctx, x, scale, g if need_x or need_scale or forward_mode() else None, grid)

    @staticmethod
    def backward(ctx: Any, a_spline: Maybe, a_base: Maybe) -> Any:
        order, activation, outside, n, backend = ctx.options
        if activation == "none":
            a_base = None  # that of the empty second result
        if a_spline is None and a_base is None:
            return (None,) * 9
        x, scale, g, grid = saved(ctx)
        shape = x.shape[1], grid.shape[1] - order - 1, ctx.out_features
        a_spline, a_base, activation = _weights(a_spline, a_base, shape, activation)
        need_x, need_scale, need_g, *_ = ctx.needs_input_grad
        dx = d_scale = dg = None
        if need_x:
            dx = weighted(scale, contract_input(x, a_spline, a_base, g, grid, activation, outside, n + 1, backend))
        if need_scale:
            d_scale = contract_input(x, a_spline, a_base, g, grid, activation, outside, n, backend)
        if need_g:
            dg = contract_output(x, scale, a_spline, a_base, grid, activation, outside, n, backend)
        return dx, d_scale, dg, None, None, None, None, None, None

    @forward_rule
    def jvp(ctx: Any, known: Any, dx: Maybe, d_scale: Maybe, dg: Maybe, d_grid: Maybe, *_: None) -> Any:
        if d_grid is not None:
            refuse_grid()
        x, scale, g, grid = known
        order, activation, outside, n, backend = ctx.options
        terms = []
        if dx is not None:
            scaled = weighted(scale, dx)
            terms.append(contract_weight(x, scaled, g, grid, order, activation, outside, n + 1, backend))
        if d_scale is not None:
            terms.append(contract_weight(x, d_scale, g, grid, *ctx.options))
        if dg is not None:
            terms.append(contract_weight(x, scale, dg, grid, *ctx.options))
        return tuple(total(*parts) for parts in zip(*terms, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.contract_weight(contract_weight, info.batch_size, in_dims, args)


class _ContractBackward(Contraction):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _run("contract_backward", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, spline_weight, base_weight, g, grid, *ctx.options = inputs
        if ctx.needs_input_grad[4]:
            refuse_grid()
        ctx.set_materialize_grads(False)
        save(ctx, x, spline_weight, base_weight, g, grid)

    @staticmethod
    def backward(ctx: Any, a: Maybe, a_spline: Maybe, a_base: Maybe) -> Any:
        x, spline_weight, base_weight, g, grid = saved(ctx)
        activation, outside, n, backend = ctx.options
        need_x, need_spline, need_base, need_g, *_ = ctx.needs_input_grad
        dx = d_spline = d_base = dg = None
        if a is not None:
            if need_x:
                dx = a * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 2, backend)
            if need_spline or need_base:
                order = _order(spline_weight, grid)
                d_spline, d_base = contract_weight(x, a, g, grid, order, activation, outside, n + 1, backend)
            if need_g:
                dg = contract_output(x, a, spline_weight, base_weight, grid, activation, outside, n + 1, backend)
        if base_weight is None:
            a_base = None  # that of the empty third result
        if a_spline is not None or a_base is not None:
            a_spline, a_base, activation = _weights(a_spline, a_base, spline_weight.shape, activation)
            if need_x:
                by_weight = contract_input(x, a_spline, a_base, g, grid, activation, outside, n + 1, backend)
                dx = total(dx, by_weight)
            if need_g:
                dg = total(dg, contract_output(x, None, a_spline, a_base, grid, activation, outside, n, backend))
        return dx, d_spline if need_spline else None, d_base if need_base else None, dg, None, None, None, None, None

    @forward_rule
    def jvp(ctx: Any, known: Any, dx: Maybe, d_spline: Maybe, d_base: Maybe, dg: Maybe, d_grid: Maybe, *_: None) -> Any:
        if d_grid is not None:
            refuse_grid()
        x, spline_weight, base_weight, g, grid = known
        activation, outside, n, backend = ctx.options
        order = _order(spline_weight, grid)
        d_input: list[Tensor] = []
        d_weight: list[tuple[Tensor, Tensor]] = []
        if dx is not None:
            by_x = contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 2, backend)
            d_input.append(dx * by_x)
            d_weight.append(contract_weight(x, dx, g, grid, order, activation, outside, n + 1, backend))
        if dg is not None:
            d_input.append(contract_input(x, spline_weight, base_weight, dg, grid, activation, outside, n + 1, backend))
            d_weight.append(contract_weight(x, None, dg, grid, order, *ctx.options))
        if d_spline is not None or d_base is not None:
            d_spline, d_base, activation = _weights(d_spline, d_base, spline_weight.shape, activation)
            d_input.append(contract_input(x, d_spline, d_base, g, grid, activation, outside, n + 1, backend))
        if not d_weight:  # weights alone have tangents, which their own gradients do not depend on
            empty = x.new_zeros(0, g.shape[1]) if base_weight is None else torch.zeros_like(base_weight)
            return total(*d_input), torch.zeros_like(spline_weight), empty
        return total(*d_input), *(total(*parts) for parts in zip(*d_weight, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> Any:
        return batching.contract_backward((contract_input, contract_weight), info.batch_size, in_dims, args)


def _register(name: str, arguments: str, results: str, weight_at: int, function: type[Contraction]) -> None:
    """The operator of a contraction; "auto" chooses by the dtype of the argument at `weight_at`, that of weights."""

    def chosen(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return *args[:-1], choose(args[-1], args[0].device, args[weight_at].dtype)

    def compute(*args: Any) -> Any:
        *rest, backend = chosen(args)
        return getattr(get(backend), name)(*rest)

    def without_values(*args: Any) -> Any:
        return getattr(fake, name)(*args[:-1])

    options = "str activation, str outside, int n, str backend"
    register(f"{name}({arguments}, {options}) -> {results}", function, compute, without_values, chosen)


_WEIGHTS = "Tensor spline_weight, Tensor? base_weight"
_register("contract_output", f"Tensor x, Tensor? scale, {_WEIGHTS}, Tensor grid", "Tensor", 2, _ContractOutput)
_register("contract_input", f"Tensor x, {_WEIGHTS}, Tensor g, Tensor grid", "Tensor", 1, _ContractInput)
_register(
    "contract_weight",
    "Tensor x, Tensor? scale, Tensor g, Tensor grid, int spline_order",
    "(Tensor, Tensor)",
    2,
    _ContractWeight,
)
_register(
    "contract_backward", f"Tensor x, {_WEIGHTS}, Tensor g, Tensor grid", "(Tensor, Tensor, Tensor)", 1, _ContractBackward
)
