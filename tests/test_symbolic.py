import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
sympy = pytest.importorskip("sympy")

from kan_fast import KAN, fit_symbolic_function, symbolic_extraction  # noqa: E402
from kan_fast.pruning import compact  # noqa: E402
from kan_fast.symbolic import SymbolicFunction, default_library, snap_edges  # noqa: E402
from kan_fast.symbolic.extraction import round_constants  # noqa: E402
from kan_fast.symbolic.fit import fit_edges  # noqa: E402
from kan_fast.symbolic.module import r2_score  # noqa: E402

FEW = ["x", "x^2", "sin", "exp", "tanh"]
X = torch.linspace(-1, 1, 300, dtype=torch.float64)

# c * f(a * x + b) + d with constants of no special values; the second name, if any, is the same function in other clothes.
CURVES = {
    "x": lambda x: 3.1 * x - 1.2,
    "x^2": lambda x: 2 * (x - 0.3) ** 2 + 0.4,
    "x^3": lambda x: (x + 0.1) ** 3,
    "x^4": lambda x: (x - 0.2) ** 4,
    "x^5": lambda x: 2 - (x - 0.05) ** 5,
    "1/x": lambda x: 1 / (x + 1.5),
    "1/x^2": lambda x: 1 / (x - 1.3) ** 2,
    "1/x^3": lambda x: 1 / (x + 1.4) ** 3,
    "1/x^4": lambda x: 1 / (x + 1.8) ** 4,
    "sqrt": lambda x: torch.sqrt(2 * x + 2.4),
    "x^1.5": lambda x: (x + 1.1) ** 1.5,
    "1/sqrt": lambda x: (1.1 - x) ** -0.5,
    "log": lambda x: torch.log(1.4 - x),
    "abs": lambda x: (3 * x - 0.75).abs(),
    "exp": lambda x: 0.3 * torch.exp(-1.2 * x) + 2,
    "sin": lambda x: 2 * torch.sin(3 * x + 0.4) - 1,
    "cos": lambda x: torch.cos(2.2 * x + 0.1),
    "tan": lambda x: torch.tan(1.2 * x + 0.1),
    "tanh": lambda x: torch.tanh(4 * x - 1),
    "gaussian": lambda x: torch.exp(-((3 * x - 0.5) ** 2)),
    "arctan": lambda x: torch.arctan(5 * x + 1),
    "arcsin": lambda x: torch.arcsin(0.9 * x),
    "arccos": lambda x: torch.arccos(0.8 * x + 0.1),
    "arctanh": lambda x: torch.arctanh(0.95 * x),
    "sinh": lambda x: torch.sinh(3 * x + 0.4),
    "cosh": lambda x: torch.cosh(2 * x + 0.2),
    "erf": lambda x: torch.erf(3 * x + 0.1),
    "softplus": lambda x: torch.nn.functional.softplus(5 * x + 0.3),
    "sigmoid": lambda x: torch.sigmoid(3 * x + 0.2),
}
# sigmoid(z) = (tanh(z / 2) + 1) / 2; arcsin + arccos = pi / 2.
SAME = {"sigmoid": {"sigmoid", "tanh"}, "arccos": {"arccos", "arcsin"}}


def test_every_candidate_is_recovered():
    assert set(CURVES) == set(default_library())
    assert len(CURVES) >= 25
    y = torch.stack([curve(X) for curve in CURVES.values()], 1)
    fits = fit_edges(X[:, None].expand(-1, y.shape[1]), y)
    for (name, curve), fit in zip(CURVES.items(), fits):
        assert fit.name in SAME.get(name, {name})
        # A least-squares fit that has converged in float64: residuals of rounding, squared.
        assert 1 - fit.r2 < 1e-12, name
        torch.testing.assert_close(fit(X), curve(X), rtol=0, atol=1e-6 * float(curve(X).abs().max()))
        # The SymPy expression is the same formula.
        values = sympy.lambdify(sympy.Symbol("x"), fit.expression, ["scipy", "numpy"])(X.numpy())
        np.testing.assert_allclose(values, fit(X).numpy(), rtol=1e-9, atol=1e-9)


def test_batched_and_single_fits_agree():
    y = torch.stack([torch.sin(4 * X + 1), torch.exp(X), (X - 0.2) ** 2], 1)
    library = ["x", "x^2", "exp", "sin", "tanh"]
    batched = fit_edges(X[:, None].expand(-1, 3), y, library)
    for column, fit in enumerate(batched):
        single = fit_symbolic_function(X, y[:, column], library)
        assert single.name == fit.name
        assert single.parameters == pytest.approx(fit.parameters, abs=1e-7)


def test_chunks_change_nothing(monkeypatch):
    y = torch.stack([torch.sin(4 * X + 1), torch.exp(X)], 1)
    whole = fit_edges(X[:, None].expand(-1, 2), y, ["sin", "exp"])
    monkeypatch.setattr("kan_fast.chunks.CHUNK_ELEMENTS", 1000)
    parts = fit_edges(X[:, None].expand(-1, 2), y, ["sin", "exp"])
    assert [fit.parameters for fit in parts] == [pytest.approx(fit.parameters, abs=1e-9) for fit in whole]


def test_parameters_are_the_neat_ones():
    fit = fit_symbolic_function(X, 2 * torch.sin(3 * X + 0.4) - 1)
    assert fit.parameters == pytest.approx((3, 0.4, 2, -1), abs=1e-8)
    fit = fit_symbolic_function(X, torch.exp(2 * X + 1))
    assert fit.parameters == pytest.approx((2, 0, math.e, 0), abs=1e-7)
    assert fit.alternatives[0][0] == "exp"
    assert len(fit.alternatives) > 1


def test_simple_wins_unless_the_data_object():
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(300, generator=generator, dtype=torch.float64)
    assert fit_symbolic_function(X, 3 * X + noise).name == "x"
    assert fit_symbolic_function(X, X**2 + noise).name == "x^2"
    # Half a period from a tanh: no simple curve is near enough.
    assert fit_symbolic_function(X, torch.tanh(3 * X) + noise).name == "tanh"


def test_callable_in_place_of_data():
    fit = fit_symbolic_function(lambda x: torch.log(x), domain=(0.5, 3.0), library=["log", "sqrt", "x"])
    assert fit.name == "log"
    model = KAN([1, 1], grid_size=12, dtype=torch.float32)
    x = torch.linspace(-1, 1, 200)[:, None]
    layer = model.layers[0]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - torch.cos(3 * x)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    fit = fit_symbolic_function(layer.edge(0, 0))
    assert fit.name == "cos"
    assert fit.r2 > 0.9999


def test_constant_curve():
    fit = fit_symbolic_function(X, torch.full_like(X, 2.5))
    assert fit.name == "constant"
    assert float(fit.expression) == 2.5
    assert fit.r2 == 1
    assert (fit(X) == 2.5).all()


@pytest.mark.parametrize("name", ["log", "sqrt", "1/x", "1/x^2", "1/sqrt", "arcsin", "arccos", "arctanh", "tan", "x^1.5"])
def test_no_singularity_among_the_data(name):
    # Targets that tempt the candidate over the edge of its domain.
    candidate = default_library()[name]
    generator = torch.Generator().manual_seed(1)
    y = torch.stack([torch.sin(3 * X), X**3, torch.randn(300, generator=generator, dtype=torch.float64)], 1)
    for fit in fit_edges(X[:, None].expand(-1, 3), y, [candidate, "x"]):
        a, b, _, _ = fit.parameters
        dense = a * torch.linspace(-1, 1, 10001, dtype=torch.float64) + b
        assert fit.function.function(dense).isfinite().all()
        if fit.function.domain is not None:
            assert fit.function.domain(dense)


def test_user_functions():
    airy = SymbolicFunction("sinc", lambda z: torch.sinc(z / math.pi), lambda z: sympy.sin(z) / z, 4)
    fit = fit_symbolic_function(X, torch.sinc((5 * X + 1) / math.pi), [*default_library().values(), airy])
    assert fit.name == "sinc"
    assert abs(fit.parameters[0]) == pytest.approx(5, abs=1e-6)
    with pytest.raises(ValueError, match="freedom"):
        SymbolicFunction("f", torch.sin, sympy.sin, 1, "phase")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fit_symbolic_function(X), TypeError, "y"),
        (lambda: fit_symbolic_function(X, X[:-1]), ValueError, "x, y"),
        (lambda: fit_symbolic_function(X, X * math.nan), ValueError, "finite"),
        (lambda: fit_symbolic_function(X, X, ["bessel"]), ValueError, "library"),
        (lambda: fit_symbolic_function(X, X, []), ValueError, "library"),
        (lambda: fit_symbolic_function(torch.sin, domain=(1, 0)), ValueError, "domain"),
        (lambda: symbolic_extraction(torch.nn.Linear(1, 1)), TypeError, "model"),
        (lambda: symbolic_extraction(KAN([2, 1]), ["x"]), ValueError, "input_names"),
        (lambda: snap_edges(KAN([2, 1]), {(3, 0, 0): None}), ValueError, "layers"),
        (lambda: snap_edges(KAN([2, 1]), {(0, 2, 0): None}), ValueError, "edge"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.fixture(scope="module")
def trained():
    """[2, 1, 1] trained to exp(sin(2 x) + y^2 / 2), with data."""
    torch.manual_seed(0)
    model = KAN([2, 1, 1], grid_size=8, outside="linear", grid_range=(-1.5, 1.5), dtype=torch.float64)
    x = 2 * torch.rand(400, 2, dtype=torch.float64) - 1
    y = torch.exp(torch.sin(2 * x[:, :1]) + x[:, 1:] ** 2 / 2)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_change=1e-15, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) < 1e-6
    return model, x, y


def test_extraction_of_a_network(trained):
    model, x, _ = trained
    result = symbolic_extraction(model, ["u", "v"], ["f"], data=x)
    assert [(e.layer, e.input, e.output, e.fit.name) for e in result.edges] == [
        (0, 0, 0, "sin"), (0, 1, 0, "x^2"), (1, 0, 0, "exp"),
    ]  # fmt: skip
    assert result.r2 > 0.999
    table = result.table()
    assert "sin" in table
    assert "0->0" in table
    # Expression, module and R2 say the same.
    function = sympy.lambdify(sympy.symbols("u v"), result.expressions[0], "numpy")
    values = function(*x.T.numpy())
    np.testing.assert_allclose(values, result.module(x)[:, 0].detach().numpy(), rtol=1e-9)
    output = model(x)[:, 0].detach().numpy()
    assert result.r2 == pytest.approx(1 - np.sum((values - output) ** 2) / np.sum((output - output.mean()) ** 2), abs=1e-9)


def test_refit_finds_the_formula_itself(trained):
    model, x, y = trained
    result = symbolic_extraction(model, ["u", "v"], ["f"], data=x, targets=y)
    assert result.r2 > 1 - 1e-12
    u, v = sympy.symbols("u v")
    (rounded,) = result.rounded(3)
    assert sympy.simplify(rounded - sympy.exp(sympy.sin(2 * u) + v**2 / 2)) == 0
    (text,) = result.latex(3)
    assert text.startswith("f = e^{")
    assert symbolic_extraction(model, ["u", "v"], data=x, targets=y, digits=3, library=FEW).expressions == [rounded]


def test_extraction_without_data_and_with_bias_and_dead_nodes():
    torch.manual_seed(0)
    model = KAN([2, 3, 2], base_activation="identity", bias=True, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.layers:
            layer.spline_weight.zero_()
            layer.bias.normal_()
    model.layers[0].edge_mask = torch.tensor([[True, False, True], [True, False, False]])
    result = symbolic_extraction(model, library=FEW)
    x = torch.randn(50, 2, dtype=torch.float64)
    # A linear network: the formulas hold everywhere.
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-9, atol=1e-9)
    values = sympy.lambdify(sympy.symbols("x_0 x_1"), result.expressions, "numpy")(*x.T.numpy())
    np.testing.assert_allclose(np.stack(values, 1), model(x).detach().numpy(), rtol=1e-9, atol=1e-9)
    small = symbolic_extraction(compact(model), library=FEW)
    torch.testing.assert_close(small.module(x), model(x), rtol=1e-9, atol=1e-9)


def test_snapped_edges_train_with_the_remaining_splines(trained):
    model, x, y = trained
    fits = {(e.layer, e.input, e.output): e.fit for e in symbolic_extraction(model, data=x, library=FEW).edges}
    half = snap_edges(model, {edge: fit for edge, fit in fits.items() if edge[0] == 0})
    assert not half.is_symbolic
    assert snap_edges(model, fits).is_symbolic
    torch.testing.assert_close(snap_edges(model, {})(x), model(x), rtol=0, atol=1e-14 * float(y.max()))
    r2_before = float(1 - (half(x) - y).square().sum().detach() / (y - y.mean()).square().sum())
    r2 = half.refit(x, y)
    assert r2 > max(r2_before, 1 - 1e-5)
    # Edges that were snapped are no splines any more.
    assert not isinstance(half.splines[0], type(model.layers[0]))
    assert isinstance(half.splines[1], type(model.layers[1]))
    # The rest trains by any optimizer too, and a held constant stays.
    layer = half.formulas[0]
    held = layer.constants.detach()[~layer.free].clone()
    optimizer = torch.optim.SGD(half.parameters(), lr=1e-4)
    (half(x) - y).square().mean().backward()
    assert layer.constants.grad[~layer.free].abs().max() == 0
    optimizer.step()
    torch.testing.assert_close(layer.constants.detach()[~layer.free], held, rtol=0, atol=0)


def test_refit_never_makes_it_worse(trained):
    model, x, y = trained
    module = symbolic_extraction(model, data=x, targets=y, library=FEW).module
    before = copy.deepcopy(module.state_dict())
    r2 = module.refit(x, torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype), max_steps=1)
    assert r2 <= 1
    module.load_state_dict(before)
    with_lbfgs = copy.deepcopy(module)
    with torch.no_grad():
        with_lbfgs.formulas[0].constants += 1e-3
    start = with_lbfgs._r2(x, y)
    with_lbfgs._lbfgs(x, y, 20)
    assert with_lbfgs._r2(x, y) > start


def test_module_travels(trained):
    model, x, _ = trained
    module = symbolic_extraction(model, data=x, library=FEW).module
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.formulas[0].constants.zero_()
    other.load_state_dict(torch.load(stream))
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


def test_rounding_of_constants():
    x = sympy.Symbol("x")
    expression = 1.0003 * sympy.sin(3.14149 * x + 0.00004) + 0.4999 * x**2 + 1.2345 * x - 2.00001
    expected = sympy.sin(sympy.pi * x) + x**2 / 2 + sympy.Float(1.234) * x - 2
    difference = sympy.expand(round_constants(expression, 3) - expected)
    assert abs(difference.coeff(x)) < 1e-3 + 1e-12
    assert sympy.simplify(difference - difference.coeff(x) * x) == 0


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sympy", None)
    with pytest.raises(ImportError, match=r"kan_fast\[symbolic\]"):
        fit_symbolic_function(X, X)
    with pytest.raises(ImportError, match=r"kan_fast\[symbolic\]"):
        symbolic_extraction(KAN([1, 1]))


def test_constants_are_met_to_rounding():
    """Outputs that nothing feeds: a bias, or sums of constants that differ by the order of their terms."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = KAN([2, 3, 2], bias=True)
        for layer in model.layers:
            torch.nn.init.normal_(layer.bias)
        model.layers[0].edge_mask = torch.zeros(2, 3, dtype=torch.bool)
        assert symbolic_extraction(model, data=torch.rand(300, 2)).r2 == 1.0
    target = torch.full((50, 1), 0.3)
    assert r2_score(target + 1e-3, target) == -math.inf
    assert r2_score(torch.zeros(50, 1), torch.zeros(50, 1)) == 1.0
