"""From rows to the tables of README.md and benchmarks/README.md and the figures: `python -m benchmarks.plot`.

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
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
MARKER = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def committed() -> list[rows.Row]:
    """All rows of benchmarks/results but those of a measurement that failed."""
    return rows.read(path for path in sorted(RESULTS.glob("*.jsonl")) if not path.name.endswith(".failed.jsonl"))


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
    parser.add_argument("--readme", nargs="+", type=Path, default=PAGES, help="pages whose tables are made anew")
    parser.add_argument("--no-readme", action="store_true", help="print the tables instead")
    parser.add_argument("--figures", type=Path, default=RESULTS, help="folder of the figures")
    given = parser.parse_args(arguments)
    found = rows.read(given.rows) if given.rows else committed()
    if given.no_readme:
        for name, table in TABLES.items():
            print(f"\n## {name}\n\n{table(found)}")
    else:
        for page in given.readme:
            page.write_text(fill(page.read_text(), found))
            print(f"tables of {page} made from {len(found)} rows")
    from benchmarks import figures  # needs matplotlib; the tables do not

    given.figures.mkdir(parents=True, exist_ok=True)
    for figure in figures.FIGURES:
        for path in figure(found, given.figures):
            print(f"figure {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
