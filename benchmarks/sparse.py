"""Time of a sparse layer's step against the number of its edges, beside the dense layer of the same widths.

Run: python -m benchmarks.sparse

If cost follows the edges, the time per edge is the same in every row, whatever the widths, and so is the memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from kan_fast import KANLayer, SparseKANLayer

BATCH = 256
FAN_IN = 16
# (in, out)
SHAPES = ((256, 256), (1024, 1024), (4096, 1024), (65536, 1024), (65536, 4096))
# Above this many weights the dense layer is not tried.
DENSE_LIMIT = 2**26


def main(shapes: tuple[tuple[int, int], ...] = SHAPES, batch: int = BATCH) -> list[tuple[int, float]]:
    """Print the table; returns (edges, seconds per step) of every row."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"float32, batch {batch}, fan-in {FAN_IN}, forward and backward, one thread\n")
    print("| in x out | edges | parameters | step, ms | ns per edge and row | dense parameters | dense step, ms |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for width, height in shapes:
        layer = SparseKANLayer(width, height, FAN_IN)
        x = torch.rand(batch, width) * 2 - 1
        check(layer, x)
        took = seconds(layer, x)
        edges = layer.edges.shape[1]
        weights = width * height * 9
        dense = seconds(KANLayer(width, height), x) if weights <= DENSE_LIMIT else None
        print(
            f"| {width} x {height} | {edges} | {count(layer)} | {1e3 * took:.1f} | {1e9 * took / edges / batch:.2f}"
            f" | {weights} | {'too large' if dense is None else f'{1e3 * dense:.1f}'} |",
            flush=True,
        )
        rows.append((edges, took))
    return rows


def count(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def check(layer: SparseKANLayer, x: torch.Tensor) -> None:
    """Eight outputs against the dense layer of those outputs and of the inputs that they hear."""
    few = layer.edges[:, layer.edges[1] < 8]
    heard, place = few[0].unique(return_inverse=True)
    part = SparseKANLayer(len(heard), 8, edges=torch.stack([place, few[1]]))
    with torch.no_grad():
        part.spline_weight.copy_(layer.spline_weight[: few.shape[1]])
        assert part.base_weight is not None and layer.base_weight is not None
        part.base_weight.copy_(layer.base_weight[: few.shape[1]])
        torch.testing.assert_close(layer(x)[:, :8], part.to_dense()(x[:, heard]))


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """Median of up to seven steps, of fewer if they take more than two seconds."""

    def step() -> None:
        layer.zero_grad()
        layer(x).square().sum().backward()

    return median(step)


def median(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    while not times or (len(times) < 7 and sum(times) < 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
