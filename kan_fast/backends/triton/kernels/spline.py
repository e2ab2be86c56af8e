"""B-splines in Triton: the mathematics of kan_fast/spline.py, under the same names, on tiles held in registers.

A tile x has any shape, in the dtype of computation (float32, or float64 for float64); `knots` is a pointer, or a tile of
pointers that broadcasts against x, to the first knot of each element's input. `uniform` is a scalar of the device: not 0
where every input of the tile has uniform knots. Compile-time: ORDER = k, FEATURES = G + k, OUTSIDE = the position of the
mode in kan_fast.spline.OUTSIDE, N = the order of the derivative.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import math

import triton
import triton.language as tl

ZERO, LINEAR = tl.constexpr(0), tl.constexpr(1)
# Knots count as uniform up to this many epsilons of the largest one: what rounding leaves of an equidistant grid.
ULPS = tl.constexpr(2.0)


@triton.constexpr_function
def highest_power_of_two(count):
    """The largest power of two that is not above count >= 1."""
    return 1 << (count.bit_length() - 1)


@triton.constexpr_function
def epsilon(dtype):
    """The distance of 1 to the next number of a Triton dtype, as NumPy's eps."""
    return 2.0**-52 if dtype == tl.float64 else 2.0**-23


@triton.jit
def uniform_inputs(all_knots, inputs, in_features, ORDER: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr):
    """1 if every one of these inputs has uniform knots, else 0: a scalar.

    inputs (n,) -> int32. Decided from the stored knots, as seen in the dtype of computation: a float32 grid under
    float64 counts as non-uniform where rounding moved its knots.
    """
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    inputs = tl.minimum(inputs, in_features - 1)
    knots = all_knots + inputs[:, None].to(tl.int64) * COUNT
    j = tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    t = tl.load(knots + tl.minimum(j, COUNT - 1)).to(DTYPE)
    first = tl.load(knots).to(DTYPE)
    last = tl.load(knots + (COUNT - 1)).to(DTYPE)
    part = tl.minimum(j, COUNT - 1).to(DTYPE) * (1.0 / (COUNT - 1))
    ideal = first + (last - first) * part
    slack = (ULPS * epsilon(DTYPE)) * tl.maximum(tl.abs(first), tl.abs(last))
    # No spacing, no closed form: an input of equal knots is left to the general path.
    uneven = (tl.abs(t - ideal) > slack) | (last - first <= 8 * COUNT * slack)
    return 1 - tl.max(tl.max(uneven.to(tl.int32), 1), 0)


@triton.jit
def spacing(knots, ORDER: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr):
    """Width of an interval of a uniform grid: the mean over all of them, in the shape of `knots`."""
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    return (tl.load(knots + (COUNT - 1)).to(DTYPE) - tl.load(knots).to(DTYPE)) * (1.0 / (COUNT - 1))


@triton.jit
def middle_and_scale(knots, ORDER: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr):
    """What smooth_bases asks of uniform knots: the one in the middle, and 1 / h; in the shape of `knots`."""
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    return tl.load(knots + COUNT // 2).to(DTYPE), 1.0 / spacing(knots, ORDER, FEATURES, DTYPE)


@triton.jit
def count_knots(x, knots, COUNT: tl.constexpr, STRICT: tl.constexpr):
    """How many knots are <= x (STRICT: < x), by binary search: a tile of int32 in the shape of x."""
    found = (x < x).to(tl.int32)  # zeros, also of an infinite x
    TOP: tl.constexpr = highest_power_of_two(COUNT)
    for level in tl.static_range(TOP.bit_length()):
        tried = found + (TOP >> level)
        t = tl.load(knots + (tl.minimum(tried, COUNT) - 1)).to(x.dtype)
        inside = (t < x) if STRICT else (t <= x)
        found = tl.where(inside & (tried <= COUNT), tried, found)
    return found


@triton.jit
def find_span(x, knots, uniform, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr):
    """Index of the knot interval of every x, as kan_fast.spline.find_span: a tile of int32. x holds no NaN."""
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    if uniform != 0:
        first = tl.load(knots).to(x.dtype)
        guess = (x - first) * (1.0 / spacing(knots, ORDER, FEATURES, x.dtype))
        # The guess is off by one at most; the stored knots have the last word.
        span = tl.minimum(tl.maximum(guess, 0.0), COUNT - 2.0).to(tl.int32)
        below = x < tl.load(knots + span).to(x.dtype)
        above = x >= tl.load(knots + span + 1).to(x.dtype)
        span += above.to(tl.int32) - below.to(tl.int32)
    else:
        span = count_knots(x, knots, COUNT, False) - 1
    if OUTSIDE != ZERO:
        end = tl.load(knots + FEATURES).to(x.dtype)
        last = count_knots(end, knots, COUNT, True) - 1  # the last interval of the range that is not empty
        span = tl.minimum(tl.maximum(span, ORDER), last)
    return span


@triton.jit
def raise_order(ratios, left, right, D: tl.constexpr, SLOPE: tl.constexpr):
    """One step of the de Boor triangle: D tiles of order D - 1, over their widths, to D + 1 tiles of order D.

    left[q] and right[q] are the distances of x from the two ends of the support of ratios[q]. SLOPE: differences instead,
    for a derivative (de Boor, X.(15)).
    """
    values = ()
    for p in tl.static_range(D + 1):
        if p == 0:
            value = ratios[0] * (-D if SLOPE else right[0])
        else:
            value = ratios[p - 1] * (D if SLOPE else left[p - 1])
            if p < D:
                value += ratios[p] * (-D if SLOPE else right[p])
        values = values + (value,)
    return values


@triton.constexpr_function
def window_coefficient(order, n, q, power):
    """Of v^power in the n-th derivative of the q-th basis of a window, on knots 1 apart: v in [-1/2, 1/2] is the place within
    the interval, counted from its middle.

    Schoenberg's truncated powers, M(t) = 1 / k! sum_j (-1)^j binomial(k + 1, j) (t - j)_+^k, at t = v + 1/2 + k - q. Binary
    fractions throughout, so only the last division rounds.
    """
    degree = order - n
    total = sum(
        (-1) ** j * math.comb(order + 1, j) * (order - q - j + 0.5) ** (degree - power) for j in range(order - q + 1)
    )
    return math.comb(degree, power) * total / math.factorial(degree)


@triton.jit
def half_of_polynomial(square, ORDER: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PARITY: tl.constexpr):
    """The terms of window_coefficient's polynomial in v whose power is even (PARITY 0), or odd (1, less a factor v)."""
    TOP: tl.constexpr = ORDER - N - (ORDER - N - PARITY) % 2
    value = tl.full(square.shape, window_coefficient(ORDER, N, Q, TOP) if TOP >= 0 else 0.0, square.dtype)
    for down in tl.static_range(1, TOP // 2 + 1):
        value = value * square + window_coefficient(ORDER, N, Q, TOP - 2 * down)
    return value


@triton.jit
def basis_within(v, scale, ORDER: tl.constexpr, N: tl.constexpr):
    """n-th derivative of the k + 1 bases of a window on knots 1 / scale apart; v as in window_coefficient.

    Bases q and k - q mirror each other, B_{k-q}(-v) = B_q(v), so that both come from the same two polynomials in v^2.
    """
    square = v * v
    values = ()
    for q in tl.static_range(ORDER + 1):
        even = half_of_polynomial(square, ORDER, N, q if 2 * q <= ORDER else ORDER - q, 0)
        odd = half_of_polynomial(square, ORDER, N, q if 2 * q <= ORDER else ORDER - q, 1)
        if 2 * q <= ORDER:
            value = odd * v + even
        elif N % 2 == 0:
            value = even - odd * v
        else:
            value = odd * v - even
        for _ in tl.static_range(N):
            value *= scale
        values = values + (value,)
    return values


@triton.jit
def basis_uniform(x, knots, span, ORDER: tl.constexpr, FEATURES: tl.constexpr, N: tl.constexpr):
    """basis() on uniform knots, at v = (x - t_span) / h - 1/2 from the stored knot."""
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    scale = 1.0 / spacing(knots, ORDER, FEATURES, x.dtype)
    v = (x - tl.load(knots + tl.minimum(tl.maximum(span, 0), COUNT - 1)).to(x.dtype)) * scale - 0.5
    return basis_within(v, scale, ORDER, N)


@triton.jit
def basis_general(x, knots, span, ORDER: tl.constexpr, FEATURES: tl.constexpr, N: tl.constexpr):
    """basis() on any knots."""
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    near = ()  # knots span + 1 - k, ..., span + k; those outside the grid belong only to bases that do not exist
    for offset in tl.static_range(1 - ORDER, ORDER + 1):
        near = near + (tl.load(knots + tl.minimum(tl.maximum(span + offset, 0), COUNT - 1)).to(x.dtype),)
    values = (tl.full(x.shape, 1.0, x.dtype),)
    for d in tl.static_range(1, ORDER + 1):
        ratios, left, right = (), (), ()
        for q in tl.static_range(d):
            width = near[q + ORDER] - near[q + ORDER - d]
            ratios = ratios + (tl.where(width > 0, values[q] / width, 0.0),)  # 0/0 counts as 0
            left = left + (x - near[q + ORDER - d],)
            right = right + (near[q + ORDER] - x,)
        values = raise_order(ratios, left, right, d, d > ORDER - N)
    return values


@triton.jit
def basis(x, knots, span, uniform, ORDER: tl.constexpr, FEATURES: tl.constexpr, N: tl.constexpr):
    """n-th derivative, N <= ORDER, of the bases span - k, ..., span: a tuple of k + 1 tiles.

    The ones that do not exist come out as any number.
    """
    if uniform != 0:
        values = basis_uniform(x, knots, span, ORDER, FEATURES, N)
    else:
        values = basis_general(x, knots, span, ORDER, FEATURES, N)
    return values


@triton.jit
def local_bases(x, knots, uniform, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr):
    """The bases that are not zero at x, with what happens outside the range of the grid; any x but NaN.

    -> index of the first of them (it may not exist: below 0, or above FEATURES - 1), and a tuple of their k + 1 values.
    """
    if OUTSIDE == ZERO:
        span = find_span(x, knots, uniform, ORDER, FEATURES, OUTSIDE)
        # Beyond all knots no basis exists, but a block of bases may have places for some; what stands there has to be finite.
        lowest, highest = tl.load(knots).to(x.dtype), tl.load(knots + (FEATURES + ORDER)).to(x.dtype)
        values = basis(tl.minimum(tl.maximum(x, lowest), highest), knots, span, uniform, ORDER, FEATURES, N)
    else:
        start, end = tl.load(knots + ORDER).to(x.dtype), tl.load(knots + FEATURES).to(x.dtype)
        nearest = tl.minimum(tl.maximum(x, start), end)
        span = find_span(nearest, knots, uniform, ORDER, FEATURES, OUTSIDE)
        values = basis(nearest, knots, span, uniform, ORDER, FEATURES, N)
        if OUTSIDE == LINEAR and N == 0:
            if ORDER > 0:
                slopes = basis(nearest, knots, span, uniform, ORDER, FEATURES, 1)
                extended = ()
                for q in tl.static_range(ORDER + 1):
                    beyond = values[q] + slopes[q] * (x - nearest)
                    extended = extended + (tl.where(x == nearest, values[q], beyond),)
                values = extended
        elif (1 if OUTSIDE == LINEAR else 0) < N:
            cut = ()
            for q in tl.static_range(ORDER + 1):
                cut = cut + (tl.where(x == nearest, values[q], 0.0),)
            values = cut
    return span - ORDER, values


@triton.constexpr_function
def continuous(order, outside, n):
    """Whether the n-th derivative has no jump anywhere on distinct knots: it does not matter then which of two intervals an x
    is counted to that lies within a rounding of their knot.
    """
    return n < order and (outside == 0 or n <= (1 if outside == 1 else 0))


@triton.jit
def nearest(x):
    """The integer nearest to x, |x| < 2^21, as a number of x's dtype and as int32.

    Adding 1.5 2^23 (2^52) leaves it in the lowest bits: conversions run at a quarter of the speed of additions.
    """
    if x.dtype == tl.float64:
        shifted = x + 6755399441055744.0
        whole = shifted.to(tl.int64, bitcast=True).to(tl.int32)
        return shifted - 6755399441055744.0, whole
    else:
        shifted = x + 12582912.0
        return shifted - 12582912.0, shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def smooth_bases(
    x, middle, inverse_h, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """local_bases on uniform knots where `continuous`; no knot is looked up. middle: knot number (FEATURES + ORDER + 1) // 2,
    from where places are counted, so that they are as exact as can be.
    """
    COUNT: tl.constexpr = FEATURES + ORDER + 1
    MIDDLE: tl.constexpr = COUNT // 2
    # Intervals and places are counted from `middle`; an interval's own are within 1/2 of its number.
    LOWEST: tl.constexpr = (-1 if OUTSIDE == ZERO else ORDER) - MIDDLE
    HIGHEST: tl.constexpr = (COUNT - 1 if OUTSIDE == ZERO else FEATURES - 1) - MIDDLE
    real = (x - middle) * inverse_h - 0.5
    place = tl.minimum(tl.maximum(real, LOWEST - 0.5), HIGHEST + 0.5)
    if OUTSIDE == ZERO:
        interval, number = nearest(place)
    else:  # of the two intervals at an end, the one within
        interval, number = nearest(tl.minimum(tl.maximum(place, LOWEST), HIGHEST))
    v = place - interval
    values = basis_within(v, inverse_h, ORDER, N)
    if OUTSIDE == LINEAR and N == 0:
        slopes = basis_within(v, 1.0, ORDER, 1)
        extended = ()
        for q in tl.static_range(ORDER + 1):
            extended = extended + (tl.where(real == place, values[q], values[q] + slopes[q] * (real - place)),)
        values = extended
    return number + (MIDDLE - ORDER), values
