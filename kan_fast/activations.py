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
        value = _polynomial(_logistic_coefficients((1, 0, -1), n), torch.tanh(x))
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
    return _polynomial(_logistic_coefficients((0, 1, -1), n), torch.sigmoid(x))


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
def _logistic_coefficients(slope: tuple[int, ...], n: int) -> tuple[int, ...]:
    """n-th derivative of a function u with u' = slope(u), as a polynomial in u, lowest power first.

    One more derivative of p(u) is p'(u) * slope(u). Sigmoid: u' = u - u^2; tanh: u' = 1 - u^2.
    """
    if n == 0:
        return (0, 1)
    before = _logistic_coefficients(slope, n - 1)
    derived = [power * c for power, c in enumerate(before)][1:]
    product = [0] * (len(derived) + len(slope) - 1)
    for i, p in enumerate(derived):
        for j, q in enumerate(slope):
            product[i + j] += p * q
    return tuple(product)


def _polynomial(coefficients: tuple[int, ...], u: Tensor) -> Tensor:
    value = torch.full_like(u, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * u + c
    return value
