"""Each CUDA kernel by name, on a GPU: the results that the emulation checks elsewhere, and the same bits on every run."""

import pytest
import torch
from conftest import Place
from samples import OPERATIONS, make_problem

from kan_fast.backends import get, reason_not
from tests.test_cuda_emulation import assert_wide_close

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(reason_not("native", CUDA, torch.float32) is not None, reason="no native backend for CUDA here"),
]


PRODUCTS = [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest"), (torch.float16, "highest")]
CASES = [(kernel, *product) for kernel in ("any", "dense", "sparse") for product in PRODUCTS]
CASES += [(kernel, *product) for kernel in ("wgmma", "wgmma_sparse") for product in PRODUCTS[2:]]


@pytest.mark.parametrize(("kernel", "dtype", "precision"), CASES)
def test_each_kernel(monkeypatch, kernel, dtype, precision):
    if kernel.startswith("wgmma") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("warpgroups multiply on compute capability 9.0 alone")
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    place = Place("native", CUDA)
    for shape, grid_size, kind, outside in (
        ((300, 70, 136), 5, "uniform", "zero"),
        ((129, 33, 65), 20, "uneven", "linear"),
        ((1000, 256, 256), 5, "uniform", "clamp"),
    ):
        problem = make_problem(place, dtype, shape, grid_size, kind=kind, outside=outside, x_dtype=torch.float32)
        for operation in OPERATIONS:
            for n in (0, 1):
                assert_wide_close(place, problem, operation, n, precision, with_scale=n == 1)
        args = problem.args("contract_output", 0)
        first = get("native").contract_output(*args)
        assert all(torch.equal(first, get("native").contract_output(*args)) for _ in range(100))
