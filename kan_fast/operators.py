"""The operators torch.ops.kan_fast.*: how compilers, exporters and tracers see the contractions.

The schema is in Python, so the operators exist without any compiled library. The name of the backend travels in it; "auto"
is resolved when the operator runs, so an exported program takes the best backend of the machine that it runs on.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from kan_fast.backends import choose, fake, get

_C = torch._C
_operators = torch.ops.kan_fast
# The mode of torch.autograd.grad(..., is_grads_batched=True), whose tensors look like others and are not.
_BATCHED_GRADS: Any = _C._parse_dispatch_key("VmapMode")
_library = torch.library.Library("kan_fast", "DEF")


def dispatched(x: Tensor) -> bool:
    """Whether torch's dispatcher must see the call: dispatch modes (fake tensors, tracers), subclasses, batched grads."""
    return (
        _C._len_torch_dispatch_stack() > 0
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or _C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADS)
    )


def forward_mode() -> bool:
    """Whether tangents may be about. Tracers of torch.compile enter a level without telling `forward_ad`."""
    return forward_ad._current_level >= 0 or _C._len_torch_dispatch_stack() > 0


def register(name: str, arguments: str, results: str, weight_at: int, function: type[torch.autograd.Function]) -> None:
    """Define torch.ops.kan_fast.<name>, whose forward is the backends' and whose derivatives are those of `function`.

    The argument at `weight_at` has the dtype of weights, by which "auto" chooses.
    """

    def chosen(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return *args[:-1], choose(args[-1], args[0].device, args[weight_at].dtype)

    def below_autograd(*args: Any) -> Any:
        *rest, backend = chosen(args)
        return getattr(get(backend), name)(*rest)

    def autograd(keyset: Any, *args: Any) -> Any:
        differentiate = torch.is_grad_enabled() and _C._any_requires_grad(*args)
        if differentiate or (_C._is_fwd_grad_enabled() and forward_mode()):
            return function.apply(*(args if dispatched(args[0]) else chosen(args)))
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *args)

    def without_values(*args: Any) -> Any:
        return getattr(fake, name)(*args[:-1])

    options = "str activation, str outside, int n, str backend"
    _library.define(f"{name}({arguments}, {options}) -> {results}", tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(_operators, name).default
    _library.impl(name, below_autograd, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    # Where torch.func transforms enter: the Function knows what to do at each of their levels.
    _library.impl(name, function.apply, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"kan_fast::{name}", without_values, lib=_library)
