"""Handwritten digits with a KAN [64, 32, 10]: the fused backend and the plain PyTorch reference side by side.

Trains twice on scikit-learn's digits (1,797 images of 8 x 8 pixels, UCI ML repository) with one seed, prints test accuracy
and time per step, and draws the loss curves and the most important edge functions. Exits 1 below 97 % test accuracy.

The settings below were chosen by the mean accuracy on validation images held out of the training part, over ten seeds; the
test part had no say in them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from kan_fast import KAN, KANLayer, available_backends
from kan_fast.info import report

WIDTHS = [64, 32, 10]
GRID_SIZE = 3
BATCH = 64
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
LABEL_SMOOTHING = 0.1
NOISE = 0.3  # standard deviation of noise added to training pixels, whose range is [-1, 1]
REQUIRED_ACCURACY = 0.97
WARM_UP_STEPS = 20  # left out of the timing


@dataclass
class Run:
    """What one training brought."""

    backend: str
    model: KAN
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def milliseconds(self) -> float:
        """Median time of a step: forward, backward and optimizer."""
        return 1e3 * statistics.median(self.step_seconds[WARM_UP_STEPS:])


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train (1437, 64), y_train (1437,), x_test (360, 64), y_test (360,); pixels from [0, 16] to [-1, 1]."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(digits.target)
    train, test = train_test_split(range(len(y)), test_size=0.2, random_state=0, stratify=digits.target)
    return x[train], y[train], x[test], y[test]


def train(backend: str, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, seed: int) -> Run:
    """One training; the same seed gives the same first weights, batches and noise to every backend."""
    x_train, y_train, x_test, y_test = data
    torch.manual_seed(seed)
    # outside="linear": hidden values may leave the grid, and a spline that goes on straight still carries their gradient.
    model = KAN(WIDTHS, grid_size=GRID_SIZE, outside="linear", backend=backend)
    run = Run(backend, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(x_train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    bar = tqdm(range(epochs), desc=f"{backend:<9}", unit="epoch", mininterval=0.5)
    for _ in bar:
        total = 0.0
        for batch in torch.randperm(len(x_train)).split(BATCH):
            x = x_train[batch] + NOISE * torch.randn(len(batch), x_train.shape[1])
            start = time.perf_counter()
            loss = cross_entropy(model(x), y_train[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step_seconds.append(time.perf_counter() - start)
            schedule.step()
            total += loss.item() * len(batch)
        run.losses.append(total / len(x_train))
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
    with torch.no_grad():
        run.accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
    return run


def kan_layers(model: KAN) -> list[KANLayer]:
    """The layers with their type."""
    return [layer for layer in model.layers if isinstance(layer, KANLayer)]


def importance(model: KAN, x: Tensor) -> list[Tensor]:
    """How much of the outputs' variation each edge carries: one (in, out) tensor per layer, for inputs x (N, in).

    From the last layer back: an edge's share of its node, by standard deviations, times the node's own score, as pykan
    attributes (Z. Liu et al., "KAN 2.0", arXiv 2408.10205, section 4.1).
    """
    layers, inputs = kan_layers(model), [x]
    for layer in layers[:-1]:
        inputs.append(layer(inputs[-1]))
    scores: list[Tensor] = []
    node_score = torch.ones(layers[-1].out_features)
    for layer, value in zip(reversed(layers), reversed(inputs), strict=True):
        edges = layer.edge_values(value)
        scores.insert(0, node_score * edges.std(0) / edges.sum(1).std(0))
        node_score = scores[0].sum(1)
    return scores


def plot_edge(axes: Any, function: Callable[[Tensor], Tensor], values: Tensor, color: str, title: str) -> None:
    """One edge function, its mean taken off, over the range of its inputs values (N,) and their histogram."""
    low, high = torch.quantile(values, torch.tensor([0.005, 0.995])).tolist()
    x = torch.linspace(low, high, 300)
    y = function(x)
    axes.plot(x, y - y.mean(), color=color, lw=2)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.margins(x=0.02, y=0.12)
    axes.axhline(0, color="0.85", lw=0.8, zorder=0)
    axes.axvspan(max(low, -1), min(high, 1), color="0.5", alpha=0.08, lw=0, zorder=0)
    below = axes.inset_axes((0, 0, 1, 0.22), zorder=0)
    below.hist(values.clamp(low, high), bins=30, color="0.7")
    below.set_xlim(axes.get_xlim())
    below.axis("off")


def plot_layer(figure: Any, layer: KANLayer, scores: Tensor, x: Tensor, color: str, title: str, names: tuple[str, str]) -> None:
    """The eight edges of the highest scores (in, out), with the inputs x (N, in) of the layer."""
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(2, 4)
    for axes, flat in zip(panels.flat, scores.flatten().argsort(descending=True).tolist(), strict=False):
        i, j = divmod(flat, scores.shape[1])
        source = f"pixel ({i // 8}, {i % 8})" if names[0] == "pixel" else f"{names[0]} {i}"
        plot_edge(axes, layer.edge(i, j), x[:, i], color, f"{source} → {names[1]} {j}")
    for axes in panels[:, 0]:
        axes.set_ylabel("output", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("input", fontsize=8)


@torch.no_grad()
def picture(fused: Run, reference: Run, x: Tensor, path: Path) -> None:
    """Loss curves, the pixels that matter, and the most important edges of both layers."""
    figure: Any = plt.figure(figsize=(15, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.4])
    upper, lower = right.subfigures(2, 1)

    axes, pixels = left.subplots(2, 1)
    epochs = range(1, len(fused.losses) + 1)
    for run, style in ((fused, {"lw": 5, "alpha": 0.35}), (reference, {"lw": 1.5, "ls": "--", "color": "k"})):
        label = f"{run.backend}: {run.accuracy:.1%} on test, {run.milliseconds:.2f} ms/step"
        axes.plot(epochs, run.losses, label=label, **style)
    axes.set(title=f"KAN {WIDTHS}, {len(x)} images", xlabel="epoch", ylabel="training loss (smoothed cross-entropy)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)

    scores = importance(fused.model, x)
    image = pixels.imshow(scores[0].sum(1).view(8, 8), cmap="viridis")
    pixels.set(title="Importance of each pixel", xticks=range(8), yticks=range(8), xlabel="column", ylabel="row")
    left.colorbar(image, ax=pixels, shrink=0.9)

    first, second = kan_layers(fused.model)
    plot_layer(upper, first, scores[0], x, "C0", "Most important edges of the first layer", ("pixel", "hidden"))
    title = "Most important edges of the second layer (shaded: the range of the spline grid; straight beyond it)"
    plot_layer(lower, second, scores[1], first(x), "C1", title, ("hidden", "digit"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Trains, compares, draws; the exit status says whether both reached the required accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "digits.png")
    arguments = parser.parse_args()

    best = available_backends("cpu")[0]
    if best == "reference":
        print(f"There is no fused backend to compare with:\n\n{report()}")
        return 1
    data = load()
    fused, reference = (train(name, data, arguments.epochs, arguments.seed) for name in (best, "reference"))

    print(f"\n{torch.get_num_threads()} CPU threads, batches of {BATCH}")
    print(f"{'backend':<12}{'test accuracy':>14}{'training loss':>15}{'time per step':>15}")
    for run in (fused, reference):
        print(f"{run.backend:<12}{run.accuracy:>14.2%}{run.losses[-1]:>15.4f}{run.milliseconds:>12.3f} ms")
    print(f"The fused backend takes {fused.milliseconds / reference.milliseconds:.2f} of the reference's time.")
    picture(fused, reference, data[0], arguments.output)
    print(f"Picture: {arguments.output}")

    if min(fused.accuracy, reference.accuracy) < REQUIRED_ACCURACY:
        print(f"FAILED: test accuracy below {REQUIRED_ACCURACY:.0%}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
