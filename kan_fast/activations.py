"""Base activations and all their derivatives, in closed form."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The position in the tuple is the code in csrc/. "none" means no base branch.
ACTIVATIONS = ("none", "silu", "identity", "gelu", "relu", "tanh")

_NAMES: dict[Any, str] = {
    torch.nn.SiLU: "silu",
    torch.nn.functional.silu: "silu",
    torch.nn.Identity: "identity",
    torch.nn.GELU: "gelu",
    torch.nn.functional.gelu: "gelu",
    torch.nn.ReLU: "relu",
    torch.nn.functional.relu: "relu",
    torch.relu: "relu",
    torch.nn.Tanh: "tanh",
    torch.nn.functional.tanh: "tanh",
    torch.tanh: "tanh",
}

# Beyond this the smooth activations and their derivatives are at their limits in every dtype; infinity times 0 would be NaN.
_FAR = 1000.0


def activation(name: str, x: Tensor, n: int) -> Tensor:
    """n-th derivative of the activation `name` at x, any shape, float32 or float64; NaN gives NaN.

    relu counts as piecewise linear: relu'(0) = 0, relu'' = 0. At infinity, where torch has NaN for silu and gelu, the limit.
    """
    if name == "silu":
        value = _identity_above(torch.nn.functional.silu, x) if n == 0 else _times_identity(_sigmoid, x, n)
    elif name == "gelu":
        value = _identity_above(torch.nn.functional.gelu, x) if n == 0 else _times_identity(_normal_cdf, x, n)
    elif name == "tanh":
        value = _tanh(x, n)
    elif name == "identity":
        value = x if n == 0 else torch.full_like(x, float(n == 1))
    elif name == "relu":
        value = torch.relu(x) if n == 0 else ((x > 0) & (n == 1)).to(x.dtype)
    else:
        raise ValueError(f"base_activation: expected one of {', '.join(ACTIVATIONS[1:])}, got {name!r}")
    return value.masked_fill(x.isnan(), torch.nan)


def fused_name(function: str | Callable[[Tensor], Tensor] | None) -> str | Callable[[Tensor], Tensor] | None:
    """The name of a function or module that is one of ACTIVATIONS; anything else comes back as it is."""
    if type(function) is torch.nn.GELU and function.approximate != "none":
        return function
    return _NAMES.get(type(function) if isinstance(function, torch.nn.Module) else function, function)


def _times_identity(gate: Callable[[Tensor, int], Tensor], x: Tensor, n: int) -> Tensor:
    """n-th derivative, n >= 1, of x * gate(x): Leibniz leaves two terms."""
    x = x.clamp(-_FAR, _FAR)
    return x * gate(x, n) + n * gate(x, n - 1)


def _identity_above(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """silu or gelu, which torch makes NaN at infinity. (A clamp from below alone would end at the largest number in ONNX.)"""
    return torch.where(x > _FAR, x, function(x.clamp(-_FAR, _FAR)))


def _sigmoid(x: Tensor, n: int) -> Tensor:
    """n-th derivative of the sigmoid, which is (1 + tanh(x / 2)) / 2."""
    return torch.sigmoid(x) if n == 0 else _tanh(0.5 * x, n) * 0.5 ** (n + 1)


def _tanh(x: Tensor, n: int) -> Tensor:
    """n-th derivative of tanh: 1 - tanh^2, accurate where it is nearly 0, times a polynomial in tanh."""
    t = torch.tanh(x)
    if n == 0:
        return t
    slope = 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)
    return slope * _polynomial(_tanh_coefficients(n), t)


def _normal_cdf(x: Tensor, n: int) -> Tensor:
    """n-th derivative of the normal distribution function: (-1)^(n-1) He_{n-1}(x) times its density."""
    if n == 0:
        value: Tensor = torch.special.ndtr(x)
        return value
    before, hermite = torch.zeros_like(x), torch.ones_like(x)
    for m in range(n - 1):
        before, hermite = hermite, x * hermite - m * before
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return hermite * density if n % 2 else -hermite * density


@functools.lru_cache
def _tanh_coefficients(n: int) -> tuple[int, ...]:
    """R_n of tanh^(n) = (1 - tanh^2) R_n(tanh), n >= 1, lowest power first.

    R_1 = 1, R_{n+1} = -2 t R_n + (1 - t^2) R_n'. At the ends, t = +-1, the terms sum up to 2^(n-1) and cancel little there; the
    polynomial in the sigmoid would have terms of the order of n! that sum up to 1.
    """
    if n == 1:
        return (1,)
    before = _tanh_coefficients(n - 1)
    following = [0] * n
    for power, c in enumerate(before):
        following[power + 1] -= (2 + power) * c
        if power > 0:
            following[power - 1] += power * c
    return tuple(following)


def _polynomial(coefficients: tuple[int, ...], u: Tensor) -> Tensor:
    value = torch.full_like(u, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * u + c
    return value
