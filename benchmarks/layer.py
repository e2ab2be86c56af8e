"""The main table: one layer, every contestant, every phase, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import cases, ceilings, gate, memory, steps, timing, timing_cuda
from benchmarks.cases import BARS, DTYPES, Shape
from benchmarks.contestants import Contestant, add_peer_paths, build, contestants
from benchmarks.options import Options, count
from benchmarks.rows import short
from benchmarks.timing import Call, Timing

Row = dict[str, Any]
PHASES = ("forward", "step", "optimiser", "second_derivative")
MEMORY = ("forward", "step")  # phases whose peak is measured
# On a GPU the wide shapes are what its tensor cores are for.
CUDA_SHAPES = [
    Shape(4096, 256, 256, 5),
    Shape(16384, 1024, 1024, 5),
    Shape(4096, 784, 64, 5),
    Shape(4096, 1024, 1024, 20),
    Shape(64, 64, 64, 5),
    Shape(65536, 2, 5, 5),
    Shape(1000000, 2, 5, 5),
    Shape(1048576, 5, 1, 5),
]


def make_layer(shape: Shape, device: str, dtype: torch.dtype) -> kan_fast.KANLayer:
    """Our layer on the reference backend, same numbers for every contestant."""
    torch.manual_seed(0)
    layer = kan_fast.KANLayer(
        shape.in_features, shape.out_features, shape.grid_size, shape.spline_order, backend="reference"
    )
    return layer.to(device=device, dtype=dtype)


def make_inputs(contestant: Contestant, shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (batch, in; or as wide as the equal-parameter linear layer's) and a cotangent (batch, out)."""
    width = shape.linear_features if contestant.wide else shape.in_features
    x = cases.uniform_input(shape.batch, width, device=device, dtype=dtype)
    return x, cases.uniform_input(shape.batch, shape.out_features, device=device, dtype=dtype, seed=1)


def make_call(phase: str, module: nn.Module, x: Tensor, cotangent: Tensor) -> Call:
    if phase == "forward":
        return steps.forward(module, x)
    if phase == "step":
        return steps.step(module, x, cotangent)
    if phase == "optimiser":
        return steps.optimiser_step(module, x, cotangent)
    return steps.second_derivative_step(module, x)


def judge(contestant: Contestant, module: nn.Module, ours: kan_fast.KANLayer, x: Tensor, cotangent: Tensor) -> Row:
    """Error to float64 of one that computes our function. Ours: outputs and gradients, and "failed" when wrong."""
    if contestant.ours:
        assert isinstance(module, kan_fast.KANLayer)
        verdict = gate.judge(module, x, cotangent)
        row: Row = {"error": verdict.error, "reference_error": verdict.reference_error}
        if not verdict.right:
            row["failed"] = f"wrong: error {verdict.error:.1e} to float64, allowed {verdict.allowed:.1e}"
        return row
    rows = x[: gate.ROWS]
    with torch.no_grad():
        truth = gate.with_backend(ours, "reference", torch.float64)(rows.double())
        return {"error": gate.relative_error(module(rows), truth)}


class Case:
    """One shape, dtype and device: the contestants that could be built, and the rows of those that could not.

    about: columns of every row besides.
    """

    def __init__(
        self, shape: Shape, device: str, dtype_name: str, lines: list[Contestant], about: Row | None = None
    ) -> None:
        self.shape, self.device, self.dtype_name = shape, device, dtype_name
        self.dtype = DTYPES[dtype_name]
        self.ours = make_layer(shape, device, self.dtype)
        self.lines = {line.name: line for line in lines}
        self.modules: dict[str, nn.Module] = {}
        self.inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows: dict[str, Row] = {}
        for contestant in lines:
            self._admit(contestant)
            self.rows[contestant.name] |= about or {}
        self._about = {name: dict(row) for name, row in self.rows.items()}
        self._told: dict[str, set[str]] = {name: set() for name in self.rows}

    def _admit(self, contestant: Contestant) -> None:
        row: Row = {
            "what": "layer",
            "shape": self.shape.key(),
            "dtype": self.dtype_name,
            "contestant": contestant.name,
            "ours": contestant.ours,
            "same_function": contestant.exact,
            "note": contestant.note,
            **contestant.versions(),
        }
        self.rows[contestant.name] = row
        if contestant.absent is not None:
            row["absent"] = contestant.absent
            return
        try:
            module = build(contestant, self.shape, self.ours)
            x, cotangent = make_inputs(contestant, self.shape, self.device, self.dtype)
            row["parameters"] = sum(p.numel() for p in steps.parameters_of(module))
            if contestant.exact:
                row |= judge(contestant, module, self.ours, x, cotangent)
        except Exception as error:  # a rival's failure is a result, and it is listed
            row["failed"] = short(error)
        if "failed" not in row:
            self.modules[contestant.name] = module
            self.inputs[contestant.name] = (x, cotangent)

    def fresh(self) -> list[Row]:
        """What was found since the last time that this was asked, in rows of its own; none of contestants with nothing new."""
        found = []
        for name, row in self.rows.items():
            told = self._told[name]
            new = {key: value for key, value in row.items() if key not in told}
            if new:
                found.append({**self._about[name], **new})
                told.update(row)
        return found

    def measure(self, phase: str, seconds: float) -> None:
        """Time one phase of all contestants, interleaved; one that raises gets its error in its row."""
        if phase == "optimiser":
            with steps.unchanged(self.modules.values()):  # the next phase is of the same function
                self._measure(phase, seconds)
        else:
            self._measure(phase, seconds)

    def _measure(self, phase: str, seconds: float) -> None:
        calls: dict[str, Call] = {}
        for name, module in self.modules.items():
            if phase == "second_derivative" and name.startswith("linear"):
                continue  # its second derivative is zero: no work to compare with
            try:
                call = make_call(phase, module, *self.inputs[name])
                call()
                if phase == "second_derivative" and not self._second_derivative_is_right(name, module):
                    continue
            except Exception as error:
                self.rows[name][f"{phase}_failed"] = short(error)
                continue
            calls[name] = call
        if not calls:
            return
        if self.device == "cuda":
            timings = timing_cuda.time_interleaved(calls, budget=seconds)
            if phase in ("forward", "step"):  # Adam would need its capturable form
                self._graphs(phase, calls, timings, seconds)
        else:
            timings = timing.time_interleaved(calls, budget=seconds, min_rounds=5)
        flops, moved = ceilings.work(self.shape, phase, self.dtype.itemsize)
        rival = min(
            (name for name in timings if self.rows[name]["same_function"] and not self.rows[name]["ours"]),
            key=lambda name: timings[name].median, default=None,
        )  # fmt: skip
        for name, found in timings.items():
            row = self.rows[name]
            row[f"{phase}_fastest_rival"] = rival
            if rival is not None:
                row[f"{phase}_ratio_to_fastest_rival"] = found.ratio_to(timings[rival])
            row[f"{phase}_ms"] = found.median * 1e3
            row |= found.columns(phase)
            if "linear equal" in timings:
                row[f"{phase}_ratio"] = found.ratio_to(timings["linear equal"])
            if phase in ("forward", "step"):
                row[f"{phase}_tflops"] = flops / found.median / 1e12
                row[f"{phase}_gbps"] = moved / found.median / 1e9

    def _second_derivative_is_right(self, name: str, module: nn.Module) -> bool:
        """Judge it; a wrong one is listed as such, and gets no time."""
        ours = self.ours if self.lines[name].exact else None
        error, wrong = gate.judge_second_derivative(module, ours, self.inputs[name][0])
        self.rows[name]["second_derivative_error"] = error
        if wrong is not None:
            self.rows[name]["second_derivative_failed"] = wrong
        return wrong is None

    def _graphs(self, phase: str, calls: dict[str, Call], timings: dict[str, Timing], seconds: float) -> None:
        """Graph replay of the calls that are short enough for launches to matter."""
        graphs: dict[str, Call] = {}
        for name, call in calls.items():
            if timings[name].median > timing_cuda.GRAPH_BELOW:
                continue
            try:
                graphs[name] = timing_cuda.graph(call)
            except Exception as error:
                self.rows[name][f"{phase}_graph_failed"] = short(error)
                torch.cuda.synchronize()
        if graphs:
            for name, found in timing_cuda.time_interleaved(graphs, budget=seconds / 2).items():
                self.rows[name][f"{phase}_graph_ms"] = found.median * 1e3

    def measure_memory(self, threads: int) -> None:
        """Peak extra memory of forward and step; on the CPU a process for each."""
        for name, module in self.modules.items():
            for phase in MEMORY:
                try:
                    if self.device == "cuda":
                        peak = memory.peak_extra_cuda(make_call(phase, module, *self.inputs[name]))
                    else:
                        arguments = (name, self.shape.key(), self.dtype_name, phase, tuple(_PEER_PATHS))
                        peak = memory.peak_extra_cpu(_memory_case, arguments, threads)
                except Exception as error:
                    self.rows[name][f"{phase}_memory_failed"] = short(error)
                    continue
                self.rows[name][f"{phase}_memory_mib"] = peak / 2**20


_PEER_PATHS: list[Any] = []


def _memory_case(
    name: str, key: str, dtype_name: str, phase: str, peer_paths: tuple[Any, ...]
) -> tuple[Callable[[], object], Callable[[], object]]:
    add_peer_paths(list(peer_paths))
    shape, dtype = Shape.parse(key), DTYPES[dtype_name]
    peers = [] if name.startswith("kan_fast") or name == "linear equal" else [name]
    contestant = next(line for line in contestants("auto", peers, "cpu", dtype) if line.name == name)
    module = build(contestant, shape, make_layer(shape, "cpu", dtype))
    x, cotangent = make_inputs(contestant, shape, "cpu", dtype)
    # A part of the rows warms up without leaving buffers of the full size; what compiles would compile again for all of them.
    small = shape.batch if "compile" in contestant.note else max(1, shape.batch // 8)
    return make_call(phase, module, x[:small], cotangent[:small]), make_call(phase, module, x, cotangent)


def memory_cell(row: Row, phase: str) -> str:
    """Peak extra memory of a phase in MiB."""
    if f"{phase}_memory_failed" in row:
        return "fails"
    return f"{row[f'{phase}_memory_mib']:.1f}" if f"{phase}_memory_mib" in row else "-"


def _cell(row: Row, phase: str) -> str:
    if f"{phase}_failed" in row:
        return "fails"
    if f"{phase}_ms" not in row:
        return "-"
    ratio = row.get(f"{phase}_ratio")
    return f"{row[f'{phase}_ms']:.3g}{timing.noise(row, phase)}" + (f" ({ratio:.2f})" if ratio is not None else "")


def print_case(rows: list[Row], phases: list[str], report: Callable[[str], None]) -> None:
    """Table of one shape: milliseconds (ratio to the equal-parameter linear layer), errors, memory, then remarks."""
    shape = Shape.parse(rows[0]["shape"])
    report(f"\n{shape}, {rows[0]['dtype']}: ms (ratio to linear equal). {timing.NOISE}")
    head = ["contestant", *phases, "error to float64", "memory fwd / step, MiB"]
    report(" | ".join(f"{text:>22}" for text in head))
    remarks = []
    for row in rows:
        if "absent" in row or "failed" in row:
            remarks.append(f"  {row['contestant']}: {'absent, ' + row['absent'] if 'absent' in row else row['failed']}")
            continue
        remarks += [f"  {row['contestant']}, {p}: {row[f'{p}_failed']}" for p in phases if f"{p}_failed" in row]
        error = f"{row['error']:.1e}" if "error" in row else "-" if "linear" in row["contestant"] else "another function"
        remarks += [f"  {row['contestant']}, memory of {p}: {row[key]}" for p in MEMORY if (key := f"{p}_memory_failed") in row]
        peak = [memory_cell(row, phase) for phase in MEMORY]
        cells = [row["contestant"], *(_cell(row, phase) for phase in phases), error, " / ".join(peak)]
        report(" | ".join(f"{text:>22}" for text in cells))
    for phase in phases:
        ours = [row for row in rows if row["ours"] and f"{phase}_ratio_to_fastest_rival" in row]
        if ours:
            best = min(ours, key=lambda row: row[f"{phase}_ms"])
            report(
                f"  {phase}: {best['contestant']} takes {best[f'{phase}_ratio_to_fastest_rival']:.2f} of the time of the "
                f"fastest other of the same function, {best[f'{phase}_fastest_rival']}"
            )
    for remark in remarks:
        report(remark)


def run(options: Options) -> list[Row]:
    """All shapes and dtypes; a new case is not begun after `options.minutes`."""
    add_peer_paths(options.peer_paths)
    _PEER_PATHS[:] = options.peer_paths
    shapes = options.shapes or (CUDA_SHAPES if options.device == "cuda" else list(BARS))
    phases = list(PHASES) if options.phases is None else options.phases
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    rows: list[Row] = []
    total = len(options.dtypes) * len(shapes)
    for index, dtype_name in enumerate(options.dtypes):
        limits = ceilings.measure(options.device, DTYPES[dtype_name], min(1.0, options.seconds)) if phases else None
        lines = contestants(options.backend, options.peers, options.device, DTYPES[dtype_name])
        about: Row = {}
        if limits is not None:
            options.report(f"{dtype_name}: matmul {limits.flops / 1e12:.3g} TFLOP/s, copy {limits.bandwidth / 1e9:.3g} GB/s")
            about = {"matmul_tflops": limits.flops / 1e12, "copy_gbps": limits.bandwidth / 1e9}
        for at, shape in enumerate(shapes, index * len(shapes) + 1):
            if time.monotonic() > end:
                options.report(f"out of time: {shape}, {dtype_name} not measured")
                continue
            torch.compiler.reset()  # each shape is compiled for itself, not for shapes in general
            title = f"{count(at, total)}{shape} {dtype_name}: "
            options.progress(f"{title}building and checking")
            case = Case(shape, options.device, dtype_name, lines, about)
            rows += _measured(case, phases, options, title)
    return rows


def _measured(case: Case, phases: list[str], options: Options, title: str) -> list[Row]:
    """All rows of a case: written phase by phase, printed at the end, or when the run is interrupted."""
    found, done = list(case.rows.values()), []
    try:
        for phase in phases:
            options.progress(f"{title}{phase}")
            case.measure(phase, options.seconds)
            options.emit(case.fresh())
            done.append(phase)
        if options.memory:
            options.progress(f"{title}memory")
            case.measure_memory(torch.get_num_threads())
    except KeyboardInterrupt:
        if done:
            print_case(found, done, options.report)
        raise
    print_case(found, phases, options.report)
    options.emit(case.fresh())
    return found
