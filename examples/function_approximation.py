"""Learn f(x) = sin(x0) cos(x1) + x0^2 / 2 from 1,000 samples of normal inputs with a [2, 5, 1] network.

Run: python examples/function_approximation.py

Grid size and smoothness are chosen by the error on validation samples; the test samples are looked at once, at the end.
"""

import itertools

import torch
from _shared import check, save_picture
from torch.utils.data import DataLoader, TensorDataset

from kan_fast import KAN, advanced_regularization, plot_history, plot_kan, train_kan
from kan_fast.history import History

GRID_SIZES, SMOOTHNESS = (3, 5, 10), (1e-5, 1e-4, 1e-3)


def target(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x[:, :1]) * torch.cos(x[:, 1:]) + x[:, :1] ** 2 / 2


def mse(model: KAN, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - target(x)).square().mean())


def fit(x: torch.Tensor, x_validation: torch.Tensor, grid_size: int, smoothness: float) -> tuple[KAN, History]:
    torch.manual_seed(0)
    model = KAN([2, 5, 1], grid_size=grid_size, grid_range=(-4, 4), outside="linear")
    history = train_kan(
        model,
        DataLoader(TensorDataset(x, target(x)), batch_size=100, shuffle=True),
        [(x_validation, target(x_validation))],
        epochs=100,
        lr=2e-2,
        # Where samples are rare, beyond 3 standard deviations, smoothness decides.
        regularization=lambda network: advanced_regularization(network, l1_factor=0.0, smoothness_factor=smoothness),
        restore_best=True,
        progress=False,
    )
    return model, history


def main() -> float:
    torch.manual_seed(0)
    x, x_validation, x_test = torch.randn(3, 1000, 2)
    fits = {setting: fit(x, x_validation, *setting) for setting in itertools.product(GRID_SIZES, SMOOTHNESS)}
    errors = {setting: mse(model, x_validation) for setting, (model, _) in fits.items()}
    for (grid_size, smoothness), error in errors.items():
        print(f"grid_size {grid_size}, smoothness {smoothness:g}: validation MSE {error:.2e}")
    chosen = min(errors, key=lambda setting: errors[setting])
    print(f"chosen: grid_size {chosen[0]}, smoothness {chosen[1]:g}")
    model, history = fits[chosen]
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_kan(model, x, ax=left)
    plot_history(history, ax=right)
    save_picture(figure, "function_approximation")
    error = mse(model, x_test)
    check("test MSE", error, 1e-3)
    return error


if __name__ == "__main__":
    main()
