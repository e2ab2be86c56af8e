"""The reference backend, which all others are compared with, against SciPy and NumPy in float64."""

import numpy as np
import pytest
import torch
import truth
from samples import KINDS, OPERATIONS, every_activation, every_outside, make_problem

from kan_fast.backends import reference


def check(problem, operation, n, with_scale, tolerance):
    args = problem.args(operation, n, with_scale)
    ours = getattr(reference, operation)(*args)
    true = getattr(truth, operation)(*args)
    size = getattr(truth, operation)(*args, magnitude=True)
    if isinstance(ours, torch.Tensor):
        ours, true, size = (ours,), (true,), (size,)
    for mine, exact, total in zip(ours, true, size, strict=True):
        assert tuple(mine.shape) == exact.shape
        if exact.size:
            assert np.abs(truth.doubled(mine) - exact).max() <= tolerance * max(total.max(), 1e-300)


@every_outside
@every_activation
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_activation_and_outside(operation, activation, outside):
    for k in range(6):
        problem = make_problem(k=k, activation=activation, outside=outside, kind="uneven")
        for n in range(5):
            # As in test_spline.py: two float64 computations, cancelling differences.
            check(problem, operation, n, n % 2 == 0, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (1, 1, 1), (33, 5, 7)])
def test_shapes(shape, kind):
    for operation in OPERATIONS:
        check(make_problem(shape=shape, kind=kind), operation, 0, True, 1e-11)


@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_narrow_dtypes(dtype, x_dtype):
    problem = make_problem(dtype=dtype, x_dtype=x_dtype, shape=(64, 9, 6))
    for operation in OPERATIONS:
        args = problem.args(operation, 0)
        results = getattr(reference, operation)(*args)
        wanted = {"contract_output": [dtype], "contract_input": [x_dtype], "contract_weight": [dtype, dtype]}
        for result, want in zip(
            results if isinstance(results, tuple) else [results],
            wanted.get(operation, [x_dtype, dtype, dtype]),
            strict=True,
        ):
            assert result.dtype == want
        # Bases and sums in float32 whatever the inputs are: errors of the sums are float32's (K = 81 terms at most, and
        # contract_input of order 1 has slopes of size 1/h), the rest is the rounding of the result.
        sums = 100 * torch.finfo(torch.float32).eps
        check(problem, operation, 0, True, sums + torch.finfo(dtype).eps + torch.finfo(x_dtype).eps)
