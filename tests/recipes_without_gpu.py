"""What the Triton backend asks of Triton, remembered launches and compiling ahead, by test_triton.py in a process of its own.

A driver that has no GPU says it is one of compute capability 9.0: kernels are compiled for it, and launches written down
instead of made. What Triton passes at the first call is the truth for what is passed at the second.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver

import kan_fast.backends.triton as backend
from kan_fast.backends.triton import launch, recipes, tiles, tuning
from kan_fast.spline import uniform_grid

WRITTEN: list[tuple[Any, ...]] = []


class Utilities:
    def load_binary(self, name, kernel, shared, device):
        return None, name, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Launcher:
    """Called as Triton's launchers are: programs, stream, function, metadata and hooks, then the kernel's arguments."""

    def __init__(self, source, metadata):
        self.hash, self.count = source.hash(), len(source.fn.arg_names)

    def __call__(self, x, y, z, stream, function, *rest):
        assert len(rest) == 4 + self.count
        WRITTEN.append((self.hash, (x, y, z), stream, rest[4:]))


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _driver(monkeypatch):
    driver.set_active(Driver())
    monkeypatch.setattr(launch, "target_of", lambda device: tiles.Target("cuda", 90, 132))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(recipes, "_recipes", {})
    WRITTEN.clear()


def operands(batch=600, inputs=40, outputs=40, dtype=torch.float32, scaled=False, activation="silu", transposed=False):
    x, g = torch.rand(batch, inputs).to(dtype), torch.rand(batch, outputs).to(dtype)
    if transposed:
        x, g = x.t().contiguous().t(), g.t().contiguous().t()
    return {
        "x": x, "scale": torch.rand(batch, inputs).to(dtype) if scaled else None, "g": g,
        "spline": torch.rand(inputs, 8, outputs).to(dtype),
        "base": torch.rand(inputs, outputs).to(dtype) if activation != "none" else None,
        "grid": uniform_grid(inputs, 5, 3, (-1.0, 1.0)), "activation": activation,
    }  # fmt: skip


def call(operation, o, n=0):
    """The launches of a contraction, and its tensors, its results among them."""
    modes = o["activation"], "zero", n
    del WRITTEN[:]
    if operation == "contract_output":
        results = [backend.contract_output(o["x"], o["scale"], o["spline"], o["base"], o["grid"], *modes)]
    elif operation == "contract_input":
        results = [backend.contract_input(o["x"], o["spline"], o["base"], o["g"], o["grid"], *modes)]
    else:
        results = list(backend.contract_weight(o["x"], o["scale"], o["g"], o["grid"], 3, *modes))
    given = [value for value in o.values() if isinstance(value, torch.Tensor)]
    return list(WRITTEN), [*given, *results]


def described(launches, tensors):
    """Of a launch all that is compared: tensors by their place among those that are known, others by their form."""

    def one(value, temporaries):
        if not isinstance(value, torch.Tensor):
            return value
        for place, tensor in enumerate(tensors):
            if value is tensor:
                return place
        known = next((at for at, each in enumerate(temporaries) if each is value), None)
        if known is None:
            temporaries.append(value)
            known = len(temporaries) - 1
        return "temporary", known, tuple(value.shape), value.dtype

    temporaries: list[torch.Tensor] = []
    return [(*start, [one(value, temporaries) for value in arguments]) for *start, arguments in launches]


CASES = [
    {}, {"dtype": torch.bfloat16, "scaled": True}, {"activation": "none"}, {"transposed": True},
    {"batch": 5000, "inputs": 2, "outputs": 5}, {"batch": 5000, "inputs": 3, "outputs": 5, "scaled": True},
]  # fmt: skip


@pytest.mark.parametrize("operation", ["contract_output", "contract_input", "contract_weight"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_remembered_is_what_triton_does(operation, case):
    first, again = operands(**case), operands(**case)
    truth = described(*call(operation, first))
    assert truth and len(recipes._recipes) == 1
    assert described(*call(operation, first)) == truth
    assert described(*call(operation, again)) == truth  # and tensors are those of this call
    assert len(recipes._recipes) == 1


def test_tensors_that_were_one_may_be_two():
    o = operands()
    o["g"] = o["x"]
    call("contract_weight", o)
    other = operands()
    remembered = described(*call("contract_weight", other))
    assert len(recipes._recipes) == 1
    recipes._recipes.clear()
    assert described(*call("contract_weight", other)) == remembered


@pytest.mark.parametrize("operation", ["contract_output", "contract_input", "contract_weight"])
def test_another_specialization_is_another_recipe(operation):
    """Addresses that are no multiple of 16, strides, orders, dtypes, precision: what Triton compiles apart."""
    o = operands()
    shifted = {**o, "x": torch.rand(1 + 600 * 40)[1:].view(600, 40)}
    wide = {**o, "x": torch.rand(600, 41)[:, :40]}
    calls = [(o, 0), (shifted, 0), (wide, 0), (o, 1), (operands(transposed=True), 0), ({**o, "x": o["x"].bfloat16()}, 0)]
    for number, (given, n) in enumerate(calls, 1):
        truth = described(*call(operation, given, n))
        assert len(recipes._recipes) == number
        assert described(*call(operation, given, n)) == truth
    try:
        torch.set_float32_matmul_precision("high")
        call(operation, o)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(recipes._recipes) == len(calls) + 1


def test_tiles_that_may_be_others_are_asked_for_again(monkeypatch):
    o = operands()
    call("contract_output", o)
    with tuning.use("off"):
        call("contract_output", o)
        assert len(recipes._recipes) == 2
    call("contract_output", o)
    assert len(recipes._recipes) == 3
    monkeypatch.setattr(recipes, "_MOST", 3)
    call("contract_input", o)
    assert len(recipes._recipes) == 1


@pytest.mark.parametrize("kernel", ["contract_output", "contract_input", "contract_weight"])
def test_tiles_are_compiled_before_they_are_tried(kernel):
    n = int(kernel == "contract_input")
    problem = launch.Problem(256, 32, 8, 64, 3, "silu", "zero", n, torch.float32, launch.target_of(None))
    trial = tuning.Trial(kernel, problem, torch.device("cpu"))
    candidates = tuning.neighbours(kernel, tuning._default(kernel, problem))[:3]
    refused = replace(candidates[0], depth=24)  # tl.arange asks for a power of two
    trial.compile([refused, *candidates])
    steps = [step for tile in candidates for rows in (128, None) for step in trial._plan(tile, rows)[0]]
    known = {step.kernel: len(step.kernel.device_caches[0][0]) for step in steps}
    launch.run(steps, torch.device("cpu"))
    assert {step.kernel: len(step.kernel.device_caches[0][0]) for step in steps} == known
    assert len(WRITTEN) == len(steps)
    with pytest.raises(CompilationError):
        launch.run(trial._plan(refused, None)[0], torch.device("cpu"))
