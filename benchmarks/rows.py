"""Rows of results: JSON lines, one measurement each, with everything needed to judge it later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape

Row = dict[str, Any]


def short(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def write(path: Path, rows: Iterable[Row], circumstances: Row) -> None:
    """Append rows to a file of JSON lines, each with its circumstances; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        for row in rows:
            out.write(json.dumps({**row, **circumstances}, sort_keys=True) + "\n")


def numbered(path: Path) -> list[tuple[int, Row]]:
    """The rows of a file with the numbers of their lines; ValueError names the file and line that is no JSON object."""
    found: list[tuple[int, Row]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        found.append((number, row))
    return found


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files, in order; ValueError names the file and line that is no JSON object."""
    return [row for path in paths for _, row in numbered(path)]


_OF_A_LAYER = {"shape": str, "contestant": str, "dtype": str, "device": str, "ours": bool}
_OF_A_NETWORK = {"kan": list, "batch": int, "device": str}
# What tables and figures rely on in every row of a kind, whether it measured something, failed or was absent.
KINDS: dict[str, dict[str, type]] = {
    "layer": _OF_A_LAYER,
    "sweep": {**_OF_A_LAYER, "axis": str, "value": int},
    "network": _OF_A_NETWORK,
    "protocol": {"contestant": str, "widths": list, "device": str},
    "training": {"task": str, "model": str, "device": str},
    "latency": _OF_A_NETWORK,
    "host": {"shape": str},
    "contractions": {"shape": str, "dtype": str, "device": str},
    "kernels": {"kernel": str},
    "bars": {"shape": str, "device": str},
    "rates": {"instruction": str},
}


def checked(paths: Iterable[Path]) -> list[Row]:
    """As `read`; ValueError also names a file without rows, and the file and line of a row that is of no known kind, or whose
    columns are not of the types that its kind has.
    """
    rows: list[Row] = []
    for path in paths:
        found = numbered(path)
        if not found:
            raise ValueError(f"{path}: expected rows, got none")
        for number, row in found:
            wrong = _wrong(row)
            if wrong is not None:
                raise ValueError(f"{path}:{number}: {wrong}")
            rows.append(row)
    return rows


def _wrong(row: Row) -> str | None:
    """What is wrong with a row; None if nothing."""
    what = row.get("what")
    if what not in KINDS:
        return f"what: expected one of {', '.join(KINDS)}, got {what!r}"
    for key, kind in KINDS[what].items():
        if not isinstance(row.get(key), kind):
            return f"{key}: expected {kind.__name__} in a row of {what}, got {row.get(key)!r}"
    if "shape" in KINDS[what]:
        try:
            Shape.parse(row["shape"])
        except ValueError as error:
            return str(error)
    for key, value in row.items():
        timed = key.endswith(("_ms", "_us", "_mib", "_tflops", "_gbps")) or (key.endswith("_ratio") and value is not None)
        if timed and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
            return f"{key}: expected a finite number, got {value!r}"
    return None
