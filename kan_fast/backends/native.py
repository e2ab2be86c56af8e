"""The C++ and CUDA kernels of csrc/, reached through the operators that kan_fast/_native.so defines.

csrc/ops.cpp checks shapes, dtypes and devices; where it refuses, checks.py says what is wrong, so that every backend
raises the same errors. Arguments and results are those of backends/reference.py.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kan_fast.activations import ACTIVATIONS
from kan_fast.backends import fake
from kan_fast.checks import check_problem
from kan_fast.spline import OUTSIDE

# The variable names another build of the library, such as the one with sanitizers.
_LIBRARY = Path(os.environ.get("KAN_FAST_NATIVE_LIBRARY") or Path(__file__).parent.parent / "_native.so")

_OPERATORS = (
    "contract_output", "contract_input", "contract_weight", "contract_backward", "network_output", "network_backward",
    "network_pays",
)  # fmt: skip

# kMaxOrder of csrc/kernels.h, and the largest n that check_codes of csrc/ops.cpp lets pass.
_MAX_ORDER, _MAX_DERIVATIVE = 5, 32


def _most_intervals(spline_order: int, outside: str) -> int:
    """The largest grid_size on CPUs, as check_intervals of csrc/ops.cpp has it."""
    return 65534 - (3 if outside == "zero" else 1) * spline_order


def _load() -> str | None:
    """Load the library; why it cannot be, or None."""
    if not _LIBRARY.exists() and "KAN_FAST_NATIVE_LIBRARY" in os.environ:
        return f"KAN_FAST_NATIVE_LIBRARY names {_LIBRARY}, which does not exist"
    if not _LIBRARY.exists():
        return "kan_fast was installed without its C++ extension; `python -m kan_fast.info` says more"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} cannot be loaded by torch {torch.__version__}: {error}"
    for name in _OPERATORS:
        if not hasattr(torch.ops.kan_fast_native, name):
            return f"{_LIBRARY.name} was built from older sources, without {name}: `make build` or `pip install .` renews it"
    return None


class _Codes(dict[str, int]):
    """Name -> position, with an error that names the argument."""

    def __init__(self, argument: str, names: tuple[str, ...]) -> None:
        super().__init__(zip(names, range(len(names)), strict=True))
        self._argument = argument

    def __missing__(self, name: str) -> int:
        raise ValueError(f"{self._argument}: expected one of {', '.join(self)}, got {name!r}")


_activation_code = _Codes("base_activation", ACTIVATIONS)
_outside_code = _Codes("outside", OUTSIDE)


def _bind_network(name: str) -> Any:
    """As _bind, for the operators of whole networks, which have no order of derivative."""
    operator = getattr(torch.ops.kan_fast_native, name).default
    first = [argument.name for argument in operator._schema.arguments].index("activation")

    def without_values(*args: Any) -> Any:
        activation, outside, *rest = args[first:]
        return getattr(fake, name)(*args[:first], ACTIVATIONS[activation], OUTSIDE[outside], *rest)

    torch.library.register_fake(f"kan_fast_native::{name}", without_values)
    return operator


def _bind(name: str) -> Any:
    """An operator of the library, which fake tensors and compilers understand too."""
    operator = getattr(torch.ops.kan_fast_native, name).default
    # Behind n comes the precision, which a result's shape does not depend on.
    last = [argument.name for argument in operator._schema.arguments].index("n") + 1

    def without_values(*args: Any) -> Any:
        *rest, activation, outside, n = args[:last]
        return getattr(fake, name)(*rest, ACTIVATIONS[activation], OUTSIDE[outside], n)

    torch.library.register_fake(f"kan_fast_native::{name}", without_values)
    return operator


_not_loaded = _load()
if _not_loaded is None:
    _contract_output = _bind("contract_output")
    _contract_input = _bind("contract_input")
    _contract_weight = _bind("contract_weight")
    _contract_backward = _bind("contract_backward")
    _network_output = _bind_network("network_output")
    _network_backward = _bind_network("network_backward")
    _network_pays = torch.ops.kan_fast_native.network_pays.default


def reason_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such tensors; None if it can."""
    if _not_loaded is not None:
        return _not_loaded
    if device.type not in ("cpu", "cuda"):
        return f"it has no kernels for {device.type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("kan_fast_native::contract_output", device.type.upper()):
        return f"its extension was built without {device.type.upper()}"
    if device.type == "cuda":
        return _reason_not_cuda(device)
    return None


def _reason_not_cuda(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its extension has kernels for NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs a GPU of compute capability 8.0 or newer, this one has {major}.{minor}"


def _precision(x: Tensor) -> tuple[int, ...]:
    """The last argument of an operator: how a GPU multiplies float32 numbers; nothing for the CPU."""
    return (int(torch.get_float32_matmul_precision() != "highest"),) if x.is_cuda else ()


def _explain(
    x: Tensor,
    scale: Tensor | None,
    spline_weight: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor | None,
    grid: Tensor,
    spline_order: int | None,
    activation: str,
    outside: str,
    n: int,
) -> None:
    """Raise what the other backends raise for such arguments, or what of them only this one cannot serve."""
    check_problem(x, scale, spline_weight, base_weight, g, grid, spline_order, activation, outside, n)
    order = grid.shape[1] - spline_weight.shape[1] - 1 if spline_weight is not None else spline_order
    assert order is not None
    for name, value, most in (("spline_order", order, _MAX_ORDER), ("n", n, _MAX_DERIVATIVE)):
        if value > most:
            raise ValueError(
                f"{name}: expected 0 to {most} with backend 'native', got {value}; backend='reference' has no such limit"
            )
    grid_size, most = grid.shape[1] - 2 * order - 1, _most_intervals(order, outside)
    if x.device.type == "cpu" and grid_size > most:
        raise ValueError(
            f"grid: expected a grid_size of at most {most} with backend 'native' on CPUs, got {grid_size};"
            " backend='reference' has no such limit"
        )


def contract_output(
    x: Tensor,
    scale: Tensor | None,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
) -> Tensor:
    """sum_{i, f} scale * phi_f^(n)(x) * weight -> (B, O)"""
    codes = _activation_code[activation], _outside_code[outside]
    try:
        return _contract_output(x, scale, spline_weight, base_weight, grid, *codes, n, *_precision(x))  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):
        _explain(x, scale, spline_weight, base_weight, None, grid, None, activation, outside, n)
        raise


def contract_input(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
) -> Tensor:
    """sum_{f, o} phi_f^(n)(x) * weight * g -> (B, I)"""
    codes = _activation_code[activation], _outside_code[outside]
    try:
        return _contract_input(x, spline_weight, base_weight, g, grid, *codes, n, *_precision(x))  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):
        _explain(x, None, spline_weight, base_weight, g, grid, None, activation, outside, n)
        raise


def contract_weight(
    x: Tensor,
    scale: Tensor | None,
    g: Tensor,
    grid: Tensor,
    spline_order: int,
    activation: str,
    outside: str,
    n: int,
) -> tuple[Tensor, Tensor]:
    """sum_b scale * phi_f^(n)(x) * g -> (I, G + k, O) and (I, O)"""
    codes = _activation_code[activation], _outside_code[outside]
    try:
        return _contract_weight(x, scale, g, grid, spline_order, *codes, n, *_precision(x))  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):
        _explain(x, scale, None, None, g, grid, spline_order, activation, outside, n)
        raise


def contract_backward(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    activation: str,
    outside: str,
    n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(contract_input of order n + 1, *contract_weight of order n)"""
    codes = _activation_code[activation], _outside_code[outside]
    try:
        return _contract_backward(x, spline_weight, base_weight, g, grid, *codes, n, *_precision(x))  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):
        _explain(x, None, spline_weight, base_weight, g, grid, None, activation, outside, n)
        raise


def network_output(x: Tensor, layers: Sequence[Tensor], activation: str, outside: str, bias: bool) -> Tensor:
    """x (B, I) through all layers -> (B, O); arguments of all three as of stack.network."""
    return _network_output(x, layers, _activation_code[activation], _outside_code[outside], bias)  # type: ignore[no-any-return]


def network_backward(
    x: Tensor, layers: Sequence[Tensor], g: Tensor, activation: str, outside: str, bias: bool, need_x: bool, need_weights: bool
) -> list[Tensor]:
    """[dx (B, I) where need_x, gradients of all the layers' weights where need_weights] of sum(g * network_output)."""
    codes = _activation_code[activation], _outside_code[outside]
    return _network_backward(x, layers, g, *codes, bias, need_x, need_weights)  # type: ignore[no-any-return]


def network_pays(x: Tensor, layers: Sequence[Tensor], activation: str, outside: str, bias: bool) -> bool:
    """Whether one call is the fastest way even where the cost of calls is no matter."""
    return _network_pays(x, layers, _activation_code[activation], _outside_code[outside], bias)  # type: ignore[no-any-return]
