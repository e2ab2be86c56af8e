"""The table of backends: modules with the same four contractions, and the rule that picks one.

Every backend module has contract_output, contract_input, contract_weight, contract_backward (arguments as in
backends/reference.py) and `reason_not(device, dtype)`, which says why it cannot serve such tensors, or None.
"""

import importlib
import warnings
from types import ModuleType

import torch

from kan_fast.checks import DTYPES, check_dtype, expect

# In the order of preference of backend="auto".
NAMES = ("native", "triton", "reference")

_modules: dict[str, ModuleType] = {}
_choices: dict[tuple[str, torch.device, torch.dtype], str] = {}


def get(name: str) -> ModuleType:
    """The module of a backend. Raises ValueError for an unknown name, ImportError where it cannot be loaded."""
    module = _modules.get(name)
    if module is None:
        if name not in NAMES:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
        module = _modules[name] = importlib.import_module(f"kan_fast.backends.{name}")
    return module


def reason_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve tensors of `dtype` on `device`, in words; None if it can."""
    if dtype not in DTYPES:
        return f"it has no kernels for {dtype}"
    try:
        module = get(name)
    except ImportError as error:
        return f"it cannot be loaded: {error}"
    reason: str | None = module.reason_not(device, dtype)
    return reason


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of `dtype` on `device`: `name` itself, or the first fit for "auto".

    Raises ValueError for an unknown name, TypeError for a dtype that weights cannot have, RuntimeError with the reason where
    a backend that was asked for cannot serve. Warns once per device and dtype where "auto" finds no kernels.
    """
    key = (name, device, dtype)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _choose(name, device, dtype)
    return choice


def _choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    check_dtype("spline_weight", dtype)
    if name == "auto":
        return _first_fit(device, dtype)
    reason = reason_not(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot serve {dtype} tensors on {device}: {reason}")
    return name


def _first_fit(device: torch.device, dtype: torch.dtype) -> str:
    """The preferred backend of a device, and a warning where there is nothing but plain PyTorch."""
    reasons = []
    for candidate in NAMES:
        if (candidate, device.type) == ("triton", "cpu"):
            continue  # interpreted there, its kernels can be checked but are never a choice
        reason = reason_not(candidate, device, dtype)
        if reason is None:
            break
        reasons.append(f"{candidate}: {reason}")
    if candidate == "reference" and device.type in ("cpu", "cuda"):
        why = "; ".join(reasons)
        text = f"kan_fast computes on {device} by plain PyTorch, many times slower than its kernels. {why}"
        warnings.warn(text, stacklevel=5)
    return candidate


def available_backends(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names of the backends that serve tensors of `dtype` on `device`, preferred ones first.

    device None stands for every kind of device that this machine has. Raises TypeError for what is no device or no dtype,
    ValueError for a name that torch does not know.
    """
    expect(device is None or isinstance(device, torch.device | str), "device", "a torch.device, its name or None", device)
    expect(isinstance(dtype, torch.dtype), "dtype", "a torch.dtype", dtype)
    if device is not None:
        try:
            devices = [torch.device(device)]
        except RuntimeError:
            raise ValueError(f"device: expected a name such as 'cpu' or 'cuda:0', got {device!r}") from None
    else:
        devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    return tuple(name for name in NAMES if any(reason_not(name, d, dtype) is None for d in devices))
