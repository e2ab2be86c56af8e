"""Base activations and all their derivatives in Triton: kan_fast/activations.py on tiles held in registers.

The derivatives come from the same closed forms: polynomials in the sigmoid, in tanh, and Hermite polynomials for gelu.
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
def coefficient(slope, n, power):
    """Of u^power in the n-th derivative of a function with u' = slope(u), slope given lowest power first."""
    polynomial = [0, 1]
    for _ in range(n):
        derived = [p * c for p, c in enumerate(polynomial)][1:]
        polynomial = [0] * (len(derived) + len(slope) - 1)
        for i, c in enumerate(derived):
            for j, s in enumerate(slope):
                polynomial[i + j] += c * s
    return float(polynomial[power])


@triton.jit
def logistic(u, TANH: tl.constexpr, N: tl.constexpr):
    """n-th derivative, N >= 0, of the sigmoid (u' = u - u^2) or of tanh (u' = 1 - u^2), given its value u."""
    SLOPE: tl.constexpr = (1, 0, -1) if TANH else (0, 1, -1)
    value = tl.full(u.shape, coefficient(SLOPE, N, N + 1), u.dtype)
    for down in tl.static_range(1, N + 2):
        value = value * u + coefficient(SLOPE, N, N + 1 - down)
    return value


@triton.jit
def tanh(x):
    """tanh to a few ulp everywhere (Cephes: a rational function near 0, the exponential elsewhere)."""
    z = x * x
    top = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    bottom = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    near = x + x * z * (top / bottom)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


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
def sigmoid(x):
    """1 / (1 + exp(-x)); a tile of any shape, float32 or float64."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activation(x, ACTIVATION: tl.constexpr, N: tl.constexpr):
    """n-th derivative of a base activation, ACTIVATION its position in kan_fast.activations.ACTIVATIONS, not "none".

    A tile of any shape, float32 or float64. NaN comes out as NaN only where the formula makes it so.
    """
    if ACTIVATION == SILU:
        if N == 0:
            value = tl.maximum(x, -FAR) * sigmoid(x)
        else:
            x = tl.minimum(tl.maximum(x, -FAR), FAR)
            u = sigmoid(x)
            value = x * logistic(u, False, N) + N * logistic(u, False, N - 1)
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
        value = logistic(tanh(x), True, N)
    return value
