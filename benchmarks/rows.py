"""Rows of results: JSON lines, one measurement each, with everything needed to judge it later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(path: Path, rows: Iterable[Row], circumstances: Row) -> None:
    """Append rows to a file of JSON lines, each with its circumstances; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        for row in rows:
            out.write(json.dumps({**row, **circumstances}, sort_keys=True) + "\n")


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files, in order; ValueError names the file and line that is no JSON object."""
    rows: list[Row] = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: expected a JSON object, {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows
