"""Several processes, on PyTorch's own engines.

Data parallel: DistributedDataParallel and fully_shard take a KAN as they take any module. Give every layer its own group
(`for layer in model.layers: fully_shard(layer)`, then `fully_shard(model)`), so that one layer at a time is whole.

Tensor parallel: `parallelize_kan(model, mesh)`, or the styles ShardOutputs and ShardInputs in a plan of parallelize_module.
Importing this module teaches DTensor the contractions, in every order of derivative: sharded by rows, inputs or outputs.

Sample-based tools reduce over ranks: see kan_fast.ranks. Examples: examples/train_distributed.py, examples/SCALING.md.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from kan_fast import ops
from kan_fast.checks import check_plain, expect
from kan_fast.nn import KAN, KANLayer
from kan_fast.traverse import network_layers

# Dimensions of every tensor by name: b rows, i inputs, f bases, o outputs, t knots.
_SHAPES = {"x": "bi", "scale": "bi", "g": "bo", "spline_weight": "ifo", "base_weight": "io", "grid": "it"}
_RESULTS = {
    ops.contract_output: ("bo",),
    ops.contract_input: ("bi",),
    ops.contract_weight: ("ifo", "io"),
    ops.contract_backward: ("bi", "ifo", "io"),
}


def _placement(shape: str, name: str, otherwise: Placement) -> Placement:
    return Shard(shape.index(name)) if name in shape else otherwise


def _register(operation: Any) -> None:
    """Let DTensor split a contraction along b, i or o.

    Every contraction is a sum of products over all names that its result does not have, so each rank does it with its part
    of one name; a result without that name is a part of the sum.
    """
    operator = getattr(torch.ops.kan_fast, operation.__name__).default
    arguments = [argument.name for argument in operator._schema.arguments]
    results = _RESULTS[operation]

    @register_sharding(operator)
    def acceptable(*args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        def placements(name: str) -> list[Placement | None]:
            return [
                _placement(_SHAPES[argument], name, Replicate()) if argument in _SHAPES and value is not None else None
                for argument, value in zip(arguments, args, strict=True)
            ]

        whole = [Replicate() for _ in results], placements("-")  # a name that no tensor has
        split = [([_placement(shape, name, Partial()) for shape in results], placements(name)) for name in "bio"]
        return [whole, *split]  # type: ignore[list-item]


for _operation in _RESULTS:
    _register(_operation)


class _Style(ParallelStyle):
    """Shards the parameters and buffers of a KANLayer along one name, and says how x and y lie."""

    name: str
    sharded: str
    wanted: Placement

    def __init__(self, input_layout: Placement, output_layout: Placement, use_local_output: bool) -> None:
        super().__init__()
        self.input_layout, self.output_layout, self.use_local_output = input_layout, output_layout, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, KANLayer):
            raise TypeError(f"module: expected a KANLayer, got {type(module).__name__}")
        check_plain(module)
        return distribute_module(module, device_mesh, self._partition, self._prepare, self._finish)

    def _partition(self, _: str, module: nn.Module, mesh: DeviceMesh) -> None:
        shapes = {**_SHAPES, "bias": "o", "edge_mask": "io"}
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            placements = [_placement(shapes[name], self.name, Replicate())]
            sharded = distribute_tensor(value.detach(), mesh, placements, src_data_rank=self.src_data_rank)
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, nn.Parameter(sharded, requires_grad=value.requires_grad))
            else:
                module.register_buffer(name, sharded)

    def _prepare(self, _: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        (x,) = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [self.input_layout], run_check=False)
        return x.redistribute(placements=[self.wanted])

    def _finish(self, _: nn.Module, output: Any, __: DeviceMesh) -> Any:
        output = output.redistribute(placements=[self.output_layout])
        return output.to_local() if self.use_local_output else output


class ShardOutputs(_Style):
    """Each rank has some of a KANLayer's outputs, as ColwiseParallel does it for nn.Linear.

    spline_weight (in, G + k, out / ranks), base_weight (in, out / ranks), bias (out / ranks), the whole grid. x whole on
    every rank; the gradient of x is summed over ranks. Layouts are of the last dimension; by default y stays sharded.
    """

    name, sharded = "o", "outputs"
    wanted = Replicate()

    def __init__(
        self,
        *,
        input_layout: Placement | None = None,
        output_layout: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layout or Replicate(), output_layout or Shard(-1), use_local_output)


class ShardInputs(_Style):
    """Each rank has some of a KANLayer's inputs, as RowwiseParallel does it for nn.Linear.

    spline_weight (in / ranks, G + k, out), base_weight (in / ranks, out), grid (in / ranks, knots), the whole bias. x
    sharded by its last dimension; y is summed over ranks, by default to the whole y on every rank.
    """

    name, sharded = "i", "inputs"
    wanted = Shard(-1)

    def __init__(
        self,
        *,
        input_layout: Placement | None = None,
        output_layout: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layout or Shard(-1), output_layout or Replicate(), use_local_output)


def parallelize_kan(model: KAN, mesh: DeviceMesh) -> KAN:
    """Shard a KAN over a mesh of one dimension, in place: outputs of even layers, inputs of odd ones and of the last one.

    x (..., in) and y (..., out) are plain tensors, the same on every rank. A pair of layers sums its output over ranks in
    the forward pass and the gradient of its input in the backward pass, and nothing else crosses ranks. Widths between the
    layers of a pair need not be multiples of the number of ranks; DTensor wants them not to be smaller.
    Parameters become DTensors: make the optimiser afterwards. For two dimensions, shard with the mesh's tensor-parallel
    dimension first and fully_shard over the other one. Second derivatives with respect to x need torch's collectives to be
    differentiable twice: those of torch 2.13 are, those of 2.11 are not (autograd then says that x was not used).
    """
    expect(isinstance(mesh, DeviceMesh), "mesh", "a DeviceMesh", mesh)
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}: take one with mesh[name]")
    layers = network_layers(model)
    for place, layer in enumerate(layers):
        check_plain(layer, f"layers.{place}")
    last = len(layers) - 1
    styles = [ShardOutputs if place % 2 == 0 and place != last else ShardInputs for place in range(len(layers))]
    for place, (layer, style) in enumerate(zip(layers, styles, strict=True)):
        if (layer.in_features if style is ShardInputs else layer.out_features) < mesh.size():
            raise ValueError(
                f"model: expected widths of at least the {mesh.size()} ranks where a layer is sharded, got"
                f" {layer.in_features} -> {layer.out_features} in layer {place}, of which the {style.sharded} are sharded"
            )
    for place, (layer, style) in enumerate(zip(layers, styles, strict=True)):
        options: dict[str, Any] = {"use_local_output": place == last}
        if style is ShardInputs:
            if place == 0:
                options["input_layout"] = Replicate()
            elif place < last and styles[place + 1] is ShardInputs:
                options["output_layout"] = Shard(-1)
        style(**options)._apply(layer, mesh)
    return model
