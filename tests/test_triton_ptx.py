"""The PTX that Triton makes of the kernels for sm_80 and sm_90, run by the interpreter in tests/ptx.

What the kernels' own interpreter cannot see: accesses out of bounds, races and missing fences in shared memory, the layouts
of tensor-core operands, what the compiler did to float32 products. Small layers: 4 to 12 blocks each.
"""

import os
import random
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted in this process cannot be compiled", allow_module_level=True)

import triton

from benchmarks.offline import compile_launch
from kan_fast.backends import reference
from kan_fast.backends.triton import launch, tiles
from kan_fast.spline import uniform_grid
from tests.ptx.block import run
from tests.ptx.memory import GLOBAL, Fault, GlobalMemory
from tests.ptx.program import parse

BF16, F32 = torch.bfloat16, torch.float32
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
# Relative to the largest result: float32 sums of some 50 terms; two operands of 16 bits; one operand and result of 8 bits.
ALLOWED = {"highest": 2e-6, "high": 2**-14, BF16: 2**-7}

CASES = [
    # kernel, architecture, dtype, precision, size, modes
    ("contract_output", 80, F32, "highest", (40, 3, 5), {}),
    ("contract_output", 80, F32, "highest", (40, 5, 33), {"outside": "linear", "free": True, "activation": "gelu"}),
    ("contract_output", 90, BF16, "highest", (130, 5, 130), {}),
    ("contract_output", 90, BF16, "highest", (130, 24, 70), {"n": 1, "activation": "none"}),
    ("contract_output", 90, BF16, "highest", (40, 19, 40), {"grid_size": 9, "outside": "linear"}),
    ("contract_output", 90, BF16, "highest", (40, 19, 40), {"free": True}),
    ("contract_weight", 90, BF16, "highest", (40, 8, 33), {"order": 4, "n": 1, "outside": "clamp", "x_dtype": BF16}),
    ("contract_output", 90, F32, "highest", (70, 5, 130), {"scaled": True, "n": 1}),
    ("contract_output", 90, F32, "high", (130, 5, 70), {"grid_size": 10}),
    ("contract_input", 80, F32, "highest", (40, 3, 5), {"n": 1, "free": True}),
    ("contract_input", 80, BF16, "highest", (40, 9, 33), {"outside": "clamp"}),
    ("contract_input", 90, BF16, "highest", (130, 9, 70), {"n": 1}),
    ("contract_input", 90, F32, "highest", (70, 9, 70), {"activation": "none"}),
    ("contract_input", 90, F32, "high", (70, 9, 40), {"n": 1}),
    ("contract_output", 90, BF16, "highest", (600, 3, 5), {"free": True, "scaled": True}),
    ("contract_output", 90, F32, "highest", (600, 2, 9), {"grid_size": 9, "outside": "clamp"}),
    ("contract_input", 90, F32, "highest", (600, 2, 5), {"n": 1, "outside": "linear"}),
    ("contract_weight", 80, F32, "highest", (600, 2, 5), {}),
    ("contract_weight", 90, F32, "highest", (300, 2, 13), {"grid_size": 9, "free": True}),
    ("contract_weight", 90, BF16, "highest", (300, 3, 8), {"scaled": True, "n": 1}),
    ("contract_weight", 80, BF16, "highest", (70, 9, 33), {"free": True}),
    ("contract_weight", 90, BF16, "highest", (130, 17, 130), {"scaled": True}),
    ("contract_weight", 90, F32, "highest", (130, 9, 70), {"free": True}),
    ("contract_weight", 90, F32, "high", (130, 9, 70), {"outside": "clamp"}),
]


def runtime(step):
    """(name, value) of the arguments that the compiled kernel takes."""
    for parameter in step.kernel.params:
        value = step.arguments[parameter.name]
        if not (parameter.is_constexpr or (isinstance(value, int) and value == 1)):
            yield parameter.name, value


def as_arrays(step):
    """The arguments that the compiled kernel takes, tensors as arrays on the same memory."""
    for _, value in runtime(step):
        if isinstance(value, torch.Tensor):
            value = value.view(torch.uint16).numpy() if value.dtype == BF16 else value.numpy()
        yield value


def results(
    kernel, arch, dtype, precision, size, *,
    grid_size=5, order=3, outside="zero", activation="silu", n=0, free=False, scaled=False, x_dtype=F32,
    change=lambda ptx: ptx,
):  # fmt: skip
    """What a kernel's PTX computes, and the float64 reference: two tuples of tensors."""
    torch.manual_seed(0)
    (batch, inputs, outputs), features = size, grid_size + order
    x, grid = (2.6 * torch.rand(batch, inputs) - 1.3).to(x_dtype), uniform_grid(inputs, grid_size, order, (-1.0, 1.0))
    if free:
        grid = (grid + (torch.rand_like(grid) - 0.5) / grid_size).sort(1).values
    scale = torch.randn(batch, inputs).to(x_dtype) if scaled else None
    spline, g = torch.randn(inputs, features, outputs).to(dtype), torch.randn(batch, outputs).to(dtype)
    base = torch.randn(inputs, outputs).to(dtype) if activation != "none" else None
    modes = activation, outside, n
    target = tiles.Target("cuda", arch, 2)
    problem = launch.Problem(batch, inputs, features, outputs, order, *modes, dtype, target)
    x64, s64, w64, b64, g64, t64 = (None if t is None else t.double() for t in (x, scale, spline, base, g, grid))
    torch.set_float32_matmul_precision(precision)
    try:
        if kernel == "contract_output":
            out = (torch.full((batch, outputs), torch.nan, dtype=dtype),)
            steps = launch.plan_contract_output(x, scale, spline, base, grid, *out, problem)
            truth = (reference.contract_output(x64, s64, w64, b64, t64, *modes),)
        elif kernel == "contract_input":
            out = (torch.full((batch, inputs), torch.nan, dtype=x_dtype),)
            steps = launch.plan_contract_input(x, spline, base, g, grid, *out, problem)
            truth = (reference.contract_input(x64, w64, b64, g64, t64, *modes),)
        else:
            d_base = torch.full((inputs if base is not None else 0, outputs), torch.nan, dtype=dtype)
            out = (torch.full_like(spline, torch.nan), d_base)
            steps = launch.plan_contract_weight(x, scale, g, grid, *out, problem)
            truth = reference.contract_weight(x64, s64, g64, t64, order, *modes)
    finally:
        torch.set_float32_matmul_precision("highest")
    for step in steps:
        made = compile_launch(step, step.kernel.__name__, arch)
        ptx = change(made.ptx) if step.kernel.__name__.startswith(kernel) else made.ptx
        run(parse(ptx), step.programs, 32 * made.warps, made.shared, list(as_arrays(step)))
    return out, truth


@pytest.mark.parametrize(("kernel", "arch", "dtype", "precision", "size", "modes"), CASES)
def test_what_the_compiler_made_is_right(kernel, arch, dtype, precision, size, modes):
    for got, expected in zip(*results(kernel, arch, dtype, precision, size, **modes), strict=True):
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        assert error <= ALLOWED[BF16 if dtype == BF16 else precision]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_layers_drawn_by_lot(seed):
    draw = random.Random(seed)
    kernel = draw.choice(["contract_output", "contract_input", "contract_weight"])
    # Behind cp.async triton before 3.9 leaves out the fence that PTX asks for before wgmma.
    arch = 80 if OLD else draw.choice([80, 90])
    dtype, precision = draw.choice([(BF16, "highest"), (F32, "highest"), (F32, "high")])
    size = draw.choice([17, 40, 130]), draw.choice([1, 3, 8, 16, 19]), draw.choice([1, 5, 9, 16, 17, 33, 40, 64, 130])
    order = draw.choice([0, 1, 2, 3, 3, 3, 4, 5])
    modes = {
        "grid_size": draw.choice([1, 3, 5, 6, 9, 20]), "order": order, "n": draw.randint(0, min(2, order)),
        "outside": draw.choice(["zero", "linear", "clamp"]), "activation": draw.choice(["silu", "none", "gelu"]),
        "free": draw.random() < 0.5, "scaled": kernel != "contract_input" and draw.random() < 0.3,
        "x_dtype": draw.choice([F32, dtype]),
    }  # fmt: skip
    # On uneven knots, and for derivatives, single features are larger than sums of them.
    allowed = 2 * ALLOWED[BF16 if dtype == BF16 else precision]
    for got, expected in zip(*results(kernel, arch, dtype, precision, size, **modes), strict=True):
        error, largest = ((value.abs().max().item() if value.numel() else 0.0) for value in (got.double() - expected, expected))
        assert error <= allowed * largest


@pytest.mark.parametrize(
    ("removed", "found"),
    [
        (r"bar\.sync \t0;", r"race|nobody wrote|since the last barrier|still under way"),
        (r"cp\.async\.wait_group[^;]*;", r"nobody wrote|still under way"),
        (r"fence\.proxy\.async[^;]*;", r"without fence"),
    ],
)
def test_planted_faults_are_found(removed, found):
    def change(ptx):
        assert re.search(removed, ptx)
        return re.sub(removed, "", ptx)

    with pytest.raises(Fault, match=found):
        results("contract_weight", 90, BF16, "highest", (130, 9, 70), change=change)


def test_an_access_out_of_bounds_is_found():
    # A launch that believes in 40 rows, and has room for 39.
    x, spline, base = torch.rand(40, 3), torch.randn(3, 8, 5), torch.randn(3, 5)
    problem = launch.Problem(40, 3, 8, 5, 3, "silu", "zero", 0, F32, tiles.Target("cuda", 80, 2))
    grid, short = uniform_grid(3, 5, 3, (-1.0, 1.0)), torch.empty(39, 5)
    (step,) = launch.plan_contract_output(x, None, spline, base, grid, short, problem)
    made = compile_launch(step, "short", 80)
    with pytest.raises(Fault, match="beyond buffer"):
        run(parse(made.ptx), step.programs, 32 * made.warps, made.shared, list(as_arrays(step)))


@pytest.mark.parametrize("kernel", ["contract_output", "contract_input"])
def test_weights_of_more_numbers_than_32_bits_count(kernel):
    # The last block of a layer of 2^32 weights, of which those alone exist that the block may touch.
    many, few, features, modes = 2**28, 2, 8, ("silu", "zero", 0)
    inputs, outputs = (few, many) if kernel == "contract_output" else (many, few)
    sizes = {
        "x": (1, inputs), "spline_weight": (inputs, features, outputs), "base_weight": (inputs, outputs), "g": (1, outputs),
        "all_knots": (inputs, features + 4), "y": (1, outputs), "dx": (1, inputs), "uniform": (1,),
        "middles": (inputs,), "scales": (inputs,),
    }  # fmt: skip
    x, spline, base, g, grid, y, dx, *_ = (torch.empty(size, device="meta") for size in sizes.values())
    problem = launch.Problem(1, inputs, features, outputs, 3, *modes, F32, tiles.Target("cuda", 80, 2))
    if kernel == "contract_output":
        steps = launch.plan_contract_output(x, None, spline, base, grid, y, problem)
        i0, o0 = 0, many - steps[-1].arguments["COLUMNS"]
    else:
        steps = launch.plan_contract_input(x, spline, base, g, grid, dx, problem)
        i0, o0 = many - steps[-1].arguments["INPUTS"], 0

    memory = GlobalMemory()
    places = {name: GLOBAL + (number << 40) for number, name in enumerate(sizes)}

    def give(name, first, values):
        """Put float32 values into memory, from the number `first` of a tensor on; the same in float64."""
        memory.add(values.numpy(), places[name] + 4 * first)
        return values.double()

    def lines(name, each):
        """Lines of all outputs of a tensor of weights, `each` to an input, from i0 and o0 on."""
        width = outputs - o0
        found = [give(name, line * outputs + o0, torch.randn(width)) for line in range(i0 * each, inputs * each)]
        return torch.stack(found).view(inputs - i0, each, width)

    torch.manual_seed(0)
    some_x = give("x", i0, 2 * torch.rand(inputs - i0) - 1)[None]
    some_grid = give("all_knots", i0 * (features + 4), uniform_grid(inputs - i0, 5, 3, (-1.0, 1.0)))
    weights = lines("spline_weight", features), lines("base_weight", 1)[:, 0]
    for name in ("uniform", "middles", "scales"):
        give(name, 0, torch.zeros(few))
    if kernel == "contract_output":
        result, truth = "y", reference.contract_output(some_x, None, *weights, some_grid, *modes)
    else:
        some_g = give("g", 0, torch.randn(few))[None]
        result, truth = "dx", reference.contract_input(some_x, *weights, some_g, some_grid, *modes)
    got = torch.full((truth.shape[1],), torch.nan)
    give(result, i0 + o0, got)
    for step in steps:
        made = compile_launch(step, step.kernel.__name__, 80)
        arguments = [
            places.get(name, places["x"]) if isinstance(value, torch.Tensor) else value  # x stands in the place of no scale
            for name, value in runtime(step)
        ]
        last = [step.programs[0] - 1]
        run(parse(made.ptx), step.programs, 32 * made.warps, made.shared, arguments, memory, only=last)
    assert (got.double() - truth[0]).abs().max() <= ALLOWED["highest"] * truth.abs().max()
