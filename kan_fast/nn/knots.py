"""Knots keep their precision whatever a module is cast to, and their order whatever is loaded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.spline import check_grid


class KnotsStayWide(nn.Module):
    """A module whose buffer `grid` (in, G + 2 * spline_order + 1) is float32 or wider."""

    grid: Tensor
    spline_order: int

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KnotsStayWide":
        """Casts and moves, except that knots never get narrower than float32."""
        knots = self.grid
        super()._apply(fn, recurse)
        if self.grid.dtype != at_least_float32(self.grid.dtype):
            self.grid = knots.to(self.grid.device, torch.float32)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Knots that make no splines are an error; of other shapes, and of tensors without numbers, torch says enough.

        Narrow ones, which load_state_dict(assign=True) would leave as they are, get wide.
        """
        knots = state_dict.get(prefix + "grid")
        if type(knots) is Tensor and knots.is_floating_point() and not knots.is_meta and knots.shape == self.grid.shape:
            try:
                check_grid(knots.to(at_least_float32(knots.dtype)), len(knots), self.spline_order)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.grid = self.grid.to(at_least_float32(self.grid.dtype))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, float32 for narrower ones."""
    return torch.promote_types(dtype, torch.float32)
