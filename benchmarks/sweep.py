"""How times grow with the batch, the width, the grid and the spline order, around one shape."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from benchmarks import layer
from benchmarks.cases import Shape
from benchmarks.options import Options, count

Row = dict[str, Any]
CENTRE = {"cpu": Shape(1024, 256, 256, 5), "cuda": Shape(8192, 1024, 1024, 5)}
VALUES = {
    "batch": [1, 4, 16, 64, 256, 1024, 4096, 16384],
    "width": [8, 16, 32, 64, 128, 256, 512, 1024],
    "grid_size": [3, 5, 10, 20, 40, 80],
    "spline_order": [0, 1, 2, 3, 4, 5],
}
CUDA_VALUES = {"batch": [64, 256, 1024, 4096, 16384, 65536], "width": [16, 64, 256, 512, 1024, 2048, 4096]}
PEERS = ["cox-de-boor", "efficient-kan", "inkan eager", "fast-kan"]  # no compilation for each of the points
MOST = 2**33  # batch * parameters of a point, above which plain PyTorch needs more time and memory than it is worth


def points(axis: str, device: str) -> list[tuple[int, Shape]]:
    """(value, shape) along one axis."""
    centre = CENTRE[device]
    values = CUDA_VALUES.get(axis, VALUES[axis]) if device == "cuda" else VALUES[axis]
    if axis == "width":
        return [(value, replace(centre, in_features=value, out_features=value)) for value in values]
    return [(value, replace(centre, **{axis: value})) for value in values]


def check(shapes: list[Shape] | None, axes: list[str] | None, device: str) -> None:
    """Raise ValueError for a shape that no axis passes through: nothing would be measured for it."""
    axes = axes or list(VALUES)
    known = {shape: None for axis in axes for _, shape in points(axis, device)}
    for shape in shapes or []:
        if shape not in known:
            listed = " ".join(point.key() for point in known)
            raise ValueError(f"expected points of {', '.join(axes)} on {device} ({listed}), got {shape.key()}")


def run(options: Options) -> list[Row]:
    """Forward and step of every point of `options.axes` (all four without), or of those among them in `options.shapes`."""
    check(options.shapes, options.axes, options.device)
    rows: list[Row] = []
    chosen = [
        (axis, value, shape)
        for axis in options.axes or list(VALUES)
        for value, shape in points(axis, options.device)
        if options.shapes is None or shape in options.shapes
    ]
    for at, (axis, value, shape) in enumerate(chosen, 1):
        peers = PEERS if options.peers is None else options.peers
        if options.device == "cpu" and shape.batch * shape.parameters > MOST:
            peers = []
        one = replace(
            options, shapes=[shape], peers=peers, phases=options.phases or ["forward", "step"],
            emit=functools.partial(_emit_point, options, axis, value),
            progress=functools.partial(_progress_point, options, count(at, len(chosen))),
        )  # fmt: skip
        rows += _of_point(layer.run(one), axis, value)
    return rows


def _of_point(found: list[Row], axis: str, value: int) -> list[Row]:
    return [{**row, "what": "sweep", "axis": axis, "value": value} for row in found]


def _emit_point(options: Options, axis: str, value: int, found: list[Row]) -> None:
    options.emit(_of_point(found, axis, value))


def _progress_point(options: Options, prefix: str, text: str) -> None:
    options.progress(prefix + text)
