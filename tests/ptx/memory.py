"""Global and shared memory of a launch, with the checks that hardware does not make."""

from bisect import bisect_right

import numpy as np

GLOBAL = 0x7F0000000000  # where the first buffer begins, if nothing else is asked for; each has 4 GiB of addresses to itself
UNKNOWN = np.uint8(0xFF)  # bytes of NaN, in every type
FOREVER = np.iinfo(np.int32).max


class Fault(Exception):
    """What a GPU would do in silence, or crash of."""


class GlobalMemory:
    """The buffers that a kernel was given: flat arrays of bytes, views of the caller's arrays."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.buffers: list[np.ndarray] = []

    def add(self, array: np.ndarray, address: int | None = None) -> int:
        """The address of a new buffer: one that overlaps no other."""
        assert array.flags.c_contiguous
        if address is None:
            address = GLOBAL + (len(self.buffers) << 32)
        at = bisect_right(self.starts, address)
        self.starts.insert(at, address)
        self.buffers.insert(at, array.reshape(-1).view(np.uint8))
        return address

    def _find(self, addresses: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each buffer: which of the addresses it holds, its bytes, and their places."""
        starts = np.array(self.starts, np.int64)
        which = np.searchsorted(starts, addresses, "right") - 1
        if (which < 0).any():
            raise Fault("global access outside every buffer")
        if (addresses % size).any():
            raise Fault(f"misaligned global access of {size} bytes")
        found = []
        for index in np.unique(which):
            chosen, buffer = which == index, self.buffers[index]
            offset = addresses[chosen] - starts[index]
            if (offset + size > len(buffer)).any():
                raise Fault(f"global access beyond buffer {index} of {len(buffer)} bytes, at {offset.max()}")
            found.append((chosen, buffer, offset[:, None] + np.arange(size)))
        return found

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n,) addresses -> (n, size) bytes."""
        out = np.zeros((len(addresses), size), np.uint8)
        for chosen, buffer, places in self._find(addresses, size):
            out[chosen] = buffer[places]
        return out

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """(n,) addresses, (n, size) bytes."""
        for chosen, buffer, places in self._find(addresses, data.shape[1]):
            buffer[places] = data[chosen]


class SharedMemory:
    """Shared memory of one block of some warps; accesses are tracked by words of 4 bytes.

    A warp's time goes on at barriers. known[w, v] is the time of warp v up to which warp w may rely on what v did: barriers
    tell it. An access to what another warp did at a later time is a race.

    In a cluster, v counts the warps of all its blocks, this one's from `first` on, and behind them its signals, as writers of
    what is copied: `known` is then the rows of all warps, of which this block has its own.

    strict: what nobody wrote may not be read, and else it is NaN: some kernels compute rows that do not exist, and write none.
    """

    def __init__(self, size: int, warps: int, strict: bool = True, known: np.ndarray | None = None, first: int = 0) -> None:
        words = size // 4 + 2
        self.strict = strict
        self.bytes = np.full(size, UNKNOWN)
        self.written = np.zeros(size, bool)
        self.known = np.eye(warps, dtype=np.int32) if known is None else known[first : first + warps]
        self.first, self.own = first, self.known[:, first : first + warps]
        self.write_time, self.writer = np.zeros(words, np.int32), np.zeros(words, int)
        self.read_time = np.zeros((words, warps), np.int32)
        self.fenced = np.zeros(words, bool)

    def tell(self, warps: np.ndarray) -> np.ndarray:
        """What these warps know when they come to a barrier: (warps,) times, to be learned by who waits there."""
        told = self.known[warps].max(0)
        self.own[warps, warps] += 1
        return told

    def learn(self, warps: np.ndarray, told: np.ndarray) -> None:
        """These warps leave a barrier to which `told` was brought."""
        self.known[warps] = np.maximum(self.known[warps], told)

    def _places(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        if (addresses < 0).any() or (addresses + size > len(self.bytes)).any():
            raise Fault(f"shared access outside its {len(self.bytes)} bytes")
        if (addresses % size).any():
            raise Fault(f"misaligned shared access of {size} bytes")
        places = addresses[:, None] + np.arange(size)
        return places, places[:, :: min(size, 4)] // 4

    def read(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """(n,) addresses read by (n,) warps -> (n, size) bytes."""
        places, words = self._places(addresses, size)
        warps = np.broadcast_to(warps[:, None], words.shape)
        if (self.write_time[words] > self.known[warps, self.writer[words]]).any():
            raise self._race(words, "a warp reads what another wrote since the last barrier")
        if self.strict and not self.written[places].all():
            raise Fault("read of shared memory that nobody wrote")
        self.read_time[words, warps] = np.maximum(self.read_time[words, warps], self.own[warps, warps])
        return self.bytes[places]

    def write(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        """(n,) addresses, (n, size) bytes, written by (n,) warps."""
        places = self._claim(addresses, data.shape[1], warps)
        self.bytes[places] = data
        self.written[places] = True

    def expect(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Asynchronous copies by these warps are on their way there: until they are waited for, nobody wrote it."""
        places = self._claim(addresses, size, warps)
        self.bytes[places], self.written[places] = UNKNOWN, False

    def _claim(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        places, words = self._places(addresses, size)
        warps = np.broadcast_to(warps[:, None], words.shape)
        if (self.write_time[words] > self.known[warps, self.writer[words]]).any():
            raise self._race(words, "two warps write one word between barriers")
        if (self.read_time[words] > self.own[warps]).any():
            raise Fault("race: a warp writes what another, or a product under way, read since the last barrier")
        self.write_time[words], self.writer[words], self.fenced[words] = self.own[warps, warps], self.first + warps, False
        return places

    def _race(self, words: np.ndarray | slice, what: str) -> Fault:
        taken = (self.write_time[words] == FOREVER).any()
        return Fault("race: where a copy is under way, or a signal lies" if taken else f"race: {what}")

    def reserve(self, address: int, warp: int, column: int) -> None:
        """A signal lies there from now on, prepared by this warp: nothing else may be there."""
        _, words = self._places(np.array([address]), 8)
        self._claim(np.array([address]), 8, np.array([warp]))
        self.write_time[words], self.writer[words] = FOREVER, column

    def expect_box(self, start: int, size: int, known: np.ndarray, column: int) -> None:
        """The copy engine is on its way there, to be counted at the signal of that column. known: what the warp knows that sent
        it, perhaps one of another block. Until the box is delivered, nobody wrote it, and nobody may touch it."""
        if start + size > len(self.bytes):
            raise Fault(f"a copy beyond the {len(self.bytes)} bytes of shared memory")
        words, places = slice(start // 4, (start + size) // 4), slice(start, start + size)
        if (self.write_time[words] > known[self.writer[words]]).any():
            raise self._race(words, "a copy to what another wrote since the last barrier")
        if (self.read_time[words] > known[self.first : self.first + len(self.own)]).any():
            raise Fault("race: a copy to what another, or a product under way, read since the last barrier")
        if ((self.write_time[words] > 0) & ~self.fenced[words]).any():
            raise Fault("a copy to what was written without fence.proxy.async")
        self.write_time[words], self.writer[words], self.fenced[words] = FOREVER, column, False
        self.bytes[places], self.written[places] = UNKNOWN, False

    def deliver_box(self, start: int, data: np.ndarray, column: int, time: int) -> None:
        """The box is there, for whoever knows that time of its signal; tensor cores read it by the path it was written by."""
        words, places = slice(start // 4, (start + len(data)) // 4), slice(start, start + len(data))
        self.write_time[words], self.writer[words], self.fenced[words] = time, column, True
        self.bytes[places], self.written[places] = data, True

    def fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async by these warps: what they wrote may be read by the tensor cores' own path."""
        self.fenced |= np.isin(self.writer, self.first + warps)

    def read_by_tensor_cores(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Addresses of any shape, of numbers of 2 or 4 bytes -> the numbers, unsigned; for a product by these warps."""
        if (addresses + size > len(self.bytes)).any():
            raise Fault("wgmma operand outside shared memory")
        words = np.unique(addresses // 4)
        if (self.write_time[words] == FOREVER).any():
            raise Fault("wgmma reads where a copy is under way, or a signal lies")
        if not self.written[addresses].all():
            raise Fault("wgmma reads shared memory that nobody wrote")
        if not self.fenced[words].all():
            raise Fault("wgmma reads what was written without fence.proxy.async")
        if (self.write_time[words] > self.known[warps][:, self.writer[words]]).any():
            raise Fault("wgmma reads what was written since the last barrier")
        parts = np.ascontiguousarray(self.bytes[addresses[..., None] + np.arange(size)])
        return parts.view({2: np.uint16, 4: np.uint32}[size])[..., 0]

    def hold(self, words: np.ndarray, warps: np.ndarray) -> None:
        """A product by these warps reads these words until it is let go."""
        self.read_time[np.ix_(words, warps)] = FOREVER

    def let_go(self, words: np.ndarray, warps: np.ndarray) -> None:
        """The product has been waited for: its reads are as any other."""
        self.read_time[np.ix_(words, warps)] = self.own[warps, warps]
