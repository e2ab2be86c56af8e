"""benchmarks/gpu_check.sh: what it refuses, deletes and says, on a machine without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rows

ROOT = Path(__file__).resolve().parent.parent


def check(*arguments: object, path: str = "/usr/bin:/bin", python: object = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": path, "PYTHON": str(python)})


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """An interpreter that does nothing: also to the question whether there is a GPU it says 1."""
    (tmp_path / "python").write_text("#!/bin/sh\necho 1\n")
    (tmp_path / "python").chmod(0o755)
    return tmp_path / "python"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: expected a whole number from 1 on, got 0"),
        (["--minutes", "soon"], "--minutes: expected a whole number of minutes, got 'soon'"),
        (["--minutes"], "--minutes: expected a whole number of minutes, got ''"),
        (["--only"], "--only: expected names of stages"),
        (["second"], "expected one OUT_DIR, got "),
        (["--only", "info,bench-nothing"], "small-set-wgmma_sparse twins; got bench-nothing"),
        (["--only", "bench-$kernel"], "; got bench-$kernel"),
        (["--wrong"], "unknown option --wrong"),
    ],
)
def test_gpu_check_refuses_what_it_does_not_know(arguments: list[str], message: str, tmp_path: Path, stub: Path) -> None:
    out = tmp_path / "out"
    done = check(out, "--dry-run", *arguments, python=stub)
    assert done.returncode == 2
    assert message in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("place", ["file/out", "file", "summary"])
def test_gpu_check_stops_where_it_cannot_write(place: str, tmp_path: Path, stub: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "summary" / "summary.txt").mkdir(parents=True)
    (tmp_path / "summary" / "info.log").write_text("")
    done = check(tmp_path / place, "--dry-run", "--only", "info", python=stub)
    assert done.returncode == 2
    assert "OUT_DIR: cannot write" in done.stderr
    assert (tmp_path / "summary" / "info.log").exists()
    assert check("", "--dry-run", python=stub).returncode == 2


def test_gpu_check_deletes_no_logs_but_its_own(tmp_path: Path, stub: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    own = ["info.log", "bench-sparse.log", "compile-probe.log", "gpu-tests-12.log", "rows.jsonl", "bench-layer-bfloat16.log"]
    for name in ("mine.log", "bench-mine.log", *own):
        (out / name).write_text("")
    done = check(out, "--dry-run", "--only", "small-set", "--minutes", "08", python=stub)
    assert done.returncode == 0
    assert "budget 8 minutes" in done.stdout and "all stages that ran passed" in done.stdout
    assert {path.name for path in out.iterdir()} == {"mine.log", "bench-mine.log", "small-set.log", "summary.txt"}


def test_gpu_check_that_ran_nothing_says_so(tmp_path: Path, stub: Path) -> None:
    done = check(tmp_path / "out", "--dry-run", "--only", "racecheck,bench-sparse", python=stub)
    assert done.returncode == 1
    assert "LEFT OUT  memcheck,racecheck: no GPU" in done.stdout and "bench-sparse" in done.stdout
    assert "no stage ran" in done.stdout and "passed" not in done.stdout
    assert "LEFT OUT  ncu" not in done.stdout


def test_gpu_check_refuses_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "info.log").write_text("of an earlier run")
    done = check(tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert (tmp_path / "info.log").exists()


def test_gpu_check_gives_a_build_without_a_gpu_its_time(tmp_path: Path) -> None:
    """A stand-in for `timeout` writes down the limits that the stages get."""
    limits = tmp_path / "limits"
    (tmp_path / "timeout").write_text(f'#!/bin/sh\necho "$3 $*" >> {limits}\n')
    (tmp_path / "python").write_text("#!/bin/sh\necho 1\n")  # also to the question whether there is a GPU
    for name in ("timeout", "python"):
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str) -> dict[str, int]:
        limits.unlink(missing_ok=True)
        environment_ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python")}
        command = ["bash", ROOT / "benchmarks/gpu_check.sh", tmp_path / "out", "--minutes", "7", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment_)
        assert done.returncode == 0, done.stdout
        lines = [line.split(maxsplit=1) for line in limits.read_text().splitlines()]
        return {"build" if "setup.py" in command else command: int(limit) for limit, command in lines}

    on_a_gpu, dry = run(), run("--dry-run")
    assert on_a_gpu.pop("build") <= 300
    assert dry.pop("build") == 1200
    assert max(on_a_gpu.values()) <= 7 * 60 and max(dry.values()) <= 150


@pytest.mark.slow
def test_gpu_check_dry_run(tmp_path: Path) -> None:
    done = check(tmp_path, "--dry-run", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout
    for stage in ("info", "twins", "small-set", "bench-layer", "bench-contractions", "bitwise", "plot"):
        assert f"ok        {stage} " in done.stdout
    assert "LEFT OUT  memcheck,racecheck: no GPU" in done.stdout
    assert int(re.search(r"(\d+)/\d+ tests collected", done.stdout)[1]) > 1000  # what would run on a GPU
    assert rows.read([tmp_path / "rows.jsonl"])
