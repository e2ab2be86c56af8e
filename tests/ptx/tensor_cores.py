"""Matrix instructions by the fragment layouts of the PTX manual: mma.m16n8, wgmma.m64, ldmatrix, stmatrix, movmatrix.

Products are summed in float64 and rounded once to float32, a little better than hardware.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.arithmetic import bfloat16
from tests.ptx.memory import Fault, SharedMemory
from tests.ptx.program import Instruction, split

if TYPE_CHECKING:
    from tests.ptx.block import Block

LANE = np.arange(32)


def tf32(bits: np.ndarray) -> np.ndarray:
    """uint32 read as tf32: the low 13 bits do not count -> float32."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def float16(bits: np.ndarray) -> np.ndarray:
    """Low 16 bits of unsigned numbers, read as float16 -> float32."""
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


KINDS = {"tf32": tf32, "bf16": bfloat16, "f16": float16}


def fragment(registers: np.ndarray, rows: np.ndarray, k: np.ndarray, kind: str) -> np.ndarray:
    """Left operand, or right one transposed, of 8 rows per register pair: registers (warps, 32, count) -> (warps, rows, k).

    A lane holds row lane / 4; of a register's k, two neighbours for 16-bit numbers, one number for tf32. Registers count
    first the groups of 8 rows (for the left operand: two), then k.
    """
    groups = 2 if rows.max() > 7 else 1
    if kind == "tf32":
        lane, register = rows[:, None] % 8 * 4 + k % 4, rows[:, None] // 8 + groups * (k // 4)
        return tf32(registers[:, lane, register])
    lane, register = rows[:, None] % 8 * 4 + k % 8 // 2, rows[:, None] // 8 + groups * (k // 8)
    return KINDS[kind](registers[:, lane, register] >> (16 * (k % 2)).astype(np.uint32) & np.uint32(0xFFFF))


def spread(stored: np.ndarray, metadata: np.ndarray, selector: int, kind: str) -> np.ndarray:
    """A sparse left operand in full: stored (warps, 16, k / 2), metadata (warps, 32) -> (warps, 16, k).

    Of every four columns two are stored, of tf32 one of every two. Four bits say which, as numbers of two bits in ascending
    order; for tf32 in units of half a number. Rows from 8 on have theirs in the upper half; selector 0: lane 0 of each quad for
    the first four groups of columns, lane 1 for the next; selector 1: lanes 2 and 3.
    """
    k, rows = np.arange(2 * stored.shape[2]), np.arange(16)[:, None]
    group = k // (2 if kind == "tf32" else 4)
    bits = (16 * (rows // 8) + 4 * (group % 4)).astype(np.uint32)
    four = metadata[:, rows % 8 * 4 + 2 * selector + group // 4] >> bits & np.uint32(15)
    if kind == "tf32":
        if not np.isin(four, (0b0100, 0b1110)).all():
            raise Fault("metadata of a sparse product are neither 0b0100 nor 0b1110")
        return np.where(k % 2 == (four == 0b1110), stored[:, :, group], np.float32(0))
    first, second = four & np.uint32(3), four >> np.uint32(2)
    if not (first < second).all():
        raise Fault("metadata of a sparse product are not in ascending order")
    both = np.where(k % 4 == second, stored[:, :, 2 * group + 1], np.float32(0))
    return np.where(k % 4 == first, stored[:, :, 2 * group], both)


def mma(block: "Block", instruction: Instruction) -> None:
    """mma{.sp::ordered_metadata}.sync.aligned.m16n8kK.row.col.f32.T.T.f32, T bf16, f16 or tf32."""
    block.whole_warps()
    depth = re.search(r"m16n8k(\d+)", instruction.text)
    kind, sparse = instruction.fields[-3], "sp::ordered_metadata" in instruction.fields
    if depth is None or kind not in KINDS or "sp" in instruction.fields:
        raise NotImplementedError(instruction.text)
    into, left, right, add = (split(operand[1:-1]) for operand in instruction.operands[:4])
    active = block.mask.reshape(-1, 32).all(1)

    def registers(names: list[str], kind: str) -> np.ndarray:
        return np.stack([block.read(name, kind).reshape(-1, 32)[active] for name in names], -1)

    k = np.arange(int(depth[1]))
    a = fragment(registers(left, "b32"), np.arange(16), k[: len(k) // 2] if sparse else k, kind)
    if sparse:
        a = spread(a, registers([instruction.operands[4]], "b32")[..., 0], int(instruction.operands[5], 0), kind)
    b = fragment(registers(right, "b32"), np.arange(8), k, kind)
    product = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2)
    start = registers(add, "f32")
    for i, name in enumerate(into):
        sums = np.zeros((len(active), 32), np.float32)
        sums[active] = start[:, :, i] + product[:, LANE // 4 + 8 * (i // 2), LANE % 4 * 2 + i % 2]
        block.write(name, sums.reshape(-1))


class Products:
    """What the products of each warpgroup read of shared memory (words), until they are waited for. Sums are there at once."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.groups: dict[int, list[list[np.ndarray]]] = {}  # committed ones, and at the end those that are not

    def under_way(self) -> bool:
        return any(words for group in self.groups.values() for words in group)

    def begin(self, group: int, words: np.ndarray) -> None:
        self.groups.setdefault(group, [[]])[-1].append(words)
        self.shared.hold(words, self._warps(group))

    def commit(self, group: int) -> None:
        self.groups.setdefault(group, [[]]).append([])

    def wait(self, group: int, left: int) -> None:
        """Until no more than `left` committed ones are under way."""
        groups = self.groups.setdefault(group, [[]])
        while len(groups) > left + 1:
            for words in groups.pop(0):
                self.shared.let_go(words, self._warps(group))
        for words in (words for later in groups for words in later):
            self.shared.hold(words, self._warps(group))

    @staticmethod
    def _warps(group: int) -> np.ndarray:
        return np.arange(4 * group, 4 * group + 4)


def wgmma(block: "Block", instruction: Instruction) -> None:
    """wgmma.mma_async{.sp}.sync.aligned.m64nNkK.f32.T.T: right operand, and perhaps the left one, in shared memory."""
    block.whole_warps()
    fields, o = instruction.fields, instruction.operands
    acting = block.mask[: block.threads // 128 * 128].reshape(-1, 128)
    if (acting.any(1) != acting.all(1)).any():
        raise Fault("part of a warpgroup reached an instruction for whole warpgroups")
    groups = np.flatnonzero(acting.all(1)).tolist()
    if "mma_async" not in fields:
        for group in groups:
            if "commit_group" in fields:
                block.products.commit(group)
            elif "wait_group" in fields:
                block.products.wait(group, int(o[0], 0))
        return
    size = re.search(r"m64n(\d+)k(\d+)", instruction.text)
    kind, sparse = fields[-1], "sp" in fields
    in_registers = o[1][0] == "{"
    if size is None or kind not in KINDS or (sparse and not in_registers):
        raise NotImplementedError(instruction.text)
    columns, depth = int(size[1]), int(size[2])
    element, stored = 4 if kind == "tf32" else 2, depth // 2 if sparse else depth
    into = split(o[0][1:-1])
    keep, *flags = o[5:] if sparse else o[3:]
    # The flags: signs of both operands, then whether each operand in shared memory is transposed (16-bit types only).
    right_transposed = int(flags[-1], 0) if len(flags) > 2 else 0
    left_transposed = int(flags[2], 0) if len(flags) > 2 and not in_registers else 0
    if any(int(sign, 0) != 1 for sign in flags[:2]):
        raise NotImplementedError(instruction.text)
    adds = block.read(keep, "pred")
    sums = [block.read(name, "f32").copy() if block.knows(name) else np.zeros(block.threads, np.float32) for name in into]
    thread = np.arange(128)
    row = thread // 32 * 16 + thread % 32 // 4

    def operand(group: int, name: str, rows: int, transposed: int) -> np.ndarray:
        descriptor = block.read(name, "b64")[128 * group : 128 * (group + 1)]
        if (descriptor != descriptor[0]).any():
            raise Fault("a warpgroup's threads do not agree on a descriptor")
        places = operand_places(int(descriptor[0]), rows, depth, transposed, element)
        numbers = block.shared.read_by_tensor_cores(places, element, np.arange(4 * group, 4 * group + 4))
        block.products.begin(group, np.unique(places // 4))
        return KINDS[kind](numbers)

    for group in groups:
        own = slice(128 * group, 128 * (group + 1))
        b = operand(group, o[2], columns, right_transposed)
        if in_registers:
            held = np.stack([block.read(name, "b32")[own] for name in split(o[1][1:-1])], -1).reshape(4, 32, -1)
            a = fragment(held, np.arange(16), np.arange(stored), kind)
            if sparse:
                a = spread(a, block.read(o[3], "b32")[own].reshape(4, 32), int(o[4], 0), kind)
            a = a.reshape(64, depth)
        else:
            a = operand(group, o[1], 64, left_transposed)
        product = a.astype(np.float64) @ b.astype(np.float64).T
        for j, total in enumerate(sums):
            start = np.where(adds[own], total[own], 0)
            total[own] = start + product[row + 8 * (j % 4 // 2), j // 4 * 8 + thread % 4 * 2 + j % 2]
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


def movmatrix(block: "Block", instruction: Instruction) -> None:
    """movmatrix.sync.aligned.m8n8.trans.b16: the matrix that a warp holds as ldmatrix gives it, transposed."""
    block.whole_warps()
    value = block.read(instruction.operands[1], "b32").reshape(-1, 32)
    matrix = np.zeros((len(value), 8, 8), np.uint16)
    matrix[:, LANE // 4, LANE % 4 * 2] = value & np.uint32(0xFFFF)
    matrix[:, LANE // 4, LANE % 4 * 2 + 1] = value >> np.uint32(16)
    matrix = matrix.swapaxes(1, 2)
    low, high = (matrix[:, LANE // 4, LANE % 4 * 2 + half].astype(np.uint32) for half in (0, 1))
    block.write(instruction.operands[0], (low | high << np.uint32(16)).reshape(-1))
