"""The tests marked `gpu`, shared out to several processes: python -m benchmarks.gpu.run_tests [--collect]

Most of their time goes into compiling kernels, on the host's cores. `--collect` needs no GPU: it pretends one, collects the
tests that would run on it, and fails if there are none. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import ROOT, cores

# triton_kernels.py is not collected otherwise: without a GPU it runs in a process of its own, interpreted. Here all of it is
# marked `gpu`, and the test that would run it a second time is left out.
ARGUMENTS = [
    "-q", "-p", "no:cacheprovider", "-m", "gpu", "-o", "python_files=test_*.py triton_*.py", "tests",
    "--deselect", "tests/test_triton.py::test_kernels_on_the_gpu",
]  # fmt: skip
NO_TESTS = 5  # pytest's exit code


def pretend() -> int:
    """Collect in this process as if there were a GPU that every backend serves."""
    import pytest
    import torch

    from kan_fast import backends

    real = backends.reason_not
    torch.cuda.is_available = lambda: True
    backends.reason_not = lambda name, device, dtype: None if device.type == "cuda" else real(name, device, dtype)
    return int(pytest.main(["--collect-only", *ARGUMENTS]))


def run(shards: int, out: Path | None) -> int:
    """Run them in so many processes, print what failed and a total; each process's output goes to out/gpu-tests-N.log."""
    running = []
    for shard in range(1, shards + 1):
        environment = {**os.environ, "KAN_FAST_TEST_SHARD": f"{shard}/{shards}"}
        command = [sys.executable, "-m", "pytest", "--maxfail", "20", *ARGUMENTS]
        running.append(subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ))  # fmt: skip
    wrong, totals = 0, {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    for shard, process in enumerate(running, 1):
        text = process.communicate()[0]
        if out is not None:
            (out / f"gpu-tests-{shard}.log").write_text(text)
        last = text.strip().splitlines()[-1] if text.strip() else "no output"
        for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", last):
            totals[kind] += int(count)
        if process.returncode not in (0, NO_TESTS):
            wrong += 1
            print("\n".join(line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))) or last, flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in totals.items()) + f" in {shards} processes", flush=True)
    if totals["passed"] == 0:
        print("expected tests that pass, got none", flush=True)
    return int(wrong > 0 or totals["passed"] == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", action="store_true", help="only say what would run")
    parser.add_argument("--processes", type=int, default=min(8, cores()))
    parser.add_argument("--out", type=Path, help="folder of the logs")
    given = parser.parse_args()
    return pretend() if given.collect else run(given.processes, given.out)


if __name__ == "__main__":
    raise SystemExit(main())
