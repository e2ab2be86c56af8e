"""The three contractions of a layer alone, without autograd: what the launch tables of csrc and tiles.py are judged by."""

from __future__ import annotations

from typing import Any

import torch

import kan_fast
from benchmarks import cases, gate, timing, timing_cuda
from benchmarks.cases import DTYPES, Shape
from benchmarks.options import Options, count
from benchmarks.timing import Call
from kan_fast import backends

Row = dict[str, Any]
SHAPES = [
    Shape(batch, width, width, 5)
    for width, batches in ((64, (16, 64, 256, 1024, 4096)), (256, (64, 256, 1024, 4096)), (1024, (256, 1024, 16384)))
    for batch in batches
] + [Shape(64, 784, 64, 5), Shape(256, 784, 64, 5)]
CALLS = 20  # to a CUDA graph: one after another, so that replaying it costs none of them a launch


def contractions(layer: kan_fast.KANLayer, x: torch.Tensor, g: torch.Tensor) -> dict[str, Call]:
    """Calls by name, each with the orders of a first backward: x (batch, in), g (batch, out)."""
    module = backends.get(backends.choose(layer.backend, x.device, layer.spline_weight.dtype))
    weights = layer.spline_weight.detach(), layer.base_weight.detach() if layer.base_weight is not None else None
    grid, order = layer.grid, layer.spline_order
    modes = layer.base_activation, layer.outside
    return {
        "output": lambda: module.contract_output(x, None, *weights, grid, *modes, 0),
        "input": lambda: module.contract_input(x, *weights, g, grid, *modes, 1),
        "weight": lambda: module.contract_weight(x, None, g, grid, order, *modes, 0),
    }


def measure(shape: Shape, dtype: torch.dtype, options: Options) -> Row:
    """Microseconds of each contraction, its operands in the cache, and of the product of equal size by torch."""
    torch.manual_seed(0)
    layer = kan_fast.KANLayer(
        shape.in_features, shape.out_features, shape.grid_size, shape.spline_order, backend=options.one_backend()
    ).to(options.device, dtype)
    x = cases.uniform_input(shape.batch, shape.in_features, device=options.device).to(dtype)
    g = cases.uniform_input(shape.batch, shape.out_features, dtype=dtype, device=options.device, seed=1)
    row: Row = {
        "what": "contractions", "backend": options.one_backend(), "shape": shape.key(), "dtype": str(dtype).split(".")[1],
    }  # fmt: skip
    verdict = gate.judge(layer, x, g)
    if not verdict.right:
        return {**row, "failed": f"error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"}
    calls = contractions(layer, x, g)
    depth = shape.in_features * (shape.grid_size + shape.spline_order + 1)
    left = torch.randn(shape.batch, depth, device=options.device).to(dtype)
    right = torch.randn(depth, shape.out_features, device=options.device).to(dtype)
    calls["matmul"] = lambda: left @ right
    if options.device == "cuda":
        repeated = {name: timing_cuda.graph(_repeat(call)) for name, call in calls.items()}
        found = timing_cuda.time_interleaved(repeated, budget=options.seconds, flush=False)
        row.update({f"{name}_us": each.median * 1e6 / CALLS for name, each in found.items()})
    else:
        found = timing.time_interleaved(calls, budget=options.seconds)
        row.update({f"{name}_us": each.median * 1e6 for name, each in found.items()})
    return row


def _repeat(call: Call) -> Call:
    def repeated() -> None:
        for _ in range(CALLS):
            call()

    return repeated


def run(options: Options) -> list[Row]:
    rows = []
    chosen = [(dtype, shape) for dtype in options.dtypes for shape in options.shapes or SHAPES]
    for at, (dtype, shape) in enumerate(chosen, 1):
        options.progress(f"{count(at, len(chosen))}contractions {shape} {dtype}")
        row = measure(shape, DTYPES[dtype], options)
        rows.append(row)
        said = row.get("failed") or ", ".join(f"{key[:-3]} {row[key]:.2f} us" for key in row if key.endswith("_us"))
        options.report(f"{shape}, {dtype}: {said}")
        options.emit([row])
    return rows
