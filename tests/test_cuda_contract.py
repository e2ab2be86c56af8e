"""What test_native.py asks of every backend, of the CUDA kernels too: emulated, each shape by the kernel a GPU would choose."""

import inspect

import pytest
import test_native
import torch
from conftest import Place

from kan_fast import backends
from tests.cuda_emulation.backend import Backend
from tests.cuda_emulation.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")

# Its tests that take a place, collected here with the fixtures below; hypothesis would keep the places of its own module.
globals().update(
    (name, test)
    for name, test in vars(test_native).items()
    if name.startswith("test_")
    and not hasattr(test, "hypothesis")
    and {"place", "place64"} & set(inspect.signature(test).parameters)
)


@pytest.fixture
def place(library, monkeypatch):
    """A GPU of one multiprocessor, whose few blocks walk over many tiles."""
    monkeypatch.setitem(backends._modules, "emulated", Backend(library, multiprocessors=1))
    return Place("emulated", torch.device("cpu"))


@pytest.fixture
def place64(place):
    return place
