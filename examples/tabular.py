"""Regression on a table of scikit-learn's (diabetes, 442 patients), with the features that do not matter taken out.

Run: python examples/tabular.py

Ten more columns of pure noise join the ten measured ones, so that there is something to find.
"""

from typing import Any

import torch
from _shared import check, save_picture
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from kan_fast import KAN, compact, plot_kan, prune_kan, train_kan


def load(seed: int) -> tuple[list[Tensor], list[str]]:
    """Standardised x_train, x_test, y_train, y_test, and the names of the columns."""
    table = load_diabetes()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(table.data), 10, generator=generator, dtype=torch.float64)
    x = torch.cat([torch.as_tensor(table.data), noise], 1).numpy()
    parts = train_test_split(x, table.target[:, None], test_size=0.25, random_state=seed)
    for k in (0, 2):
        scaler = StandardScaler().fit(parts[k])
        parts[k : k + 2] = [scaler.transform(part) for part in parts[k : k + 2]]
    names = [*table.feature_names, *(f"noise{i}" for i in range(10))]
    return [torch.as_tensor(part, dtype=torch.float32) for part in parts], names


def r2(prediction: Tensor, target: Tensor) -> float:
    return float(1 - (prediction - target).square().sum() / (target - target.mean()).square().sum())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    (x, x_test, y, y_test), names = load(0)
    # A small grid and a wide range: 331 rows, some far out.
    model = KAN([20, 1], grid_size=2, grid_range=(-3, 3), outside="linear", bias=True)
    options: dict[str, Any] = {"lr": 2e-2, "weight_decay": 1e-2, "progress": False, "scheduler": None}
    train_kan(model, [(x, y)], epochs=300, activation_l1=0.05, activation_entropy=0.02, **options)
    report = prune_kan(model, 0.12, data=x, method="attribution", input_names=names)
    print(f"kept: {', '.join(report.used_inputs)}")
    print(f"taken out: {', '.join(report.unused_inputs)}")
    small = compact(model, drop_inputs=True)
    used = small.get_buffer("input_index")
    x, x_test = x[:, used], x_test[:, used]
    train_kan(small, [(x, y)], epochs=60, activation_l1=0.02, **options)
    with torch.no_grad():
        scores = {"KAN": r2(small(x_test), y_test)}
    (full, full_test, _, _), _ = load(0)
    ridge = RidgeCV(alphas=[0.1, 1, 10, 100]).fit(full, y[:, 0])
    scores["ridge regression, all 20 columns"] = r2(torch.as_tensor(ridge.predict(full_test))[:, None], y_test)
    for name, score in scores.items():
        print(f"test R2 of {name}: {score:.3f}")
    save_picture(plot_kan(small, x, input_names=report.used_inputs, output_names=["disease progression"]).figure, "tabular")
    check("noise columns kept", sum(name.startswith("noise") for name in report.used_inputs), 0)
    check("shortfall of test R2 behind ridge regression", scores["ridge regression, all 20 columns"] - scores["KAN"], 0.05)
    return scores


if __name__ == "__main__":
    main()
