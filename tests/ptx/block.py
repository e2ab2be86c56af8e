"""One block at a time: its threads are the lanes of NumPy arrays. The lowest program counter runs first, so paths rejoin."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx import arithmetic, tensor_cores
from tests.ptx.arithmetic import RAW, TYPES
from tests.ptx.cluster import Cluster, Member, copy_box, hold_for_mates, mapa, mbarrier, meet_cluster, show_signals
from tests.ptx.memory import Fault, GlobalMemory, SharedMemory
from tests.ptx.program import Instruction, Program, split

REDUCTIONS = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce}
# setmaxnreg shares out registers; bar.warp.sync: lanes of a warp are never apart for longer than a branch.
NOTHING = ("setmaxnreg", "bar")
MEETINGS = ("bar", "barrier", "mbarrier")  # behind these others may have to run first
PARAMETERS = 1 << 60  # where the arguments lie, which a kernel may take the address of


def run(
    program: Program, blocks: Sequence[int], threads: int, shared: int, arguments: Sequence[Any],
    memory: GlobalMemory | None = None, strict: bool = True, base: int = 0, only: Sequence[int] | None = None,
    cluster: Sequence[int] = (1, 1, 1), seed: int = 0,
) -> None:  # fmt: skip
    """Run all blocks, or `only` those, by their numbers. arguments: arrays (global buffers, changed in place), numbers, bytes
    (a struct, or any other argument as it is passed); None or absent: a null pointer. memory: buffers whose addresses stand in
    the arguments. strict: as SharedMemory has it. base: the address where shared memory begins. cluster: how many blocks
    run at once, along each axis; of `only`, whole clusters. seed: of the order in which copies arrive."""
    memory = memory or GlobalMemory()
    given, places = np.zeros(0, np.uint8), {}
    padded = [*arguments, *[None] * (len(program.parameters) - len(arguments))]
    for (kind, name), value in zip(program.parameters, padded, strict=True):
        if isinstance(value, np.ndarray):
            value = memory.add(value)
        raw = value if isinstance(value, bytes) else np.array([value or 0]).astype(TYPES[kind]).tobytes()
        places[name] = PARAMETERS + len(given)
        given = np.concatenate([given, np.frombuffer(raw + bytes(-len(raw) % 16), np.uint8)])
    x, y, z = grid = tuple(map(int, [*blocks, 1, 1][:3]))
    sides = tuple(map(int, [*cluster, 1, 1][:3]))
    if any(side % part for side, part in zip(grid, sides, strict=True)):
        raise Fault(f"a grid of {grid} blocks is not made of clusters of {sides}")
    numbers = range(x * y * z) if only is None else only
    corners = ((i % x // sides[0], i // x % y // sides[1], i // (x * y) // sides[2]) for i in numbers)
    signals = any(instruction.fields[:2] == ("mbarrier", "init") for instruction in program.code)
    for corner in dict.fromkeys(corners):
        together = Cluster(corner, sides, grid, threads // 32, signals, memory, seed)
        for place in together.places():
            together.blocks.append(Block(program, memory, given, places, place, grid, threads, shared, strict, base, together))
        together.run()


@dataclass
class Barrier:
    """Who waits at a barrier, how many threads have come, and what they told; None are expected: all that are left."""

    waiting: np.ndarray
    told: np.ndarray
    expected: int | None
    count: int = 0


class Block:
    """Registers, shared memory and program counters of one block."""

    def __init__(
        self, program: Program, memory: GlobalMemory, given: np.ndarray, places: dict[str, int],
        index: tuple[int, ...], blocks: tuple[int, ...], threads: int, dynamic: int, strict: bool, base: int, cluster: Cluster,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.given, self.threads = program, memory, given, threads
        self.registers: dict[str, np.ndarray] = {}
        self.constants: dict[tuple[str, str], np.ndarray] = {}
        self.mask = self.alive = np.ones(threads, bool)
        self.waiting, self.counter = np.zeros(threads, bool), np.zeros(threads, int)
        self.cluster, self.member = cluster, Member(len(cluster.blocks), threads)
        self.barriers: dict[int, Barrier] = {}
        self.warp = np.arange(threads) // 32
        self.special = {f"%{name}.{axis}": np.full(threads, value) for name, values in
                        (("ctaid", index), ("nctaid", blocks), ("ntid", (threads, 1, 1)), ("tid", (0, 0, 0)),
                         *cluster.special(len(cluster.blocks)))
                        for axis, value in zip("xyz", values, strict=True)}  # fmt: skip
        self.special |= {"%tid.x": np.arange(threads), "%laneid": np.arange(threads) % 32}
        ranks = {"%cluster_ctarank": self.member.rank, "%cluster_nctarank": cluster.size}
        self.special |= {name: np.full(threads, value) for name, value in ranks.items()}
        self.symbols = dict(places)
        size = base
        for name, static in sorted(program.shared.items(), key=lambda item: item[1] == 0):
            self.symbols[name] = size = -(-size // 128) * 128
            size += static
        self.shared = SharedMemory(size + dynamic, threads // 32, strict, cluster.known, self.member.rank * (threads // 32))
        # Asynchronous copies under way: a thread, its group, target, source, how many bytes are valid, and of how many.
        self.copies: list[tuple[np.ndarray, ...]] = []
        self.groups = np.zeros(threads, int)  # that every thread has committed
        self.products = tensor_cores.Products(self.shared)

    def ready(self) -> np.ndarray:
        """The threads that can go on."""
        return self.alive & ~self.waiting

    def run(self) -> Iterator[None]:
        """Until every thread has returned; a Fault says in which instruction it happened. Stops where nobody can go on before
        something happens in the cluster."""
        counter, code, labels = self.counter, self.program.code, self.program.labels
        while self.alive.any():
            ready = self.ready()
            if not ready.any():
                if not self._all_wait():
                    yield
                continue
            place = int(counter[ready].min())
            here = ready & (counter == place)
            others = counter[ready & ~here]
            limit = min(int(others.min()) if others.size else len(code), len(code))
            if place == len(code):
                self.alive = self.alive & ~here
            while place < limit:  # straight on, until paths part or join
                instruction = code[place]
                acting = here
                if instruction.guard is not None:
                    asked = self.registers[instruction.guard]
                    acting = here & (~asked if instruction.negated else asked)
                place += 1
                counter[here] = place
                name = instruction.fields[0]
                if name == "bra":
                    counter[acting] = labels[instruction.operands[0]]
                    break
                if name in ("ret", "exit"):
                    self.alive = self.alive & ~acting
                    break
                if name == "wgmma" and self.member.polling.any():
                    late = hold_for_mates(self, acting)
                    counter[late] = place - 1
                    acting = acting & ~late
                    here = here & ~late
                    if not here.any():
                        break
                if not acting.any():
                    continue
                self.mask = acting
                try:
                    with np.errstate(all="ignore"):
                        if name in MEETINGS and "warp" not in instruction.fields:
                            self._meet(instruction)
                            break
                        self.execute(instruction)
                except Fault as fault:
                    raise Fault(f"{fault}, in: {instruction.text}") from None
        if self.copies:
            raise Fault("asynchronous copies still under way at the end")
        if self.products.under_way():
            raise Fault("products still under way at the end")
        if self.barriers:
            raise Fault("a block ends with threads at a barrier")
        self.cluster.end(self)

    # Barriers.

    def _meet(self, instruction: Instruction) -> None:
        """Barriers of all kinds. bar.sync and bar.arrive, numbered or not: those who come together may stand anywhere in the
        code."""
        if instruction.fields[0] == "mbarrier":
            return mbarrier(self, instruction)
        if instruction.fields[1] == "cluster":
            return meet_cluster(self, instruction)
        o = instruction.operands
        numbers = self.read(o[0], "u32") if o else np.zeros(self.threads, np.uint32)
        acting = self.mask
        for number in np.unique(numbers[acting]).tolist():
            here = acting & (numbers == number)
            expected = int(self.read(o[1], "u32")[here][0]) if len(o) > 1 else None
            warps = np.unique(self.warp[here])
            told = self.shared.tell(warps)
            barrier = self.barriers.get(number)
            if barrier is None:
                barrier = self.barriers[number] = Barrier(np.zeros(self.threads, bool), told, expected)
            if barrier.expected != expected:
                raise Fault(f"barrier {number} is for {barrier.expected} threads and for {expected}")
            barrier.told = np.maximum(barrier.told, told)
            barrier.count += int(here.sum())
            if "arrive" not in instruction.fields:
                barrier.waiting |= here
                self.waiting |= here
            if expected is not None and barrier.count >= expected:
                if barrier.count > expected:
                    raise Fault(f"more threads than {expected} at barrier {number}")
                self._leave(number)

    def _all_wait(self) -> bool:
        """Nobody can go on: barriers for everybody that everybody has come to end. Whether there was one; else the cluster may
        have what some wait for."""
        for number, barrier in list(self.barriers.items()):
            if barrier.expected is None and np.array_equal(barrier.waiting, self.alive):
                self._leave(number)
                return True
        if not self.member.waits():
            raise Fault("part of a block waits at a barrier")
        return False

    def _leave(self, number: int) -> None:
        barrier = self.barriers.pop(number)
        self.waiting &= ~barrier.waiting
        self.shared.learn(np.unique(self.warp[barrier.waiting]), barrier.told)

    # Registers: raw bits, all threads at once.

    def knows(self, name: str) -> bool:
        return name in self.registers

    def has_value(self, operand: str) -> bool:
        """Whether it is no register that nobody wrote."""
        return operand[0] != "%" or operand in self.special or self.knows(operand)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand of every thread, as numbers of a type."""
        if kind == "pred":
            if operand in self.registers:
                return self.registers[operand]
            return np.full(self.threads, int(operand, 0) != 0)
        raw = self.registers.get(operand)
        if raw is None:
            if (operand, kind) in self.constants:
                return self.constants[operand, kind]
            raw = self._read_other(operand, kind)
        dtype = TYPES[kind]
        if raw.dtype.itemsize != np.dtype(dtype).itemsize:
            raw = raw.astype(RAW[np.dtype(dtype).itemsize])
        value = raw.view(dtype)
        if operand[0] not in "{%":
            self.constants[operand, kind] = value
        return value

    def _read_other(self, operand: str, kind: str) -> np.ndarray:
        if operand[0] == "{":
            parts = split(operand[1:-1])
            bits = 8 * np.dtype(TYPES[kind]).itemsize // len(parts)
            raw = np.zeros(self.threads, np.uint64)
            for i, part in enumerate(parts):
                # Half of a word may be what nobody wrote, for nobody to use: NaN, should somebody all the same.
                number = self.read(part, f"b{bits}").astype(np.uint64) if self.has_value(part) else np.uint64(2**bits - 1)
                raw |= number << np.uint64(bits * i)
            return raw
        if operand in self.special:
            return self.special[operand]
        if operand[0] == "%":
            raise Fault(f"register {operand} is read before it is written")
        if operand in self.symbols:
            return np.full(self.threads, self.symbols[operand], np.uint64)
        if operand[:2].lower() in ("0f", "0d"):
            return np.full(self.threads, int(operand[2:], 16), RAW[4 if operand[1] in "fF" else 8])
        return np.full(self.threads, int(operand.rstrip("U"), 0) & (2**64 - 1), np.uint64)

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
        """[register + offset] -> int64 addresses; of a register of 32 bits, modulo 2^32."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert match is not None, operand
        base, offset = match[1], int(match[2], 0) if match[2] else 0
        addresses = self.read(base, "u64").astype(np.int64) + offset
        return addresses & 0xFFFFFFFF if self.knows(base) and self.registers[base].dtype.itemsize == 4 else addresses

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
        elif fields[:3] == ("cp", "async", "bulk"):
            copy_box(self, instruction)
        elif fields[:2] == ("cp", "async"):
            self._copy(instruction)
        elif name in ("mma", "wgmma", "ldmatrix", "stmatrix", "movmatrix"):
            getattr(tensor_cores, name)(self, instruction)
        elif name == "mapa":
            mapa(self, instruction)
        elif name == "fence":
            if "mbarrier_init" in fields:
                show_signals(self)
            if "async" in fields and not {"global", "shared::cluster"} & set(fields):
                self.shared.fence(np.unique(self.warp[self.mask]))
        elif name in ("shfl", "redux"):
            self._between_lanes(instruction)
        elif name in ("setp", "cvt"):
            getattr(arithmetic, name)(self, instruction)
        elif name == "selp":
            # A variable without a value may be chosen, for nobody to use.
            first, second = (self.read(x, kind) if self.has_value(x) else np.zeros(self.threads, TYPES[kind]) for x in o[1:3])
            self.write(o[0], np.where(self.read(o[3], "pred"), first, second))
        elif name == "cvta":
            self.write(o[0], self.read(o[1], "u64"))
        elif name == "mov":
            # Where a branch leaves a variable without a value, compilers move what nobody wrote, for nobody to use.
            if self.has_value(o[1]):
                self.write(o[0], self.read(o[1], kind))
        elif name not in NOTHING:
            arithmetic.calculate(self, instruction)

    def _move(self, instruction: Instruction) -> None:
        fields, (first, second) = instruction.fields, instruction.operands
        kind = next(field for field in reversed(fields) if field in TYPES)
        count = next((int(field[1]) for field in fields if field in ("v2", "v4")), 1)
        width = np.dtype(TYPES[kind]).itemsize
        spaces = [field.split("::")[0] for field in fields if field.split("::")[0] in ("param", "global", "shared")]
        at, names = (second, first) if fields[0] == "ld" else (first, second)
        names = split(names[1:-1]) if names[0] == "{" else [names]
        addresses, warps, size = self.address(at)[self.mask], self.warp[self.mask], width * count
        # Without a space: to arguments, or to what they point to; compilers know of shared memory that it is that.
        space = spaces[0] if spaces else "param" if (addresses >= PARAMETERS).all() else "global"
        if fields[0] == "ld":
            data = np.zeros((self.threads, size), np.uint8)
            if space == "param":
                data[self.mask] = self.read_arguments(addresses, size)
            elif space == "global":
                data[self.mask] = self.memory.read(addresses, size)
            else:
                data[self.mask] = self.shared.read(addresses, size, warps)
            for i, name in enumerate(names):
                part = np.ascontiguousarray(data[:, i * width : (i + 1) * width]).view(TYPES[kind])[:, 0]
                # Into a wider register with its sign.
                self.write(name, part.astype(np.int64) if kind[0] == "s" else part)
            return
        parts = [np.ascontiguousarray(self.read(name, kind)).view(np.uint8).reshape(-1, width) for name in names]
        data = np.concatenate(parts, 1)[self.mask]
        if space == "global":
            self.memory.write(addresses, data)
        elif space == "shared":
            self.shared.write(addresses, data, warps)
        else:
            raise NotImplementedError(instruction.text)

    def read_arguments(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n,) addresses of what the kernel was given -> (n, size) bytes."""
        places = addresses - PARAMETERS
        if (places < 0).any() or (places + size > len(self.given)).any() or (places % size).any():
            raise Fault(f"misaligned access to arguments, or one beyond their {len(self.given)} bytes")
        return self.given[places[:, None] + np.arange(size)]

    def _copy(self, instruction: Instruction) -> None:
        """cp.async: bytes arrive when their group is waited for, and not before."""
        o = instruction.operands
        if "commit_group" in instruction.fields:
            self.groups[self.mask] += 1
        elif "wait_group" in instruction.fields:
            last, left = self.groups - int(o[0], 0), []
            for copies in self.copies:
                thread, group = copies[:2]
                done = self.mask[thread] & (group < last[thread])
                self._arrive(*(array[done] for array in copies), instruction)
                if not done.all():
                    left.append(tuple(array[~done] for array in copies))
            self.copies = left
        else:
            size, thread = int(o[2], 0), np.flatnonzero(self.mask)
            valid = self.read(o[3], "u32")[thread].astype(int) if len(o) > 3 else np.full(len(thread), size)
            target, source = self.address(o[0])[thread], self.address(o[1])[thread]
            self.shared.expect(target, size, self.warp[thread])
            self.copies.append((thread, self.groups[thread], target, source, valid, np.full(len(thread), size)))

    def _arrive(
        self, thread: np.ndarray, _: np.ndarray, target: np.ndarray, source: np.ndarray, valid: np.ndarray, sizes: np.ndarray,
        instruction: Instruction,
    ) -> None:  # fmt: skip
        if not len(thread):
            return
        size = int(sizes[0])
        if ((valid != 0) & (valid != size)).any():
            raise NotImplementedError(instruction.text)
        data = np.zeros((len(thread), size), np.uint8)
        some = valid > 0  # a copy of 0 bytes only fills with zeros, whatever its address
        data[some] = self.memory.read(source[some], size)
        self.shared.write(target, data, self.warp[thread])

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
