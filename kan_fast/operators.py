"""The operators torch.ops.kan_fast.*: how compilers, exporters and tracers see the contractions.

The schema is in Python, so the operators exist without any compiled library. The name of the backend travels in it; "auto"
is resolved when the operator runs, so an exported program takes the best backend of the machine that it runs on.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

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


def register(
    schema: str,
    function: type[torch.autograd.Function],
    compute: Callable[..., Any],
    without_values: Callable[..., Any],
    settle: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda args: args,
) -> None:
    """Define torch.ops.kan_fast.<name>, whose derivatives are those of `function`.

    schema: "name(arguments) -> results". compute is the operation itself, without_values its results for fake tensors.
    settle makes of its arguments those that `function` works with where no tracer looks.
    """

    def autograd(keyset: Any, *args: Any) -> Any:
        differentiate = torch.is_grad_enabled() and _C._any_requires_grad(*args)
        if differentiate or (_C._is_fwd_grad_enabled() and forward_mode()):
            return function.apply(*(args if dispatched(args[0]) else settle(args)))
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *args)

    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(_operators, name).default
    _library.impl(name, compute, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    # Where torch.func transforms enter: the Function knows what to do at each of their levels.
    _library.impl(name, function.apply, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"kan_fast::{name}", without_values, lib=_library)
