"""Timing contestants against one another: rounds in which each runs once, in shuffled order, and medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Call = Callable[[], object]
WARM_BELOW = 0.02  # seconds; a longer call fills the caches itself


@dataclass
class Timing:
    """Seconds per call of one contestant, one entry a round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median: how noisy this contestant's rounds were."""
        if len(self.rounds) < 4:
            return (max(self.rounds) - min(self.rounds)) / self.median
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / self.median

    def ratio_to(self, other: Timing) -> float:
        """Median over rounds of own time over the other's in the same round.

        Pairing removes what changes slowly (clock, neighbours); the median removes single disturbed rounds.
        """
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def time_interleaved(
    calls: dict[str, Call],
    *,
    budget: float = 2.0,
    min_rounds: int = 7,
    max_rounds: int = 200,
    burst: float = 1e-3,
    warm_up: int = 2,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time every call, interleaved.

    budget: seconds for all of it (exceeded only to reach `min_rounds`). burst: a contestant repeats until its turn
    lasts about this many seconds, so that the clock's resolution and the switch between contestants do not count.
    """
    singles: dict[str, float] = {}
    repeats: dict[str, int] = {}
    turn = 0.0
    for name, call in calls.items():
        for _ in range(warm_up):
            call()
        start = time.perf_counter()
        call()
        single = max(time.perf_counter() - start, 1e-7)
        singles[name], repeats[name] = single, max(1, round(burst / single))
        turn += single * repeats[name]
    rounds = max(min_rounds, min(max_rounds, int(budget / turn)))
    timings = {name: Timing() for name in calls}
    order = list(calls)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            call, count = calls[name], repeats[name]
            if singles[name] < WARM_BELOW:
                call()  # brings this contestant's tensors back into the caches that the others emptied
            start = time.perf_counter()
            for _ in range(count):
                call()
            timings[name].rounds.append((time.perf_counter() - start) / count)
    return timings
