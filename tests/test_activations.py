"""Closed forms of the activations' derivatives against autograd's."""

import numpy as np
import pytest
import torch
import truth

from kan_fast.activations import ACTIVATIONS, activation


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
    assert torch.equal(activation(name, x[3:], 0), truth.ACTIVATION_FUNCTIONS[name](x[3:]))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"^base_activation: expected one of silu, .*, got 'swish'"):
        activation("swish", torch.zeros(1), 0)
