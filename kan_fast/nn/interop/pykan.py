"""Layers and networks of pykan (github.com/KindXiaoming/pykan)."""

from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.activations import fused_name
from kan_fast.functional import BaseActivation
from kan_fast.nn.interop.edges import from_edges
from kan_fast.nn.interop.states import Source, copied, forget, layer_prefixes, nothing_left, take, tensors
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.network import KAN

_PACKAGE = "pykan"
_LAYER = ("grid", "coef", "mask", "scale_base", "scale_sp")


def from_pykan(source: Source, *, base_activation: BaseActivation = "silu", backend: str = "auto") -> KANLayer | KAN:
    """A KANLayer or KAN of the same function as a pykan KANLayer or MultKAN (KAN), or the state_dict of one.

    A KANLayer holds grid (in, G + 2k + 1), coef (in, out, G + k), mask, scale_base and scale_sp (in, out); a MultKAN has
    them below `act_fun.0.`, `act_fun.1.`, ..., with the affine maps of its nodes beside them. Scales, masks and affine maps
    are folded in; edges whose mask is 0 are pruned; affine maps with an offset give a layer a bias.
    The result of a layer is what pykan's returns first. A MultKAN that lost inputs (prune_input) gives a KAN of the inputs
    that are left and the buffer `input_index`: kan(x[:, kan.input_index]) is what the MultKAN makes of x.
    base_activation: of a state_dict, which does not say; a module knows its own. Dtype, device, training mode and
    requires_grad are kept; nothing is shared with the source.

    Raises ValueError for what has no counterpart: multiplication nodes, and edges whose symbolic function is active; and
    for a state that is not pykan's, naming the keys that are missing or left over.
    """
    state = tensors(source)
    prefixes, head = layer_prefixes(state, "coef", "act_fun", _PACKAGE)
    modules: dict[str, Any] = dict(source.named_modules()) if isinstance(source, nn.Module) else {}
    layers = []
    for number, prefix in enumerate(prefixes):
        part = take(state, prefix, _LAYER)
        scale, bias = (None, None) if head is None else _affine(state, head, number, modules)
        own = modules[prefix.removesuffix(".")].base_fun if modules else base_activation
        zero = head is not None and bool(modules) and modules[head.removesuffix(".")].base_fun_name == "zero"
        factor = 1 if scale is None else scale.double()
        layer = from_edges(
            part["coef"],
            part["grid"],
            part["scale_sp"].double() * factor,
            None if zero or own is None else part["scale_base"].double() * factor,
            bias,
            base_activation=copied(fused_name(own)),
            mask=part["mask"],
            backend=backend,
        )
        if modules:
            layer.spline_weight.requires_grad_(part["coef"].requires_grad or part["scale_sp"].requires_grad)
            if layer.base_weight is not None:
                layer.base_weight.requires_grad_(part["scale_base"].requires_grad)
            forget(state, f"{prefix}base_fun.")
        layers.append(layer)
    if head is None:
        nothing_left(state, _PACKAGE)
        return layers[0].train(source.training) if isinstance(source, nn.Module) else layers[0]
    forget(state, f"{head}base_fun.")
    nothing_left(state, _PACKAGE)
    result = KAN.from_layers(layers)
    if modules:
        kept = modules[head.removesuffix(".")].input_id
        result.train(modules[head.removesuffix(".")].training)
        if not torch.equal(kept.cpu(), torch.arange(len(kept))):
            result.register_buffer("input_index", kept.detach().clone().long())
    return result


@torch.no_grad()
def to_pykan(model: KANLayer | KAN) -> dict[str, Tensor]:
    """The state_dict of the pykan KANLayer, or MultKAN, of the same function.

    For `MultKAN(width=kan.layer_dims, grid=[layer.grid_size for layer in kan.layers], k=[layer.spline_order ...],
    base_fun=...)`, or `KANLayer(in_dim, out_dim, num=layer.grid_size, k=layer.spline_order, base_fun=...)`, whose
    base_fun must be the base activation ("silu", "identity", or "zero" for None): a state does not hold it. Biases become
    the offsets of MultKAN's nodes; the symbolic branch is off.

    Raises ValueError for what pykan has no place for: `outside` other than "zero", the bias of a lone layer, layers that
    do not share one base activation.
    """
    if isinstance(model, KANLayer):
        if model.bias is not None:
            raise ValueError("model: expected a layer without bias, which pykan's KANLayer has no place for (its MultKAN has)")
        return _layer_state(model)
    if not isinstance(model, KAN):
        raise TypeError(f"model: expected a KANLayer or KAN, got {type(model).__name__}")
    state: dict[str, Tensor] = {}
    activations = {layer.base_activation for layer in model.layers if isinstance(layer, KANLayer)}
    if len(activations) > 1:
        raise ValueError(f"model: expected one base activation for all layers, as MultKAN has, got {activations}")
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, KANLayer)
        state.update({f"act_fun.{number}.{key}": value for key, value in _layer_state(layer).items()})
        like, width = layer.spline_weight, layer.out_features
        zeros, ones = like.new_zeros(width), like.new_ones(width)
        state[f"node_bias_{number}"] = zeros if layer.bias is None else layer.bias.clone()
        state[f"node_scale_{number}"] = ones
        state[f"subnode_bias_{number}"], state[f"subnode_scale_{number}"] = zeros.clone(), ones.clone()
        state[f"symbolic_fun.{number}.mask"] = like.new_zeros(width, layer.in_features)
        state[f"symbolic_fun.{number}.affine"] = like.new_zeros(width, layer.in_features, 4)
    return state


def _layer_state(layer: KANLayer) -> dict[str, Tensor]:
    if layer.outside != "zero":
        raise ValueError(f"model: expected outside='zero', the only way pykan's splines go on, got {layer.outside!r}")
    weight = layer.spline_weight
    alive = torch.ones_like(weight[:, 0]) if layer.edge_mask is None else layer.edge_mask.to(weight.dtype)
    base = torch.zeros_like(alive) if layer.base_weight is None else layer.base_weight.clone()
    coef = weight.transpose(1, 2).contiguous().clone()
    return {"grid": layer.grid.clone(), "coef": coef, "mask": alive, "scale_base": base, "scale_sp": torch.ones_like(alive)}


def _affine(state: dict[str, Tensor], head: str, number: int, modules: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Scale (out,) and bias (out,) of the nodes behind a layer, once it is known that they only sum."""
    names = [f"{part}_{number}" for part in ("node_scale", "node_bias", "subnode_scale", "subnode_bias")]
    node_scale, node_bias, scale, offset = take(state, head, tuple(names)).values()
    if node_scale.shape != scale.shape:
        raise ValueError(
            f"source: layer {number} feeds multiplication nodes ({len(scale)} sums become {len(node_scale)} nodes),"
            " which have no counterpart"
        )
    symbolic = take(state, f"{head}symbolic_fun.{number}.", ("mask", "affine"))
    live = modules.get(head.removesuffix("."))
    active = [] if live is not None and not live.symbolic_enabled else symbolic["mask"].nonzero().tolist()
    if active:
        functions = None if live is None else live.symbolic_fun[number].funs_name
        edges = [f"{i} -> {o}" + ("" if functions is None else f" ({functions[o][i]})") for o, i in active]
        raise ValueError(
            f"source: layer {number} has active symbolic edges, which have no counterpart: {', '.join(edges[:5])}"
            f"{', ...' if len(edges) > 5 else ''}; pykan's unfix_symbolic(layer, input, output) turns one back into a spline"
        )
    bias = node_scale.double() * offset.double() + node_bias.double()
    trainable = any(tensor.requires_grad for tensor in (node_bias, offset))
    return node_scale.double() * scale.double(), bias if trainable or bool((bias != 0).any()) else None
