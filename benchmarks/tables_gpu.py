"""README's tables of rows from a GPU."""

from __future__ import annotations

from benchmarks.cases import Shape
from benchmarks.layer import CUDA_SHAPES
from benchmarks.markup import NOT_YET, apart, circumstances, markdown, remarks
from benchmarks.merge import Row, commit_of, latest, setting


def layer(rows: list[Row]) -> str:
    """Every cell that has no row reads "not yet measured"; of kan_fast's backends the one with the fastest step is shown."""
    chosen = [row for row in latest(rows, what="layer", device="cuda") if Shape.parse(row["shape"]) in CUDA_SHAPES]
    timed = [row for row in chosen if row["ours"] and "step_ms" in row]
    body, used = [], []
    for shape in CUDA_SHAPES:
        for dtype in ("float32", "bfloat16"):
            mine = [row for row in timed if row["shape"] == shape.key() and row["dtype"] == dtype]
            best = min(mine, key=lambda row: row["step_ms"], default={})
            used += [best] if best else []
            linear = [
                row["forward_graph_ms"]
                for row in chosen
                if row["contestant"] == "linear equal"
                and all(row[key] == best.get(key) for key in ("shape", "dtype"))
                and setting(row) == setting(best)
                and commit_of(row, "forward") == commit_of(best, "forward")
                and "forward_graph_ms" in row
            ]

            def cell(key: str, row: Row = best, form: str = ".3g") -> str:
                return f"{row[key]:{form}}" if key in row else NOT_YET if not row else "-"

            rival = cell("step_ratio_to_fastest_rival", form=".2f")
            if best.get("step_fastest_rival"):
                rival += f" ({best['step_fastest_rival']})"
            body.append([
                f"{shape}, {dtype}{apart(best, timed)}", cell("forward_ms"), cell("forward_ratio", form=".2f"),
                cell("forward_graph_ms"),
                f"{best['forward_graph_ms'] / linear[0]:.2f}" if linear and "forward_graph_ms" in best else cell(""),
                cell("step_ms"), cell("step_ratio", form=".2f"), rival,
                cell("error", form=".1e"), str(best.get("contestant", NOT_YET)).removeprefix("kan_fast "),
            ])  # fmt: skip
    head = [
        "batch x in x out", "forward, ms", "to linear", "as a CUDA graph, ms", "to linear", "step, ms", "to linear",
        "to the fastest rival of the same function", "error to float64", "backend",
    ]
    return markdown(head, body) + circumstances(used, "forward", "step", "error") + _remarks(chosen, "forward", "step")


def more(rows: list[Row]) -> str:
    """Steps with an optimiser, and of differential equations."""
    phases = ("optimiser", "second_derivative")
    every = latest(rows, what="layer", device="cuda")
    chosen = [row for row in every if any(f"{phase}_ms" in row for phase in phases)]
    if not chosen:
        return NOT_YET
    shown = {(row["shape"], row["dtype"]) for row in chosen}
    every = [row for row in every if (row["shape"], row["dtype"]) in shown]
    body = [
        [
            f"{Shape.parse(row['shape'])}, {row['dtype']}{apart(row, chosen)}", row["contestant"],
            *(f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in (
                ("optimiser_ms", ".3g"), ("optimiser_ratio", ".2f"), ("second_derivative_ms", ".3g"))),
        ]
        for row in chosen
    ]  # fmt: skip
    head = ["batch x in x out", "", "step with optimiser, ms", "to linear", "step with second derivatives, ms"]
    return markdown(head, body) + circumstances(chosen, *phases) + _remarks(every, *phases)


def _remarks(rows: list[Row], *phases: str) -> str:
    """Remarks of contestants of several shapes and dtypes: each says of which it is, unless none of its kind takes part."""
    named = [
        row if "absent" in row else {**row, "contestant": f"{row['contestant']}, {Shape.parse(row['shape'])}, {row['dtype']}"}
        for row in rows
    ]
    return remarks(named, *phases)


def contractions(rows: list[Row]) -> str:
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
