"""From rows to pages and figures, and what is refused before any file is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot, rows

GOOD: dict[str, Any] = {
    "what": "layer", "shape": "24,6,7,5", "contestant": "linear", "dtype": "float32", "device": "cpu", "ours": False,
    "note": "", "device_name": "here", "threads": 1, "forward_ms": 1.0, "step_ms": 2.0, "forward_ratio": 1.0, "step_ratio": 1.0,
}  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    made = tmp_path / "page.md"
    made.write_text("<!-- table:forward -->\nold\n<!-- /table -->\n")
    return made


def made(tmp_path: Path, page: Path, text: str) -> int:
    (tmp_path / "rows.jsonl").write_text(text)
    return plot.main([
        "--rows", str(tmp_path / "rows.jsonl"), "--readme", str(page), "--figures", str(tmp_path / "figures")
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("", "rows.jsonl: expected rows, got none"),
        ("{", "rows.jsonl:2: expected a JSON object"),
        ("[]", "rows.jsonl:2: expected a JSON object, got list"),
        ({**GOOD, "what": "speed"}, "rows.jsonl:2: what: expected one of layer, sweep, "),
        ({"what": "layer"}, "rows.jsonl:2: shape: expected str in a row of layer, got None"),
        ({**GOOD, "shape": "6,7"}, "rows.jsonl:2: shape: expected batch,in,out"),
        ({**GOOD, "forward_ms": "fast"}, "rows.jsonl:2: forward_ms: expected a finite number, got 'fast'"),
        ({**GOOD, "step_ms": float("nan")}, "rows.jsonl:2: step_ms: expected a finite number, got nan"),
        (
            {"what": "training", "task": "digits", "model": "kan", "device": "cpu", "step_ms": 1.0},
            "rows.jsonl:2: the table training cannot be made: KeyError: 'metric'",
        ),
    ],
)
def test_broken_rows_write_nothing(
    second: object, message: str, tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = page.read_text()
    text = second if isinstance(second, str) else json.dumps(second)
    assert made(tmp_path, page, f"{json.dumps(GOOD)}\n{text}\n" if text else "") == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert page.read_text() == before and not (tmp_path / "figures").exists()


def test_pages_are_replaced_when_everything_is_made(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page.read_text()

    def fails(found: list[rows.Row], folder: Path) -> list[Path]:
        raise ValueError("no figure")

    with monkeypatch.context() as patched:
        patched.setattr(plot, "drawn", fails)
        assert made(tmp_path, page, json.dumps(GOOD)) == 2
    assert page.read_text() == before
    pytest.importorskip("matplotlib")
    assert made(tmp_path, page, json.dumps(GOOD)) == 0
    assert "| linear |" in page.read_text()
    assert [path.name for path in (tmp_path / "figures").iterdir()] == []  # a linear layer alone makes none
    assert made(tmp_path, page, json.dumps({**GOOD, "contestant": "kan_fast native", "ours": True})) == 0
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["rivals_cpu.png"]


def test_printed_tables_draw_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot, "drawn", lambda found, folder: pytest.fail("drew figures"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD))
    assert plot.main(["--no-readme", "--rows", str(tmp_path / "rows.jsonl")]) == 0
    assert "## forward" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("version", [{}, {"version": "0.5.2"}])
def test_rows_with_and_without_a_version(tmp_path: Path, page: Path, version: dict[str, str]) -> None:
    """Older rows do not say which version of a rival they are of."""
    assert made(tmp_path, page, json.dumps({**GOOD, **version})) == 0
    assert "| linear |" in page.read_text()
