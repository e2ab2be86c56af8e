"""States of models and optimisers in training: whole in files, laid out over ranks as the model is when they come back."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kan_fast.atomic import replacing
from kan_fast.nn import KANLayer
from kan_fast.ranks import laid_out_as, rank, whole

State = dict[str, Any]


def model_state(model: nn.Module, copy: bool = True) -> State:
    """model.state_dict(), or a copy, without the wrapper of DistributedDataParallel; sharded tensors stay sharded."""
    state: State = _unwrapped(model).state_dict()
    if not copy:
        return state
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def load_model_state(model: nn.Module, state: State) -> None:
    """model.load_state_dict(state), with every tensor in full, or sharded as the model's.

    KANLayers of another grid size than the state's take its size first; sharded ones raise ValueError.
    """
    model = _unwrapped(model)
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, KANLayer) and f"{prefix}spline_weight" in state:
            weight, grid = state[f"{prefix}spline_weight"], state[f"{prefix}grid"]
            if weight.shape == layer.spline_weight.shape:
                continue
            if hasattr(layer.spline_weight, "full_tensor"):
                raise ValueError(
                    f"model: {prefix}spline_weight is sharded with shape {tuple(layer.spline_weight.shape)}, the checkpoint"
                    f" has {tuple(weight.shape)}: give it the checkpoint's grid size before sharding"
                )
            layer.set_grid(grid.to(layer.grid), weight)
    own = model.state_dict()
    model.load_state_dict({name: _laid_out(value, own.get(name)) for name, value in state.items()})


def load_optimizer_state(optimizer: Optimizer, state: State) -> None:
    """optimizer.load_state_dict(state), where what has a sharded parameter's shape may be in full."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    laid_out = {
        index: {
            key: _laid_out(value, parameters[index]) if _same_shape(value, parameters[index]) else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": laid_out})


def write(state: State, path: str | os.PathLike[str]) -> None:
    """Sharded tensors in full, into one file by rank 0; every rank must call it. The file is there whole or not at all."""
    state = _in_full(state)
    if rank() == 0:
        with replacing(path) as partial:
            torch.save(state, partial)


def _in_full(state: Any) -> Any:
    """Sharded tensors, anywhere in dicts and lists, in full in rank 0's main memory; nothing in their place elsewhere."""
    if isinstance(state, dict):
        return {key: _in_full(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_in_full, state))
    if not hasattr(state, "full_tensor"):
        return state
    full = whole(state)
    return full.cpu() if rank() == 0 else None


def _laid_out(value: Any, like: Any) -> Any:
    """A tensor in full as `like` is sharded; other values as they are."""
    if not isinstance(value, Tensor) or hasattr(value, "full_tensor") or not hasattr(like, "full_tensor"):
        return value
    return laid_out_as(value.to(like.device), like)


def _same_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model
