"""The spline mathematics in PyTorch against SciPy."""

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from samples import KINDS, every_outside, make_grid
from scipy.interpolate import BSpline

from kan_fast import spline

# SciPy and ours each round a few dozen times: 1e-11 of the largest value is 5e4 eps, for derivatives whose terms cancel
# over up to five differencing steps.
TOLERANCE = 1e-11


def points(grid):
    """(N, I): random in and far beyond the knots, and every knot itself."""
    reach = grid.abs().max() * 1.5
    return torch.cat([(torch.rand(200, grid.shape[0], dtype=torch.float64) * 2 - 1) * reach, grid.t()])


def test_span_of_half_open_intervals():
    grid = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])  # spline_order 1, grid_size 3, range [1, 4]
    x = torch.tensor([[-0.5], [0.0], [0.5], [1.0], [3.999], [4.0], [5.0], [6.0], [torch.nan]])
    assert spline.find_span(x, grid, 1, "zero").flatten().tolist() == [-1, 0, 0, 1, 3, 4, 5, 5, 5]
    inside = torch.tensor([[1.0], [1.5], [3.0], [4.0]])
    assert spline.find_span(inside, grid, 1, "clamp").flatten().tolist() == [1, 1, 3, 3]


def test_span_of_repeated_knots_is_the_last_interval_that_is_not_empty():
    grid = torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0]])  # spline_order 1, grid_size 4, range [1, 2]
    x = torch.tensor([[1.0], [1.5], [2.0]])
    assert spline.find_span(x, grid, 1, "zero").flatten().tolist() == [3, 3, 5]
    assert spline.find_span(x, grid, 1, "linear").flatten().tolist() == [3, 3, 3]


@every_outside
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid_size", [1, 2, 7])
@pytest.mark.parametrize("k", range(6))
def test_bases_of_every_order_against_scipy(k, grid_size, kind, outside):
    grid = make_grid(kind, 2, grid_size, k).double()
    x = points(grid)
    for n in range(k + 3):
        got = spline.bases(x, grid, k, outside, n)
        assert got.shape == (len(x), 2, grid_size + k)
        for i in range(2):
            true = truth.bases(x[:, i].numpy(), grid[i].numpy(), k, outside, n)
            assert np.abs(got[:, i].numpy() - true).max() <= TOLERANCE * max(1.0, np.abs(true).max()), n
    assert not got.any()  # the last n is above the spline order


@given(k=st.integers(0, 5), grid_size=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_bases_sum_to_one_on_the_range_and_are_not_negative(k, grid_size, seed):
    torch.manual_seed(seed)
    grid = make_grid("uneven", 3, grid_size, k)
    x = torch.cat([torch.rand(30, 3) * 2 - 1, grid[:, k : k + grid_size].t()])
    values = spline.bases(x, grid, k, "zero", 0)
    # Each of k steps rounds a few times and keeps the sum: 8 (k + 1) eps.
    assert (values.sum(2) - 1).abs().max() <= 8 * (k + 1) * torch.finfo(torch.float32).eps
    assert values.min() >= 0


def test_zero_beyond_the_last_knots_and_nan_where_x_is_nan():
    grid = spline.uniform_grid(1, 5, 3, (-1.0, 1.0))
    x = torch.tensor([[-2.2 - 1e-5], [2.2 + 1e-5], [1e30], [-torch.inf], [torch.inf]])
    for n in range(5):
        assert not spline.bases(x, grid, 3, "zero", n).any()
        for outside in spline.OUTSIDE:
            assert spline.bases(torch.tensor([[torch.nan]]), grid, 3, outside, n).isnan().all()


def test_outside_modes_at_the_edges_of_the_range():
    grid = spline.uniform_grid(1, 4, 3, (0.0, 1.0), dtype=torch.float64)
    weight = torch.randn(7, dtype=torch.float64)
    curve = BSpline(grid[0].numpy(), weight.numpy(), 3)

    def value(x, outside, n):
        return float(spline.evaluate(torch.tensor([[x]], dtype=torch.float64), weight[None], grid, 3, outside, n))

    for edge, beyond in ((0.0, -0.7), (1.0, 1.9)):
        for n in range(4):
            # At the edge itself: the derivative from inside.
            assert value(edge, "clamp", n) == pytest.approx(curve(edge, nu=n), rel=1e-12)
            assert value(edge, "linear", n) == pytest.approx(curve(edge, nu=n), rel=1e-12)
        assert value(beyond, "clamp", 0) == pytest.approx(curve(edge), rel=1e-12)
        assert value(beyond, "clamp", 1) == 0
        extended = curve(edge) + curve(edge, nu=1) * (beyond - edge)
        assert value(beyond, "linear", 0) == pytest.approx(extended, rel=1e-12)
        assert value(beyond, "linear", 1) == pytest.approx(curve(edge, nu=1), rel=1e-12)
        assert value(beyond, "linear", 2) == 0


def test_evaluate_is_differentiable():
    grid = make_grid("uneven", 2, 5, 3).double()
    x = (torch.rand(7, 2, dtype=torch.float64) * 2 - 1).requires_grad_()
    weight = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    for outside in spline.OUTSIDE:
        assert torch.autograd.gradcheck(lambda x, w, o=outside: spline.evaluate(x * 1.3, w, grid, 3, o), (x, weight))


@given(grid_size=st.integers(1, 200), k=st.integers(0, 5), a=st.floats(-100, 100), width=st.floats(1e-3, 100))
def test_uniform_grid(grid_size, k, a, width):
    b = a + width
    grid = spline.uniform_grid(2, grid_size, k, (a, b), dtype=torch.float64)
    assert grid.shape == (2, grid_size + 2 * k + 1)
    assert torch.equal(grid[0], grid[1])
    assert grid[0, k] == a
    assert grid[0, k + grid_size] == b
    # Every knot is rounded a few times at its own size.
    steps = grid.diff(dim=1) - width / grid_size
    assert steps.abs().max() <= 8 * torch.finfo(torch.float64).eps * grid.abs().max()
    spline.check_grid(grid, 2, k)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.float16), TypeError, "float32 or float64 knots, got torch.float16"),
        (torch.arange(9.0), ValueError, r"\(2, 8 or more\) with spline_order = 3, got \(9,\)"),
        (torch.arange(9.0).repeat(3, 1), ValueError, r"got \(3, 9\)"),
        (torch.arange(7.0).repeat(2, 1), ValueError, r"got \(2, 7\)"),
        (torch.tensor([0.0, 1, 2, 3, 5, 4, 6, 7, 8]).repeat(2, 1), ValueError, "got 5 followed by 4 for input 0"),
        (torch.tensor([0.0, 1, 2, 3, torch.nan, 5, 6, 7, 8]).repeat(2, 1), ValueError, "finite knots"),
        (torch.tensor([0.0, 1, 2, 3, 3, 3, 6, 7, 8]).repeat(2, 1), ValueError, r"increasing range, got \[3, 3\]"),
    ],
)
def test_check_grid_names_what_is_wrong(grid, error, message):
    with pytest.raises(error, match=r"^grid: expected .*" + message):
        spline.check_grid(grid, 2, 3)
