"""What operations that have one another as derivatives share: how they are entered, and rules that hold at every level."""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from kan_fast.operators import forward_mode

_C = torch._C
_is_grad_enabled = torch.is_grad_enabled

Maybe = Tensor | None


class Contraction(torch.autograd.Function):
    """A Function in the setup_context form, whose forward may also be called alone."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """torch's own without binding the signature on every call, which in torch 2.13 is 29 us of its 35."""
        if _C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def enter(operation: type[Contraction], args: tuple[Any, ...]) -> Any:
    """Outside of compilers: the Function where a derivative may be asked for or a torch.func transform is at work."""
    tracked = (
        (_is_grad_enabled() and _C._any_requires_grad(*args))
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
    return (operation.apply if tracked else operation.forward)(*args)


def save(ctx: Any, *tensors: Maybe) -> None:
    """For backward, and for forward mode where it may be at work."""
    ctx.save_for_backward(*tensors)
    if forward_mode():
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*tensors)


def saved(ctx: Any) -> tuple[Any, ...]:
    """Saved tensors; those that a finished torch.func transform wrapped come unwrapped (torch.func.vjp needs it)."""
    unwrap = functorch.unwrap_if_dead
    return tuple([tensor if tensor is None else unwrap(tensor) for tensor in ctx.saved_tensors])


def forward_rule(rule: Callable[..., Any]) -> Any:
    """A jvp that forward mode may differentiate again: rule(ctx, saved tensors, *tangents).

    torch calls jvp with forward mode off, so that an outer torch.func.jvp would see constants and give zeros in silence
    (pytorch issue 197867). The rule runs one level down instead, where the tensors have lost the tangents of this level
    and keep those of the outer ones, with forward mode on.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        top = functorch.peek_interpreter_stack()
        if top is None or top.key() != functorch.TransformType.Jvp:
            return rule(ctx, ctx.saved_tensors, *tangents)  # plain dual levels do not nest
        level = top.level()
        known, tangents = (
            tuple([functorch._unwrap_for_grad(value, level) if isinstance(value, Tensor) else None for value in values])
            for values in (ctx.saved_tensors, tangents)
        )
        interpreter = retrieve_current_functorch_interpreter()
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            result = rule(ctx, known, *tangents)
        if isinstance(result, Tensor):
            return functorch._wrap_for_grad(result, level)
        return tuple([functorch._wrap_for_grad(part, level) for part in result])

    return staticmethod(jvp)


def refuse_grid() -> None:
    """Raises where somebody wants a derivative by the knots."""
    raise RuntimeError("grid: the knots are not differentiable, expected a grid that does not require grad")


def weighted(scale: Maybe, factor: Tensor) -> Tensor:
    """scale * factor, without a scale the factor."""
    return factor if scale is None else scale * factor


def total(*terms: Maybe) -> Maybe:
    """The sum of those that are there."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None
