"""KANs in files: a safetensors file with the weights and, in its metadata, a JSON configuration with a version."""

import copy
import json
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kan_fast.activations import fused_name
from kan_fast.checks import check_plain
from kan_fast.functional import BaseActivation
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.sparse import SparseKANLayer
from kan_fast.nn.tensor_file import read_tensors, write_tensors

# Raised by one when a reader of the present version could not understand a file any more: 2 has sparse layers.
_VERSION = 2
_KEY = "kan_fast.KAN"

Path = str | os.PathLike[str]
Layer = KANLayer | SparseKANLayer


def save_layers(path: Path, network: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Write a network's layers and the buffer input_index that `compact` may have given it; see KAN.save."""
    known: list[Layer] = []
    for place, layer in enumerate(layers):
        if isinstance(layer, KANLayer | SparseKANLayer):
            check_plain(layer, f"layers.{place}")
        if type(layer) not in (KANLayer, SparseKANLayer):
            raise TypeError(
                f"layers: expected KANLayers and SparseKANLayers, got {type(layer).__name__} at {place}; save its state_dict"
                " instead"
            )
        known.append(cast(Layer, layer))
    state: dict[str, Tensor] = network.state_dict()
    extra = [name for name in state if not name.startswith("layers.") and name != "input_index"]
    if extra:
        raise TypeError(f"network: expected layers alone, got also {', '.join(extra)}; save its state_dict instead")
    # Older readers understand files without sparse layers.
    version = _VERSION if any(isinstance(layer, SparseKANLayer) for layer in known) else 1
    config = {"version": version, "layers": [_config(layer) for layer in known]}
    write_tensors(path, state, {"format": "pt", _KEY: json.dumps(config)})


def load_layers(
    path: Path, base_activation: BaseActivation, backend: str | None, device: torch.device | str | None
) -> tuple[list[Layer], Tensor | None]:
    """The layers in a file, and its input_index or None; see KAN.load."""
    state, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise ValueError(f"{path}: expected a file by KAN.save, got a safetensors file of another program")
    input_index = state.pop("input_index", None)
    layers = []
    for place, options in enumerate(_parse(path, metadata[_KEY])):
        options["base_activation"] = _chosen(path, options.get("base_activation"), base_activation)
        prefix = f"layers.{place}."
        own = {name.removeprefix(prefix): state.pop(name).to(device) for name in list(state) if name.startswith(prefix)}
        try:
            layer = _layer(options, own.get("edges"), backend)
            layer.load_state_dict(own, assign=True)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path}: damaged: weights and configuration of layer {place} do not fit: {error}") from None
        layers.append(layer)
    if state:
        raise ValueError(f"{path}: damaged: no layer has the weights {', '.join(sorted(state)[:5])}")
    return layers, None if input_index is None else input_index.to(device)


def _layer(options: dict[str, Any], edges: Tensor | None, backend: str | None) -> Layer:
    """The layer of a configuration, without numbers."""
    if options.pop("sparse", False):
        return SparseKANLayer(**options, edges=edges, device="meta")
    if backend is not None:
        options["backend"] = backend
    return KANLayer(**options, device="meta")


def _config(layer: Layer) -> dict[str, Any]:
    """The layer's arguments, those of JSON's types; of the edges the tensors tell. The dtype is that of the weights."""
    name = fused_name(layer.base_activation)
    kind = {"sparse": True} if isinstance(layer, SparseKANLayer) else {"backend": layer.backend}
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "grid_size": layer.grid_size,
        "spline_order": layer.spline_order,
        "grid_range": list(layer.grid_range),
        "base_activation": name if name is None or isinstance(name, str) else {"custom": repr(name)},
        "bias": layer.bias is not None,
        "outside": layer.outside,
        **kind,
    }


def _parse(path: Path, text: str) -> list[dict[str, Any]]:
    """The arguments of every layer."""
    try:
        config = json.loads(text)
        version, layers = config["version"], config.get("layers")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        version = layers = None
    if isinstance(version, int) and version > _VERSION:
        raise ValueError(
            f"{path}: written in version {version} of the format by a newer kan_fast; this one reads up to version {_VERSION}"
        )
    known = version in range(1, _VERSION + 1)
    if not known or not isinstance(layers, list) or not layers or not all(isinstance(o, dict) for o in layers):
        raise ValueError(f"{path}: damaged: its configuration is not one that KAN.save writes: {text[:100]}")
    return layers


def _chosen(path: Path, stored: Any, given: BaseActivation) -> BaseActivation:
    """The base activation of a layer: the stored name, or the given function where a function was saved."""
    if not isinstance(stored, dict):
        return stored  # type: ignore[no-any-return]  # KANLayer checks it
    if given is None:
        raise ValueError(
            f"{path}: saved with the base activation {stored.get('custom')}, which a file cannot hold: pass base_activation"
        )
    return copy.deepcopy(given) if isinstance(given, nn.Module) else given
