"""Swapping the layers of any module for KANLayers of the same function, in place."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.checks import expect
from kan_fast.nn.interop.efficient_kan import from_efficient_kan
from kan_fast.nn.interop.pykan import from_pykan
from kan_fast.nn.layer import KANLayer

# Rows of the inputs on which an old and a new layer are compared.
_ROWS = 32

LinearChoice = bool | Callable[[str, nn.Linear], bool]


class PykanOutputs(nn.Module):
    """A KANLayer where code expects the four results of pykan's KANLayer.

    forward: (N, in) -> (y (N, out), None, None, None). `layer` is the KANLayer; its edge_values(x) (N, in, out) are pykan's
    third result, transposed.
    """

    def __init__(self, layer: KANLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None, None, None]:
        """(N, in) -> (y (N, out), None, None, None)"""
        return self.layer(x), None, None, None


def replace_layers(model: nn.Module, *, linear: LinearChoice = False, backend: str = "auto", **linear_kwargs: Any) -> nn.Module:
    """Swap the KAN layers of other packages inside a model, and on request nn.Linear, for KANLayers of the same function.

    In place: names, dtype, device, training mode and requires_grad stay; the parameters are new, so make optimisers after.
    Returns the model, or what stands for it if it is itself such a layer.

    - efficient-kan's KANLinear becomes a KANLayer, also inside its KAN.
    - pykan's MultKAN becomes a KAN; a pykan KANLayer elsewhere, which returns four things, becomes a PykanOutputs.
    - nn.Linear, with linear=True or where linear(name, module) is true, becomes a KANLayer whose base activation is the
      identity, with the weight and bias in its base branch and splines that start at zero. linear_kwargs are KANLayer's
      grid_size, spline_order, grid_range and outside. Subclasses of nn.Linear are left alone.

    Foreign layers and their successors are compared in float64, on the range of the knots and beyond.
    Raises ValueError when they differ (a variant under the same name), when nothing was found, for modules with hooks or
    parametrizations, which would be lost, and for a linear weight that other modules share.
    """
    expect(isinstance(model, nn.Module), "model", "a module", model)
    places: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            places[id(parameter)].append(f"{name}.{attribute}".strip("."))
    successors: dict[nn.Module, nn.Module | None] = {}

    def successor(name: str, module: nn.Module) -> nn.Module | None:
        """What replaces a module, None if it stays; the same answer in every place where the module stands."""
        if module not in successors:
            new = _foreign(name, module, backend)
            if new is None and type(module) is nn.Linear and (linear(name, module) if callable(linear) else linear):
                new = _from_linear(name, module, places, backend, linear_kwargs)
            successors[module] = new
            if new is None:
                for attribute, child in list(module._modules.items()):
                    inner = None if child is None else successor(f"{name}.{attribute}".strip("."), child)
                    if inner is not None:
                        module.register_module(attribute, inner)
        return successors[module]

    root = successor("", model)
    if not any(new is not None for new in successors.values()):
        wanted = "layers of efficient-kan or pykan" + (", or nn.Linear that `linear` chooses," if linear else "")
        raise ValueError(f"model: expected {wanted} in {type(model).__name__}, found none")
    _leave_fast_paths(model)
    return model if root is None else root


def _foreign(name: str, module: nn.Module, backend: str) -> nn.Module | None:
    """The successor of a layer or network of another package, None for anything else."""
    if isinstance(module, KANLayer):
        return None
    new: nn.Module
    if _has(module, "base_weight", "spline_weight", "grid", "base_activation"):
        _check_plain(name, module)
        new = from_efficient_kan(module, backend=backend)
        _check_same(name, module, new)
    elif _has(module, "act_fun", "symbolic_fun", "node_bias_0"):
        _check_plain(name, module)
        new = from_pykan(module, backend=backend)
        if hasattr(new, "input_index"):
            raise ValueError(f"model: {name or 'the model'} has lost inputs (prune_input): convert it with from_pykan")
        for number, layer in enumerate(module.act_fun):  # type: ignore[arg-type]  # a ModuleList, which _has cannot tell
            _check_same(f"{name}.act_fun.{number}".strip("."), layer, from_pykan(layer))
    elif _has(module, "coef", "scale_base", "scale_sp", "mask", "grid"):
        _check_plain(name, module)
        layer = from_pykan(module, backend=backend)
        _check_same(name, module, layer)
        assert isinstance(layer, KANLayer)
        new = PykanOutputs(layer).train(module.training)
    else:
        return None
    return new


def _from_linear(name: str, module: nn.Linear, places: dict[int, list[str]], backend: str, kwargs: dict[str, Any]) -> KANLayer:
    _check_plain(name, module)
    for parameter in module.parameters():
        if len(places[id(parameter)]) > 1:
            raise ValueError(
                f"model: {name!r} shares a parameter ({', '.join(places[id(parameter)])}); leave it out with `linear`"
            )
    weight = module.weight
    layer = KANLayer(
        module.in_features,
        module.out_features,
        base_activation="identity",
        bias=module.bias is not None,
        backend=backend,
        device=weight.device,
        dtype=weight.dtype,
        **kwargs,
    )
    assert layer.base_weight is not None
    with torch.no_grad():
        layer.spline_weight.zero_()
        layer.base_weight.copy_(weight.t())
        if layer.bias is not None:
            layer.bias.copy_(module.bias)
            layer.bias.requires_grad_(module.bias.requires_grad)
    layer.base_weight.requires_grad_(weight.requires_grad)
    layer.spline_weight.requires_grad_(weight.requires_grad)
    return layer.train(module.training)


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _check_plain(name: str, module: nn.Module) -> None:
    """Raise where the successor would lose something that was added to the module."""
    for inner, part in module.named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks) or nn.utils.parametrize.is_parametrized(part):
            where = f"{name}.{inner}".strip(".") or "the model"
            raise ValueError(f"model: {where} has hooks or parametrizations, which its successor would lose; remove them first")


@torch.no_grad()
def _check_same(name: str, old: nn.Module, new: nn.Module) -> None:
    """Raise unless both layers agree, in float64, to the rounding of the folded weights."""
    assert isinstance(new, KANLayer)
    eps = max(torch.finfo(new.spline_weight.dtype).eps, 1e-9)
    old, layer = copy.deepcopy(old).double().eval(), copy.deepcopy(new).double().eval()
    layer.backend = "reference"
    low, high = layer.grid[:, 0], layer.grid[:, -1]
    unit = torch.rand(_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = low + (high - low) * (1.5 * unit.to(low.device) - 0.25)
    given = old(x)
    given = given[0] if isinstance(given, tuple) else given
    # Every weight was rounded once, by eps / 2 of itself; bases are not negative and sum to at most 1.
    size = layer.spline_weight.abs().amax(1).sum(0)
    if layer.base_weight is not None:
        size = size + layer._base(x, 0).abs() @ layer.base_weight.abs()
    wrong = ~((given - layer(x)).abs() <= eps * size + 1e-30)  # NaN is wrong
    if bool(wrong.any()):
        raise ValueError(
            f"model: {name or 'the model'} ({type(old).__module__}.{type(old).__name__}) does not compute the published"
            f" formula: its outputs differ from its successor's by {float((given - layer(x)).abs().max()):.3g}"
        )


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's transformer encoder from reading linear1.weight and linear2.weight past the layers, as it does in eval."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _without_linear(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(map(_without_linear, module.layers)):
            module.use_nested_tensor = False


def _without_linear(layer: nn.Module) -> bool:
    return any(isinstance(getattr(layer, name, None), KANLayer) for name in ("linear1", "linear2"))
