"""KANRegressor and KANClassifier: scikit-learn's own checks, and what they add."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

# Optional packages: where they are absent, the tests of a GPU are collected all the same.
mpl, pd, sympy = (pytest.importorskip(name) for name in ("matplotlib", "pandas", "sympy"))
pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_wine  # noqa: E402
from sklearn.feature_selection import SelectFromModel  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from kan_fast import KAN, KANClassifier, KANRegressor  # noqa: E402

mpl.use("agg")


def expected_failures(estimator):
    """scikit-learn compares to 1e-7, which weighted and repeated rows reach in float64 alone."""
    if estimator.dtype == "float64":
        return {}
    return {"check_sample_weight_equivalence_on_dense_data": "sums of other terms, rounded in float32"}


DTYPES = ("float32", "float64")
ESTIMATORS = [
    kind(hidden_layers=(4,), epochs=40, dtype=dtype) for kind in (KANRegressor, KANClassifier) for dtype in DTYPES
]


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=expected_failures)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def smooth(rows=400, seed=0):
    """y = sin(2 x_a) + x_b^2 / 4 with x_a in [0, 3], x_b in [-4, 4] and x_c of no use, in a data frame."""
    random = np.random.default_rng(seed)
    x = pd.DataFrame({"a": random.uniform(0, 3, rows), "b": random.uniform(-4, 4, rows), "c": random.uniform(5, 6, rows)})
    return x, np.sin(2 * x.a) + x.b**2 / 4


@pytest.fixture(scope="module")
def fitted():
    x, y = smooth()
    return KANRegressor(hidden_layers=(), grid_size=8, epochs=150, optimizer="lbfgs", lr=1.0, dtype="float64",
                        random_state=0).fit(x, y)  # fmt: skip


def test_regression_of_a_smooth_function(fitted):
    x, y = smooth(seed=1)
    # A cubic spline of step h errs by 5/384 h^4 max|f''''|; sin(2 a) on 8 intervals of 3/8: 0.004, far below 1 % of y's spread.
    assert fitted.score(x, y) > 0.9999
    assert fitted.n_features_in_ == 3
    assert isinstance(fitted.model_, KAN)
    assert len(fitted.history_.train_losses) == 150


def test_feature_importances(fitted):
    share = fitted.feature_importances_
    assert share.sum() == pytest.approx(1)
    assert share[2] < 0.01 < min(share[:2])
    chosen = SelectFromModel(KANRegressor(hidden_layers=(), epochs=100, random_state=0), threshold=0.05).fit(*smooth())
    assert chosen.get_support().tolist() == [True, True, False]


def test_formula_is_in_the_units_of_the_data(fitted):
    x, y = smooth(100, seed=2)
    formula = fitted.formula_
    assert {symbol.name for symbol in formula.free_symbols} >= {"a", "b"}
    value = sympy.lambdify(["a", "b", "c"], formula)(x.a.to_numpy(), x.b.to_numpy(), x.c.to_numpy())
    # The formula stands for the network, whose own error is 1e-3 of y's spread of 1.6.
    assert np.sqrt(np.mean((value - y) ** 2)) < 0.02
    assert np.sqrt(np.mean((value - fitted.predict(x)) ** 2)) < 0.02


def test_plot(fitted):
    ax = fitted.plot(title="three edges")
    texts = {text.get_text() for text in ax.texts}
    assert {"a", "b", "y"} <= texts and ax.get_title() == "three edges"


def test_several_targets():
    x, y = smooth()
    both = np.stack([y, 100 - 50 * y], 1)
    model = KANRegressor(hidden_layers=(), epochs=60, lr=0.05, random_state=0).fit(x, both)
    assert model.predict(x).shape == (400, 2) and model.score(x, both) > 0.95
    assert len(model.formula_) == 2
    assert KANRegressor(epochs=1).fit(x, y.to_frame()).predict(x).shape == (400, 1)


@pytest.mark.parametrize("power", [1015, -1000])
def test_numbers_of_any_size(power):
    """In other units, powers of two, the fit is the same to the last bit."""
    x, y = (part.to_numpy() for part in smooth(60))
    model, unit = KANRegressor(hidden_layers=(2,), epochs=3, random_state=0), 2.0**power
    want = model.fit(x, y).predict(x)
    assert want.std() > 0
    assert np.array_equal(model.fit(x * unit, y * unit).predict(x * unit), want * unit)


def test_classification_in_a_pipeline():
    x, y = load_wine(return_X_y=True)
    names = np.array(["red", "white", "rosé"])[y]
    x, x_test, y, y_test = train_test_split(x, names, test_size=0.4, random_state=0, stratify=names)
    pipe = make_pipeline(StandardScaler(), KANClassifier(hidden_layers=(4,), epochs=60, random_state=0)).fit(x, y)
    # 72 wines: the linear rule errs on about 2 %, five errors are 7 %.
    assert pipe.score(x_test, y_test) > 0.93
    share = pipe.predict_proba(x_test)
    np.testing.assert_allclose(share.sum(1), 1, atol=1e-12)
    assert (pipe[-1].classes_[share.argmax(1)] == pipe.predict(x_test)).all()
    assert pipe[-1].plot().texts[-1].get_text() == "white"
    back = pickle.loads(pickle.dumps(pipe))
    assert (back.predict_proba(x_test) == share).all()


def test_formulas_of_a_classifier_are_its_logits():
    random = np.random.default_rng(0)
    x = random.uniform(-2, 2, (300, 2))
    y = x[:, 0] ** 2 + x[:, 1] > 1
    model = KANClassifier(hidden_layers=(), epochs=100, random_state=0).fit(x, y)
    formulas = model.formula_
    assert len(formulas) == 2
    logits = np.stack([sympy.lambdify(["x_0", "x_1"], f)(*x.T) * np.ones(len(x)) for f in formulas], 1)
    agree = model.classes_[logits.argmax(1)] == model.predict(x)
    # They may part where both classes are nearly as likely.
    assert agree.mean() > 0.97 and model.score(x, y) > 0.95


@pytest.mark.parametrize(("options", "tolerance"), [({"epochs": 60}, 1e-9), ({"optimizer": "lbfgs", "epochs": 3}, 1e-6),
                                                    ({"epochs": 60, "dtype": "float32"}, 1e-3)], ids=str)  # fmt: skip
def test_a_weighted_row_is_several_rows(options, tolerance):
    """Rounding, of 2e-16 or 1e-7, which steps of Adam multiply by 1e4 at most, and line searches by more."""
    x, y = smooth(60)
    weight = np.random.default_rng(0).integers(0, 4, 60)
    options = {"hidden_layers": (3,), "random_state": 0, "dtype": "float64", **options}
    order = np.random.default_rng(1).permutation(60)
    repeated = KANRegressor(**options).fit(x.loc[x.index.repeat(weight)], y.repeat(weight))
    weighted = KANRegressor(**options).fit(x.iloc[order], y.iloc[order], sample_weight=0.3 * weight[order])
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), rtol=0, atol=tolerance)
    score = weighted.score(x, y, sample_weight=weight)
    assert score == pytest.approx(repeated.score(x.loc[x.index.repeat(weight)], y.repeat(weight)), abs=tolerance)
    assert abs(KANRegressor(**options).fit(x, y).predict(x) - weighted.predict(x)).max() > 100 * tolerance


def test_weights_of_rows_in_many_batches():
    """Equal inputs and two labels: the probability of a label is its share of the weight."""
    x = np.repeat([[-1.0], [1.0]], 200, 0)
    y = np.tile(["no", "yes"], 200)
    weight = np.where(x[:, 0] < 0, np.where(y == "yes", 3.0, 1.0), np.where(y == "yes", 1.0, 1.5))
    model = KANClassifier(hidden_layers=(), epochs=150, batch_size=64, lr=0.02, random_state=0)
    model.fit(x, y, sample_weight=weight)
    # Adam's steps of 0.02 on noisy batches leave some hundredths of unrest in the logits.
    np.testing.assert_allclose(model.predict_proba([[-1.0], [1.0]])[:, 1], [0.75, 0.4], atol=0.04)
    early = KANClassifier(hidden_layers=(), epochs=50, early_stopping=5, random_state=0).fit(x, y, sample_weight=weight)
    assert early.score(x, y, sample_weight=weight) == pytest.approx((200 / 2 * 3 + 200 / 2 * 1.5) / weight.sum())
    pipe = make_pipeline(StandardScaler(), KANClassifier(hidden_layers=(), epochs=50, random_state=0))
    assert list(pipe.fit(x, y, kanclassifier__sample_weight=weight).predict([[-1.0], [1.0]])) == ["yes", "no"]


def test_importances_count_by_weight():
    """A feature that moves in rows of little weight only, and does all there."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (400, 2))
    rare = np.arange(400) < 100
    x[~rare, 1] = 0
    x[rare, 0] = 0
    y = x.sum(1)
    options = {"hidden_layers": (), "epochs": 100, "lr": 0.05, "random_state": 0}
    equal = KANRegressor(**options).fit(x, y).feature_importances_
    assert equal[1] > 0.25
    lighter = KANRegressor(**options).fit(x, y, sample_weight=np.where(rare, 0.01, 1.0)).feature_importances_
    # A share of 1 / 300 of the weight: 1 / 17 of the spread.
    assert lighter[1] < 0.15


@pytest.mark.parametrize("model", [KANRegressor(), KANClassifier()], ids=["regressor", "classifier"])
def test_wrong_weights(model):
    x, y = smooth(20)
    y = (y > 1).astype(int)
    with pytest.raises(ValueError, match=r"sample_weight"):
        model.fit(x, y, sample_weight=-np.ones(20))
    with pytest.raises(ValueError, match=r"zero"):
        model.fit(x, y, sample_weight=np.zeros(20))
    with pytest.raises(ValueError, match=r"sample_weight"):
        model.fit(x, y, sample_weight=np.ones(19))


def test_cross_validation_and_grid_search():
    x, y = smooth(200)
    model = KANRegressor(hidden_layers=(), epochs=80, lr=0.05, random_state=0)
    assert min(cross_val_score(model, x, y, cv=3)) > 0.9
    search = GridSearchCV(model, {"grid_size": [1, 6], "hidden_layers": [(), (2,)]}, cv=2).fit(x, y)
    # One cubic cannot follow sin(2 a) over a period.
    assert search.best_params_["grid_size"] == 6
    assert clone(search.best_estimator_).get_params()["grid_size"] == 6


def test_early_stopping_keeps_the_best_weights():
    x, y = smooth(100)
    noisy = y + np.random.default_rng(0).normal(0, 1, 100)
    model = KANRegressor(grid_size=20, epochs=500, lr=0.03, early_stopping=10, random_state=0).fit(x, noisy)
    history = model.history_
    assert history.stopped_early and len(history.val_losses) == history.best_epoch + 11 < 500


def test_random_state_and_nothing_else_decides():
    x, y = smooth(100)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = KANRegressor(epochs=3, random_state=1).fit(x, y).predict(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert (KANRegressor(epochs=3, random_state=1).fit(x, y).predict(x) == first).all()
    assert (KANRegressor(epochs=3, random_state=2).fit(x, y).predict(x) != first).any()


def test_predictions_go_on_smoothly_beyond_the_data(fitted):
    x, _ = smooth(3)
    x.loc[:, "a"] = [3.0, 3.5, 4.0]
    x.loc[:, ["b", "c"]] = [0.0, 5.5]
    y = fitted.predict(x)
    spread = abs(y).max()
    # Beyond the data the splines are straight; only the base branch, silu of what is just above 1, is a little bent.
    assert abs(y[2] - 2 * y[1] + y[0]) < 0.2 * spread


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected 'float32' or 'float64', got 'int8'"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"early_stopping": 3, "validation_fraction": 1.5}, "validation_fraction: expected a share"),
        ({"grid_size": 0}, "grid_size: expected 1 or more"),
        ({"optimizer": "adam2"}, "optimizer: expected"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        KANRegressor(**options).fit(*smooth(20))


def test_without_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = None
import kan_fast
try:
    kan_fast.KANRegressor
except ImportError as error:
    assert "kan_fast[sklearn]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
