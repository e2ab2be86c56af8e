"""Models that run without kan_fast: programs of torch.export, AOTInductor packages, ONNX files.

torch.export keeps the contractions as operators torch.ops.kan_fast.*, which a process without this package does not have.
Here they are decomposed, so that standard operators alone are left, and no choice of a backend.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast import edges, ops
from kan_fast.backends import reference
from kan_fast.checks import check_path, expect

_aten = torch.ops.aten
# Beyond this a protobuf, which ends at 2 GiB, keeps its weights in a second file.
_LARGEST_PROTOBUF = 2**31 - 2**24


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Operator -> function of standard operators, for ExportedProgram.run_decompositions.

    The operators of kan_fast become their plain PyTorch reference (backends/reference.py), in any order of derivative, and
    searchsorted, which neither Core ATen nor ONNX has, becomes a count. The rest are torch's own decompositions.
    """
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    for operation in (ops.contract_output, ops.contract_input, ops.contract_weight, ops.contract_backward):
        name = operation.__name__
        table[getattr(torch.ops.kan_fast, name).default] = _without_backend(getattr(reference, name))
    table.update(edges.WHOLE)
    table[_aten.searchsorted.Tensor] = _searchsorted
    return table


def export_program(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """The model in evaluation mode as a program of standard operators, for torch.export.save and other exporters.

    example: the model's input (batch, ...), or a tuple of its inputs; values do not matter. dynamic_batch: the program takes
    any size of dimension 0, the same for all inputs; else that of the example.
    The program computes every basis of a layer's input in full, (batch, in, G + k) numbers.
    """
    expect(isinstance(model, nn.Module), "model", "a module", model)
    inputs = example if isinstance(example, tuple) else (example,)
    shapes = None
    if dynamic_batch:
        inputs = tuple(map(_two_rows, inputs))
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} if isinstance(value, Tensor) else None for value in inputs)
    modes = {module: module.training for module in model.modules()}
    try:
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
    finally:
        for module, mode in modes.items():
            module.training = mode
    decomposed: torch.export.ExportedProgram = program.run_decompositions(decomposition_table())
    return decomposed


def export_aoti(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
    options: dict[str, Any] | None = None,
) -> str:
    """Compile the model ahead of time, for the device that it is on, into a package; returns its path.

    path ends with ".pt2". example, dynamic_batch: see export_program. options: Inductor's. Needs a C++ compiler.
    torch._inductor.aoti_load_package(path)(x), or AOTIModelPackageLoader in C++, runs it.
    """
    path = os.fspath(check_path("path", path))
    if not path.endswith(".pt2"):
        raise ValueError(f"path: expected a name that ends with .pt2, got {path!r}")
    from torch._inductor import aoti_compile_and_package

    program = export_program(model, example, dynamic_batch=dynamic_batch)
    return aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
    **options: Any,
) -> None:
    """Write the model as an ONNX file of standard operators (opset 18 or newer), by torch.onnx's exporter.

    example, dynamic_batch: see export_program. options go to torch.onnx.export: input_names, output_names, opset_version.
    Weights of 2 GiB and more go to a second file beside it, path + ".data". Needs the extra kan_fast[export].
    """
    check_path("path", path)
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it, and says so less clearly
    except ImportError as error:
        raise ImportError("export_onnx needs onnx and onnxscript: pip install 'kan_fast[export]'") from error
    program = export_program(model, example, dynamic_batch=dynamic_batch)
    size = sum(value.nbytes for value in program.state_dict.values()) + sum(
        value.nbytes for value in program.constants.values() if isinstance(value, Tensor)
    )
    written = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    assert written is not None
    written.save(os.fspath(path), external_data=size > _LARGEST_PROTOBUF)


def _without_backend(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: operation(*args[:-1])


def _searchsorted(
    sorted_sequence: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many of sorted_sequence (..., N) lie before each of values (..., M) -> (..., M). NaN counts 0."""
    if sorter is not None:
        raise NotImplementedError("sorter: searchsorted is exported without it")
    sequence, values = sorted_sequence[..., None, :], values[..., None]
    before = sequence <= values if right or side == "right" else sequence < values
    return before.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _two_rows(value: Any) -> Any:
    """Sizes 0 and 1 are taken for constants by torch.export."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        raise ValueError("example: expected tensors (batch, ...) with dynamic_batch, got a scalar")
    return value if len(value) > 1 else value.new_zeros(2, *value.shape[1:])
