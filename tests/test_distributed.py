"""Several real processes, started by torchrun, with gloo: the numbers of one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch

HERE = Path(__file__).parent
FOUR_RANKS = ("data_and_tensor_parallel", "checkpoints_of_data_and_tensor_parallel")
TWO_RANKS = tuple(name for name in distributed_worker.CHECKS if name not in FOUR_RANKS)


def torchrun(ranks, *script):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # examples/train_distributed.py says why
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    run = subprocess.run([*launcher, *map(str, script)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


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


EXAMPLE = HERE.parent / "examples" / "train_distributed.py"


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "tensor"))])
def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(engine, tmp_path):
    options = ("--engine", engine, "--steps", 60, "--rows", 64, "--every", 10, "--promise", 10, "--folder")
    torchrun(2, EXAMPLE, *options, tmp_path / "whole")
    output = torchrun(2, "--max-restarts", 1, HERE / "killed_rank.py", 37, *options, tmp_path / "killed")
    # Ranks may write into one line.
    starts = [int(step) for step in re.findall(r"goes on from step (\d+)", output)]
    steps = [int(step) for step in re.findall(r" step (\d+): loss", output)]
    assert starts == [0, 0, 30, 30], output
    assert steps == [10, 20, 30, 40, 50, 60], output
    whole, killed = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert torch.equal(killed[name], value), name


@pytest.mark.slow
def test_every_engine_trains_alike(tmp_path):
    """The same batches, gradients and steps; float32 sums in another order, whose rounding 100 steps of Adam blow up."""
    finals = []
    for engine in ("ddp", "fsdp", "tensor"):
        options = ("--steps", 100, "--rows", 256, "--every", 100, "--promise", 10, "--folder", tmp_path / engine)
        torchrun(2, EXAMPLE, "--engine", engine, *options)
        finals.append(torch.load(tmp_path / engine / "final.pt"))
    for final in finals[1:]:
        for name, value in finals[0].items():
            torch.testing.assert_close(final[name], value, rtol=1e-2, atol=1e-2)


def test_the_page_on_scaling_is_what_the_script_calculates():
    page = (HERE.parent / "examples" / "SCALING.md").read_text()
    run = subprocess.run(
        [sys.executable, EXAMPLE.with_name("scaling.py")],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"<!-- table -->\n{run.stdout.strip()}\n<!-- /table -->" in page
