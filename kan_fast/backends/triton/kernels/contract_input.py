"""dx[b, i] = sum_{f, o} phi_f^(n)(x[b, i]) * weight[i, f, o] * g[b, o]: the kernels."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.features import base_feature, knots_of, load_scaled, nan_where_unknown, spline_features
from kan_fast.backends.triton.kernels.products import add_product, parts, turned
from kan_fast.backends.triton.kernels.spline import uniform_inputs


@triton.jit
def pull_back(
    g, spline_weight, base_weight, rows, row_ok, block, first_base, in_features, out_features, g_row, g_col,
    FEATURES: tl.constexpr, SPLINE: tl.constexpr, BASE: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """g W^T for a block of inputs: bases (ROWS, BASES * INPUTS), inputs running fastest, and base branch (ROWS, INPUTS)."""
    k = tl.arange(0, BASES * INPUTS)
    i, f = block * INPUTS + k % INPUTS, first_base + k // INPUTS
    k_ok = (i < in_features) & (f < FEATURES)
    row_of_weights = (i * FEATURES + f).to(tl.int64) * out_features
    inputs = block * INPUTS + tl.arange(0, INPUTS)
    spline = tl.zeros((ROWS, BASES * INPUTS), DTYPE)
    base = tl.zeros((ROWS, INPUTS), DTYPE)
    for start in range(0, out_features, DEPTH):
        outputs = start + tl.arange(0, DEPTH)
        ok = outputs < out_features
        at_g = g + rows[:, None] * g_row + outputs[None, :].to(tl.int64) * g_col
        pulled = parts(tl.load(at_g, mask=row_ok[:, None] & ok[None, :], other=0.0), PARTS, OPERAND)
        if SPLINE:
            at_w = spline_weight + row_of_weights[:, None] + outputs[None, :]
            w = tl.load(at_w, mask=k_ok[:, None] & ok[None, :], other=0.0)
            spline = add_product(spline, pulled, turned(parts(w, PARTS, OPERAND)))
        if BASE:
            at_w = base_weight + inputs[:, None].to(tl.int64) * out_features + outputs[None, :]
            w = tl.load(at_w, mask=(inputs < in_features)[:, None] & ok[None, :], other=0.0)
            base = add_product(base, pulled, turned(parts(w, PARTS, OPERAND)))
    return spline, base


@triton.jit
def weigh(
    spline, first, values, others, first_base,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """spline (ROWS, BASES * INPUTS) times bases first_base, ..., summed over them: (ROWS, INPUTS).

    Inputs run fastest, so that a thread's share of an accumulator has several bases of an input, which it adds by itself.
    """
    values = nan_where_unknown(values, others)
    which = first_base + tl.arange(0, BASES)[None, :, None] - tl.reshape(first, (ROWS, 1, INPUTS))
    phi = tl.broadcast_to(tl.reshape(others, (ROWS, 1, INPUTS)), (ROWS, BASES, INPUTS))
    for q in tl.static_range(ORDER + 1):
        phi = tl.where(which == q, tl.reshape(values[q], (ROWS, 1, INPUTS)), phi)
    return tl.sum(phi * tl.reshape(spline, (ROWS, BASES, INPUTS)), 1)


@triton.jit
def contract_input_wide(
    x, spline_weight, base_weight, g, all_knots, dx,
    batch, in_features, out_features, x_row, x_col, g_row, g_col,
    ORDER: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, OUTSIDE: tl.constexpr, N: tl.constexpr,
    SPLINE: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, BASES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (ROWS, INPUTS) of dx: the product g W^T, weighed by phi^(n) and summed over the bases in its epilogue."""
    CHUNKS: tl.constexpr = (FEATURES + BASES - 1) // BASES
    BASE: tl.constexpr = ACTIVATION != 0
    tile = tl.program_id(0)
    tall, blocks = tl.cdiv(batch, ROWS), tl.cdiv(in_features, INPUTS)
    group = tile // (GROUP * blocks)
    height = tl.minimum(tall - group * GROUP, GROUP)
    within = tile % (GROUP * blocks)
    block = within // height
    rows = (group * GROUP + within % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < batch
    inputs = block * INPUTS + tl.arange(0, INPUTS)[None, :]
    ok = row_ok[:, None] & (inputs < in_features)

    # The base branch shares the tiles of g with the splines where those are done in one block of bases; else it goes first.
    TOGETHER: tl.constexpr = BASE and SPLINE and CHUNKS == 1
    total = tl.zeros((ROWS, INPUTS), DTYPE)
    if BASE and not TOGETHER:
        _, base = pull_back(
            g, spline_weight, base_weight, rows, row_ok, block, 0, in_features, out_features, g_row, g_col,
            FEATURES, False, True, PARTS, OPERAND, DTYPE, ROWS, INPUTS, BASES, DEPTH,
        )  # fmt: skip
        at, s = load_scaled(x, x, rows[:, None], inputs, x_row, x_col, x_row, x_col, ok, False, DTYPE)
        total += base * base_feature(at, s, False, ACTIVATION, N)
    if SPLINE:
        flag = uniform_inputs(all_knots, block * INPUTS + tl.arange(0, INPUTS), in_features, ORDER, FEATURES, DTYPE)
        for chunk in range(CHUNKS):
            spline, base = pull_back(
                g, spline_weight, base_weight, rows, row_ok, block, chunk * BASES, in_features, out_features, g_row, g_col,
                FEATURES, True, TOGETHER, PARTS, OPERAND, DTYPE, ROWS, INPUTS, BASES, DEPTH,
            )  # fmt: skip
            at, s = load_scaled(x, x, rows[:, None], inputs, x_row, x_col, x_row, x_col, ok, False, DTYPE)
            if TOGETHER:
                total += base * base_feature(at, s, False, ACTIVATION, N)
            knots = knots_of(all_knots, inputs, in_features, ORDER, FEATURES)
            # Found anew for every block of bases: windows kept over the products between would spill.
            first, values, others = spline_features(at, s, knots, flag, False, ORDER, FEATURES, OUTSIDE, N)
            total += weigh(spline, first, values, others, chunk * BASES, ROWS, INPUTS, BASES, ORDER)
    at_dx = dx + rows[:, None] * in_features + inputs
    tl.store(at_dx, total.to(dx.dtype.element_ty), mask=ok)
