"""The CUDA kernels against the float64 truth, emulated: see tests/cuda_emulation."""

import ctypes

import pytest
import torch
import truth
from conftest import Place
from samples import KINDS, OPERATIONS, assert_close_to_truth, every_activation, every_outside, make_problem

from kan_fast import backends
from kan_fast.spline import OUTSIDE
from tests.cuda_emulation.backend import Backend, Fault
from tests.cuda_emulation.build import build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

CPU = torch.device("cpu")
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def place(library, monkeypatch):
    monkeypatch.setitem(backends._modules, "emulated", Backend(library))
    return Place("emulated", CPU)


@pytest.fixture
def use(monkeypatch):
    """Forces a kernel, and how float32 is multiplied."""

    def force(kernel, precision="highest"):
        monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)

    return force


@pytest.mark.parametrize("kernel", ["any", "narrow"])
@every_operation
@every_outside
@every_activation
def test_activations_and_outside_modes(place, use, kernel, operation, activation, outside):
    use(kernel)
    for k, n in ((3, 0), (3, 1), (2, 2), (1, 0), (3, 3) if kernel == "narrow" else (4, 3)):
        problem = make_problem(place, torch.float32, (37, 5, 6), k=k, activation=activation, outside=outside)
        assert_close_to_truth(place, problem, operation, n, with_scale=n % 2 == 1)


@every_operation
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kernel", "k"), [*[("any", k) for k in range(6)], *[("narrow", k) for k in range(4)]])
def test_orders_of_spline_and_derivative(place, use, kernel, operation, k, kind):
    use(kernel)
    for n in range(7):
        problem = make_problem(place, torch.float32, (29, 3, 5), 1 + 3 * (n % 2), k, kind, "silu", OUTSIDE[(n + k) % 3])
        assert_close_to_truth(place, problem, operation, n)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["any", "narrow"])
def test_dtypes(place, use, kernel, operation, dtype):
    use("any" if dtype == torch.float64 else kernel)
    for n, shape in ((0, (40, 9, 70 if kernel == "any" else 20)), (1, (33, 3, 2))):
        problem = make_problem(place, dtype, shape, kind="uneven")
        assert_close_to_truth(place, problem, operation, n, with_scale=n == 0)
        if dtype != torch.float64:
            assert_close_to_truth(place, make_problem(place, dtype, shape, x_dtype=torch.float32), operation, n)


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0), (1, 1, 1), (2, 1, 16), (70, 9, 130), (9, 17, 65), (1500, 2, 1)],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["any", ""])
def test_shapes(place, use, kernel, shape):
    use(kernel)
    for operation in OPERATIONS:
        for kind, outside, grid_size in (("uniform", "zero", 5), ("uneven", "linear", 40)):
            problem = make_problem(place, torch.float32, shape, grid_size, kind=kind, outside=outside)
            assert_close_to_truth(place, problem, operation, 0, outside == "zero")


@pytest.mark.parametrize(("kernel", "outputs"), [("any", 33), ("narrow", 5)])
@every_outside
@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
def test_nan_and_infinity(place, use, kernel, outputs, activation, outside):
    """The row is NaN, its gradient at that input is NaN, everything else is untouched; infinity is as far out as any x."""
    use(kernel)
    problem = make_problem(place, torch.float32, (40, 20, outputs), activation=activation, outside=outside)
    if outside != "linear":  # where a spline goes on for ever
        problem.x[7, 3] = torch.inf if activation == "none" else 1e30
    backend = backends.get("emulated")
    for n in (0, 1):
        problem.x[4, 1] = 0.3
        clean = {op: getattr(backend, op)(*problem.args(op, n, False)) for op in OPERATIONS}
        if activation == "none":
            assert_close_to_reference(problem, "contract_output", n, clean["contract_output"])
        problem.x[4, 1] = torch.nan
        row, spot = torch.arange(40) == 4, torch.zeros(40, 20, dtype=torch.bool)
        spot[4, 1] = True
        y = backend.contract_output(*problem.args("contract_output", n, False))
        assert y[row].isnan().all()
        torch.testing.assert_close(y[~row], clean["contract_output"][~row])
        dx = backend.contract_input(*problem.args("contract_input", n))
        assert dx[spot].isnan().all()
        torch.testing.assert_close(dx[~spot], clean["contract_input"][~spot])
        d_spline, d_base = backend.contract_weight(*problem.args("contract_weight", n, False))
        assert d_spline[1].isnan().any(0).all()
        torch.testing.assert_close(d_spline[2:], clean["contract_weight"][0][2:])
        if activation != "none":
            assert d_base[1].isnan().all()


def assert_close_to_reference(problem, operation, n, mine):
    want = getattr(backends.get("reference"), operation)(*problem.args(operation, n, False))
    assert want.isfinite().all()
    torch.testing.assert_close(mine, want)


WIDE = [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest"), (torch.float16, "highest")]
every_wide_kernel = pytest.mark.parametrize("kernel", ["dense", "sparse"])
every_product = pytest.mark.parametrize(("dtype", "precision"), WIDE, ids=lambda value: str(value).removeprefix("torch."))


def assert_wide_close(place, problem, operation, n, precision, with_scale=True):
    """True float32 as everywhere. Else an operand that is rounded errs by half a unit of its last place: 2^-8 of a bfloat16,
    2^-11 of a float16 or tf32 number. Features always are, weights and g where they are float32; every term errs by at most
    that, the sum by that of the terms' magnitudes. Features are computed in float32: the floor of assert_close_to_truth.
    The result is rounded once more to its dtype."""
    if problem.spline_weight.dtype == torch.float32 and precision == "highest":
        assert_close_to_truth(place, problem, operation, n, with_scale)
        return
    args = problem.args(operation, n, with_scale)
    exact = as_tuple(getattr(truth, operation)(*args))
    size = as_tuple(getattr(truth, operation)(*args, magnitude=True))
    slope = as_tuple(getattr(truth, operation)(*problem.args(operation, n + 1, with_scale), magnitude=True))
    unit = {torch.float32: 2 * 2.0**-11, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[problem.spline_weight.dtype]
    reach, eps = float(problem.grid.abs().max()), torch.finfo(torch.float32).eps
    ours = as_tuple(getattr(backends.get(place.backend), operation)(*args))
    for mine, want, total, steep in zip(ours, exact, size, slope, strict=True):
        if want.size:
            floor = 4 * eps * (total.max() + reach * steep.max()) + torch.finfo(mine.dtype).eps * abs(want).max()
            error = abs(truth.doubled(mine) - want)
            assert (error <= 1.01 * unit * total + floor).all(), f"largest error {error.max():.3g}"


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


# shape, grid_size, k, kind, outside, n: tails in every direction; several slices of inputs; one and more chunks of bases.
OUTPUTS = [
    ((130, 5, 33), 5, 3, "uniform", "zero", 0),
    ((70, 37, 136), 5, 3, "uneven", "linear", 0),
    ((33, 70, 24), 12, 3, "repeated", "clamp", 1),
    ((1, 9, 130), 20, 2, "uniform", "linear", 1),
    ((65, 4, 8), 3, 1, "uneven", "zero", 0),
]


def assert_outputs_close(place, dtype, precision, cases):
    for shape, grid_size, k, kind, outside, n in cases:
        for activation, x_dtype in (("silu", torch.float32), ("none", dtype)):
            problem = make_problem(place, dtype, shape, grid_size, k, kind, activation, outside, x_dtype)
            assert_wide_close(place, problem, "contract_output", n, precision, with_scale=n == 1)


@every_product
@every_wide_kernel
def test_wide_output(place, use, kernel, dtype, precision):
    use(kernel, precision)
    assert_outputs_close(place, dtype, precision, [*OUTPUTS, ((40, 3, 9), 4, 3, "uniform", "zero", 1)])


@every_product
def test_wide_gradients(place, use, dtype, precision):
    use("dense", precision)
    cases = [
        ((130, 9, 33), 5, 3, "uniform", "zero", 0),
        ((300, 17, 136), 5, 3, "uneven", "linear", 0),  # several slices of the batch
        ((33, 130, 24), 12, 3, "repeated", "clamp", 1),
        ((1, 20, 130), 20, 2, "uniform", "linear", 0),
        ((65, 3, 8), 3, 1, "uneven", "zero", 0),
    ]
    for shape, grid_size, k, kind, outside, n in cases:
        for activation, x_dtype in (("silu", torch.float32), ("none", dtype)):
            problem = make_problem(place, dtype, shape, grid_size, k, kind, activation, outside, x_dtype)
            assert_wide_close(place, problem, "contract_weight", n, precision, with_scale=n == 1)
            assert_wide_close(place, problem, "contract_input", 1, precision)


LONG_SUMS = {"contract_output": (2, 1000, 8), "contract_weight": (9000, 1, 8), "contract_input": (2, 1, 9000)}


def assert_long_sum_is_rounded(place, operation):
    """Tensor cores cut sums off: thousands of terms of one sign, added up there, miss float32 by up to 2^-23 for each."""
    problem = make_problem(place, torch.float32, LONG_SUMS[operation], outside="clamp", activation="relu")
    for tensor in (problem.x, problem.spline_weight, problem.base_weight, problem.g):
        tensor.abs_()
    assert_close_to_truth(place, problem, operation, 0, False)


@every_wide_kernel
@pytest.mark.parametrize("operation", LONG_SUMS)
def test_long_sums_are_rounded(place, use, kernel, operation):
    use(kernel)
    assert_long_sum_is_rounded(place, operation)


@pytest.mark.slow
def test_long_sums_of_tensor_cores_would_be_found(use, monkeypatch):
    use("dense")
    change = ("cuda/products.cuh", r"float part\[4\] = \{\};", "float(&part)[4] = sum, gone[4] = {};"), (
        "cuda/products.cuh",
        r"sum\[r\] \+= part",
        "sum[r] += gone",
    )
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(changes=change)))
    for operation in LONG_SUMS:
        with pytest.raises(AssertionError, match="error"):
            assert_long_sum_is_rounded(Place("emulated", CPU), operation)


@every_outside
def test_ends_of_the_range(place, use, outside):
    """x on the ends of the range and of the knots, and right beside them: where derivatives jump, x decides, not its place in
    units of the spacing. Elsewhere the result is continuous: a jump would be about 1, and neighbours differ by some 1e-6."""
    use("dense")
    problem = make_problem(place, torch.float32, (40, 5, 16), outside=outside)
    ends = problem.grid[0, [0, 3, 4, 8, -1]]
    beside = [ends, *(torch.nextafter(ends, torch.full_like(ends, side * torch.inf)) for side in (-1, 1))]
    problem.x[: 3 * len(ends)] = torch.cat(beside)[:, None]
    for operation, n in (("contract_output", 0), ("contract_output", 1), ("contract_input", 1)):
        args = problem.args(operation, n, False)
        mine, want = (getattr(backends.get(name), operation)(*args) for name in ("emulated", "reference"))
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-4)


@every_wide_kernel
def test_wide_kernels_carry_nan(place, use, kernel):
    use(kernel, "high")
    problem = make_problem(place, torch.float32, (40, 20, 33), outside="clamp")
    problem.x[7, 3], problem.x[4, 1] = torch.inf, torch.nan
    problem = problem._replace(activation="none", base_weight=None)
    backend, row = backends.get("emulated"), torch.arange(40) == 4
    y = backend.contract_output(*problem.args("contract_output", 0, False))
    assert y[row].isnan().all()
    assert y[~row].isfinite().all()
    dx = backend.contract_input(*problem.args("contract_input", 1))
    assert torch.equal(dx.isnan().nonzero(), torch.tensor([[4, 1]]))
    d_spline, _ = backend.contract_weight(*problem.args("contract_weight", 0, False))
    assert d_spline[1].isnan().any(0).all()
    assert d_spline[[0, *range(2, 20)]].isfinite().all()


# Of output tiles on GPUs of 1 to 132 multiprocessors: 1 to 64 rows, inputs in one slice and in several.
TILES_OF_ANY = [
    (1, 300, 40, 33), (4, 70, 130, 9), (16, 100, 40, 40), (32, 100, 70, 40), (132, 33, 70, 40), (132, 3, 300, 70),
    (132, 200, 9, 5), (4, 130, 20, 40),
]  # fmt: skip


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", TILES_OF_ANY, ids=str)
def test_tiles_of_any_height(library, monkeypatch, use, operation, dtype, sizes):
    use("any")
    multiprocessors, *shape = sizes
    monkeypatch.setitem(backends._modules, "emulated", Backend(library, 80, multiprocessors))
    place = Place("emulated", CPU)
    for k, with_scale in ((3, True), (2, False)):
        problem = make_problem(place, dtype, tuple(shape), k=k, kind="uneven")
        assert_close_to_truth(place, problem, operation, 0, with_scale)


def test_a_kernel_that_cannot_serve_is_refused(place, use):
    use("dense")
    for change in ({"k": 4}, {"dtype": torch.float64}, {"shape": (0, 3, 4)}):
        problem = make_problem(place, **{"dtype": torch.float32, **change})
        with pytest.raises(Fault, match="does not serve"):
            backends.get("emulated").contract_output(*problem.args("contract_output", 0, False))
    use("fastest")
    with pytest.raises(Fault, match="expected any, narrow, dense, sparse, wgmma, wgmma_sparse or cluster"):
        backends.get("emulated").contract_output(*problem.args("contract_output", 0, False))


# Those of wide kernels, which are all compiled again.
HEAVY = ("copies", "overtaking", "columns", "metadata", "too early", "pairs")
# What a kernel must not survive: file, pattern, replacement.
PLANTED = {
    "barrier": ("cuda/contract_output.cu", r"\[lane\] = total\[r\];\n    barrier\(\);", "[lane] = total[r];"),
    "bound": ("cuda/contract_output.cu", r"o0 \+ lane >= outputs\) break", "o0 + lane > outputs) break"),
    "row": ("cuda/contract_input.cu", r"windows\(\) && b < p\.batch && i < p", "windows() && i < p"),
    "slice": ("cuda/contract_weight.cu", r"\(slice \+ 1\) \* rows < p\.batch", "(slice + 1) * rows <= p.batch + rows"),
    "copies": ("cuda/wide_output.cuh", r"wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    "overtaking": ("cuda/wide_output.cuh", r"barrier\(\);\n            if \(s \+", "if (s +"),
    "columns": (
        "cuda/products.cuh",
        r"mma_bfloat16\(c\[m\]\[n\], a\[m\], b\[0\], b\[1\]\)",
        "mma_bfloat16(c[m][n], a[m], b[1], b[0])",
    ),
    "metadata": ("cuda/operand.cuh", r"\+ row / 8 % 2 \* 2;", ";"),
    "too early": ("cuda/wide_output.cuh", r"step = s - warp / 4", "step = s - 1 + warp / 4"),
    "pairs": ("cuda/fragments.cuh", r"begin == -1 \? word >> 16", "begin == -1 ? word << 16"),
    "divergence": (
        "cuda/contract_input.cu",
        r"if \(i >= p\.in_features\) break;",
        "if (i0 + lane >= p.in_features) break;\nwarp_barrier();",
    ),
}


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug in HEAVY)) for bug in PLANTED])
def test_planted_bugs_are_found(bug, monkeypatch):
    monkeypatch.setitem(backends._modules, "emulated", Backend(build(changes=[PLANTED[bug]])))
    wide = bug in HEAVY
    problem = make_problem(
        None, torch.bfloat16 if wide else torch.float32, (70, 40, 136) if wide else (1700, 9, 63), kind="uneven"
    )

    def use_all():
        for kernel in ("dense", "sparse") if wide else ("any",):
            monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)
            for operation in OPERATIONS:
                assert_wide_close(Place("emulated", CPU), problem, operation, 0, "high" if wide else "highest")

    with pytest.raises((AssertionError, Fault)):
        use_all()


def test_sparse_fragments_are_exact():
    """Every shift of a window against eight bases; and by counting, for longer grids and orders up to three."""
    assert ctypes.CDLL(str(build("fragments.cpp"))).kan_check_fragments() == 0
    for k in range(4):
        for first in range(-k, 64):
            window = {f for f in range(first, first + k + 1) if 0 <= f < 64}
            for chunk in range(0, 64, 8):
                assert all(len(window & {chunk + parity + 2 * m for m in range(4)}) <= 2 for parity in (0, 1))
                assert all(len(window & {chunk + j, chunk + j + 4}) <= 1 for j in range(4))
