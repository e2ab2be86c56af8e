"""From the k + 1 values of a window to a row of all bases: the left operand of the products."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl

from kan_fast.backends.triton.kernels.features import basis_number, nan_where_unknown
from kan_fast.backends.triton.kernels.products import bits_of_parts, parts


@triton.jit
def spread(
    first, values, others, first_base,
    PARTS: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, FC: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Bases first_base, ..., first_base + FC - 1 of a tile (BM, BI): (BM, BI * FC), bases running fastest, in `parts`."""
    if OPERAND.primitive_bitwidth == 16 and ORDER <= 3:
        return spread_pairs(first - first_base, values, others, PARTS, OPERAND, BM, BI, FC, ORDER)
    else:
        values = nan_where_unknown(values, others)
        numbers = ()
        for f in tl.static_range(FC):
            number = basis_number(f, first - first_base, values, others, ORDER)
            numbers = numbers + (number.to(bits_of(others.dtype), bitcast=True),)
        return parts(as_tile(interleave(numbers), others.dtype, BM, BI, FC), PARTS, OPERAND)


@triton.jit
def spread_pairs(
    first, values, others,
    PARTS: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, FC: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """spread() of windows of up to four bases of 16 bits, two numbers in a word at a time.

    A window fills three words, or two where it begins with a word; a word of the result is one of those or none. So a number
    costs 3 instructions where the comparison of every basis with every place costs 9.
    """
    zero = tl.zeros_like(others)
    low = pairs(values[0], values[1] if ORDER > 0 else zero, PARTS, OPERAND)
    high = pairs(values[2] if ORDER > 1 else zero, values[3] if ORDER > 2 else zero, PARTS, OPERAND)
    odd = (first & 1) != 0
    result = ()
    for p in tl.static_range(PARTS):
        lower, upper = low[p], high[p]
        middle = tl.where(odd, (lower >> 16) | (upper << 16), upper)
        window = tl.where(odd, lower << 16, lower), middle, tl.where(odd, upper >> 16, 0)
        numbers = ()
        for j in tl.static_range(FC // 2):
            word = tl.zeros_like(lower)
            for q in tl.static_range(3):
                word = tl.where((first >> 1) == j - q, window[q], word)
            numbers = numbers + (tl.where(others == others, word, 0xFFFFFFFF),)  # two NaN
        words = interleave(numbers)
        result = result + (as_tile(tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16)), OPERAND, BM, BI, FC),)
    return result


@triton.jit
def pairs(a, b, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Two float32 tiles in PARTS parts of 16 bits: a tuple of tiles of words, a's numbers in their low halves."""
    if OPERAND.is_bf16():
        of_a, of_b = bits_of_parts(a, PARTS), bits_of_parts(b, PARTS)
        result = ()
        for p in tl.static_range(PARTS):
            result = result + ((of_a[p] >> 16) | of_b[p],)
        return result
    else:
        a, b = tl.split(tl.join(a, b).to(OPERAND).to(tl.uint16, bitcast=True))
        return (a.to(tl.uint32) | (b.to(tl.uint32) << 16),)


@triton.constexpr_function
def bits_of(dtype):
    """The unsigned integers of a dtype's size."""
    return {16: tl.uint16, 32: tl.uint32, 64: tl.uint64}[dtype.primitive_bitwidth]


@triton.jit
def as_tile(bits, DTYPE: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, FC: tl.constexpr):
    """Bit patterns (BM, BI, 2, ..., 2) of DTYPE as numbers (BM, BI * FC).

    Bits until they have their shape: told of it before, the compilers for sm_100 put numbers into shared memory in a layout
    that they then refuse.
    """
    return tl.reshape(bits, (BM, BI * FC)).to(DTYPE, bitcast=True)


@triton.jit
def interleave(tiles):
    """2^m tiles (BM, BI) as one (BM, BI, 2, ..., 2): tile j at the digits of j. A thread keeps what it has."""
    COUNT: tl.constexpr = len(tiles)
    if COUNT == 1:
        return tiles[0]
    else:
        joined = ()
        for j in tl.static_range(COUNT // 2):
            joined = joined + (tl.join(tiles[j], tiles[j + COUNT // 2]),)
        return interleave(joined)
