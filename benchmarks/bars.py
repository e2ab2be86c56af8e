"""The CPU speed bars: kan_fast's layer against nn.Linear of equal parameter count, PASS or MISS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kan_fast
from benchmarks import cases, environment, latency, memory, steps
from benchmarks.cases import BARS, Shape
from benchmarks.gate import Verdict, judge
from benchmarks.options import Options, count
from benchmarks.rows import short
from benchmarks.timing import NOISE, Timing, noise, time_interleaved

Row = dict[str, Any]
Report = Callable[[str], None]


def _layer(shape: Shape, backend: str, dtype: torch.dtype = torch.float32) -> kan_fast.KANLayer:
    torch.manual_seed(0)
    return kan_fast.KANLayer(
        shape.in_features, shape.out_features, shape.grid_size, shape.spline_order, backend=backend, dtype=dtype
    )


def _linear(shape: Shape) -> nn.Linear:
    return nn.Linear(shape.linear_features, shape.out_features, bias=False)


def _verdict(ratio: float, bar: float | None) -> str:
    if bar is None:
        return ""
    return "PASS" if ratio <= bar else "MISS"


def _milliseconds(timing: Timing) -> float:
    return timing.median * 1e3


def _memory_case(kind: str, key: str, backend: str) -> tuple[Callable[[], object], Callable[[], object]]:
    shape = Shape.parse(key)
    layer = _layer(shape, backend) if kind == "kan_fast" else _linear(shape)
    width = shape.in_features if kind == "kan_fast" else shape.linear_features
    x = cases.uniform_input(shape.batch, width)
    cotangent = cases.uniform_input(shape.batch, shape.out_features, seed=1)
    # One row in eight warms libraries up without leaving buffers of the full size behind.
    small = max(1, shape.batch // 8)
    return steps.step(layer, x[:small], cotangent[:small]), steps.step(layer, x, cotangent)


def measure_memory(shape: Shape, backend: str) -> tuple[int, int]:
    """Peak extra bytes of a step: (kan_fast, nn.Linear of equal parameter count)."""
    threads = torch.get_num_threads()
    ours, linear = (
        memory.peak_extra_cpu(_memory_case, (kind, shape.key(), backend), threads) for kind in ("kan_fast", "linear")
    )
    return ours, linear


def measure_shape(shape: Shape, backend: str, seconds: float, extras: bool, row: Row | None = None) -> Row:
    """One row: times, ratios and errors of one shape; `row`, if it is given, is filled as they come.

    extras: also bfloat16 against float32, a non-uniform grid against the uniform one, and a step without grad of x.
    """
    layer, linear = _layer(shape, backend), _linear(shape)
    x = cases.uniform_input(shape.batch, shape.in_features)
    wide = cases.uniform_input(shape.batch, shape.linear_features, seed=2)
    cotangent = cases.uniform_input(shape.batch, shape.out_features, seed=1)
    verdict: Verdict = judge(layer, x, cotangent)
    row = {} if row is None else row
    row |= {
        "what": "bars",
        "shape": shape.key(),
        "backend": backend,
        "dtype": "float32",
        "error": verdict.error,
        "reference_error": verdict.reference_error,
        "allowed_error": verdict.allowed,
    }
    if not verdict.right:
        row["failed"] = f"error {verdict.error:.1e} to float64 is above the allowed {verdict.allowed:.1e}"
        return row
    forward = {"kan_fast": steps.forward(layer, x), "linear": steps.forward(linear, wide)}
    both = {"kan_fast": steps.step(layer, x, cotangent), "linear": steps.step(linear, wide, cotangent)}
    if extras:
        low = _layer(shape, backend, torch.bfloat16)
        bent = _layer(shape, backend)
        bent.grid.copy_(cases.non_uniform_grid(bent.grid, shape.spline_order))
        low_x, low_cotangent = x.bfloat16(), cotangent.bfloat16()
        forward |= {"bfloat16": steps.forward(low, low_x), "non_uniform": steps.forward(bent, x)}
        both |= {
            "bfloat16": steps.step(low, low_x, low_cotangent),
            "non_uniform": steps.step(bent, x, cotangent),
            "no_dx": steps.parameter_step(layer, x, cotangent),
            "linear_no_dx": steps.parameter_step(linear, wide, cotangent),
        }
        for name, verdict in (("bfloat16", judge(low, low_x, low_cotangent)), ("non-uniform grid", judge(bent, x, cotangent))):
            if not verdict.right:
                row["failed"] = f"{name}: error {verdict.error:.1e} to float64 is above the allowed {verdict.allowed:.1e}"
                return row
    for phase, calls in (("forward", forward), ("step", both)):
        timings = time_interleaved(calls, budget=seconds)
        ours, base = timings["kan_fast"], timings["linear"]
        bar = getattr(cases.bar(shape, environment.isa()), phase)
        row[f"{phase}_ms"] = _milliseconds(ours)
        row[f"{phase}_linear_ms"] = _milliseconds(base)
        row[f"{phase}_ratio"] = ours.ratio_to(base)
        row |= ours.columns(phase) | base.columns(f"{phase}_linear")
        row[f"{phase}_bar"] = bar
        row[f"{phase}_verdict"] = _verdict(row[f"{phase}_ratio"], bar)
        if extras:
            row[f"{phase}_bfloat16_ratio"] = timings["bfloat16"].ratio_to(ours)
            row[f"{phase}_non_uniform_ratio"] = timings["non_uniform"].ratio_to(ours)
            if "no_dx" in timings:
                row["step_no_dx_ratio"] = timings["no_dx"].ratio_to(timings["linear_no_dx"])
    return row


def print_row(row: Row, report: Report) -> None:
    if "failed" in row:
        report(f"{Shape.parse(row['shape'])!s:24} WRONG: {row['failed']}")
        return
    cells = [f"{Shape.parse(row['shape'])!s:24}"]
    for phase in (phase for phase in ("forward", "step") if f"{phase}_ms" in row):
        bar = row[f"{phase}_bar"]
        bound = "" if bar is None else f" <= {bar:.2f} {row[f'{phase}_verdict']}"
        cells.append(
            f"{phase} {row[f'{phase}_ms']:8.3f}{noise(row, phase)} ms, "
            f"linear {row[f'{phase}_linear_ms']:8.3f}{noise(row, f'{phase}_linear')}, ratio {row[f'{phase}_ratio']:.3f}{bound}"
        )
    cells.append(f"error {row['error']:.1e} (reference {row['reference_error']:.1e})")
    report(" | ".join(cells))
    if "step_no_dx_ratio" in row:
        report(
            " " * 24 + " | bfloat16/float32 "
            + ", ".join(
                f"{phase} {row[f'{phase}_bfloat16_ratio']:.2f} "
                + _verdict(row[f"{phase}_bfloat16_ratio"], cases.BAR_BFLOAT16)
                for phase in ("forward", "step")
            )
            + " | non-uniform/uniform "
            + ", ".join(
                f"{phase} {row[f'{phase}_non_uniform_ratio']:.2f} "
                + _verdict(row[f"{phase}_non_uniform_ratio"], cases.BAR_NON_UNIFORM)
                for phase in ("forward", "step")
            )
            + f" | step without dx: {row['step_no_dx_ratio']:.3f} of linear's"
        )
    if "memory_mib" in row:
        ours, linear = row["memory_mib"], row["memory_linear_mib"]
        verdict = _verdict(ours / max(linear, 0.5), cases.BAR_MEMORY)
        report(" " * 24 + f" | peak extra memory of a step {ours:.1f} MiB, linear {linear:.1f} MiB {verdict}")
    if "memory_failed" in row:
        report(" " * 24 + f" | peak extra memory of a step: fails, {row['memory_failed']}")


def run(options: Options) -> list[Row]:
    """Measure and print; without shapes all bars and the latency line."""
    report = options.report
    rows: list[Row] = []
    report(NOISE)
    shapes = options.shapes or list(BARS)
    for at, shape in enumerate(shapes, 1):
        options.progress(f"{count(at, len(shapes))}bars {shape}")
        row: Row = {}
        with options.kept(row, lambda row: print_row(row, report)):
            measure_shape(shape, options.one_backend(), options.seconds, options.extras, row)
            if options.memory and "failed" not in row:
                try:
                    ours, linear = measure_memory(shape, options.one_backend())
                    row["memory_mib"], row["memory_linear_mib"] = ours / 2**20, linear / 2**20
                except Exception as error:  # the times are a result without it
                    row["memory_failed"] = short(error)
        print_row(row, report)
        options.emit([row])
        rows.append(row)
    if options.shapes is None:
        rows.append(latency.measure(*latency.CASES[0], options))
        latency.print_row(rows[-1], report)
        options.emit(rows[-1:])
    return rows
