"""The plain per-edge formulation, to which every other package's layer comes down."""

import torch
from torch import Tensor

from kan_fast.checks import expect
from kan_fast.functional import BaseActivation
from kan_fast.nn.layer import KANLayer


@torch.no_grad()
def from_edges(
    coefficients: Tensor,
    grid: Tensor,
    scale: Tensor | None = None,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    base_activation: BaseActivation = "identity",
    mask: Tensor | None = None,
    outside: str = "zero",
    backend: str = "auto",
) -> KANLayer:
    """The KANLayer of y_o = bias_o + sum_i mask_io * (base_weight_io * act(x_i) + scale_io * sum_f coefficients_iof B_f(x_i)).

    coefficients (in, out, G + k), any floating dtype, which becomes the layer's; grid (in, G + 2k + 1), or (G + 2k + 1,)
    for all inputs; scale, base_weight, mask (in, out), 1, absent and 1 by default; bias (out). The spline order k follows
    from the shapes. Scale and mask are folded into the weights, in float64 and then rounded once; edges with mask 0 are
    pruned (edge_mask). base_weight None means no base branch. All tensors are copied.

    An input whose knots are all one number has a spline that is zero everywhere; it gets knots around that number, one
    apart, and coefficients of zero: the same function, and one that can be trained.

    Raises ValueError for shapes that do not fit and for knots that decrease, TypeError for dtypes.
    """
    expect(isinstance(coefficients, Tensor), "coefficients", "a tensor", coefficients)
    expect(isinstance(grid, Tensor), "grid", "a tensor", grid)
    if coefficients.dim() != 3:
        raise ValueError(f"coefficients: expected shape (in, out, grid_size + spline_order), got {tuple(coefficients.shape)}")
    in_features, out_features, num_bases = coefficients.shape
    for name, tensor in (("scale", scale), ("base_weight", base_weight), ("mask", mask)):
        if tensor is not None and tensor.shape != (in_features, out_features):
            raise ValueError(f"{name}: expected shape (in, out) = {(in_features, out_features)}, got {tuple(tensor.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias: expected shape (out,) = ({out_features},), got {tuple(bias.shape)}")
    if grid.dim() == 1:
        grid = grid.expand(in_features, -1)
    if grid.dim() != 2:
        raise ValueError(f"grid: expected shape (in, grid_size + 2 * spline_order + 1), got {tuple(grid.shape)}")
    spline_order = grid.shape[1] - num_bases - 1
    if not 0 <= spline_order < num_bases:
        raise ValueError(
            "grid: expected grid_size + 2 * spline_order + 1 knots for grid_size + spline_order coefficients, got"
            f" {grid.shape[1]} knots and {num_bases} coefficients"
        )
    layer = KANLayer(
        in_features,
        out_features,
        num_bases - spline_order,
        spline_order,
        base_activation=None if base_weight is None else base_activation,
        bias=bias is not None,
        outside=outside,
        backend=backend,
        device="meta",  # no numbers are drawn
        dtype=coefficients.dtype,
    ).to_empty(device=coefficients.device)
    spline = coefficients.double().transpose(1, 2)
    if scale is not None:
        spline = spline * scale.double()[:, None]
    base = base_weight
    if mask is not None:
        spline = spline * mask.double()[:, None]
        base = None if base is None else base.double() * mask.double()
        layer.edge_mask = None if bool((mask != 0).all()) else mask != 0
    grid, spline = _without_collapsed_knots(grid.to(torch.promote_types(grid.dtype, torch.float32)), spline, spline_order)
    layer.set_grid(grid, spline)
    a, b = float(grid[:, spline_order].min()), float(grid[:, num_bases].max())
    layer.grid_range = (a, b)  # what reset_parameters goes back to
    if base is not None and layer.base_weight is not None:
        layer.base_weight.copy_(base)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    return layer


def _without_collapsed_knots(grid: Tensor, spline: Tensor, spline_order: int) -> tuple[Tensor, Tensor]:
    """grid (in, G + 2k + 1) and spline weights (in, G + k, out), with unit steps where all knots of an input are one number."""
    collapsed = grid[:, 0] == grid[:, -1]
    steps = torch.arange(grid.shape[1], device=grid.device, dtype=grid.dtype) - (grid.shape[1] - 1) / 2
    spread = grid[:, :1] + steps
    return torch.where(collapsed[:, None], spread, grid), spline.masked_fill(collapsed[:, None, None], 0)
