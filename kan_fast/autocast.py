"""Computations in plain PyTorch keep their precision under torch.autocast, as kernels do by nature."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def beneath_autocast(function: _Function) -> _Function:
    """The function of (x, ...) with autocast off on x's device: its products have the dtypes that it gives them."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any, **options: Any) -> Any:
        if not (torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(x.device.type)):
            return function(x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **options)

    return cast(_Function, wrapped)
