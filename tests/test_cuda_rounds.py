"""Which tiles of contract_weight by warpgroups are cut along the batch (csrc/cuda/weight_tiles.h), by counts; and what comes of
it, emulated on GPUs of few multiprocessors."""

from itertools import product

import pytest
import torch
from conftest import Place
from samples import make_problem
from test_cuda_emulation import CPU, assert_wide_close

from kan_fast import backends
from tests.cuda_emulation.backend import Backend
from tests.cuda_emulation.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STEP = 64  # rows of the batch: no slice has fewer, and all but the last have a multiple


def up(a, b):
    return -(-a // b)


def columns_of(outputs, dtype):
    return 256 if dtype != F32 and up(outputs, 128) % 2 == 0 else 128


def number_of_tiles(shape, grid_size, dtype, with_base):
    _, inputs, outputs = shape
    features = up(inputs, 16) * up(grid_size + 3, 8) + (up(inputs, 128) if with_base else 0)
    return features * up(outputs, columns_of(outputs, dtype))


def seconds(whole, cut, slices, rows, shape, grid_size, dtype, tiles, multiprocessors):
    """As launch.cpp has them: rounds of blocks at 5 TFLOP/s a multiprocessor, and partial sums at 4 TB/s there and back."""
    batch, inputs, outputs = shape
    flops = 2.0 * 128 * columns_of(outputs, dtype) * batch * (3 if dtype == F32 else 1)
    rounds = up(whole, multiprocessors) + up(cut * slices, multiprocessors) * rows / batch
    parts = inputs * (grid_size + 4) * outputs * 4 * cut / tiles * slices if slices > 1 else 0
    return rounds * flops / 5e12 + parts / 2e12


def cut_alike(shape, grid_size, dtype, tiles, multiprocessors):
    """(slices, rows) of the cut of all tiles alike that seems fastest; a gain of less than 3 % is none."""
    batch, best, least = shape[0], (1, shape[0]), None
    for wanted in range(1, 1 + max(1, min(16, batch // STEP))):
        rows = batch if wanted == 1 else up(up(batch, wanted), STEP) * STEP
        way = up(batch, rows), rows
        estimate = seconds(0, tiles, *way, shape, grid_size, dtype, tiles, multiprocessors)
        if least is None or estimate < 0.97 * least:
            best, least = way, estimate
    return best


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("multiprocessors", [1, 7, 108, 132, 148])
def test_only_what_fills_no_round_is_cut(library, dtype, multiprocessors):
    gpu = Backend(library, 90, multiprocessors)
    shapes = product((1, 100, 4096, 65537), (16, 100, 1024), (16, 130, 1024))
    for shape, grid_size, with_base in product(shapes, (5, 20), (True, False)):
        batch, tiles = shape[0], number_of_tiles(shape, grid_size, dtype, with_base)
        cut = gpu.cut_of_weight(shape, grid_size, 3, dtype, with_base)
        assert cut.whole + cut.rest == tiles
        if cut.rest == 0:
            assert (cut.slices, cut.rows) == (1, batch)
        else:
            assert cut.whole % multiprocessors == 0
            assert cut.rest < multiprocessors
            assert cut.slices > 1
            assert cut.rows % STEP == 0
            assert (cut.slices - 1) * cut.rows < batch <= cut.slices * cut.rows
        given = shape, grid_size, dtype, tiles, multiprocessors
        slices, rows = cut_alike(*given)
        # Of the last round alone it leaves out gains of less than 3 %.
        last = seconds(0, cut.rest, cut.slices, cut.rows, *given)
        alike = seconds(0, tiles, slices, rows, *given)
        assert seconds(cut.whole, cut.rest, cut.slices, cut.rows, *given) <= alike + 0.03 * last
        if tiles < multiprocessors:
            assert (cut.slices, cut.rows) == (slices, rows)


def test_a_layer_on_an_h100(library):
    """Two rounds of tiles, and 24 of 288 left: in five slices they are nearly a round that is a fifth as long."""
    cut = Backend(library, 90, 132).cut_of_weight((16384, 1024, 1024), 5, 3, BF16)
    assert (cut.whole, cut.rest, cut.slices, cut.rows) == (264, 24, 5, 52 * STEP)


def in_whole_tiles(cut, shape, grid_size, dtype, with_base):
    """Which numbers of d_spline and d_base lie in tiles that are not cut."""
    _, inputs, outputs = shape
    spline, base = torch.zeros(inputs, grid_size + 3, outputs, dtype=torch.bool), torch.zeros(inputs, outputs, dtype=torch.bool)
    chunks, columns = up(grid_size + 3, 8), columns_of(outputs, dtype)
    of_base = up(inputs, 128) if with_base else 0
    features = of_base + up(inputs, 16) * chunks
    for tile in range(cut.whole):
        o, feature = tile // features * columns, tile % features
        if feature < of_base:
            base[128 * feature :, o : o + columns][:128] = True
        else:
            i, f = 16 * ((feature - of_base) // chunks), 8 * ((feature - of_base) % chunks)
            spline[i : i + 16, f : f + 8, o : o + columns] = True
    return spline, base if with_base else base[:0]


# Shape, grid size, multiprocessors: full rounds and a rest, in tiles of 128 and of 256 outputs; ends within a tile of outputs,
# of inputs, of bases; slices of one step, two and three, and of less.
CUT = [
    ((300, 40, 136), 5, 3),
    ((300, 40, 264), 5, 5),
    ((200, 33, 250), 12, 6),
    ((700, 9, 131), 20, 3),
    ((190, 24, 17), 5, 2),
    ((1000, 136, 9), 3, 7),
    ((257, 48, 128), 5, 3),
]


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("shape", "grid_size", "multiprocessors"), CUT)
def test_full_rounds_and_a_rest(library, monkeypatch, shape, grid_size, multiprocessors, dtype, activation):
    """Right, the same bits twice, and in whole tiles those of a GPU that cuts none."""
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", "wgmma")
    gpu, with_base = Backend(library, 90, multiprocessors), activation != "none"
    monkeypatch.setitem(backends._modules, "emulated", gpu)
    cut = gpu.cut_of_weight(shape, grid_size, 3, dtype, with_base)
    assert (cut.whole > 0 and cut.rest > 0) or not with_base
    problem = make_problem(
        None, dtype, shape, grid_size, kind="uniform" if with_base else "uneven", activation=activation, x_dtype=dtype
    )
    args = problem.args("contract_weight", 0, False)
    first, again, uncut = (way.contract_weight(*args) for way in (gpu, gpu, Backend(library, 90, 1)))
    for mine, repeated, other, whole in zip(
        first, again, uncut, in_whole_tiles(cut, shape, grid_size, dtype, with_base), strict=True
    ):
        assert torch.equal(mine, repeated)
        assert torch.equal(mine[whole], other[whole])
    assert_wide_close(Place("emulated", CPU), problem, "contract_weight", 0, "highest", with_scale=False)
