"""The KAN layer as most people write it first: Cox-de Boor by broadcasting, then one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainKANLayer(nn.Module):
    """y (batch, out) = [silu(x) | B(x)] (batch, in * (G + k + 1)) times weight; the bases are a tensor in memory.

    weight (out, in * (G + k + 1)): silu first, then for each input its G + k bases.
    """

    grid: Tensor

    def __init__(self, in_features: int, out_features: int, grid: Tensor, spline_order: int) -> None:
        super().__init__()
        self.spline_order = spline_order
        features = grid.shape[1] - spline_order
        self.weight = nn.Parameter(torch.randn(out_features, in_features * features) * in_features**-0.5)
        self.register_buffer("grid", grid.detach().clone())

    def bases(self, x: Tensor) -> Tensor:
        """From x (batch, in) to (batch, in, G + k)."""
        grid, at = self.grid, x.unsqueeze(-1)
        value = ((at >= grid[:, :-1]) & (at < grid[:, 1:])).to(x.dtype)
        for p in range(1, self.spline_order + 1):
            left = (at - grid[:, : -(p + 1)]) / (grid[:, p:-1] - grid[:, : -(p + 1)])
            right = (grid[:, p + 1 :] - at) / (grid[:, p + 1 :] - grid[:, 1:-p])
            value = left * value[..., :-1] + right * value[..., 1:]
        return value

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.cat([F.silu(x), self.bases(x).flatten(1)], dim=1), self.weight)
