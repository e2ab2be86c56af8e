"""Every backend, one parametrisation: results, dtypes, shapes, strides, odd values. The native one is why it is named so."""

import math
import os

import pytest
import torch
from conftest import Place, parameters, places
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    KINDS,
    OPERATIONS,
    assert_close_to_truth,
    every_activation,
    every_outside,
    make_problem,
    off_knots,
)

from kan_fast import KANLayer
from kan_fast.backends import choose, get, native, reference
from kan_fast.spline import OUTSIDE, uniform_grid

every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def results(backend, operation, args):
    value = getattr(get(backend), operation)(*args)
    return value if isinstance(value, tuple) else (value,)


def test_native_is_there_where_it_must_be():
    """Its tests must not vanish unseen where the extension was built."""
    cpu = torch.device("cpu")
    if os.environ.get("KAN_FAST_REQUIRE_NATIVE") == "1":
        assert native.reason_not(cpu, torch.float32) is None
        assert choose("auto", cpu, torch.float32) == "native"
    elif native.reason_not(cpu, torch.float32) is not None:
        assert choose("auto", cpu, torch.float32) == "reference"


@every_operation
@every_outside
@every_activation
@pytest.mark.usefixtures("poisoned_memory")
def test_activations_and_outside_modes(place, operation, activation, outside):
    for k, n in ((3, 0), (3, 1), (2, 2), (1, 0), (4, 3)):
        problem = make_problem(place, torch.float32, (37, 5, 6), k=k, activation=activation, outside=outside)
        assert_close_to_truth(place, problem, operation, n, with_scale=n % 2 == 1)


@every_operation
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(6))
@pytest.mark.usefixtures("poisoned_memory")
def test_orders_of_spline_and_derivative(place, operation, k, kind):
    # Triton compiles a kernel for each of these, seconds apiece: every other one will do.
    every_other = place.backend == "triton"
    for grid_size in (1, 4):
        for n in range(grid_size % 2, 7, 2) if every_other else range(7):
            outside = OUTSIDE[(n + k) % 3]
            problem = make_problem(place, torch.float32, (29, 3, 5), grid_size, k, kind, "silu", outside)
            assert_close_to_truth(place, problem, operation, n)


@every_operation
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_float64(place64, operation, kind):
    for k, n in ((3, 0), (3, 2), (5, 1), (2, 5)):
        problem = make_problem(place64, torch.float64, (23, 4, 9), k=k, kind=kind, outside=OUTSIDE[n % 3])
        assert_close_to_truth(place64, problem, operation, n)


@every_operation
@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_narrow_dtypes(place, operation, dtype, x_dtype):
    for n in (0, 1):
        for shape in ((40, 20, 33), (40, 3, 2)):
            problem = make_problem(place, dtype, shape, kind="uneven", x_dtype=x_dtype)
            assert_close_to_truth(place, problem, operation, n, with_scale=n == 0)


@pytest.mark.parametrize(
    "shape",
    [
        *((0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0), (1, 1, 1)),
        *((2, 1, 16), (257, 2, 8), (130, 33, 17), (300, 20, 64), (9, 40, 65), (70, 17, 130), (1000, 1, 1)),
        *((1, 20, 15), (3, 17, 7), (7, 300, 3), (8, 40, 10)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_memory")
def test_shapes(place, shape):
    for operation in OPERATIONS:
        for kind, outside, with_scale in (("uniform", "zero", False), ("uneven", "linear", True)):
            problem = make_problem(place, torch.float32, shape, kind=kind, outside=outside)
            assert_close_to_truth(place, problem, operation, 0, with_scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_one_row_and_two(k, kind, dtype):
    """They have a kernel of their own on the CPU: whole tiles of outputs, overlapping ones, several blocks of inputs."""
    for place in [p for p in places(dtype) if p.device.type == "cpu"]:
        for rows, in_features, out_features in ((1, 33, 16), (2, 70, 150), (1, 5, 47), (2, 32, 257)):
            for outside, with_scale in (("zero", False), ("clamp", True), ("linear", True), ("linear", False)):
                shape = rows, in_features, out_features
                problem = make_problem(place, dtype, shape, k=k, kind=kind, outside=outside)
                problem.x[0, 0] = float(problem.grid[0].max()) + 3
                assert_close_to_truth(place, problem, "contract_output", 0, with_scale)
            problem.x[-1, 4] = torch.nan
            y = get(place.backend).contract_output(*problem.args("contract_output", 0))
            assert y[-1].isnan().all()
            assert rows == 1 or y[:-1].isfinite().all()


@pytest.mark.parametrize("place", parameters(torch.float32))
@given(
    batch=st.integers(0, 300),
    in_features=st.integers(0, 40),
    out_features=st.integers(0, 80),
    grid_size=st.integers(1, 40),
    k=st.integers(0, 5),
    n=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape(place, batch, in_features, out_features, grid_size, k, n, seed):
    torch.manual_seed(seed)
    kind, outside = KINDS[seed % 3], OUTSIDE[seed % 7 % 3]
    problem = make_problem(place, torch.float32, (batch, in_features, out_features), grid_size, k, kind, "silu", outside)
    for operation in OPERATIONS:
        assert_close_to_truth(place, problem, operation, n)


@given(data=st.data())
@pytest.mark.parametrize("place", parameters(torch.float32))
def test_any_value(place, data):
    """Values of any size, as users feed them: the interval and what follows from it must not go astray."""
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = data.draw(st.lists(st.tuples(values, values), min_size=1, max_size=20))
    problem = make_problem(place, torch.float32, (len(rows), 2, 3), activation="tanh", outside="zero")
    x = off_knots(torch.tensor(rows), problem.grid.cpu(), torch.float32).to(place.device)
    for operation in OPERATIONS:
        assert_close_to_truth(place, problem._replace(x=x), operation, 0)


@every_operation
@pytest.mark.usefixtures("poisoned_memory")
def test_strides(place, operation):
    """Transposed, interleaved, shifted and expanded storage."""
    problem = make_problem(place, torch.float32, (50, 6, 10), kind="uneven")

    def transposed(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def every_second(t):
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]

    def not_first(t):
        longer = torch.cat([t[:1], t])
        return longer[1:]

    for change in (transposed, every_second, not_first):
        changed = problem._replace(
            **{name: change(getattr(problem, name)) for name in ("x", "scale", "spline_weight", "base_weight", "g", "grid")}
        )
        for n in (0, 1):
            assert_close_to_truth(place, changed, operation, n)
    # The gradient of y.sum(): one number, expanded.
    expanded = problem._replace(g=torch.ones((), device=place.device).expand(50, 10))
    assert_close_to_truth(place, expanded, operation, 0)


@every_operation
def test_same_bits_on_every_run(place, operation):
    problem = make_problem(place, torch.float32, (700, 30, 40))
    first = results(place.backend, operation, problem.args(operation, 0))
    for _ in range(3):
        again = results(place.backend, operation, problem.args(operation, 0))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


@every_outside
@every_activation
def test_nan_in_x(place, activation, outside):
    """The row is NaN, its gradient at that input is NaN, the weights' gradients are NaN; everything else is untouched.

    Beyond the spline's order (n = 4) its derivative is 0 whatever the weights, and so are their gradients.
    """
    for shape in ((9, 3, 4), (40, 20, 33)):
        for n in (0, 1, 4):
            problem = make_problem(place, torch.float32, shape, activation=activation, outside=outside)
            problem.g.data[0] = 1.0
            clean = {op: results(place.backend, op, problem.args(op, n, False)) for op in OPERATIONS}
            problem.x[4, 1] = torch.nan
            (y,) = results(place.backend, "contract_output", problem.args("contract_output", n, False))
            row = torch.arange(shape[0]) == 4
            assert y[row].isnan().all()
            torch.testing.assert_close(y[~row], clean["contract_output"][0][~row])
            spot = torch.zeros(shape[:2], dtype=torch.bool)
            spot[4, 1] = True
            (dx,) = results(place.backend, "contract_input", problem.args("contract_input", n))
            assert dx[spot].isnan().all()
            torch.testing.assert_close(dx[~spot], clean["contract_input"][0][~spot])
            d_spline, d_base = results(place.backend, "contract_weight", problem.args("contract_weight", n, False))
            assert d_spline[1].isnan().any(0).all() or n > 3
            torch.testing.assert_close(d_spline[0], clean["contract_weight"][0][0])
            if activation != "none":
                assert d_base[1].isnan().all()
                torch.testing.assert_close(d_base[0], clean["contract_weight"][1][0])


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_infinite_and_huge_x(place, activation):
    for shape in ((5, 2, 3), (5, 20, 33)):
        for outside in ("zero", "clamp"):
            problem = make_problem(place, torch.float32, shape, activation=activation, outside=outside)
            problem.x[:] = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 1e20], device=place.device)[:, None]
            for operation in OPERATIONS:
                for n in (0, 1, 2):
                    args = problem.args(operation, n, False)
                    for mine, want in zip(
                        results(place.backend, operation, args), results("reference", operation, args), strict=True
                    ):
                        assert want.isfinite().all()
                        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("k", range(4))
def test_intervals_are_half_open(place, k):
    """On knots that are whole numbers every way of finding the interval is exact, so the rule itself can be asked for:
    the k-th derivative, which jumps at knots, is the one from the right."""
    grid_size = 5
    knots = torch.arange(-k, grid_size + k + 1, dtype=torch.float32)
    problem = make_problem(place, torch.float32, (len(knots), 2, 3), grid_size, k, activation="none")
    problem = problem._replace(grid=knots.to(place.device).repeat(2, 1), x=knots.to(place.device)[:, None].repeat(1, 2))
    for outside in OUTSIDE:
        args = problem._replace(outside=outside).args("contract_output", k, False)
        (mine,) = results(place.backend, "contract_output", args)
        want = reference.contract_output(*args)
        torch.testing.assert_close(mine, want)
        if outside == "zero":
            assert not mine[-1].any()  # from the last knot on: exactly 0
    assert want.any()


CROWDED = {
    "geometric": lambda: torch.logspace(-30, 2, 41, base=2, dtype=torch.float64),
    "a bunch of equal knots": lambda: torch.tensor([0.0, *[1.0] * 30, 5.0, *[7.0] * 3, 8.0]),
    "bunches at the ends": lambda: torch.tensor([*[-1.0] * 6, -0.5, 0.75, *[1.0] * 6]),
    "one interval": lambda: torch.tensor([-3.0, 4.0]),
    "too many for a byte": lambda: torch.linspace(0, 1, 302, dtype=torch.float64) ** 3,
    "too wide to measure": lambda: torch.tensor([-3e38, -1.0, 0.0, 2e38, 3e38]),
    "too narrow to measure": lambda: torch.tensor([0.0, 1e-44, 2e-44, 7e-44]),
}


@pytest.mark.parametrize("knots", CROWDED.values(), ids=CROWDED.keys())
@pytest.mark.parametrize("out_features", [3, 40])
def test_intervals_of_crowded_knots(place, out_features, knots):
    """Of order 0 a value is the coefficient of its interval, to the bit, however unevenly knots lie: at them, beside them,
    between them and beyond. Triton's products of float32 are sums of six, whose order may round: an eps for each of the two
    coefficients, and one for the sum."""
    stored = knots().float()
    between = stored[:-1] + torch.rand(len(stored) - 1) * (stored[1:] / 2 - stored[:-1] / 2)
    inner = torch.cat([stored, between, *(torch.nextafter(stored, torch.tensor(float(end))) for end in ("-inf", "inf"))])
    x = torch.cat([inner, torch.tensor([-torch.inf, torch.inf])])[:, None].repeat(1, 2)
    coefficients = torch.randn(2, len(stored) - 1, out_features)
    args = (value.to(place.device) for value in (x, coefficients, stored.repeat(2, 1)))
    x_there, weight, grid = args
    (mine,) = results(place.backend, "contract_output", (x_there, None, weight, None, grid, "none", "zero", 0))
    interval = torch.searchsorted(stored, x, right=True) - 1
    padded = torch.cat([coefficients, torch.zeros(2, 1, out_features)], 1)  # beyond the last knot, and before the first: -1
    terms = padded[0][interval[:, 0]], padded[1][interval[:, 1]]
    want = terms[0] + terms[1]
    eps = torch.finfo(torch.float32).eps if place.backend == "triton" else 0.0
    assert ((mine.cpu() - want).abs() <= eps * (terms[0].abs() + terms[1].abs() + want.abs())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_at_knots(place, kind):
    """At the knots themselves, where an interval more or less must not matter below order k (k - 1 at a double knot)."""
    for k in (1, 2, 3, 5):
        problem = make_problem(place, torch.float32, (1, 2, 3), k=k, kind=kind, activation="none", outside="linear")
        last = k - 1 if kind != "repeated" else k - 2
        x = problem.grid.t().contiguous()
        problem = problem._replace(x=x, g=torch.randn(len(x), 3, device=place.device), scale=torch.ones_like(x))
        for n in range(last + 1):
            assert_close_to_truth(place, problem, "contract_output", n)


def test_uniform_to_a_few_roundings_is_uniform_and_beyond_is_not(place):
    """Backends may take a closed form on uniform knots; a grid that is nearly so must still be right."""
    for nudge in (0.0, 1e-7, 1e-6, 1e-5, 1e-3, 0.1):
        problem = make_problem(place, torch.float32, (200, 20, 33))
        grid = problem.grid.clone()
        grid[:, 5] += nudge
        grid[7] = 3 * grid[7] + 2  # every input has its own
        x = problem.x.clone()
        x[:, 7] = 3 * x[:, 7] + 2
        x = off_knots(x.cpu(), grid.cpu(), torch.float32).to(place.device)
        for operation in OPERATIONS:
            assert_close_to_truth(place, problem._replace(grid=grid, x=x), operation, 0)


def test_fine_grids(place):
    """Many intervals, far from zero: the local coordinate must come from the stored knots."""
    problem = make_problem(place, torch.float32, (300, 4, 5), grid_size=300)
    far = problem._replace(grid=problem.grid + 100, x=problem.x + 100)
    far = far._replace(x=off_knots(far.x.cpu(), far.grid.cpu(), torch.float32).to(place.device))
    for operation in OPERATIONS:
        assert_close_to_truth(place, problem, operation, 0)
        assert_close_to_truth(place, far, operation, 0)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rows", [2, 40])
def test_small_weights_are_exact(place, rows, k):
    """A basis just behind the knot where it begins: (u / h)^k / k!, however large its coefficient. Its weight must not come
    from 1 - the others, whose roundings are as large."""
    grid = uniform_grid(3, 8, k, (-4.0, 4.0)).to(place.device)  # h is 1
    u, begins_at_0 = 2.0**-9, 4 + k  # the basis whose first knot is 0
    spline_weight = torch.zeros(3, 8 + k, 40, device=place.device)
    spline_weight[1, begins_at_0] = 1000
    x = torch.full((rows, 3), u, device=place.device)
    y = get(place.backend).contract_output(x, None, spline_weight, None, grid, "none", "zero", 0)
    want = 1000 * u**k / math.factorial(k)
    # u is counted from the grid's middle or from its first knot, 4 + k away: rounded to eps (4 + k), k times in the power.
    assert float((y / want - 1).abs().max()) <= 4 * k * (4 + k) * torch.finfo(torch.float32).eps / u


@every_outside
@pytest.mark.parametrize("out_features", [2, 33])
def test_the_largest_grids(outside, out_features):
    """The last of as many intervals as 16 bits can number, and what lies behind it."""
    if Place("native", torch.device("cpu")) not in places(torch.float64):
        pytest.skip("the native code is not built")
    grid_size = 65525 if outside == "zero" else 65531
    layer = KANLayer(1, out_features, grid_size, outside=outside, dtype=torch.float64, backend="native")
    torch.nn.init.normal_(layer.spline_weight)
    x = torch.cat([torch.rand(40, dtype=torch.float64), torch.tensor([-1, -1 + 1e-6, 1 - 1e-6, 1, 1 + 1e-5, 3])])
    x = x[:, None].requires_grad_()
    results = []
    for backend in ("native", "reference"):
        layer.backend = backend
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.spline_weight])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.detach().abs().max()))


@pytest.mark.slow
def test_long_sums(place):
    """Errors of the order of summation show in long sums."""
    for shape in ((4096, 784, 64), (60000, 2, 5), (300, 1024, 256)):
        problem = make_problem(place, torch.float32, shape)
        for operation in OPERATIONS:
            assert_close_to_truth(place, problem, operation, 0, with_scale=False)


def test_place_is_what_it_says():
    assert Place("reference", torch.device("cpu")) in places(torch.float64)


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh"])
def test_nan_of_any_bits(activation):
    # The exponential works on the bits of its argument; the sanitizers see whether it minds those of a NaN.
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC000FF], dtype=torch.int32)
    x = torch.cat([bits, bits.flip(0)]).view(torch.float32)[:, None].expand(-1, 3).contiguous()
    layer = KANLayer(3, 5, base_activation=activation, backend="native")
    assert layer(x).isnan().all()
    for n in (1, 2):
        assert layer.edge(0, 0)(x, derivative=n).isnan().all()
