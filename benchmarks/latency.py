"""Small calls, where the cost of a call matters more than arithmetic: KAN networks against MLPs of equal depth."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import cases, gate, host, steps
from benchmarks.cases import BAR_LATENCY
from benchmarks.options import Options, count
from benchmarks.timing import NOISE, noise, time_interleaved

Row = dict[str, Any]
# Widths of the KAN, widths of the MLP, batch. The first is the one with a bar.
CASES: list[tuple[list[int], list[int], int]] = [
    ([2, 5, 1], [2, 50, 1], 64),
    ([2, 5, 1], [2, 50, 1], 1),
    ([64, 32, 10], [64, 256, 10], 1),
    ([64, 32, 10], [64, 256, 10], 64),
]


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them."""
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def measure(kan_widths: list[int], mlp_widths: list[int], batch: int, options: Options) -> Row:
    """Microseconds of forward and step (gradients of x and all parameters), and ratios to the MLP's."""
    torch.manual_seed(0)
    kan = kan_fast.KAN(kan_widths, backend=options.one_backend()).to(options.device)
    dense = mlp(mlp_widths).to(options.device)
    x = cases.uniform_input(batch, kan_widths[0], device=options.device)
    cotangent = torch.ones(batch, kan_widths[-1], device=options.device)
    row: Row = {
        "what": "latency",
        "backend": options.one_backend(),
        "dtype": "float32",
        "kan": kan_widths,
        "mlp": mlp_widths,
        "batch": batch,
    }
    wrong = gate.judge_network(kan, x, cotangent)
    if wrong is not None:
        row["failed"] = wrong
        return row
    with options.kept(row, lambda row: print_row(row, options.report)):
        _measure_phases(row, kan, dense, x, cotangent, options)
    if (kan_widths, mlp_widths, batch) == CASES[0] and options.device == "cpu":
        for phase in ("forward", "step"):
            row[f"{phase}_bar"] = BAR_LATENCY
            row[f"{phase}_verdict"] = "PASS" if row[f"{phase}_ratio"] <= BAR_LATENCY else "MISS"
    return row


def _measure_phases(row: Row, kan: nn.Module, dense: nn.Module, x: Tensor, cotangent: Tensor, options: Options) -> None:
    for phase, calls in (
        ("forward", {"kan": steps.forward(kan, x), "mlp": steps.forward(dense, x)}),
        ("step", {"kan": steps.step(kan, x, cotangent), "mlp": steps.step(dense, x, cotangent)}),
    ):
        # On a GPU too the host's clock is the right one: what counts is how fast calls can be issued and finished.
        if options.device == "cuda":
            calls = {name: _synchronised(call) for name, call in calls.items()}
        timings = time_interleaved(calls, budget=options.seconds, warm_up=50)
        row[f"{phase}_us"] = timings["kan"].median * 1e6
        row[f"{phase}_mlp_us"] = timings["mlp"].median * 1e6
        row[f"{phase}_ratio"] = timings["kan"].ratio_to(timings["mlp"])
        row |= timings["kan"].columns(phase) | timings["mlp"].columns(f"{phase}_mlp")


def _synchronised(call: Callable[[], object]) -> Callable[[], object]:
    def finished() -> None:
        call()
        torch.cuda.synchronize()

    return finished


def print_row(row: Row, report: Callable[[str], None]) -> None:
    if "failed" in row:
        report(f"KAN({row['kan']}) on {row['batch']} samples: {row['failed']}")
        return
    cells = []
    for phase in (phase for phase in ("forward", "step") if f"{phase}_us" in row):
        bar = f" <= {row[f'{phase}_bar']:.2f} {row[f'{phase}_verdict']}" if f"{phase}_bar" in row else ""
        cells.append(
            f"{phase} {row[f'{phase}_us']:.1f}{noise(row, phase)} us, "
            f"MLP {row[f'{phase}_mlp_us']:.1f}{noise(row, f'{phase}_mlp')} us, "
            f"ratio {row[f'{phase}_ratio']:.2f}{bar}"
        )
    report(f"KAN({row['kan']}) on {row['batch']} samples against MLP {row['mlp']}: " + " | ".join(cells))


def run(options: Options) -> list[Row]:
    rows = []
    options.report(NOISE)
    for at, (kan_widths, mlp_widths, batch) in enumerate(CASES, 1):
        options.progress(f"{count(at, len(CASES))}latency {kan_widths} batch {batch}")
        rows.append(measure(kan_widths, mlp_widths, batch, options))
        print_row(rows[-1], options.report)
        options.emit(rows[-1:])
    return rows + host.run(options)
