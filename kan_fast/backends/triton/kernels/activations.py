"""Base activations and all their derivatives in Triton: kan_fast/activations.py on tiles held in registers.

The derivatives come from the same closed forms: polynomials in tanh, also for the sigmoid, and Hermite polynomials for gelu.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.activations import ACTIVATIONS

NONE, SILU, IDENTITY, GELU, RELU = (tl.constexpr(ACTIVATIONS.index(a)) for a in ("none", "silu", "identity", "gelu", "relu"))

# Beyond this the smooth activations and their derivatives are at their limits; infinity times 0 would be NaN.
FAR = tl.constexpr(1000.0)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.constexpr_function
def coefficient(n, power):
    """Of tanh^power in the n-th derivative of tanh over the first: R_1 = 1, R_{n+1} = -2 t R_n + (1 - t^2) R_n'."""
    polynomial = [1]
    for degree in range(n - 1):
        following = [0] * (degree + 2)
        for d, c in enumerate(polynomial):
            following[d + 1] -= (2 + d) * c
            if d > 0:
                following[d - 1] += d * c
        polynomial = following
    return float(polynomial[power])


@triton.jit
def higher_slope(slope, t, N: tl.constexpr):
    """n-th derivative, N >= 1, of tanh, given its first and its value."""
    value = tl.full(t.shape, coefficient(N, N - 1), t.dtype)
    for down in tl.static_range(1, N):
        value = value * t + coefficient(N, N - 1 - down)
    return slope * value


@triton.jit
def tanh(x, N: tl.constexpr):
    """n-th derivative of tanh to a few ulp everywhere (Cephes: a rational function near 0, the exponential elsewhere)."""
    z = x * x
    top = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    bottom = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    near = x + x * z * (top / bottom)
    e = tl.exp(-2.0 * tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    far = 1.0 - 2.0 * e * inverse
    value = tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
    if N > 0:
        value = higher_slope(4.0 * e * inverse * inverse, value, N)
    return value


@triton.jit
def sigmoid(x, N: tl.constexpr):
    """n-th derivative of 1 / (1 + exp(-x)), which is (1 + tanh(x / 2)) / 2; a tile of any shape, float32 or float64."""
    if N == 0:
        value = 1.0 / (1.0 + tl.exp(-x))
    else:
        e = tl.exp(-tl.abs(x))
        inverse = 1.0 / (1.0 + e)
        half = (1.0 - e) * inverse
        value = higher_slope(e * inverse * inverse, tl.where(x < 0, -half, half), N) * 0.5 ** (N - 1)
    return value


@triton.jit
def normal_cdf(x, N: tl.constexpr):
    """n-th derivative of the normal distribution function: (-1)^(n-1) He_{n-1}(x) times its density."""
    if N == 0:
        value = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
    else:
        before = tl.zeros(x.shape, x.dtype)
        hermite = tl.full(x.shape, 1.0, x.dtype)
        for m in tl.static_range(N - 1):
            following = x * hermite - m * before
            before = hermite
            hermite = following
        value = hermite * tl.exp(-0.5 * x * x) * (DENSITY if N % 2 == 1 else -DENSITY)
    return value


@triton.jit
def activation(x, ACTIVATION: tl.constexpr, N: tl.constexpr):
    """n-th derivative of a base activation, ACTIVATION its position in kan_fast.activations.ACTIVATIONS, not "none".

    A tile of any shape, float32 or float64. NaN comes out as NaN only where the formula makes it so.
    """
    if ACTIVATION == SILU:
        if N == 0:
            value = tl.maximum(x, -FAR) * sigmoid(x, 0)
        else:
            x = tl.minimum(tl.maximum(x, -FAR), FAR)
            value = x * sigmoid(x, N) + N * sigmoid(x, N - 1)
    elif ACTIVATION == IDENTITY:
        value = x if N == 0 else tl.full(x.shape, 1.0 if N == 1 else 0.0, x.dtype)
    elif ACTIVATION == GELU:
        if N == 0:
            value = tl.maximum(x, -FAR) * normal_cdf(x, 0)
        else:
            x = tl.minimum(tl.maximum(x, -FAR), FAR)
            value = x * normal_cdf(x, N) + N * normal_cdf(x, N - 1)
    elif ACTIVATION == RELU:
        if N == 0:
            value = tl.maximum(x, 0.0)
        else:
            value = tl.where((x > 0) & (N == 1), 1.0, 0.0).to(x.dtype)
    else:
        value = tanh(x, N)
    return value
