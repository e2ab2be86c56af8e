"""Ordinary instructions of PTX on all threads of a block: comparisons, conversions, numbers and bits."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.program import Instruction

if TYPE_CHECKING:
    from tests.ptx.block import Block

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f64": np.float64, "f16": np.float16,
}  # fmt: skip
FLOAT_OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "min": np.fmin, "max": np.fmax, "abs": np.abs, "neg": np.negative, "ex2": np.exp2, "rcp": lambda a: 1 / a,
    "copysign": lambda sign, a: np.copysign(a, sign),
    # One rounding for float32; two for float64, which is as near as NumPy comes.
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
}  # fmt: skip
INTEGER_OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "abs": np.abs, "min": np.minimum, "max": np.maximum, "rem": np.fmod,
    "div": lambda a, b: (a - np.fmod(a, b)) // b,  # towards zero
}  # fmt: skip
PREDICATE_OPERATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def calculate(block: "Block", instruction: Instruction) -> None:
    """add, fma, and, shl ...: by the type of the result."""
    name, kind, o = instruction.fields[0], instruction.fields[-1], instruction.operands
    if kind == "pred":
        block.write(o[0], PREDICATE_OPERATIONS[name](*(block.read(x, kind) for x in o[1:])))
    elif kind in ("f32", "f64"):
        _floats(block, instruction)
    elif kind in ("bf16", "bf16x2"):
        _bfloats(block, instruction)
    else:
        _integers(block, instruction)


def setp(block: "Block", instruction: Instruction) -> None:
    """A comparison into a predicate; of two bfloat16 numbers in a word into two."""
    fields, o = instruction.fields, instruction.operands
    how, kind = fields[1], next(field for field in reversed(fields) if field in TYPES or field in ("bf16", "bf16x2"))
    if len(o) > 3:
        raise NotImplementedError(instruction.text)
    into = o[0].split("|")
    if kind == "bf16x2":
        words = [block.read(x, "b32") for x in o[1:]]
        for predicate, shift in zip(into, (0, 16), strict=True):
            block.write(predicate, _compare(how, *(bfloat16(word >> np.uint32(shift)) for word in words)))
    elif kind == "bf16":
        block.write(into[0], _compare(how, *(bfloat16(block.read(x, "b16")) for x in o[1:])))
    else:
        block.write(into[0], _compare(how, *(block.read(x, kind) for x in o[1:])))


def _compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "f":
        result: np.ndarray = COMPARISONS[how](a, b)
        return result
    unknown = np.isnan(a) | np.isnan(b)
    if how in ("nan", "num"):
        return unknown if how == "nan" else ~unknown
    # A third letter: true as well where a number is unknown.
    return np.where(unknown, len(how) == 3, COMPARISONS[how[:2]](a, b))


def cvt(block: "Block", instruction: Instruction) -> None:
    """A conversion between types."""
    fields, o = instruction.fields, instruction.operands
    into, of = fields[-2:]
    if into == "tf32":  # rna: to nearest, halves away from zero
        block.write(o[0], block.read(o[1], "b32") + np.uint32(0x1000) & np.uint32(0xFFFFE000))
    elif into in ("bf16x2", "f16x2"):  # the first operand goes to the upper half
        cut = "rz" in fields
        low, high = (_to_half(block.read(operand, "f32"), into, cut).astype(np.uint32) for operand in (o[2], o[1]))
        block.write(o[0], low | high << np.uint32(16))
    elif into in ("bf16", "f16"):
        block.write(o[0], _to_half(block.read(o[1], of), into))
    elif of == "bf16":
        block.write(o[0], bfloat16(block.read(o[1], "b16")))
    else:
        value = block.read(o[1], of)
        if of[0] == "f":
            rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
            for field in fields:
                value = rounding.get(field, lambda same: same)(value)
            if "sat" in fields:
                value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
            if into[0] in "us":
                limits = np.iinfo(TYPES[into])
                value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
        block.write(o[0], value.astype(TYPES[into]))


def _floats(block: "Block", instruction: Instruction) -> None:
    fields, o = instruction.fields, instruction.operands
    name, kind = fields[0], fields[-1]
    if name not in FLOAT_OPERATIONS or "sat" in fields:
        raise NotImplementedError(instruction.text)
    given = [block.read(operand, kind) for operand in o[1:]]
    exact = FLOAT_OPERATIONS[name](*given)
    if "NaN" in fields:
        exact = np.where(np.isnan(given[0]) | np.isnan(given[1]), np.nan, exact)
    result = exact.astype(TYPES[kind])
    if "rm" in fields:  # towards minus infinity
        result = np.where(result > exact, np.nextafter(result, TYPES[kind](-np.inf)), result)
    elif "rp" in fields or "rz" in fields:
        raise NotImplementedError(instruction.text)
    block.write(o[0], result)


def _bfloats(block: "Block", instruction: Instruction) -> None:
    """What rounds nothing, on bfloat16 numbers, or two of them in a word."""
    fields, o = instruction.fields, instruction.operands
    if fields[0] not in ("min", "max", "abs", "neg") or len(fields) > 2:
        raise NotImplementedError(instruction.text)
    halves = (0, 16) if fields[1] == "bf16x2" else (0,)
    words = [block.read(x, "b32" if len(halves) == 2 else "b16").astype(np.uint32) for x in o[1:]]
    result = np.zeros(block.threads, np.uint32)
    for shift in halves:
        number = FLOAT_OPERATIONS[fields[0]](*(bfloat16(word >> np.uint32(shift)) for word in words))
        result |= _to_half(number, "bf16").astype(np.uint32) << np.uint32(shift)
    block.write(o[0], result if len(halves) == 2 else result.astype(np.uint16))


def _integers(block: "Block", instruction: Instruction) -> None:
    fields, o = instruction.fields, instruction.operands
    name, kind = fields[0], fields[-1]
    bits = int(kind[1:])
    if name in ("shl", "shr"):
        dtype = TYPES[kind]
        value, by = block.read(o[1], kind), block.read(o[2], "u32").astype(int)
        within = np.minimum(by, bits - 1).astype(dtype)
        shifted = value << within if name == "shl" else value >> within
        beyond = value >> dtype(bits - 1) if name == "shr" and kind[0] == "s" else np.zeros_like(value)
        block.write(o[0], np.where(by > bits - 1, beyond, shifted).astype(dtype))
    elif name == "shf":
        _funnel(block, instruction)
    elif "wide" in fields:
        wide = kind[0] + str(2 * bits)
        value = block.read(o[1], kind).astype(TYPES[wide]) * block.read(o[2], kind).astype(TYPES[wide])
        block.write(o[0], value + block.read(o[3], wide) if name == "mad" else value)
    elif "hi" in fields:
        if name != "mul" or bits != 32:
            raise NotImplementedError(instruction.text)
        wide = TYPES[kind[0] + "64"]
        block.write(o[0], (block.read(o[1], kind).astype(wide) * block.read(o[2], kind) >> wide(32)).astype(TYPES[kind]))
    elif name == "lop3":
        a, b, c = (block.read(operand, "b32") for operand in o[1:4])
        table, result = int(o[4], 0), np.zeros(block.threads, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        block.write(o[0], result)
    elif name == "prmt":
        a, b, choice = (block.read(operand, "b32") for operand in o[1:4])
        both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(block.threads, np.uint32)
        for i in range(4):
            which = choice >> np.uint32(4 * i) & np.uint32(15)
            byte = both >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result |= np.where(which & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
        block.write(o[0], result)
    elif name in ("bfe", "bfi"):
        _bit_field(block, instruction)
    elif name in INTEGER_OPERATIONS:
        result = INTEGER_OPERATIONS[name](*(block.read(operand, kind) for operand in o[1:]))
        block.write(o[0], result.astype(TYPES[kind]))
    else:
        raise NotImplementedError(instruction.text)


def _funnel(block: "Block", instruction: Instruction) -> None:
    fields, o = instruction.fields, instruction.operands
    low, high = (block.read(operand, "b32").astype(np.uint64) for operand in o[1:3])
    by = block.read(o[3], "u32")
    by = (np.minimum(by, np.uint32(32)) if "clamp" in fields else by & np.uint32(31)).astype(np.uint64)
    both = low | high << np.uint64(32)
    shifted = both << by >> np.uint64(32) if "l" in fields else both >> by
    block.write(o[0], shifted.astype(np.uint32))


def _bit_field(block: "Block", instruction: Instruction) -> None:
    o, kind = instruction.operands, instruction.fields[-1]
    one = np.uint64(1)
    if instruction.fields[0] == "bfi":
        field, base = (block.read(operand, kind).astype(np.uint64) for operand in o[1:3])
        start, length = (block.read(operand, "u32").astype(np.uint64) for operand in o[3:5])
        mask = (one << length) - one << start
        block.write(o[0], (base & ~mask | field << start & mask).astype(TYPES[kind]))
        return
    start, length = (block.read(operand, "u32").astype(np.uint64) for operand in o[2:4])
    if kind == "u64":
        block.write(o[0], block.read(o[1], kind) >> start & (one << length) - one)
        return
    if kind[1:] != "32":
        raise NotImplementedError(instruction.text)
    value = (block.read(o[1], "b32").astype(np.uint64) >> start & (one << length) - one).astype(np.int64)
    if kind == "s32":
        length = length.astype(np.int64)
        negative = (length > 0) & (value >> np.maximum(length - 1, 0) & 1 == 1)
        value = np.where(negative, value - (np.int64(1) << length), value)
    block.write(o[0], value.astype(np.int32))


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """Low 16 bits of unsigned numbers, read as bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_half(values: np.ndarray, into: str, cut: bool = False) -> np.ndarray:
    """float32 -> bits of bfloat16 or float16, to nearest even, or float16 cut off towards 0."""
    if into.startswith("f16"):
        nearest = values.astype(np.float16)
        beyond = np.abs(nearest.astype(np.float32)) > np.abs(values)
        return nearest.view(np.uint16) - (beyond & cut).astype(np.uint16)
    if cut:
        raise NotImplementedError("bfloat16 cut off")
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
