"""Penalties: on the coefficients, and on what the edges do with data."""

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kan_fast.checks import check_number, expect
from kan_fast.chunks import chunks
from kan_fast.nn import KANLayer
from kan_fast.ranks import sum_over_ranks
from kan_fast.traverse import kan_layers


def advanced_regularization(model: nn.Module, l1_factor: float = 1e-4, smoothness_factor: float = 1e-3) -> Tensor:
    """Sum over all edges of l1_factor * sum_f |c_f| + smoothness_factor * sum_f (c_{f+1} - c_f)^2, an autograd scalar.

    model: any module with KANLayers; c are an edge's spline coefficients. Masked edges count nothing.
    """
    check_number("l1_factor", l1_factor)
    check_number("smoothness_factor", smoothness_factor)
    total = []
    for layer in kan_layers(model).values():
        coefficients = layer.masked_weights()[0]
        roughness = coefficients.diff(dim=1).square().sum()
        total.append(l1_factor * coefficients.abs().sum() + smoothness_factor * roughness)
    return torch.stack(total).sum()


@overload
def activation_regularization(
    model: nn.Module, x: Tensor, l1_factor: float = ..., entropy_factor: float = ..., *, return_output: Literal[False] = ...
) -> Tensor: ...
@overload
def activation_regularization(
    model: nn.Module, x: Tensor, l1_factor: float = ..., entropy_factor: float = ..., *, return_output: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def activation_regularization(
    model: nn.Module, x: Tensor, l1_factor: float = 1.0, entropy_factor: float = 1.0, *, return_output: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The penalty of the KAN paper: sum over layers of l1_factor * |Phi| + entropy_factor * S(Phi), an autograd scalar.

    x (N, ..., in): data, of all ranks together (kan_fast.ranks). |phi| of an edge is the mean over the data of |phi(x)|,
    |Phi| of a layer the sum over its edges, and S = -sum (|phi| / |Phi|) log(|phi| / |Phi|). An edge that is 0 on all data
    counts 0, with gradient 0.
    One pass through the model: with return_output the result is (model(x), penalty), so that a training step needs no other.
    A (samples, in, out) tensor exists only in chunks, which are computed again in the backward pass where there are many.

    Source: arXiv 2404.19756, eq. (2.17) to (2.20).
    """
    check_number("l1_factor", l1_factor)
    check_number("entropy_factor", entropy_factor)
    expect(isinstance(x, Tensor), "x", "a tensor", x)
    terms: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, KANLayer)
        size = edge_l1(layer, args[0].flatten(0, -2))
        whole = size.sum()
        share = size / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        # log(1) in place of log(0): the limit of p log p, and no infinity in the gradient.
        entropy = -(share * torch.where(share > 0, share, 1).log()).sum()
        terms.append(l1_factor * whole + entropy_factor * entropy)

    handles = [layer.register_forward_pre_hook(hook) for layer in kan_layers(model).values()]
    try:
        output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    penalty = torch.stack(terms).sum()
    return (output, penalty) if return_output else penalty


def edge_l1(layer: KANLayer, x: Tensor) -> Tensor:
    """Mean over the data of |phi(x)| of every edge: x (N, in) -> (in, out), differentiable. Of all ranks' data together."""
    count = sum_over_ranks(torch.tensor(len(x), device=x.device))
    return sum_over_ranks(_edge_sums(layer, x)) / count.clamp(min=1)


def _edge_sums(layer: KANLayer, x: Tensor) -> Tensor:

    def total(rows: Tensor) -> Tensor:
        return layer.edge_values(rows).abs().sum(0)

    parts = list(chunks(len(x), layer.in_features * layer.out_features))
    if len(parts) <= 1:
        return total(x)
    sums = [checkpoint(total, x[rows], use_reentrant=False) for rows in parts]
    return torch.stack(sums).sum(0)
