"""Whole networks: the published KAN-benchmarking protocol, and small KANs against MLPs of equal parameter count."""

from __future__ import annotations

import functools
import itertools
import random
import time
from typing import Any

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import cases, gate, layer, steps, timing, timing_cuda
from benchmarks.cases import DTYPES, Shape
from benchmarks.contestants import Contestant, add_peer_paths, build, contestants
from benchmarks.latency import mlp
from benchmarks.options import Options, count
from benchmarks.rows import short
from benchmarks.timing import Timing

Row = dict[str, Any]
PROTOCOL_WIDTHS, PROTOCOL_BATCH = (1000, 1000, 1), 100
PROTOCOL_ROUNDS = 10  # at least
PROTOCOL_SOURCE = "KAN-benchmarking (Jerry-Master/KAN-benchmarking), README table, RTX A5000"
# The table published with that protocol, milliseconds forward / backward: other hardware, to be set beside, not compared.
PROTOCOL_PUBLISHED = {
    "efficient-kan": (4.76, 4.54),
    "fast-kan": (1.44, 2.13),
    "linear": (0.49, 1.07),
}
PHASES = ("forward", "step", "optimiser")
NETWORKS = [([64, 32, 10], 64), ([784, 64, 10], 256), ([8, 64, 64, 1], 1024)]


class Chain(nn.Module):
    """A contestant's layers one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x)
        return x


def chain(contestant: Contestant, widths: tuple[int, ...], batch: int, device: str, dtype: torch.dtype) -> nn.Module:
    """The contestant's network of these widths; "linear" stands for an MLP with a hidden layer ten times as wide."""
    if contestant.name == "linear":
        hidden = [10 * width for width in widths[1:-1]]
        dense = mlp([widths[0], *hidden, widths[-1]])
        return nn.Sequential(*(nn.ReLU() if isinstance(part, nn.SiLU) else part for part in dense)).to(device, dtype)
    layers = []
    for into, out in itertools.pairwise(widths):
        shape = Shape(batch, into, out)
        layers.append(build(contestant, shape, layer.make_layer(shape, device, dtype)))
    return Chain(layers)


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def protocol(options: Options, dtype_name: str = "float32") -> list[Row]:
    """[1000, 1000, 1], batch 100, mean squared error to exp(sin(pi x0) + x1^2); forward with gradients enabled and
    backward timed apart; gradients accumulate, x has none. Medians of interleaved rounds, where the publication has
    the mean of ten calls.
    """
    device, dtype = options.device, DTYPES[dtype_name]
    x = cases.uniform_input(PROTOCOL_BATCH, PROTOCOL_WIDTHS[0], device=device, dtype=dtype)
    target = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:2].square())
    cotangent = cases.uniform_input(PROTOCOL_BATCH, PROTOCOL_WIDTHS[-1], device=device, dtype=dtype, seed=1)
    rows: dict[str, Row] = {}
    models: dict[str, nn.Module] = {}
    for contestant in contestants(options.backend, options.peers, device, dtype):
        if contestant.wide:
            continue
        row: Row = {
            "what": "protocol", "contestant": contestant.name, "ours": contestant.ours, "dtype": dtype_name,
            "widths": list(PROTOCOL_WIDTHS), "batch": PROTOCOL_BATCH, "note": contestant.note,
            "same_function": contestant.exact, **contestant.versions(),
        }
        if contestant.name == "linear":
            row["note"] = "MLP [1000, 10000, 1]: equal parameters"
        rows[contestant.name] = row
        if contestant.absent is not None:
            row["absent"] = contestant.absent
            continue
        try:
            models[contestant.name] = chain(contestant, PROTOCOL_WIDTHS, PROTOCOL_BATCH, device, dtype)
            row["parameters"] = sum(p.numel() for p in steps.parameters_of(models[contestant.name]))
            wrong = gate.judge_network(models[contestant.name], x, cotangent)
            if wrong is not None:
                raise ArithmeticError(wrong)
            for _ in range(2):
                nn.functional.mse_loss(models[contestant.name](x), target).backward()
        except Exception as error:
            row["failed"] = short(error)
            models.pop(contestant.name, None)
    forward, backward = _protocol_rounds(models, x, target, options)
    for name in models:
        rows[name] |= {
            "forward_ms": forward[name].median * 1e3,
            "backward_ms": backward[name].median * 1e3,
            **forward[name].columns("forward"),
            **backward[name].columns("backward"),
        }
    title = f"KAN-benchmarking protocol, {list(PROTOCOL_WIDTHS)}, batch {PROTOCOL_BATCH}, {dtype_name}"
    options.report(f"\n{title}: ms. {timing.NOISE}")
    for name, row in rows.items():
        if "forward_ms" in row:
            published = PROTOCOL_PUBLISHED.get(name)
            beside = f"   (published, another device: {published[0]} / {published[1]})" if published else ""
            cells = [f"{phase} {row[f'{phase}_ms']:8.3f}{timing.noise(row, phase):6}" for phase in ("forward", "backward")]
            options.report(f"{name:>22} {'  '.join(cells)}{beside}")
        else:
            options.report(f"{name:>22} {'absent, ' + row['absent'] if 'absent' in row else row['failed']}")
    options.emit(list(rows.values()))
    return list(rows.values())


def _protocol_rounds(
    models: dict[str, nn.Module], x: Tensor, target: Tensor, options: Options
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times of forward and backward of every model, interleaved; of disturbed rounds that were the fewest, a second try counts
    if it is quieter.
    """
    shuffle = random.Random(0)

    def measure() -> dict[str, dict[str, Timing]]:
        found = {phase: {name: Timing() for name in models} for phase in ("forward", "backward")}
        order = list(models)
        end, rounds = time.monotonic() + 2 * options.seconds, 0
        while rounds < PROTOCOL_ROUNDS or (time.monotonic() < end and rounds < 200):
            rounds += 1
            shuffle.shuffle(order)
            for name in order:
                start = _clock(options.device)
                y = models[name](x)
                middle = _clock(options.device)
                loss = nn.functional.mse_loss(y, target)
                before = _clock(options.device)
                loss.backward()
                after = _clock(options.device)
                found["forward"][name].rounds.append(middle - start)
                found["backward"][name].rounds.append(after - before)
        return found

    def every(found: dict[str, dict[str, Timing]]) -> list[Timing]:
        return [one for phase in found.values() for one in phase.values()]

    found = measure()
    if any(one.disturbed and len(one.rounds) == PROTOCOL_ROUNDS for one in every(found)):
        found = min(found, measure(), key=lambda tried: max(one.uncertainty for one in every(tried)))
    return found["forward"], found["backward"]


def equal_mlp(widths: list[int], parameters: int) -> list[int]:
    """Widths of an MLP as deep as the KAN, every hidden layer equally wide, nearest to that many parameters."""
    hidden = len(widths) - 2

    def count(width: int) -> int:
        chainlike = [widths[0], *[width] * hidden, widths[-1]]
        return sum((a + 1) * b for a, b in itertools.pairwise(chainlike))

    width = min(range(1, 4096), key=lambda candidate: abs(count(candidate) - parameters))
    return [widths[0], *[width] * hidden, widths[-1]]


def small_networks(options: Options) -> list[Row]:
    """Forward, step and optimiser step of KANs against MLPs of equal depth and parameter count."""
    device = options.device
    rows: list[Row] = []
    for at, (widths, batch) in enumerate(NETWORKS, 1):
        options.progress(f"{count(at, len(NETWORKS))}networks {widths} batch {batch}")
        torch.manual_seed(0)
        kan = kan_fast.KAN(widths, backend=options.one_backend()).to(device)
        parameters = sum(p.numel() for p in kan.parameters())
        dense_widths = equal_mlp(widths, parameters)
        models = {"kan": kan, "mlp": mlp(dense_widths).to(device)}
        x = cases.uniform_input(batch, widths[0], device=device)
        cotangent = cases.uniform_input(batch, widths[-1], device=device, seed=1)
        row: Row = {
            "what": "network", "kan": widths, "mlp": dense_widths, "batch": batch, "parameters": parameters,
            "backend": options.one_backend(), "dtype": "float32",
        }
        wrong = gate.judge_network(kan, x, cotangent)
        if wrong is not None:
            rows.append({**row, "failed": wrong})
            options.emit(rows[-1:])
            options.report(f"KAN({widths}), batch {batch}: {wrong}")
            continue
        with options.kept(row, functools.partial(print_network, options)):
            for phase in PHASES:
                calls = {name: layer.make_call(phase, model, x, cotangent) for name, model in models.items()}
                if device == "cuda":
                    timings = timing_cuda.time_interleaved(calls, budget=options.seconds)
                else:
                    timings = timing.time_interleaved(calls, budget=options.seconds)
                row[f"{phase}_ms"] = timings["kan"].median * 1e3
                row[f"{phase}_mlp_ms"] = timings["mlp"].median * 1e3
                row[f"{phase}_ratio"] = timings["kan"].ratio_to(timings["mlp"])
                row |= timings["kan"].columns(phase) | timings["mlp"].columns(f"{phase}_mlp")
        rows.append(row)
        options.emit([row])
        print_network(options, row)
    return rows


def print_network(options: Options, row: Row) -> None:
    phases = [phase for phase in PHASES if f"{phase}_ms" in row]
    cells = ", ".join(f"{p} {row[f'{p}_ms']:.3g}{timing.noise(row, p)} ms ({row[f'{p}_ratio']:.2f})" for p in phases)
    options.report(f"KAN({row['kan']}), batch {row['batch']}, against MLP {row['mlp']}: {cells}")


def run(options: Options) -> list[Row]:
    add_peer_paths(options.peer_paths)
    return small_networks(options) + protocol(options)
