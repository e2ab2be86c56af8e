"""What is measured: shapes, the speed bars of each, and the tensors of a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One layer on one batch: x (batch, in_features) -> y (batch, out_features)."""

    batch: int
    in_features: int
    out_features: int
    grid_size: int = 5
    spline_order: int = 3

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "batch,in,out[,grid_size[,spline_order]]"; ValueError names what came."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        least = (1, 1, 1, 1, 0)
        if not 3 <= len(numbers) <= 5 or any(number < bound for number, bound in zip(numbers, least)):
            raise ValueError(f"shape: expected batch,in,out[,grid_size[,spline_order]], got {text!r}")
        return cls(*numbers)

    @property
    def features(self) -> int:
        """Weights of one edge: the bases and the base branch."""
        return self.grid_size + self.spline_order + 1

    @property
    def linear_features(self) -> int:
        """Inputs of the bias-free nn.Linear that has as many parameters as the KAN layer."""
        return self.in_features * self.features

    @property
    def parameters(self) -> int:
        return self.linear_features * self.out_features

    def __str__(self) -> str:
        order = "" if self.spline_order == 3 else f" k={self.spline_order}"
        return f"{self.batch} x {self.in_features} x {self.out_features}, G={self.grid_size}{order}"

    def key(self) -> str:
        """The text that `parse` reads."""
        parts = (self.batch, self.in_features, self.out_features, self.grid_size, self.spline_order)
        return ",".join(map(str, parts[:4] if self.spline_order == 3 else parts))


@dataclass(frozen=True)
class Bar:
    """Largest allowed ratio of kan_fast's time to nn.Linear's of equal parameter count."""

    forward: float | None
    step: float | None


# Targets for a CPU with AVX-512, float32, two threads, a uniform grid on [-1, 1] and inputs uniform in it.
BARS: dict[Shape, Bar] = {
    Shape(256, 64, 64, 5): Bar(0.55, 0.50),
    Shape(1024, 256, 256, 5): Bar(0.43, 0.40),
    Shape(4096, 784, 64, 5): Bar(0.42, 0.35),
    Shape(256, 1024, 1024, 5): Bar(0.47, 0.45),
    Shape(1024, 256, 256, 20): Bar(0.19, 0.19),
    Shape(65536, 2, 5, 5): Bar(0.25, 0.45),
    Shape(65536, 5, 1, 5): Bar(0.60, 0.60),
}
# With AVX2 alone there are bars for wide layers only: inputs and outputs from 64 on.
BAR_AVX2, BAR_AVX2_WIDEST = Bar(0.60, None), Bar(0.80, None)  # the second from 1024 on
BAR_BFLOAT16 = 1.1  # bfloat16's time against float32's
BAR_NON_UNIFORM = 1.3  # a non-uniform grid's time against a uniform one's
BAR_LATENCY = 2.0  # KAN([2, 5, 1]) on 64 samples against an MLP [2, 50, 1]
BAR_MEMORY = 1.0  # peak extra memory of a step against nn.Linear's of equal parameter count



def bar(shape: Shape, isa: str) -> Bar:
    """The bars of a shape on a CPU whose kernels are those of `isa`: "avx512", "avx2" or "baseline", which has none."""
    if isa == "avx512":
        return BARS.get(shape, Bar(None, None))
    if isa != "avx2" or shape not in BARS or min(shape.in_features, shape.out_features) < 64:
        return Bar(None, None)
    return BAR_AVX2_WIDEST if min(shape.in_features, shape.out_features) >= 1024 else BAR_AVX2


DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def uniform_input(
    batch: int, features: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """A batch x (batch, features), uniform in [-1, 1]; drawn on the CPU, so the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, features, generator=generator, dtype=torch.float64) * 2 - 1
    return x.to(device=device, dtype=dtype)


def non_uniform_grid(grid: Tensor, spline_order: int, *, seed: int = 1) -> Tensor:
    """The same grid (in, G + 2k + 1) with every inner knot moved by up to 0.3 of a cell, input by input."""
    generator = torch.Generator().manual_seed(seed)
    moved = grid.detach().clone()
    inner = slice(spline_order + 1, grid.shape[1] - spline_order - 1)
    step = (grid[:, spline_order + 1] - grid[:, spline_order]).unsqueeze(1)
    noise = torch.rand(moved[:, inner].shape, generator=generator).to(moved)
    moved[:, inner] += (noise - 0.5) * 0.6 * step
    return moved
