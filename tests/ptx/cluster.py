"""Clusters: blocks that run at once, signals in their shared memories (mbarrier), and boxes that the copy engine brings (TMA).

Blocks take turns: each goes on until all its threads wait. Only where no block of the cluster can go on, boxes arrive: one at a
time, in an order drawn by lot. What is told and learned is the time of every warp of the cluster, and of every signal: as a
writer of boxes, whose time is the number of phases that have ended.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.memory import Fault, GlobalMemory
from tests.ptx.program import Instruction, split

if TYPE_CHECKING:
    from tests.ptx.block import Block

SIGNALS = 64  # of a block, at most
WINDOW = 24  # bits of an address within a block; above them, in an address for the cluster, the block's number plus 1
LINE, PIECE = 128, 16  # bytes of a box that lie together, and that stay together
LIMIT = 1 << 20  # arrivals, and bytes, that a signal can count
# That of map_tensor in tests/cuda_emulation: an address, sizes, strides in bytes, sides of a box, and a number to know it by.
TENSOR_MAP, MAGIC = struct.Struct("<6q3iI"), 0x6B616E6D
COPY = "cp async bulk tensor 3d shared::cluster global tile mbarrier::complete_tx::bytes"


@dataclass
class Signal:
    """One mbarrier. A phase ends when nobody and no byte is left to come; some bytes may come before they are announced."""

    column: int  # as a writer of boxes
    creator: int  # the warp, among those of the cluster, that prepared it,
    since: int  # and when
    arrivals: int
    told: np.ndarray  # in this phase
    ended: np.ndarray  # in those before
    shown: bool = False
    left: int = 0
    bytes: int = 0
    phase: int = 0
    copied: int = 0  # the time of the last box
    looked: dict[int, int] = field(default_factory=dict)  # the phase that threads have found not to have ended

    def arrive(self, arrivals: int, told: np.ndarray) -> None:
        """So many threads come, and tell this."""
        if arrivals > self.left:
            raise Fault(f"more arrivals than {self.arrivals} in a phase of a signal")
        self.left -= arrivals
        self.told = np.maximum(self.told, told)

    def count(self, announced: int) -> None:
        """So many bytes more are to come, or, if negative, have come."""
        self.bytes += announced
        if abs(self.bytes) >= LIMIT:
            raise Fault(f"a signal cannot count {self.bytes} bytes")

    def ends(self) -> bool:
        """Begin the next phase, if this one is over."""
        if self.left or self.bytes > 0:
            return False
        if self.bytes < 0:
            raise Fault(f"{-self.bytes} bytes more than were announced in a phase of a signal")
        self.phase += 1
        self.told[self.column] = self.phase
        self.ended, self.told = np.maximum(self.ended, self.told), np.zeros_like(self.told)
        self.left = self.arrivals
        return True


class Member:
    """What a block has to do with its cluster. Of threads: who waits for a signal, who is held back only because others of the
    warp do, who waits at the cluster's barrier, and at which of its phases each arrived last."""

    def __init__(self, rank: int, threads: int) -> None:
        self.rank = rank
        self.signals: dict[int, Signal] = {}
        self.polling, self.held, self.meeting = np.zeros((3, threads), bool)
        self.met = np.full(threads, -1)

    def waits(self) -> bool:
        """Whether some wait for what only the cluster, or the copy engine, may bring."""
        return bool((self.polling | self.meeting).any())


@dataclass(frozen=True)
class TensorMap:
    """Where a tensor of 16-bit numbers lies, the contiguous axis first, and how large a box of it is."""

    numbers: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # of the other axes, in bytes
    box: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return LINE * self.box[1] * self.box[2]

    def read(self, memory: GlobalMemory, corner: tuple[int, ...]) -> np.ndarray:
        """The lines of the box that begins there, (lines, pieces, bytes); zeros outside the tensor."""
        places = np.meshgrid(*(np.arange(c, c + side) for c, side in zip(corner, self.box, strict=True)), indexing="ij")
        x, y, z = (place.transpose(2, 1, 0) for place in places)
        inside = np.all([(place >= 0) & (place < size) for place, size in zip((x, y, z), self.sizes, strict=True)], axis=0)
        addresses = self.numbers + 2 * x + self.strides[0] * y + self.strides[1] * z
        data = np.zeros((*inside.shape, 2), np.uint8)
        data[inside] = memory.read(addresses[inside], 2)
        return data.reshape(-1, LINE // PIECE, PIECE)


@dataclass(frozen=True)
class Copy:
    """A box on its way to one block."""

    block: "Block" = field(repr=False)
    address: int
    signal: Signal
    map: TensorMap
    corner: tuple[int, ...]
    text: str


class Cluster:
    """The blocks that run at once, their barrier, and the boxes on their way to them."""

    def __init__(
        self, place: tuple[int, ...], sides: tuple[int, ...], grid: tuple[int, ...], warps: int, signals: bool,
        memory: GlobalMemory, seed: int,
    ) -> None:  # fmt: skip
        self.place, self.sides, self.grid, self.memory = place, sides, grid, memory
        self.size = int(np.prod(sides))
        self.columns = self.size * (warps + signals * SIGNALS)
        self.known = np.eye(self.size * warps, self.columns, dtype=np.int32)
        self.free = self.size * warps  # the next column for a signal
        self.blocks: list[Block] = []
        self.copies: list[Copy] = []
        self.random = np.random.default_rng(seed)
        self.tried = False  # to let those go on who are held back, since something last happened
        self.phase = 0  # of the barrier
        self.told = self.ended = np.zeros(self.columns, np.int32)
        # When warps last arrived at a signal of another block, for each block.
        self.visited = np.zeros((self.size, self.columns), np.int32)

    def places(self) -> Iterator[tuple[int, ...]]:
        """Where in the grid the blocks are, by their numbers in the cluster."""
        for rank in range(self.size):
            inside = self._inside(rank)
            yield tuple(p * side + i for p, side, i in zip(self.place, self.sides, inside, strict=True))

    def _inside(self, rank: int) -> tuple[int, ...]:
        x, y, _ = self.sides
        return rank % x, rank // x % y, rank // (x * y)

    def special(self, rank: int) -> list[tuple[str, tuple[int, ...]]]:
        """Registers of three axes, for a block."""
        clusters = tuple(blocks // side for blocks, side in zip(self.grid, self.sides, strict=True))
        return [("cluster_ctaid", self._inside(rank)), ("cluster_nctaid", self.sides),
                ("clusterid", self.place), ("nclusterid", clusters)]  # fmt: skip

    def run(self) -> None:
        """All blocks, to their ends."""
        going = {block: block.run() for block in self.blocks}
        while going:
            ready = [block for block in going if block.ready().any()]
            for block in ready:
                if next(going[block], True):
                    del going[block]
            if not ready:
                self._go_on()

    def _go_on(self) -> None:
        """Nobody can: what everybody waits for happens, in the order in which it is certain to."""
        if all((block.member.met == self.phase)[block.alive].all() for block in self.blocks):
            self.phase, self.tried = self.phase + 1, False
            self.ended, self.told = self.told, np.zeros(self.columns, np.int32)
            for block in self.blocks:
                meeting = block.member.meeting.copy()
                block.waiting &= ~meeting
                block.member.meeting[:] = False
                block.shared.learn(np.unique(block.warp[meeting]), self.ended)
        elif self.copies:
            self._deliver(self.copies.pop(int(self.random.integers(len(self.copies)))))
        elif any(block.member.held.any() for block in self.blocks) and not self.tried:
            self.tried = True
            for block in self.blocks:
                block.waiting &= ~block.member.held
                block.member.held[:] = False
        elif any(block.member.polling.any() for block in self.blocks):
            raise Fault("part of a cluster waits for a signal")
        else:
            raise Fault("part of a cluster waits at its barrier")

    def _deliver(self, copy: Copy) -> None:
        try:
            lines = copy.map.read(self.memory, copy.corner)
            piece = np.arange(LINE // PIECE)
            line = copy.address // LINE + np.arange(len(lines))[:, None]
            turned = np.empty_like(lines)
            np.put_along_axis(turned, (piece ^ line % len(piece))[..., None], lines, 1)
            copy.signal.copied = copy.signal.phase + 1
            copy.block.shared.deliver_box(copy.address, turned.reshape(-1), copy.signal.column, copy.signal.copied)
            copy.signal.count(-copy.map.bytes)
            self.settle(copy.block, copy.signal)
        except Fault as fault:
            raise Fault(f"{fault}, in: {copy.text}") from None

    def settle(self, block: "Block", signal: Signal) -> None:
        """Something has come to a signal of a block: if that ends a phase, who waits there looks again."""
        if signal.ends():
            member, self.tried = block.member, False
            block.waiting &= ~(member.polling | member.held)
            member.polling[:] = member.held[:] = False

    def find(self, block: "Block", address: int, warps: np.ndarray, shown: bool = False) -> Signal:
        """The signal there, which these warps, of the cluster's, use; or the copy engine, which must have been shown it."""
        if not block.alive.any():
            raise Fault("a signal of a block that has ended")
        if address % 8:
            raise Fault("a misaligned signal")
        signal = block.member.signals.get(address)
        if signal is None:
            raise Fault("a signal that has not been prepared")
        others = warps != signal.creator
        if (shown or others.any()) and not signal.shown:
            raise Fault("a signal is used without fence.mbarrier_init")
        if (self.known[warps[others], signal.creator] < signal.since).any():
            raise Fault("a signal is used by others without a barrier since it was prepared")
        return signal

    def part(self, block: "Block", address: int) -> tuple["Block", int]:
        """The block that an address for the cluster belongs to, and the address there."""
        rank = (address >> WINDOW) - 1
        if rank >= self.size:
            raise Fault(f"block {rank} of a cluster of {self.size}")
        return (block if rank < 0 else self.blocks[rank]), address & (1 << WINDOW) - 1

    def end(self, block: "Block") -> None:
        """A block has ended: nothing may come to it any more, and it must know of all that came."""
        if any(copy.block is block for copy in self.copies):
            raise Fault("a block ends with a copy to it under way")
        known = block.shared.known.max(0)
        for signal in block.member.signals.values():
            if signal.bytes:
                raise Fault("a block ends with bytes of a signal to come, or not announced")
            if signal.copied > known[signal.column]:
                raise Fault("a block ends with a copy to it that nobody has waited for")
        if (self.visited[block.member.rank] > known).any():
            raise Fault("a block may end before another arrives at its signal")


def mapa(block: "Block", instruction: Instruction) -> None:
    """mapa.shared::cluster.u32: where another block's shared memory has what lies there in this one's."""
    if instruction.fields != ("mapa", "shared::cluster", "u32"):
        raise NotImplementedError(instruction.text)
    into, address, rank = instruction.operands
    ranks = block.read(rank, "u32")
    if (ranks[block.mask] >= block.cluster.size).any():
        raise Fault(f"a block beyond the {block.cluster.size} of a cluster")
    block.write(into, block.read(address, "u32") | ranks + np.uint32(1) << np.uint32(WINDOW))


def meet_cluster(block: "Block", instruction: Instruction) -> None:
    """barrier.cluster: every thread arrives, and only then waits."""
    cluster, member, acting = block.cluster, block.member, block.mask
    warps = np.unique(block.warp[acting])
    if "arrive" in instruction.fields:
        if (member.met[acting] == cluster.phase).any():
            raise Fault("a thread arrives twice at the cluster's barrier")
        member.met[acting] = cluster.phase
        cluster.told = np.maximum(cluster.told, block.shared.tell(warps))
        return
    if (member.met[acting] < 0).any() or (member.met[acting] < cluster.phase - 1).any():
        raise Fault("a thread waits at the cluster's barrier without having arrived")
    late = acting & (member.met == cluster.phase)
    member.meeting |= late
    block.waiting |= late
    block.shared.learn(np.unique(block.warp[acting & ~late]), cluster.ended)


def show_signals(block: "Block") -> None:
    """fence.mbarrier_init: those that these warps prepared may be used by others."""
    for signal in block.member.signals.values():
        if signal.creator - block.shared.first in block.warp[block.mask]:
            signal.shown = True


def mbarrier(block: "Block", instruction: Instruction) -> None:
    """mbarrier.init, .arrive{.expect_tx} at this block's own, .arrive at any of the cluster's, .try_wait.parity."""
    fields, o = instruction.fields, instruction.operands
    acting = block.mask
    if fields[:2] == ("mbarrier", "init"):
        addresses, arrivals = block.address(o[0]), block.read(o[1], "u32")
        for thread in np.flatnonzero(acting).tolist():
            _prepare(block, int(addresses[thread]), int(arrivals[thread]), int(block.warp[thread]))
    elif fields[:2] == ("mbarrier", "arrive") and o[0] == "_":
        announces = "expect_tx" in fields
        if len(o) != (3 if announces else 2):
            raise NotImplementedError(instruction.text)
        addresses = block.address(o[1])
        announced = block.read(o[2], "u32").astype(int) if announces else np.zeros(block.threads, int)
        for address in np.unique(addresses[acting]).tolist():
            _arrive(block, address, acting & (addresses == address), announced, "shared::cluster" in fields)
    elif fields[:3] == ("mbarrier", "try_wait", "parity"):
        _wait(block, o[0], block.address(o[1]), block.read(o[2], "u32"))
    else:
        raise NotImplementedError(instruction.text)


def _prepare(block: "Block", address: int, arrivals: int, warp: int) -> None:
    cluster, shared = block.cluster, block.shared
    if not 0 < arrivals < LIMIT:
        raise Fault(f"a signal for {arrivals} arrivals")
    if address in block.member.signals:
        raise Fault("a signal is prepared twice")
    if cluster.free == cluster.columns:
        raise NotImplementedError(f"more signals than {SIGNALS} in a block")
    column, cluster.free = cluster.free, cluster.free + 1
    shared.reserve(address, warp, column)
    nothing = np.zeros(cluster.columns, np.int32)
    signal = Signal(column, shared.first + warp, int(shared.own[warp, warp]), arrivals, nothing, nothing.copy(), left=arrivals)
    block.member.signals[address] = signal


def _arrive(block: "Block", address: int, acting: np.ndarray, announced: np.ndarray, anywhere: bool) -> None:
    cluster = block.cluster
    there, place = cluster.part(block, address) if anywhere else (block, address)
    warps = np.unique(block.warp[acting])
    others = block.shared.first + warps
    signal = cluster.find(there, place, others)
    if there is not block:
        cluster.visited[there.member.rank, others] = block.shared.own[warps, warps]
    signal.count(int(announced[acting].sum()))
    signal.arrive(int(acting.sum()), block.shared.tell(warps))
    cluster.settle(there, signal)


def _wait(block: "Block", into: str, addresses: np.ndarray, parity: np.ndarray) -> None:
    """Who waits in vain is set aside until a phase ends; so are others of the warp that are as far or farther: a compiler lets
    them wait where paths join."""
    acting, ended = block.mask, np.zeros(block.threads, bool)
    if (parity[acting] > 1).any():
        raise Fault("a parity that is neither 0 nor 1")
    for address in np.unique(addresses[acting]).tolist():
        here = acting & (addresses == address)
        signal = block.cluster.find(block, address, block.shared.first + np.unique(block.warp[here]))
        passed = here & (parity != signal.phase % 2)
        block.shared.learn(np.unique(block.warp[passed]), signal.ended)
        ended |= passed
        for thread in np.flatnonzero(here).tolist():
            if passed[thread]:
                signal.looked.pop(thread, None)
            elif signal.looked.setdefault(thread, signal.phase) != signal.phase:
                raise Fault("a signal is two phases ahead of a thread that waits for it")
    block.write(into, ended)
    vain = acting & ~ended
    if vain.any():
        member = block.member
        mates = np.isin(block.warp, block.warp[vain]) & (block.counter >= block.counter[vain].min())
        member.polling |= vain
        member.held |= block.ready() & mates & ~vain
        block.waiting |= member.polling | member.held


def hold_for_mates(block: "Block", acting: np.ndarray) -> np.ndarray:
    """Threads that reach an instruction for whole warpgroups, of which others wait for a signal: set aside as those are."""
    member, late = block.member, np.zeros(block.threads, bool)
    for first in range(0, block.threads // 128 * 128, 128):
        group = slice(first, first + 128)
        if acting[group].any() and (~acting & (member.polling | member.held))[group].any():
            late[group] = acting[group]
    member.held |= late
    block.waiting |= late
    return late


def copy_box(block: "Block", instruction: Instruction) -> None:
    """cp.async.bulk.tensor.3d, to this block or {.multicast::cluster} to several: each thread sends a box on its way."""
    o, cluster, shared = instruction.operands, block.cluster, block.shared
    several = instruction.fields[-1] == "multicast::cluster"
    if instruction.fields != tuple(COPY.split() + ["multicast::cluster"] * several):
        raise NotImplementedError(instruction.text)
    source = re.fullmatch(r"\[(.*)\]", o[1])
    assert source is not None, o[1]
    map_address, corner = split(source[1])
    maps, targets, signals = block.address(f"[{map_address}]"), block.address(o[0]), block.address(o[2])
    corners = [block.read(name, "s32") for name in split(corner[1:-1])]
    bits = block.read(o[3], "u16") if several else np.full(block.threads, 1 << block.member.rank)
    for thread in np.flatnonzero(block.mask).tolist():
        mask, target, place = int(bits[thread]), int(targets[thread]), int(signals[thread])
        if not mask or mask >> cluster.size:
            raise Fault(f"a copy to the blocks {mask:#b} of a cluster of {cluster.size}")
        if target % LINE:
            raise Fault(f"a copy to a misaligned address, {target}")
        tensor, warp = _tensor_map(block, int(maps[thread])), block.warp[thread] + shared.first
        for rank in range(cluster.size):
            if mask >> rank & 1:
                there = cluster.blocks[rank]
                signal = cluster.find(there, place, np.array([warp]), shown=True)
                there.shared.expect_box(target, tensor.bytes, cluster.known[warp], signal.column)
                begin = tuple(int(axis[thread]) for axis in corners)
                cluster.copies.append(Copy(there, target, signal, tensor, begin, instruction.text))


def _tensor_map(block: "Block", address: int) -> TensorMap:
    raw = block.read_arguments(address + np.arange(0, TENSOR_MAP.size, 16), 16).tobytes()
    numbers, *rest, magic = TENSOR_MAP.unpack(raw)
    if magic != MAGIC:
        raise Fault("a copy by what is no tensor map")
    tensor = TensorMap(numbers, tuple(rest[:3]), tuple(rest[3:5]), tuple(rest[5:]))
    if 2 * tensor.box[0] != LINE:
        raise NotImplementedError(f"boxes of {tensor.box[0]} numbers a line")
    return tensor
