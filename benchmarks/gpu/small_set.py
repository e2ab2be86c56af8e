"""A small set of layers on every backend of a device: right against float64, and the same bits every time.

Small enough for compute-sanitizer. Ends with 1 if anything is wrong. `python -m benchmarks.gpu.small_set --help`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import kan_fast
from benchmarks import cases, gate
from benchmarks.cases import DTYPES, Shape
from kan_fast.backends import NAMES

SHAPES = [
    Shape(70, 37, 45, 5, 3),  # no size a multiple of a tile
    Shape(130, 64, 64, 20, 3),
    Shape(33, 5, 1, 5, 2),  # narrow
    Shape(257, 2, 5, 3, 1),
    Shape(64, 16, 24, 8, 4),
    Shape(1, 8, 8, 5, 3),
]


def make(shape: Shape, backend: str, dtype: torch.dtype, device: str, bent: bool) -> kan_fast.KANLayer:
    torch.manual_seed(0)
    layer = kan_fast.KANLayer(
        shape.in_features, shape.out_features, shape.grid_size, shape.spline_order, backend=backend
    ).to(device=device, dtype=dtype)
    if bent:
        layer.grid.copy_(cases.non_uniform_grid(layer.grid.cpu(), shape.spline_order))
    return layer


def third_derivative(layer: kan_fast.KANLayer, x: Tensor) -> Tensor:
    """d^3 sum(y) / dx^3, through three backward passes."""
    value = x.detach().requires_grad_()
    result: Tensor = layer(value).sum()
    for _ in range(3):
        (result,) = torch.autograd.grad(result.sum(), value, create_graph=True)
    return result


def check(shape: Shape, backend: str, dtype_name: str, device: str, bent: bool, repeats: int) -> list[str]:
    """What is wrong with this case; empty if nothing."""
    dtype = DTYPES[dtype_name]
    layer = make(shape, backend, dtype, device, bent)
    # A third of the inputs lie outside the grid.
    x = (cases.uniform_input(shape.batch, shape.in_features, device=device) * 1.5).to(dtype)
    cotangent = cases.uniform_input(shape.batch, shape.out_features, dtype=dtype, device=device, seed=1)
    wrong = []
    verdict = gate.judge(layer, x, cotangent)
    if not verdict.right:
        wrong.append(f"error {verdict.error:.1e}, allowed {verdict.allowed:.1e}")
    if dtype == torch.float32 and shape.spline_order >= 3:
        truth = third_derivative(gate.with_backend(layer, "reference", torch.float64), x.double())
        plain = gate.relative_error(third_derivative(gate.with_backend(layer, "reference"), x), truth)
        ours = gate.relative_error(third_derivative(layer, x), truth)
        if ours > 2 * plain + 1e-4:
            wrong.append(f"third derivative: error {ours:.1e}, the reference's {plain:.1e}")
    first = gate.outputs_and_gradients(layer, x, cotangent)
    for _ in range(repeats):
        again = gate.outputs_and_gradients(layer, x, cotangent)
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            wrong.append("results differ from one run to the next")
            break
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="runs that must give the same bits")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--first", type=int, default=len(SHAPES), help="only so many of the shapes")
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=NAMES, help="only these, where they are available")
    given = parser.parse_args()
    failures = count = 0
    for dtype_name in given.dtype:
        available = kan_fast.available_backends(given.device, DTYPES[dtype_name])
        for backend in (name for name in available if name in given.backends):
            for shape in SHAPES[: given.first]:
                for bent in (False, True):
                    count += 1
                    wrong = check(shape, backend, dtype_name, given.device, bent, given.repeats)
                    failures += bool(wrong)
                    grid = "non-uniform" if bent else "uniform"
                    if wrong:
                        print(f"WRONG {backend} {dtype_name} {shape}, {grid} grid: {'; '.join(wrong)}", flush=True)
    print(f"{count - failures} of {count} cases right on {given.device}", flush=True)
    return 1 if failures or not count else 0


if __name__ == "__main__":
    raise SystemExit(main())
