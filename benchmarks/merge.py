"""The latest row of every subject: measured phase by phase, each with the commit that it was measured at."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
PHASES = ("forward", "backward", "step", "optimiser", "second_derivative")
# Where a time holds: rows that differ in one of these are not of one table row.
SETTING = ("device", "device_name", "threads", "torch", "allocator")
ERRORS = ("error", "reference_error", "allowed_error")


def part_of(key: str) -> str | None:
    """What a column belongs to: a phase, "memory", "error"; None for what describes the subject."""
    if "memory" in key:
        return "memory"
    if key in ERRORS:
        return "error"
    return next((phase for phase in PHASES if key.startswith(f"{phase}_")), None)


def _measured(row: Row) -> set[str]:
    """The parts that a row has measured, or failed to."""
    parts = {"memory" for key in row if part_of(key) == "memory"} | {"error" for key in ERRORS if key in row}
    return parts | {phase for phase in PHASES if any(f"{phase}_{end}" in row for end in ("ms", "us", "failed"))}


def _renewed(old: Row, new: Row) -> Row:
    """A subject's rows as one: parts that the newer one does not have stay, of those that it has nothing older does.

    "commits" says of every part at which commit it was measured.
    """
    measured = _measured(new)
    now = {"commits": dict.fromkeys(sorted(measured), new["commit"])} if "commit" in new else {}
    if "failed" in new:
        return {**new, **now}
    kept = {key: value for key, value in old.items() if part_of(key) not in measured and key not in ("failed", "commits")}
    stay = {part: commit for part, commit in old.get("commits", {}).items() if part not in measured}
    if now or stay:
        now = {"commits": {**stay, **now.get("commits", {})}}
    return {**kept, **new, **now}


def setting(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in SETTING)


def latest(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows that have these values, the last one of every subject and setting, in order of first appearance."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            subject = (
                row.get("shape"), row.get("contestant"), row.get("dtype"), str(row.get("kan")), row.get("batch"),
                row.get("task"), row.get("model"), row.get("instruction"), row.get("axis"), row.get("value"),
                row.get("backend") if row.get("what") == "sweep" else None, *setting(row),
            )  # fmt: skip
            found[subject] = _renewed(found.get(subject, {}), row)
    return list(found.values())


def commit_of(row: Row, part: str) -> str | None:
    """The commit of one part of a row that `latest` made."""
    commit: str | None = row.get("commits", {}).get(part, row.get("commit"))
    return commit


def commits(rows: list[Row], parts: tuple[str, ...]) -> list[str]:
    """The commits of these parts of the rows; the rows' own where no parts are named or a row does not tell them apart."""
    found: dict[str, None] = {}
    for row in rows:
        known = row.get("commits", {})
        own = [row["commit"]] if "commit" in row else []
        found |= dict.fromkeys([known[part] for part in parts if part in known] if parts and known else own)
    return list(found)
