"""What the machine reaches: a large matrix product and a large copy, measured in the same run as everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import timing, timing_cuda
from benchmarks.cases import Shape


@dataclass(frozen=True)
class Ceilings:
    """Rates of a square matrix product (FLOP/s) and of a copy (bytes read plus written a second)."""

    flops: float
    bandwidth: float


def measure(device: str, dtype: torch.dtype, seconds: float = 1.0) -> Ceilings:
    """On the CPU 1024^3 and 128 MiB, on a GPU 8192^3 and 1 GiB: large enough to fill either."""
    size, bytes_copied = (8192, 2**30) if device == "cuda" else (1024, 2**27)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(left)
    source = torch.ones(bytes_copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, timing.Call] = {"matmul": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}
    time_interleaved = timing_cuda.time_interleaved if device == "cuda" else timing.time_interleaved
    times = time_interleaved(calls, budget=seconds)
    return Ceilings(2 * size**3 / times["matmul"].median, 2 * bytes_copied / times["copy"].median)


def work(shape: Shape, phase: str, element_bytes: int) -> tuple[float, float]:
    """(FLOP, bytes) of a phase, as the dense product of equal parameter count counts them.

    Bytes are the least that must move: x, weights and y once forward; backward also reads y's gradient, x and the
    weights and writes the gradients of x and the weights. A step has the products of forward, of dx and of dW.
    """
    flops = 2.0 * shape.batch * shape.parameters
    inputs, outputs = shape.batch * shape.in_features, shape.batch * shape.out_features
    once = inputs + shape.parameters + outputs
    if phase == "forward":
        return flops, once * element_bytes
    return 3 * flops, (once + 2 * inputs + 2 * shape.parameters + outputs) * float(element_bytes)
