"""Timing on a CUDA device: events, an L2 flush before every call, CUDA graphs for calls that are bound by launches."""

from __future__ import annotations

import gc
import random

import torch

from benchmarks.timing import TRIALS_S, Call, Timing, quieter

FLUSH_BYTES = 256 * 2**20  # larger than any L2 so far (50 MB on H100, 126 MB on B200)
GRAPH_BELOW = 200e-6  # seconds; a call shorter than this is mostly launch cost, so its graph is timed as well


class Flush:
    """Overwrites a buffer larger than the L2 cache, so that a call finds its operands in DRAM, as in a network."""

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self) -> None:
        self.buffer.zero_()


def one(call: Call, flush: Flush | None) -> float:
    """Seconds of one call between two events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def time_interleaved(
    calls: dict[str, Call],
    *,
    budget: float = 1.0,
    min_rounds: int = 10,
    max_rounds: int = 100,
    warm_up: int = 5,
    flush: bool = True,
    seed: int = 0,
) -> dict[str, Timing]:
    """As `timing.time_interleaved`, one call a turn, by events. What the host needs to launch counts where it is
    longer than the flush; graphs (`graph`) take it out.
    """
    cache = Flush() if flush else None
    turn = 0.0
    for call in calls.values():
        for _ in range(warm_up):
            call()
        torch.cuda.synchronize()
        trials = [one(call, cache)]
        while len(trials) < 3 and sum(trials) < TRIALS_S:
            trials.append(one(call, cache))
        turn += min(trials) + FLUSH_BYTES / 1e12  # a stall of the machine lengthens one of them
    rounds = max(min_rounds, min(max_rounds, int(budget / turn)))
    order = list(calls)
    shuffle = random.Random(seed)

    def measure() -> dict[str, Timing]:
        timings = {name: Timing() for name in calls}
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                timings[name].rounds.append(one(calls[name], cache))
        return timings

    timings = measure()
    if rounds == min_rounds and any(found.disturbed for found in timings.values()):
        timings = quieter(timings, measure())
    return timings


def graph(call: Call) -> Call:
    """The call as a CUDA graph: replaying it costs one launch. Raises what capture raises."""
    gc.collect()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay
