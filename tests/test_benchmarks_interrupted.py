"""What is left of a run that is interrupted, and of a measurement of memory that fails; what the progress line shows."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__, bars, contestants, environment, latency, layer, memory, network, options, rows, tables
from benchmarks.cases import Shape
from benchmarks.options import Options

SMALL = Shape(24, 6, 7, 5)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """Let the function of the module be interrupted at one of its calls."""
    plain, calls = getattr(module, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


def test_rows_are_written_phase_by_phase() -> None:
    emitted: list[list[rows.Row]] = []
    found = layer.run(Options(
        report=lambda line: None, shapes=[SMALL], backend="reference", peers=["linear", "pykan"], seconds=0.01,
        phases=["forward", "step"], emit=emitted.append,
    ))  # fmt: skip
    assert len(emitted) == 3 and not emitted[2]
    forward, step = emitted[:2]
    assert all("step_ms" not in row for row in forward) and all("forward_ms" not in row for row in step)
    assert all("matmul_tflops" in row and row["what"] == "layer" for row in forward + step)
    merged = tables.latest([{**row, "device": "cpu"} for row in forward + step], what="layer")
    assert [{key: row[key] for key in found[0]} for row in merged[:1]] == found[:1]
    assert {row["contestant"] for row in merged} == {row["contestant"] for row in found}


def test_interrupted_layers_keep_the_phases_that_were_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    interrupt_at(monkeypatch, layer.Case, "_measure", 2)
    arguments = ["--device", "cpu", "--shapes", "24,6,7", "--seconds", "0.01", "--peers", "linear", "--allocator", "default"]
    assert __main__.main([*arguments, "--threads", "1", "--phases", "forward", "step", "--out", str(out)]) == 130
    said = capsys.readouterr()
    assert f"interrupted; the rows of what was finished are in {out}" in said.err
    head = next(line for line in said.out.splitlines() if "contestant" in line)
    assert "forward" in head and "step " not in head.replace("fwd / step", "")
    written = rows.read([out])
    assert {row["contestant"] for row in written} >= {"linear", "linear equal"}
    assert any("forward_ms" in row for row in written) and not any("step_ms" in row for row in written)


def test_interrupted_networks_keep_the_phases_that_were_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[rows.Row] = []
    said: list[str] = []
    given = Options(seconds=0.01, emit=kept.extend, report=said.append, shapes=[SMALL])
    interrupt_at(monkeypatch, network.timing, "time_interleaved", 2)
    with pytest.raises(KeyboardInterrupt):
        network.small_networks(given)
    for module, run in ((latency, latency.run), (bars, bars.run)):
        interrupt_at(monkeypatch, module, "time_interleaved", 2)
        with pytest.raises(KeyboardInterrupt):
            run(given)
    assert [row["what"] for row in kept] == ["network", "latency", "bars"]
    for row in kept:
        assert f"{row['what']}_ms" not in row and row["forward_ratio"] > 0 and "step_ratio" not in row
        assert sum("forward " in line and "step " not in line for line in said) == 3
        row |= {"device": "cpu", "threads": 1, "device_name": "here", "commit": "now"}
    for name in ("network", "latency", "bars"):
        (line,) = (line for line in tables.TABLES[name](kept).splitlines() if line.startswith(("| KAN", "| 24")))
        assert line.endswith("- |")


def test_memory_that_cannot_be_measured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("measuring memory failed: no such counter")

    monkeypatch.setattr(memory, "peak_extra_cpu", fails)
    lines: list[str] = []
    given = Options(
        shapes=[SMALL], backend="reference", peers=["linear"], seconds=0.01, phases=[], memory=True, report=lines.append
    )
    found = layer.run(given)
    text = "\n".join(lines)
    assert "fails / fails" in text and "- / -" not in text
    assert "linear, memory of step: RuntimeError: measuring memory failed: no such counter" in text
    table = tables.memory([{**row, "device": "cpu"} for row in found])
    assert "| linear (same in and out) | fails / fails |" in table
    assert "linear: RuntimeError: measuring memory failed: no such counter." in table
    lines.clear()
    (row,) = bars.run(given)
    assert row["memory_failed"].startswith("RuntimeError") and row["step_ms"] > 0
    assert "peak extra memory of a step: fails, RuntimeError: measuring memory failed" in "\n".join(lines)


def test_progress_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(options.shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    options.Progress()("x" * 50)
    assert shown.getvalue() == "\r\033[K" + "x" * 19


def test_progress_says_how_many_cases_there_are() -> None:
    said: list[str] = []
    given = Options(
        shapes=[SMALL, SMALL], backend="reference", peers=[], seconds=0.01, phases=["forward"], report=lambda line: None,
        progress=said.append, dtypes=["float32", "float64"],
    )  # fmt: skip
    layer.run(given)
    assert [text.split(",")[0] for text in said if "building" in text] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]


def test_rows_name_the_versions_of_rivals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "rival_in_a_checkout.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        contestants.subprocess.run([*git, *command], check=True)
    commit = contestants.subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(contestants, "_peer_paths", [])
    monkeypatch.setattr(contestants.sys, "path", [*contestants.sys.path])
    contestants.add_peer_paths([tmp_path])
    monkeypatch.setattr(contestants, "RIVALS", [
        ("packaged", "pytest", contestants._plain, True, "pytest", "", ""),
        ("checkout", "rival_in_a_checkout", contestants._plain, True, None, "", ""),
        ("unknown", "json", contestants._plain, True, None, "", ""),
    ])  # fmt: skip
    names = ["packaged", "checkout", "unknown"]
    found = layer.run(Options(report=lambda line: None, shapes=[SMALL], backend="reference", peers=names, phases=[]))
    versions = {row["contestant"]: row.get("version") for row in found}
    assert versions == {
        "packaged": pytest.__version__, "checkout": commit, "unknown": None, "kan_fast reference": None, "linear equal": None,
    }  # fmt: skip
    assert json.dumps(found)
    inside = environment.ROOT / "benchmarks"
    assert contestants._commit(inside) is None
