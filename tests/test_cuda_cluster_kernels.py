"""The kernels of clusters, emulated: see tests/cuda_emulation/cluster.h."""

import pytest
import torch
from conftest import Place
from samples import every_activation, every_outside, make_problem
from test_cuda_emulation import CPU, as_tuple, assert_wide_close

from kan_fast import backends
from tests.cuda_emulation.backend import Backend, Fault
from tests.cuda_emulation.build import build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
every_operation = pytest.mark.parametrize("operation", ["contract_output", "contract_input", "contract_weight"])

# Shape, grid size, order, knots, outside. contract_output and contract_weight: values alone, whole groups of 8 inputs, tiles of
# 256 outputs; of contract_weight pairs of tiles, of 16 inputs by 8 bases or of 128 inputs of the base branch.
VALUES = [
    ((40, 16, 136), 5, 3, "uniform", "zero"),
    ((1, 8, 256), 1, 3, "uniform", "zero"),
    ((257, 72, 136), 5, 3, "uniform", "clamp"),  # an odd number of tiles of rows; more steps than stages
    ((300, 16, 392), 5, 3, "uneven", "linear"),  # two tiles of outputs
    ((130, 136, 200), 12, 3, "uniform", "zero"),  # two chunks of bases, some of which are none
    ((65, 80, 136), 3, 2, "repeated", "clamp"),
    ((500, 16, 192), 4, 1, "uneven", "zero"),
]
INPUTS = [
    ((40, 16, 40), 5, 3, "uniform", "zero"),
    ((1, 1, 8), 1, 3, "uniform", "zero"),
    ((257, 37, 136), 5, 3, "uniform", "clamp"),  # an odd number of tiles of both sides
    ((300, 12, 520), 5, 3, "uneven", "linear"),  # more steps than stages
    ((130, 70, 264), 12, 3, "uniform", "zero"),
    ((65, 80, 8), 3, 2, "repeated", "clamp"),
    ((70, 5, 72), 60, 3, "uniform", "zero"),  # tiles of two inputs
    ((140, 9, 24), 6, 1, "uniform", "linear"),
    ((40, 20, 64), 4, 0, "uneven", "zero"),
]


@pytest.fixture
def place(library, monkeypatch):
    monkeypatch.setitem(backends._modules, "emulated", Backend(library, architecture=90))
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", "cluster")
    return Place("emulated", CPU)


@every_half
@pytest.mark.parametrize(("shape", "grid_size", "order", "kind", "outside"), VALUES)
def test_values(place, dtype, shape, grid_size, order, kind, outside):
    for operation in ("contract_output", "contract_weight"):
        for x_dtype in (dtype, torch.float32):
            problem = make_problem(place, dtype, shape, grid_size, order, kind, "silu", outside, x_dtype=x_dtype)
            assert_wide_close(place, problem, operation, 0, "highest", with_scale=False)


@every_half
@pytest.mark.parametrize(("shape", "grid_size", "order", "kind", "outside"), INPUTS)
def test_gradients_of_inputs(place, dtype, shape, grid_size, order, kind, outside):
    for n in range(min(order, 1) + 1):
        for x_dtype in (dtype, torch.float32):
            problem = make_problem(place, dtype, shape, grid_size, order, kind, "silu", outside, x_dtype=x_dtype)
            assert_wide_close(place, problem, "contract_input", n, "highest", with_scale=False)


@every_outside
@every_activation
def test_activations(place, outside, activation):
    inputs = 32 if activation == "none" else 16  # pairs of tiles of weights
    problem = make_problem(place, torch.bfloat16, (37, inputs, 136), 5, 3, "uniform", activation, outside)
    for operation, n in (("contract_output", 0), ("contract_input", 1), ("contract_weight", 0)):
        assert_wide_close(place, problem, operation, n, "highest", with_scale=False)


@every_half
@every_operation
def test_the_same_bits_as_without_clusters(place, monkeypatch, dtype, operation):
    """Copies come another way, to the same places: all sums are added in the same order."""
    problem = make_problem(place, dtype, (300, 48, 200), outside="clamp")
    together = getattr(backends.get("emulated"), operation)(*problem.args(operation, 0, False))
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", "wgmma")
    alone = getattr(backends.get("emulated"), operation)(*problem.args(operation, 0, False))
    for a, b in zip(as_tuple(together), as_tuple(alone), strict=True):
        assert torch.equal(a, b)


def test_refused_where_it_cannot_serve(place, monkeypatch):
    def run(operation="contract_output", dtype=torch.bfloat16, shape=(40, 16, 136), n=0, **change):
        problem = make_problem(place, dtype, shape, **change)
        getattr(backends.get("emulated"), operation)(*problem.args(operation, n, False))

    def refused(why, *args, **change):
        with pytest.raises(Fault, match=f"cluster: it does not serve {why}"):
            run(*args, **change)

    for operation in ("contract_output", "contract_input", "contract_weight"):
        run(operation)
        refused("float32", operation, torch.float32)
        refused("rows at other than multiples of 16 bytes", operation, shape=(40, 16, 132))
    for operation in ("contract_output", "contract_weight"):
        refused("what is not made quickly", operation, shape=(40, 20, 136))
        refused("what is not made quickly", operation, n=1)
        refused("outputs that would leave half of a tile's 256 columns empty", operation, shape=(40, 16, 128))
    refused("contract_input of 64 bases or more", "contract_input", grid_size=61)
    refused("contract_weight of tiles that are no pairs", "contract_weight", shape=(40, 24, 136))
    refused("spline orders above 3", k=4)
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(), architecture=100))
    refused("GPUs of another compute capability than 9.0")


# What the kernels must not survive: file, pattern, replacement, and what the emulation says where it sees the deed itself.
TILE, INPUT, OUTPUT, WEIGHT = (f"cuda/cluster_{name}.cuh" for name in ("tile", "input", "output", "weight"))
PLANTED = {
    "never copied": (TILE, r"wait_for\(signals.copied \+ stage, parities >> 1\);", "", ""),
    "never copied, input": (INPUT, r"wait_for\(signals.copied \+ turn.stage, turn.parity\);", "", ""),
    "never released": (TILE, r"wait_for\(signals.released \+ stage, ~parities & 1u\);", "", ""),
    "never released, input": (INPUT, r"wait_for\(signals.released \+ turn.stage, turn.parity \^ 1\);", "", ""),
    "released early": (INPUT, r"release\(place, before\)", "release(place, (before + 1) % kInputRing)", ""),
    "released late": (INPUT, r"s - 1 \+ kInputRing < steps", "s + kInputRing < steps", "waits for a signal"),
    "released too often": ("cuda/warpgroup_tile.cuh", r"uncopied > 0 && \(kStages", "(kStages", ""),
    "one phase": (TILE, r"parities \^= stage == kRightStages - 1 \? 2u : 0u;", "", ""),
    "one round": (TILE, r"parity \^= uint32_t\(stage == 0\)", "parity ^= 0u", ""),
    "one group": (TILE, r"\(kMultipliers / 32\)", "(kMultipliers / 64)", ""),
    "one warp of a group": (TILE, r"if \(lane >=", "if (thread_now() / 32 % 4 != 0 || lane >=", "waits for a signal"),
    "own block alone": (TILE, r"place.at\(lane, place.wide\)", "block_of_cluster()", ""),
    "only below": (TILE, r"beside \+ int\(beside >= place.wide\)", "beside", ""),
    "half of the bytes": (OUTPUT, r"signals, kOutputRight, ", "signals, kOutputRight / 2, ", ""),
    "the other half": (OUTPUT, r"panel \* kPanelBytes, map", "m * kPanelBytes, map", ""),
    "the wrong columns": (WEIGHT, r"o0\) \+ panel \*", "o0) + m *", ""),
    "the wrong column": (TILE, r"<< \(wide \* kTall\)", "<< 0", ""),
    "the wrong rows": (INPUT, r"int\(b0\) \+ place.wide \* kRows, 0", "int(b0), 0", ""),
    "never shown": (TILE, r"show_signals\(\);", "", ""),
    "never met": (OUTPUT, r"warp_barrier\(\);\n  meet_cluster\(\);", "", ""),
}
SOON = ("never released", "never copied, input")  # the others cost as much compilation each


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug not in SOON)) for bug in PLANTED])
def test_planted_bugs_are_found(bug, monkeypatch):
    *change, said = PLANTED[bug]
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(changes=[tuple(change)]), architecture=90))
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", "cluster")
    # Several rounds of the stages: for the depth of the input, of the outputs, of the batch.
    problems = {
        "contract_output": make_problem(None, torch.bfloat16, (300, 72, 200)),
        "contract_input": make_problem(None, torch.bfloat16, (300, 40, 520)),
        "contract_weight": make_problem(None, torch.bfloat16, (700, 16, 136)),
    }

    def use_all():
        for operation, problem in problems.items():
            assert_wide_close(Place("emulated", CPU), problem, operation, 0, "highest", with_scale=False)

    with pytest.raises((AssertionError, Fault), match=said or None):
        use_all()
