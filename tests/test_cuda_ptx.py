"""The PTX that nvcc makes of the CUDA kernels, run by the interpreter in tests/ptx, against the float64 truth.

What the emulation cannot see: how instructions are spelled, and what the compiler made of everything around them. Small
problems: a few blocks each.
"""

import re
import subprocess

import pytest
import torch
from conftest import Place
from networks import inputs, make
from samples import assert_close_to_truth, make_problem
from test_cuda_emulation import CPU, assert_wide_close
from test_cuda_network import compare

from build_backend import find_nvcc
from kan_fast import backends
from kan_fast.activations import ACTIVATIONS
from tests.cuda_emulation import build as emulation
from tests.ptx.cuda import Interpreted, compile_to_ptx
from tests.ptx.memory import Fault

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on this machine"),
    pytest.mark.skipif(emulation.compiler() is None, reason="the host code is run as the emulation has it: by g++ on x86-64"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SUMS = "contract_weight"  # the source that adds up slices


@pytest.fixture
def place(library, monkeypatch):
    """Sets up a GPU that has these compiled sources and one of the kernels."""

    def use(kernel, sources, architecture=80, precision="highest", **options):
        backend = Interpreted(library, sources, architecture, **options)
        monkeypatch.setitem(backends._modules, "interpreted", backend)
        monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
        return Place("interpreted", CPU), backend

    return use


# kernel, operation, source, dtype; shape, grid size, kind of knots, outside, derivative: tails, and both widths of a tile.
WIDE = [
    ("dense", "contract_output", "wide_output_bfloat16", BF16, (40, 5, 33), 5, "uniform", "zero", 0),
    ("sparse", "contract_output", "wide_output_bfloat16", BF16, (40, 5, 33), 5, "uniform", "zero", 0),
    ("sparse", "contract_output", "wide_output_bfloat16", BF16, (33, 3, 136), 12, "uneven", "linear", 1),
    ("dense", "contract_output", "wide_output_bfloat16", BF16, (130, 70, 40), 5, "uniform", "zero", 0),  # two slices
    ("sparse", "contract_output", "wide_output_float16", F16, (40, 5, 40), 5, "repeated", "clamp", 0),
    ("sparse", "contract_output", "wide_output_tf32", F32, (40, 5, 33), 5, "uneven", "zero", 0),
    ("dense", "contract_output", "wide_output_tf32x3", F32, (40, 5, 33), 5, "uneven", "clamp", 0),
    ("sparse", "contract_output", "wide_output_tf32x3", F32, (40, 5, 36), 5, "uniform", "linear", 0),
    ("dense", "contract_input", "wide_backward_bfloat16", BF16, (40, 5, 33), 5, "uniform", "zero", 1),
    ("dense", "contract_input", "wide_backward_float16", F16, (40, 20, 72), 5, "uneven", "linear", 1),
    ("dense", "contract_input", "wide_backward_tf32x3", F32, (40, 9, 33), 12, "uniform", "clamp", 1),
    ("dense", "contract_weight", "wide_backward_bfloat16", BF16, (40, 9, 136), 5, "uneven", "zero", 0),
    ("dense", "contract_weight", "wide_backward_bfloat16", BF16, (300, 17, 40), 5, "uniform", "linear", 0),  # two slices
    ("dense", "contract_weight", "wide_backward_tf32x3", F32, (40, 9, 33), 5, "uniform", "zero", 1),
]
# As WIDE, for the tensor cores of 9.0: barriers of makers and multipliers, products of operands in shared memory.
WARPGROUP = [
    ("wgmma", "contract_output", "warpgroup_output_bfloat16", BF16, (40, 20, 33), 5, "uniform", "zero", 0),
    ("wgmma", "contract_output", "warpgroup_output_bfloat16", BF16, (40, 24, 33), 5, "uniform", "clamp", 0),  # the quick way
    ("wgmma", "contract_output", "warpgroup_output_bfloat16", BF16, (70, 72, 136), 5, "uniform", "zero", 0),
    ("wgmma", "contract_output", "warpgroup_output_bfloat16", BF16, (40, 24, 40), 12, "uniform", "zero", 0),  # two chunks
    ("wgmma", "contract_output", "warpgroup_output_bfloat16", BF16, (70, 130, 136), 12, "uneven", "linear", 1),
    ("wgmma_sparse", "contract_output", "warpgroup_output_bfloat16", BF16, (40, 20, 33), 5, "uniform", "zero", 0),
    ("wgmma_sparse", "contract_output", "warpgroup_output_bfloat16", BF16, (70, 70, 40), 12, "repeated", "clamp", 0),
    ("wgmma", "contract_input", "warpgroup_backward_bfloat16", BF16, (40, 20, 33), 5, "uniform", "zero", 1),
    ("wgmma", "contract_input", "warpgroup_backward_bfloat16", BF16, (130, 9, 136), 12, "uneven", "linear", 1),
    ("wgmma", "contract_weight", "warpgroup_backward_bfloat16", BF16, (70, 20, 33), 5, "uniform", "zero", 0),
    ("wgmma", "contract_weight", "warpgroup_backward_bfloat16", BF16, (70, 24, 136), 12, "uniform", "zero", 0),
    ("wgmma", "contract_weight", "warpgroup_backward_bfloat16", BF16, (200, 9, 136), 5, "uneven", "clamp", 1),
    # Four tiles whole, two in two slices.
    ("wgmma", "contract_weight", "warpgroup_backward_bfloat16", BF16, (128, 66, 33), 5, "uniform", "zero", 0),
]
# The same where blocks share what the copy engine brings them; more steps than stages.
CLUSTER = [
    ("cluster", "contract_output", "cluster_bfloat16", BF16, (40, 40, 136), 5, "uniform", "zero", 0),
    ("cluster", "contract_output", "cluster_bfloat16", BF16, (140, 24, 200), 12, "uneven", "linear", 0),
    ("cluster", "contract_input", "cluster_bfloat16", BF16, (40, 20, 264), 5, "uniform", "zero", 1),
    ("cluster", "contract_input", "cluster_bfloat16", BF16, (140, 5, 72), 60, "uneven", "linear", 1),
    ("cluster", "contract_weight", "cluster_bfloat16", BF16, (400, 16, 136), 5, "uniform", "zero", 0),
    ("cluster", "contract_weight", "cluster_bfloat16", BF16, (200, 72, 136), 5, "uneven", "clamp", 0),  # two tiles in slices
]
# Float32 in halves: the quick way and the general one, one tile and several, an odd and an even number of steps.
HALVES = [
    ("contract_output", (40, 24, 33), 5, "uniform", "zero", 0),
    ("contract_output", (70, 72, 136), 5, "uniform", "clamp", 0),
    ("contract_output", (40, 9, 40), 12, "uneven", "zero", 0),
    ("contract_input", (40, 20, 33), 5, "uniform", "zero", 1),
    ("contract_input", (130, 40, 72), 12, "uneven", "linear", 1),
    ("contract_weight", (70, 24, 33), 5, "uniform", "zero", 0),
    ("contract_weight", (200, 9, 136), 5, "uneven", "clamp", 0),
    ("contract_weight", (128, 66, 33), 5, "uniform", "zero", 0),  # four tiles whole, two in two slices
]
# The other types of sources that hold the same kernels.
OTHERS = [
    ("wgmma", "contract_output", "warpgroup_output_float16", F16, (40, 24, 33), 5, "uniform", "zero", 0),
    ("wgmma_sparse", "contract_output", "warpgroup_output_float16", F16, (40, 20, 33), 5, "uneven", "linear", 0),
    ("wgmma", "contract_input", "warpgroup_backward_float16", F16, (40, 20, 33), 5, "uniform", "zero", 1),
    ("wgmma", "contract_weight", "warpgroup_backward_float16", F16, (70, 20, 33), 5, "uneven", "zero", 0),
    ("cluster", "contract_output", "cluster_float16", F16, (40, 40, 136), 5, "uniform", "zero", 0),
    ("cluster", "contract_input", "cluster_float16", F16, (40, 20, 72), 5, "uniform", "zero", 1),
    ("cluster", "contract_weight", "cluster_float16", F16, (140, 16, 136), 5, "uniform", "zero", 0),
    ("dense", "contract_weight", "wide_backward_float16", F16, (40, 9, 136), 5, "uneven", "zero", 0),
    ("dense", "contract_input", "wide_backward_tf32", F32, (40, 9, 33), 5, "uniform", "zero", 1),
    ("dense", "contract_weight", "wide_backward_tf32", F32, (40, 9, 33), 5, "uniform", "zero", 0),
]


def names(case):
    return "-".join(map(str, case)).replace("torch.", "")


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize("case", [*WIDE, *WARPGROUP, *CLUSTER, *SLOW], ids=names)
def test_wide(place, case):
    kernel, operation, source, dtype, shape, grid_size, kind, outside, n = case
    precision = "high" if source.endswith("tf32") else "highest"
    architecture = 90 if source.startswith(("warpgroup", "cluster")) else 80
    parts = source.replace("cluster", "warpgroup_backward")  # which adds up what warpgroups cut, of clusters too
    where, backend = place(kernel, dict.fromkeys(("polynomials", source, parts, SUMS)), architecture, precision)
    problem = make_problem(where, dtype, shape, grid_size, kind=kind, outside=outside, x_dtype=F32)
    assert_wide_close(where, problem, operation, n, precision, with_scale=n == 1)
    assert len(backend.ran) >= 2


@pytest.mark.parametrize("case", HALVES, ids=names)
def test_float32_in_halves(place, case):
    operation, shape, grid_size, kind, outside, n = case
    where, backend = place("wgmma", ("polynomials", "split", "warpgroup_split", SUMS), 90)
    problem = make_problem(where, F32, shape, grid_size, kind=kind, outside=outside)
    assert_close_to_truth(where, problem, operation, n, with_scale=False)
    assert len(backend.ran) >= 4


@pytest.mark.parametrize("operation", ["contract_output", "contract_input", "contract_weight"])
@pytest.mark.parametrize(
    ("dtype", "shape", "kind", "outside", "n"),
    [
        # Numbers of outputs to a lane, lanes to a row; rows of 16 and of not 16 bytes; more tiles than a block's warps.
        (F32, (70, 2, 5), "uniform", "zero", 0),
        (BF16, (2100, 3, 1), "uneven", "linear", 1),
        (F32, (37, 4, 20), "repeated", "clamp", 0),
        (F16, (70, 8, 8), "uniform", "zero", 0),
    ],
)
def test_narrow(place, operation, dtype, shape, kind, outside, n):
    # A warp computes rows beyond the last of whatever lies there, and writes none of them.
    where, backend = place("narrow", (operation.replace("contract", "narrow"),), multiprocessors=1, strict=False)
    problem = make_problem(where, dtype, shape, kind=kind, outside=outside, x_dtype=F32)
    assert_close_to_truth(where, problem, operation, n, with_scale=n == 1)
    assert len(backend.ran) == (2 if operation == "contract_weight" else 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "source"), [("dense", "wide_output_tf32x3"), ("narrow", "narrow_output")])
def test_activations(place, kernel, source, activation):
    where, _ = place(kernel, ("polynomials", source), strict=kernel != "narrow")
    for n in (0, 1):
        problem = make_problem(where, F32, (40, 3, 8), activation=activation)
        problem.x[:8] *= 30  # where exponentials end
        assert_close_to_truth(where, problem, "contract_output", n)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, torch.float64, BF16])
@pytest.mark.parametrize("operation", ["contract_output", "contract_input", "contract_weight"])
def test_every_order_and_dtype(place, operation, dtype):
    where, backend = place("any", (operation,))
    for k, n in ((5, 2), (3, 0)):
        problem = make_problem(where, dtype, (40, 3, 5), k=k, kind="uneven", activation="gelu", outside="linear")
        assert_close_to_truth(where, problem, operation, n, with_scale=n == 2)
    assert len(backend.ran) == 2


@pytest.mark.parametrize("operation", ["contract_output", "contract_input", "contract_weight"])
def test_a_small_layer_is_one_launch(place, operation):
    # Not strictly: what is known of an input is read 16 bytes at a time, four bytes of padding included.
    where, backend = place("", (operation,), 90, strict=False)
    problem = make_problem(where, F32, (40, 20, 33))
    assert_close_to_truth(where, problem, operation, 0, with_scale=False)
    (kernel,) = backend.ran
    assert f"{operation.removeprefix('contract_')}_any" in kernel


@pytest.mark.parametrize("kernel", ["narrow", "dense", "sparse"])
def test_nan_stays_in_its_row(place, kernel):
    source = "narrow_output" if kernel == "narrow" else "wide_output_bfloat16"
    where, backend = place(kernel, ("polynomials", source), strict=kernel != "narrow")
    problem = make_problem(where, BF16, (40, 5, 8), outside="clamp")
    problem.x[7, 3], problem.x[4, 1] = 1e30, torch.nan
    y = backend.contract_output(*problem.args("contract_output", 0, False))
    assert torch.equal(y.isnan().any(1).nonzero(), torch.tensor([[4]]))
    assert y[4].isnan().all()


def use_plainly(place, kernel, source, **options):
    """A result of one of the kernels, which must be right and come without a fault."""
    inputs = 8 if kernel == "narrow" else 130 if kernel == "wgmma" else 20
    architecture = 90 if kernel.startswith("wgmma") else 80
    where, _ = place(kernel, ("polynomials", source, SUMS), architecture, strict=kernel != "narrow", **options)
    problem = make_problem(where, F32 if "tf32" in source else BF16, (40, inputs, 24), x_dtype=F32)
    operation = "contract_weight" if "backward" in source else "contract_output"
    assert_wide_close(where, problem, operation, 0, "highest", with_scale=False)


# What the PTX must not survive: kernel, source, pattern, replacement, and what the interpreter says.
FAULTS = {
    "barriers": ("dense", "wide_output_bfloat16", r"bar\.sync\s+0;", "", "race|nobody wrote"),
    "copies": ("sparse", "wide_output_bfloat16", r"cp\.async\.wait_group \d+;", "", "nobody wrote|under way"),
    "meeting": ("wgmma", "warpgroup_output_bfloat16", r"bar\.sync (%r\d+, %r\d+);", r"bar.arrive \1;", "race|barrier"),
    "nobody comes": ("wgmma", "warpgroup_output_bfloat16", r"bar\.arrive [^;]*;", "", "part of a block waits"),
    "proxies": ("wgmma", "warpgroup_output_bfloat16", r"fence\.proxy\.async[^;]*;", "", "without fence"),
    "products": ("wgmma", "warpgroup_output_bfloat16", r"wgmma\.wait_group\.sync\.aligned 2;", "", "product under way"),
    "tables": ("narrow", "narrow_output", r"bar\.sync\s+0;", "", "race"),
    "tiles": ("wgmma", "warpgroup_backward_bfloat16", r"bar\.sync (%r\d+, %r\d+);", "", "race|nobody wrote|since the last"),
}


@pytest.mark.parametrize(("kernel", "source"), sorted({fault[:2] for fault in FAULTS.values()}))
def test_without_faults_they_are_right(place, kernel, source):
    use_plainly(place, kernel, source)


@pytest.mark.parametrize("bug", FAULTS)
def test_planted_faults_are_found(place, bug):
    kernel, source, pattern, replacement, said = FAULTS[bug]

    assert re.search(pattern, compile_to_ptx(source))
    with pytest.raises(Fault, match=said):
        use_plainly(place, kernel, source, edit=lambda ptx: re.sub(pattern, replacement, ptx))


def test_whole_networks(library):
    gpu = Interpreted(library, ("network",), multiprocessors=1)
    for widths, batch in (([2, 5, 1], 300), ([3, 4, 2, 3], 40)):
        model = make(widths, F32, kind="uneven", outside="linear", bias=True)
        compare(gpu, model, *inputs(batch, [widths[0], widths[-1]], F32))


# Instructions misspelled: kernel, source that has them, file, pattern, replacement.
INSTRUCTIONS, GROUPS = "cuda/instructions.cuh", "cuda/warpgroup.cuh"
MISSPELLED = {
    "halves": ("dense", "wide_output_bfloat16", INSTRUCTIONS, r"bf16x2\.f32 %0, %1, %2;", "bf16x2.f32 %0, %2, %1;"),
    "transposed": ("dense", "wide_output_bfloat16", INSTRUCTIONS, r"x4\.trans\.shared", "x4.shared"),
    "columns": ("dense", "wide_output_tf32x3", INSTRUCTIONS, r"\{%8, %9\}, \{%0", "{%9, %8}, {%0"),
    "halves of the depth": ("sparse", "wide_output_bfloat16", INSTRUCTIONS, r"\{%8, %9, %10, %11\}", "{%10, %11, %8, %9}"),
    "proxy": ("wgmma", "warpgroup_output_bfloat16", GROUPS, r"async\.shared::cta", "async.global"),
    "lines": ("wgmma", "warpgroup_output_bfloat16", GROUPS, r'kept, 1, 1, " a2 ", " a3', 'kept, 1, 1, " a3 ", " a2'),
    "lines of the right": ("wgmma", "warpgroup_backward_bfloat16", GROUPS, r'b ", kept, 1, 1, " e ";', 'b ", kept, 1, 1, 0;'),
}


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug not in ("halves", "lines"))) for bug in MISSPELLED]
)
def test_misspelled_instructions_are_found(place, bug):
    kernel, source, *change = MISSPELLED[bug]
    compile_to_ptx(source, [tuple(change)])
    with pytest.raises((AssertionError, Fault)):
        use_plainly(place, kernel, source, changes=[tuple(change)])


def test_emulation_cannot_find_them():
    """It compiles the same text, misspelled or not."""

    def preprocessed(source, changes):
        csrc = emulation.sources(changes)
        given = ["-E", "-P", f"-I{csrc}", "-include", emulation.HERE / "emulation.h", "-x", "c++", csrc / f"cuda/{source}.cu"]
        command = [emulation.compiler(), *emulation.FLAGS, *given]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for source in {source for _, source, *_ in MISSPELLED.values()}:
        changes = [tuple(change) for _, own, *change in MISSPELLED.values() if own == source]
        assert preprocessed(source, changes) == preprocessed(source, ())
