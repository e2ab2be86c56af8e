"""Products on the tensor cores, of float32 numbers too: those as sums of bfloat16 ones.

Three bfloat16 numbers have the 24 bits of float32 and its range; of their nine products those of the last bits do not count
(Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019).
Six of them take the tensor cores as long as the three of tf32 that are as exact. But a tile of 16-bit weights is read from
shared memory as it lies in memory, while one of tf32 has to be turned over: by stores of single numbers, 16 of which share a
bank, which took twice as long as the products.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions itself: only tl.constexpr may stand there.

import triton
import triton.language as tl


@triton.jit
def add_product(total, a, b):
    """total (M, N) + a (M, K) b (K, N), in the dtype of total; a and b: tuples of 1 to 3 parts, as `parts` makes them.

    The smallest products come first.
    """
    PARTS: tl.constexpr = len(a)
    for less in tl.static_range(PARTS):
        for p in tl.static_range(PARTS - less):
            total = tl.dot(a[PARTS - 1 - less - p], b[p], total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def parts(x, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """x as a sum of PARTS tiles of OPERAND; more than one: in bfloat16, of an x that float32 holds.

    An infinite x then leaves NaN.
    """
    if PARTS == 1:
        return (x.to(OPERAND),)
    else:
        words = bits_of_parts(x.to(tl.float32), PARTS)
        result = ()
        for p in tl.static_range(PARTS):
            result = result + ((words[p] >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),)
        return result


@triton.jit
def bits_of_parts(x, PARTS: tl.constexpr):
    """Float32 x as the sum of PARTS bfloat16 numbers: their 32-bit patterns, of which the lower halves are 0.

    Three parts lack nothing. The first is rounded, so that the rest has either sign and the products that are left out cancel;
    so is the last of two.
    """
    result = ()
    for p in tl.static_range(PARTS):
        word = x.to(tl.uint32, bitcast=True)
        if p == 0 or PARTS == 2:
            word += 0x8000
        word &= 0xFFFF0000
        result = result + (word,)
        x -= word.to(tl.float32, bitcast=True)
    return result


@triton.jit
def turned(tiles):
    """Every tile (M, N) as (N, M)."""
    result = ()
    for p in tl.static_range(len(tiles)):
        result = result + (tl.trans(tiles[p]),)
    return result
