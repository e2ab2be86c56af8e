"""Tiles chosen by measuring, kept on disk. Optional: unless it is asked for, tiles.py alone decides and nothing is written.

    KAN_FAST_TUNE=read   tuned tiles where the cache has them, those of tiles.py elsewhere
    KAN_FAST_TUNE=1      the same, and what the cache lacks is measured by the first call that needs it: 10 to 50 tiles a
                         kernel, compiled side by side on the host's cores (13 take two cores 3 to 6 s)
    KAN_FAST_CACHE=DIR   where the cache lies; default $XDG_CACHE_HOME/kan_fast or ~/.cache/kan_fast

A file holds one tile: for a device, a kernel, a dtype and a class of shapes (sizes rounded up to powers of two), and for
the versions of Triton and of these kernels. Candidates differ from the tile of tiles.py in one or more extents by factors of
two; each is compiled, held against the float64 reference, and only then timed. The kernels of narrow layers, which are bound
by memory, are not tuned.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from kan_fast.atomic import replacing
from kan_fast.backends import reference
from kan_fast.backends.triton import interpreted, tiles
from kan_fast.backends.triton.tiles import Tile
from kan_fast.spline import uniform_grid

if TYPE_CHECKING:
    from kan_fast.backends.triton.launch import Launch, Problem

MODES = {"": "off", "0": "off", "off": "off", "read": "read", "1": "tune", "tune": "tune"}
ROWS = 128  # of the batch that a candidate's results are checked on
ROUNDS = 4  # times that the best tile so far is varied
_known: dict[tuple[str, "Problem", torch.device], Tile] = {}
_mode: str | None = None
_uses = 0  # how often `use` was entered or left


def state() -> tuple[str, int]:
    """What tiles depend on besides the problem and the device: while it is the same, so are they."""
    return mode(), _uses


def mode() -> str:
    """One of "off", "read" and "tune": what KAN_FAST_TUNE says, unless `use` says otherwise. ValueError for another word."""
    return _asked() if _mode is None else _mode


@functools.cache
def _asked() -> str:
    found = os.environ.get("KAN_FAST_TUNE", "")
    if found.lower() not in MODES:
        raise ValueError(f"KAN_FAST_TUNE: expected one of {sorted(MODES)}, got {found!r}")
    return MODES[found.lower()]


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Within it, `mode` ("off", "read" or "tune") replaces what the environment says; what was known is asked for again."""
    global _mode, _uses
    if mode not in MODES.values():
        raise ValueError(f"mode: expected one of {sorted(set(MODES.values()))}, got {mode!r}")
    before, _mode = _mode, mode
    _known.clear()
    _uses += 1
    try:
        yield
    finally:
        _mode = before
        _known.clear()
        _uses += 1


def tile(kernel: str, problem: "Problem", device: torch.device) -> Tile:
    """The tile of a product kernel ("contract_output", "contract_input" or "contract_weight") for a problem on a device."""
    if mode() == "off" or device.type == "meta":
        return _default(kernel, problem)
    asked = kernel, problem, device
    if asked not in _known:
        path = cache_folder() / f"{_digest(key(kernel, problem, device))}.json"
        found = _read(path, key(kernel, problem, device))
        if found is None and mode() == "tune" and device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return _default(kernel, problem)  # nothing can be measured now; a later call may
            try:
                found = tune(kernel, problem, device)
            except torch.OutOfMemoryError as error:
                warnings.warn(f"{kernel}: no memory for the tensors of a trial, not tuned: {error}", stacklevel=2)
        _known[asked] = found or _default(kernel, problem)
    return _known[asked]


def tune(kernel: str, problem: "Problem", device: torch.device, clock: Callable[[list["Launch"]], float] | None = None) -> Tile:
    """Measure, keep on disk and return the fastest tile whose results are right; a warning where that of tiles.py is wrong.

    clock: launches -> seconds; default Triton's do_bench.
    """
    trial = Trial(kernel, problem, device)
    measure = clock or _do_bench
    best = default = _default(kernel, problem)
    allowed = 2 * trial.error(default) + _FLOOR[problem.products]
    if not allowed < 0.25:
        warnings.warn(f"{kernel}: results are off by {allowed / 2:.1e} on {_name(device)}; not tuned", stacklevel=2)
        return default
    times = {default: trial.time(default, measure)}
    for _ in range(ROUNDS):
        start = best
        candidates = [candidate for candidate in neighbours(kernel, start) if candidate not in times]
        trial.compile(candidates)
        for candidate in candidates:
            times[candidate] = float("inf")
            try:
                if trial.error(candidate) <= allowed:
                    times[candidate] = trial.time(candidate, measure)
            except Exception:  # what does not compile or fit: Triton has a different error for every limit
                continue
        best = min(times, key=lambda candidate: times[candidate])
        if best == start:
            break
    found = key(kernel, problem, device)
    _write(cache_folder() / f"{_digest(found)}.json", {
        "key": found, "tile": asdict(best), "seconds": times[best], "seconds_untuned": times[default],
        "tried": len(times), "right": sum(seconds < float("inf") for seconds in times.values()),
    })  # fmt: skip
    return best


# What the rounding of operands and of the result may add to the error, relative to the largest number of the result.
_FLOOR = {tiles.HALF: 2.0**-7, tiles.TWO: 2.0**-14, tiles.THREE: 2.0**-20, tiles.IEEE: 2.0**-20, tiles.DOUBLE: 2.0**-46}


class Trial:
    """Tensors of a problem on a device, uniform knots, inputs uniform in the range and a little beyond."""

    def __init__(self, kernel: str, problem: "Problem", device: torch.device) -> None:
        p = problem
        self.kernel, self.problem = kernel, p
        generator = torch.Generator(device).manual_seed(0)
        wide = torch.promote_types(p.weight_dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=wide).to(p.weight_dtype)

        self.x = torch.rand(p.batch, p.in_features, generator=generator, device=device, dtype=wide) * 2.2 - 1.1
        self.grid = uniform_grid(p.in_features, p.features - p.order, p.order, (-1.0, 1.0), device=device, dtype=wide)
        self.spline = normal(p.in_features, p.features, p.out_features)
        self.base = normal(p.in_features, p.out_features) if p.base else None
        self.g = normal(p.batch, p.out_features)

    def compile(self, candidates: list[Tile]) -> None:
        """All of them, on as many threads as there are cores. What fails is silent here, and fails again when it is run."""
        if interpreted():
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
            for candidate in candidates:
                for rows in (min(ROWS, self.problem.batch), None):
                    with suppress(Exception):  # of the many kinds that Triton's have, see tune
                        for step in self._plan(candidate, rows)[0]:
                            step.kernel.warmup(grid=step.programs, **step.arguments, **step.options)

    def time(self, tile: Tile, clock: Callable[[list["Launch"]], float]) -> float:
        """Seconds that the launches of the whole problem take in this tile."""
        launches = self._plan(tile, None)[0]
        if self.x.device.type != "cuda":
            return clock(launches)
        with torch.cuda.device(self.x.device):
            return clock(launches)

    def error(self, tile: Tile) -> float:
        """Error of the first rows' results to the float64 reference, relative to the largest of them."""
        from kan_fast.backends.triton.launch import run

        launches, results = self._plan(tile, min(ROWS, self.problem.batch))
        for result in results:
            result.fill_(torch.nan)  # a number that nobody writes must show
        run(launches, self.x.device)
        worst = 0.0
        for result, truth in zip(results, self._truth, strict=True):
            if truth.numel():
                error = float((result.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300))
                worst = max(worst, error if error == error else float("inf"))
        return worst

    def _plan(self, tile: Tile, rows: int | None) -> tuple[list["Launch"], tuple[Tensor, ...]]:
        from kan_fast.backends.triton import launch

        x, g = self.x[:rows], self.g[:rows]
        p = replace(self.problem, batch=len(x))
        if self.kernel == "contract_output":
            y = torch.empty_like(g)
            return launch.plan_contract_output(x, None, self.spline, self.base, self.grid, y, p, tile), (y,)
        if self.kernel == "contract_input":
            dx = torch.empty_like(x)
            return launch.plan_contract_input(x, self.spline, self.base, g, self.grid, dx, p, tile), (dx,)
        d_spline, d_base = torch.empty_like(self.spline), torch.empty_like(self.spline[:, 0]) if p.base else g[:0]
        launches = launch.plan_contract_weight(x, None, g, self.grid, d_spline, d_base, p, tile)
        return launches, (d_spline, d_base) if p.spline else (d_base,)

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, ...]:
        p = self.problem
        x, g, spline = (t.double() for t in (self.x[:ROWS], self.g[:ROWS], self.spline))
        base, grid = None if self.base is None else self.base.double(), self.grid.double()
        modes = p.activation, p.outside, p.n
        if self.kernel == "contract_output":
            return (reference.contract_output(x, None, spline, base, grid, *modes),)
        if self.kernel == "contract_input":
            return (reference.contract_input(x, spline, base, g, grid, *modes),)
        d_spline, d_base = reference.contract_weight(x, None, g, grid, p.order, *modes)
        return (d_spline, d_base) if p.spline else (d_base,)


def neighbours(kernel: str, tile: Tile) -> list[Tile]:
    """Tiles that differ in one extent by a factor of two, or in one stage; those that no GPU takes are left out."""
    made = []
    for name in ("rows", "columns", "inputs", "depth", "warps"):
        value = getattr(tile, name)
        made += [replace(tile, **{name: other}) for other in (value // 2, value * 2) if other]
    made += [replace(tile, stages=other) for other in (tile.stages - 1, tile.stages + 1)]
    return [candidate for candidate in made if _legal(kernel, candidate)]


def _legal(kernel: str, tile: Tile) -> bool:
    extents = [tile.inputs * tile.bases, tile.depth]
    extents += [tile.rows] if kernel != "contract_weight" else []
    extents += [tile.columns] if kernel != "contract_input" else []
    # 16 is what tl.dot asks; beyond 256 an operand alone fills the shared memory.
    return min(extents) >= 16 and max(extents) <= 256 and 1 <= tile.warps <= 16 and 1 <= tile.stages <= 5


def cache_folder() -> Path:
    """Where tuned tiles are kept; the folder need not exist."""
    asked = os.environ.get("KAN_FAST_CACHE")
    return Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kan_fast")


def key(kernel: str, problem: "Problem", device: torch.device) -> dict[str, Any]:
    """What a tuned tile holds for."""
    p = problem
    sizes = {name: tiles.power_of_two(getattr(p, name)) for name in ("batch", "in_features", "out_features")}
    return {
        "kernel": kernel, "device": _name(device), "arch": str(p.target.arch), "processors": p.target.processors,
        "weights": str(p.weight_dtype), "products": p.products, **sizes, "features": p.features, "order": p.order,
        "n": p.n, "base": p.base, "outside": p.outside, "triton": triton.__version__, "kernels": _sources(),
    }  # fmt: skip


def _default(kernel: str, p: "Problem") -> Tile:
    return tiles.wide_tile(kernel, p.products, p.batch, p.in_features, p.features, p.out_features, p.target, p.order)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _sources() -> str:
    """A digest of everything that decides what a tile means."""
    folder = Path(__file__).parent
    files = [*sorted((folder / "kernels").glob("*.py")), folder / "tiles.py", folder / "launch.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path, wanted: dict[str, Any]) -> Tile | None:
    """The tile of a file; None if there is none. A file that is damaged is named in a warning, and not used."""
    try:
        found = json.loads(path.read_text())
        tile = Tile(**found["tile"])
        if found["key"] == wanted and _legal(wanted["kernel"], tile):
            return tile
        reason = "it is for something else"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"the tuned tile in {path} is not used: {reason}", stacklevel=2)
    return None


def _write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: other processes may read or write the same file. A cache that cannot be written is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(found, indent=1))
    except OSError as error:
        warnings.warn(f"the tuned tile is kept for this process only: {error}", stacklevel=2)


def _do_bench(launches: list["Launch"]) -> float:
    from triton.testing import do_bench

    def call() -> None:
        for step in launches:
            step.run()

    return 1e-3 * float(do_bench(call, warmup=10, rep=40, return_mode="median"))
