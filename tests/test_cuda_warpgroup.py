"""contract_output by Hopper's warpgroups, emulated: see tests/cuda_emulation/warpgroup.h."""

import ctypes

import pytest
import torch
from conftest import Place
from samples import assert_close_to_truth, every_activation, every_outside, make_problem
from test_cuda_emulation import CPU, OUTPUTS, as_tuple, assert_outputs_close, assert_wide_close

from kan_fast import backends
from tests.cuda_emulation.backend import Backend, Fault
from tests.cuda_emulation.build import build, compiler
from tests.ptx.tensor_cores import operand_places

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

KERNELS = ("wgmma", "wgmma_sparse")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture
def place(library, monkeypatch):
    monkeypatch.setitem(backends._modules, "emulated", Backend(library, architecture=90))
    return Place("emulated", CPU)


@pytest.fixture
def use(monkeypatch):
    return lambda kernel: monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)


@every_kernel
@every_half
def test_shapes(place, use, kernel, dtype):
    use(kernel)
    more = [
        # Both widths of a tile, one input, no more bases than a chunk.
        ((257, 1, 1), 4, 3, "uniform", "zero", 0),
        ((40, 66, 520), 9, 3, "uniform", "clamp", 0),
        ((300, 35, 128), 5, 0, "uneven", "zero", 0),
    ]
    assert_outputs_close(place, dtype, "highest", OUTPUTS + more)


@every_kernel
@every_outside
@every_activation
def test_activations_orders_and_derivatives(place, use, kernel, outside, activation):
    use(kernel)
    for k in range(4):
        for n in range(k + 1):
            for dtype in (torch.bfloat16, torch.float16):
                if dtype == torch.bfloat16 or n < 2:  # beyond the range of float16
                    kind = "uneven" if n % 2 else "uniform"
                    problem = make_problem(place, dtype, (37, 5, 11), 6, k, kind, activation, outside)
                    assert_wide_close(place, problem, "contract_output", n, "highest", with_scale=n == 1)


@every_half
@pytest.mark.parametrize(
    ("shape", "grid_size", "kind", "outside"),
    [
        ((70, 9, 33), 5, "uniform", "zero"),
        ((200, 40, 64), 5, "uniform", "clamp"),  # more than a tile of rows and of inputs
        ((130, 20, 264), 20, "uniform", "zero"),  # three chunks of bases, both widths of a tile
        ((65, 33, 130), 5, "uneven", "linear"),
        ((1, 1, 1), 1, "uniform", "zero"),
        ((129, 130, 8), 3, "uniform", "linear"),
    ],
)
def test_backward(place, use, dtype, shape, grid_size, kind, outside):
    use("wgmma")
    for x_dtype in (dtype, torch.float32):
        problem = make_problem(place, dtype, shape, grid_size, kind=kind, outside=outside, x_dtype=x_dtype)
        for operation in ("contract_input", "contract_weight"):
            for n in (0, 1):
                assert_wide_close(place, problem, operation, n, "highest", with_scale=n == 1)


@every_outside
@every_activation
def test_backward_of_every_kind(place, use, outside, activation):
    use("wgmma")
    for k in range(4):
        for n in range(k + 1):
            kind = "uneven" if n % 2 else "uniform"
            problem = make_problem(place, torch.bfloat16, (37, 5, 11), 6, k, kind, activation, outside)
            for operation in ("contract_input", "contract_weight"):
                assert_wide_close(place, problem, operation, n, "highest", with_scale=n == 1)


@every_outside
@every_half
def test_eight_inputs_at_a_time(place, use, dtype, outside):
    """The quick way and whom it leaves to the general one: x within the range, on its ends, beyond all knots, NaN; uneven knots
    of some inputs; one, two and three chunks of bases. 72 inputs: a block of 64 and one group more."""
    use("wgmma")
    for k, grid_size in ((1, 7), (2, 4), (3, 5), (3, 1), (3, 9), (2, 20)):
        for activation, x_dtype in (("silu", torch.float32), ("tanh", dtype), ("none", dtype)):
            problem = make_problem(place, dtype, (140, 72, 40), grid_size, k, "uniform", activation, outside, x_dtype)
            problem.x[:96] *= 1 / problem.x[:96].abs().max()  # within the range, but for
            problem.x[3, ::5], problem.x[4, ::3], problem.x[5, 7], problem.x[6, 9] = 1.0, -1.0, 50.0, -50.0
            problem.grid[8:24] += torch.linspace(0, 0.1, problem.grid.shape[1]) ** 2  # another shape
            for operation in ("contract_output", "contract_weight"):
                assert_wide_close(place, problem, operation, 0, "highest", with_scale=False)
            problem.x[9, 70] = torch.nan
            y = backends.get("emulated").contract_output(*problem.args("contract_output", 0, False))
            assert torch.equal(y.isnan().any(1).nonzero(), torch.tensor([[9]]))
            assert y[9].isnan().all()


# Float32 in halves, csrc/cuda/split.h. Shapes: tails in every direction; several tiles, slices, steps, chunks of bases.
SINGLE = [
    ((130, 5, 33), 5, 3, "uniform", "zero"),
    ((70, 40, 136), 5, 3, "uniform", "clamp"),
    ((300, 35, 128), 5, 3, "uneven", "clamp"),
    ((40, 136, 264), 9, 2, "uniform", "zero"),
    ((257, 1, 1), 4, 3, "uniform", "zero"),
    ((65, 72, 8), 3, 1, "uniform", "zero"),
    ((1, 9, 130), 20, 2, "uneven", "zero"),
    ((33, 70, 24), 12, 0, "repeated", "clamp"),
    ((1, 1, 1), 1, 3, "uniform", "zero"),
]


@pytest.mark.parametrize(("shape", "grid_size", "k", "kind", "outside"), SINGLE)
def test_float32(place, use, shape, grid_size, k, kind, outside):
    """As close to the truth as float32 anywhere, however tensor cores cut off their sums."""
    use("wgmma")
    for activation, x_dtype in (("silu", torch.float32), ("tanh", torch.bfloat16), ("none", torch.float32)):
        problem = make_problem(place, torch.float32, shape, grid_size, k, kind, activation, outside, x_dtype)
        for operation in ("contract_output", "contract_input", "contract_weight"):
            assert_close_to_truth(place, problem, operation, 0, with_scale=False)


@every_outside
@every_activation
def test_gradient_by_x_of_every_kind_in_float32(place, use, outside, activation):
    use("wgmma")
    for k in range(4):
        for n in range(k + 1):
            kind = "uneven" if n % 2 else "uniform"
            problem = make_problem(place, torch.float32, (37, 16, 40), 6, k, kind, activation, outside)
            assert_close_to_truth(place, problem, "contract_input", n, with_scale=False)


def far(problem):
    problem.x[7], problem.x[:, 3] = problem.x[7] * 1e6, -1e9


def unlike_rows(problem):
    problem.g.mul_(torch.logspace(-12, 3, len(problem.g))[:, None])


def unlike_outputs(problem):
    scale = torch.logspace(-12, 6, problem.g.shape[1])
    for weight in (problem.spline_weight, problem.base_weight):
        weight.mul_(scale)
    problem.g.div_(scale)


def without_weights(problem):
    for weight in (problem.spline_weight, problem.base_weight):
        weight[..., ::2] = 0


@pytest.mark.parametrize(("change", "of_y"), [(far, 0), (unlike_rows, 0), (unlike_outputs, -1), (without_weights, 0)])
def test_scales_of_float32(place, use, change, of_y):
    """Each row of y (or each output's column, where those are of different sizes) and of dx, each output's gradients: within
    twice the error of the reference in float32, and half a unit more, 2^-22, for operands of 22 bits."""
    use("wgmma")
    problem = make_problem(place, torch.float32, (150, 64, 72))
    change(problem)
    for operation, index in (("contract_output", of_y), ("contract_input", 0), ("contract_weight", -1)):
        args = problem.args(operation, 0, False)
        doubled = [value.double() if isinstance(value, torch.Tensor) else value for value in args]
        exact, plain, ours = (
            as_tuple(getattr(backends.get(name), operation)(*given))
            for name, given in (("reference", doubled), ("reference", args), ("emulated", args))
        )
        for want, reference, mine in zip(exact, plain, ours, strict=True):
            size, off, allowed = (
                value.double().movedim(index, 0).flatten(1).norm(dim=1) for value in (want, mine - want, reference - want)
            )
            assert (off <= 2 * allowed + 2.0**-22 * size).all(), (off / size).max()


def test_nan_in_float32(place, use):
    use("wgmma")
    problem = make_problem(place, torch.float32, (40, 24, 33), outside="clamp")
    problem.x[7, 3], problem.x[4, 1], problem.x[5, 2] = 1e30, torch.nan, torch.inf
    y = backends.get("emulated").contract_output(*problem.args("contract_output", 0, False))
    assert not y[[row for row in range(40) if row not in (4, 5)]].isnan().any()
    assert y[4].isnan().all()
    dx = backends.get("emulated").contract_input(*problem.args("contract_input", 1, False))
    assert torch.equal(dx.isnan().nonzero(), torch.tensor([[4, 1]]))


def test_same_bits_in_float32(place, use):
    use("wgmma")
    problem = make_problem(place, torch.float32, (300, 40, 136))
    for operation in ("contract_output", "contract_input", "contract_weight"):
        run, args = getattr(backends.get("emulated"), operation), problem.args(operation, 0, False)
        assert all(map(torch.equal, as_tuple(run(*args)), as_tuple(run(*args))))


# At one barrier for both groups of makers.
OVERTAKING = ("cuda/warpgroup_tile.cuh", r"\+ kLeftStages \* (makers_group\(\)|\(s & 1\))", "")


def assert_no_group_overtakes(library):
    """Of a group of makers that goes on for three steps while the other one has not begun: whose turn is whose?"""
    gpu = Backend(library, architecture=90, multiprocessors=7)
    problem = make_problem(None, torch.bfloat16, (1000, 136, 9), 3)
    for gradient in gpu.contract_weight(*problem.args("contract_weight", 0, False)):
        assert gradient.isfinite().all()


def test_no_group_of_makers_overtakes_the_other(library, use):
    use("wgmma")
    assert_no_group_overtakes(library)


@pytest.mark.slow
def test_overtaking_would_be_found(use):
    use("wgmma")
    with pytest.raises(AssertionError):
        assert_no_group_overtakes(build(changes=[OVERTAKING]))


@every_kernel
def test_nan_stays_in_its_row(place, use, kernel):
    use(kernel)
    problem = make_problem(place, torch.bfloat16, (40, 20, 33), outside="clamp")
    problem.x[7, 3], problem.x[4, 1] = 1e30, torch.nan
    y = backends.get("emulated").contract_output(*problem.args("contract_output", 0, False))
    assert torch.equal(y.isnan().any(1).nonzero(), torch.tensor([[4]]))
    assert y[4].isnan().all()


@every_kernel
def test_same_bits_on_both_tiles(place, use, kernel):
    """The first 128 outputs do not depend on how many there are."""
    use(kernel)
    problem = make_problem(place, torch.bfloat16, (40, 20, 200))
    narrow = problem._replace(
        spline_weight=problem.spline_weight[..., :128].contiguous(), base_weight=problem.base_weight[:, :128].contiguous()
    )
    wide, first = (
        backends.get("emulated").contract_output(*given.args("contract_output", 0, False)) for given in (problem, narrow)
    )
    assert torch.equal(wide[:, :128], first)


@pytest.mark.parametrize("swizzle", range(4))
def test_descriptors_are_read_as_the_interpreter_reads_them(swizzle):
    """Two readings of the PTX ISA: the emulation's, and that of tests/ptx, which runs the products that Triton compiles."""
    place = ctypes.CDLL(str(build("descriptor.cpp"))).kan_place
    place.restype, place.argtypes = ctypes.c_uint32, [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    for leading, stride in ((4096, 1024), (2048, 8192)):
        descriptor = (0x2400 >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62
        want = operand_places(descriptor, 128, 32, 1, 2)
        assert want.shape == (128, 32)
        assert all(place(descriptor, n, k) == want[n, k] for n in range(128) for k in range(32))


@every_kernel
def test_refused_where_it_cannot_serve(place, library, use, monkeypatch, kernel):
    use(kernel)

    def run(operation="contract_output", **change):
        problem = make_problem(place, **{"dtype": torch.bfloat16, **change})
        getattr(backends.get("emulated"), operation)(*problem.args(operation, 0, False))

    single = {"dtype": torch.float32}
    if kernel == "wgmma":
        with pytest.raises(Fault, match="wgmma: it does not serve linear extensions in float32"):
            run(**single, outside="linear")
        with pytest.raises(Fault, match="wgmma: it does not serve contract_input of 128 bases or more in float32"):
            run("contract_input", **single, grid_size=125)
        for n, scaled, why in ((1, False, "derivatives of bases"), (0, True, "scaled inputs")):
            problem = make_problem(place, **single)
            with pytest.raises(Fault, match=f"wgmma: it does not serve {why} in float32"):
                backends.get("emulated").contract_output(*problem.args("contract_output", n, scaled))
    else:
        with pytest.raises(Fault, match="wgmma_sparse: it does not serve float32"):
            run(**single)
    with pytest.raises(Fault, match=f"{kernel}: it does not serve spline orders above 3"):
        run(k=4)
    with pytest.raises(Fault, match=f"{kernel}: it does not serve contract_input of 256 bases or more"):
        run("contract_input", grid_size=253)
    for architecture in (80, 100, 120):
        monkeypatch.setitem(backends._modules, "emulated", Backend(library, architecture))
        with pytest.raises(Fault, match=f"{kernel}: it does not serve GPUs of another compute capability than 9.0"):
            run()


# What the kernels must not survive: file, pattern, replacement, and what the emulation says where it sees the deed itself.
OUTPUT, TILE, QUICK = "cuda/warpgroup_output.cuh", "cuda/warpgroup_tile.cuh", "cuda/quick.cuh"
PLANTED = {
    "wait": (TILE, r"wait_for_products<2>", "wait_for_products<4>", "shared memory is written while a product reads it"),
    "registers": (TILE, r"products<kSets - 1>", "products<kSets>", "the left operand is written while it is under way"),
    "last wait": (TILE, r"wait_for_products<0>\(\);\n  if", "if", ""),
    "register fence": (OUTPUT, r"order_registers\(\);", "", "registers were written, and no fence followed"),
    "fence of loaded registers": (
        TILE,
        r"order_registers\(\);\n      KAN_UNROLL_ALL",
        "KAN_UNROLL_ALL",
        "registers were written, and no fence followed",
    ),
    "copies' fence": (
        TILE,
        r"wait_for_copies<kLater>\(\);\n    show_to_tensor_cores\(\);",
        "wait_for_copies<kLater>();",
        "a copy that no proxy fence followed",
    ),
    "makers' fence": (TILE, r"if \(!kLoaded\) show_to_tensor_cores\(\);", "", "a copy that no proxy fence followed"),
    "three stages": (TILE, r"kStages == 3 \? 0 : 1", "1", "shared memory is written while a product reads it"),
    "two shapes": (
        OUTPUT,
        r"if \(kSparse\) wait_for_products<0>\(\);",
        "",
        "wgmma_bfloat16 on the sums of a wgmma_sparse_bfloat16 under way",
    ),
    "alone": (
        OUTPUT,
        r"order_registers\(\);",
        "order_registers(); if (threadIdx.x / 32 % 4 == 1) order_registers();",
        "the warps of a group did not issue the same products",
    ),
    "made": (TILE, r"if \(kMade\) meet\(", "if (kMade) arrive(", ""),
    "read": (TILE, r"meet\(kReadBarrier", "arrive(kReadBarrier", "shared memory is written while a product reads it"),
    "never read": (TILE, r"s - 1 \+ kLeftStages < steps", "s + kLeftStages < steps", "part of a block waits at a barrier"),
    "read too often": (TILE, r" && s - 1 \+ kLeftStages < steps", "", "a block ends with threads at a barrier"),
    "lines never read": (TILE, r"s \+ kLeftStages < steps\)", "s + kLeftStages + 1 < steps)", "part of a block waits"),
    "lines read too often": (TILE, r" && s \+ kLeftStages < steps", "", "a block ends with threads at a barrier"),
    "depth in lines": (TILE, r"lane / 16 \* 8 \+ lane % 8, warp", "lane / 8 % 2 * 8 + lane % 8, warp", ""),
    "panels": (TILE, r"warp / 4 \* kPanelBytes", "warp / 4 * 0", ""),
    "too far ahead": (TILE, r"next = kAhead;", "next = kAhead - 1;", ""),
    "swizzle": (TILE, r"kSwizzle128 = 1", "kSwizzle128 = 2", ""),
    "pieces": ("cuda/window.cuh", r"piece \^ line % 8", "piece ^ line % 4", ""),
    "offsets": (TILE, r"kLeading = kPanelBytes, kStride = kAtomBytes", "kLeading = kAtomBytes, kStride = kPanelBytes", ""),
    "alignment": (TILE, r" \+ \(kAtomBytes - shared_address\(memory\) % kAtomBytes\) % kAtomBytes", "", ""),
    "deeper": (TILE, r"kSixteenLines = 2 \*", "kSixteenLines = 1 *", ""),
    "metadata": (OUTPUT, r"metadata\[k\]\);", "metadata[1 - k]);", ""),
    "sums": (TILE, r"body\(row \+ 8 \* r,", "body(row + 8 * (1 - r),", ""),
    "whole windows": (QUICK, r"shift_words_left\(zeros, kWindow", "shift_words_left(kWindow, kWindow", ""),
    "cut windows": (QUICK, r"shifted\(int\(shift\[m\]\) - 32\)", "shifted(int(shift[m]) - 24)", ""),
    "sign of a weight": ("cuda/activation.cpp", r"0xbbbbbbbbu", "0xaaaaaaaau", ""),
}


SPLIT, WEIGHT = "cuda/warpgroup_split.cuh", "cuda/warpgroup_split_weight.cuh"
# The same of float32 in halves.
PLANTED_SINGLE = {
    "first of two": (SPLIT, r"begin\(stage, false\);\n      begin", "begin(stage, true); begin", ""),
    "one sum": (SPLIT, r"sums\[0\]\[m\] \+= part", "sums[0][m] = part", ""),
    "lower halves": (SPLIT, r"kRights\[\] = \{2, 3, 0, 1", "kRights[] = {0, 1, 0, 1", ""),
    "halves of a line": (WEIGHT, r"line\(\) \+ lower \* kSplitDepth", "line() + (1 - lower) * kSplitDepth", ""),
    "wait for two": (SPLIT, r"wait_for_products<0>\(\);\n      if", "wait_for_products<1>(); if", ""),
    "read": (SPLIT, r"meet\(kRingRead", "arrive(kRingRead", "shared memory is written while a product reads it"),
    "made": (SPLIT, r"meet\(kRingMade", "arrive(kRingMade", ""),
    "copies": (SPLIT, r"wait_for_copies<0>\(\);", "", ""),
    "fence": (SPLIT, r"show_to_tensor_cores\(\);", "", "a copy that no proxy fence followed"),
    "scale of a row": ("cuda/warpgroup_split_output.cuh", r"inverse_of_scale\(h\.rows\[b\]\)", "1.0f", ""),
}


SOON = ("wait", "register fence", "read", "swizzle", "metadata")  # the others cost as much compilation each


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug not in SOON)) for bug in PLANTED])
def test_planted_bugs_are_found(bug, monkeypatch):
    *change, said = PLANTED[bug]
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(changes=[tuple(change)]), architecture=90))
    # Even knots without a scale have a way of their own, and another one where all x lie within the range.
    cases = ("uneven", True), ("uniform", False), ("uniform", False)
    problems = [(make_problem(None, torch.bfloat16, (70, 40, 136), kind=kind), scaled) for kind, scaled in cases]
    problems[-1][0].x.mul_(0.35)
    lines = make_problem(None, torch.bfloat16, (500, 9, 136))
    deep = make_problem(None, torch.bfloat16, (70, 20, 264))

    def use_all():
        for kernel in reversed(KERNELS):
            monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)
            for problem, scaled in problems:
                assert_wide_close(Place("emulated", CPU), problem, "contract_output", 0, "highest", scaled)
        # The form whose left operand is by lines.
        assert_wide_close(Place("emulated", CPU), lines, "contract_weight", 0, "highest", with_scale=False)
        # That which has three stages.
        assert_wide_close(Place("emulated", CPU), deep, "contract_input", 0, "highest", with_scale=False)

    with pytest.raises((AssertionError, Fault), match=said or None):
        use_all()


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug != "one sum")) for bug in PLANTED_SINGLE])
def test_planted_bugs_are_found_in_float32(bug, monkeypatch):
    *change, said = PLANTED_SINGLE[bug]
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(changes=[tuple(change)]), architecture=90))
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", "wgmma")
    problem = make_problem(None, torch.float32, (300, 40, 136), outside="clamp")

    def use_all():
        for operation in ("contract_output", "contract_input", "contract_weight"):
            assert_close_to_truth(Place("emulated", CPU), problem, operation, 0, with_scale=False)

    with pytest.raises((AssertionError, Fault), match=said or None):
        use_all()
