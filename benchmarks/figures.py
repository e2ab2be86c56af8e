"""The pictures: how times grow, how far from the machine's ceilings, rivals side by side, training curves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import ceilings
from benchmarks.cases import BARS, DTYPES, Shape
from benchmarks.layer import CUDA_SHAPES
from benchmarks.merge import Row, latest, setting

NOTE = "rivals are left out where plain PyTorch would need seconds a call"
AXES = {"batch": "batch", "width": "width (in = out)", "grid_size": "grid size G", "spline_order": "spline order k"}
COLOURS = {
    "kan_fast native": "#c0392b", "kan_fast triton": "#e67e22", "kan_fast reference": "#f5b7b1", "linear equal": "#222222",
    "linear": "#999999", "cox-de-boor": "#8e44ad", "cox-de-boor compiled": "#bb8fce", "efficient-kan": "#2471a3",
    "inkan": "#1e8449", "inkan eager": "#7dcea0", "flashkan": "#b7950b", "fast-kan": "#5dade2", "kanditioned": "#707b7c",
    "pykan": "#34495e",
}


def _of_one_setting(rows: list[Row]) -> list[Row]:
    """The rows of the device, threads and torch that most are of: lines and bars of several would run into one another."""
    counts = Counter(setting(row) for row in rows)
    return [row for row in rows if setting(row) == counts.most_common(1)[0][0]]


def _style(name: str) -> dict[str, Any]:
    ours = name.startswith("kan_fast")
    return {"color": COLOURS.get(name, "#555555"), "linewidth": 2.4 if ours else 1.3, "zorder": 3 if ours else 2,
            "marker": "o", "markersize": 4 if ours else 3}


def _where(rows: list[Row]) -> str:
    first = rows[0]
    return f"{first['device_name']}, {first['threads']} threads, {first['dtype']}"


def scaling(rows: list[Row], folder: Path) -> list[Path]:
    """Forward and step along every axis that was swept; one picture a device."""
    made = []
    swept = latest(rows, what="sweep")
    for device in dict.fromkeys(row["device"] for row in swept):
        mine = _of_one_setting([row for row in swept if row["device"] == device])
        axes_present = [axis for axis in AXES if any(row["axis"] == axis for row in mine)]
        figure, grid = plt.subplots(2, len(axes_present), figsize=(4.1 * len(axes_present), 7), squeeze=False)
        for column, axis in enumerate(axes_present):
            for line, phase in enumerate(("forward", "step")):
                _scaling_panel(grid[line][column], [row for row in mine if row["axis"] == axis], axis, phase)
        handles: dict[str, Any] = {}
        for panel in grid.flat:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=len(handles), frameon=False,
                      bbox_to_anchor=(0.5, 0.945), fontsize=9)
        centre = mine[0]["shape"] if len(axes_present) == 1 else "1024 x 256 x 256, G=5, k=3" if device == "cpu" else ""
        figure.suptitle(f"Time of one layer around {centre} ({_where(mine)})\n{NOTE}", fontsize=11)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        made.append(folder / f"scaling_{device}.png")
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made


def _scaling_panel(panel: Axes, rows: list[Row], axis: str, phase: str) -> None:
    for name in dict.fromkeys(row["contestant"] for row in rows):
        points = sorted(
            (row["value"], row[f"{phase}_ms"]) for row in rows if row["contestant"] == name and f"{phase}_ms" in row
        )
        if points:
            panel.plot(*zip(*points, strict=True), label=name, **_style(name))
    if axis != "spline_order":
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({row["value"] for row in rows}))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.tick_params(axis="x", labelsize=8)
    _plain_log(panel)
    panel.set_xlabel(AXES[axis])
    panel.set_ylabel(f"{phase}, ms")
    panel.grid(True, which="major", alpha=0.3)


def _plain_log(panel: Axes) -> None:
    """A logarithmic y axis with plain numbers, also where less than a decade is shown."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    shown = "123456789" if high / low < 4 else "25" if high / low < 30 else ""
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else "")
    panel.tick_params(axis="y", which="both", labelsize=8)


def roofline(rows: list[Row], folder: Path) -> list[Path]:
    """Dense-equivalent FLOP/s over FLOP a byte, under the ceilings of a matrix product and a copy of the same run."""
    made = []
    chosen = [row for row in latest(rows, what="layer") if "matmul_tflops" in row]
    for device in dict.fromkeys(row["device"] for row in chosen):
        for dtype in dict.fromkeys(row["dtype"] for row in chosen if row["device"] == device):
            mine = _of_one_setting([
                row for row in chosen
                if row["device"] == device and row["dtype"] == dtype and (row["ours"] or row["contestant"] == "linear equal")
                and row["contestant"] != "kan_fast reference"
            ])
            if not any("forward_tflops" in row for row in mine):
                continue
            figure, panel = plt.subplots(figsize=(7.5, 5))
            peak = max(row["matmul_tflops"] for row in mine)
            bandwidth = max(row["copy_gbps"] for row in mine) / 1e3
            intensity = [2.0**-3, peak / bandwidth, 2.0**14]
            panel.plot(intensity, [min(peak, bandwidth * x) for x in intensity], color="#222222", linewidth=1.2,
                       label=f"matmul {peak:.3g} TFLOP/s, copy {bandwidth * 1e3:.0f} GB/s")
            for phase, marker in (("forward", "o"), ("step", "s")):
                for name in dict.fromkeys(row["contestant"] for row in mine):
                    points = []
                    for row in mine:
                        if row["contestant"] == name and f"{phase}_tflops" in row:
                            flops, moved = ceilings.work(Shape.parse(row["shape"]), phase, DTYPES[dtype].itemsize)
                            points.append((flops / moved, row[f"{phase}_tflops"]))
                    if points:
                        across, up = zip(*points, strict=True)
                        panel.scatter(across, up, marker=marker, s=34, label=f"{name}, {phase}",
                                      color=COLOURS.get(name, "#555555"), alpha=0.85,
                                      facecolors="none" if phase == "step" else None)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("FLOP of the dense product of equal parameters, a byte that must move")
            panel.set_ylabel("TFLOP/s, dense count")
            panel.set_title(
                f"Rates in terms of the dense product, whose zeros a B-spline layer may skip\n({_where(mine)})", fontsize=10
            )
            panel.grid(True, which="major", alpha=0.3)
            panel.legend(fontsize=8, loc="lower right")
            figure.tight_layout()
            made.append(folder / f"roofline_{device}_{dtype}.png")
            figure.savefig(made[-1], dpi=110)
            plt.close(figure)
    return made


def _ticks(shape: Shape) -> str:
    """A shape in three short lines: neighbours would run into each other in one."""
    grid = str(shape).split(", ", 1)[1]
    return f"{shape.batch}\n{shape.in_features} x {shape.out_features}\n{grid}"


def rivals(rows: list[Row], folder: Path) -> list[Path]:
    """Ratios to the linear layer of equal parameters, all contestants, one group of bars a shape."""
    made = []
    chosen = latest(rows, what="layer")
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        mine = _of_one_setting([row for row in chosen if row["device"] == device and row["dtype"] == dtype
                                and "linear" not in row["contestant"]
                                and row["contestant"] != "kan_fast reference" and "step_ratio" in row])
        if not mine:
            continue
        present = list(dict.fromkeys(Shape.parse(row["shape"]) for row in mine))
        shapes = [shape for shape in (BARS if device == "cpu" else CUDA_SHAPES) if shape in present] or present
        names = list(dict.fromkeys(row["contestant"] for row in mine))
        figure, panels = plt.subplots(2, 1, figsize=(11, 7.5), sharex=True)
        for panel, phase in zip(panels, ("forward", "step"), strict=True):
            for place, name in enumerate(names):
                heights = {row["shape"]: row.get(f"{phase}_ratio") for row in mine if row["contestant"] == name}
                at = [index + (place - len(names) / 2) * 0.85 / len(names) for index, shape in enumerate(shapes)
                      if heights.get(shape.key())]
                panel.bar(at, [heights[shape.key()] for shape in shapes if heights.get(shape.key())],
                          width=0.8 / len(names), color=COLOURS.get(name, "#555555"), label=name)
            panel.axhline(1, color="#222222", linewidth=1)
            _plain_log(panel)
            panel.set_ylim(0.1, panel.get_ylim()[1] * 4)  # room for the legend
            panel.set_ylabel(f"{phase}: time / nn.Linear's\nof equal parameters")
            panel.grid(True, axis="y", alpha=0.3)
        panels[1].set_xticks(range(len(shapes)), [_ticks(shape) for shape in shapes], fontsize=9)
        panels[0].legend(ncol=4, fontsize=8, frameon=False, loc="upper left")
        panels[0].set_title(f"Below 1 is faster than a linear layer of equal parameters ({_where(mine)})", fontsize=11)
        figure.tight_layout()
        made.append(folder / f"rivals_{device}{'' if device == 'cpu' else '_' + dtype}.png")
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made


def training(rows: list[Row], folder: Path) -> list[Path]:
    """Metric over training time, mean and range of the seeds."""
    chosen = _of_one_setting([row for row in latest(rows, what="training") if "step_ms" in row])
    tasks = list(dict.fromkeys(row["task"] for row in chosen))
    if not tasks:
        return []
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 4.3), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for row in (row for row in chosen if row["task"] == task):
            times = [point[0] * row["step_ms"] / 1e3 for point in row["curves"][0]]
            values = [[curve[index][1] for curve in row["curves"]] for index in range(len(times))]
            colour = {"kan": "#c0392b", "mlp": "#222222"}.get(row["model"], "#2471a3")
            grid_size = f", G={row['grid_size']}" if row["grid_size"] else ""
            panel.plot(times, [sum(v) / len(v) for v in values], color=colour, marker="o", markersize=3,
                       label=f"{row['model'][:3].upper()} {row['widths']}{grid_size}, {row['parameters']} parameters")
            panel.fill_between(times, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
        _plain_log(panel)
        panel.set_xlabel("training time, s")
        panel.set_ylabel(row["metric"])
        panel.set_title(task, fontsize=10)
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    figure.tight_layout()
    path = folder / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


FIGURES = (scaling, roofline, rivals, training)
