"""README's tables, made of rows: no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import BAR_BFLOAT16, BAR_MEMORY, BAR_NON_UNIFORM, BARS, Shape

Row = dict[str, Any]
NOT_YET = "not yet measured"


PHASES = ("forward", "backward", "step", "optimiser", "second_derivative")


def _renewed(old: Row, new: Row) -> Row:
    """A subject's rows as one: phases that the newer one does not have stay, of those that it has nothing older does."""
    if "failed" in new:
        return new
    measured = [phase for phase in PHASES if any(f"{phase}_{end}" in new for end in ("ms", "us", "failed"))]

    def stays(key: str) -> bool:
        return "memory" in key or not any(key.startswith(f"{phase}_") for phase in measured)

    return {**{key: value for key, value in old.items() if stays(key) and key != "failed"}, **new}


def latest(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows that have these values, the last one of every subject, in order of first appearance."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            subject = (
                row.get("shape"), row.get("contestant"), row.get("dtype"), str(row.get("kan")), row.get("batch"),
                row.get("task"), row.get("model"), row.get("instruction"), row.get("axis"), row.get("value"),
                row.get("device"), row.get("device_name"), row.get("backend") if row.get("what") == "sweep" else None,
            )
            found[subject] = _renewed(found.get(subject, {}), row)
    return list(found.values())


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def circumstances(rows: list[Row]) -> str:
    """The line below a table: where its rows were measured."""
    if not rows:
        return ""
    facts = []
    for key, text in (
        ("device_name", "{}"), ("threads", "{} threads"), ("torch", "torch {}"), ("allocator", "allocator: {}"),
        ("commit", "commit {}"),
    ):
        values = list(dict.fromkeys(str(row[key]) for row in rows if key in row))
        if values:
            facts.append(text.format(", ".join(values)))
    return "\n\nMeasured on: " + "; ".join(facts) + "."


def remarks(rows: list[Row], phase: str) -> str:
    """Who is not in a table and why, and what those said that fail."""
    absent = {row["contestant"]: row["absent"] for row in rows if "absent" in row and f"{phase}_ms" not in row}
    failing: dict[str, str] = {}
    for row in rows:
        found = row.get(f"{phase}_failed", row.get("failed"))
        if found is not None:
            failing.setdefault(row["contestant"], found)
    text = "".join(f" {name} is absent: {reason}." for name, reason in absent.items())
    return text + "".join(f" {name}: {reason.rstrip('.')}." for name, reason in failing.items())


def _shapes(rows: list[Row]) -> list[Shape]:
    """Shapes of the rows: those with a bar first and in their order."""
    present = list(dict.fromkeys(Shape.parse(row["shape"]) for row in rows))
    return [shape for shape in BARS if shape in present] + [shape for shape in present if shape not in BARS]


def _mark(value: float, bar: float | None) -> str:
    if bar is None:
        return ""
    return " (met)" if value <= bar else " (missed)"


def _bar_rows(rows: list[Row], forced: str = "") -> list[Row]:
    """Of layers with the kernels that a CPU gets by itself, or with those of an instruction set that KAN_FAST_ISA asked for."""
    chosen = [
        row for row in latest(rows, what="bars", device="cpu")
        if "forward_ratio" in row and row.get("device_name", "").partition("KAN_FAST_ISA=")[2].rstrip(")") == forced
    ]  # fmt: skip
    return [row for shape in _shapes(chosen) for row in chosen if row["shape"] == shape.key()]


def _subject(row: Row, among: list[Row]) -> str:
    """The shape, and the device where rows of several stand in one table."""
    several = len({other.get("device_name") for other in among}) > 1
    return str(Shape.parse(row["shape"])) + (f"; {row.get('device_name')}" if several else "")


def bars(rows: list[Row], forced: str = "") -> str:
    """Times, ratios and bars."""
    chosen = _bar_rows(rows, forced)
    if not chosen:
        return NOT_YET
    body = []
    for row in chosen:
        cells = [_subject(row, chosen)]
        for phase in ("forward", "step"):
            ratio, bar = row[f"{phase}_ratio"], row[f"{phase}_bar"]
            cells += [f"{row[f'{phase}_ms']:.3g}", f"{ratio:.2f}", "-" if bar is None else f"{bar:.2f}{_mark(ratio, bar)}"]
        body.append(cells)
    head = ["batch x in x out", "forward, ms", "ratio", "target", "step, ms", "ratio", "target"]
    return markdown(head, body) + circumstances(chosen)


def bars_more(rows: list[Row]) -> str:
    """What the same layers cost in bfloat16, on non-uniform grids and in memory, and how exact they are."""
    chosen = [row for row in _bar_rows(rows) if "forward_bfloat16_ratio" in row and "memory_mib" in row]
    if not chosen:
        return NOT_YET
    body = []
    for row in chosen:
        cells = [_subject(row, chosen)]
        for kind, bar in (("bfloat16", BAR_BFLOAT16), ("non_uniform", BAR_NON_UNIFORM)):
            pair = [row[f"{phase}_{kind}_ratio"] for phase in ("forward", "step")]
            cells.append(f"{pair[0]:.2f} / {pair[1]:.2f}{_mark(max(pair), bar)}")
        memory, linear = row["memory_mib"], row["memory_linear_mib"]
        cells.append(f"{memory:.1f} / {linear:.1f}{_mark(memory / max(linear, 0.5), BAR_MEMORY)}")
        cells.append(f"{row['error']:.1e} / {row['reference_error']:.1e}")
        body.append(cells)
    head = [
        "batch x in x out", f"bfloat16 / float32: forward / step (target {BAR_BFLOAT16})",
        f"non-uniform / uniform grid (target {BAR_NON_UNIFORM})", "peak memory of a step, MiB: ours / linear",
        "error to float64: ours / reference",
    ]
    return markdown(head, body) + circumstances(chosen)


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


def _rivals(rows: list[Row], phase: str, cell: Callable[[Row | None, str], str] = _rival_cell) -> str:
    chosen = latest(rows, what="layer", device="cpu", dtype="float32")
    measured = [row for row in chosen if any(key.startswith(phase) for key in row)]
    if not measured:
        return NOT_YET
    shapes = _shapes(measured)
    names = list(dict.fromkeys(row["contestant"] for row in measured))
    body = []
    for name in names:
        mine = {row["shape"]: row for row in chosen if row["contestant"] == name}
        note = next((row["note"] for row in mine.values() if row.get("note")), "")
        body.append([f"{name} ({note})" if note else name, *(cell(mine.get(shape.key()), phase) for shape in shapes)])
    return markdown(["contestant", *map(str, shapes)], body) + circumstances(measured) + remarks(chosen, phase)


def forward(rows: list[Row]) -> str:
    return _rivals(rows, "forward")


def step(rows: list[Row]) -> str:
    return _rivals(rows, "step")


def optimiser(rows: list[Row]) -> str:
    return _rivals(rows, "optimiser")


def second_derivative(rows: list[Row]) -> str:
    return _rivals(rows, "second_derivative")


def memory(rows: list[Row]) -> str:
    def cell(row: Row | None, phase: str) -> str:
        pair = [row.get(f"{name}_memory_mib") if row else None for name in ("forward", "step")]
        return "-" if None in pair else f"{pair[0]:.1f} / {pair[1]:.1f}"

    return _rivals(rows, "step_memory", cell)


def accuracy(rows: list[Row]) -> str:
    """Errors of those that claim the same function."""

    def cell(row: Row | None, phase: str) -> str:
        return f"{row['error']:.1e}" if row and "error" in row else "-"

    exact = [row for row in rows if row.get("what") != "layer" or "error" in row]
    return _rivals(exact, "error", cell)


def latency(rows: list[Row], device: str = "cpu") -> str:
    chosen = [row for row in latest(rows, what="latency", device=device) if "forward_us" in row]
    if not chosen:
        return NOT_YET
    body = [
        [
            f"KAN({row['kan']})", f"MLP {row['mlp']}", str(row["batch"]),
            *(
                f"{row[f'{phase}_us']:.0f} / {row[f'{phase}_mlp_us']:.0f} us, {row[f'{phase}_ratio']:.2f}"
                + (f", target {row[f'{phase}_bar']:g}{_mark(row[f'{phase}_ratio'], row[f'{phase}_bar'])}"
                   if f"{phase}_bar" in row else "")
                for phase in ("forward", "step")
            ),
        ]
        for row in chosen
    ]
    return markdown(["network", "against", "batch", "forward", "step"], body) + circumstances(chosen)


def network(rows: list[Row], device: str = "cpu") -> str:
    chosen = [row for row in latest(rows, what="network", device=device) if "forward_ms" in row]
    if not chosen:
        return NOT_YET
    body = [
        [
            f"KAN({row['kan']})", f"MLP {row['mlp']}", str(row["batch"]),
            *(f"{row[f'{phase}_ms']:.3g} ms, {row[f'{phase}_ratio']:.2f}" for phase in ("forward", "step", "optimiser")),
        ]
        for row in chosen
    ]
    head = ["network", "against, equal parameters", "batch", "forward", "step", "with optimiser"]
    return markdown(head, body) + circumstances(chosen)


def protocol(rows: list[Row], device: str = "cpu") -> str:
    from benchmarks.network import PROTOCOL_PUBLISHED, PROTOCOL_SOURCE

    chosen = latest(rows, what="protocol", device=device)
    if not chosen:
        return NOT_YET
    body = []
    for row in sorted(chosen, key=lambda row: row.get("forward_ms", 1e9) + row.get("backward_ms", 1e9)):
        name = f"{row['contestant']} ({row['note']})" if row.get("note") else row["contestant"]
        published = PROTOCOL_PUBLISHED.get(row["contestant"])
        beside = f"{published[0]} / {published[1]}" if published else "-"
        if "forward_ms" in row:
            body.append([name, f"{row['forward_ms']:.2f}", f"{row['backward_ms']:.2f}", beside])
        elif "failed" in row:
            body.append([name, "fails", "fails", beside])
    head = ["network [1000, 1000, 1], batch 100", "forward, ms", "backward, ms", "published on another device, ms"]
    return markdown(head, body) + circumstances(chosen) + f" Last column: {PROTOCOL_SOURCE}." + remarks(chosen, "forward")


def training(rows: list[Row]) -> str:
    chosen = [row for row in latest(rows, what="training", device="cpu") if "step_ms" in row]
    if not chosen:
        return NOT_YET
    body = [
        [
            f"{row['task']}: {row['metric']}",
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


def gpu(rows: list[Row]) -> str:
    """Every cell that has no row reads "not yet measured"."""
    from benchmarks.layer import CUDA_SHAPES

    chosen = latest(rows, what="layer", device="cuda")
    body, used = [], []
    for shape in CUDA_SHAPES:
        for dtype in ("float32", "bfloat16"):
            mine = [row for row in chosen if row["shape"] == shape.key() and row["dtype"] == dtype and row["ours"]]
            best = min((row for row in mine if "step_ms" in row), key=lambda row: row["step_ms"], default={})
            used += [best] if best else []
            linear = [
                row["forward_graph_ms"]
                for row in chosen
                if row["contestant"] == "linear equal"
                and all(row[key] == best.get(key) for key in ("shape", "dtype", "commit"))
                and "forward_graph_ms" in row
            ]

            def cell(key: str, row: Row = best, form: str = ".3g") -> str:
                return f"{row[key]:{form}}" if key in row else NOT_YET if not row else "-"

            body.append([
                f"{shape}, {dtype}", cell("forward_ms"), cell("forward_ratio", form=".2f"),
                cell("forward_graph_ms"),
                f"{best['forward_graph_ms'] / linear[0]:.2f}" if linear and "forward_graph_ms" in best else cell(""),
                cell("step_ms"), cell("step_ratio", form=".2f"), cell("step_ratio_to_fastest_rival", form=".2f"),
                cell("error", form=".1e"), str(best.get("contestant", NOT_YET)).removeprefix("kan_fast "),
            ])  # fmt: skip
    head = [
        "batch x in x out", "forward, ms", "to linear", "as a CUDA graph, ms", "to linear", "step, ms", "to linear",
        "to the fastest rival", "error to float64", "backend",
    ]
    return markdown(head, body) + circumstances(used)


def gpu_more(rows: list[Row]) -> str:
    """Steps with an optimiser, and of differential equations."""
    timed = ("optimiser_ms", "second_derivative_ms")
    chosen = [row for row in latest(rows, what="layer", device="cuda") if any(key in row for key in timed)]
    if not chosen:
        return NOT_YET
    body = [
        [
            f"{Shape.parse(row['shape'])}, {row['dtype']}", row["contestant"],
            *(f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in (
                ("optimiser_ms", ".3g"), ("optimiser_ratio", ".2f"), ("second_derivative_ms", ".3g"))),
        ]
        for row in chosen
    ]  # fmt: skip
    head = ["batch x in x out", "", "step with optimiser, ms", "to linear", "step with second derivatives, ms"]
    return markdown(head, body) + circumstances(chosen)


def gpu_contractions(rows: list[Row]) -> str:
    """The latest microseconds, and in brackets those of the earliest commit."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("what") == "contractions" and row["device"] == "cuda" and "output_us" in row:
            found.setdefault((row["dtype"], row["shape"]), []).append(row)
    if not found:
        return NOT_YET

    def cell(before: Row, now: Row, name: str) -> str:
        text = f"{now[f'{name}_us']:.1f}"
        return text if before["commit"] == now["commit"] else f"{text} ({before[f'{name}_us']:.1f})"

    body = [
        [f"{Shape.parse(shape)}, {dtype}", *(cell(mine[0], mine[-1], name) for name in ("output", "input", "weight"))]
        for (dtype, shape), mine in found.items()
    ]
    head = ["batch x in x out", "contract_output, us", "contract_input, us", "contract_weight, us"]
    return markdown(head, body) + circumstances([row for mine in found.values() for row in (mine[-1], mine[0])])


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
    "gpu": gpu,
    "gpu_more": gpu_more,
    "gpu_contractions": gpu_contractions,
    "gpu_network": lambda rows: network(rows, "cuda"),
    "gpu_protocol": lambda rows: protocol(rows, "cuda"),
    "gpu_latency": lambda rows: latency(rows, "cuda"),
}
