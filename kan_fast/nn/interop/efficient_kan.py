"""Layers and networks of efficient-kan (github.com/Blealtan/efficient-kan)."""

from typing import Any

from torch import nn

from kan_fast.activations import fused_name
from kan_fast.functional import BaseActivation
from kan_fast.nn.interop.edges import from_edges
from kan_fast.nn.interop.states import Source, copied, forget, layer_prefixes, nothing_left, take, tensors
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.network import KAN

_PACKAGE = "efficient-kan"


def from_efficient_kan(source: Source, *, base_activation: BaseActivation = "silu", backend: str = "auto") -> KANLayer | KAN:
    """A KANLayer or KAN of the same function as an efficient-kan KANLinear or KAN, or the state_dict of one.

    source holds base_weight (out, in), spline_weight (out, in, G + k), grid (in, G + 2k + 1) and, with standalone scales,
    spline_scaler (out, in): in a KANLinear by these names, in a KAN below `layers.0.`, `layers.1.`, ...; a common prefix,
    such as that of DistributedDataParallel, does no harm. The scales are folded into the spline weights.
    base_activation: of a state_dict, which does not say; a module knows its own. Dtype, device, training mode and
    requires_grad are kept; nothing is shared with the source.

    Raises ValueError for a state that is not efficient-kan's, naming the keys that are missing or left over.
    """
    state = tensors(source)
    modules: dict[str, Any] = dict(source.named_modules()) if isinstance(source, nn.Module) else {}
    prefixes, head = layer_prefixes(state, "spline_weight", "layers", _PACKAGE)
    layers = []
    for prefix in prefixes:
        own = modules[prefix.removesuffix(".")].base_activation if modules else base_activation
        part = take(state, prefix, ("base_weight", "spline_weight", "grid"), ("spline_scaler",))
        scaler = part["spline_scaler"]
        layer = from_edges(
            part["spline_weight"].transpose(0, 1),
            part["grid"],
            None if scaler is None else scaler.t(),
            part["base_weight"].t(),
            base_activation=copied(fused_name(own)),
            backend=backend,
        )
        if modules and layer.base_weight is not None:
            layer.spline_weight.requires_grad_(part["spline_weight"].requires_grad or getattr(scaler, "requires_grad", False))
            layer.base_weight.requires_grad_(part["base_weight"].requires_grad)
            forget(state, f"{prefix}base_activation.")
        layers.append(layer)
    nothing_left(state, _PACKAGE)
    result = layers[0] if head is None else KAN.from_layers(layers)
    return result.train(source.training) if isinstance(source, nn.Module) else result
