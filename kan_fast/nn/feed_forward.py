"""KANFeedForward: what stands in a transformer block in place of its MLP."""

from typing import Any

from torch import Tensor, nn

from kan_fast.checks import check_int
from kan_fast.nn.layer import KANLayer


class KANFeedForward(nn.Module):
    """Two KANLayers, d_model -> hidden -> d_model, with dropout between them: forward (..., d_model) -> (..., d_model).

    In place of a transformer's linear - activation - linear, without its normalisation and residual:
    `x + KANFeedForward(d_model)(layer_norm(x))`. hidden: by default as many units as give the parameters of an MLP of width
    4 * d_model, which is 4 * d_model / (grid_size + spline_order + 1). grid_range: by default (-3, 3), which holds what a
    layer norm puts out. layer_kwargs are KANLayer's.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        *,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        **layer_kwargs: Any,
    ) -> None:
        super().__init__()
        d_model = check_int("d_model", d_model, 0)
        if hidden is None:
            hidden = max(1, round(4 * d_model / (grid_size + spline_order + 1)))
        layer_kwargs["grid_range"] = grid_range
        self.first = KANLayer(d_model, hidden, grid_size, spline_order, **layer_kwargs)
        self.dropout = nn.Dropout(dropout)
        self.second = KANLayer(hidden, d_model, grid_size, spline_order, **layer_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)"""
        y: Tensor = self.second(self.dropout(self.first(x)))
        return y
