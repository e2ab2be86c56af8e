"""From rows to README's tables and the figures: `python -m benchmarks.plot`.

A table goes between `<!-- table:NAME -->` and `<!-- /table -->`; what stood there is replaced.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks import rows
from benchmarks.environment import ROOT
from benchmarks.tables import TABLES

RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def fill(text: str, found: list[rows.Row]) -> str:
    """The text with every marked table made anew; ValueError for an unknown name or a marker without an end."""
    opened, closed = text.count("<!-- table:"), text.count("<!-- /table -->")
    if opened != closed:
        raise ValueError(f"expected an end for every table marker, got {opened} markers and {closed} ends")

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"table: expected one of {sorted(TABLES)}, got {name!r}")
        return f"{match[1]}{TABLES[name](found)}\n{match[3]}"

    return MARKER.sub(made, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--rows", nargs="+", type=Path, help="files of rows (default: benchmarks/results/*.jsonl)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--no-readme", action="store_true", help="print the tables instead")
    parser.add_argument("--figures", type=Path, default=RESULTS, help="folder of the figures")
    given = parser.parse_args(arguments)
    found = rows.read(given.rows if given.rows else sorted(RESULTS.glob("*.jsonl")))
    if given.no_readme:
        for name, table in TABLES.items():
            print(f"\n## {name}\n\n{table(found)}")
    else:
        given.readme.write_text(fill(given.readme.read_text(), found))
        print(f"tables of {given.readme.name} made from {len(found)} rows")
    from benchmarks import figures  # needs matplotlib; the tables do not

    given.figures.mkdir(parents=True, exist_ok=True)
    for figure in figures.FIGURES:
        for path in figure(found, given.figures):
            print(f"figure {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
