"""What the tools share: finding the layers of a model, and feeding data through it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from kan_fast.checks import check_iterable, expect
from kan_fast.nn import KAN, KANLayer
from kan_fast.nn.layer import masked
from kan_fast.ranks import rows_of_all_ranks, whole, world_size

Data = Tensor | Iterable[Any]


def kan_layers(model: nn.Module) -> dict[str, KANLayer]:
    """Every KANLayer of a model by its name, in the order of registration; raises ValueError where there is none."""
    expect(isinstance(model, nn.Module), "model", "a module that holds KANLayers", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KANLayer)}
    if not layers:
        raise ValueError(f"model: expected a module that holds KANLayers, got {type(model).__name__} without any")
    return layers


def network_layers(model: KAN) -> list[KANLayer]:
    """model.layers, in order; raises TypeError where one is not a KANLayer, as after `sparsify`."""
    for place, layer in enumerate(model.layers):
        if not isinstance(layer, KANLayer):
            raise TypeError(f"model: expected KANLayers, got {type(layer).__name__} as layer {place}: see its to_dense()")
    return cast("list[KANLayer]", list(model.layers))


def check_data(name: str, data: Any) -> None:
    """Raise TypeError for what `batches` cannot take, under the argument's own name."""
    check_iterable(name, data, "a tensor, or an iterable of inputs or (input, ...) tuples")


def batches(data: Data, model: nn.Module) -> Iterator[Tensor]:
    """Inputs batch by batch, on the device and in the dtype of the model's first layer.

    data: a tensor (N, in), or an iterable (a DataLoader, a list) of tensors or of tuples whose first member is the input.
    """
    check_data("data", data)
    like = next(iter(kan_layers(model).values())).spline_weight
    for batch in [data] if isinstance(data, Tensor) else data:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"data: expected tensors or tuples that start with one, got {type(x).__name__}")
        yield x.to(device=like.device, dtype=like.dtype)


def first_rows(data: Data, model: nn.Module, max_samples: int, all_ranks: bool = False) -> Tensor:
    """The first `max_samples` rows of the data as one tensor (N, ...); raises ValueError for empty data.

    all_ranks: as many of every rank as make max_samples together, the same tensor on each of them.
    """
    if all_ranks:
        share = -(-max_samples // world_size())
        return rows_of_all_ranks(first_rows(data, model, share))
    taken: list[Tensor] = []
    for x in batches(data, model):
        taken.append(x[: max_samples - sum(map(len, taken))])
        if sum(map(len, taken)) >= max_samples:
            break
    if not taken or not sum(map(len, taken)):
        raise ValueError("data: expected at least one sample, got none")
    return torch.cat(taken)


def whole_weights(layer: KANLayer) -> tuple[Tensor, Tensor | None]:
    """layer.masked_weights(), in full on every rank where they are sharded."""
    base_weight = None if layer.base_weight is None else whole(layer.base_weight)
    return masked(whole(layer.spline_weight), base_weight, layer.edge_mask)


@torch.no_grad()
def watch_inputs(model: nn.Module, data: Data, layers: Iterable[KANLayer], visit: Callable[[KANLayer, Tensor], None]) -> None:
    """Run the model in eval mode over the data and call visit(layer, x (n, in)) on what each layer receives."""

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x, layer = args[0], cast(KANLayer, layer)
        if x.shape[-1:] == (layer.in_features,):  # else the layer's own error comes next
            visit(layer, x.detach().flatten(0, -2))

    layers = list(layers)
    if any(hasattr(layer.grid, "full_tensor") for layer in layers):
        raise ValueError("model: expected layers with all of their inputs and outputs, got tensor-parallel ones")
    training = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        model.eval()
        for x in batches(data, model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def layer_inputs(model: nn.Module, data: Data, max_samples: int, all_ranks: bool = False) -> dict[str, Tensor]:
    """What every KANLayer receives for the first `max_samples` rows of data (see first_rows): name -> (N, in)."""
    layers = kan_layers(model)
    seen: dict[KANLayer, list[Tensor]] = {layer: [] for layer in layers.values()}
    watch_inputs(model, first_rows(data, model, max_samples, all_ranks), seen, lambda layer, x: seen[layer].append(x))
    missing = [name for name, layer in layers.items() if not seen[layer]]
    if missing:
        raise ValueError(f"model: its forward never called {', '.join(missing)}")
    return {name: torch.cat(seen[layer]) for name, layer in layers.items()}
