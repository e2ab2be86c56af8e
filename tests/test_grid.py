import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from kan_fast import KAN, KANLayer
from kan_fast.grid import _refit_matrix, adaptive_grid_refinement, insert_knots, tune_grid_size, update_grid
from kan_fast.spline import bases, evaluate

ORDERS = [0, 1, 2, 3, 5]


def make_grid(generator, inputs, grid_size, order):
    """Increasing knots of uneven spacing."""
    steps = torch.rand(inputs, grid_size + 2 * order + 1, generator=generator, dtype=torch.float64) + 0.1
    return steps.cumsum(1) - 3


def make_finer(generator, grid, order, extra):
    a, b = grid[:, order : order + 1], grid[:, grid.shape[1] - 1 - order : grid.shape[1] - order]
    inner = a + (b - a) * torch.rand(len(grid), extra, generator=generator, dtype=torch.float64)
    return torch.cat([grid, inner], 1).sort(1).values


def padded(knots, coefficients, order):
    """SciPy's spline of the same function on the whole support: it evaluates only between knots k and -k-1."""
    h = np.arange(1, order + 1)
    knots = np.concatenate([knots[0] - h[::-1], knots, knots[-1] + h])
    zeros = np.zeros(order)
    return BSpline(knots, np.concatenate([zeros, coefficients, zeros]), order)


@pytest.mark.parametrize("order", ORDERS)
def test_inserted_coefficients_are_scipys(order):
    generator = torch.Generator().manual_seed(order)
    grid = make_grid(generator, 3, 6, order)
    new = make_finer(generator, grid, order, 9)
    weight = torch.randn(3, 6 + order, 2, generator=generator, dtype=torch.float64)
    result = insert_knots(weight, grid, new)
    assert result.shape == (3, 15 + order, 2)
    if order == 0:  # SciPy's insert_knot wants k >= 1: compare values below
        return
    for i in range(3):
        for o in range(2):
            spline = padded(grid[i].numpy(), weight[i, :, o].numpy(), order)
            for knot in set(new[i].tolist()) - set(grid[i].tolist()):
                spline = spline.insert_knot(knot)
            expected = spline.c[order : order + 15 + order]
            # Convex combinations, order of them in a row, each with an error of a few eps.
            np.testing.assert_allclose(result[i, :, o], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("outside", ["zero", "linear", "clamp"])
@pytest.mark.parametrize("order", ORDERS)
def test_insertion_keeps_the_function_everywhere(order, outside):
    generator = torch.Generator().manual_seed(10 + order)
    grid = make_grid(generator, 4, 5, order)
    new = make_finer(generator, grid, order, 20)
    weight = torch.randn(4, 5 + order, 1, generator=generator, dtype=torch.float64)
    finer = insert_knots(weight, grid, new)
    low, high = grid[:, 0] - 1, grid[:, -1] + 1
    x = low + (high - low) * torch.rand(4000, 4, generator=generator, dtype=torch.float64)
    # Both sides have points between the range and the last knot, where sums are partial, and beyond it.
    assert ((x > grid[:, -1 - order]) & (x < grid[:, -1])).any() or order == 0
    assert (x > grid[:, -1]).any()
    old_values = evaluate(x, weight[..., 0], grid, order, outside)
    new_values = evaluate(x, finer[..., 0], new, order, outside)
    assert old_values.abs().max() > 0.1
    assert (new_values - old_values).abs().max() <= 1e-10 * old_values.abs().max()


def test_insertion_of_repeated_knots():
    # A knot of multiplicity k, in the old grid and made by insertion: still the same function.
    grid = torch.tensor([[-4.0, -3, -2, -1, 0, 0, 0, 1, 2, 3, 4]], dtype=torch.float64)
    new = torch.cat([grid, torch.tensor([[-0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)], 1).sort(1).values
    weight = torch.randn(1, 7, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-5, 5, 4001, dtype=torch.float64)[:, None]
    finer = insert_knots(weight, grid, new)
    difference = evaluate(x, finer[..., 0], new, 3) - evaluate(x, weight[..., 0], grid, 3)
    assert difference.abs().max() <= 1e-13


@pytest.mark.parametrize("outside", ["zero", "linear", "clamp"])
def test_refinement_keeps_a_deep_network(outside):
    torch.manual_seed(0)
    model = KAN([3, 6, 4, 2], grid_size=4, outside=outside, bias=True, dtype=torch.float64)
    data = [(torch.randn(256, 3, dtype=torch.float64), torch.zeros(256, 2)) for _ in range(3)]
    x = 4 * torch.randn(2000, 3, dtype=torch.float64)
    before = model(x)
    old_grids = [layer.grid.clone() for layer in model.layers]
    assert adaptive_grid_refinement(model, data, 3) == [12, 12, 12]
    assert (model(x) - before).norm() <= 1e-10 * before.norm()
    for layer, old in zip(model.layers, old_grids):
        assert layer.grid_size == 12
        assert layer.spline_weight.shape[1] == 15
        for i in range(layer.in_features):
            assert set(old[i].tolist()) <= set(layer.grid[i].tolist())  # bit for bit
        assert (layer.grid.diff(dim=1) > 0).all()


def test_new_knots_go_where_a_layers_own_inputs_are():
    torch.manual_seed(0)
    model = KAN([1, 1, 1], grid_size=4, base_activation="identity", dtype=torch.float64)
    with torch.no_grad():
        model.layers[0].spline_weight.zero_()
        model.layers[0].base_weight.fill_(-1)  # the hidden value is -x
    x = 0.25 + 0.2 * torch.rand(500, 1, dtype=torch.float64)
    adaptive_grid_refinement(model, x, 4)
    first, second = (layer.grid[0, 3:-3] for layer in model.layers)
    assert ((first > 0) & (first < 0.5)).sum() >= 9
    assert ((second > -0.5) & (second < 0)).sum() >= 9


def test_uniform_data_keep_a_uniform_range():
    model = KAN([2, 1], grid_size=4, dtype=torch.float64)
    x = torch.linspace(-1, 1, 8000, dtype=torch.float64)[:, None].repeat(1, 2)
    adaptive_grid_refinement(model, x, 2)
    inner = model.layers[0].grid[:, 3:-3]
    expected = torch.linspace(-1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(inner, expected.expand(2, -1), rtol=0, atol=1e-15)


def test_refinement_of_constant_and_repeated_inputs():
    model = KAN([3, 2], grid_size=3, dtype=torch.float32)
    x = torch.stack([torch.full((40,), 0.3), torch.randint(0, 2, (40,)).float(), torch.full((40,), 7.0)], 1)
    before = model(x).detach()
    for _ in range(3):
        adaptive_grid_refinement(model, x, 3)
    for layer in model.layers:
        assert (layer.grid.diff(dim=1) > 0).all()
    # 3 insertions of convex combinations, stored in float32 each time: a few eps of the largest value.
    torch.testing.assert_close(model(x), before, rtol=0, atol=10 * 1.2e-7 * float(before.abs().max()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_update_changes_a_representable_function_by_rounding(order):
    # Polynomials up to the order of the spline lie in every spline space.
    torch.manual_seed(0)
    layer = KANLayer(2, 3, 8, order, grid_range=(-2, 2), base_activation="silu", outside="linear", dtype=torch.float64)
    target = bases(torch.zeros(1, 2, dtype=torch.float64), layer.grid, order, "zero", 0)
    assert target.shape == (1, 2, 8 + order)
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None].repeat(1, 2)
    powers = torch.stack([x[:, :1] ** p for p in range(order + 1)]).sum(0)
    design = bases(x, layer.grid, order, "zero", 0)[:, 0]
    coefficients = torch.linalg.lstsq(design, powers).solution
    with torch.no_grad():
        layer.spline_weight.copy_(coefficients[None, :, :].expand(2, -1, 3))
    model = torch.nn.Sequential(layer)
    data = 1.9 * (2 * torch.rand(3000, 2, dtype=torch.float64) - 1) ** 3
    old_grid = layer.grid.clone()
    before = model(data)
    (change,) = update_grid(model, data)
    assert not torch.equal(layer.grid, old_grid)
    assert change < 1e-10
    assert (model(data) - before).norm() <= 1e-10 * before.norm()


def test_update_is_the_least_squares_fit():
    torch.manual_seed(1)
    model = KAN([2, 3], grid_size=6, base_activation=None, dtype=torch.float64)
    layer = model.layers[0]
    old_grid, old_weight = layer.grid.clone(), layer.spline_weight.detach().clone()
    x = torch.randn(2000, 2, dtype=torch.float64).clamp(-1.2, 1.2) * 0.9
    update_grid(model, x)
    for i in range(2):
        target = (bases(x, old_grid, 3, "zero", 0)[:, i] @ old_weight[i]).numpy()
        design = bases(x, layer.grid, 3, "zero", 0)[:, i].numpy()
        best = np.linalg.norm(design @ np.linalg.lstsq(design, target, rcond=None)[0] - target)
        ours = np.linalg.norm(design @ layer.spline_weight[i].detach().numpy() - target)
        # The ridge moves the fit by (1e-4 / relative singular value)^2 at most in a direction.
        assert 0 < ours <= 1.001 * best


def test_knots_follow_quantiles():
    model = KAN([1, 1], grid_size=10, dtype=torch.float64)
    x = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    update_grid(model, x, grid_eps=0.02, margin=0.0)
    inner = model.layers[0].grid[0, 3:-3]
    steps = torch.linspace(0, 1, 11, dtype=torch.float64)
    quantiles = torch.quantile(x[:, 0], steps)
    expected = 0.02 * (quantiles[0] + steps * (quantiles[-1] - quantiles[0])) + 0.98 * quantiles
    torch.testing.assert_close(inner, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 5, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_survives_poor_data(samples, dtype):
    torch.manual_seed(samples)
    model = KAN([5, 4, 2], grid_size=8, dtype=dtype)
    x = torch.randn(samples, 5, dtype=dtype)
    x[:, 0] = 0.3  # constant inside the range
    x[:, 1] = 12.0  # constant outside
    x[:, 2] = torch.randint(0, 2, (samples,)).to(dtype)  # repeated values
    x[:, 3] = x[:, 4]
    before = model.layers[0](x).detach()
    old = model.layers[0].grid[0].clone()
    changes = update_grid(model, x)
    assert len(changes) == 2
    for layer in model.layers:
        assert layer.spline_weight.isfinite().all()
        assert (layer.grid.diff(dim=1) > 0).all()
        assert layer.spline_weight.abs().max() < 100
    torch.testing.assert_close(model.layers[0].grid[0], old, rtol=0, atol=1e-6)
    # With few samples there are more coefficients than data: the fit meets the old values; the ridge and cells that
    # the data do not determine leave up to the cubic approximation error of 8 intervals.
    torch.testing.assert_close(model.layers[0](x), before, rtol=0, atol=0.05 * float(before.abs().max()))


def test_update_uses_hidden_activations_layer_by_layer():
    torch.manual_seed(0)
    model = KAN([2, 3, 1], grid_size=5, dtype=torch.float64)
    x = 3 * torch.rand(400, 2, dtype=torch.float64)
    update_grid(model, [(x[:150],), (x[150:],)], margin=0.0)
    hidden = model.layers[0](x)
    second = model.layers[1]
    torch.testing.assert_close(second.grid[:, 3], hidden.min(0).values, rtol=0, atol=1e-12)
    torch.testing.assert_close(second.grid[:, -4], hidden.max(0).values, rtol=0, atol=1e-12)


def test_refit_in_chunks_is_the_same(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(300, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    old, new = make_grid(generator, 4, 5, 3), make_grid(generator, 4, 5, 3)
    whole = _refit_matrix(x, old, new, 3, "linear")
    monkeypatch.setattr("kan_fast.chunks.CHUNK_ELEMENTS", 700)
    # Orthogonal transformations in another order: eps times the condition number, below 1e6 by the ridge.
    torch.testing.assert_close(_refit_matrix(x, old, new, 3, "linear"), whole, rtol=0, atol=1e-9)


def step_towards_product(model, x, optimizer):
    """One step of training on the product of x's columns; the loss before it."""
    optimizer.zero_grad()
    loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("state", ["carry", "reset"])
@pytest.mark.parametrize("change", [adaptive_grid_refinement, update_grid])
def test_optimizer_goes_on(change, state):
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    x = torch.rand(200, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    step = partial(step_towards_product, model, x, optimizer)
    first = step()
    for _ in range(19):
        step()
    weight = model.layers[0].spline_weight
    change(model, x, optimizer=optimizer, optimizer_state=state)
    assert model.layers[0].spline_weight is weight
    moments = optimizer.state[weight]
    if state == "carry":
        # Adam's steps stay steps: m / sqrt(v) is 1 at most without history, sqrt(bases) times that after the change.
        assert (moments["exp_avg"].abs() <= 20 * moments["exp_avg_sq"].sqrt()).all()
        assert moments["exp_avg"].shape == weight.shape
        assert moments["exp_avg"].abs().max() > 0
        assert (moments["exp_avg_sq"] >= 0).all()
        assert moments["step"] == 20
    else:
        assert not moments
    assert [step() for _ in range(20)][-1] < first


@pytest.mark.parametrize("change", [adaptive_grid_refinement, update_grid])
def test_factored_moments_begin_anew(change):
    model = KAN([2, 3, 1], bias=True)
    x = torch.rand(200, 2)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    step = partial(step_towards_product, model, x, optimizer)
    first = step()
    step()
    factored = {model.layers[0].spline_weight, model.layers[1].spline_weight}
    others = {parameter: dict(optimizer.state[parameter]) for parameter in set(model.parameters()) - factored}
    change(model, x, optimizer=optimizer)
    # With one output the row sums of the second layer have its weight's shape, and its column sums still have not.
    assert not any(optimizer.state[weight] for weight in factored)
    assert all(optimizer.state[parameter] == state and state["step"] == 2 for parameter, state in others.items())
    assert [step() for _ in range(20)][-1] < first
    assert optimizer.state[model.layers[0].spline_weight]["row_var"].shape[1] == model.layers[0].spline_weight.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_living_graph_of_the_old_shape_does_no_harm(dtype):
    model = KAN([2, 3, 1], dtype=dtype)
    x = torch.rand(20, 2, dtype=dtype)
    alive = model(x).sum()
    alive.backward(retain_graph=True)
    weight = model.layers[0].spline_weight
    adaptive_grid_refinement(model, x)
    assert model.layers[0].spline_weight is weight
    assert weight.dtype == dtype
    assert weight.grad is None
    model(x).sum().backward()
    assert weight.grad.shape == weight.shape == (2, 13, 3)
    assert alive.isfinite()


def test_refinement_with_lbfgs():
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    x = torch.rand(200, 2, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    with pytest.raises(ValueError, match="optimizer_state"):
        adaptive_grid_refinement(model, x, optimizer=optimizer)
    adaptive_grid_refinement(model, x, optimizer=optimizer, optimizer_state="reset")
    optimizer.step(closure)
    assert float(closure().detach()) < first


@pytest.mark.parametrize(
    ("complexity", "dim", "expected"),
    [(1000, 5, 13), (1, 5, 5), (1e9, 5, 20), (1000, 11, 11), (2, 11, 3), (1000, 2, 16), (1e9, 1, 23), (1000, 10, 13)],
)
def test_tune_grid_size(complexity, dim, expected):
    base = max(5, min(20, int(2 * math.log(complexity))))
    assert expected in (base, max(3, base - 2), min(25, base + 3))
    assert tune_grid_size(complexity, dim) == expected


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, x: adaptive_grid_refinement(m, x, 1), "refinement_factor"),
        (lambda m, x: adaptive_grid_refinement(m, x, uniform_share=2), "uniform_share"),
        (lambda m, x: update_grid(m, x, grid_eps=0), "grid_eps"),
        (lambda m, x: update_grid(m, x * math.inf), "finite"),
        (lambda m, x: update_grid(m, x[:0]), "at least one sample"),
        (lambda m, x: update_grid(torch.nn.Linear(1, 1), x), "KANLayers"),
        (lambda m, x: update_grid(m, x, optimizer_state="keep"), "optimizer_state"),
        (lambda m, x: tune_grid_size(0, 1), "data_complexity"),
        (lambda m, x: tune_grid_size(10, 0), "input_dim"),
    ],
)
def test_errors_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call(KAN([2, 1]), torch.rand(10, 2))
