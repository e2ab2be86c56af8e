"""Several real processes, started by torchrun, with gloo: the numbers of one process."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch

HERE = Path(__file__).parent
FOUR_RANKS = ("data_and_tensor_parallel",)
TWO_RANKS = tuple(name for name in distributed_worker.CHECKS if name not in FOUR_RANKS)


def torchrun(ranks, *command, **options):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    run = subprocess.run(
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, **options
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All checks in one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(2, HERE / "distributed_worker.py", folder, *TWO_RANKS)
    return folder


def assert_same(folder, name):
    """In float64 the order of sums over ranks moves a result by a few eps = 2.2e-16 of terms of order 1; Adam's steps of 1e-2
    and the least squares of a grid update may blow that up by 1e4."""
    pairs = torch.load(folder / f"{name}.pt")
    assert pairs
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(results, name):
    assert_same(results, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *FOUR_RANKS,
        "every_sharding_of_every_contraction",
        "tensor_parallel_odd",
        "what_tensor_parallelism_costs",
        "scores_on_all_rows",
    ],
)
def test_four_ranks(name, tmp_path):
    torchrun(4, HERE / "distributed_worker.py", tmp_path, name)
    assert_same(tmp_path, name)
