"""KAN: a stack of KANLayers."""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kan_fast.functional import BaseActivation
from kan_fast.nn.files import load_layers, save_layers
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.sparse import SparseKANLayer


class KAN(nn.Module):
    """Kolmogorov-Arnold network of the given widths.

    forward: (..., layer_dims[0]) -> (..., layer_dims[-1]). `layers` holds one KANLayer between neighbouring widths;
    `layer_kwargs` go to each of them. Raises ValueError for fewer than two widths and what KANLayer raises.

    Source: Z. Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, eq. (2.6).
    """

    def __init__(self, layer_dims: Sequence[int], grid_size: int = 5, spline_order: int = 3, **layer_kwargs: Any) -> None:
        super().__init__()
        dims = list(layer_dims)
        if len(dims) < 2:
            raise ValueError(f"layer_dims: expected at least two widths, got {dims}")
        self.layer_dims = dims
        self.layers = nn.ModuleList(
            KANLayer(dims[i], dims[i + 1], grid_size, spline_order, **layer_kwargs) for i in range(len(dims) - 1)
        )

    @classmethod
    def from_layers(cls, layers: Sequence[KANLayer | SparseKANLayer]) -> "KAN":
        """The network of these very layers, each as wide as the one before it; raises ValueError otherwise."""
        widths = [layer.in_features for layer in layers[:1]] + [layer.out_features for layer in layers]
        for place, layer in enumerate(layers):
            if layer.in_features != widths[place]:
                raise ValueError(f"layers: expected layer {place} to have {widths[place]} inputs, got {layer.in_features}")
        network = cls(widths, device="meta")
        network.layers = nn.ModuleList(layers)
        return network

    def forward(self, x: Tensor) -> Tensor:
        """(..., layer_dims[0]) -> (..., layer_dims[-1])"""
        for layer in self.layers:
            x = layer(x)
        return x

    def reset_parameters(self) -> None:
        """Draw every layer anew."""
        for layer in self._kan_layers():
            layer.reset_parameters()

    def regularization_loss(self, regularization_factor: float = 1e-4) -> Tensor:
        """regularization_factor * sum of |spline_weight| over all edges that are not masked: an autograd scalar."""
        total = torch.stack([layer.masked_weights()[0].abs().sum() for layer in self._kan_layers()]).sum()
        return regularization_factor * total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to one file: a safetensors file whose metadata hold the layers' arguments as JSON.

        Masks, knots, different grid sizes and the `input_index` of `compact` are kept, requires_grad is not. An existing
        file is replaced when the new one is complete. SparseKANLayers that `sparsify` has put in are kept too. Raises
        TypeError for other layers, and for further parameters or buffers.
        """
        save_layers(path, self, list(self.layers))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        base_activation: BaseActivation = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> "KAN":
        """The network that `save` wrote, with its dtype, on `device` (the CPU by default). No pickle: nothing is executed.

        base_activation: the function, where layers were saved with one that is not among the named ones, since a file
        holds only names. backend: instead of the one that the layers had.
        Raises ValueError, with the path, for a file that is truncated, damaged, of another program or of a newer format.
        """
        layers, input_index = load_layers(path, base_activation, backend, device)
        network = cls.from_layers(layers)
        if input_index is not None:
            network.register_buffer("input_index", input_index)
        return network

    def _kan_layers(self) -> list[KANLayer]:
        return cast("list[KANLayer]", list(self.layers))


KolmogorovArnoldNetwork = KAN
