"""Matrix instructions by the fragment layouts of the PTX manual: mma.m16n8, wgmma.m64, ldmatrix, stmatrix.

Products are summed in float64 and rounded once to float32, a little better than hardware.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.program import Instruction, split

if TYPE_CHECKING:
    from tests.ptx.block import Block

LANE = np.arange(32)


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """Low 16 bits of unsigned numbers, read as bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32(bits: np.ndarray) -> np.ndarray:
    """uint32 read as tf32: the low 13 bits do not count -> float32."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def fragment(registers: np.ndarray, rows: np.ndarray, k: np.ndarray, kind: str) -> np.ndarray:
    """Left operand, or right one transposed, of 8 rows per register pair: registers (warps, 32, count) -> (warps, rows, k).

    A lane holds row lane / 4; of a register's k, two neighbours for bfloat16, one number for tf32. Registers count
    first the groups of 8 rows (for the left operand: two), then k.
    """
    groups = 2 if rows.max() > 7 else 1
    if kind == "tf32":
        lane, register = rows[:, None] % 8 * 4 + k % 4, rows[:, None] // 8 + groups * (k // 4)
        return tf32(registers[:, lane, register])
    lane, register = rows[:, None] % 8 * 4 + k % 8 // 2, rows[:, None] // 8 + groups * (k // 8)
    return bfloat16(registers[:, lane, register] >> (16 * (k % 2)).astype(np.uint32) & np.uint32(0xFFFF))


def mma(block: "Block", instruction: Instruction) -> None:
    """mma.sync.aligned.m16n8kK.row.col.f32.T.T.f32, T bf16 or tf32, dense."""
    block.whole_warps()
    depth = re.search(r"m16n8k(\d+)", instruction.text)
    kind = instruction.fields[-3]
    if depth is None or kind not in ("bf16", "tf32") or "sp" in instruction.fields:
        raise NotImplementedError(instruction.text)
    into, left, right, add = (split(operand[1:-1]) for operand in instruction.operands)

    def registers(names: list[str], kind: str) -> np.ndarray:
        return np.stack([block.read(name, kind).reshape(-1, 32) for name in names], -1)

    k = np.arange(int(depth[1]))
    a = fragment(registers(left, "b32"), np.arange(16), k, kind)
    b = fragment(registers(right, "b32"), np.arange(8), k, kind)
    product = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2)
    start = registers(add, "f32")
    for i, name in enumerate(into):
        sums = start[:, :, i] + product[:, LANE // 4 + 8 * (i // 2), LANE % 4 * 2 + i % 2]
        block.write(name, sums.astype(np.float32).reshape(-1))


def wgmma(block: "Block", instruction: Instruction) -> None:
    """wgmma.mma_async.sync.aligned.m64nNkK.f32.T.T: right operand, and perhaps the left one, in shared memory."""
    if "mma_async" not in instruction.fields:
        return  # fence, commit_group and wait_group: here every product is complete at once
    block.whole_warps()
    size = re.search(r"m64n(\d+)k(\d+)", instruction.text)
    kind = instruction.fields[-1]
    if size is None or kind not in ("bf16", "tf32") or "sp" in instruction.fields:
        raise NotImplementedError(instruction.text)
    columns, depth = int(size[1]), int(size[2])
    element = 4 if kind == "tf32" else 2
    as_float = tf32 if kind == "tf32" else bfloat16
    into, (left, right) = split(instruction.operands[0][1:-1]), instruction.operands[1:3]
    keep = block.read(instruction.operands[3], "pred")
    flags = [int(flag, 0) for flag in instruction.operands[4:]]
    in_registers = left[0] == "{"
    # The flags: signs of both operands, then whether each operand in shared memory is transposed (16-bit types only).
    left_transposed = flags[2] if len(flags) > 2 and not in_registers else 0
    right_transposed = flags[-1] if len(flags) > 2 else 0
    sums = [block.read(name, "f32").copy() if block.knows(name) else np.zeros(block.threads, np.float32) for name in into]
    thread = np.arange(128)
    row = thread // 32 * 16 + thread % 32 // 4
    for first in range(0, block.threads, 128):
        group = slice(first, first + 128)
        if not block.mask[group].all():
            continue
        descriptor = int(block.read(right, "b64")[first])
        places = operand_places(descriptor, columns, depth, right_transposed, element)
        b = as_float(block.shared.read_by_tensor_cores(places, element))
        if in_registers:
            held = np.stack([block.read(name, "b32")[group] for name in split(left[1:-1])], -1).reshape(4, 32, -1)
            a = fragment(held, np.arange(16), np.arange(depth), kind).reshape(64, depth)
        else:
            places = operand_places(int(block.read(left, "b64")[first]), 64, depth, left_transposed, element)
            a = as_float(block.shared.read_by_tensor_cores(places, element))
        product = a.astype(np.float64) @ b.astype(np.float64).T
        for j, total in enumerate(sums):
            start = np.where(keep[group], total[group], 0)
            total[group] = start + product[row + 8 * (j % 4 // 2), j // 4 * 8 + thread % 4 * 2 + j % 2]
    for name, total in zip(into, sums, strict=True):
        block.write(name, total)


def operand_places(descriptor: int, rows: int, depth: int, transposed: int, element: int) -> np.ndarray:
    """Byte offsets (rows, depth) of an operand that a matrix descriptor points to."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    swizzle = descriptor >> 62
    span = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
    row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if not transposed:
        at = k * element
        places = row % 8 * span + row // 8 * stride + (at if swizzle else at % 16 + at // 16 * leading)
    else:
        at = row * element
        outer = k // 8 * stride + at // span * leading if swizzle else k // 8 * leading + at // span * stride
        places = at % span + k % 8 * span + outer
    places = places + start
    if swizzle:
        places ^= (places >> 7 & {1: 7, 2: 3, 3: 1}[swizzle]) << 4
    return places


def ldmatrix(block: "Block", instruction: Instruction) -> None:
    """ldmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16: lane 8 i + r has the address of row r of matrix i."""
    block.whole_warps()
    addresses = block.address(instruction.operands[1]).reshape(-1, 32)
    active = block.mask.reshape(-1, 32).all(1)
    for i, name in enumerate(split(instruction.operands[0][1:-1])):
        matrix = np.zeros((len(addresses), 8, 8), np.uint16)
        for r in range(8):
            rows = block.shared.read(addresses[active, 8 * i + r], 16, np.flatnonzero(active))
            matrix[active, r] = np.ascontiguousarray(rows).view(np.uint16)
        if "trans" in instruction.fields:
            matrix = matrix.swapaxes(1, 2)
        low, high = (matrix[:, LANE // 4, LANE % 4 * 2 + half].astype(np.uint32) for half in (0, 1))
        block.write(name, (low | high << np.uint32(16)).reshape(-1))


def stmatrix(block: "Block", instruction: Instruction) -> None:
    """stmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16: the inverse of ldmatrix."""
    block.whole_warps()
    addresses = block.address(instruction.operands[0]).reshape(-1, 32)
    active = block.mask.reshape(-1, 32).all(1)
    for i, name in enumerate(split(instruction.operands[1][1:-1])):
        value = block.read(name, "b32").reshape(-1, 32)
        matrix = np.zeros((len(addresses), 8, 8), np.uint16)
        matrix[:, LANE // 4, LANE % 4 * 2] = value & np.uint32(0xFFFF)
        matrix[:, LANE // 4, LANE % 4 * 2 + 1] = value >> np.uint32(16)
        if "trans" in instruction.fields:
            matrix = matrix.swapaxes(1, 2)
        for r in range(8):
            data = np.ascontiguousarray(matrix[active, r]).view(np.uint8)
            block.shared.write(addresses[active, 8 * i + r], data, np.flatnonzero(active))
