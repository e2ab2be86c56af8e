"""Launches made again without a plan: what was launched for operands of the same shapes, strides, dtypes and alignment.

A plan (launch.py) takes the host 13 to 23 us, and Triton's search for the compiled kernel 17 us a launch; remembered, two
launches take 10 us in all (contract_output of 4096 x 256 x 256, on a CPU, with a driver that launches nothing).
Triton specializes a kernel on what the key here has: dtypes, integers (all come from shapes, strides and the problem) and
whether addresses are multiples of 16.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kan_fast.backends.triton import interpreted, launch, tuning

if TYPE_CHECKING:
    from kan_fast.backends.triton.launch import Launch, Problem

_ALIGNMENT = 16  # bytes, Triton's
_MOST = 4096  # recipes; a process with more shapes begins anew

Operands = dict[str, Tensor | None]


@dataclass
class Step:
    """A compiled kernel, its programs in three dimensions, and its arguments in order; tensors' places say which tensor."""

    compiled: Any
    programs: tuple[int, int, int]
    arguments: list[Any]
    tensors: list[tuple[int, str | int]]  # (place, an operand's name or the number of a temporary)


@dataclass
class Recipe:
    """The launches of a contraction, and the temporary tensors (shape, dtype) that they share."""

    steps: list[Step]
    temporaries: list[tuple[tuple[int, ...], torch.dtype]]

    def run(self, operands: Operands, device: torch.device) -> None:
        """On the current device, which is that of the tensors, and its current stream."""
        temporaries = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.temporaries]
        for step in self.steps:
            arguments = step.arguments.copy()
            for place, name in step.tensors:
                arguments[place] = temporaries[name] if isinstance(name, int) else operands[name]
            step.compiled[step.programs](*arguments)


_recipes: dict[tuple[Any, ...], Recipe] = {}


def execute(name: str, problem: "Problem", operands: Operands) -> None:
    """Make the launches of contraction `name`; operands: those of launch.plan_*, by name, in its order.

    The first operand's device is that of all. Interpreted, there is nothing to remember.
    """
    if interpreted():
        launch.run(_plan(name, problem, operands), torch.device("cpu"))
        return
    x = operands["x"]
    assert x is not None
    device = x.device
    key = (name, problem, device, tuning.state(), torch.get_float32_matmul_precision(), *map(_of_operand, operands.values()))
    recipe = _recipes.get(key)
    if recipe is None:
        steps = _plan(name, problem, operands)
        compiled = launch.run(steps, device)
        if tuning.mode() == "tune" and torch.cuda.is_current_stream_capturing():
            return  # with tiles that have not been tuned
        if len(_recipes) >= _MOST:
            _recipes.clear()
        _recipes[key] = _remember(steps, compiled, operands)
    elif device.index == torch.cuda.current_device():
        recipe.run(operands, device)
    else:
        with torch.cuda.device(device):
            recipe.run(operands, device)


def _plan(name: str, problem: "Problem", operands: Operands) -> "list[Launch]":
    steps: list[Launch] = getattr(launch, f"plan_{name}")(*operands.values(), problem)
    return steps


def _of_operand(tensor: Tensor | None) -> Any:
    """What of an operand a launch depends on. Sizes are those of the problem."""
    return tensor if tensor is None else (tensor.dtype, tensor.stride(), tensor.data_ptr() % _ALIGNMENT)


def _remember(steps: "list[Launch]", compiled: list[Any], operands: Operands) -> Recipe:
    temporaries: list[Tensor] = []
    return Recipe(
        [_step(step, found, operands, temporaries) for step, found in zip(steps, compiled, strict=True)],
        [(tuple(tensor.shape), tensor.dtype) for tensor in temporaries],
    )


# Arguments of kernels that have another name than the operand, or stand for one that is absent.
_ALIASES = dict.fromkeys(("all_knots", "middles", "scales", "uniform"), "grid") | {
    "scale": "x", "base_weight": "spline_weight",
}  # fmt: skip


def _step(step: "Launch", compiled: Any, operands: Operands, temporaries: list[Tensor]) -> Step:
    names = step.kernel.arg_names
    arguments = [step.arguments[name] for name in names]
    tensors: list[tuple[int, str | int]] = []
    for place, (name, value) in enumerate(zip(names, arguments, strict=True)):
        if not isinstance(value, Tensor):
            continue
        # By name, and only then by identity: two operands may be one tensor now, and two the next time.
        known = [each for each in (name, _ALIASES.get(name)) if each is not None and operands.get(each) is value]
        if known:
            tensors.append((place, known[0]))
        else:
            assert not any(value is each for each in operands.values()), name
            number = next((at for at, each in enumerate(temporaries) if each is value), len(temporaries))
            if number == len(temporaries):
                temporaries.append(value)
            tensors.append((place, number))
        arguments[place] = None
    x, y, z = (*step.programs, 1, 1)[:3]
    return Step(compiled, (x, y, z), arguments, tensors)
