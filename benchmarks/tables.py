"""README's tables, made of rows: no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import tables_gpu
from benchmarks.cases import BAR_BFLOAT16, BAR_MEMORY, BAR_NON_UNIFORM, Shape
from benchmarks.layer import MEMORY, memory_cell
from benchmarks.markup import NOT_YET, apart, circumstances, mark, markdown, not_yet, remarks, shapes_of
from benchmarks.merge import Row, latest, part_of, setting


def _bar_rows(rows: list[Row], forced: str = "") -> list[Row]:
    """Of layers with the kernels that a CPU gets by itself, or with those of an instruction set that KAN_FAST_ISA asked for."""
    chosen = [
        row for row in latest(rows, what="bars", device="cpu")
        if "forward_ratio" in row and row.get("device_name", "").partition("KAN_FAST_ISA=")[2].rstrip(")") == forced
    ]  # fmt: skip
    return [row for shape in shapes_of(chosen) for row in chosen if row["shape"] == shape.key()]


def _subject(row: Row, among: list[Row]) -> str:
    """The shape, and the device where rows of several stand in one table."""
    return str(Shape.parse(row["shape"])) + apart(row, among)


def bars(rows: list[Row], forced: str = "") -> str:
    """Times, ratios and bars."""
    chosen = _bar_rows(rows, forced)
    if not chosen:
        return NOT_YET
    body = []
    for row in chosen:
        cells = [_subject(row, chosen)]
        for phase in ("forward", "step"):
            if f"{phase}_ratio" not in row:
                cells += ["-"] * 3
                continue
            ratio, bar = row[f"{phase}_ratio"], row[f"{phase}_bar"]
            cells += [f"{row[f'{phase}_ms']:.3g}", f"{ratio:.2f}", "-" if bar is None else f"{bar:.2f}{mark(ratio, bar)}"]
        body.append(cells)
    head = ["batch x in x out", "forward, ms", "ratio", "target", "step, ms", "ratio", "target"]
    return markdown(head, body) + circumstances(chosen, "forward", "step")


def bars_more(rows: list[Row]) -> str:
    """What the same layers cost in bfloat16, on non-uniform grids and in memory, and how exact they are."""
    columns = ("step_bfloat16_ratio", "forward_bfloat16_ratio")
    chosen = [
        row for row in _bar_rows(rows)
        if all(key in row for key in columns) and ("memory_mib" in row or "memory_failed" in row)
    ]  # fmt: skip
    if not chosen:
        return NOT_YET
    body = []
    for row in chosen:
        cells = [_subject(row, chosen)]
        for kind, bar in (("bfloat16", BAR_BFLOAT16), ("non_uniform", BAR_NON_UNIFORM)):
            pair = [row[f"{phase}_{kind}_ratio"] for phase in ("forward", "step")]
            cells.append(f"{pair[0]:.2f} / {pair[1]:.2f}{mark(max(pair), bar)}")
        if "memory_failed" in row:
            cells.append("fails")
        else:
            memory, linear = row["memory_mib"], row["memory_linear_mib"]
            cells.append(f"{memory:.1f} / {linear:.1f}{mark(memory / max(linear, 0.5), BAR_MEMORY)}")
        cells.append(f"{row['error']:.1e} / {row['reference_error']:.1e}")
        body.append(cells)
    head = [
        "batch x in x out", f"bfloat16 / float32: forward / step (target {BAR_BFLOAT16})",
        f"non-uniform / uniform grid (target {BAR_NON_UNIFORM})", "peak memory of a step, MiB: ours / linear",
        "error to float64: ours / reference",
    ]
    failed = [{**row, "contestant": _subject(row, chosen)} for row in chosen]
    return markdown(head, body) + circumstances(chosen, "forward", "step", "memory", "error") + remarks(failed, "memory")


def _rival_cell(row: Row | None, phase: str) -> str:
    if row is None:
        return "-"
    if f"{phase}_ratio" in row:
        return f"{row[f'{phase}_ratio']:.2f}"
    if f"{phase}_ms" in row:
        return f"{row[f'{phase}_ms']:.3g} ms"
    if str(row.get("failed", "")).startswith("MemoryError"):
        return "too large"
    if str(row.get(f"{phase}_failed", "")).startswith("wrong"):
        return "wrong"
    return "fails" if f"{phase}_failed" in row or "failed" in row else "-"


Cell = Callable[[Row | None, str], str]


def _rivals(rows: list[Row], part: str, cell: Cell = _rival_cell, remarked: tuple[str, ...] | None = None) -> str:
    """A table row a contestant and setting, a column a shape. remarked: prefixes of columns that say what failed."""
    chosen = latest(rows, what="layer", device="cpu", dtype="float32")
    measured = [row for row in chosen if any(part_of(key) == part for key in row)]
    if not measured:
        return NOT_YET
    shapes = shapes_of(measured)
    body = []
    for name in dict.fromkeys(row["contestant"] for row in measured):
        for where in dict.fromkeys(setting(row) for row in measured if row["contestant"] == name):
            mine = {row["shape"]: row for row in chosen if row["contestant"] == name and setting(row) == where}
            first = next(iter(mine.values()))
            note = next((row["note"] for row in mine.values() if row.get("note")), "")
            label = (f"{name} ({note})" if note else name) + apart(first, measured)
            body.append([label, *(cell(mine.get(shape.key()), part) for shape in shapes)])
    table = markdown(["contestant", *map(str, shapes)], body) + circumstances(measured, part)
    return table + remarks(chosen, *((part,) if remarked is None else remarked))


def forward(rows: list[Row]) -> str:
    return _rivals(rows, "forward")


def step(rows: list[Row]) -> str:
    return _rivals(rows, "step")


def optimiser(rows: list[Row]) -> str:
    return _rivals(rows, "optimiser")


def second_derivative(rows: list[Row]) -> str:
    return _rivals(rows, "second_derivative")


def memory(rows: list[Row]) -> str:
    def cell(row: Row | None, part: str) -> str:
        return "-" if row is None or part not in map(part_of, row) else " / ".join(memory_cell(row, phase) for phase in MEMORY)

    return _rivals(rows, "memory", cell, ("forward_memory", "step_memory"))


def accuracy(rows: list[Row]) -> str:
    """Errors of those that claim the same function."""

    def cell(row: Row | None, part: str) -> str:
        return f"{row['error']:.1e}" if row and "error" in row else "-"

    exact = [row for row in rows if row.get("what") != "layer" or "error" in row]
    return _rivals(exact, "error", cell)


def latency(rows: list[Row], device: str = "cpu") -> str:
    every = latest(rows, what="latency", device=device)
    chosen = [row for row in every if "forward_us" in row]
    if not chosen:
        return not_yet(every, "forward")

    def cell(row: Row, phase: str) -> str:
        if f"{phase}_us" not in row:
            return "-"
        ratio, bar = row[f"{phase}_ratio"], row.get(f"{phase}_bar")
        target = "" if bar is None else f", target {bar:g}{mark(ratio, bar)}"
        return f"{row[f'{phase}_us']:.0f} / {row[f'{phase}_mlp_us']:.0f} us, {ratio:.2f}{target}"

    body = [
        [
            f"KAN({row['kan']}){apart(row, chosen)}", f"MLP {row['mlp']}", str(row["batch"]),
            cell(row, "forward"), cell(row, "step"),
        ]
        for row in chosen
    ]  # fmt: skip
    table = markdown(["network", "against", "batch", "forward", "step"], body)
    return table + circumstances(chosen, "forward", "step") + remarks(every, "forward", "step")


def network(rows: list[Row], device: str = "cpu") -> str:
    every = latest(rows, what="network", device=device)
    chosen = [row for row in every if "forward_ms" in row]
    if not chosen:
        return not_yet(every, "forward")
    phases = ("forward", "step", "optimiser")

    def cell(row: Row, phase: str) -> str:
        return f"{row[f'{phase}_ms']:.3g} ms, {row[f'{phase}_ratio']:.2f}" if f"{phase}_ms" in row else "-"

    body = [
        [
            f"KAN({row['kan']}){apart(row, chosen)}", f"MLP {row['mlp']}", str(row["batch"]),
            *(cell(row, phase) for phase in phases),
        ]
        for row in chosen
    ]  # fmt: skip
    head = ["network", "against, equal parameters", "batch", "forward", "step", "with optimiser"]
    return markdown(head, body) + circumstances(chosen, *phases) + remarks(every, *phases)


def protocol(rows: list[Row], device: str = "cpu") -> str:
    from benchmarks.network import PROTOCOL_PUBLISHED, PROTOCOL_SOURCE

    chosen = latest(rows, what="protocol", device=device)
    if not chosen:
        return NOT_YET
    body = []
    for row in sorted(chosen, key=lambda row: row.get("forward_ms", 1e9) + row.get("backward_ms", 1e9)):
        name = (f"{row['contestant']} ({row['note']})" if row.get("note") else row["contestant"]) + apart(row, chosen)
        published = PROTOCOL_PUBLISHED.get(row["contestant"])
        beside = f"{published[0]} / {published[1]}" if published else "-"
        if "forward_ms" in row:
            body.append([name, f"{row['forward_ms']:.2f}", f"{row['backward_ms']:.2f}", beside])
        elif "failed" in row:
            body.append([name, "fails", "fails", beside])
    head = ["network [1000, 1000, 1], batch 100", "forward, ms", "backward, ms", "published on another device, ms"]
    below = circumstances(chosen, "forward", "backward") + f" Last column: {PROTOCOL_SOURCE}."
    return markdown(head, body) + below + remarks(chosen, "forward")


def training(rows: list[Row]) -> str:
    chosen = [row for row in latest(rows, what="training", device="cpu") if "step_ms" in row]
    if not chosen:
        return NOT_YET
    body = [
        [
            f"{row['task']}: {row['metric']}{apart(row, chosen)}",
            f"{row['model'][:3].upper()} {row['widths']}" + (f", G={row['grid_size']}" if row["grid_size"] else ""),
            str(row["parameters"]),
            f"{row['step_ms']:.2g}", f"{row['steps']}",
            f"{row['final']:.3g} ({row['final_min']:.3g} to {row['final_max']:.3g})", f"{row['at_equal_steps']:.3g}",
        ]
        for row in chosen
    ]
    seconds = ", ".join(dict.fromkeys(f"{row['seconds']:g}" for row in chosen))
    head = [
        "task", "model", "parameters", "ms a step", f"steps in {seconds} s", "at equal time: mean (range of 3 seeds)",
        "after equal steps",
    ]
    return markdown(head, body) + circumstances(chosen)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "bars": bars,
    "bars_more": bars_more,
    "bars_avx2": lambda rows: bars(rows, "avx2"),
    "forward": forward,
    "step": step,
    "optimiser": optimiser,
    "second_derivative": second_derivative,
    "memory": memory,
    "accuracy": accuracy,
    "latency": latency,
    "network": network,
    "protocol": protocol,
    "training": training,
    "gpu": tables_gpu.layer,
    "gpu_more": tables_gpu.more,
    "gpu_contractions": tables_gpu.contractions,
    "gpu_network": lambda rows: network(rows, "cuda"),
    "gpu_protocol": lambda rows: protocol(rows, "cuda"),
    "gpu_latency": lambda rows: latency(rows, "cuda"),
}
