"""Fixtures: every backend on every device of this machine, reproducible numbers, poisoned memory."""

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# One thread everywhere: tests share the machine, and a second thread must not change a result unseen.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from kan_fast import backends

settings.register_profile(
    "kan_fast", deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("kan_fast")


class Place(NamedTuple):
    """A backend on a device."""

    backend: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend}-{self.device.type}"


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Cases are named alike in every process: repr() of a built-in function has an address in it."""
    text = repr(val)
    return re.sub(r" of type object at 0x\w+", "", text) if " of type object at 0x" in text else None


def places(dtype: torch.dtype) -> list[Place]:
    """Every backend with every device that it serves; a backend that is not built is simply not there."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    return [
        Place(name, device)
        for device in devices
        for name in backends.NAMES
        if backends.reason_not(name, device, dtype) is None
    ]


def parameters(dtype: torch.dtype) -> list[Any]:
    """`places` for parametrize; those on a GPU carry the mark `gpu`."""
    return [pytest.param(p, marks=[pytest.mark.gpu] * (p.device.type == "cuda"), id=str(p)) for p in places(dtype)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """KAN_FAST_TEST_SHARD=2/8 keeps every eighth test, from the second on: for runs in several processes."""
    shard = os.environ.get("KAN_FAST_TEST_SHARD")
    if shard is not None:
        index, count = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % count != index - 1])
        items[:] = items[index - 1 :: count]


@pytest.fixture(params=parameters(torch.float32))
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(params=parameters(torch.float64))
def place64(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """For what has no backend of its own choice."""
    return request.param


@pytest.fixture(scope="session")
def library() -> Path:
    """The CUDA kernels as a library of the emulation."""
    from tests.cuda_emulation.build import build

    return build()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so a result that nobody wrote shows.

    Those that the native backend allocates for itself are full of the byte 0xfe: -1.7e38, or -5e303 in float64.
    """
    perturb = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    fill = -6  # glibc's M_PERTURB: new memory is filled with the value's complement
    torch.use_deterministic_algorithms(True)
    perturb(fill, 1)
    assert torch.empty(3).isnan().all()
    yield
    perturb(fill, 0)
    torch.use_deterministic_algorithms(False)
