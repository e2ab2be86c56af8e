"""The Triton backend: its answers in this process, and its kernels in the interpreter, which needs a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kan_fast import KANLayer
from kan_fast.backends import reason_not
from kan_fast.backends.triton import tiles

ROOT = Path(__file__).parent.parent


KERNELS = ["tests/triton_kernels.py", "tests/triton_tuning.py", "tests/triton_interpreter.py"]


def run_kernels(interpret, fewest, arguments=KERNELS):
    # Triton decides when it is imported whether it interprets: hence a process with that said in its environment.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= fewest, done.stdout[-2000:]
    return done.stdout


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    assert "skipped" not in run_kernels("1", 120)


# What test_native.py asks of every backend: the ends of axes at once, the rest with the slow tests.
AT_ONCE = "crowded or half_open or huge"


@pytest.mark.parametrize(
    ("select", "fewest"), [(AT_ONCE, 20), pytest.param(f"not ({AT_ONCE})", 200, marks=pytest.mark.slow)], ids=["ends", "rest"]
)
def test_what_backends_are_asked_in_the_interpreter(select, fewest):
    pytest.importorskip("triton")
    run_kernels("1", fewest, ["tests/test_native.py", "-k", f"triton-cpu and ({select})"])


def test_what_triton_is_asked_without_a_gpu():
    pytest.importorskip("triton")
    run_kernels("0", 26, ["tests/recipes_without_gpu.py"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu():
    run_kernels("0", 85)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, the backend does serve the CPU")
def test_compiled_kernels_do_not_serve_the_cpu():
    reason = reason_not("triton", torch.device("cpu"), torch.float32)
    assert reason is not None and ("TRITON_INTERPRET=1" in reason or "not installed" in reason)
    layer = KANLayer(2, 3, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot serve .*(TRITON_INTERPRET=1|not installed)"):
        layer(torch.zeros(4, 2))


def test_importing_the_backend_does_not_import_triton():
    code = "import sys, kan_fast, kan_fast.backends.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_triton_the_reason_says_so():
    # A finder that knows no triton stands in for an environment without it.
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, kan_fast
from kan_fast.backends import reason_not
assert reason_not("triton", torch.device("cuda"), torch.float32) == "the package triton is not installed"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


H100 = tiles.Target("cuda", 90, 132)


@pytest.mark.parametrize("features", [1, 2, 4, 5, 8, 9, 16, 17, 23, 32, 103])
def test_bases_per_step_pads_least(features):
    bases = tiles.bases_per_step(features)
    assert bases in (4, 8, 16)
    assert -features % bases <= min(-features % 8, -features % 16, 8) or features <= 4


@pytest.mark.parametrize("kernel", ["contract_output", "contract_input", "contract_weight"])
@pytest.mark.parametrize("products", [tiles.HALF, tiles.TWO, tiles.THREE, tiles.IEEE, tiles.DOUBLE])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (16384, 1024, 1024), (10**6, 2, 5), (64, 784, 64), (7, 3, 300), (10**6, 2, 256)])
@pytest.mark.parametrize("features", [1, 8, 23])
def test_tiles_are_legal(kernel, products, sizes, features):
    batch, inputs, outputs = sizes
    tile = tiles.wide_tile(kernel, products, batch, inputs, features, outputs, H100)
    width = tile.inputs * tile.bases
    for extent in (tile.inputs, tile.bases, tile.depth, tile.warps):
        assert extent & (extent - 1) == 0 and extent > 0
    assert 16 <= width <= 128 and tile.depth >= 16  # what tl.dot takes in triton 3.6
    if kernel != "contract_weight":
        assert tile.rows & (tile.rows - 1) == 0 and tile.rows >= 16
    if kernel != "contract_input":
        assert tile.columns & (tile.columns - 1) == 0 and tile.columns >= 16


@pytest.mark.parametrize(("batch", "tiles_", "size"), [(1, 1, 10), (10**6, 1, 90), (16384, 600, 9 * 2**20), (5000, 7, 10**5)])
def test_splits_cover_the_batch(batch, tiles_, size):
    count, rows = tiles.splits(batch, tiles_, size, 32, H100)
    assert rows % 32 == 0
    assert (count - 1) * rows < batch <= count * rows  # no empty slice, none missing
    assert count * size <= 2**24 or count == 1


def test_wide_layers_fill_the_device_and_narrow_ones_take_their_own_kernel():
    tile = tiles.wide_tile("contract_output", tiles.HALF, 16384, 1024, 8, 1024, H100)
    assert (tile.rows, tile.columns) == (128, 256)
    small = tiles.wide_tile("contract_output", tiles.HALF, 256, 1024, 8, 1024, H100)
    assert (256 // small.rows) * (1024 // small.columns) >= 132
    assert tiles.is_narrow(10**6, 2, 5, H100)
    assert not tiles.is_narrow(16384, 1024, 1024, H100)
    assert not tiles.is_narrow(64, 784, 10, H100)  # a walk through 784 inputs by a single program
