"""The Triton kernels at work, run by test_triton.py in a process of its own: in the interpreter, or on a GPU.

TRITON_INTERPRET=1 says interpreted, on CPU tensors; else the tensors live on a CUDA device. Truth is the float64 reference,
itself held against SciPy elsewhere; one test here asks SciPy directly. Tolerances: see `check`. Memory that torch.empty
gives is filled with NaN, so a number that no kernel wrote shows.
"""

import itertools
import random

import numpy as np
import pytest
import scipy.interpolate
import torch
import triton

import kan_fast.backends.triton as backend
from kan_fast import KANLayer, backends
from kan_fast.activations import ACTIVATIONS
from kan_fast.activations import activation as activation_function
from kan_fast.backends import available_backends, reference
from kan_fast.backends.triton import launch, tiles
from kan_fast.spline import OUTSIDE, bases, uniform_grid

INTERPRETED = backend.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter, or the tiles it is given")
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
WIDE = (40, 5, 33)  # batch, inputs, outputs: no multiple of a tile, more than one tile of each
NARROW = (40, 3, 5)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


class Case:
    """Tensors of one problem; knots="uniform", "free", "mixed" (uniform and free inputs) or "repeated"."""

    def __init__(self, size=WIDE, grid_size=5, order=3, activation="silu", outside="zero", n=0, knots="uniform",
                 scaled=False, dtype=torch.float32, x_dtype=None, spread=1.3):  # fmt: skip
        batch, inputs, outputs = size
        x_dtype = x_dtype or dtype
        self.order, self.modes, self.dtype = order, (activation, outside, n), dtype
        self.x = ((2 * torch.rand(batch, inputs) - 1) * spread).to(x_dtype)
        self.scale = torch.randn(batch, inputs).to(x_dtype) if scaled else None
        self.spline = torch.randn(inputs, grid_size + order, outputs).to(dtype)
        self.base = torch.randn(inputs, outputs).to(dtype) if activation != "none" else None
        self.g = torch.randn(batch, outputs).to(dtype)
        self.grid = uniform_grid(inputs, grid_size, order, (-1.0, 1.0), dtype=torch.promote_types(x_dtype, torch.float32))
        free = (self.grid + (torch.rand(self.grid.shape) - 0.5) / grid_size).sort(1).values.to(self.grid.dtype)
        if knots == "free":
            self.grid = free
        elif knots == "mixed":
            self.grid[::2] = free[::2]
        elif knots == "repeated":
            self.grid[:, order + 1] = self.grid[:, order + 2]
            self.grid[:, -order - 1 :] = self.grid[:, -order - 1, None]

    def cast(self, dtype):
        """The same numbers in another dtype."""
        twin = object.__new__(Case)
        twin.order, twin.modes, twin.dtype = self.order, self.modes, dtype
        for name in ("x", "scale", "spline", "base", "g", "grid"):
            value = getattr(self, name)
            setattr(twin, name, None if value is None else value.to(dtype))
        return twin

    def results(self, module):
        """Output, dx, d_spline, d_base of a backend."""
        y = module.contract_output(self.x, self.scale, self.spline, self.base, self.grid, *self.modes)
        dx = module.contract_input(self.x, self.spline, self.base, self.g, self.grid, *self.modes)
        return y, dx, *module.contract_weight(self.x, self.scale, self.g, self.grid, self.order, *self.modes)

    def magnitudes(self, n):
        """The results in float64 with the absolute value of every factor: what rounding errors are proportional to."""
        activation, outside, _ = self.modes
        spline = bases(self.x, self.grid, self.order, outside, n).abs()
        base = activation_function(activation, self.x, n).abs() if self.base is not None else None
        w, g = self.spline.abs(), self.g.abs()
        scale = torch.ones_like(self.x) if self.scale is None else self.scale.abs()
        y = torch.einsum("bi,bif,ifo->bo", scale, spline, w)
        dx = torch.einsum("bif,ifo,bo->bi", spline, w, g)
        d_spline = torch.einsum("bi,bif,bo->ifo", scale, spline, g)
        if base is None:
            return y, dx, d_spline, g.new_empty(0, g.shape[1])
        w = self.base.abs()
        y, dx = y + (scale * base) @ w, dx + base * (g @ w.t())
        return y, dx, d_spline, (scale * base).t() @ g


def check(case, precision="highest"):
    """Compare all contractions with the float64 reference; returns what the backend gave.

    Allowed, per number: twice the largest error of the reference in the same dtypes, and what the knots cost, 4 eps
    max|t| times the result of order n + 1 (the local coordinate comes from a rounded difference). Where operands are
    rounded for the tensor cores, besides: one rounding of every feature to 16 bits, or of both factors to two bfloat16 numbers
    (2^-17 each, as much again for the product of the smaller ones), of the sum
    of absolute products; and the rounding of the result to its dtype.
    """
    truth = case.cast(torch.float64)
    exact, got, same = truth.results(reference), case.results(backend), case.results(reference)
    size, slope = truth.magnitudes(case.modes[2]), truth.magnitudes(case.modes[2] + 1)
    work = torch.float64 if case.dtype == torch.float64 else torch.float32
    knots = 4 * 2 * ROUNDOFF[work] * truth.grid.abs().max()
    products = ROUNDOFF[case.dtype] if case.dtype in (torch.bfloat16, torch.float16) else 3 * 2.0**-17 * (precision == "high")
    for name, e, g, s, m, d in zip(("y", "dx", "d_spline", "d_base"), exact, got, same, size, slope, strict=True):
        assert g.shape == e.shape, name
        assert g.dtype == s.dtype, name
        if not e.numel():
            continue
        allowed = 2 * (s.double() - e).abs().max() + knots * d + products * m + 2 * ROUNDOFF[g.dtype] * e.abs()
        # A feature of order 16 sums in float32: at least its own rounding errors are allowed.
        allowed = allowed + 2 * ROUNDOFF[work] * m
        worst = ((g.double() - e).abs() / allowed.clamp(min=1e-300)).max().item()
        assert worst <= 1, f"{name}: error {worst:.2f} times what is allowed"
    return got


def is_narrow(size):
    return tiles.is_narrow(*size, launch.target_of(DEVICE)) and tiles.is_narrow_weight(*size[1:])


@interpreted_only
def test_the_sizes_meet_both_kinds_of_kernels():
    assert is_narrow(NARROW) and not is_narrow(WIDE)


@pytest.mark.parametrize("outputs", [1, 7, 8, 13, 16])
def test_narrow_layers_of_every_width(outputs):
    # Rows, outputs and bases that fill their tiles, and that leave some over; more than one slice of the batch.
    inputs = min(3, 128 // outputs)
    rows = min(300, 2000 // outputs)
    assert is_narrow((rows, inputs, outputs))
    check(Case((1, inputs, outputs), 1))
    check(Case((64, inputs, outputs), n=1, scaled=True, knots="mixed", activation="none"))
    check(Case((rows, inputs, outputs), 20, scaled=True))


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("order", range(6))
def test_every_order_and_derivative(order, size):
    for n in range(order + 2) if size == WIDE else {0, 1, order}:
        outside = OUTSIDE[(order + n) % 3]
        knots = ("uniform", "free")[n % 2]
        check(Case(size, order=order, n=n, outside=outside, activation="gelu", scaled=n % 2 == 1, knots=knots))


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, size):
    for n in (0, 1) if size == WIDE else range(6):
        check(Case((20, 2, size[2]), order=1, activation=activation, n=n, spread=4.0))


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("knots", ["uniform", "free", "mixed", "repeated"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_outside_and_knots(outside, knots, size):
    check(Case(size, outside=outside, n=int(size == NARROW), knots=knots, spread=2.5))


@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float64, torch.float64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_every_dtype(dtype, x_dtype, size):
    for n in (0, 1) if size == WIDE else (2,):
        check(Case(size, dtype=dtype, x_dtype=x_dtype, n=n, scaled=n == 1))


def test_fewer_products_are_made_where_allowed():
    exact = Case(WIDE).results(backend)[0]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = check(Case(WIDE), "high")[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("grid_size", [1, 2, 10, 29])
def test_grid_sizes(grid_size):
    check(Case(WIDE, grid_size=grid_size, outside="clamp"))
    check(Case((20, 2, 33), grid_size=grid_size, order=2, knots="free"))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 33), (3, 17, 1), (65, 1, 20), (17, 70, 34), (130, 2, 129)], ids=str)
def test_awkward_sizes(size):
    check(Case(size))


@pytest.mark.parametrize("size", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)], ids=str)
def test_nothing_to_do(size):
    case = Case(size)
    for ours, theirs in zip(case.results(backend), case.results(reference), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_derivatives_above_the_order_are_zero(activation):
    case = Case(WIDE, order=2, n=3, activation=activation)
    check(case)
    assert not case.results(backend)[2].any()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_strides(size):
    """Right; and the same numbers, but compiled: strides make kernels of their own, which may fuse other multiply-adds."""
    case = Case(size, scaled=True)
    expected = case.results(backend)
    case.x = case.x.t().contiguous().t()
    case.scale = torch.stack([case.scale, case.scale], 2)[..., 0]
    case.g = case.g.flip(0).flip(0).t().contiguous().t()
    case.spline = case.spline.transpose(0, 1).contiguous().transpose(0, 1)
    case.grid = torch.cat([case.grid] * 2, 1)[:, : case.grid.shape[1]]
    assert not case.x.is_contiguous() and not case.g.is_contiguous() and not case.spline.is_contiguous()
    got = check(case)
    if INTERPRETED:
        assert all(map(torch.equal, got, expected))
    case.g = torch.ones(1, 1).expand(case.g.shape)
    expanded = check(case)
    if INTERPRETED:
        case.g = case.g.contiguous()
        assert all(map(torch.equal, case.results(backend), expanded))


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_stays_where_it_belongs(activation, n, size):
    case = Case(size, activation=activation, n=n)
    case.x[3, 1] = torch.nan
    y, dx, d_spline, d_base = case.results(backend)
    rows = torch.arange(len(y)) == 3
    assert torch.equal(y.isnan().all(1), rows) and torch.equal(y.isnan().any(1), rows)
    assert torch.equal(dx.isnan(), case.x.isnan())
    inputs = torch.arange(case.x.shape[1]) == 1
    assert torch.equal(d_spline.isnan().flatten(1).any(1), inputs) and torch.equal(d_spline.isnan().flatten(1).all(1), inputs)
    if activation != "none":
        assert torch.equal(d_base.isnan().all(1), inputs) and torch.equal(d_base.isnan().any(1), inputs)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("n", [0, 4])
def test_what_is_not_finite_in_g_reaches_what_it_does_in_the_reference(n, activation, size):
    # n = 4 is above the order: every spline feature is 0, and 0 times NaN or infinity is NaN.
    case = Case(size, activation=activation, n=n)
    case.g[3, 1], case.g[5, 4] = torch.nan, torch.inf
    for ours, theirs in zip(case.results(backend)[1:], case.results(reference)[1:], strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert 0 < theirs.isfinite().sum() < theirs.numel() or not theirs.numel()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_on_the_knots_and_far_away(outside, size):
    # x on a stored knot lies right of it, at the end of the range left of it unless "zero": no rounding is involved, so
    # even the derivative of order k, which jumps there, has to agree.
    kinds = ("uniform", "free") if size == WIDE else ("free", "repeated")
    for n, knots in itertools.product((0, 3), kinds):
        case = Case(size, outside=outside, n=n, knots=knots, activation="identity")
        places = torch.cat([case.grid[0], torch.tensor([-1e30, 1e30, -5.0, 5.0])])
        case.x[: len(places)] = places[:, None]
        if outside == "linear" and n == 0:
            case.x[case.x.abs() > 1e3] = 7.0  # the slope times 1e30 leaves nothing of the other terms
        check(case)


@pytest.mark.parametrize("knots", ["uniform", "free"])
@pytest.mark.parametrize("order", [0, 3])
def test_far_away_where_a_block_of_bases_has_places_for_more(order, knots):
    # 6 or 9 bases in blocks of 8: bases of which the window far away would consist, if there were such.
    for n in {0, order}:
        case = Case(WIDE, grid_size=6, order=order, n=n, knots=knots, activation="none")
        case.x[:4] = torch.tensor([-torch.inf, torch.inf, -1e30, 1e30])[:, None]
        y, dx, *_ = check(case)
        assert not y[:4].any() and not dx[:4].any()


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh"])
def test_activations_far_away(activation):
    """Their limits, infinity included: those of the reference, which tests/test_activations.py proves."""
    for n in range(3):
        case = Case(NARROW, outside="clamp", n=n, activation=activation)
        case.x[:4, 1] = torch.tensor([-torch.inf, torch.inf, -1e30, 1e30])
        # The other rows: a place within its interval is off by 4 eps max|t| / h, as in `check`, here 4 * 2^-23 * 2.2 * 2.5.
        # Products of numbers in parts leave NaN of an infinite one.
        for ours, theirs in zip(case.results(backend), case.results(reference), strict=True):
            finite = theirs.isfinite()
            assert torch.equal(ours.isfinite(), finite)
            largest = theirs[finite].abs().max().item() if finite.any() else 0.0
            torch.testing.assert_close(ours[finite], theirs[finite], rtol=1.3e-6, atol=2.7e-6 * largest)


def test_against_scipy():
    for order in range(6):
        for n in range(order + 1):
            case = Case((40, 1, 33), 4, order, "none", n=n, knots="free", dtype=torch.float64)
            knots = case.grid[0].cpu().numpy()
            case.x.clamp_(knots[order], np.nextafter(knots[-order - 1], -np.inf))
            spline = scipy.interpolate.BSpline(knots, case.spline[0].cpu().numpy(), order, extrapolate=False)
            expected = torch.from_numpy(spline(case.x[:, 0].cpu().numpy(), nu=n)).to(DEVICE)
            got = backend.contract_output(case.x, None, case.spline, None, case.grid, *case.modes)
            # 2k multiplications and differences of knots, n divisions by widths that are at least 1/20 of the range.
            assert (got - expected).abs().max() <= 64 * 2.0**-52 * expected.abs().max().clamp(min=1), (order, n)


@interpreted_only
def test_uniform_is_decided_per_block_from_the_knots(monkeypatch):
    seen = []
    original = launch.Launch.run

    def run(self):
        original(self)
        if self.kernel is launch.describe_knots:
            seen.append(self.arguments["uniform"].tolist())

    monkeypatch.setattr(launch.Launch, "run", run)
    case = Case((5, 2 * tiles.DESCRIBED + 1, 40))
    backend.contract_output(case.x, None, case.spline, case.base, case.grid, *case.modes)
    assert seen == [[1, 1, 1]]
    case.grid[tiles.DESCRIBED + 2, 4] += 1e-5
    backend.contract_output(case.x, None, case.spline, case.base, case.grid, *case.modes)
    assert seen[1] == [1, 0, 1]
    case = Case((5, 2 * tiles.DESCRIBED + 1, 40), dtype=torch.float64)
    backend.contract_output(case.x, None, case.spline, case.base, case.grid.float(), *case.modes)
    # Seen in float64, knots that were rounded to float32 are not equidistant.
    assert seen[2] == [0, 0, 0]


@interpreted_only
def test_sums_over_the_batch_do_not_depend_on_the_order_of_programs(monkeypatch):
    case = Case((300, 3, 40))
    count = len(launch.plan_contract_weight(
        case.x, None, case.g, case.grid, case.spline, case.base,
        backend._problem(case.x, 8, 40, case.grid, *case.modes, torch.float32),
    ))  # fmt: skip
    assert count == 2, "expected partial sums, and a launch that adds them"
    expected = case.results(backend)
    builder = triton.runtime.interpreter.InterpreterBuilder
    place = builder.set_grid_idx
    for seed in range(3):

        def shuffled(self, x, y, z, seed=seed):
            nx, ny, nz = self.grid_dim
            order = list(range(nx * ny * nz))
            random.Random(seed).shuffle(order)
            to = order[(x * ny + y) * nz + z]
            place(self, to // (ny * nz), to // nz % ny, to % nz)

        monkeypatch.setattr(builder, "set_grid_idx", shuffled)
        for ours, theirs in zip(case.results(backend), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("outputs", [2, 34])
def test_through_the_layer(outputs):
    layers = [
        KANLayer(3, outputs, 4, 3, outside="linear", base_activation="tanh", backend=name, dtype=torch.float64)
        for name in ("triton", "reference")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = (2 * torch.rand(2, 5, 3, dtype=torch.float64) - 1).requires_grad_()
    found = []
    for layer in layers:
        y = layer(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        loss = y.sum() + slope.square().sum()
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
        tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))[1]
        found.append([y, slope, *grads, tangent])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    layer = KANLayer(2, 33, 2, 3, outside="clamp", backend="triton", dtype=torch.float64)
    x = (1.8 * torch.rand(3, 2, dtype=torch.float64) - 0.9).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


@interpreted_only
def test_interpreted_it_serves_the_cpu():
    assert backend.reason_not(torch.device("cpu"), torch.float32) is None
    assert "triton" in available_backends("cpu")
    assert "int32" in backends.reason_not("triton", torch.device("cpu"), torch.int32)
    assert "mps" in backend.reason_not(torch.device("mps"), torch.float32)
