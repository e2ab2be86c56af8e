"""Put KANLayer in the place of nn.Linear and its activation in a small model that exists, and train both the same way.

Run: python examples/drop_in.py

The model sorts wines (scikit-learn's data, 178 of 3 kinds) by 13 measurements. Two lines differ.
"""

import torch
from _shared import check, save_picture
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from kan_fast import KANLayer


class WithLinear(nn.Module):
    first: nn.Module
    second: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(13, 16), nn.SiLU())
        self.second = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class WithKANLayer(WithLinear):
    def __init__(self) -> None:
        super().__init__()
        self.first = KANLayer(13, 4, grid_size=4, grid_range=(-3, 3))
        self.second = KANLayer(4, 3, grid_size=4)


def load() -> list[Tensor]:
    table = load_wine()
    x, x_test, y, y_test = train_test_split(table.data, table.target, test_size=0.4, random_state=0, stratify=table.target)
    scaler = StandardScaler().fit(x)
    return [
        *(torch.as_tensor(scaler.transform(part), dtype=torch.float32) for part in (x, x_test)),
        *(torch.as_tensor(part) for part in (y, y_test)),
    ]


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """The loop as it was: it does not know which layers are inside."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> dict[str, float]:
    x, x_test, y, y_test = load()
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    accuracy = {}
    for model_class, colour in ((WithLinear, "#1f2933"), (WithKANLayer, "#c2410c")):
        torch.manual_seed(0)
        model = model_class()
        name = model_class.__name__
        ax.plot(train(model, x, y), color=colour, label=name)
        accuracy[name] = float((model(x_test).argmax(1) == y_test).float().mean())
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, test accuracy {accuracy[name]:.3f}")
    ax.set(xlabel="step", ylabel="cross entropy", yscale="log")
    ax.legend(frameon=False)
    save_picture(figure, "drop_in")
    check("test errors with KANLayer", 1 - accuracy["WithKANLayer"], 0.06)
    return accuracy


if __name__ == "__main__":
    main()
