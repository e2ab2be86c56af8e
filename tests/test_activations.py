"""Closed forms of the activations' derivatives against autograd's."""

import mpmath
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


EXACT = {
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "gelu": lambda x: x * mpmath.ncdf(x),
    "tanh": mpmath.tanh,
}


def of_backend(place, name, x, n):
    """n-th derivative of an activation at x (B), in float64: that of a layer of one edge whose spline is zero."""
    grid = uniform_grid(1, 5, 3, (-1.0, 1.0), place.device, x.dtype)
    spline, base = grid.new_zeros(1, 8, 1), grid.new_ones(1, 1)
    y = get(place.backend).contract_output(x[:, None].to(place.device), None, spline, base, grid, name, "clamp", n)
    return y.cpu().double()[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_every_backend_against_many_digits(dtype, name):
    """mpmath's derivatives with 40 digits, which no cancellation spoils."""
    x = torch.cat([torch.linspace(-12, 12, 41), torch.tensor([-0.003, 0.01, 0.3])])
    for n in range(8):
        with mpmath.workdps(40):
            exact = [float(mpmath.diff(EXACT[name], mpmath.mpf(value), n)) for value in x.tolist()]
        true = torch.tensor(exact, dtype=torch.float64)
        for place in places(dtype):
            error = (of_backend(place, name, x.to(dtype), n) - true).abs().max()
            # The terms of the polynomials sum up to at most 10 times the largest value (n = 7), less for smaller n; half a
            # rounding of each, a few of the exponential and of what makes tanh of it.
            assert error <= 12 * torch.finfo(dtype).eps * true.abs().max(), (place, n)


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
        for n in range(6):
            y = of_backend(place, name, torch.cat([near, far]), n)
            eps = torch.finfo(dtype).eps
            true = torch.tensor(truth.activation(name, near.double().numpy(), n))
            # Half a rounding of terms that sum up to 4 times the largest value (n = 5), and a few of what they are made of.
            floor = 12 * eps * max(1.0, float(true.abs().max()))
            # The truth itself rounds 1 - sigmoid, which it multiplies by |x| up to 89 and by coefficients up to (n + 1)!.
            floor += 89 * torch.finfo(torch.float64).eps * float(np.prod(range(1, n + 2)))
            assert ((y[: len(near)] - true).abs() <= floor).all(), (place, n)
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
