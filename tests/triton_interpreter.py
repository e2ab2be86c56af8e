"""Triton's interpreter as backends/triton/interpreter.py mends it, run by test_triton.py like triton_kernels.py."""

import pytest
import torch
import triton
import triton.language as tl
from triton_kernels import INTERPRETED, interpreted_only

from kan_fast.backends.triton import launch

if INTERPRETED:
    from kan_fast.backends.triton import interpreter


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@triton.jit
def _round_trip(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(out + at, (value * 1.5).to(tl.bfloat16) + value.to(tl.bfloat16))


@triton.jit
def _product(x, y, out, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    a = tl.load(x + row[:, None] * DEPTH + k[None, :])
    b = tl.load(y + k[:, None] * ROWS + row[None, :])
    tl.store(out + row[:, None] * ROWS + row[None, :], tl.dot(a, b))


def compute(kernel, **arguments):
    interpreter.run([launch.Launch(kernel, (1,), arguments)])


@interpreted_only
def test_bfloat16_rounds_and_adds_as_torch_does():
    x, out = torch.randn(4096), torch.empty(4096, dtype=torch.bfloat16)
    compute(_round_trip, x=x, out=out, SIZE=4096)
    assert torch.equal(out, (x * 1.5).bfloat16() + x.bfloat16())


@interpreted_only
def test_products_read_what_tensor_cores_read():
    x, y, out = torch.randn(16, 32), torch.randn(32, 16), torch.empty(16, 16)
    compute(_product, x=x.bfloat16(), y=y.bfloat16(), out=out, ROWS=16, DEPTH=32)
    exact = x.bfloat16().double() @ y.bfloat16().double()
    assert (out - exact).abs().max() < 1e-4


@interpreted_only
def test_products_that_no_gpu_takes_are_refused():
    x, out = torch.randn(16, 8), torch.empty(16, 16)
    with pytest.raises(Exception, match=r"depth of at least 16"):
        compute(_product, x=x, y=x.t().contiguous(), out=out, ROWS=16, DEPTH=8)
