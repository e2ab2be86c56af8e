"""The kernels of layers with few outputs: plain multiply-add, bound by reading x and g and writing y.

A thread takes whole rows. Every tile is (ROWS,), one for each output or basis, so that nothing changes hands but in the last
transposition of y: tiles of two dimensions would be shared out among threads which then all need the same bases (1116
instructions for two rows and an input, forward of 5 outputs, where this takes 278). There is no padding to a tensor
instruction, and float32 products are true ones. Programs walk through the batch: knots are looked at once for all its rows.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.features import (
    base_feature,
    basis_number,
    knots_of,
    load_scaled,
    nan_where_unknown,
    smooth_features,
    spline_features,
)
from kan_fast.backends.triton.kernels.spline import continuous, middle_and_scale, uniform_inputs


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """COUNT tiles (ROWS,) of 0."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS,), DTYPE),)
    return tiles


@triton.jit
def side_by_side(tiles):
    """2^m tiles (ROWS,) as one (ROWS, 2^m); a thread keeps what it has."""
    COUNT: tl.constexpr = len(tiles)
    if COUNT == 1:
        return tiles[0][:, None]
    else:
        even, odd = (), ()
        for j in tl.static_range(0, COUNT, 2):
            even = even + (tiles[j],)
            odd = odd + (tiles[j + 1],)
        left, right = side_by_side(even), side_by_side(odd)
        return tl.reshape(tl.join(left, right), (left.shape[0], COUNT))


@triton.jit
def uniform_everywhere(
    all_knots, in_features, INPUTS: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """1 if all inputs have uniform knots, else 0: a scalar. INPUTS of them at a time."""
    flag = tl.full((), 1, tl.int32)
    for start in range(0, in_features, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        flag = tl.minimum(flag, uniform_inputs(all_knots, inputs, in_features, ORDER, FEATURES, DTYPE))
    return flag


@triton.jit
def features_of(
    x, s, knots, uniform,
    SMOOTH: tl.constexpr, SCALED: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """smooth_features or spline_features of one input's knots, the values NaN where x is."""
    if SMOOTH:
        middle, inverse_h = middle_and_scale(knots, ORDER, FEATURES, x.dtype)
        first, values, others = smooth_features(x, s, middle, inverse_h, SCALED, ORDER, FEATURES, OUTSIDE, N)
    else:
        first, values, others = spline_features(x, s, knots, uniform, SCALED, ORDER, FEATURES, OUTSIDE, N)
    return first, nan_where_unknown(values, others), others


@triton.jit
def load_weights(at, q, first, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr):
    """Weights of basis first + q of every row, a tile (ROWS,) for each output, 0 for a basis that does not exist.

    at: pointers to those of basis `first`.
    """
    exists = (first + q).to(tl.uint32, bitcast=True) < FEATURES
    weights = ()
    for o in tl.static_range(OUTPUTS):
        weights = weights + (tl.load(at + (q * OUTPUTS + o), mask=exists, other=0.0).to(DTYPE),)
    return weights


@triton.jit
def load_base_weights(base_weight, i, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr):
    """Weights of input i's base activation: a scalar for each output."""
    weights = ()
    for o in tl.static_range(OUTPUTS):
        weights = weights + (tl.load(base_weight + i * OUTPUTS + o).to(DTYPE),)
    return weights


@triton.jit
def add_multiples(totals, factor, tiles):
    """totals + factor * tiles, each of them."""
    sums = ()
    for j in tl.static_range(len(totals)):
        sums = sums + (totals[j] + factor * tiles[j],)
    return sums


@triton.jit
def dot(a, b):
    """The sum of the products of two tuples of tiles."""
    total = a[0] * b[0]
    for j in tl.static_range(1, len(a)):
        total += a[j] * b[j]
    return total


@triton.jit
def output_rows(
    x, scale, spline_weight, base_weight, all_knots, y,
    tiles, uniform, batch, in_features, x_row, x_col, scale_row, scale_col,
    SMOOTH: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr,
    N: tl.constexpr, SCALED: tl.constexpr, SPLINE: tl.constexpr, DTYPE: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """This program's share of the first `tiles` tiles (ROWS, OUTPUTS) of y."""
    within = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        begin = (tl.zeros((), tl.int64) + tile) * ROWS  # the interpreter counts in Python's numbers
        row_ok = within < batch - begin
        totals = zeros(OUTPUTS, ROWS, DTYPE)
        for step in range(in_features):
            i = tl.zeros((), tl.int64) + step
            at, s = load_scaled(x, scale, begin + within, i, x_row, x_col, scale_row, scale_col, row_ok, SCALED, DTYPE)
            if SPLINE:
                knots = knots_of(all_knots, i, in_features, ORDER, FEATURES)
                first, values, _ = features_of(at, s, knots, uniform, SMOOTH, SCALED, ORDER, FEATURES, OUTSIDE, N)
                at_w = spline_weight + i * (FEATURES * OUTPUTS) + first * OUTPUTS
                for q in tl.static_range(ORDER + 1):
                    totals = add_multiples(totals, values[q], load_weights(at_w, q, first, FEATURES, OUTPUTS, DTYPE))
            if ACTIVATION != 0:
                weights = load_base_weights(base_weight, i, OUTPUTS, DTYPE)
                totals = add_multiples(totals, base_feature(at, s, SCALED, ACTIVATION, N), weights)
        result = side_by_side(totals + zeros(COLUMNS - OUTPUTS, ROWS, DTYPE)).to(y.dtype.element_ty)
        at_y = y + begin * OUTPUTS + (within[:, None] * OUTPUTS + columns)
        if begin + ROWS <= batch:  # all rows but a few: no comparison for each number
            tl.store(at_y, result, mask=columns < OUTPUTS)
        else:
            tl.store(at_y, result, mask=row_ok[:, None] & (columns < OUTPUTS))


@triton.jit
def contract_output_narrow(
    x, scale, spline_weight, base_weight, all_knots, y,
    batch, in_features, x_row, x_col, scale_row, scale_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, SPLINE: tl.constexpr, DTYPE: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles (ROWS, OUTPUTS) of y, k + 1 rows of weights per row and input. COLUMNS: the power of two from OUTPUTS on."""
    tiles = tl.cdiv(batch, ROWS)
    flag = uniform_everywhere(all_knots, in_features, INPUTS, ORDER, FEATURES, DTYPE) if SPLINE else 0
    operands = x, scale, spline_weight, base_weight, all_knots, y
    sizes = batch, in_features, x_row, x_col, scale_row, scale_col
    if SPLINE and continuous(ORDER, OUTSIDE, N):  # one loop or the other runs
        output_rows(
            *operands, tiles * flag, 1, *sizes,
            True, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SCALED, SPLINE, DTYPE, OUTPUTS, COLUMNS, ROWS,
        )  # fmt: skip
        output_rows(
            *operands, tiles * (1 - flag), 0, *sizes,
            False, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SCALED, SPLINE, DTYPE, OUTPUTS, COLUMNS, ROWS,
        )  # fmt: skip
    else:
        output_rows(
            *operands, tiles, flag, *sizes,
            False, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SCALED, SPLINE, DTYPE, OUTPUTS, COLUMNS, ROWS,
        )  # fmt: skip


@triton.jit
def input_rows(
    x, spline_weight, base_weight, g, all_knots, dx,
    tiles, uniform, batch, in_features, x_row, x_col, g_row, g_col,
    SMOOTH: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr,
    N: tl.constexpr, SPLINE: tl.constexpr, DTYPE: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """This program's share of the first `tiles` tiles of ROWS rows of dx. Their g stays in registers."""
    within = tl.arange(0, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        begin = (tl.zeros((), tl.int64) + tile) * ROWS  # the interpreter counts in Python's numbers
        rows = begin + within
        row_ok = within < batch - begin
        pulled = ()
        for o in tl.static_range(OUTPUTS):
            at_g = g + rows * g_row + (tl.zeros((), tl.int64) + o) * g_col
            pulled = pulled + (tl.load(at_g, mask=row_ok, other=0.0).to(DTYPE),)
        for step in range(in_features):
            i = tl.zeros((), tl.int64) + step
            at, s = load_scaled(x, x, rows, i, x_row, x_col, x_row, x_col, row_ok, False, DTYPE)
            total = tl.zeros((ROWS,), DTYPE)
            if SPLINE:
                knots = knots_of(all_knots, i, in_features, ORDER, FEATURES)
                first, values, _ = features_of(at, s, knots, uniform, SMOOTH, False, ORDER, FEATURES, OUTSIDE, N)
                at_w = spline_weight + i * (FEATURES * OUTPUTS) + first * OUTPUTS
                for q in tl.static_range(ORDER + 1):
                    total += values[q] * dot(load_weights(at_w, q, first, FEATURES, OUTPUTS, DTYPE), pulled)
            if ACTIVATION != 0:
                weights = load_base_weights(base_weight, i, OUTPUTS, DTYPE)
                total += base_feature(at, s, False, ACTIVATION, N) * dot(weights, pulled)
            tl.store(dx + rows * in_features + i, total.to(dx.dtype.element_ty), mask=row_ok)


@triton.jit
def contract_input_narrow(
    x, spline_weight, base_weight, g, all_knots, dx,
    batch, in_features, x_row, x_col, g_row, g_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SPLINE: tl.constexpr, DTYPE: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows of dx. INPUTS: how many inputs' knots are looked at at a time, here and in contract_output_narrow."""
    tiles = tl.cdiv(batch, ROWS)
    flag = uniform_everywhere(all_knots, in_features, INPUTS, ORDER, FEATURES, DTYPE) if SPLINE else 0
    operands = x, spline_weight, base_weight, g, all_knots, dx
    sizes = batch, in_features, x_row, x_col, g_row, g_col
    if SPLINE and continuous(ORDER, OUTSIDE, N):
        input_rows(
            *operands, tiles * flag, 1, *sizes,
            True, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SPLINE, DTYPE, OUTPUTS, ROWS,
        )  # fmt: skip
        input_rows(
            *operands, tiles * (1 - flag), 0, *sizes,
            False, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SPLINE, DTYPE, OUTPUTS, ROWS,
        )  # fmt: skip
    else:
        input_rows(
            *operands, tiles, flag, *sizes,
            False, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SPLINE, DTYPE, OUTPUTS, ROWS,
        )  # fmt: skip


@triton.jit
def add_rows(
    totals, x, scale, g, knots, i, first_base, begin, end, uniform, first_column,
    out_features, x_row, x_col, scale_row, scale_col, g_row, g_col,
    SMOOTH: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr,
    N: tl.constexpr, SCALED: tl.constexpr, SPLINE: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr, BASES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """totals (COLUMNS tiles for each basis, then for the base activation) and what rows begin, ..., end - 1 give."""
    for start in tl.range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        row_ok = rows < end
        at, s = load_scaled(x, scale, rows, i, x_row, x_col, scale_row, scale_col, row_ok, SCALED, DTYPE)
        pulled = ()
        for c in tl.static_range(COLUMNS):
            o = first_column + c
            exists = rows < tl.where(o < out_features, end, begin)
            at_g = g + rows * g_row + (tl.zeros((), tl.int64) + o) * g_col
            pulled = pulled + (tl.load(at_g, mask=exists, other=0.0).to(DTYPE),)
        sums = ()
        if SPLINE:
            first, values, others = features_of(at, s, knots, uniform, SMOOTH, SCALED, ORDER, FEATURES, OUTSIDE, N)
            for f in tl.static_range(BASES):
                phi = basis_number(f, first - first_base, values, others, ORDER)
                sums = sums + add_multiples(totals[f * COLUMNS : (f + 1) * COLUMNS], phi, pulled)
        if ACTIVATION != 0:
            phi = base_feature(at, s, SCALED, ACTIVATION, N)
            sums = sums + add_multiples(totals[len(sums) :], phi, pulled)
        totals = sums
    return totals


@triton.jit
def contract_weight_narrow(
    x, scale, g, all_knots, d_spline, d_base,
    batch, in_features, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col, rows_per_split,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, SPLINE: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr, BASES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One input's gradients of BASES bases and COLUMNS outputs, from one slice of the batch, as contract_weight_split.

    Every thread has its own sums over the rows that it saw, which are added up in the end.
    """
    CHUNKS: tl.constexpr = (FEATURES + BASES - 1) // BASES if SPLINE else 1
    split = tl.program_id(1).to(tl.int64)
    wide = tl.cdiv(out_features, COLUMNS)
    first_column = tl.program_id(0) % wide * COLUMNS
    part = tl.program_id(0) // wide
    chunk = part % CHUNKS
    first_base = chunk * BASES
    i = (part // CHUNKS).to(tl.int64)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, batch)
    knots = knots_of(all_knots, i, in_features, ORDER, FEATURES)
    flag = uniform_inputs(knots, tl.arange(0, 1), 1, ORDER, FEATURES, DTYPE) if SPLINE else 0
    operands = x, scale, g, knots, i, first_base
    sizes = first_column, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col
    SUMS: tl.constexpr = (BASES if SPLINE else 0) + (1 if ACTIVATION != 0 else 0)
    totals = zeros(SUMS * COLUMNS, ROWS, DTYPE)
    if SPLINE and continuous(ORDER, OUTSIDE, N):
        middle = tl.where(flag != 0, end, begin)
        totals = add_rows(
            totals, *operands, begin, middle, 1, *sizes,
            True, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SCALED, SPLINE, DTYPE, COLUMNS, BASES, ROWS,
        )  # fmt: skip
        totals = add_rows(
            totals, *operands, middle, end, 0, *sizes,
            False, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SCALED, SPLINE, DTYPE, COLUMNS, BASES, ROWS,
        )  # fmt: skip
    else:
        totals = add_rows(
            totals, *operands, begin, end, flag, *sizes,
            False, ORDER, FEATURES, ACTIVATION, OUTSIDE, N, SCALED, SPLINE, DTYPE, COLUMNS, BASES, ROWS,
        )  # fmt: skip
    for c in tl.static_range(COLUMNS):
        o = first_column + c
        if SPLINE:
            for f in tl.static_range(BASES):
                at = ((split * in_features + i) * FEATURES + first_base + f) * out_features + o
                ok = (first_base + f < FEATURES) & (o < out_features)
                tl.store(d_spline + at, tl.sum(totals[f * COLUMNS + c], 0).to(d_spline.dtype.element_ty), mask=ok)
        if ACTIVATION != 0:
            at = (split * in_features + i) * out_features + o
            ok = (chunk == 0) & (o < out_features)
            tl.store(d_base + at, tl.sum(totals[(SUMS - 1) * COLUMNS + c], 0).to(d_base.dtype.element_ty), mask=ok)
