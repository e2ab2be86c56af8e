"""The cases of the main table under pytest-benchmark: `python -m pytest benchmarks`.

For following one contestant over time (--benchmark-autosave, --benchmark-compare). Contestants run one after another here,
so ratios between them are better read from `python -m benchmarks`, which interleaves them.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import layer
from benchmarks.cases import BARS, Shape
from benchmarks.contestants import Contestant, build, contestants

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINES = [line for line in contestants("auto", ["linear", "cox-de-boor"], DEVICE) if line.absent is None]


@pytest.mark.parametrize("phase", ["forward", "step"])
@pytest.mark.parametrize("contestant", LINES, ids=lambda line: line.name.replace(" ", "-"))
@pytest.mark.parametrize("shape", list(BARS), ids=lambda shape: shape.key().replace(",", "x"))
def test_layer(benchmark, shape: Shape, contestant: Contestant, phase: str) -> None:  # type: ignore[no-untyped-def]
    if contestant.name in ("kan_fast reference", "cox-de-boor") and shape.batch * shape.parameters > 2**31:
        pytest.skip("plain PyTorch needs gigabytes here")
    ours = layer.make_layer(shape, DEVICE, torch.float32)
    module = build(contestant, shape, ours)
    x, cotangent = layer.make_inputs(contestant, shape, DEVICE, torch.float32)
    if contestant.exact:
        found = layer.judge(contestant, module, ours, x, cotangent)
        assert "failed" not in found, found["failed"]
    call = layer.make_call(phase, module, x, cotangent)

    def finished() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape}, {phase}"
    benchmark.pedantic(finished, rounds=7, warmup_rounds=2)
