"""One block at a time: its threads are the lanes of NumPy arrays. The lowest program counter runs first, so paths rejoin."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx import tensor_cores
from tests.ptx.memory import Fault, GlobalMemory, SharedMemory
from tests.ptx.program import Instruction, Program, split

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f64": np.float64,
}  # fmt: skip
FLOAT_OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "min": np.fmin, "max": np.fmax, "abs": np.abs, "neg": np.negative, "ex2": np.exp2, "rcp": lambda a: 1 / a,
    # One rounding for float32; two for float64, which is as near as NumPy comes.
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
}  # fmt: skip
INTEGER_OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "abs": np.abs, "min": np.minimum, "max": np.maximum, "rem": np.fmod,
    "div": lambda a, b: np.trunc(a / b),
}  # fmt: skip
PREDICATE_OPERATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
REDUCTIONS = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce}


def run(program: Program, blocks: Sequence[int], threads: int, shared: int, arguments: Sequence[Any]) -> None:
    """Run all blocks. arguments: arrays (global buffers, changed in place) and numbers; None or absent: a null pointer."""
    memory = GlobalMemory()
    given: dict[str, np.ndarray] = {}
    padded = [*arguments, *[None] * (len(program.parameters) - len(arguments))]
    for (kind, name), value in zip(program.parameters, padded, strict=True):
        if isinstance(value, np.ndarray):
            value = memory.add(value)
        given[name] = np.array([value or 0]).astype(TYPES[kind])
    x, y, z = [*blocks, 1, 1][:3]
    for index in range(x * y * z):
        Block(program, memory, given, (index % x, index // x % y, index // (x * y)), (x, y, z), threads, shared).run()


class Block:
    """Registers, shared memory and program counters of one block."""

    def __init__(
        self, program: Program, memory: GlobalMemory, given: dict[str, np.ndarray],
        index: tuple[int, ...], blocks: tuple[int, ...], threads: int, dynamic: int,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.given, self.threads = program, memory, given, threads
        self.registers: dict[str, np.ndarray] = {}
        self.mask = np.ones(threads, bool)
        self.warp = np.arange(threads) // 32
        self.special = {f"%{name}.{axis}": value for name, values in
                        (("ctaid", index), ("nctaid", blocks), ("ntid", (threads, 1, 1)), ("tid", (0, 0, 0)))
                        for axis, value in zip("xyz", values, strict=True)}  # fmt: skip
        self.symbols: dict[str, int] = {}
        size = 0
        for name, static in sorted(program.shared.items(), key=lambda item: item[1] == 0):
            self.symbols[name] = size = -(-size // 128) * 128
            size += static
        self.shared = SharedMemory(size + dynamic)
        self.pending: list[list[tuple[np.ndarray, ...]]] = []  # committed groups of asynchronous copies
        self.open: list[tuple[np.ndarray, ...]] = []

    def run(self) -> None:
        """Until every thread has returned; a Fault says in which instruction it happened."""
        counter = np.zeros(self.threads, int)
        alive, waiting = np.ones(self.threads, bool), np.zeros(self.threads, bool)
        code, labels = self.program.code, self.program.labels
        while alive.any():
            ready = alive & ~waiting
            if not ready.any():  # everybody is at the barrier
                waiting[:] = False
                self.shared.epoch += 1
                continue
            place = int(counter[ready].min())
            here = ready & (counter == place)
            if place == len(code):
                alive &= ~here
                continue
            instruction = code[place]
            acting = here
            if instruction.guard is not None:
                asked = self.registers[instruction.guard]
                acting = here & (~asked if instruction.negated else asked)
            counter[here] = place + 1
            name = instruction.fields[0]
            if name == "bra":
                counter[acting] = labels[instruction.operands[0]]
            elif name in ("ret", "exit"):
                alive &= ~acting
            elif name in ("bar", "barrier") and "warp" not in instruction.fields:
                waiting |= acting
            elif acting.any():
                self.mask = acting
                try:
                    with np.errstate(all="ignore"):
                        self.execute(instruction)
                except Fault as fault:
                    raise Fault(f"{fault}, in: {instruction.text}") from None
        if self.open or self.pending:
            raise Fault("asynchronous copies still under way at the end")

    # Registers: raw bits, all threads at once.

    def knows(self, name: str) -> bool:
        return name in self.registers

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand of every thread, as numbers of a type."""
        if kind == "pred":
            if operand in self.registers:
                return self.registers[operand]
            return np.full(self.threads, int(operand, 0) != 0)
        width = np.dtype(TYPES[kind]).itemsize
        if operand[0] == "{":
            parts = split(operand[1:-1])
            bits = 8 * width // len(parts)
            raw = np.zeros(self.threads, np.uint64)
            for i, part in enumerate(parts):
                raw |= self.read(part, f"b{bits}").astype(np.uint64) << np.uint64(bits * i)
        elif operand[0] == "%":
            raw = self._register(operand)
        elif operand[:2].lower() in ("0f", "0d"):
            raw = np.full(self.threads, int(operand[2:], 16), RAW[4 if operand[1] in "fF" else 8])
        elif operand in self.symbols:
            raw = np.full(self.threads, self.symbols[operand], np.uint64)
        elif operand in self.registers:
            raw = self.registers[operand]
        else:
            raw = np.full(self.threads, int(operand.rstrip("U"), 0) & (2**64 - 1), np.uint64)
        return raw.astype(RAW[width]).view(TYPES[kind])

    def _register(self, name: str) -> np.ndarray:
        if name.startswith("%tid."):
            return np.arange(self.threads) * (name[-1] == "x")
        if name in self.special:
            return np.full(self.threads, self.special[name])
        if name == "%laneid":
            return np.arange(self.threads) % 32
        if name not in self.registers:
            raise Fault(f"register {name} is read before it is written")
        return self.registers[name]

    def write(self, name: str, value: np.ndarray) -> None:
        """Numbers of the threads that act, into a register or a {vector} of them."""
        if name == "_":
            return
        raw = value if value.dtype == bool else np.ascontiguousarray(value).view(RAW[value.dtype.itemsize])
        if name[0] == "{":
            parts = split(name[1:-1])
            bits = 8 * raw.dtype.itemsize // len(parts)
            for i, part in enumerate(parts):
                piece = raw.astype(np.uint64) >> np.uint64(bits * i) & np.uint64(2**bits - 1)
                self.write(part, piece.astype(RAW[bits // 8]))
            return
        old = self.registers.get(name)
        self.registers[name] = raw if old is None else np.where(self.mask, raw, old.astype(raw.dtype))

    def address(self, operand: str) -> np.ndarray:
        """[register + offset] -> int64 addresses."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert match is not None, operand
        return self.read(match[1], "u64").astype(np.int64) + (int(match[2], 0) if match[2] else 0)

    def whole_warps(self) -> None:
        """Raise where only part of a warp reached an instruction that takes all of it."""
        by_warp = self.mask.reshape(-1, 32)
        if (by_warp.any(1) & ~by_warp.all(1)).any():
            raise Fault("part of a warp reached an instruction for whole warps")

    # Instructions.

    def execute(self, instruction: Instruction) -> None:
        """One instruction for the threads in self.mask."""
        fields, o = instruction.fields, instruction.operands
        name, kind = fields[0], fields[-1]
        if name in ("ld", "st"):
            self._move(instruction)
        elif fields[:2] == ("cp", "async"):
            self._copy(instruction)
        elif name in ("mma", "wgmma", "ldmatrix", "stmatrix"):
            getattr(tensor_cores, name)(self, instruction)
        elif name == "fence":
            if "async" in fields:
                self.shared.fence(np.unique(self.warp[self.mask]))
        elif name == "bar":
            pass  # bar.warp.sync: lanes of a warp are never apart for longer than a branch
        elif name in ("shfl", "redux"):
            self._between_lanes(instruction)
        elif name == "setp":
            self._compare(instruction)
        elif name == "selp":
            self.write(o[0], np.where(self.read(o[3], "pred"), self.read(o[1], kind), self.read(o[2], kind)))
        elif name == "cvta":
            self.write(o[0], self.read(o[1], "u64"))
        elif name == "mov":
            self.write(o[0], self.read(o[1], kind))
        elif name == "cvt":
            self._convert(instruction)
        elif kind == "pred":
            self.write(o[0], PREDICATE_OPERATIONS[name](*(self.read(x, kind) for x in o[1:])))
        elif kind in ("f32", "f64"):
            if name not in FLOAT_OPERATIONS:
                raise NotImplementedError(instruction.text)
            self.write(o[0], FLOAT_OPERATIONS[name](*(self.read(x, kind) for x in o[1:])).astype(TYPES[kind]))
        else:
            self._integers(instruction)

    def _move(self, instruction: Instruction) -> None:
        fields, (first, second) = instruction.fields, instruction.operands
        kind = next(field for field in reversed(fields) if field in TYPES)
        count = next((int(field[1]) for field in fields if field in ("v2", "v4")), 1)
        width = np.dtype(TYPES[kind]).itemsize
        space = next(field.split("::")[0] for field in fields if field.split("::")[0] in ("param", "global", "shared"))
        if space == "param":
            self.write(first, np.repeat(self.given[second.strip("[] ")].view(RAW[width]), self.threads))
            return
        at, names = (second, first) if fields[0] == "ld" else (first, second)
        names = split(names[1:-1]) if names[0] == "{" else [names]
        addresses, warps, size = self.address(at)[self.mask], self.warp[self.mask], width * count
        if fields[0] == "ld":
            data = np.zeros((self.threads, size), np.uint8)
            read = self.memory.read(addresses, size) if space == "global" else self.shared.read(addresses, size, warps)
            data[self.mask] = read
            for i, name in enumerate(names):
                part = np.ascontiguousarray(data[:, i * width : (i + 1) * width])
                self.write(name, part.view(RAW[width])[:, 0])
            return
        parts = [np.ascontiguousarray(self.read(name, kind)).view(np.uint8).reshape(-1, width) for name in names]
        data = np.concatenate(parts, 1)[self.mask]
        if space == "global":
            self.memory.write(addresses, data)
        else:
            self.shared.write(addresses, data, warps)

    def _copy(self, instruction: Instruction) -> None:
        """cp.async: bytes arrive when their group is waited for, and not before."""
        o = instruction.operands
        if "commit_group" in instruction.fields:
            self.pending.append(self.open)
            self.open = []
        elif "wait_group" in instruction.fields:
            while len(self.pending) > int(o[0], 0):
                for target, source, valid, warps, size in self.pending.pop(0):
                    data = np.zeros((len(target), int(size)), np.uint8)
                    some = valid > 0  # a copy of 0 bytes only fills with zeros, whatever its address
                    if ((valid != 0) & (valid != size)).any():
                        raise NotImplementedError(instruction.text)
                    data[some] = self.memory.read(source[some], int(size))
                    self.shared.write(target, data, warps)
        else:
            size = int(o[2], 0)
            valid = self.read(o[3], "u32").astype(int) if len(o) > 3 else np.full(self.threads, size)
            picked = (array[self.mask] for array in (self.address(o[0]), self.address(o[1]), valid, self.warp))
            self.open.append((*picked, np.array(size)))

    def _between_lanes(self, instruction: Instruction) -> None:
        self.whole_warps()
        fields, o = instruction.fields, instruction.operands
        if fields[0] == "redux":
            values = self.read(o[1], fields[-1]).reshape(-1, 32)
            self.write(o[0], np.repeat(REDUCTIONS[fields[2]](values, axis=1).astype(values.dtype), 32))
            return
        lane, offset = np.arange(32), self.read(o[2], "u32").reshape(-1, 32).astype(int)
        source = {"bfly": lane ^ offset, "down": lane + offset, "up": lane - offset, "idx": offset % 32}[fields[2]]
        source = np.where((source >= 0) & (source < 32), source, lane)
        values = self.read(o[1], "b32").reshape(-1, 32)
        self.write(o[0].split("|")[0], np.take_along_axis(values, source, 1).reshape(-1))

    def _compare(self, instruction: Instruction) -> None:
        fields, o = instruction.fields, instruction.operands
        kind = next(field for field in reversed(fields) if field in TYPES)
        a, b = self.read(o[1], kind), self.read(o[2], kind)
        unknown = np.isnan(a) | np.isnan(b) if kind[0] == "f" else np.zeros(self.threads, bool)
        how = fields[1]
        if how in ("nan", "num"):
            result = unknown if how == "nan" else ~unknown
        elif kind[0] == "f":  # a third letter: true as well where a number is unknown
            result = np.where(unknown, len(how) == 3, COMPARISONS[how[:2]](a, b))
        else:
            result = COMPARISONS[how](a, b)
        self.write(o[0].split("|")[0], result)

    def _convert(self, instruction: Instruction) -> None:
        fields, o = instruction.fields, instruction.operands
        into, of = fields[-2:]
        if into == "tf32":  # rna: to nearest, halves away from zero
            self.write(o[0], self.read(o[1], "b32") + np.uint32(0x1000) & np.uint32(0xFFFFE000))
        elif into == "bf16x2":
            low, high = (_to_bfloat16(self.read(operand, "f32")).astype(np.uint32) for operand in (o[2], o[1]))
            self.write(o[0], low | high << np.uint32(16))
        elif into == "bf16":
            self.write(o[0], _to_bfloat16(self.read(o[1], "f32")))
        elif of == "bf16":
            self.write(o[0], tensor_cores.bfloat16(self.read(o[1], "b16")))
        else:
            value = self.read(o[1], of)
            if of[0] == "f":
                rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
                for field in fields:
                    value = rounding.get(field, lambda same: same)(value)
                if into[0] in "us":
                    limits = np.iinfo(TYPES[into])
                    value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
            self.write(o[0], value.astype(TYPES[into]))

    def _integers(self, instruction: Instruction) -> None:
        fields, o = instruction.fields, instruction.operands
        name, kind = fields[0], fields[-1]
        if name in ("shl", "shr"):
            dtype = TYPES[kind]
            value, by = self.read(o[1], kind), self.read(o[2], "u32").astype(int)
            last = 8 * np.dtype(dtype).itemsize - 1
            within = np.minimum(by, last).astype(dtype)
            shifted = value << within if name == "shl" else value >> within
            beyond = value >> dtype(last) if name == "shr" and kind[0] == "s" else np.zeros_like(value)
            self.write(o[0], np.where(by > last, beyond, shifted).astype(dtype))
        elif "wide" in fields:
            wide = kind[0] + str(2 * int(kind[1:]))
            value = self.read(o[1], kind).astype(TYPES[wide]) * self.read(o[2], kind).astype(TYPES[wide])
            self.write(o[0], value + self.read(o[3], wide) if name == "mad" else value)
        elif name == "lop3":
            a, b, c = (self.read(operand, "b32") for operand in o[1:4])
            table, result = int(o[4], 0), np.zeros(self.threads, np.uint32)
            for i in range(8):
                if table >> i & 1:
                    result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            self.write(o[0], result)
        elif name == "prmt":
            a, b, choice = (self.read(operand, "b32") for operand in o[1:4])
            both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(self.threads, np.uint32)
            for i in range(4):
                which = choice >> np.uint32(4 * i) & np.uint32(15)
                byte = both >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)
                sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
                result |= np.where(which & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
            self.write(o[0], result)
        elif name in ("bfe", "bfi"):
            self._bit_field(instruction)
        elif name in INTEGER_OPERATIONS:
            result = INTEGER_OPERATIONS[name](*(self.read(operand, kind) for operand in o[1:]))
            self.write(o[0], result.astype(TYPES[kind]))
        else:
            raise NotImplementedError(instruction.text)

    def _bit_field(self, instruction: Instruction) -> None:
        o, kind = instruction.operands, instruction.fields[-1]
        one = np.uint64(1)
        if instruction.fields[0] == "bfi":
            field, base = self.read(o[1], "b32"), self.read(o[2], "b32")
            start, length = self.read(o[3], "u32"), self.read(o[4], "u32").astype(np.uint64)
            mask = ((one << length) - one).astype(np.uint32) << start
            self.write(o[0], base & ~mask | field << start & mask)
            return
        start, length = (self.read(operand, "u32").astype(np.uint64) for operand in o[2:4])
        value = (self.read(o[1], "b32").astype(np.uint64) >> start & (one << length) - one).astype(np.int64)
        if kind == "s32":
            length = length.astype(np.int64)
            negative = (length > 0) & (value >> np.maximum(length - 1, 0) & 1 == 1)
            value = np.where(negative, value - (np.int64(1) << length), value)
        self.write(o[0], value.astype(np.int32))


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
