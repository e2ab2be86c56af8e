"""The commands of the benchmarks: what they take, write and refuse, and that a machine with a GPU can be sent through them."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kan_fast
from benchmarks import __main__, cases, environment
from benchmarks.cases import Shape
from benchmarks.gpu import run_tests

ROOT = Path(__file__).resolve().parent.parent


def test_command_line_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--what", "bars", "--shapes", "24,6,7", "--seconds", "0.01", "--extras", "--out", str(out),
                 "--allocator", "default", "--threads", "1"]  # fmt: skip
    assert __main__.main(arguments) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["shape"] == "24,6,7,5"
    assert row["backend"] in kan_fast.available_backends("cpu")
    assert row["commit"]
    assert row["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--what latency --shapes 8,4,4",
            "--shapes: expected with --what bars or contractions or layer or sweep alone, got --what latency",
        ),
        ("--what bars --dtype bfloat16", "--dtype: expected with --what contractions or layer or sweep alone, got --what bars"),
        ("--extras", "--extras: expected with --what bars alone, got --what layer"),
        ("--what bars --device cuda", "--device cuda: expected cpu with --what bars"),
        ("--peers linear fastest", "argument --peers: invalid choice: 'fastest'"),
        ("--backend numpy", "argument --backend: invalid choice: 'numpy'"),
        ("--shapes 8,4,4,0", "--shapes: shape: expected batch,in,out"),
        ("--what sweep --device cpu --shapes 8,4,4", "--shapes: expected points of batch, width, grid_size, spline_order on"),
        ("--what sweep --device cpu --shapes 8,4,4", "1024,256,256,80 1024,256,256,5,0 "),
        ("--what sweep --device cpu --axes batch --shapes 1024,8,8", "16384,256,256,5), got 1024,8,8,5"),
        ("--threads 0", f"argument --threads: expected an integer from 1 to {__main__.MOST_THREADS}, got '0'"),
        ("--threads 1.5", f"argument --threads: expected an integer from 1 to {__main__.MOST_THREADS}, got '1.5'"),
        ("--threads 100000", f"argument --threads: expected an integer from 1 to {__main__.MOST_THREADS}, got '100000'"),
        ("--seconds -1", "argument --seconds: expected a finite number from 0 on, got '-1'"),
        ("--seconds soon", "argument --seconds: expected a finite number from 0 on, got 'soon'"),
        ("--seconds inf", "argument --seconds: expected a finite number from 0 on, got 'inf'"),
        ("--minutes 0", "argument --minutes: expected a finite number above 0, got '0'"),
        ("--out /dev/null/rows.jsonl", "--out: cannot write to /dev/null/rows.jsonl: "),
        ("--out /tmp", "--out: cannot write to /tmp: Is a directory"),
        ("--what training --times /dev/null/times", "--times: cannot write to /dev/null/times: "),
        (f"--what training --times {__file__}", f"--times: expected a file of JSON, got {__file__}: "),
        ("--peer-path /nowhere/at/all", "argument --peer-path: expected a folder, got /nowhere/at/all"),
    ],
)
def test_command_line_refuses_what_it_would_ignore(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", sorted(__main__.TAKES["backend"]))
def test_a_backend_that_is_not_there_is_a_usage_error(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kan_fast.backends, "reason_not", lambda name, device, dtype: f"no kernels for {device}")
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["--what", what, "--device", "cpu", "--backend", "triton"])
    assert "--backend triton: it cannot serve float32 on cpu: no kernels for cpu" in capsys.readouterr().err


def test_where_rows_could_be_written_nothing_is_left(tmp_path: Path) -> None:
    __main__.writable("out", tmp_path / "folder" / "rows.jsonl")
    assert not (tmp_path / "folder" / "rows.jsonl").exists()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    __main__.writable("out", tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"


def test_every_option_of_some_topics_is_one() -> None:
    known = {action.dest for action in __main__.parser()._actions}
    for name, topics in __main__.TAKES.items():
        assert name in known
        assert topics <= set(__main__.TOPICS)


def test_bars_follow_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, widest, narrow = Shape(1024, 256, 256, 5), Shape(256, 1024, 1024, 5), Shape(65536, 2, 5, 5)
    assert cases.bar(wide, "avx512") == cases.BARS[wide]
    assert cases.bar(Shape(3, 4, 5), "avx512").forward is None
    assert cases.bar(wide, "avx2").forward == 0.60
    assert cases.bar(widest, "avx2").forward == 0.80
    assert cases.bar(narrow, "avx2").forward is cases.bar(wide, "baseline").forward is None
    monkeypatch.delenv("KAN_FAST_ISA", raising=False)
    assert "KAN_FAST_ISA" not in environment.cpu_name()
    monkeypatch.setenv("KAN_FAST_ISA", "baseline")
    assert "KAN_FAST_ISA=baseline" in environment.cpu_name()
    if "native" in kan_fast.available_backends("cpu"):
        assert environment.isa() == "baseline"


def test_every_topic_exists() -> None:
    for module, _ in __main__.TOPICS.values():
        if module != "benchmarks.kernels":  # its module needs Triton's compiler once it runs, not to be imported
            assert callable(importlib.import_module(module).run)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_twins_of_tensor_core_instructions(tmp_path: Path) -> None:
    program = tmp_path / "check_twins"
    source = ROOT / "benchmarks/gpu/check_twins.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-o", program, source], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok") == 6


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", ["probe", "rates"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_gpu_probes_compile(name: str, arch: str, tmp_path: Path) -> None:
    source = ROOT / f"benchmarks/gpu/{name}.cu"
    subprocess.run(["nvcc", "-std=c++20", f"-arch={arch}", "-cubin", "-o", tmp_path / "out.cubin", source], check=True)




def test_shards_run_every_test_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run_tests, "ARGUMENTS", ["-p", "no:cacheprovider", "tests/test_imports.py"])
    assert run_tests.run(2, tmp_path) == 0
    total = re.search(r"(\d+) passed, 0 failed, 0 error", capsys.readouterr().out)
    parts = [int(re.search(r"(\d+) passed", path.read_text())[1]) for path in sorted(tmp_path.glob("gpu-tests-?.log"))]
    assert total is not None and sum(parts) == int(total[1]) and max(parts) - min(parts) <= 1
    monkeypatch.setattr(run_tests, "ARGUMENTS", ["-p", "no:cacheprovider", "-m", "gpu", "tests/test_imports.py"])
    assert run_tests.run(1, None) == 1
    assert "expected tests that pass, got none" in capsys.readouterr().out


def test_gpu_tests_that_are_cut_short_say_what_they_have_seen(tmp_path):
    """Also what failed, and why: pytest itself says it at its end alone."""
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_wrong(): assert 2 * 3 == 7\ndef test_long(): time.sleep(600)\n"
    )
    program = (
        "from pathlib import Path; from benchmarks.gpu import run_tests\n"
        f"run_tests.ARGUMENTS = ['-p', 'no:cacheprovider', '--rootdir', {str(ROOT)!r}, {str(tmp_path)!r}]\n"
        f"raise SystemExit(run_tests.run(1, Path({str(tmp_path)!r})))"
    )
    # As gpu_check.sh does: timeout sends its signal to the program, then to all of its group.
    command = ["timeout", "-k", "10", "600", sys.executable, "-c", program]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "gpu-tests-1.log"
    for _ in range(600):  # until the quick ones are through
        if log.exists() and "FAILED" in log.read_text():
            break
        time.sleep(0.1)
    running.terminate()
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 1
    assert "cut short: gpu-tests-1.log" in said
    assert re.search("^FAILED .*test_wrong: assert .2 . 3. == 7$", said, re.MULTILINE), said
    assert "1 passed, 1 failed" in said
