"""Learn f(x) = sin(x0) cos(x1) + x0^2 / 2 from 1,000 samples of normal inputs with a [2, 5, 1] network.

Run: python examples/function_approximation.py
"""

import torch
from _shared import check, save_picture
from torch.utils.data import DataLoader, TensorDataset

from kan_fast import KAN, advanced_regularization, plot_history, plot_kan, train_kan


def target(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x[:, :1]) * torch.cos(x[:, 1:]) + x[:, :1] ** 2 / 2


def main() -> float:
    torch.manual_seed(0)
    x, x_validation, x_test = torch.randn(3, 1000, 2)
    model = KAN([2, 5, 1], grid_size=10, grid_range=(-4, 4), outside="linear")
    loader = DataLoader(TensorDataset(x, target(x)), batch_size=100, shuffle=True)
    validation = [(x_validation, target(x_validation))]
    history = train_kan(
        model,
        loader,
        validation,
        epochs=100,
        lr=2e-2,
        # Where samples are rare, beyond 3 standard deviations, smoothness decides.
        regularization=lambda network: advanced_regularization(network, l1_factor=0.0, smoothness_factor=1e-4),
        restore_best=True,
        progress=False,
    )
    with torch.no_grad():
        mse = float((model(x_test) - target(x_test)).square().mean())
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_kan(model, x, ax=left)
    plot_history(history, ax=right)
    save_picture(figure, "function_approximation")
    check("test MSE", mse, 1e-3)
    return mse


if __name__ == "__main__":
    main()
