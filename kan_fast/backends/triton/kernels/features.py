"""The features of a tile of inputs, in registers: what the kernels of all three contractions share."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.activations import activation
from kan_fast.backends.triton.kernels.spline import continuous, local_bases, middle_and_scale, smooth_bases, uniform_inputs


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
def describe_knots(
    all_knots, middles, scales, uniform, in_features,
    INPUTS: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What smooth_bases asks of every input's knots, middles and scales (in_features,), and uniform (blocks,) int32: 1 for
    every block of INPUTS inputs whose knots are all uniform, else 0.

    For contract_output alone, whose programs walk through all inputs. The other kernels stay with one block of inputs and find
    it out themselves, which saves this launch.
    """
    block = tl.program_id(0)
    inputs = block * INPUTS + tl.arange(0, INPUTS)
    knots = knots_of(all_knots, inputs, in_features, ORDER, FEATURES)
    middle, scale = middle_and_scale(knots, ORDER, FEATURES, DTYPE)
    tl.store(middles + inputs, middle, mask=inputs < in_features)
    tl.store(scales + inputs, scale, mask=inputs < in_features)
    tl.store(uniform + block, uniform_inputs(all_knots, inputs, in_features, ORDER, FEATURES, DTYPE))


@triton.jit
def all_uniform(uniform, blocks, COUNT: tl.constexpr):
    """Whether uniform (blocks,) is 1 everywhere: a scalar, 1 or 0. COUNT numbers at a time."""
    lowest = tl.full((COUNT,), 1, tl.int32)
    for start in range(0, blocks, COUNT):
        at = start + tl.arange(0, COUNT)
        lowest = tl.minimum(lowest, tl.load(uniform + at, mask=at < blocks, other=1))
    return tl.min(lowest, 0)


@triton.jit
def spline_features(
    x, s, knots, uniform,
    SCALED: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """scale * B_f^(n)(x): index of the first basis, the k + 1 values from there on, and the value of all the others.

    That last one is 0, but NaN for x = NaN (and for a scale that makes 0 * scale NaN). The values at such an x are any numbers,
    of bases that exist.
    """
    known = tl.where(x == x, x, tl.load(knots + ORDER).to(x.dtype))
    if continuous(ORDER, OUTSIDE, N):
        if uniform != 0:
            middle, inverse_h = middle_and_scale(knots, ORDER, FEATURES, x.dtype)
            first, values = smooth_bases(known, middle, inverse_h, ORDER, FEATURES, OUTSIDE, N)
        else:
            first, values = local_bases(known, knots, 0, ORDER, FEATURES, OUTSIDE, N)
    else:
        first, values = local_bases(known, knots, uniform, ORDER, FEATURES, OUTSIDE, N)
    return first, scaled(values, s, SCALED), zero_or_nan(x, s, SCALED)


@triton.jit
def smooth_features(
    x, s, middle, inverse_h,
    SCALED: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """spline_features by smooth_bases, from what middle_and_scale says of uniform knots; for x = NaN `first` is any number."""
    first, values = smooth_bases(x, middle, inverse_h, ORDER, FEATURES, OUTSIDE, N)
    return first, scaled(values, s, SCALED), zero_or_nan(x, s, SCALED)


@triton.jit
def scaled(values, s, SCALED: tl.constexpr):
    """values * scale, each of them, if there is one."""
    result = ()
    for q in tl.static_range(len(values)):
        result = result + ((values[q] * s if SCALED else values[q]),)
    return result


@triton.jit
def zero_or_nan(x, s, SCALED: tl.constexpr):
    """0 * x * scale, but 0 for an infinite x."""
    unknown = tl.where(x == x, 0.0, x)
    if SCALED:
        unknown *= s
    return unknown


@triton.jit
def nan_where_unknown(values, others):
    """The values, NaN where the value of all others is."""
    result = ()
    for q in tl.static_range(len(values)):
        result = result + (tl.where(others == others, values[q], others),)
    return result


@triton.jit
def basis_number(f, first, values, others, ORDER: tl.constexpr):
    """Basis f of a window that begins with basis `first`: one of its values, or that of all others."""
    number = others
    for q in tl.static_range(ORDER + 1):
        number = tl.where(first == f - q, values[q], number)
    return number


@triton.jit
def base_feature(x, s, SCALED: tl.constexpr, ACTIVATION: tl.constexpr, N: tl.constexpr):
    """scale * act^(n)(x), NaN for NaN."""
    value = tl.where(x == x, activation(x, ACTIVATION, N), x)
    if SCALED:
        value *= s
    return value
