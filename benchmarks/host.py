"""What a launch costs on the host: planning it (no GPU needed) and, on a GPU, issuing a whole call."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import kan_fast
from benchmarks import cases, steps
from benchmarks.cases import Shape
from benchmarks.options import Options

Row = dict[str, Any]
SHAPES = (Shape(4096, 256, 256), Shape(65536, 2, 5))  # wide and narrow kernels


def planning(shape: Shape, arch: int) -> dict[str, float]:
    """Seconds that the Triton backend plans for, by contraction: sizes, tiles, scratch memory, arguments; no launch.

    Planned for an architecture on CPU tensors, of which only shapes, dtypes and strides are read.
    """
    from benchmarks.offline import target
    from kan_fast.backends.triton import launch

    b, i, o, features = shape.batch, shape.in_features, shape.out_features, shape.features - 1
    x, spline, base = torch.empty(b, i), torch.empty(i, features, o), torch.empty(i, o)
    g, grid = torch.empty(b, o), torch.empty(i, features + shape.spline_order + 1)
    problem = launch.Problem(b, i, features, o, shape.spline_order, "silu", "zero", 0, torch.float32, target(arch))
    slope = replace(problem, n=1)
    return {
        "contract_output": _median(lambda: launch.plan_contract_output(x, None, spline, base, grid, g, problem)),
        "contract_input": _median(lambda: launch.plan_contract_input(x, spline, base, g, grid, x, slope)),
        "contract_weight": _median(lambda: launch.plan_contract_weight(x, None, g, grid, spline, base, problem)),
    }


def _median(call: Callable[[], object], rounds: int = 200) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def issuing(shape: Shape, backend: str) -> dict[str, float]:
    """Seconds until a call returns on a GPU, before it is done: Python, autograd, planning, Triton's own launcher."""
    layer = kan_fast.KANLayer(shape.in_features, shape.out_features, backend=backend, device="cuda")
    x = cases.uniform_input(shape.batch, shape.in_features, device="cuda")
    cotangent = cases.uniform_input(shape.batch, shape.out_features, device="cuda", seed=1)
    found = {}
    for phase, call in (("forward", steps.forward(layer, x)), ("step", steps.step(layer, x, cotangent))):
        times = []
        for _ in range(30):
            torch.cuda.synchronize()  # so that no call waits for a place in the queue
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        found[phase] = statistics.median(times[10:])
    return found


def run(options: Options) -> list[Row]:
    """One row a shape: microseconds of planning by contraction, and of issuing a call by backend."""
    rows: list[Row] = []
    for shape in SHAPES:
        # The shape alone decides which path is planned; a batch of any size is planned in the same time.
        row: Row = {"what": "host", "shape": shape.key(), "dtype": "float32"}
        if importlib.util.find_spec("triton") is not None:
            row |= {f"plan_{name}_us": 1e6 * seconds for name, seconds in planning(shape, 90).items()}
            parts = ", ".join(f"{name[5:-3]} {value:.0f} us" for name, value in row.items() if name.startswith("plan_"))
            options.report(f"planning Triton launches on the host, {shape}: {parts}")
        else:
            options.report("planning Triton launches: not done, the package triton is not installed")
        if options.device == "cuda":
            for backend in kan_fast.available_backends("cuda"):
                for phase, seconds in issuing(shape, backend).items():
                    row[f"issue_{backend}_{phase}_us"] = 1e6 * seconds
                    options.report(f"issuing on the host, {shape}, {backend}, {phase}: {1e6 * seconds:.0f} us")
        else:
            options.report("issuing calls to a GPU: not measured, no GPU is used")
        rows.append(row)
        options.emit(rows[-1:])
    return rows
