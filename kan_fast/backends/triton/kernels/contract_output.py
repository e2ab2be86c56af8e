"""y[b, o] = sum_{i, f} scale[b, i] * phi_f^(n)(x[b, i]) * weight[i, f, o]: the kernels."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.features import (
    all_uniform,
    base_feature,
    knots_of,
    load_scaled,
    smooth_features,
    spline_features,
)
from kan_fast.backends.triton.kernels.products import add_product, parts
from kan_fast.backends.triton.kernels.spline import continuous
from kan_fast.backends.triton.kernels.spreading import spread


@triton.jit
def add_splines(
    total, x, scale, spline_weight, all_knots, middles, scales, rows, row_ok, columns, column_ok,
    in_features, out_features, x_row, x_col, scale_row, scale_col, steps, uniform,
    SMOOTH: tl.constexpr, ORDER: tl.constexpr, FEATURES: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr,
    WHOLE: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """total (ROWS, COLUMNS) and the products of all splines, a step features (ROWS, INPUTS * BASES) by weights (INPUTS * BASES,
    COLUMNS). SMOOTH: by smooth_features, from middles and scales; else by spline_features, which `uniform` is for.
    """
    CHUNKS: tl.constexpr = (FEATURES + BASES - 1) // BASES
    k = tl.arange(0, INPUTS * BASES)
    # Within a step's block of weights: the same in all steps, so that a step adds one number to each address.
    at_block = (k // BASES * FEATURES + k % BASES)[:, None].to(OFFSETS) * out_features + columns[None, :]
    # Knots of any kind are gathered by so many addresses that loads of further steps would spill.
    for step in tl.range(steps, num_stages=None if SMOOTH else 1):
        first_input = step // CHUNKS * INPUTS
        first_base = step % CHUNKS * BASES
        inputs = first_input + tl.arange(0, INPUTS)[None, :]
        input_ok = tl.full((1, INPUTS), True, tl.int1) if WHOLE else inputs < in_features
        at, s = load_scaled(
            x, scale, rows[:, None], inputs, x_row, x_col, scale_row, scale_col, row_ok[:, None] & input_ok, SCALED, DTYPE
        )
        if SMOOTH:
            middle = tl.load(middles + inputs, mask=input_ok, other=0.0)
            inverse = tl.load(scales + inputs, mask=input_ok, other=0.0)
            first, values, others = smooth_features(at, s, middle, inverse, SCALED, ORDER, FEATURES, OUTSIDE, N)
        else:
            knots = knots_of(all_knots, inputs, in_features, ORDER, FEATURES)
            first, values, others = spline_features(at, s, knots, uniform, SCALED, ORDER, FEATURES, OUTSIDE, N)
        phi = spread(first, values, others, first_base, PARTS, OPERAND, ROWS, INPUTS, BASES, ORDER)
        block = spline_weight + (first_input.to(tl.int64) * FEATURES + first_base) * out_features
        ok = column_ok[None, :]
        if not WHOLE or FEATURES % BASES != 0:
            ok = ok & ((first_input + k // BASES < in_features) & (first_base + k % BASES < FEATURES))[:, None]
        w = tl.load(block + at_block, mask=ok, other=0.0)
        total = add_product(total, phi, parts(w, PARTS, OPERAND))
    return total


@triton.jit
def contract_output_wide(
    x, scale, spline_weight, base_weight, all_knots, middles, scales, uniform, y,
    batch, in_features, out_features, x_row, x_col, scale_row, scale_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, SPLINE: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, DESCRIBED: tl.constexpr, WHOLE: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """One tile (ROWS, COLUMNS) of y: a product whose left operand is made in registers.

    First come all splines, then the base activations, DEPTH inputs a step. middles, scales (in_features,) and uniform (blocks
    of DESCRIBED inputs,) as describe_knots leaves them. WHOLE: in_features is a multiple of INPUTS. OFFSETS: the type that
    holds the places of numbers within INPUTS inputs' weights.
    """
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
        flag = all_uniform(uniform, tl.cdiv(in_features, DESCRIBED), 128)
        operands = (
            x, scale, spline_weight, all_knots, middles, scales, rows, row_ok, columns, column_ok,
            in_features, out_features, x_row, x_col, scale_row, scale_col,
        )  # fmt: skip
        steps = tl.cdiv(in_features, INPUTS) * ((FEATURES + BASES - 1) // BASES)
        if continuous(ORDER, OUTSIDE, N):
            # One loop or the other runs. As branches of an `if` they would meet in its result, the accumulator, and the
            # assembler would then wait for every tensor instruction by itself (C7515).
            total = add_splines(
                total, *operands, steps * flag, 1, True,
                ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, ROWS, INPUTS, BASES, WHOLE, OFFSETS,
            )  # fmt: skip
            total = add_splines(
                total, *operands, steps * (1 - flag), 0, False,
                ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, ROWS, INPUTS, BASES, WHOLE, OFFSETS,
            )  # fmt: skip
        else:
            total = add_splines(
                total, *operands, steps, flag, False,
                ORDER, FEATURES, OUTSIDE, N, SCALED, PARTS, OPERAND, DTYPE, ROWS, INPUTS, BASES, WHOLE, OFFSETS,
            )  # fmt: skip
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
            total = add_product(total, parts(phi, PARTS, OPERAND), parts(w, PARTS, OPERAND))

    at_y = y + rows[:, None] * out_features + columns[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
