"""KANs in files: a safetensors file with the weights and, in its metadata, a JSON configuration with a version."""

import copy
import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.activations import fused_name
from kan_fast.functional import BaseActivation
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.tensor_file import read_tensors, write_tensors

# Raised by one when a reader of the present version could not understand a file any more.
_VERSION = 1
_KEY = "kan_fast.KAN"

Path = str | os.PathLike[str]


def save_layers(path: Path, network: nn.Module, layers: list[KANLayer]) -> None:
    """Write a network's layers and the buffer input_index that `compact` may have given it; see KAN.save."""
    for place, layer in enumerate(layers):
        if type(layer) is not KANLayer:
            raise TypeError(f"layers: expected KANLayers, got {type(layer).__name__} at {place}; save its state_dict instead")
    state: dict[str, Tensor] = network.state_dict()
    extra = [name for name in state if not name.startswith("layers.") and name != "input_index"]
    if extra:
        raise TypeError(f"network: expected layers alone, got also {', '.join(extra)}; save its state_dict instead")
    config = {"version": _VERSION, "layers": [_config(layer) for layer in layers]}
    write_tensors(path, state, {"format": "pt", _KEY: json.dumps(config)})


def load_layers(
    path: Path, base_activation: BaseActivation, backend: str | None, device: torch.device | str | None
) -> tuple[list[KANLayer], Tensor | None]:
    """The layers in a file, and its input_index or None; see KAN.load."""
    state, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise ValueError(f"{path}: expected a file by KAN.save, got a safetensors file of another program")
    input_index = state.pop("input_index", None)
    layers = []
    for place, options in enumerate(_parse(path, metadata[_KEY])):
        options["base_activation"] = _chosen(path, options.get("base_activation"), base_activation)
        if backend is not None:
            options["backend"] = backend
        prefix = f"layers.{place}."
        own = {name.removeprefix(prefix): state.pop(name).to(device) for name in list(state) if name.startswith(prefix)}
        try:
            layer = KANLayer(**options, device="meta")
            layer.load_state_dict(own, assign=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged: weights and configuration of layer {place} do not fit: {error}") from None
        layers.append(layer)
    if state:
        raise ValueError(f"{path}: damaged: no layer has the weights {', '.join(sorted(state)[:5])}")
    return layers, None if input_index is None else input_index.to(device)


def _config(layer: KANLayer) -> dict[str, Any]:
    """The arguments of KANLayer, those of JSON's types. The dtype is that of the weights."""
    name = fused_name(layer.base_activation)
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "grid_size": layer.grid_size,
        "spline_order": layer.spline_order,
        "grid_range": list(layer.grid_range),
        "base_activation": name if name is None or isinstance(name, str) else {"custom": repr(name)},
        "bias": layer.bias is not None,
        "outside": layer.outside,
        "backend": layer.backend,
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
    if version != _VERSION or not isinstance(layers, list) or not layers or not all(isinstance(o, dict) for o in layers):
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
