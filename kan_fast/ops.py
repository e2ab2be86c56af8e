"""The one door to the contractions: their derivatives, their batching rules, and what compilers see of them.

Three contractions of one trilinear form (phi^(n): n-th derivative of the features, W: spline and base weights)

    contract_output(x, s, W, n)[b, o]    = sum_{i, f} s[b, i] phi_f^(n)(x[b, i]) W[i, f, o]
    contract_input (x, W, g, n)[b, i]    = sum_{f, o} phi_f^(n)(x[b, i]) W[i, f, o] g[b, o]
    contract_weight(x, s, g, n)[i, f, o] = sum_b s[b, i] phi_f^(n)(x[b, i]) g[b, o]

and a fourth operation that fuses the first backward, contract_backward(x, W, g, n) = contract_input of order n + 1
and contract_weight of order n. The derivative of each is made of the others, so every order of differentiation stays
among them. Each formula stands once, in an autograd.Function; who arrives how:

- nothing to differentiate: the function of the backend is called directly;
- eager autograd, torch.func, forward mode: the Function;
- torch.compile, torch.export, fake tensors, other dispatch modes: the operator torch.ops.kan_fast.*, whose autograd
  kernel is the same Function, so that forward mode through it is right too.

Shapes and dtypes are those of backends/reference.py, whose arguments `backend` follows.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from kan_fast import batching
from kan_fast.backends import get
from kan_fast.checks import check_problem

_C = torch._C
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
    if _is_compiling():
        return _operators.contract_output(x, scale, spline_weight, base_weight, grid, activation, outside, n, backend)
    if _tracked(x, scale, spline_weight, base_weight, grid):
        return _ContractOutput.apply(x, scale, spline_weight, base_weight, grid, activation, outside, n, backend)
    if _dispatched(x):
        return _operators.contract_output(x, scale, spline_weight, base_weight, grid, activation, outside, n, backend)
    return get(backend).contract_output(x, scale, spline_weight, base_weight, grid, activation, outside, n)


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
    if _is_compiling():
        return _operators.contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    if _tracked(x, spline_weight, base_weight, g, grid):
        return _ContractInput.apply(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    if _dispatched(x):
        return _operators.contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    return get(backend).contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n)


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
    if _is_compiling():
        return _operators.contract_weight(x, scale, g, grid, spline_order, activation, outside, n, backend)
    if _tracked(x, scale, g, grid):
        return _ContractWeight.apply(x, scale, g, grid, spline_order, activation, outside, n, backend)
    if _dispatched(x):
        return _operators.contract_weight(x, scale, g, grid, spline_order, activation, outside, n, backend)
    return get(backend).contract_weight(x, scale, g, grid, spline_order, activation, outside, n)


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
    if _is_compiling():
        return _operators.contract_backward(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    if _tracked(x, spline_weight, base_weight, g, grid):
        return _ContractBackward.apply(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    if _dispatched(x):
        return _operators.contract_backward(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    return get(backend).contract_backward(x, spline_weight, base_weight, g, grid, activation, outside, n)


def _tracked(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for, or a torch.func transform is at work."""
    return (
        (torch.is_grad_enabled() and _C._any_requires_grad(*tensors))
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _dispatched(x: Tensor) -> bool:
    """Whether the call must be seen by a dispatch mode or a tensor subclass (fake tensors, tracing, counters)."""
    return _C._len_torch_dispatch_stack() > 0 or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)


class _Contraction(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """torch's own, without binding the signature anew on every call (29 us of its 35 in torch 2.13)."""
        if _C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """Saved tensors; those that a finished torch.func transform wrapped come unwrapped (torch.func.vjp needs it)."""
    unwrap = torch._C._functorch.unwrap_if_dead
    return tuple(None if tensor is None else unwrap(tensor) for tensor in ctx.saved_tensors)


def _refuse_grid(tangent_or_flag: Tensor | bool | None) -> None:
    if tangent_or_flag is not None and tangent_or_flag is not False:
        raise RuntimeError("grid: knots are not differentiable, expected a grid that does not require grad")


def _weights(d_spline: Tensor | None, d_base: Tensor | None, like: tuple[int, ...], activation: str) -> Any:
    """A direction in weight space as (spline_weight, base_weight, activation): a missing part is zero."""
    if d_spline is None:
        assert d_base is not None
        d_spline = d_base.new_zeros(()).expand(like)
    return d_spline, d_base, "none" if d_base is None else activation


def _product(scale: Tensor | None, factor: Tensor) -> Tensor:
    return factor if scale is None else scale * factor


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class _ContractOutput(_Contraction):
    @staticmethod
    def forward(x, scale, spline_weight, base_weight, grid, activation, outside, n, backend):
        if _dispatched(x):
            return _operators.contract_output(x, scale, spline_weight, base_weight, grid, activation, outside, n, backend)
        return get(backend).contract_output(x, scale, spline_weight, base_weight, grid, activation, outside, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, spline_weight, base_weight, grid, *ctx.options = inputs
        need_x, need_scale, _, _, need_grid, *_ = ctx.needs_input_grad
        _refuse_grid(need_grid)
        ctx.order = grid.shape[1] - spline_weight.shape[1] - 1
        if not (need_x or need_scale or forward_ad._current_level >= 0):
            spline_weight = base_weight = None  # linear in the weights: their gradient does not read them
        _save(ctx, x, scale, spline_weight, base_weight, grid)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 9
        x, scale, spline_weight, base_weight, grid = _saved(ctx)
        activation, outside, n, backend = ctx.options
        need_x, need_scale, need_spline, need_base, *_ = ctx.needs_input_grad
        dx = d_scale = d_spline = d_base = None
        if need_x and scale is None and (need_spline or need_base):
            dx, d_spline, d_base = contract_backward(x, spline_weight, base_weight, g, grid, *ctx.options)
        else:
            if need_x:
                dx = contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend)
                dx = _product(scale, dx)
            if need_scale:
                d_scale = contract_input(x, spline_weight, base_weight, g, grid, *ctx.options)
            if need_spline or need_base:
                d_spline, d_base = contract_weight(x, scale, g, grid, ctx.order, *ctx.options)
        return dx, d_scale, d_spline if need_spline else None, d_base if need_base else None, *(None,) * 5

    @staticmethod
    def jvp(ctx, dx, d_scale, d_spline, d_base, d_grid, *_):
        _refuse_grid(d_grid)
        x, scale, spline_weight, base_weight, grid = ctx.saved_tensors
        activation, outside, n, backend = ctx.options
        by_x = by_scale = by_weight = None
        if dx is not None:
            scaled = _product(scale, dx)
            by_x = contract_output(x, scaled, spline_weight, base_weight, grid, activation, outside, n + 1, backend)
        if d_scale is not None:
            by_scale = contract_output(x, d_scale, spline_weight, base_weight, grid, *ctx.options)
        if d_spline is not None or d_base is not None:
            d_spline, d_base, activation = _weights(d_spline, d_base, spline_weight.shape, activation)
            by_weight = contract_output(x, scale, d_spline, d_base, grid, activation, outside, n, backend)
        return _sum(by_x, by_scale, by_weight)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.contract_output(contract_output, info.batch_size, in_dims, args)


class _ContractInput(_Contraction):
    @staticmethod
    def forward(x, spline_weight, base_weight, g, grid, activation, outside, n, backend):
        if _dispatched(x):
            return _operators.contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
        return get(backend).contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, spline_weight, base_weight, g, grid, *ctx.options = inputs
        need_x, need_spline, need_base, need_g, need_grid, *_ = ctx.needs_input_grad
        _refuse_grid(need_grid)
        ctx.order = grid.shape[1] - spline_weight.shape[1] - 1
        forward_mode = forward_ad._current_level >= 0
        if not (need_x or need_g or forward_mode):
            spline_weight = base_weight = None
        if not (need_x or need_spline or need_base or forward_mode):
            g = None
        _save(ctx, x, spline_weight, base_weight, g, grid)

    @staticmethod
    def backward(ctx, a):
        if a is None:
            return (None,) * 9
        x, spline_weight, base_weight, g, grid = _saved(ctx)
        activation, outside, n, backend = ctx.options
        need_x, need_spline, need_base, need_g, *_ = ctx.needs_input_grad
        dx = d_spline = d_base = dg = None
        if need_x:
            dx = a * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend)
        if need_spline or need_base:
            d_spline, d_base = contract_weight(x, a, g, grid, ctx.order, *ctx.options)
        if need_g:
            dg = contract_output(x, a, spline_weight, base_weight, grid, *ctx.options)
        return dx, d_spline if need_spline else None, d_base if need_base else None, dg, *(None,) * 5

    @staticmethod
    def jvp(ctx, dx, d_spline, d_base, dg, d_grid, *_):
        _refuse_grid(d_grid)
        x, spline_weight, base_weight, g, grid = ctx.saved_tensors
        activation, outside, n, backend = ctx.options
        by_x = by_weight = by_g = None
        if dx is not None:
            by_x = dx * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1, backend)
        if dg is not None:
            by_g = contract_input(x, spline_weight, base_weight, dg, grid, *ctx.options)
        if d_spline is not None or d_base is not None:
            d_spline, d_base, activation = _weights(d_spline, d_base, spline_weight.shape, activation)
            by_weight = contract_input(x, d_spline, d_base, g, grid, activation, outside, n, backend)
        return _sum(by_x, by_weight, by_g)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.contract_input(contract_input, info.batch_size, in_dims, args)


class _ContractWeight(_Contraction):
    @staticmethod
    def forward(x, scale, g, grid, spline_order, activation, outside, n, backend):
        if _dispatched(x):
            return _operators.contract_weight(x, scale, g, grid, spline_order, activation, outside, n, backend)
        return get(backend).contract_weight(x, scale, g, grid, spline_order, activation, outside, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, g, grid, *ctx.options = inputs
        need_x, need_scale, _, need_grid, *_ = ctx.needs_input_grad
        _refuse_grid(need_grid)
        if not (need_x or need_scale or forward_ad._current_level >= 0):
            g = None
        _save(ctx, x, scale, g, grid)

    @staticmethod
    def backward(ctx, a_spline, a_base):
        order, activation, outside, n, backend = ctx.options
        if activation == "none":
            a_base = None  # the empty second result
        if a_spline is None and a_base is None:
            return (None,) * 9
        x, scale, g, grid = _saved(ctx)
        num_bases = grid.shape[1] - order - 1
        like = (x.shape[1], num_bases, (a_base if a_spline is None else a_spline).shape[-1])
        a_spline, a_base, activation = _weights(a_spline, a_base, like, activation)
        need_x, need_scale, need_g, *_ = ctx.needs_input_grad
        dx = d_scale = dg = None
        if need_x:
            dx = contract_input(x, a_spline, a_base, g, grid, activation, outside, n + 1, backend)
            dx = _product(scale, dx)
        if need_scale:
            d_scale = contract_input(x, a_spline, a_base, g, grid, activation, outside, n, backend)
        if need_g:
            dg = contract_output(x, scale, a_spline, a_base, grid, activation, outside, n, backend)
        return dx, d_scale, dg, *(None,) * 6

    @staticmethod
    def jvp(ctx, dx, d_scale, dg, d_grid, *_):
        _refuse_grid(d_grid)
        x, scale, g, grid = ctx.saved_tensors
        order, activation, outside, n, backend = ctx.options
        terms = []
        if dx is not None:
            scaled = _product(scale, dx)
            terms.append(contract_weight(x, scaled, g, grid, order, activation, outside, n + 1, backend))
        if d_scale is not None:
            terms.append(contract_weight(x, d_scale, g, grid, *ctx.options))
        if dg is not None:
            terms.append(contract_weight(x, scale, dg, grid, *ctx.options))
        return tuple(_sum(*parts) for parts in zip(*terms, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.contract_weight(contract_weight, info.batch_size, in_dims, args)


class _ContractBackward(_Contraction):
    @staticmethod
    def forward(x, spline_weight, base_weight, g, grid, activation, outside, n, backend):
        if _dispatched(x):
            return _operators.contract_backward(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
        return get(backend).contract_backward(x, spline_weight, base_weight, g, grid, activation, outside, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, spline_weight, base_weight, g, grid, *ctx.options = inputs
        _refuse_grid(ctx.needs_input_grad[4])
        ctx.order = grid.shape[1] - spline_weight.shape[1] - 1
        _save(ctx, x, spline_weight, base_weight, g, grid)

    @staticmethod
    def backward(ctx, a, a_spline, a_base):
        x, spline_weight, base_weight, g, grid = _saved(ctx)
        activation, outside, n, backend = ctx.options
        need_x, need_spline, need_base, need_g, *_ = ctx.needs_input_grad
        dx = d_spline = d_base = dg = None
        if a is not None:
            if need_x:
                dx = a * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 2, backend)
            if need_spline or need_base:
                d_spline, d_base = contract_weight(x, a, g, grid, ctx.order, activation, outside, n + 1, backend)
            if need_g:
                dg = contract_output(x, a, spline_weight, base_weight, grid, activation, outside, n + 1, backend)
        if base_weight is None:
            a_base = None  # the empty third result
        if a_spline is not None or a_base is not None:
            weights = _weights(a_spline, a_base, spline_weight.shape, activation)
            a_spline, a_base, activation = weights
            if need_x:
                by_weight = contract_input(x, a_spline, a_base, g, grid, activation, outside, n + 1, backend)
                dx = _sum(dx, by_weight)
            if need_g:
                by_weight = contract_output(x, None, a_spline, a_base, grid, activation, outside, n, backend)
                dg = _sum(dg, by_weight)
        return dx, d_spline if need_spline else None, d_base if need_base else None, dg, *(None,) * 5

    @staticmethod
    def jvp(ctx, dx, d_spline, d_base, dg, d_grid, *_):
        _refuse_grid(d_grid)
        x, spline_weight, base_weight, g, grid = ctx.saved_tensors
        activation, outside, n, backend = ctx.options
        weights = d_input = None
        terms = []
        if dx is not None:
            d_input = dx * contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 2, backend)
            terms.append(contract_weight(x, dx, g, grid, ctx.order, activation, outside, n + 1, backend))
        if dg is not None:
            by_g = contract_input(x, spline_weight, base_weight, dg, grid, activation, outside, n + 1, backend)
            d_input = _sum(d_input, by_g)
            terms.append(contract_weight(x, None, dg, grid, ctx.order, *ctx.options))
        if d_spline is not None or d_base is not None:
            d_spline, d_base, activation = _weights(d_spline, d_base, spline_weight.shape, activation)
            by_weight = contract_input(x, d_spline, d_base, g, grid, activation, outside, n + 1, backend)
            d_input = _sum(d_input, by_weight)
        weights = [_sum(*parts) for parts in zip(*terms, strict=True)] or [None, None]
        return d_input, *weights

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.contract_backward((contract_input, contract_weight), info.batch_size, in_dims, args)


def _fake_contract_output(x, scale, spline_weight, base_weight, grid, activation, outside, n, backend):
    check_problem(x, scale, spline_weight, base_weight, None, grid, None, activation, outside, n)
    return spline_weight.new_empty(x.shape[0], spline_weight.shape[2])


def _fake_contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n, backend):
    check_problem(x, None, spline_weight, base_weight, g, grid, None, activation, outside, n)
    return x.new_empty(x.shape)


def _fake_contract_weight(x, scale, g, grid, spline_order, activation, outside, n, backend):
    check_problem(x, scale, None, None, g, grid, spline_order, activation, outside, n)
    in_features, out_features = x.shape[1], g.shape[1]
    d_spline = g.new_empty(in_features, grid.shape[1] - spline_order - 1, out_features)
    return d_spline, g.new_empty(0 if activation == "none" else in_features, out_features)


def _fake_contract_backward(x, spline_weight, base_weight, g, grid, activation, outside, n, backend):
    order = grid.shape[1] - spline_weight.shape[1] - 1
    dx = _fake_contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n, backend)
    return dx, *_fake_contract_weight(x, None, g, grid, order, activation, outside, n, backend)


def _autograd_kernel(function: type[_Contraction], operator: Any) -> Any:
    def kernel(keyset: Any, *args: Any) -> Any:
        differentiate = torch.is_grad_enabled() and _C._any_requires_grad(*args)
        if differentiate or (forward_ad._current_level >= 0 and _C._is_fwd_grad_enabled()):
            return function.apply(*args)
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *args)

    return kernel


def _backend_kernel(name: str) -> Any:
    def kernel(*args: Any) -> Any:
        return getattr(get(args[-1]), name)(*args[:-1])

    return kernel


_OPTIONS = "str activation, str outside, int n, str backend"
_WEIGHTS = "Tensor spline_weight, Tensor? base_weight"
_SCHEMAS = {
    "contract_output": (f"(Tensor x, Tensor? scale, {_WEIGHTS}, Tensor grid, {_OPTIONS}) -> Tensor", _ContractOutput, _fake_contract_output),
    "contract_input": (f"(Tensor x, {_WEIGHTS}, Tensor g, Tensor grid, {_OPTIONS}) -> Tensor", _ContractInput, _fake_contract_input),
    "contract_weight": (
        f"(Tensor x, Tensor? scale, Tensor g, Tensor grid, int spline_order, {_OPTIONS}) -> (Tensor, Tensor)",
        _ContractWeight,
        _fake_contract_weight,
    ),
    "contract_backward": (
        f"(Tensor x, {_WEIGHTS}, Tensor g, Tensor grid, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        _ContractBackward,
        _fake_contract_backward,
    ),
}
_library = torch.library.Library("kan_fast", "DEF")
for _name, (_schema, _function, _fake) in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _backend_kernel(_name), "CompositeExplicitAutograd")
    _library.impl(_name, _autograd_kernel(_function, getattr(_operators, _name).default), "Autograd", with_keyset=True)
    torch.library.register_fake(f"kan_fast::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"kan_fast::{_name}", _function.vmap, lib=_library)
