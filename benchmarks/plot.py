"""From rows to the tables of README.md and benchmarks/README.md and the figures: `python -m benchmarks.plot`.

A table goes between `<!-- table:NAME -->` and `<!-- /table -->`; what stood there is replaced.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import rows
from benchmarks.environment import ROOT
from benchmarks.tables import TABLES

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
MARKER = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def files() -> list[Path]:
    """The files of benchmarks/results but those of a measurement that failed."""
    return [path for path in sorted(RESULTS.glob("*.jsonl")) if not path.name.endswith(".failed.jsonl")]


def committed() -> list[rows.Row]:
    return rows.checked(files())


BROKEN = (KeyError, TypeError, AttributeError, IndexError)


def culprit(paths: list[Path], error: Exception) -> str:
    """The file and line of the first row that makes no table by itself, or what was raised where every one does."""
    for path in paths:
        for number, row in rows.numbered(path):
            for name, table in TABLES.items():
                try:
                    table([row])
                except BROKEN as own:
                    return f"{path}:{number}: the table {name} cannot be made: {type(own).__name__}: {own}"
    return f"{', '.join(map(str, paths))}: {type(error).__name__}: {error}"


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


def drawn(found: list[rows.Row], folder: Path) -> list[Path]:
    """All figures, as files of the folder."""
    try:
        from benchmarks import figures  # needs matplotlib; the tables do not
    except ImportError as error:
        raise ValueError(f"figures: {error}; --no-readme prints the tables alone") from error
    return [path for figure in figures.FIGURES for path in figure(found, folder)]


def make(found: list[rows.Row], pages: list[Path], folder: Path | None) -> list[str]:
    """Make the tables of the pages, and the figures into a folder unless it is None; what was made, in words.

    Everything is made before the first file is replaced.
    """
    said = []
    texts = {page: fill(page.read_text(), found) for page in pages}
    with tempfile.TemporaryDirectory() as scratch:
        pictures = drawn(found, Path(scratch)) if folder is not None else []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for page, text in texts.items():
            page.write_text(text)
            said.append(f"tables of {page} made from {len(found)} rows")
        for picture in pictures:
            assert folder is not None
            shutil.copyfile(picture, folder / picture.name)
            said.append(f"figure {picture.name}")
    return said


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--rows", nargs="+", type=Path, help="files of rows (default: benchmarks/results/*.jsonl)")
    parser.add_argument("--readme", nargs="+", type=Path, default=PAGES, help="pages whose tables are made anew")
    parser.add_argument("--no-readme", action="store_true", help="print the tables instead; figures only with --figures")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: benchmarks/results)")
    given = parser.parse_args(arguments)
    folder = given.figures or (None if given.no_readme else RESULTS)
    paths = given.rows or files()
    try:
        found = rows.checked(paths)
        if given.no_readme:
            text = "".join(f"\n## {name}\n\n{table(found)}\n" for name, table in TABLES.items())
        said = make(found, [] if given.no_readme else given.readme, folder)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.plot: {error}", file=sys.stderr)
        return 2
    except BROKEN as error:
        print(f"python -m benchmarks.plot: {culprit(paths, error)}", file=sys.stderr)
        return 2
    if given.no_readme:
        print(text)
    for line in said:
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
