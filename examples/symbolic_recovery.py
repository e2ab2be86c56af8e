"""Find the formula f(x, y) = exp(sin(pi x) + y^2) in samples of it: train, prune, compact, snap, print.

Run: python examples/symbolic_recovery.py
"""

import math
from typing import Any

import sympy
import torch
from _shared import check, save_picture

from kan_fast import KAN, adaptive_grid_refinement, compact, plot_kan, prune_kan, symbolic_extraction, train_kan, update_grid


def target(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(torch.sin(math.pi * x[:, :1]) + x[:, 1:] ** 2)


def main() -> sympy.Expr:
    torch.manual_seed(0)
    x = 2 * torch.rand(1000, 2, dtype=torch.float64) - 1
    data = [(x, target(x))]
    lbfgs: dict[str, Any] = {"lr": 1.0, "optimizer": "lbfgs", "scheduler": None, "progress": False}

    # A network larger than needed, with the KAN paper's penalty: few edges, and those at work.
    model = KAN([2, 5, 1], grid_size=5, outside="linear", dtype=torch.float64)
    update_grid(model, x)
    train_kan(
        model, data, epochs=15, activation_l1=0.03, activation_entropy=0.06, grid_update_every=5, grid_update_until=10, **lbfgs
    )
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(3, 2))
    plot_kan(model, x, input_names=["x", "y"], output_names=["f"], title="trained", ax=left)

    print(prune_kan(model, 0.05, data=x, method="attribution", input_names=["x", "y"]))
    model = compact(model)
    print(f"widths after pruning: {model.layer_dims}")
    # Without the penalty, and on a finer grid, the curves become what they are meant to be.
    train_kan(model, data, epochs=10, grid_update_every=4, grid_update_until=5, **lbfgs)
    adaptive_grid_refinement(model, x, 2)
    train_kan(model, data, epochs=10, **lbfgs)
    plot_kan(model, x, input_names=["x", "y"], output_names=["f"], title="pruned, compacted, refined", ax=right)
    save_picture(figure, "symbolic_recovery")

    result = symbolic_extraction(model, ["x", "y"], ["f"], data=x, targets=target(x))
    print(result.table())
    (formula,) = result.rounded(3)
    print(f"f = {formula}")
    check("1 - R2 of the formula", 1 - result.r2, 1e-5)
    x_, y_ = sympy.symbols("x y")
    if sympy.simplify(formula - sympy.exp(sympy.sin(sympy.pi * x_) + y_**2)) != 0:
        raise SystemExit("the formula is not the one that made the data")
    return formula


if __name__ == "__main__":
    main()
