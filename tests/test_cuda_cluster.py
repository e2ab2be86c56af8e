"""Clusters, signals and the copy engine of the emulation: what they do, and whether what hardware would not survive is found.

The kernels are those of tests/cuda_emulation/clusters.cpp.
"""

import ctypes
import os
import subprocess

import numpy as np
import pytest

from tests.cuda_emulation.build import build, compiler
from tests.ptx.cuda import OBSERVER

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

UNTOUCHED = 0x7BAD
# Matrices, rows, columns; each row has two numbers more, and each matrix a row.
SIZES = (5, 29, 70)
Triple = ctypes.c_int64 * 3


class Boxes(ctypes.Structure):
    """kan::cuda::Boxes of csrc/cuda/tensor_map.h."""

    _fields_ = [
        ("numbers", ctypes.c_void_p), ("sizes", Triple), ("strides", ctypes.c_int64 * 2), ("box", ctypes.c_int * 3),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def probe():
    library = ctypes.CDLL(str(build("clusters.cpp", kernels=False)))
    library.kan_map.restype = library.kan_take_rounds.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def tensor():
    """With all its padding, at a multiple of 16 bytes."""
    matrices, rows, columns = SIZES
    shape = matrices, rows + 1, columns + 2
    raw = np.zeros(np.prod(shape) + 8, np.uint16)
    begin = -raw.ctypes.data // 2 % 8
    whole = raw[begin : begin + np.prod(shape)].reshape(shape)
    whole[:] = 1 + np.arange(whole.size, dtype=np.uint16).reshape(shape) % 30011
    return whole


def description(tensor, lines, **changes):
    """Boxes of so many lines of 64 numbers."""
    matrices, rows, columns = SIZES
    values = {
        "numbers": tensor.ctypes.data, "sizes": (columns, rows, matrices), "strides": tensor.strides[1::-1],
        "box": (64, lines, 1), **changes,
    }  # fmt: skip
    return Boxes(values["numbers"], Triple(*values["sizes"]), (ctypes.c_int64 * 2)(*values["strides"]), values["box"])


def take_rounds(
    probe, tensor, fault="", cluster=(2, 1, 1), grid=(4, 1, 1), rounds=5, stages=2, begin=(0, 0), part=4, **changes
):
    """What each block had in its shared memory in each round, (grid, rounds, lines, 64), and the boxes' address."""
    blocks = int(np.prod(cluster))
    box_map = (ctypes.c_uint64 * 16)()
    why = probe.kan_map(ctypes.byref(description(tensor, part, **changes)), box_map)
    assert why is None, why
    found = np.full((int(np.prod(grid)), rounds, part * blocks, 64), UNTOUCHED, np.uint16)
    address = ctypes.c_uint32()
    why = probe.kan_take_rounds(
        box_map, Triple(*grid), Triple(*cluster), part * blocks, rounds, stages, *begin,
        found.ctypes.data_as(ctypes.c_void_p), ctypes.byref(address), fault.encode(),
    )  # fmt: skip
    if why is not None:
        raise RuntimeError(why.decode())
    return found, address.value


def in_shared_memory(tensor, matrix, begin, lines, address):
    """(lines, 64) numbers from column and row `begin` on, zeros outside the tensor, as they lie from this address on: an
    eighth of a line, which is 16 bytes, at its number xor bits 7 to 9 of the address."""
    _, rows, columns = SIZES
    x, y = begin
    result = np.zeros((lines, 64), np.uint16)
    for line in range(lines):
        for column in range(64):
            if 0 <= y + line < rows and 0 <= x + column < columns:
                place = address + 128 * line + 2 * column
                place ^= (place >> 7 & 7) << 4
                result.flat[(place - address) // 2] = tensor[matrix, y + line, x + column]
    return result


def assert_right(probe, tensor, begin=(0, 0), stages=2, rounds=5, **how):
    found, address = take_rounds(probe, tensor, begin=begin, stages=stages, rounds=rounds, **how)
    lines = found.shape[2]
    for matrix in range(rounds):
        expected = in_shared_memory(tensor, matrix, begin, lines, address + matrix % stages * lines * 128)
        for block in range(len(found)):
            np.testing.assert_array_equal(found[block, matrix], expected)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(
    ("grid", "cluster"),
    [
        ((3, 1, 1), (1, 1, 1)),
        ((4, 1, 1), (2, 1, 1)),
        ((2, 2, 1), (1, 2, 1)),
        ((4, 2, 1), (2, 2, 1)),
        ((3, 2, 2), (3, 1, 2)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_all_blocks_of_a_cluster_get_what_each_copies_a_part_of(probe, tensor, grid, cluster, stages):
    assert_right(probe, tensor, grid=grid, cluster=cluster, stages=stages)


@pytest.mark.parametrize("begin", [(0, 0), (8, 16), (-3, 0), (0, -5), (61, 27), (-64, 3), (70, 0), (1, 29), (-1, -1)])
def test_zeros_stand_for_what_lies_outside(probe, tensor, begin):
    assert_right(probe, tensor, begin=begin)


def test_matrices_outside_are_zeros(probe, tensor):
    matrices, rows, columns = SIZES
    found, _ = take_rounds(probe, tensor, rounds=5, sizes=(columns, rows, matrices - 2))
    assert found[:, :3].all()
    assert not found[:, 3:].any()


def test_a_box_of_matrices(probe, tensor):
    """Its lines are those of one matrix after the other."""
    found, address = take_rounds(probe, tensor, cluster=(1, 1, 1), rounds=1, part=6, box=(64, 3, 2))
    for matrix in range(2):
        expected = in_shared_memory(tensor, matrix, (0, 0), 3, address + 3 * matrix * 128)
        np.testing.assert_array_equal(found[0, 0, 3 * matrix : 3 * matrix + 3], expected)


@pytest.mark.parametrize(
    ("grid", "cluster", "side"), [((2, 4, 1), (2, 1, 1), 2), ((2, 6, 1), (1, 2, 1), 2), ((1, 9, 1), (1, 3, 1), 3)]
)
def test_grids_end_at_one_cluster(probe, tensor, grid, cluster, side):
    found, _ = take_rounds(probe, tensor, grid=grid, cluster=cluster, rounds=1)
    touched = (found != UNTOUCHED).all((1, 2, 3))
    assert touched.sum() == grid[0] * side
    assert (found[~touched] == UNTOUCHED).all()


def test_an_observer_is_told_of_clusters(probe, tensor):
    told = []
    observer = OBSERVER(lambda kernel, grid, cluster, *rest: told.append((grid[:3], cluster[:3], *rest[:2], rest[-1])))
    probe.kan_observe(observer)
    try:
        found, _ = take_rounds(probe, tensor, grid=(6, 70000, 1), cluster=(3, 2, 1), rounds=0)
        take_rounds(probe, tensor, "product waited for", cluster=(1, 1, 1), grid=(1, 1, 1), part=64)
    finally:
        probe.kan_observe(OBSERVER())
    assert not found.size
    assert told == [
        ([6, 65534, 1], [3, 2, 1], 64, 2 * (24 * 128 + 16) + 16, 2),
        ([1, 1, 1], [1, 1, 1], 128, 64 * 128 + 8, 2),
    ]


def test_some_threads_are_slow_to_reach_into_another_block(probe):
    clusters = 40
    reached, overtaken = (ctypes.c_char * (2 * clusters))(), (ctypes.c_char * (2 * clusters))()
    probe.kan_arrive_late(clusters, reached, overtaken)
    assert set(reached.raw) == {1}
    assert 4 < sum(overtaken.raw) <= clusters  # one block of each at most


# What a kernel does wrong, and what is said of it.
FAULTS = {
    "half a warp": "part of a warp waits in meet_cluster",
    "not met by all": "part of a cluster waits for the rest of it",
    "not prepared": "a signal is used that was not prepared",
    "preparation not met": "a signal is used that was not prepared",
    "written over": "or was written over",
    "not shown": "a signal is used that was prepared and not shown",
    "prepared by two": "a signal is prepared twice",
    "no arrivals": "a signal of 0 arrivals",
    "too many arrivals": "more threads arrive at a signal than it was prepared for",
    "too few announced": "more bytes came to a signal than it was told of",
    "too many announced": "part of a cluster waits for a signal",
    "negative bytes": "a signal is told of -16 bytes",
    "many bytes": "a signal is told of 1048576 bytes",
    "parity": "a parity of 2",
    "two phases": "a signal is two phases ahead of a thread that waits for it",
    "misaligned signal": "a misaligned signal",
    "signal outside": "a signal or copy outside shared memory",
    "arrival beyond": "a block that the cluster does not have",
    "misaligned box": "a box at no multiple of 128 bytes",
    "box outside": "a signal or copy outside shared memory",
    "no block": "a copy to no block",
    "block beyond": "a block that the cluster does not have",
    "no map": "the copy engine is given no tensor map",
    "write not shown": "the copy engine writes where a thread's write was not shown",
    "overtaking": "the copy engine writes where a copy is under way",
    "ends early": "the shared memory of a block that has ended is used",
    "copy to an ended block": "the shared memory of a block that has ended is used",
    "bytes outstanding": "a block ends with bytes outstanding at a signal",
    "copy outstanding": "a block ends while the copy engine writes its shared memory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(probe, tensor, fault):
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        take_rounds(probe, tensor, fault, stages=1)
    assert_right(probe, tensor)  # nothing of it is left


def test_writes_that_were_shown_are_none(probe, tensor):
    assert_right(probe, tensor, fault="write shown")


@pytest.mark.parametrize("fault", ["too early", "no barrier"])
def test_missing_waits_show_in_the_numbers(probe, tensor, fault):
    with pytest.raises(AssertionError):
        assert_right(probe, tensor, fault=fault, stages=1)


def test_a_copy_over_what_a_product_reads_is_found(probe, tensor):
    how = {"cluster": (1, 1, 1), "grid": (1, 1, 1), "part": 64}
    take_rounds(probe, tensor, "product waited for", **how)
    with pytest.raises(RuntimeError, match="shared memory is written while a product reads it"):
        take_rounds(probe, tensor, "product under way", **how)


def test_lines_of_other_lengths_are_refused(probe, tensor):
    with pytest.raises(RuntimeError, match="boxes whose lines are not 128 bytes are not emulated"):
        take_rounds(probe, tensor, box=(32, 4, 1))


@pytest.mark.parametrize(
    ("grid", "cluster", "why"),
    [
        ((3, 1, 1), (2, 1, 1), "a side of the grid is no multiple of the cluster's"),
        ((2, 3, 1), (1, 2, 1), "a side of the grid is no multiple of the cluster's"),
        ((1, 1, 1), (1, 1, 0), "a side of the grid is no multiple of the cluster's"),
        ((9, 1, 1), (9, 1, 1), "a cluster of 9 blocks"),
    ],
)
def test_launches_that_hardware_refuses(probe, tensor, grid, cluster, why):
    with pytest.raises(RuntimeError, match=why):
        take_rounds(probe, tensor, grid=grid, cluster=cluster)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"numbers": 4096 + 8}, "no multiple of 16 bytes"),
        ({"numbers": None}, "no multiple of 16 bytes"),
        ({"sizes": (0, 29, 5)}, "size is 0"),
        ({"sizes": (70, 29, 2**32 + 1)}, "size is 4294967297"),
        ({"strides": (140, 144 * 30)}, "stride is no multiple of 16"),
        ({"strides": (144, 2**40)}, "stride is no multiple of 16"),
        ({"strides": (144, 0)}, "stride is no multiple of 16"),
        ({"box": (64, 257, 1)}, "box has a side below 1 or above 256"),
        ({"box": (64, 4, 0)}, "box has a side below 1 or above 256"),
        ({"box": (72, 4, 1)}, "lines that are no multiple of 16 bytes up to 128"),
        ({"box": (60, 4, 1)}, "lines that are no multiple of 16 bytes up to 128"),
    ],
)
def test_maps_that_the_driver_refuses(probe, tensor, change, why):
    assert why in probe.kan_map(ctypes.byref(description(tensor, 4, **change)), (ctypes.c_uint64 * 16)()).decode()


def run(sanitizer, fault):
    program = build("clusters.cpp", sanitizer, kernels=False)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, fault], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer):
    done = run(sanitizer, "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it ran" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["too early", "no barrier", "overtaking"])
def test_the_thread_sanitizer_finds_a_missing_wait(fault):
    done = run("thread", fault)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.slow
def test_copies_from_outside_a_tensor_are_found():
    done = run("address", "sizes")
    assert done.returncode != 0
    assert "the copy engine reads what is no tensor's" in done.stdout
