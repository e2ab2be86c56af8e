"""Global and shared memory of a launch, with the checks that hardware does not make."""

import numpy as np

GLOBAL = 0x7F0000000000  # where the first buffer begins; each has 4 GiB of addresses to itself


class Fault(Exception):
    """What a GPU would do in silence, or crash of."""


class GlobalMemory:
    """The buffers that a kernel was given: flat arrays of bytes, views of the caller's arrays."""

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> int:
        """The address of a new buffer."""
        assert array.flags.c_contiguous
        self.buffers.append(array.reshape(-1).view(np.uint8))
        return GLOBAL + ((len(self.buffers) - 1) << 32)

    def _find(self, addresses: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each buffer: which of the addresses it holds, its bytes, and their places."""
        places = addresses - GLOBAL
        which, offset = places >> 32, places & 0xFFFFFFFF
        if (which < 0).any() or (which >= len(self.buffers)).any():
            raise Fault("global access outside every buffer")
        if (addresses % size).any():
            raise Fault(f"misaligned global access of {size} bytes")
        found = []
        for index in np.unique(which):
            chosen, buffer = which == index, self.buffers[index]
            if (offset[chosen] + size > len(buffer)).any():
                raise Fault(f"global access beyond buffer {index} of {len(buffer)} bytes, at {offset[chosen].max()}")
            found.append((chosen, buffer, offset[chosen][:, None] + np.arange(size)))
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
    """Shared memory of one block. An epoch is the time between two barriers; accesses are tracked by words of 4 bytes."""

    def __init__(self, size: int) -> None:
        words = size // 4 + 2
        self.bytes = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.epoch = 1
        self.write_epoch, self.read_epoch = np.zeros(words, int), np.zeros(words, int)
        self.writer, self.reader = np.zeros(words, int), np.zeros(words, int)
        self.fenced = np.zeros(words, bool)

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
        if ((self.write_epoch[words] == self.epoch) & (self.writer[words] != warps)).any():
            raise Fault("race: a warp reads what another wrote since the last barrier")
        if not self.written[places].all():
            raise Fault("read of shared memory that nobody wrote")
        several = (self.read_epoch[words] == self.epoch) & (self.reader[words] != warps)
        self.reader[words] = np.where(several, -2, warps)
        self.read_epoch[words] = self.epoch
        return self.bytes[places]

    def write(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        """(n,) addresses, (n, size) bytes, written by (n,) warps."""
        places, words = self._places(addresses, data.shape[1])
        warps = np.broadcast_to(warps[:, None], words.shape)
        if ((self.write_epoch[words] == self.epoch) & (self.writer[words] != warps)).any():
            raise Fault("race: two warps write one word between barriers")
        if ((self.read_epoch[words] == self.epoch) & (self.reader[words] != warps)).any():
            raise Fault("race: a warp writes what another read since the last barrier")
        self.write_epoch[words], self.writer[words], self.fenced[words] = self.epoch, warps, False
        self.bytes[places] = data
        self.written[places] = True

    def fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async by these warps: what they wrote may be read by the tensor cores' own path."""
        self.fenced |= np.isin(self.writer, warps)

    def read_by_tensor_cores(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Addresses of any shape, of numbers of 2 or 4 bytes -> the numbers, unsigned."""
        if (addresses + size > len(self.bytes)).any():
            raise Fault("wgmma operand outside shared memory")
        if not self.written[addresses].all():
            raise Fault("wgmma reads shared memory that nobody wrote")
        if not self.fenced[addresses // 4].all():
            raise Fault("wgmma reads what was written without fence.proxy.async")
        if (self.write_epoch[addresses // 4] == self.epoch).any():
            raise Fault("wgmma reads what was written since the last barrier")
        parts = np.ascontiguousarray(self.bytes[addresses[..., None] + np.arange(size)])
        return parts.view({2: np.uint16, 4: np.uint32}[size])[..., 0]
