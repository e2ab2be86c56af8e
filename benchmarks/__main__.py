"""Side by side: kan_fast's backends, linear layers, plain PyTorch KANs and whichever rivals can be imported."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import environment, rows, sweep
from benchmarks.cases import DTYPES, Shape
from benchmarks.contestants import peer_names
from benchmarks.options import Options, Progress
from kan_fast import backends

# --what NAME runs `run(options) -> rows` of the module.
TOPICS = {
    "layer": ("benchmarks.layer", "one layer: forward, step, optimiser step, second-derivative step, memory"),
    "sweep": ("benchmarks.sweep", "times along batch, width, grid size and order (--axes)"),
    "network": ("benchmarks.network", "KANs against MLPs, and the published KAN-benchmarking protocol"),
    "training": ("benchmarks.training", "accuracy at equal parameters and equal training time (--tasks)"),
    "latency": ("benchmarks.latency", "small calls against an MLP, and what the host needs to plan a launch"),
    "contractions": ("benchmarks.contractions", "the three contractions of a layer alone, on a GPU as CUDA graphs"),
    "kernels": ("benchmarks.kernels", "the Triton kernels compiled offline, not run: registers, spills, shared memory"),
    "bars": ("benchmarks.bars", "the CPU speed bars against nn.Linear of equal parameter count"),
}
# Options of some topics only: given to another, they would be ignored.
TAKES = {
    "backend": {"layer", "sweep", "network", "training", "latency", "contractions", "bars"},
    "shapes": {"layer", "sweep", "contractions", "bars"},
    "dtype": {"layer", "sweep", "contractions"},
    "peers": {"layer", "sweep", "network"},
    "minutes": {"layer"},
    "phases": {"layer", "sweep"},
    "memory": {"layer", "sweep", "bars"},
    "axes": {"sweep"},
    "tasks": {"training"},
    "times": {"training"},
    "extras": {"bars"},
}
MOST_THREADS = 8 * (os.cpu_count() or 1)  # more only wait for one another, and of very many the system refuses some


def number(least: float, kind: type[float] = float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers of at least so much and at most so much; with `above`, of more than the least."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (above and value == least) or math.isinf(value):
            name = "an integer" if kind is int else "a finite number"
            span = f"above {least}" if above else f"from {least} on" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {name} {span}, got {text!r}")
        return value

    return parse


def writable(name: str, path: Path) -> None:
    """Raise ValueError if nothing could be written to this file at the end; what is made to find out is taken away again."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ValueError(f"--{name}: cannot write to {path}: {error.strerror or error}") from error


def folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    topics = "; ".join(f"{name}: {text}" for name, (_, text) in TOPICS.items())
    made.add_argument("--what", choices=list(TOPICS), default="layer", help=topics)
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--backend", choices=["auto", *backends.NAMES], default="auto",
                      help="backend of kan_fast; layer: all that are available")
    made.add_argument("--shapes", nargs="+", metavar="B,I,O[,G[,K]]", help="shapes instead of the topic's own")
    made.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    peers = peer_names()
    made.add_argument("--peers", nargs="*", choices=peers, metavar="NAME",
                      help=f"contestants besides kan_fast and linear equal (none: --peers alone); default: {', '.join(peers)}")
    made.add_argument("--peer-path", action="append", type=folder, default=[], metavar="DIR",
                      help="a checkout of a rival that is not on PyPI; may be repeated")
    made.add_argument("--seconds", type=number(0), default=2.0, help="budget of each measurement (default 2)")
    made.add_argument("--minutes", type=number(0, above=True), help="stop beginning new cases after this long")
    made.add_argument("--threads", type=number(1, int, MOST_THREADS),
                      help="PyTorch threads (default: 2 on the CPU, as the bars are set)")
    made.add_argument("--allocator", choices=["keep", "default"], default="keep",
                      help="keep: freed memory is not given back to the system, so no page faults in a steady state")
    made.add_argument("--extras", action="store_true", help="bars: bfloat16, non-uniform grids, no grad of x")
    made.add_argument("--phases", nargs="*", choices=["forward", "step", "optimiser", "second_derivative"],
                      help="layer: only these (none: no times)")
    made.add_argument("--axes", nargs="+", choices=["batch", "width", "grid_size", "spline_order"], help="sweep: these")
    made.add_argument("--tasks", nargs="+", choices=["digits", "function", "poisson"], help="training: these")
    made.add_argument("--times", type=Path, metavar="FILE",
                      help="training: keep times per step here; with --seconds 0 nothing else is done, and the training "
                      "itself can then run on a busy machine")
    made.add_argument("--memory", action="store_true", help="also peak memory (a process for each measurement)")
    made.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    return made


def check(made: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program where options do not go together or ask for what is not there; set the device that "auto" stands for."""
    for name, topics in TAKES.items():
        if given.what not in topics and getattr(given, name) != made.get_default(name):
            made.error(f"--{name}: expected with --what {' or '.join(sorted(topics))} alone, got --what {given.what}")
    if given.device == "cuda" and given.what == "bars":
        made.error("--device cuda: expected cpu with --what bars, which are those of a CPU")
    if given.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: expected a CUDA device, torch.cuda.is_available() is False")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() and given.what != "bars" else "cpu"
    if given.backend != "auto":
        for dtype in given.dtype:
            reason = backends.reason_not(given.backend, torch.device(given.device), DTYPES[dtype])
            if reason is not None:
                made.error(f"--backend {given.backend}: it cannot serve {dtype} on {given.device}: {reason}")
    try:
        if given.out is not None:
            writable("out", given.out)
        if given.times is not None:
            writable("times", given.times)
            if given.times.exists():
                json.loads(given.times.read_text())
    except json.JSONDecodeError as error:
        made.error(f"--times: expected a file of JSON, got {given.times}: {error}")
    except ValueError as error:
        made.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    given = made.parse_args(arguments)
    check(made, given)
    device = given.device
    try:
        shapes = [Shape.parse(text) for text in given.shapes] if given.shapes else None
        if given.what == "sweep":
            sweep.check(shapes, given.axes, device)
    except ValueError as error:
        made.error(f"--shapes: {error}")
    allocator = environment.set_allocator(given.allocator)
    threads = given.threads or (min(2, environment.cores()) if device == "cpu" else torch.get_num_threads())
    torch.set_num_threads(threads)
    progress = Progress()
    circumstances = environment.describe(device, allocator)
    progress.report(
        f"{circumstances['device_name']}, {threads} threads, torch {torch.__version__}, "
        f"allocator {allocator}, commit {circumstances['commit']}"
    )

    def emit(done: list[rows.Row]) -> None:
        if given.out is not None:
            rows.write(given.out, done, circumstances)

    options = Options(
        device=device,
        backend=given.backend,
        shapes=shapes,
        dtypes=given.dtype,
        peers=given.peers,
        peer_paths=given.peer_path,
        seconds=given.seconds,
        minutes=given.minutes,
        phases=given.phases,
        axes=given.axes,
        tasks=given.tasks,
        times=given.times,
        extras=given.extras,
        memory=given.memory,
        report=progress.report,
        progress=progress,
        emit=emit,
    )
    try:
        found = importlib.import_module(TOPICS[given.what][0]).run(options)
    except KeyboardInterrupt:
        progress("")
        kept = f"; the rows of what was finished are in {given.out}" if given.out is not None else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130  # as a shell says it of a program that SIGINT ended
    progress("")
    return 1 if any("failed" in row and row.get("ours", True) for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
