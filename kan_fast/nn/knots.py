"""Knots keep their precision whatever a module is cast to."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KnotsStayWide(nn.Module):
    """A module whose buffer `grid` is float32 or wider."""

    grid: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KnotsStayWide":
        """Casts and moves, except that knots never get narrower than float32."""
        knots = self.grid
        super()._apply(fn, recurse)
        if self.grid.dtype != at_least_float32(self.grid.dtype):
            self.grid = knots.to(self.grid.device, torch.float32)
        return self


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, float32 for narrower ones."""
    return torch.promote_types(dtype, torch.float32)
