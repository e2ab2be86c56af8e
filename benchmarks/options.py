"""What a run of the benchmarks was asked for."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.cases import Shape
from benchmarks.rows import Row
from kan_fast.backends import choose


def to_stdout(line: str) -> None:
    print(line, flush=True)


@dataclass
class Options:
    """Parsed arguments, common to all `--what`."""

    device: str = "cpu"
    backend: str = "auto"
    shapes: list[Shape] | None = None
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    peers: list[str] | None = None  # None: all that can be imported
    peer_paths: list[Path] = field(default_factory=list)
    axes: list[str] | None = None  # sweep
    tasks: list[str] | None = None  # training
    times: Path | None = None  # training
    seconds: float = 2.0
    minutes: float | None = None
    phases: list[str] | None = None  # layer: forward, step, optimiser, second_derivative
    extras: bool = False
    memory: bool = False
    report: Callable[[str], None] = to_stdout
    progress: Callable[[str], None] = lambda text: None
    emit: Callable[[list[Row]], None] = lambda rows: None  # called as soon as a phase is done, so that no row is lost

    def one_backend(self) -> str:
        """The backend that `backend` stands for on the device, by name: what rows record."""
        return choose(self.backend, torch.device(self.device), torch.float32)

    @contextlib.contextmanager
    def kept(self, row: Row, show: Callable[[Row], None]) -> Iterator[None]:
        """Where the run is interrupted within this block, the phases that `row` has by then are shown and emitted."""
        try:
            yield
        except KeyboardInterrupt:
            if any(key.endswith(("_ms", "_us")) for key in row):
                show(row)
                self.emit([row])
            raise


def count(at: int, total: int) -> str:
    """What the progress line begins with: "3 of 7, "; nothing where there is one case alone."""
    return f"{at} of {total}, " if total > 1 else ""


class Progress:
    """One line on stderr that is overwritten; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.shown:
            # The last column stays free: a character in it would begin a new line, which nothing overwrites.
            sys.stderr.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()

    def report(self, line: str) -> None:
        self("")
        to_stdout(line)
