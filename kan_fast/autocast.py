"""Layers under torch.autocast: weights and results as of nn.Linear, while what is plain PyTorch keeps its precision."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Kinds of devices whose autocast torch.compile knows: asked here, since torch 2.11's dynamo does not follow the question.
_KINDS = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))


def _has_autocast(kind: str) -> bool:
    """Whether torch.is_autocast_enabled(kind) has an answer."""
    return kind in _KINDS or (not torch.compiler.is_compiling() and torch.amp.is_autocast_available(kind))


def beneath_autocast(function: _Function) -> _Function:
    """The function of (x, ...) with autocast off on x's device: its products have the dtypes that it gives them."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any, **options: Any) -> Any:
        if not (torch._C._is_any_autocast_enabled() and _has_autocast(x.device.type)):
            return function(x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **options)

    return cast(_Function, wrapped)


def autocast_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What autocast on x's device asks of the weights, by the rule of nn.Linear: float64 stays."""
    kind = x.device.type
    enabled = _has_autocast(kind) and torch.is_autocast_enabled(kind)
    if not enabled or torch.float64 in (x.dtype, weight.dtype):
        return weight.dtype
    return torch.get_autocast_dtype(kind)
