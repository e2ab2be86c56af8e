"""d_weight[i, f, o] = sum_b scale[b, i] * phi_f^(n)(x[b, i]) * g[b, o]: the kernels."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.features import (
    base_feature,
    knots_of,
    load_scaled,
    smooth_features,
    spline_features,
)
from kan_fast.backends.triton.kernels.products import add_product, parts, turned
from kan_fast.backends.triton.kernels.spline import continuous, middle_and_scale, uniform_inputs
from kan_fast.backends.triton.kernels.spreading import spread


@triton.jit
def add_rows(
    total, x, scale, g, knots, inputs, input_ok, first_base, begin, end, columns, column_ok,
    x_row, x_col, scale_row, scale_col, g_row, g_col, uniform,
    SMOOTH: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total (INPUTS * BASES, COLUMNS) and the products of rows begin, ..., end - 1: transposed features (DEPTH, INPUTS * BASES)
    by g (DEPTH, COLUMNS) a step. SMOOTH: by smooth_features; else by spline_features, which
    `uniform` is for.
    """
    middle, inverse_h = middle_and_scale(knots, ORDER, FEATURES, DTYPE)
    for start in tl.range(begin, end, DEPTH, num_stages=None if SMOOTH else 1):
        rows = tl.arange(0, DEPTH).to(tl.int64) + start
        row_ok = rows < end
        ok = row_ok[:, None] & input_ok
        at, s = load_scaled(x, scale, rows[:, None], inputs, x_row, x_col, scale_row, scale_col, ok, SCALED, DTYPE)
        if SMOOTH:
            first, values, others = smooth_features(at, s, middle, inverse_h, SCALED, ORDER, FEATURES, OUTSIDE, N)
        else:
            first, values, others = spline_features(at, s, knots, uniform, SCALED, ORDER, FEATURES, OUTSIDE, N)
        phi = spread(first, values, others, first_base, PARTS, OPERAND, DEPTH, INPUTS, BASES, ORDER)
        at_g = g + rows[:, None] * g_row + columns[None, :].to(tl.int64) * g_col
        pulled = tl.load(at_g, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        total = add_product(total, turned(phi), parts(pulled, PARTS, OPERAND))
    return total


@triton.jit
def gradient_of_spline(
    x, scale, g, all_knots, d_spline, split, begin, end, part, columns,
    in_features, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows begin, ..., end - 1 of the batch into (INPUTS * BASES, COLUMNS) of d_spline[split]."""
    CHUNKS: tl.constexpr = (FEATURES + BASES - 1) // BASES
    block, first_base = part // CHUNKS, part % CHUNKS * BASES
    inputs = block * INPUTS + tl.arange(0, INPUTS)[None, :]
    input_ok, column_ok = inputs < in_features, columns < out_features
    knots = knots_of(all_knots, inputs, in_features, ORDER, FEATURES)
    total = tl.zeros((INPUTS * BASES, COLUMNS), DTYPE)
    uniform = uniform_inputs(all_knots, block * INPUTS + tl.arange(0, INPUTS), in_features, ORDER, FEATURES, DTYPE)
    if continuous(ORDER, OUTSIDE, N):  # one loop or the other runs, as in contract_output
        middle = tl.where(uniform != 0, end, begin)
        total = add_rows(
            total, x, scale, g, knots, inputs, input_ok, first_base, begin, middle, columns, column_ok,
            x_row, x_col, scale_row, scale_col, g_row, g_col, 1, True,
            ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, INPUTS, BASES, DEPTH,
        )  # fmt: skip
        total = add_rows(
            total, x, scale, g, knots, inputs, input_ok, first_base, middle, end, columns, column_ok,
            x_row, x_col, scale_row, scale_col, g_row, g_col, 0, False,
            ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, INPUTS, BASES, DEPTH,
        )  # fmt: skip
    else:
        total = add_rows(
            total, x, scale, g, knots, inputs, input_ok, first_base, begin, end, columns, column_ok,
            x_row, x_col, scale_row, scale_col, g_row, g_col, uniform, False,
            ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, INPUTS, BASES, DEPTH,
        )  # fmt: skip
    k = tl.arange(0, INPUTS * BASES)
    i, f = block * INPUTS + k // BASES, first_base + k % BASES
    ok = ((i < in_features) & (f < FEATURES))[:, None] & column_ok[None, :]
    row_of_weights = ((split.to(tl.int64) * in_features + i) * FEATURES + f) * out_features
    tl.store(d_spline + row_of_weights[:, None] + columns[None, :], total.to(d_spline.dtype.element_ty), mask=ok)


@triton.jit
def gradient_of_base(
    x, scale, g, d_base, split, begin, end, part, columns,
    in_features, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col,
    ACTIVATION: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows begin, ..., end - 1 of the batch into (HEIGHT inputs, COLUMNS) of d_base[split]."""
    inputs = part * HEIGHT + tl.arange(0, HEIGHT)
    input_ok, column_ok = inputs < in_features, columns < out_features
    total = tl.zeros((HEIGHT, COLUMNS), DTYPE)
    for start in range(begin, end, DEPTH):
        rows = tl.arange(0, DEPTH).to(tl.int64) + start
        row_ok = rows < end
        ok = row_ok[:, None] & input_ok[None, :]
        at, s = load_scaled(x, scale, rows[:, None], inputs[None, :], x_row, x_col, scale_row, scale_col, ok, SCALED, DTYPE)
        phi = base_feature(at, s, SCALED, ACTIVATION, N)
        at_g = g + rows[:, None] * g_row + columns[None, :].to(tl.int64) * g_col
        pulled = tl.load(at_g, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        total = add_product(total, turned(parts(phi, PARTS, OPERAND)), parts(pulled, PARTS, OPERAND))
    row_of_weights = (split.to(tl.int64) * in_features + inputs) * out_features
    ok = input_ok[:, None] & column_ok[None, :]
    tl.store(d_base + row_of_weights[:, None] + columns[None, :], total.to(d_base.dtype.element_ty), mask=ok)


@triton.jit
def contract_weight_split(
    x, scale, g, all_knots, d_spline, d_base,
    batch, in_features, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col, rows_per_split,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, SPLINE: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient from one slice of the batch: transposed features times g, DEPTH rows of the batch a step.

    A tile is (INPUTS * BASES, COLUMNS) of d_spline; after all those come tiles of BASES * INPUTS inputs of d_base.
    Split s writes to d_spline[s] and d_base[s]: the tensors themselves if there is one split, else partial sums.
    """
    CHUNKS: tl.constexpr = (FEATURES + BASES - 1) // BASES
    tile = tl.program_id(0)
    split = tl.program_id(1)
    wide = tl.cdiv(out_features, COLUMNS)
    columns = tile % wide * COLUMNS + tl.arange(0, COLUMNS)
    part = tile // wide
    spline_parts = tl.cdiv(in_features, INPUTS) * CHUNKS if SPLINE else 0
    begin = split.to(tl.int64) * rows_per_split
    end = tl.minimum(begin + rows_per_split, batch)
    if SPLINE:
        if part < spline_parts:
            gradient_of_spline(
                x, scale, g, all_knots, d_spline, split, begin, end, part, columns,
                in_features, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col,
                ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, COLUMNS, INPUTS, BASES, DEPTH,
            )  # fmt: skip
    if ACTIVATION != 0:
        if part >= spline_parts:
            gradient_of_base(
                x, scale, g, d_base, split, begin, end, part - spline_parts, columns,
                in_features, out_features, x_row, x_col, scale_row, scale_col, g_row, g_col,
                ACTIVATION, N, SCALED, PARTS, OPERAND, DTYPE, BASES * INPUTS, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit
def add_splits(
    spline_parts, base_parts, d_spline, d_base, spline_size, base_size, splits, SIZE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """d_spline (spline_size,) and d_base (base_size,) from their partial sums (splits, size), added in a fixed order.

    A tile (DEPTH splits, SIZE numbers) at a time; a number's DEPTH sums are added up in the end.
    """
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    in_spline = at < spline_size
    base_at = at - spline_size
    in_base = (base_at >= 0) & (base_at < base_size)
    spline = tl.zeros((DEPTH, SIZE), spline_parts.dtype.element_ty)
    base = tl.zeros((DEPTH, SIZE), spline_parts.dtype.element_ty)
    for first in range(0, splits, DEPTH):
        split = first + tl.arange(0, DEPTH)[:, None].to(tl.int64)
        ok = split < splits
        spline += tl.load(spline_parts + split * spline_size + at[None, :], mask=ok & in_spline[None, :], other=0.0)
        base += tl.load(base_parts + split * base_size + base_at[None, :], mask=ok & in_base[None, :], other=0.0)
    tl.store(d_spline + at, tl.sum(spline, 0).to(d_spline.dtype.element_ty), mask=in_spline)
    tl.store(d_base + base_at, tl.sum(base, 0).to(d_base.dtype.element_ty), mask=in_base)
