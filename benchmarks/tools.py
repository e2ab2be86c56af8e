"""The tools against the loop over edges that they spare: python -m benchmarks.tools

Each loop is written with the same mathematics, SciPy where SciPy has it, and its result is checked before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import BSpline

from kan_fast import KAN, activation_regularization, edge_scores, fit_symbolic_function
from kan_fast.grid import _moved_grid, _refit_matrix, insert_knots
from kan_fast.spline import bases
from kan_fast.symbolic.fit import fit_edges

ORDER = 3


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = KAN([32, 32], grid_size=8, dtype=torch.float64)
    layer = model.layers[0]
    x = torch.randn(2000, 32, dtype=torch.float64)
    edges = [(i, o) for i in range(32) for o in range(32)]
    print(f"{len(edges)} edges, 2000 samples, float64, one thread\n")
    print("| tool | batched | loop over edges | ratio |\n|---|---:|---:|---:|")
    for name, batched, loop, tolerance in (
        ("edge scores on data", lambda: edge_scores(model, x)["layers.0"], lambda: loop_scores(layer, x, edges), 1e-9),
        ("activation penalty", lambda: activation_regularization(model, x), lambda: loop_penalty(layer, x, edges), 1e-9),
        ("knot insertion", *knot_insertion(layer), 1e-9),
        ("moving the grid", *grid_update(layer, x), 1e-2),
        ("symbolic fits, 5 candidates, 64 edges", *symbolic(layer, x), 1e-6),
    ):
        ours, theirs = batched(), loop()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))
        fast, slow = seconds(batched), seconds(loop)
        print(f"| {name} | {1e3 * fast:.1f} ms | {1e3 * slow:.0f} ms | {slow / fast:.0f} x |", flush=True)


def seconds(call: Callable[[], object]) -> float:
    """Median of up to five calls, one if it takes more than two seconds."""
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) < 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def loop_scores(layer, x, edges):
    with torch.no_grad():
        values = [layer.edge(i, o)(x[:, i]).square().mean().sqrt() for i, o in edges]
    return torch.stack(values).view(layer.in_features, layer.out_features)


def loop_penalty(layer, x, edges):
    sizes = torch.stack([layer.edge(i, o)(x[:, i]).abs().mean() for i, o in edges])
    share = sizes / sizes.sum()
    return sizes.sum() - (share * share.log()).sum()


def knot_insertion(layer):
    old, weight = layer.grid, layer.spline_weight.detach()
    inner = old[:, ORDER : ORDER + layer.grid_size + 1]
    middles = (inner[:, 1:] + inner[:, :-1]) / 2
    new = torch.cat([old, middles], 1).sort(1).values

    def loop():
        pad = np.arange(1, ORDER + 1)
        result = weight.new_empty(layer.in_features, new.shape[1] - ORDER - 1, layer.out_features)
        for i in range(layer.in_features):
            knots = old[i].numpy()
            knots = np.concatenate([knots[0] - pad[::-1], knots, knots[-1] + pad])
            for o in range(layer.out_features):
                spline = BSpline(knots, np.pad(weight[i, :, o].numpy(), ORDER), ORDER)
                for knot in middles[i].tolist():
                    spline = spline.insert_knot(knot)
                result[i, :, o] = torch.as_tensor(spline.c[ORDER : ORDER + result.shape[1]])
        return result

    return lambda: insert_knots(weight, old, new), loop


def grid_update(layer, x):
    """Old splines refitted on moved knots; compared by the values on the data, which least squares determines."""
    old, weight = layer.grid, layer.spline_weight.detach()
    new = _moved_grid(x, old, ORDER, 0.5, 0.01)
    old_values, new_values = bases(x, old, ORDER, "zero", 0), bases(x, new, ORDER, "zero", 0)

    def batched():
        refitted = torch.bmm(_refit_matrix(x, old, new, ORDER, "zero"), weight)
        return torch.bmm(new_values.transpose(0, 1), refitted)

    def loop():
        values = []
        for i in range(layer.in_features):
            design = bases(x[:, i : i + 1], new[i : i + 1], ORDER, "zero", 0)[:, 0].numpy()
            for o in range(layer.out_features):
                target = (old_values[:, i] @ weight[i, :, o]).numpy()
                values.append(torch.as_tensor(design @ np.linalg.lstsq(design, target, rcond=None)[0]))
        return torch.stack(values, 1).view(len(x), layer.in_features, layer.out_features).transpose(0, 1)

    return batched, loop


def symbolic(layer, x):
    library = ["x", "x^2", "exp", "sin", "tanh"]
    with torch.no_grad():
        y = layer.edge_values(x[:400])[:, :8, :8].flatten(1)
    inputs = x[:400, :8].repeat_interleave(8, dim=1)

    def batched():
        return torch.tensor([fit.r2 for fit in fit_edges(inputs, y, library)])

    def loop():
        return torch.tensor([fit_symbolic_function(inputs[:, e], y[:, e], library).r2 for e in range(64)])

    return batched, loop


if __name__ == "__main__":
    main()
