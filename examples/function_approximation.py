"""Learn f(x) = sin(x0) cos(x1) + x0^2 / 2 from 1,000 samples of normal inputs with a [2, 5, 1] network.

    python examples/function_approximation.py
"""

import torch
from _shared import check, save_picture
from torch.utils.data import DataLoader, TensorDataset

from kan_fast import KAN, plot_history, plot_kan, train_kan


def target(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x[:, :1]) * torch.cos(x[:, 1:]) + x[:, :1] ** 2 / 2


def main() -> float:
    torch.manual_seed(0)
    x, x_test = torch.randn(1000, 2), torch.randn(1000, 2)
    model = KAN([2, 5, 1], grid_size=10, grid_range=(-4, 4), outside="linear")
    loader = DataLoader(TensorDataset(x, target(x)), batch_size=100, shuffle=True)
    validation = [(x_test, target(x_test))]
    history = train_kan(
        model,
        loader,
        validation,
        epochs=100,
        lr=2e-2,
        grid_update_every=100,  # knots go where the data are, in the hidden layer too
        grid_update_until=500,
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
