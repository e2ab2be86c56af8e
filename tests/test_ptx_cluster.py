"""Clusters, signals and boxes in the interpreter of PTX: tests/ptx/cluster.py, by the small kernels of tests/ptx/cluster.cu.

What they bring is compared with a plain statement of the layout; whatever they do wrong must be found.
"""

import ctypes
import re
import struct

import numpy as np
import pytest
from test_cuda_cluster import Boxes

from build_backend import find_nvcc
from tests.cuda_emulation.build import build, compiler
from tests.ptx.block import run
from tests.ptx.cuda import HERE, compile_file
from tests.ptx.memory import Fault, GlobalMemory
from tests.ptx.program import parse

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on this machine")

BASE, STAGES, SIGNALS_BYTES = 384, 2, 1024
SIZES, PITCH = (150, 75, 2), 160  # numbers of a row, rows, matrices; numbers from row to row


def kernel(name, edit=str):
    ptx = edit(compile_file(HERE / "cluster.cu"))
    return parse(ptx, re.search(rf"\.entry\s+(\w*{len(name)}{name}E\w*)", ptx)[1])


def tensor():
    """(z, y, x), every number another; what lies between the rows is in no tensor."""
    x, y, z = SIZES
    whole = np.random.default_rng(0).permutation(z * y * PITCH).astype(np.uint16).reshape(z, y, PITCH)
    return whole, whole[..., :x]


def map_of(address, sizes, pitch, box, magic=0x6B616E6D):
    return struct.pack("<6q3iI", address, *sizes, 2 * pitch, 2 * pitch * sizes[1], *box, magic).ljust(128, b"\0")


def box_of(numbers, x, y, z, lines, address):
    """The bytes of a box as they lie from a shared address on, which must be a multiple of 128."""
    out = np.zeros((lines, 64), np.uint16)
    for line in range(lines):
        for i in range(64):
            if 0 <= x + i < numbers.shape[2] and 0 <= y + line < numbers.shape[1]:
                piece = i // 8 ^ (address // 128 + line) % 8
                out[line, 8 * piece + i % 8] = numbers[z, y + line, x + i]
    return out


def fetch(
    across, down, *, steps=5, lines=8, x=-5, y=-3, clusters=2, seed=0, edit=str, place=SIGNALS_BYTES, arrivals=0, bytes=0,
    room=0, sides=None, magic=0x6B616E6D,
):  # fmt: skip
    """Runs that kernel -> what came, what should have come. Arrivals, bytes and room are flaws: added to what is right."""
    whole, numbers = tensor()
    memory = GlobalMemory()
    tensor_map = map_of(memory.add(whole), SIZES, PITCH, (64, lines, 1), magic)
    stage = 128 * lines * (across + down)
    readers = 2 * (across + down - 1)
    given = struct.pack("<9i", across, down, lines, steps, x, y, readers + arrivals, stage + bytes, place)
    to = np.zeros((down, clusters * across, steps, stage // 128, 64), np.uint16)
    grid, shared = (clusters * across, down), place + STAGES * stage + room
    program = kernel("fetch", edit)
    run(program, grid, 96, shared, [tensor_map, given, to], memory, base=BASE, cluster=sides or (across, down), seed=seed)
    expected = np.zeros_like(to)
    for j in range(down):
        for i in range(clusters * across):
            for step in range(steps):
                at = BASE + place + step % STAGES * stage
                corner = x + 64 * step + 8 * (i // across)
                first = box_of(numbers, corner, y + j * across * lines, 0, across * lines, at)
                second = box_of(numbers, corner, y + i % across * down * lines, 1, down * lines, at + 128 * across * lines)
                expected[j, i, step] = np.concatenate([first, second])
    return to, expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("across", "down", "options"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (1, 2, {"lines": 5}),  # boxes that begin anywhere in a turn of eight lines
        (2, 2, {}),
        (2, 2, {"steps": 2, "y": 40, "x": 70}),  # beyond the last row and column
        (4, 2, {"clusters": 1, "lines": 3}),
    ],
)
def test_what_is_sent_comes_to_whom_it_is_for(across, down, options, seed):
    to, expected = fetch(across, down, seed=seed, **options)
    assert expected.any()
    np.testing.assert_array_equal(to, expected)


def removed(pattern, which=None):
    """Takes all occurrences out of a text, or those of the numbers in `which`."""

    def edit(ptx):
        found = list(re.finditer(pattern, ptx))
        assert found
        for number, match in reversed(list(enumerate(found))):
            if which is None or number in which:
                ptx = ptx[: match.start()] + ptx[match.end() :]
        return ptx

    return edit


def replaced(pattern, replacement):
    def edit(ptx):
        assert re.search(pattern, ptx)
        return re.sub(pattern, replacement, ptx)

    return edit


def waits_replaced(which):
    """Of `fetch`, whose last wait is for boxes and whose others are for room to copy them to."""

    def edit(ptx):
        start = re.search(r"\.entry \w+5fetchE", ptx).end()
        end = ptx.index(".entry", start)
        for place in list(re.finditer(WAIT, ptx[start:end]))[which][::-1]:
            first, last = (start + offset for offset in place.span())
            ptx = ptx[:first] + "setp.eq.u32 ended, 0, 0;" + ptx[last:]
        return ptx

    return edit


MEETING = r"barrier\.cluster\.(arrive|wait)\.\w+\.aligned;"
MEETING_OF_TWO = rf"{MEETING}[^;]*{MEETING}"
WAIT = r"mbarrier\.try_wait[^;]* ended, [^;]*;"
OWN = r"mov.u32 mine, %cluster_ctarank; \1, mine;"
# What goes wrong, and what the interpreter says; `fetch` is on 2 x 2 blocks.
FAULTS = {
    "no fence of signals": ({"edit": removed(r"fence\.mbarrier_init[^;]*;")}, "without fence.mbarrier_init"),
    "no meeting at first": ({"edit": removed(MEETING, (0, 1))}, "not been prepared|without a barrier"),
    "blocks meet alone": ({"edit": replaced(MEETING_OF_TWO, "bar.sync 0;")}, "not been prepared|without a barrier"),
    "no waiting at first": ({"edit": removed(MEETING, (1,))}, "without a barrier"),
    "arriving twice": ({"edit": replaced(r"(barrier\.cluster\.arrive[^;]*;)", r"\1 \1")}, "arrives twice"),
    "no arriving at first": ({"edit": removed(MEETING, (0,))}, "without having arrived"),
    "no meeting at last": ({"edit": removed(MEETING, (2, 3))}, "may end before another arrives|has ended"),
    "no signals": ({"edit": removed(r"mbarrier\.init[^;]*;")}, "not been prepared"),
    "a signal twice": ({"edit": replaced(r"(mbarrier\.init[^;]*;)", r"\1 \1")}, "prepared twice"),
    "a misaligned signal": ({"edit": replaced(r"(mapa[^;]*);", r"\1; add.u32 there, there, 4;")}, "misaligned signal"),
    "too few arrive": ({"arrivals": 1}, "part of a cluster waits for a signal"),
    "too many arrive": ({"arrivals": -1}, "race|more arrivals|where a copy is under way"),
    "too few bytes": ({"bytes": 128}, "part of a cluster waits for a signal"),
    "too many bytes": ({"bytes": -128}, "128 bytes more than were announced|race"),
    "no bytes announced": ({"edit": replaced(r"arrive\.expect_tx(\S+ _, \[%r\d+\]), %r\d+", r"arrive\1")}, "race"),
    "only one's own readers": ({"edit": replaced(r"(mapa\S+ there, %r\d+), %r\d+;", OWN)}, "race: a copy to what another"),
    "nobody waits": ({"edit": replaced(WAIT, "setp.eq.u32 ended, 0, 0;")}, "more arrivals"),
    "nobody waits for boxes": ({"edit": waits_replaced(slice(-1, None))}, "race: where a copy is under way"),
    "nobody waits for room": ({"edit": waits_replaced(slice(0, -1))}, "more arrivals"),
    "a parity of 2": ({"edit": replaced(r"(ended, \[%r\d+\]), %r\d+;", r"\1, 2;")}, "neither 0 nor 1"),
    "a misaligned box": ({"place": SIGNALS_BYTES + 64}, "misaligned address"),
    "a box over the end": ({"room": -128}, "a copy beyond the"),
    "no tensor map": ({"magic": 1}, "no tensor map"),
    "a block outside": ({"sides": (2, 1)}, "of a cluster of 2|beyond the 2 of a cluster"),
    "a side that does not divide": ({"sides": (3, 2)}, "not made of clusters"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_clusters_are_found(fault):
    flaw, said = FAULTS[fault]
    with pytest.raises(Fault, match=said):
        fetch(2, 2, **flaw)


def test_a_fault_names_its_instruction():
    with pytest.raises(Fault, match="in: cp.async.bulk.tensor"):
        fetch(1, 1, place=SIGNALS_BYTES + 64)


def test_a_tensor_beyond_its_memory_is_found():
    whole, _ = tensor()
    memory = GlobalMemory()
    tensor_map = map_of(memory.add(whole[:1, :40]), (150, 41, 1), PITCH, (64, 8, 1))
    given = struct.pack("<9i", 1, 1, 8, 2, 0, 35, 2, 2 * 8 * 128, SIGNALS_BYTES)
    with pytest.raises(Fault, match="global access beyond buffer"):
        run(kernel("fetch"), (1, 1), 96, SIGNALS_BYTES + 4096, [tensor_map, given, np.zeros(4096, np.uint32)], memory)


# The flaws of `bring`, by their numbers there, the bytes that it announces, and what the interpreter says.
BRING = {
    "reads early": (1, 1024, "race: where a copy is under way, or a signal lies, in: ld"),
    "writes early": (2, 1024, "race: where a copy is under way, or a signal lies, in: st"),
    "writes before": (3, 1024, "to what was written without fence.proxy.async"),
    "writes and shows": (4, 1024, None),
    "no barrier behind the reads": (5, 1024, "race: a copy to what another, or a product under way, read"),
    "leaves with a box under way": (6, 1024, "a copy to it under way"),
    "looks at the wrong parity": (7, 1024, "race: where a copy is under way"),
    "a box over a signal": (8, 1024, "race: where a copy is under way, or a signal lies, in: cp"),
    "leaves in the second turn": (9, 1024, "a copy to it under way"),
    "announces too little": (0, 1008, "16 bytes more than were announced"),
    "announces too much": (0, 1040, "part of a cluster waits"),
}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("fault", [None, *BRING])
def test_faults_around_a_box_are_found(fault, blocks):
    """Each block of a cluster for itself."""
    flaw, announced, said = BRING[fault] if fault else (0, 1024, None)
    whole, numbers = tensor()
    memory, to = GlobalMemory(), np.zeros((2, 128), np.uint16)
    arguments = [map_of(memory.add(whole), SIZES, PITCH, (64, 8, 1)), flaw, announced, to]
    if said:
        with pytest.raises(Fault, match=said):
            run(kernel("bring"), (blocks,), 64, 4096, arguments, memory, base=BASE, cluster=(blocks,))
    else:
        run(kernel("bring"), (blocks,), 64, 4096, arguments, memory, base=BASE, cluster=(blocks,))
        for turn in range(2):
            np.testing.assert_array_equal(to[turn], box_of(numbers, 0, 0, turn, 8, BASE + 1024).reshape(-1)[:128])


@pytest.mark.parametrize(
    ("flaw", "edit", "said"),
    [
        (0, removed(r"bar\.sync\s+0;"), "without a barrier since it was prepared"),
        (6, removed(r"cp\.async\.bulk[^;]*;"), "bytes of a signal to come"),
        (0, replaced(r"(complete_tx::bytes) (\[%r[^;]*);", r"\1.multicast::cluster \2, 3;"), "to the blocks 0b11 of"),
        (0, replaced(r"(complete_tx::bytes) (\[%r[^;]*);", r"\1.multicast::cluster \2, 0;"), "to the blocks 0b0 of"),
    ],
)
def test_what_a_box_needs_is_asked_for(flaw, edit, said):
    whole, _ = tensor()
    memory = GlobalMemory()
    arguments = [map_of(memory.add(whole), SIZES, PITCH, (64, 8, 1)), flaw, 1024, np.zeros(128, np.uint32)]
    with pytest.raises(Fault, match=said):
        run(kernel("bring", edit), (1,), 64, 4096, arguments, memory)


def test_boxes_come_in_any_order():
    """A block that waits for one of two boxes ends before or after the other one is there: both are found."""
    said = set()
    for seed in range(12):
        whole, _ = tensor()
        memory = GlobalMemory()
        arguments = [map_of(memory.add(whole), SIZES, PITCH, (64, 8, 1)), 10, 1024, np.zeros(128, np.uint32)]
        with pytest.raises(Fault) as raised:
            run(kernel("bring"), (1,), 64, 4096, arguments, memory, seed=seed)
        said.add(str(raised.value))
    assert said == {"a block ends with a copy to it under way", "a block ends with a copy to it that nobody has waited for"}


def multiply(edit=str, again=0):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((192, 64)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    memory, to = GlobalMemory(), np.zeros((128, 64), np.float32)
    left, right = bits[:64].copy(), bits[64:].copy()
    maps = [map_of(memory.add(x), (64, len(x), 1), 64, (64, len(x), 1)) for x in (left, right)]
    run(kernel("multiply", edit), (1,), 128, 32768, [*maps, again, to], memory, base=BASE)
    sums = np.zeros((64, 128))
    for thread in range(128):
        for r in range(64):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r % 4 // 2)
            sums[row, 8 * (r // 4) + 2 * (thread % 4) + r % 2] = to[thread, r]
    return sums, values[:64] @ values[64:].T


def test_tensor_cores_read_boxes_as_they_lie():
    sums, product = multiply()
    np.testing.assert_allclose(sums, product, rtol=1e-5, atol=1e-5)


def test_tensor_cores_that_do_not_wait_are_found():
    with pytest.raises(Fault, match="wgmma reads where a copy is under way"):
        multiply(replaced(WAIT, "setp.eq.u32 ended, 0, 0;"))


def test_boxes_to_operands_of_products_under_way_are_found():
    with pytest.raises(Fault, match="race: a copy to what another, or a product under way, read"):
        multiply(again=1)


def test_one_thread_that_waits_forever_is_found():
    """The others of its warpgroup come to a product."""
    with pytest.raises(Fault, match="part of a (cluster waits for a signal|warpgroup reached)"):
        multiply(again=2)


def hasten(arrivals, waiting, edit=str, only=None):
    """The other block of each cluster of two arrives so many times at the signal of `waiting`, which waits for one phase."""
    to = np.zeros(4, np.uint32)
    run(kernel("hasten", edit), (4,), 32, 1024, [arrivals, waiting, to], cluster=(2,), only=only)
    return to.tolist()


def without_waiting_or_meeting(ptx):
    return replaced(WAIT, "setp.eq.u32 ended, 0, 0;")(removed(MEETING, (6, 7))(ptx))


@pytest.mark.parametrize(
    ("arrivals", "waiting", "edit", "said"),
    [
        (2, 0, str, "two phases ahead"),
        (2, 1, str, "part of a cluster waits for a signal"),  # block 0 runs first: two phases are over when the other looks
        (0, 0, str, "part of a cluster waits for a signal"),
        (1, 0, replaced(r"(mbarrier\.arrive[^;]*;)", r"\1 bar.sync 1, 64;"), "part of a cluster waits at its barrier"),
        (1, 5, str, "a block beyond the 2 of a cluster"),
        (1, 0, without_waiting_or_meeting, "a signal of a block that has ended"),
        (1, 1, without_waiting_or_meeting, "may end before another arrives"),
    ],
)
def test_blocks_that_do_not_keep_step_are_found(arrivals, waiting, edit, said):
    assert waiting > 1 or hasten(1, waiting) == [16, 17, 18, 19]
    with pytest.raises(Fault, match=said):
        hasten(arrivals, waiting, edit)


def test_lanes_of_a_warp_wait_for_each_other():
    to = np.zeros(1, np.uint32)
    run(kernel("hasten"), (1,), 32, 1024, [1, -1, to])
    assert to == [16]


def test_lanes_of_a_warp_meet_again():
    """Of the warp that sends, one lane waits for signals, and the others for it."""
    meetings = 0

    def shuffled(match):
        nonlocal meetings
        meetings += 1
        return f"{'shfl.sync.bfly.b32 %r9999, 1, 1, 31, -1; ' * (meetings == 2)}{match[0]}"

    to, expected = fetch(2, 1, edit=replaced(r"barrier\.cluster\.arrive[^;]*;", shuffled))
    assert meetings > 2
    np.testing.assert_array_equal(to, expected)


def test_only_some_clusters_run():
    assert hasten(1, 0, only=[3]) == [0, 0, 18, 19]


def test_blocks_know_their_places():
    names = [f"{name}.{axis}" for name in ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid") for axis in "xyz"]
    names += ["cluster_ctarank", "cluster_nctarank"]
    moves = "".join(f"mov.u32 %r1, %{name}; st.global.u32 [%rd1+{4 * n}], %r1;" for n, name in enumerate(names))
    ptx = f".entry places(.param .u64 to) {{ ld.param.u64 %rd1, [to]; {moves} ret; }}"
    to = np.zeros(len(names), np.uint32)
    run(parse(ptx), (6, 4, 2), 32, 0, [to], cluster=(3, 2, 1))  # the last block is the last to write
    assert to.tolist() == [2, 1, 0, 3, 2, 1, 1, 1, 1, 2, 2, 2, 5, 6]


@pytest.mark.skipif(compiler() is None, reason="the host code is run as the emulation has it: by g++ on x86-64")
def test_the_host_code_makes_such_maps():
    whole, _ = tensor()
    library = ctypes.CDLL(str(build("clusters.cpp", kernels=False)))
    library.kan_map.restype = ctypes.c_char_p
    address, made = -(-whole.ctypes.data // 16) * 16, ctypes.create_string_buffer(128)
    strides = (ctypes.c_int64 * 2)(2 * PITCH, 2 * PITCH * SIZES[1])
    given = Boxes(address, (ctypes.c_int64 * 3)(*SIZES), strides, (ctypes.c_int * 3)(64, 8, 1))
    assert library.kan_map(ctypes.byref(given), made) is None
    assert made.raw == map_of(address, SIZES, PITCH, (64, 8, 1))
