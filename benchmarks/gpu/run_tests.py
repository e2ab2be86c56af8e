"""The tests marked `gpu`, shared out to several processes: python -m benchmarks.gpu.run_tests [--select triton] [--collect]

Most of their time goes into compiling kernels, on the host's cores. `--collect` needs no GPU: it pretends one, collects the
tests that would run on it, and fails if there are none. `--select triton` keeps those whose names have the word, `--select
"not triton"` the others. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import ROOT, cores

# triton_kernels.py is not collected otherwise: without a GPU it runs in a process of its own, interpreted. Here all of it is
# marked `gpu`, and the test that would run it a second time is left out.
ARGUMENTS = [
    "-p", "no:cacheprovider", "-m", "gpu", "-o", "python_files=test_*.py triton_*.py", "tests",
    "--deselect", "tests/test_triton.py::test_kernels_on_the_gpu",
]  # fmt: skip
NO_TESTS = 5  # pytest's exit code
PATIENCE_S = 6.0  # less than gpu_check.sh allows between SIGTERM and SIGKILL


def pretend(select: str = "") -> int:
    """Collect in this process as if there were a GPU that every backend serves."""
    import pytest
    import torch

    from kan_fast import backends

    real = backends.reason_not
    torch.cuda.is_available = lambda: True
    backends.reason_not = lambda name, device, dtype: None if device.type == "cuda" else real(name, device, dtype)
    return int(pytest.main(["-q", "--collect-only", "-k", select, *ARGUMENTS]))


def run(shards: int, out: Path | None, select: str = "") -> int:
    """Run them, or those that pytest's -k selects, in so many processes, print what failed and why, and a total.

    Each process's output goes to out/gpu-tests-N.log as it comes. A run that is cut short (SIGTERM) interrupts its
    processes, which then say what they have seen.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        logs = [folder / f"gpu-tests-{shard}.log" for shard in range(1, shards + 1)]
        running = [_start(log, f"{shard}/{shards}", select) for shard, log in enumerate(logs, 1)]
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            for process in running:
                process.wait()
        finally:
            ended = [process.poll() for process in running]
            _interrupt(running)
            signal.signal(signal.SIGTERM, before)
            totals = _report(logs, ended)
    return int(totals["PASSED"] == 0 or any(code not in (0, NO_TESTS) for code in ended))


def _stop(*_: object) -> None:
    """Once: timeout(1) sends its signal to the process and then to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _interrupt(running: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: pytest writes its failures down when it is interrupted, if the test at hand lets it."""
    for process in running:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + PATIENCE_S
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _start(log: Path, shard: str, select: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail", "20", "--durations", "10"]
    command += ["-k", select, *ARGUMENTS]
    environment = {**os.environ, "KAN_FAST_TEST_SHARD": shard}
    # In a session of its own: what stops this process's group must not stop the tests before their report.
    with log.open("wb") as sink:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )


def _report(logs: list[Path], ended: list[int | None]) -> dict[str, int]:
    """Print tests that failed, processes that did not end by themselves, and a total."""
    totals = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    for log, code in zip(logs, ended, strict=True):
        text = log.read_text(errors="replace")
        reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S.*?) - (.*)$", text, re.MULTILINE))
        for name, outcome in re.findall(r"^(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE):
            if "::" in name:
                totals[outcome] += 1
                if outcome in ("FAILED", "ERROR"):
                    print(f"{outcome} {name}: {reasons.get(name, 'see the log')}", flush=True)
        if code is None:
            print(f"cut short: {log.name}", flush=True)
        elif code not in (0, 1, NO_TESTS):
            print(f"{log.name} ended with {code}: {(text.strip().splitlines() or ['no output'])[-1]}", flush=True)
    print(", ".join(f"{count} {kind.lower()}" for kind, count in totals.items()) + f" in {len(logs)} processes", flush=True)
    if totals["PASSED"] == 0:
        print("expected tests that pass, got none", flush=True)
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", action="store_true", help="only say what would run")
    parser.add_argument("--select", default="", help="pytest's -k")
    parser.add_argument("--processes", type=int, default=min(16, cores()))
    parser.add_argument("--out", type=Path, help="folder of the logs")
    given = parser.parse_args()
    return pretend(given.select) if given.collect else run(given.processes, given.out, given.select)


if __name__ == "__main__":
    raise SystemExit(main())
