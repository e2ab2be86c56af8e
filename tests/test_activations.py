"""Closed forms of the activations' derivatives against autograd's."""

import numpy as np
import pytest
import torch
import truth
from conftest import places

from kan_fast.activations import ACTIVATIONS, activation
from kan_fast.backends import get
from kan_fast.spline import uniform_grid


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_derivatives_of_every_order(name):
    x = torch.cat([torch.linspace(-9, 9, 400, dtype=torch.float64), torch.tensor([-800.0, -40.0, 40.0, 800.0]).double()])
    for n in range(7):
        true = truth.activation(name, x.numpy(), n)
        # Autograd's own sum of up to 2^n products cancels: 1e-11 of the largest value.
        assert np.abs(activation(name, x, n).numpy() - true).max() <= 1e-11 * max(1.0, np.abs(true).max()), n


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_float32_has_errors_of_float32(name):
    x = torch.linspace(-9, 9, 1000)
    for n in range(6):
        exact = activation(name, x.double(), n)
        error = (activation(name, x, n).double() - exact).abs().max()
        # Horner's rule on a polynomial whose coefficients reach (n + 1)!: as many eps of the largest term.
        assert error <= 16 * torch.finfo(torch.float32).eps * max(1.0, float(np.prod(range(1, n + 2)))), n


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_nan_and_infinity(name):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38])
    for n in range(5):
        value = activation(name, x, n)
        assert value[0].isnan()
        if n > 0:
            assert value[1:].isfinite().all(), n
    torch.testing.assert_close(activation(name, x[1:], 0), limits(name, x[1:].double(), 0).float(), rtol=0, atol=0)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"^base_activation: expected one of silu, .*, got 'swish'"):
        activation("swish", torch.zeros(1), 0)


FAR = (90.0, 709.0, 1e30, 3e38, torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_every_backend_near_and_far(dtype, name):
    """From a sparse look at where values are to infinity, where what is right is the limit: torch itself has NaN there."""
    for place in places(dtype):
        near = torch.cat([torch.linspace(-89, 89, 1001), torch.linspace(-9, 9, 1000)]).to(dtype)
        far = torch.tensor([*FAR, *(-value for value in FAR)]).to(dtype)
        x = torch.cat([near, far])[:, None].to(place.device)
        grid = uniform_grid(1, 5, 3, (-1.0, 1.0), place.device, dtype)
        spline, base = grid.new_zeros(1, 8, 1), grid.new_ones(1, 1)
        for n in range(6):
            y = get(place.backend).contract_output(x, None, spline, base, grid, name, "clamp", n).cpu().double()[:, 0]
            eps = torch.finfo(dtype).eps
            true = torch.tensor(truth.activation(name, near.double().numpy(), n))
            # Horner's rule and the exponential, as below: coefficients reach (n + 1)!.
            floor = 16 * eps * max(1.0, float(np.prod(range(1, n + 2))))
            assert ((y[: len(near)] - true).abs() <= floor + 4 * eps * true.abs()).all(), (place, n)
            limit = limits(name, far.double(), n)
            # What is left where it would be 0: at most 12.65^6 exp(-80) / 2 of gelu, whose x is held at sqrt(2 * 80).
            torch.testing.assert_close(y[len(near) :], limit, rtol=4 * eps, atol=4e-29, msg=f"{place} {n}")


def limits(name, x, n):
    """Of the n-th derivative, x being farther out than 80."""
    if name == "tanh":
        return x.sign() if n == 0 else torch.zeros_like(x)
    if name == "identity":
        return x if n == 0 else torch.full_like(x, float(n == 1))
    return x.clamp(min=0) if n == 0 else (x > 0).double() * (n == 1)
