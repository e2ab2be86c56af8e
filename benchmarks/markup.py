"""What the tables are made of: Markdown, the line below, remarks about those that are missing."""

from __future__ import annotations

from benchmarks.cases import BARS, Shape
from benchmarks.merge import Row, commits

NOT_YET = "not yet measured"


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


FACTS = (("device_name", "{}"), ("threads", "{} threads"), ("torch", "torch {}"), ("allocator", "allocator: {}"))


def circumstances(rows: list[Row], *parts: str) -> str:
    """The line below a table: where its rows were measured, and the commits of those of their parts that it shows."""
    if not rows:
        return ""
    facts = []
    for key, text in FACTS:
        values = list(dict.fromkeys(str(row[key]) for row in rows if key in row))
        if values:
            facts.append(text.format(", ".join(values)))
    if found := commits(rows, parts):
        facts.append(f"commit {', '.join(found)}")
    return "\n\nMeasured on: " + "; ".join(facts) + "."


def apart(row: Row, among: list[Row]) -> str:
    """"; " and the row's setting, as far as the rows of a table differ in it; nothing where they agree."""
    several = [(key, text) for key, text in FACTS if len({other.get(key) for other in among}) > 1]
    return "".join(f"; {text.format(row[key])}" for key, text in several if key in row)


def who(row: Row) -> str:
    """Whom a remark is about."""
    return str(row["contestant"]) if "contestant" in row else f"KAN({row.get('kan')}) on {row.get('batch')} samples"


def remarks(rows: list[Row], *phases: str) -> str:
    """Who is not in a table of these phases and why, and what those said that fail."""
    absent: dict[str, str] = {}
    failing: dict[str, str] = {}
    for row in rows:
        if "absent" in row and not any(f"{phase}_ms" in row for phase in phases):
            absent[who(row)] = row["absent"]
        for phase in phases:
            found = row.get(f"{phase}_failed", row.get("failed"))
            if found is not None:
                failing.setdefault(who(row), found)
    text = "".join(f" {name} is absent: {reason}." for name, reason in absent.items())
    return text + "".join(f" {name}: {reason.rstrip('.')}." for name, reason in failing.items())


def not_yet(rows: list[Row], *phases: str) -> str:
    """In place of a table without figures."""
    text = remarks(rows, *phases)
    return f"{NOT_YET}.{text}" if text else NOT_YET


def shapes_of(rows: list[Row]) -> list[Shape]:
    """Shapes of the rows: those with a bar first and in their order."""
    present = list(dict.fromkeys(Shape.parse(row["shape"]) for row in rows))
    return [shape for shape in BARS if shape in present] + [shape for shape in present if shape not in BARS]


def mark(value: float, bar: float | None) -> str:
    if bar is None:
        return ""
    return " (met)" if value <= bar else " (missed)"
