"""Pictures: the network as a diagram of its edge functions, the edges of one layer, and a training run."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kan_fast.checks import expect
from kan_fast.history import History
from kan_fast.nn import KAN, KANLayer
from kan_fast.pruning import _alive, edge_scores
from kan_fast.traverse import Data, kan_layers, layer_inputs, network_layers

_INK, _ACCENT, _FAINT = "#1f2933", "#c2410c", "#9aa5b1"


def _pyplot() -> ModuleType:
    try:
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'kan_fast[plot]'") from error
    module: ModuleType = pyplot
    return module


def plot_kan(
    model: KAN,
    data: Data | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    max_edges: int = 60,
    threshold: float = 0.0,
    title: str | None = None,
    ax: Any = None,
) -> Any:
    """The network from the inputs at the bottom to the outputs at the top, with the curve of every edge in a small box.

    An edge is the darker the more it gives to the outputs. With data (inputs (N, in), or an iterable of inputs or
    (input, ...) tuples) that is its attribution (edge_scores), and a curve spans what the edge sees; without data it is the
    norm of its coefficients, and a curve spans the grid's range. Edges that score below `threshold` of the strongest are
    left out, and of the rest all but the max_edges strongest, as are nodes without edges; the title then says how many.
    Masked edges are never drawn. Returns the matplotlib Axes; `ax` draws into one that exists.
    """
    if not isinstance(model, KAN):
        raise TypeError(f"model: expected a KAN, got {type(model).__name__}")
    layers = network_layers(model)
    scores = list(edge_scores(model, data, None if data is None else "attribution").values())
    ranges = _ranges(model, data)
    chosen, total = _strongest(layers, scores, max_edges, threshold)
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    # Inputs and outputs are drawn even without edges, if there are few.
    starts = [{i for at, i, _ in chosen if at == depth} for depth in range(len(widths))]
    ends = [{o for at, _, o in chosen if at == depth - 1} for depth in range(len(widths))]
    nodes = [sorted(start | end) for start, end in zip(starts, ends)]
    for depth in (0, -1):
        if widths[depth] <= 12:
            nodes[depth] = list(range(widths[depth]))
    counts = [max(1, sum(e[0] == d for e in chosen)) for d in range(len(layers))]
    span = max(2.0, max(counts) * 1.0, max(len(n) for n in nodes) * 1.2)
    if ax is None:
        size = min(16.0, max(4.5, 0.85 * span)), min(14.0, 1.2 + 2.3 * len(layers))
        _, ax = _pyplot().subplots(figsize=size, layout="constrained")
    places = [_spread(node, span) for node in nodes]
    strongest = max((float(scores[d][i, o]) for d, i, o in chosen), default=1.0) or 1.0
    for depth in range(len(layers)):
        edges = [edge for edge in chosen if edge[0] == depth]
        _draw_layer(ax, layers[depth], depth, edges, places, span, scores[depth], strongest, ranges)
    below = input_names or [f"$x_{{{i}}}$" for i in range(widths[0])]
    _draw_nodes(ax, places, [below, output_names or [f"$y_{{{i}}}$" for i in range(widths[-1])]])
    if title is None and len(chosen) < total:
        title = f"{len(chosen)} of {total} edges"
    if title:
        ax.set_title(title, color=_INK, fontsize=11)
    ax.set_xlim(-0.6, span + 0.6)
    ax.set_ylim(-0.35, len(layers) + 0.35)
    ax.axis("off")
    return ax


def plot_layer(
    layer: KANLayer,
    x: Tensor | None = None,
    *,
    max_edges: int = 16,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    figure: Any = None,
) -> Any:
    """The curves of a layer's edges, each with the knots of its grid as ticks, and with a histogram of the data behind it.

    x (N, in): data that the layer sees (traverse.layer_inputs gives them for a layer inside a network). Of more than
    max_edges living edges the ones with the largest norm are drawn. Returns the matplotlib Figure.
    """
    if x is not None and (x.dim() != 2 or x.shape[1] != layer.in_features):
        raise ValueError(f"x: expected shape (N, {layer.in_features}), got {tuple(x.shape)}")
    score = edge_scores(layer, x)[""]
    chosen, total = _strongest([layer], [score], max_edges, 0.0)
    columns = min(4, max(1, len(chosen)))
    rows = -(-max(1, len(chosen)) // columns)
    if figure is None:
        figure = _pyplot().figure(figsize=(2.9 * columns, 2.2 * rows + 0.4), layout="constrained")
    k = layer.spline_order
    for number, (_, i, o) in enumerate(chosen):
        ax = figure.add_subplot(rows, columns, number + 1)
        knots = layer.grid[i, k : k + layer.grid_size + 1].detach().cpu().numpy()
        low, high = float(knots[0]), float(knots[-1])
        if x is not None:
            seen = x[:, i].detach().cpu().double()
            low, high = min(low, float(seen.min())), max(high, float(seen.max()))
            behind = ax.twinx()
            behind.hist(seen.numpy(), bins=40, color=_FAINT, alpha=0.35, linewidth=0)
            behind.set_yticks([])
            behind.set_frame_on(False)
            ax.set_zorder(behind.get_zorder() + 1)
            ax.patch.set_visible(False)
        at, values = _curve(layer, i, o, low, high)
        ax.plot(at, values, color=_INK, linewidth=1.6)
        # Knots as marks on the bottom edge of the box.
        marks = {"color": _ACCENT, "markersize": 7, "transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(knots, 0 * knots, "|", **marks)
        left = input_names[i] if input_names is not None else f"in {i}"
        right = output_names[o] if output_names is not None else f"out {o}"
        ax.set_title(f"{left} → {right}", fontsize=9, color=_INK)
        ax.tick_params(labelsize=7)
    if len(chosen) < total:
        figure.suptitle(f"{len(chosen)} strongest of {total} edges", fontsize=10, color=_INK)
    return figure


def plot_history(history: History, *, ax: Any = None) -> Any:
    """Train and validation loss against the epoch on a logarithmic axis, the best epoch marked. Returns the matplotlib Axes."""
    expect(isinstance(history, History), "history", "a History, which train_kan returns", history)
    if ax is None:
        _, ax = _pyplot().subplots(figsize=(6, 3.6), layout="constrained")
    epochs = range(len(history.train_losses))
    ax.plot(epochs, history.train_losses, color=_INK, linewidth=1.5, label="train")
    if history.val_losses != history.train_losses:
        ax.plot(epochs, history.val_losses, color=_ACCENT, linewidth=1.5, label="validation")
    if history.best_epoch >= 0:
        ax.plot(history.best_epoch, history.best_loss, "o", color=_ACCENT, markersize=5, label=f"best: {history.best_loss:.3g}")
    if all(value > 0 for value in [*history.train_losses, *history.val_losses]):
        ax.set_yscale("log")
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(_pyplot().MaxNLocator(integer=True))  # no half epochs
    ax.set_ylabel("loss")
    ax.grid(True, color="#e4e7eb", linewidth=0.7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False)
    return ax


def _ranges(model: KAN, data: Data | None) -> list[tuple[Tensor, Tensor]]:
    """Lowest and highest value of every input of every layer: in the data, or the range of the grid."""
    if data is not None:
        return [(x.min(0).values, x.max(0).values) for x in layer_inputs(model, data, 2048).values()]
    result = []
    for layer in kan_layers(model).values():
        k = layer.spline_order
        result.append((layer.grid[:, k], layer.grid[:, k + layer.grid_size]))
    return result


def _strongest(
    layers: Sequence[KANLayer], scores: Sequence[Tensor], max_edges: int, threshold: float
) -> tuple[list[tuple[int, int, int]], int]:
    """The edges to draw as (layer, input, output) in that order, and how many living edges there are."""
    if max_edges < 1:
        raise ValueError(f"max_edges: expected 1 or more, got {max_edges}")
    ranked = []
    total = 0
    top = max((float(score.max()) for score in scores if score.numel()), default=0.0)
    for depth, (layer, score) in enumerate(zip(layers, scores)):
        alive = _alive(layer)
        total += int(alive.sum())
        value = torch.where(alive & (score >= threshold * top), score, -1.0)
        best = value.flatten().topk(min(max_edges, value.numel()))
        for strength, place in zip(best.values.tolist(), best.indices.tolist()):
            if strength >= 0:
                ranked.append((strength, (depth, place // layer.out_features, place % layer.out_features)))
    ranked.sort(key=lambda pair: -pair[0])
    return sorted(edge for _, edge in ranked[:max_edges]), total


def _spread(nodes: list[int], span: float) -> dict[int, float]:
    """Places of nodes along a line of that length."""
    gap = span / max(1, len(nodes))
    return {node: gap * (rank + 0.5) for rank, node in enumerate(nodes)}


def _draw_layer(
    ax: Any,
    layer: KANLayer,
    depth: int,
    edges: list[tuple[int, int, int]],
    places: list[dict[int, float]],
    span: float,
    score: Tensor,
    strongest: float,
    ranges: list[tuple[Tensor, Tensor]],
) -> None:
    """One layer between the heights depth and depth + 1: boxes at mid height, ordered by input, then output."""
    boxes = _spread(list(range(len(edges))), span)
    half = min(0.36, 0.42 * span / max(1, len(edges)))
    low, high = ranges[depth]
    # Data coordinates are stretched differently in x and y; the boxes look square all the same.
    height = min(0.17, 0.5 * half)
    for number, (_, i, o) in enumerate(edges):
        middle = boxes[number]
        # Even the weakest edge that is drawn can be seen.
        alpha = 0.15 + 0.85 * min(1.0, float(score[i, o]) / strongest) ** 0.5
        line = {"color": _INK, "alpha": alpha, "linewidth": 1.2, "zorder": 1}
        ax.plot([places[depth][i], middle], [depth, depth + 0.5 - height], **line)
        ax.plot([middle, places[depth + 1][o]], [depth + 0.5 + height, depth + 1], **line)
        box = _pyplot().Rectangle((middle - half, depth + 0.5 - height), 2 * half, 2 * height)
        box.set(facecolor="white", edgecolor=(*_rgb(_INK), alpha), linewidth=0.9, zorder=2)
        ax.add_patch(box)
        at, values = _curve(layer, i, o, float(low[i]), float(high[i]))
        width = float(at[-1] - at[0]) or 1.0
        reach = float(values.max() - values.min())
        curve_x = middle + half * 0.86 * (2 * (at - at[0]) / width - 1)
        curve_y = depth + 0.5 + (height * 0.8 * (2 * (values - values.min()) / reach - 1) if reach > 0 else 0 * values)
        ax.plot(curve_x, curve_y, color=_ACCENT, alpha=alpha, linewidth=1.5, zorder=3)


def _draw_nodes(ax: Any, places: list[dict[int, float]], names: list[Sequence[str]]) -> None:
    for depth, row in enumerate(places):
        ax.plot(list(row.values()), [depth] * len(row), "o", color=_INK, markersize=6, zorder=4, clip_on=False)
    for node, place in places[0].items():
        ax.text(place, -0.12, names[0][node], ha="center", va="top", fontsize=10, color=_INK)
    for node, place in places[-1].items():
        ax.text(place, len(places) - 1 + 0.12, names[1][node], ha="center", va="bottom", fontsize=10, color=_INK)


@torch.no_grad()
def _curve(layer: KANLayer, i: int, o: int, low: float, high: float) -> tuple[Any, Any]:
    """Points of one edge's function: two NumPy arrays (200,)."""
    x = torch.linspace(low, high, 200, dtype=layer.spline_weight.dtype, device=layer.spline_weight.device)
    return x.double().cpu().numpy(), layer.edge(i, o)(x).double().cpu().numpy()


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[p : p + 2], 16) / 255 for p in (1, 3, 5))
    return red, green, blue
