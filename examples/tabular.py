"""Regression on a table of scikit-learn's (diabetes, 442 patients), with the features that do not matter taken out.

Run: python examples/tabular.py

Ten more columns of pure noise join the ten measured ones, so that there is something to find. How strongly activations are
penalised, and below which share edges are cut, is chosen on a validation part; the test part is looked at once, at the end.
"""

import itertools
from typing import Any, NamedTuple

import torch
from _shared import check, save_picture
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from torch import Tensor

from kan_fast import KAN, compact, plot_kan, prune_kan, train_kan

PENALTIES, THRESHOLDS = (0.02, 0.05, 0.1), (0.03, 0.06, 0.12)
Part = tuple[Tensor, Tensor]  # x (rows, columns), y (rows, 1)


class Fit(NamedTuple):
    """A pruned and compacted model, which of the columns it reads, and their names."""

    model: KAN
    used: Tensor
    names: list[str]


def load(seed: int) -> tuple[list[Part], list[str]]:
    """Train, validation and test part (60, 20, 20 %), standardised by the first; names of the columns."""
    table = load_diabetes()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(table.data), 10, generator=generator, dtype=torch.float64)
    x = torch.cat([torch.as_tensor(table.data), noise], 1)
    y = torch.as_tensor(table.target)[:, None]
    train, rest = train_test_split(range(len(x)), test_size=0.4, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, random_state=seed)
    x, y = ((t - t[train].mean(0)) / t[train].std(0) for t in (x, y))
    names = [*table.feature_names, *(f"noise{i}" for i in range(10))]
    return [(x[rows].float(), y[rows].float()) for rows in (train, validation, test)], names


def r2(prediction: Tensor, target: Tensor) -> float:
    return float(1 - (prediction - target).square().sum() / (target - target.mean()).square().sum())


def fit(train: Part, names: list[str], penalty: float, threshold: float) -> Fit:
    x, y = train
    torch.manual_seed(0)
    # A small grid and a wide range: 265 rows, some far out.
    model = KAN([20, 1], grid_size=2, grid_range=(-3, 3), outside="linear", bias=True)
    options: dict[str, Any] = {"lr": 2e-2, "weight_decay": 1e-2, "progress": False, "scheduler": None}
    train_kan(model, [(x, y)], epochs=300, activation_l1=penalty, activation_entropy=0.02, **options)
    report = prune_kan(model, threshold, data=x, method="attribution", input_names=names)
    small = compact(model, drop_inputs=True)
    used = small.get_buffer("input_index")
    train_kan(small, [(x[:, used], y)], epochs=60, activation_l1=penalty / 2, **options)
    return Fit(small, used, report.used_inputs)


def score(fitted: Fit, part: Part) -> float:
    x, y = part
    with torch.no_grad():
        return r2(fitted.model(x[:, fitted.used]), y)


def main() -> dict[str, float]:
    (train, validation, test), names = load(0)
    fits = {setting: fit(train, names, *setting) for setting in itertools.product(PENALTIES, THRESHOLDS)}
    found = {setting: score(fitted, validation) for setting, fitted in fits.items()}
    for (penalty, threshold), value in found.items():
        columns = len(fits[penalty, threshold].names)
        print(f"penalty {penalty:g}, threshold {threshold:g}: {columns} columns, validation R2 {value:.3f}")
    # Of those that are as good as the best, the one that reads the fewest columns.
    good = [setting for setting in found if found[setting] >= max(found.values()) - 0.01]
    chosen = min(good, key=lambda setting: (len(fits[setting].names), -found[setting]))
    fitted = fits[chosen]
    print(f"chosen: penalty {chosen[0]:g}, threshold {chosen[1]:g}; kept: {', '.join(fitted.names)}")
    scores = {"KAN": score(fitted, test)}
    ridge = RidgeCV(alphas=[0.1, 1, 10, 100]).fit(train[0], train[1][:, 0])
    scores["ridge regression, all 20 columns"] = r2(torch.as_tensor(ridge.predict(test[0]))[:, None], test[1])
    for name, value in scores.items():
        print(f"test R2 of {name}: {value:.3f}")
    figure = plot_kan(fitted.model, train[0][:, fitted.used], input_names=fitted.names, output_names=["disease progression"])
    save_picture(figure.figure, "tabular")
    check("noise columns kept", sum(name.startswith("noise") for name in fitted.names), 0)
    check("shortfall of test R2 behind ridge regression", scores["ridge regression, all 20 columns"] - scores["KAN"], 0.05)
    return scores


if __name__ == "__main__":
    main()
