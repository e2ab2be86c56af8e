"""KAN: a stack of KANLayers."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from kan_fast import stack
from kan_fast.checks import check_iterable, check_number, check_plain, expect
from kan_fast.functional import BaseActivation
from kan_fast.nn.files import load_layers, save_layers
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.sparse import SparseKANLayer

_NATIVE = frozenset(("auto", "native"))
_PLAIN = frozenset((Tensor, nn.Parameter))
# Hooks that every call of any module runs.
_hooks = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


class KAN(nn.Module):
    """Kolmogorov-Arnold network of the given widths.

    forward: (..., layer_dims[0]) -> (..., layer_dims[-1]). `layers` holds one KANLayer between neighbouring widths;
    `layer_kwargs` go to each of them. Raises ValueError for fewer than two widths and what KANLayer raises.

    fused: a network of narrow layers is one call of the native backend (stack.py) wherever that is faster and nothing, such
    as a hook, asks for the layers one by one. False, here or as an attribute, turns that off, as KAN_FAST_FUSED_NETWORK=0
    in the environment does for all networks.

    Source: Z. Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, eq. (2.6).
    """

    fused: bool = True

    def __init__(
        self,
        layer_dims: Sequence[int],
        grid_size: int = 5,
        spline_order: int = 3,
        *,
        fused: bool = True,
        **layer_kwargs: Any,
    ) -> None:
        super().__init__()
        self.fused = fused
        if not isinstance(layer_dims, Iterable):
            raise TypeError(f"layer_dims: expected a sequence of widths, got {layer_dims!r}")
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
        check_iterable("layers", layers, "layers")
        for place, layer in enumerate(layers):
            expect(isinstance(layer, KANLayer | SparseKANLayer), f"layers[{place}]", "a KANLayer or SparseKANLayer", layer)
        widths = [layer.in_features for layer in layers[:1]] + [layer.out_features for layer in layers]
        for place, layer in enumerate(layers):
            if layer.in_features != widths[place]:
                raise ValueError(f"layers: expected layer {place} to have {widths[place]} inputs, got {layer.in_features}")
        network = cls(widths, device="meta")
        network.layers = nn.ModuleList(layers)
        return network

    def forward(self, x: Tensor) -> Tensor:
        """(..., layer_dims[0]) -> (..., layer_dims[-1])"""
        if self.fused and stack.serves(x):
            operands = _operands(self.layers, x)
            y = None if operands is None else stack.network(x, *operands)
            if y is not None:
                return y
        for layer in self.layers:
            x = layer(x)
        return x

    def reset_parameters(self) -> None:
        """Draw every layer anew. Raises ValueError for parametrized weights."""
        for name, layer in self.layers.named_children():
            check_plain(layer, f"layers.{name}")
        for layer in self._kan_layers():
            layer.reset_parameters()

    def regularization_loss(self, regularization_factor: float = 1e-4) -> Tensor:
        """regularization_factor * sum of |spline_weight| over all edges that are not masked: an autograd scalar."""
        check_number("regularization_factor", regularization_factor)
        total = torch.stack([layer.masked_weights()[0].abs().sum() for layer in self._kan_layers()]).sum()
        return regularization_factor * total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to one file: a safetensors file whose metadata hold the layers' arguments as JSON.

        Masks, knots, different grid sizes and the `input_index` of `compact` are kept, requires_grad is not. An existing
        file is replaced when the new one is complete. SparseKANLayers that `sparsify` has put in are kept too. Raises
        TypeError for other layers, and for further parameters or buffers, ValueError for parametrized weights.
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


def _operands(layers: nn.ModuleList, x: Tensor) -> tuple[list[Tensor], str, str, bool] | None:
    """What stack.network takes besides x; None where layers must be called one by one.

    That is where a call of theirs does more than compute, or they are too wide, too many or not alike.
    """
    if _hooks[0] or _hooks[1] or _hooks[2] or _hooks[3]:
        return None
    tensors: list[Tensor] = []
    kind = None
    for layer in layers._modules.values():
        state = layer.__dict__
        if (
            type(layer) is not KANLayer
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or layer._compiled_call_impl is not None
            or layer.backend not in _NATIVE
            or not 0 < layer.in_features <= stack.MAX_WIDTH
            or not 0 < layer.out_features <= stack.MAX_WIDTH
        ):
            return None
        parameters, buffers = state["_parameters"], state["_buffers"]
        try:
            spline_weight, base_weight, bias = parameters["spline_weight"], parameters["base_weight"], parameters["bias"]
        except KeyError:  # parametrized
            return None
        if buffers["edge_mask"] is not None:
            spline_weight, base_weight = layer.masked_weights()
        if type(spline_weight) not in _PLAIN or spline_weight.dtype is not x.dtype:
            return None
        tensors += spline_weight, buffers["grid"]
        if base_weight is not None:
            tensors.append(base_weight)
        if bias is not None:
            tensors.append(bias)
        this = "none" if base_weight is None else layer.base_activation, layer.outside, bias is not None
        if kind is None:
            kind = this
        elif kind != this:
            return None
    if kind is None or not 1 < len(layers) <= stack.MAX_DEPTH:
        return None
    activation, outside, with_bias = kind
    return (tensors, activation, outside, with_bias) if isinstance(activation, str) else None


KolmogorovArnoldNetwork = KAN
