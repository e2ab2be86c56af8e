"""Formulas of physics from the KAN paper's table of Feynman equations, at or below its test RMSE.

Run: python examples/feynman.py

Bounds: the lowest of the three KAN columns (human-constructed, pruned, unpruned) of Table 2 of arXiv 2404.19756. The paper
does not give the ranges of these inputs; those used here are in the table below.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from _shared import check, save_picture
from torch import Tensor

from kan_fast import KAN, adaptive_grid_refinement, train_kan, update_grid


class Equation(NamedTuple):
    formula: str
    function: Callable[..., Tensor]
    ranges: tuple[tuple[float, float], ...]
    bound: float


EQUATIONS = {
    "I.12.11": Equation("1 + a sin(t)", lambda a, t: 1 + a * torch.sin(t), ((-1, 1), (0, 2 * math.pi)), 9.13e-4),
    "I.13.12": Equation("a (1/b - 1)", lambda a, b: a * (1 / b - 1), ((0, 1), (0.5, 2)), 2.72e-3),
    "I.18.4": Equation("(1 + a b) / (1 + a)", lambda a, b: (1 + a * b) / (1 + a), ((0.5, 1), (-1, 1)), 1.50e-4),
    "I.27.6": Equation("1 / (1 + a b)", lambda a, b: 1 / (1 + a * b), ((0, 1), (0, 1)), 1.94e-4),
    "II.2.42": Equation("(a - 1) b", lambda a, b: (a - 1) * b, ((0, 1), (0, 1)), 7.22e-4),
    "III.10.19": Equation("sqrt(1 + a^2 + b^2)", lambda a, b: (1 + a * a + b * b).sqrt(), ((-1, 1), (-1, 1)), 8.16e-4),
}


def fit(equation: Equation, seed: int = 0) -> tuple[float, list[float]]:
    """Test RMSE of the grid size that does best on validation data, and the test RMSE of every grid size."""
    torch.manual_seed(seed)
    low, high = torch.tensor(equation.ranges, dtype=torch.float64).T
    x = low + (high - low) * torch.rand(3, 2000, len(low), dtype=torch.float64)
    y = equation.function(*x.unbind(2))[..., None]
    (train, validation, test), (y_train, y_validation, y_test) = x, y
    model = KAN([len(low), 5, 1], grid_size=3, dtype=torch.float64)
    update_grid(model, train, grid_eps=1.0)
    errors = []
    for size in (3, 6, 12):
        if size > 3:
            adaptive_grid_refinement(model, train, 2)
        history = train_kan(
            model,
            [(train, y_train)],
            [(validation, y_validation)],
            epochs=15,
            lr=1.0,
            optimizer="lbfgs",
            scheduler=None,
            grid_update_every=2,
            grid_update_until=6 if size == 3 else 0,  # the hidden values move most in the beginning
            restore_best=True,
            progress=False,
        )
        with torch.no_grad():
            errors.append((history.best_loss, float((model(test) - y_test).square().mean().sqrt())))
    return min(errors)[1], [error for _, error in errors]


def main() -> dict[str, float]:
    results = {}
    curves = {}
    for name, equation in EQUATIONS.items():
        start = time.perf_counter()
        results[name], curves[name] = fit(equation)
        took = time.perf_counter() - start
        print(f"{name:<10} {equation.formula:<22} {results[name]:.2e}  paper {equation.bound:.2e}  {took:.0f} s")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    places = range(len(results))
    bounds = [EQUATIONS[name].bound for name in results]
    ax.plot(places, bounds, "_", color="#1f2933", markersize=26, label="KAN paper's best KAN")
    ax.plot(places, list(results.values()), "o", color="#c2410c", label="here, [2, 5, 1]")
    ax.set_xticks(places, [f"{name}\n{EQUATIONS[name].formula}" for name in results], fontsize=7)
    ax.set_yscale("log")
    ax.set_ylabel("test RMSE")
    ax.legend(frameon=False)
    save_picture(figure, "feynman")
    for name, error in results.items():
        check(f"test RMSE of {name}", error, EQUATIONS[name].bound)
    return results


if __name__ == "__main__":
    main()
