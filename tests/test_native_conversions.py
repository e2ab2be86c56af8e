"""bfloat16 and float16 enter and leave the native kernels exactly as torch converts them."""

import pytest
import torch
from torch import Tensor

from kan_fast import available_backends
from kan_fast.functional import kan_linear

pytestmark = pytest.mark.skipif("native" not in available_backends(), reason="the native backend was not built here")

NARROW = [torch.bfloat16, torch.float16]


def through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N,) through a layer of one edge, whose spline is 0 and whose base branch is 1 * x."""
    spline_weight, base_weight = torch.zeros(1, 8, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    grid = torch.arange(-3, 9).float()[None] * 0.4 - 1
    y = kan_linear(x[:, None], spline_weight, grid, base_weight, base_activation="identity", outside="clamp", backend="native")
    return y[:, 0]


def bits(x: Tensor) -> Tensor:
    """Bit patterns, with one NaN and one zero: 0 * x + x loses the sign of -0, and NaN's payload means nothing."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return torch.where(x == 0, torch.zeros_like(x), x).view(torch.int16)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_16_bit_value_comes_back(dtype: torch.dtype) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(bits(through(x, dtype)), bits(x))


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    # Halfway between neighbours, where rounding goes to the even one, and a float32 step to either side of it.
    half = (every[:-1] + (every[1:] - every[:-1]) / 2)[(every[:-1] * every[1:]) > 0]
    up, down = torch.full_like(half, float("inf")), torch.full_like(half, float("-inf"))
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randn(20000, generator=generator) * 10.0 ** torch.randint(-9, 9, (20000,), generator=generator)
    limits = [65504.0, 65519.0, 65520.0, 65536.0, 3.4e38, 2.0**-24, 2.0**-25, 2.0**-26, float("inf"), float("nan")]
    special = torch.tensor(limits)
    x = torch.cat([half, half.nextafter(up), half.nextafter(down), scattered, special, -special])
    assert torch.equal(bits(through(x, dtype)), bits(x.to(dtype)))
