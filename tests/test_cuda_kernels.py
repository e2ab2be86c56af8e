"""Each CUDA kernel by name, on a GPU: the results that the emulation checks elsewhere, and the same bits on every run."""

import pytest
import torch
from conftest import Place
from samples import OPERATIONS, make_problem

from kan_fast.backends import get, reason_not
from tests.test_cuda_emulation import as_tuple, assert_wide_close

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(reason_not("native", CUDA, torch.float32) is not None, reason="no native backend for CUDA here"),
]


PRODUCTS = [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest"), (torch.float16, "highest")]
CASES = [(kernel, *product) for kernel in ("any", "dense", "sparse") for product in PRODUCTS]
CASES += [(kernel, *product) for kernel in ("wgmma", "wgmma_sparse") for product in PRODUCTS[2:]]
CASES += [("wgmma", *PRODUCTS[0])]
CASES += [("narrow", torch.float32, "highest"), *(("narrow", *product) for product in PRODUCTS[2:])]
CASES += [("cluster", *product) for product in PRODUCTS[2:]]

# shape, grid_size, kind, outside
WIDE = [
    ((300, 70, 136), 5, "uniform", "zero"),
    ((129, 33, 65), 20, "uneven", "linear"),
    ((1000, 256, 256), 5, "uniform", "clamp"),
]
# What clusters serve: values alone, whole groups of 8 inputs, tiles of 256 outputs, an even number of tiles of weights.
CLUSTER = [
    ((300, 72, 136), 5, "uniform", "zero"),
    ((129, 48, 200), 20, "uneven", "linear"),
    ((1000, 256, 256), 5, "uniform", "clamp"),
    ((4100, 512, 1000), 5, "uniform", "zero"),
]
NARROW = [
    ((65537, 2, 5), 5, "uniform", "zero"),
    ((100001, 5, 1), 5, "uneven", "linear"),
    ((70, 3, 32), 12, "repeated", "clamp"),
    ((30000, 16, 8), 5, "uniform", "zero"),
    ((3001, 32, 3), 20, "uneven", "zero"),
]


@pytest.mark.parametrize(("kernel", "dtype", "precision"), CASES)
def test_each_kernel(monkeypatch, kernel, dtype, precision):
    if kernel.startswith(("wgmma", "cluster")) and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("warpgroups multiply on compute capability 9.0 alone")
    monkeypatch.setenv("KAN_FAST_CUDA_KERNEL", kernel)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    place = Place("native", CUDA)
    halves = kernel == "wgmma" and dtype == torch.float32  # see split.h, also for what they do not serve
    plain = halves or kernel == "cluster"  # of contract_output and contract_weight: without derivatives and scales
    for shape, grid_size, kind, outside in {"narrow": NARROW, "cluster": CLUSTER}.get(kernel, WIDE):
        problem = make_problem(place, dtype, shape, grid_size, kind=kind, outside=outside, x_dtype=torch.float32)
        for operation in OPERATIONS:
            for n in (0, 1)[: 1 if dtype == torch.float16 else 2]:  # contract_input differentiates once more: beyond float16
                if operation != "contract_input" and ((plain and n) or (halves and outside == "linear")):
                    continue
                assert_wide_close(place, problem, operation, n, precision, with_scale=n == 1)
        if halves and outside == "linear":
            continue
        for operation in OPERATIONS if kernel == "narrow" or plain else ("contract_output",):
            run, args = getattr(get("native"), operation), problem.args(operation, 0, not plain)
            first = as_tuple(run(*args))
            for _ in range(100):
                assert all(map(torch.equal, first, as_tuple(run(*args))))
