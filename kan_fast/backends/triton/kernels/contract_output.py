"""y[b, o] = sum_{i, f} scale[b, i] * phi_f^(n)(x[b, i]) * weight[i, f, o]: the kernels."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.features import base_feature, knots_of, load_scaled, spline_features, spread
from kan_fast.backends.triton.kernels.spline import uniform_inputs


@triton.jit
def contract_output_wide(
    x, scale, spline_weight, base_weight, all_knots, uniform, y,
    batch, in_features, out_features, x_row, x_col, scale_row, scale_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, SPLINE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (ROWS, COLUMNS) of y: a product whose left operand is made in registers.

    Each step multiplies features (ROWS, BASES * INPUTS) by weights (BASES * INPUTS, COLUMNS); then come the base
    activations, DEPTH inputs a step. uniform (blocks of INPUTS inputs,) as uniform_blocks leaves it.
    """
    CHUNKS: tl.constexpr = (FEATURES + BASES - 1) // BASES
    tile = tl.program_id(0)
    tall, wide = tl.cdiv(batch, ROWS), tl.cdiv(out_features, COLUMNS)
    # GROUP tiles under each other, then the next column of tiles: neighbours share weights and rows of x in the cache.
    group = tile // (GROUP * wide)
    height = tl.minimum(tall - group * GROUP, GROUP)
    within = tile % (GROUP * wide)
    rows = (group * GROUP + within % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = within // height * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = rows < batch, columns < out_features
    total = tl.zeros((ROWS, COLUMNS), DTYPE)

    if SPLINE:
        k = tl.arange(0, BASES * INPUTS)
        for step in range(tl.cdiv(in_features, INPUTS) * CHUNKS):
            block = step // CHUNKS
            first_base = step % CHUNKS * BASES
            inputs = block * INPUTS + tl.arange(0, INPUTS)[None, :]
            ok = row_ok[:, None] & (inputs < in_features)
            at, s = load_scaled(x, scale, rows[:, None], inputs, x_row, x_col, scale_row, scale_col, ok, SCALED, DTYPE)
            knots = knots_of(all_knots, inputs, in_features, ORDER, FEATURES)
            flag = tl.load(uniform + block)
            first, values, others = spline_features(at, s, knots, flag, SCALED, ORDER, FEATURES, OUTSIDE, N)
            phi = spread(first, values, others, first_base, ROWS, INPUTS, BASES, ORDER)
            i, f = block * INPUTS + k % INPUTS, first_base + k // INPUTS
            k_ok = (i < in_features) & (f < FEATURES)
            at_w = spline_weight + (i * FEATURES + f)[:, None].to(tl.int64) * out_features + columns[None, :]
            w = tl.load(at_w, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
            total = tl.dot(phi.to(OPERAND), w.to(OPERAND), total, input_precision=PRECISION, out_dtype=DTYPE)
    if ACTIVATION != 0:
        for start in range(0, in_features, DEPTH):
            inputs = start + tl.arange(0, DEPTH)
            ok = row_ok[:, None] & (inputs < in_features)[None, :]
            at, s = load_scaled(
                x, scale, rows[:, None], inputs[None, :], x_row, x_col, scale_row, scale_col, ok, SCALED, DTYPE
            )
            phi = base_feature(at, s, SCALED, ACTIVATION, N)
            w = tl.load(
                base_weight + inputs[:, None].to(tl.int64) * out_features + columns[None, :],
                mask=(inputs < in_features)[:, None] & column_ok[None, :],
                other=0.0,
            )
            total = tl.dot(phi.to(OPERAND), w.to(OPERAND), total, input_precision=PRECISION, out_dtype=DTYPE)

    at_y = y + rows[:, None] * out_features + columns[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def contract_output_narrow(
    x, scale, spline_weight, base_weight, all_knots, y,
    batch, in_features, out_features, x_row, x_col, scale_row, scale_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, SPLINE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of y with all their outputs (at most COLUMNS): one pass over x and y, k + 1 rows of weights per input.

    Plain multiply-add: no tensor instruction, hence no padding, and true float32 products.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_ok, column_ok = rows < batch, columns < out_features
    total = tl.zeros((ROWS, COLUMNS), DTYPE)
    for step in range(in_features):
        i = tl.zeros((), tl.int64) + step  # the interpreter counts in Python's numbers
        at, s = load_scaled(x, scale, rows, i, x_row, x_col, scale_row, scale_col, row_ok, SCALED, DTYPE)
        if SPLINE:
            knots = knots_of(all_knots, i, in_features, ORDER, FEATURES)
            flag = uniform_inputs(all_knots, i + tl.arange(0, 1), in_features, ORDER, FEATURES, DTYPE)
            first, values, _ = spline_features(at, s, knots, flag, SCALED, ORDER, FEATURES, OUTSIDE, N)
            weights = spline_weight + i * FEATURES * out_features
            for q in tl.static_range(ORDER + 1):
                f = first + q
                exists = (f >= 0) & (f < FEATURES)
                ok = exists[:, None] & column_ok[None, :]
                w = tl.load(weights + f[:, None] * out_features + columns[None, :], mask=ok, other=0.0).to(DTYPE)
                total += tl.where(exists, values[q], 0.0)[:, None] * w
        if ACTIVATION != 0:
            w = tl.load(base_weight + i * out_features + columns, mask=column_ok, other=0.0).to(DTYPE)
            total += base_feature(at, s, SCALED, ACTIVATION, N)[:, None] * w[None, :]
    at_y = y + rows[:, None] * out_features + columns[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
