"""The CUDA kernels of narrow layers, emulated: what they have of their own. test_cuda_emulation.py has what all share."""

import pytest
import torch
from conftest import Place
from samples import OPERATIONS, assert_close_to_truth, make_problem
from test_cuda_emulation import CPU, as_tuple

from kan_fast import backends
from tests.cuda_emulation import backend as emulated
from tests.cuda_emulation.backend import Backend, Fault
from tests.cuda_emulation.build import build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

every_operation = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def place(library, monkeypatch):
    """A GPU of one multiprocessor, whose few blocks walk over many tiles."""
    monkeypatch.setitem(backends._modules, "emulated", Backend(library, multiprocessors=1))
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", "narrow")
    return Place("emulated", CPU)


# shape, grid_size, k, kind, outside: every number of outputs to a lane, one and more lanes to a row, rows of 16 and not of 16
# bytes, tails of a tile and of 16 bytes, more tiles than warps, several turns to a tile, inputs enough for several of a team.
SHAPES = [
    ((1, 1, 1), 5, 3, "uniform", "zero"),
    ((2700, 2, 5), 5, 3, "uniform", "zero"),
    ((2601, 5, 1), 5, 3, "uneven", "linear"),
    ((333, 1, 2), 1, 2, "uniform", "clamp"),
    ((70, 16, 3), 7, 1, "repeated", "zero"),
    ((131, 8, 4), 5, 3, "uniform", "linear"),
    ((65, 3, 6), 40, 3, "uneven", "clamp"),
    ((97, 4, 7), 5, 3, "uniform", "zero"),
    ((129, 3, 8), 5, 0, "uneven", "zero"),
    ((66, 2, 15), 5, 3, "repeated", "linear"),
    ((66, 2, 16), 3, 2, "uniform", "zero"),
    ((35, 2, 17), 5, 3, "uneven", "zero"),
    ((40, 3, 32), 5, 3, "uniform", "clamp"),
    ((300, 32, 1), 5, 3, "uniform", "zero"),
    ((9001, 2, 1), 5, 3, "uniform", "zero"),
    ((4100, 1, 9), 5, 3, "uneven", "clamp"),
    ((70, 40, 2), 5, 3, "uneven", "zero"),
]


@every_operation
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(place, operation, case):
    shape, grid_size, k, kind, outside = case
    for dtype, x_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        problem = make_problem(place, dtype, shape, grid_size, k, kind, "silu", outside, x_dtype)
        assert_close_to_truth(place, problem, operation, 0)


@every_operation
def test_numbers_that_begin_anywhere(place, operation, monkeypatch):
    """Slices of tensors do not begin at multiples of 16 bytes."""
    monkeypatch.setattr(emulated, "MARGIN", emulated.MARGIN + 1)
    for dtype in (torch.float32, torch.float16):
        problem = make_problem(place, dtype, (70, 8, 5), kind="uneven")
        assert_close_to_truth(place, problem, operation, 0)


@every_operation
def test_grids_far_from_zero(place, operation):
    """Where the guess of a piece is off by its own rounding, the stored knots decide."""
    problem = make_problem(place, torch.float32, (200, 3, 4), 60)
    shift = 1000.0
    grid = (problem.grid + shift).float()
    assert_close_to_truth(place, problem._replace(grid=grid, x=problem.x + shift, activation="tanh"), operation, 0)


def test_x_at_knots_belongs_to_the_interval_above(place):
    """And the end of a range to the last interval: order 0 makes the interval visible."""
    problem = make_problem(place, torch.float32, (9, 1, 1), 8, 0, activation="none")
    weight = torch.arange(1.0, 9.0).reshape(1, 8, 1)
    for shift in (0.0, 0.1):  # without and with rounding
        grid = problem.grid + shift
        for outside, last in (("zero", 0.0), ("clamp", 8.0), ("linear", 8.0)):
            args = grid.T.contiguous(), None, weight, None, grid, "none", outside, 0
            y = backends.get("emulated").contract_output(*args)
            assert y[:, 0].tolist() == [*range(1, 9), last]


@every_operation
def test_it_is_chosen_and_repeats_itself(place, operation, monkeypatch):
    problem = make_problem(place, torch.float32, (2600, 2, 5))
    run = getattr(backends.get("emulated"), operation)
    args = problem.args(operation, 0)
    first, again = run(*args), run(*args)
    monkeypatch.delenv("KAN_FAST_CUDA_KERNEL")
    for a, b, c in zip(*map(as_tuple, (first, again, run(*args))), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_what_it_does_not_serve(place):
    for change in ({"k": 4}, {"dtype": torch.float64}, {"shape": (0, 3, 4)}, {"shape": (5, 3, 33)}, {"shape": (5, 3000, 8)}):
        problem = make_problem(place, **{"dtype": torch.float32, **change})
        for operation in OPERATIONS:
            with pytest.raises(Fault, match="narrow: it does not serve"):
                getattr(backends.get("emulated"), operation)(*problem.args(operation, 0))


# file below csrc, pattern, replacement
PLANTED = {
    "copies": ("cuda/narrow.cuh", r"wait_for_copies<0>\(\);\n    warp_barrier", "warp_barrier"),
    "warp": ("cuda/narrow.cuh", r"warp_barrier\(\);  // the tile", "// the tile"),
    "turns": ("cuda/narrow.cuh", r"if \(first > 0\) warp_barrier\(\);", ""),
    "results": ("cuda/narrow_output.cu", r"warp_barrier\(\);\n    write_rows", "write_rows"),
    "tables": ("cuda/narrow.cuh", r"barrier\(\);\n  if \(!with_edges", "if (!with_edges"),
    "tail": ("cuda/narrow.cuh", r"total / 4 : 0", "(total + 3) / 4 : 0"),
    "knots": ("cuda/narrow.cuh", r"sureness = C\(0\.5\)", "sureness = C(1)"),
    "outputs": ("cuda/narrow_output.cu", r"if \(full \|\| column \+ o < outputs\) ", ""),
    "shuffle": ("cuda/narrow_input.cu", r"mask = 1 << plan", "mask = 2 << plan"),
    "block": ("cuda/narrow_weight.cu", r"barrier\(\);  // the tile", "// the tile"),
    "rows": ("cuda/narrow_weight.cu", r"rows = rows_from\(first\)", "rows = plan.tile_rows"),
    "bins": ("cuda/narrow_weight.cu", r"\(t \* jobs \* cells \+ m\)", "(t + m)"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug, place, monkeypatch):
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(changes=[PLANTED[bug]]), multiprocessors=1))

    def use_all():
        for shape in ((2601, 3, 5), (70, 2, 15), (4100, 1, 9)):
            problem = make_problem(place, torch.float32, shape)
            for operation in OPERATIONS:
                assert_close_to_truth(place, problem, operation, 0)
        test_x_at_knots_belongs_to_the_interval_above(place)

    with pytest.raises((AssertionError, Fault)):
        use_all()
