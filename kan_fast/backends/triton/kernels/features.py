"""The features of a tile of inputs, in registers: what the kernels of all three contractions share."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.activations import activation
from kan_fast.backends.triton.kernels.spline import local_bases, uniform_inputs


@triton.jit
def load_scaled(
    x, scale, rows, inputs, x_row, x_col, scale_row, scale_col, ok, SCALED: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """x and scale (1 if there is none) at rows (int64) and inputs, in the dtype of computation; 0 where not ok."""
    at = tl.load(x + rows * x_row + inputs.to(tl.int64) * x_col, mask=ok, other=0.0).to(DTYPE)
    if SCALED:
        s = tl.load(scale + rows * scale_row + inputs.to(tl.int64) * scale_col, mask=ok, other=0.0).to(DTYPE)
    else:
        s = 1.0
    return at, s


@triton.jit
def knots_of(all_knots, inputs, in_features, ORDER: tl.constexpr, FEATURES: tl.constexpr):
    """Pointers to the first knots of these inputs; an input beyond the last one borrows that one's knots."""
    return all_knots + tl.minimum(inputs, in_features - 1).to(tl.int64) * (FEATURES + ORDER + 1)


@triton.jit
def uniform_blocks(
    all_knots, uniform, in_features, INPUTS: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """uniform (blocks,) int32: 1 for every block of INPUTS inputs whose knots are all uniform, else 0.

    For contract_output alone, whose programs walk through all inputs: found in its loop, the answer would cost a reduction
    across all threads in every step. The other kernels stay with one block of inputs and find it out themselves, which saves
    this launch.
    """
    block = tl.program_id(0)
    flag = uniform_inputs(all_knots, block * INPUTS + tl.arange(0, INPUTS), in_features, ORDER, FEATURES, DTYPE)
    tl.store(uniform + block, flag)


@triton.jit
def spline_features(
    x, s, knots, uniform,
    SCALED: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """scale * B_f^(n)(x): index of the first basis, the k + 1 values from there on, and the value of all the others.

    That last one is 0, but NaN for x = NaN (and for a scale that makes 0 * scale NaN).
    """
    known = tl.where(x == x, x, tl.load(knots + ORDER).to(x.dtype))
    first, values = local_bases(known, knots, uniform, ORDER, FEATURES, OUTSIDE, N)
    others = tl.where(x == x, 0.0, x)
    if SCALED:
        others *= s
    result = ()
    for q in tl.static_range(ORDER + 1):
        value = values[q] * s if SCALED else values[q]
        result = result + (tl.where(x == x, value, x),)
    return first, result, others


@triton.jit
def base_feature(x, s, SCALED: tl.constexpr, ACTIVATION: tl.constexpr, N: tl.constexpr):
    """scale * act^(n)(x), NaN for NaN."""
    value = tl.where(x == x, activation(x, ACTIVATION, N), x)
    if SCALED:
        value *= s
    return value


@triton.jit
def spread(first, values, others, first_base, BM: tl.constexpr, BI: tl.constexpr, FC: tl.constexpr, ORDER: tl.constexpr):
    """Bases first_base, ..., first_base + FC - 1 of a tile (BM, BI): (BM, FC * BI), inputs running fastest."""
    which = first_base + tl.arange(0, FC)[None, :, None] - tl.reshape(first, (BM, 1, BI))
    phi = tl.broadcast_to(tl.reshape(others, (BM, 1, BI)), (BM, FC, BI))
    for q in tl.static_range(ORDER + 1):
        phi = tl.where(which == q, tl.reshape(values[q], (BM, 1, BI)), phi)
    return tl.reshape(phi, (BM, FC * BI))
