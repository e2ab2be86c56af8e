"""Which tile each kernel works in, and why.

No figure here was measured on a GPU. The sizes follow from what offline compilation tells (registers, spills, shared
memory: `python -m benchmarks --what kernels`) and from this reckoning for the products, per tile and step of width K:
rows * K features are made by about 10 instructions each, on 128 lanes of a multiprocessor; rows * columns * K products
run on its tensor cores, 2048 per cycle for 16-bit numbers on Hopper. So a feature costs as much as 160 products: the wider
the tile (columns), the better, up to what the registers of the accumulator allow.
"""

from dataclasses import dataclass

# How the products are computed: by 16-bit numbers as they are, by float32 in three or two bfloat16 ones, whose six or three
# products count (kernels/products.py), by float32 itself (AMD), or by float64.
HALF, THREE, TWO, IEEE, DOUBLE = "half", "three", "two", "ieee", "double"


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for: kind "cuda", "hip" or "interpreter", its architecture, how many multiprocessors."""

    kind: str
    arch: int | str
    processors: int


@dataclass(frozen=True)
class Tile:
    """rows of the batch, columns (outputs), inputs and bases per step, and the depth of the remaining sum.

    depth: inputs per step of the base branch (contract_output), outputs per step (contract_input), rows of the batch per
    step (contract_weight, whose tile has bases * inputs rows of weights by `columns`). group: tiles under each other that
    run together. warps and stages: Triton's num_warps and num_stages.
    """

    rows: int
    columns: int
    inputs: int
    bases: int
    depth: int
    warps: int
    stages: int
    group: int = 8


# (kernel, products) -> rows, columns, width = inputs * bases, depth, stages. They hold on an A100 (sm_80), whose shared
# memory of 164 KiB fits one block of each, and the 16-bit ones fit the 99 KiB of its smaller sisters (sm_86, sm_89, sm_120).
_TILES = {
    # 64 numbers of accumulator per thread at 8 warps. A width of 64 spills here.
    ("contract_output", HALF): (128, 128, 32, 32, 3),
    # Three parts of both operands: a 128 x 128 tile would come close to spilling, and a depth of 32 does (triton 3.8).
    ("contract_output", THREE): (64, 128, 32, 16, 2),
    ("contract_output", TWO): (64, 128, 32, 32, 2),
    # True float32 on AMD, whose matrix instructions take it: no splitting. A depth of 32 spills for fourth derivatives.
    ("contract_output", IEEE): (128, 128, 32, 16, 2),
    # A tensor instruction of 8 x 8 x 4; accumulators take two registers each.
    ("contract_output", DOUBLE): (64, 64, 16, 16, 2),
    # Here the width is the accumulator's, and the features are made once, in the epilogue: columns is not used.
    ("contract_input", HALF): (128, 0, 64, 32, 3),
    ("contract_input", THREE): (64, 0, 64, 32, 2),
    ("contract_input", TWO): (64, 0, 64, 32, 3),
    ("contract_input", IEEE): (64, 0, 64, 32, 2),
    # A width of 64 spills.
    ("contract_input", DOUBLE): (64, 0, 32, 16, 2),
    # rows is not used: the tile is width x columns, depth counts rows of the batch.
    ("contract_weight", HALF): (0, 128, 128, 32, 3),
    ("contract_weight", THREE): (0, 64, 64, 32, 2),
    ("contract_weight", TWO): (0, 64, 64, 16, 3),
    ("contract_weight", IEEE): (0, 128, 128, 32, 2),
    ("contract_weight", DOUBLE): (0, 64, 64, 16, 2),
}

# From Hopper on the tensor cores read weights from shared memory (228 KiB), which frees registers: twice the columns, so
# that features cost about as much as the products that they feed. The width of 64 is four instructions deep.
_TILES_HOPPER = {
    ("contract_output", HALF): (128, 256, 64, 32, 3),
    ("contract_output", THREE): (64, 128, 32, 32, 2),
    ("contract_input", HALF): (128, 0, 128, 64, 3),
    ("contract_weight", HALF): (0, 256, 128, 32, 3),
    # Parts are made anew every step, and the products wait for them and they for the products: half a tile of 128 x 128, so
    # that two blocks of a multiprocessor take turns.
    ("contract_input", THREE): (64, 0, 128, 32, 2),
    ("contract_input", TWO): (64, 0, 128, 32, 2),
    ("contract_weight", THREE): (0, 128, 64, 32, 2),
    ("contract_weight", TWO): (0, 128, 64, 32, 2),
}

# 64 KiB of shared memory (LDS) on an MI300: shallower sums and pipelines.
_TILES_AMD = {
    ("contract_output", HALF): (128, 128, 64, 32, 2),
    ("contract_input", HALF): (128, 0, 128, 32, 2),
    ("contract_weight", HALF): (0, 128, 128, 32, 2),
}


def _sizes(kernel: str, products: str, target: Target) -> tuple[int, int, int, int, int]:
    key = kernel, products
    if target.kind == "hip":
        return _TILES_AMD.get(key, _TILES[key])
    if _is_hopper(target):
        return _TILES_HOPPER.get(key, _TILES[key])
    return _TILES[key]


def _is_hopper(target: Target) -> bool:
    """Or newer: the tensor cores read from shared memory."""
    return target.kind == "cuda" and target.arch in (90, 100, 103)


# Inputs whose knots a program describes at a time: few, so that the one warp of describe_knots has little to wait for.
DESCRIBED = 32

# tl.dot needs this much of every dimension in every dtype and version (triton 3.6 wants a depth of 16 for all of them).
_LEAST = 16


def bases_per_step(features: int) -> int:
    """How many bases of an input a step takes: 16, 8 or 4, the largest of those that pad the fewest bases.

    Evaluating the local bases costs about as much as spreading them over 8, so more of them at once is better.
    """
    if features <= 4:
        return 4
    return min((16, 8), key=lambda bases: (-features % bases, -bases))


def wide_tile(
    kernel: str, products: str, batch: int, in_features: int, features: int, out_features: int, target: Target, order: int = 3
) -> Tile:
    """The tile of a product kernel: the table's, cut to the problem, then halved until every multiprocessor has work."""
    rows, columns, width, depth, stages = _sizes(kernel, products, target)
    bases = bases_per_step(features)
    if bases < 8 and kernel != "contract_weight":
        # More than 8 inputs at a time: their local bases do not fit the registers of Hopper. 16 in an epilogue.
        width = min(width, bases * (8 if kernel == "contract_output" else 16))
    if order > 3 and kernel == "contract_output":
        width = min(width, 32)  # their windows are larger
    width = min(width, max(_LEAST, bases * power_of_two(in_features)))
    columns = min(columns, max(_LEAST, power_of_two(out_features)))
    rows = min(rows, max(_LEAST, power_of_two(batch)))
    if kernel == "contract_weight":  # splitting the batch fills the device
        if out_features % _LEAST:
            # Rows of g and of the gradient that begin anywhere are moved number by number, each with an address of its own:
            # 256 columns then spill 1056 bytes, 128 still 136.
            columns, depth = min(columns, 64), 16
        accumulators, made, loaded, rows = width * columns, depth * width, depth * columns, 0
    elif kernel == "contract_input":
        if features > bases and _is_hopper(target):
            rows = min(rows, 64)  # what goes on from block to block of bases is in the way: 128 rows spill up to 32 bytes
        while -(-batch // rows) * -(-in_features // max(1, width // bases)) < target.processors and max(rows, width) > 32:
            rows, width = (rows // 2, width) if rows >= width else (rows, width // 2)
        # The features of the epilogue take as much room as the accumulator that they weigh.
        accumulators, made, loaded, columns = 2 * rows * width, 0, depth * (rows + width), 0
    else:
        while -(-batch // rows) * -(-out_features // columns) < target.processors and max(rows, columns) > 32:
            rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
        accumulators, made, loaded = rows * columns, rows * width, width * columns
    warps = _warps(accumulators, made, loaded * (4 if out_features % _LEAST else 1), products, target)
    if out_features % _LEAST:
        warps = min(8, 2 * warps)  # every number has an address of its own
    return Tile(rows, columns, width // bases, bases, depth, warps, stages)


def narrow_tile(batch: int, in_features: int, out_features: int, order: int, products: str, target: Target) -> Tile:
    """The tile of a narrow kernel (contract_output, contract_input): one or two rows a thread, with all their outputs. `inputs`
    is how many inputs' knots are looked at at a time.

    Two rows of 5 outputs take about 140 registers; 64-bit numbers take two each, and windows of higher orders more.
    """
    rows = 64 if out_features > 6 or order > 3 or products == DOUBLE else 128
    while rows > 32 and -(-batch // rows) < 2 * target.processors:
        rows //= 2
    inputs = min(DESCRIBED, power_of_two(in_features))
    return Tile(rows, power_of_two(out_features), inputs, 1, 1, 2 if rows > 32 else 1, 1)


def narrow_programs(batch: int, tile: Tile, target: Target) -> int:
    """How many programs walk through the batch: as many as are there at once, so that knots are looked at no more often."""
    return min(-(-batch // tile.rows), 16 // tile.warps * target.processors)


def narrow_weight_tile(features: int, out_features: int, products: str) -> Tile:
    """The tile of contract_weight_narrow: a row a thread, which holds bases * columns sums (and columns of the base branch).

    One warp, so that the sums of threads are added without shared memory. 8 x 5 sums take 117 registers; 64-bit ones two each.
    """
    most = 4 if products == DOUBLE else 8
    columns = -(-out_features // -(-out_features // most))
    return Tile(32, columns, 1, min(8, power_of_two(features)), 32, 1, 1)


def is_narrow(batch: int, in_features: int, out_features: int, target: Target) -> bool:
    """Whether the narrow kernels take contract_output and contract_input of a layer of so few outputs.

    Up to 16 outputs a tensor instruction would be mostly padding. Their programs walk through all inputs one by one, so with
    many inputs they need a batch that fills the device.
    """
    return out_features <= 16 and (in_features <= 64 or batch >= 256 * target.processors)


def is_narrow_weight(in_features: int, out_features: int) -> bool:
    """Whether contract_weight_narrow takes a layer.

    Its programs take an input each: with many of them they read the batch too often, and with many outputs the tensor cores
    are faster.
    """
    return out_features <= 16 and in_features * out_features <= 128


def splits(batch: int, tiles: int, size: int, depth: int, target: Target, warps: int = 8) -> tuple[int, int]:
    """How many slices of the batch contract_weight sums apart, and the rows of each: from shapes and device alone.

    Enough of them for two programs per multiprocessor and 16 warps, no slice below 4 steps, and at most 64 MiB of partial sums
    (size numbers each).
    """
    wanted = -(-max(2, 16 // warps) * target.processors // max(1, tiles))
    most = min(max(1, batch // (4 * depth)), max(1, 2**24 // max(1, size)))
    count = max(1, min(wanted, most))
    rows = -(-batch // (count * depth)) * depth
    return max(1, -(-batch // rows)), rows


def sum_tile(size: int, count: int, target: Target) -> tuple[int, int]:
    """How many numbers a program of add_splits sums, and of how many slices at a time; 16 numbers a thread of 4 warps at most.

    Few numbers of many slices are spread over programs (of 64 bytes) and over the threads of each: one load after another would
    take as long as the contraction.
    """
    numbers = min(1024, max(16, power_of_two(-(-size // target.processors))))
    return numbers, min(power_of_two(count), 2048 // numbers)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below size."""
    return 1 << max(0, size - 1).bit_length()


def _warps(accumulators: int, made: int, loaded: int, products: str, target: Target) -> int:
    """64 accumulators per thread; a quarter where they are twice as wide, and half before Hopper where operands have parts,
    which are in registers there; 8 warps at most.

    And no more than half as many features made in a step, each from values of its own (else tiles of few columns spill), and as
    many numbers loaded, half as many where they are cut in parts.
    """
    if products in (THREE, TWO):
        each = 64 if _is_hopper(target) else 32, 16, 32
    else:
        each = (16, 8, 64) if products == DOUBLE else (64, 32, 64)
    threads = max(count // share for count, share in zip((accumulators, made, loaded), each, strict=True))
    return max(1, min(8, power_of_two(threads // 32)))
