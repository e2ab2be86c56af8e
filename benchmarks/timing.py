"""Timing contestants against one another: rounds in which each runs once, in shuffled order, and medians."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Call = Callable[[], object]
WARM_BELOW = 0.02  # seconds; a longer call fills the caches itself
TRIALS = 5  # calls that a contestant's time is estimated by, before the rounds
TRIALS_S = 0.05  # seconds; a contestant whose trials take longer has no more of them than two, warm-up calls included
# A ratio of medians is asked whether it is within a tenth of another (cases.BAR_BFLOAT16): a median that is itself uncertain by
# more than a tenth cannot say.
DISTURBED = 0.1


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

    @property
    def uncertainty(self) -> float:
        """Standard error of the median over the median: 1.25 sigma / sqrt(n), where the quartiles are 1.35 sigma apart."""
        return 1.2533 / 1.349 * self.spread / math.sqrt(len(self.rounds))

    @property
    def disturbed(self) -> bool:
        """Are the rounds too few for how far they lie apart?"""
        return self.uncertainty > DISTURBED

    def columns(self, prefix: str) -> dict[str, object]:
        """What a row says of the rounds: PREFIX_spread, PREFIX_rounds, and PREFIX_disturbed where they are."""
        said: dict[str, object] = {f"{prefix}_spread": self.spread, f"{prefix}_rounds": len(self.rounds)}
        return {**said, f"{prefix}_disturbed": True} if self.disturbed else said

    def ratio_to(self, other: Timing) -> float:
        """Median over rounds of own time over the other's in the same round.

        Pairing removes what changes slowly (clock, neighbours); the median removes single disturbed rounds.
        """
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def noise(row: dict[str, object], prefix: str) -> str:
    """What a table prints beside a time: half the distance between its quartiles in per cent, "*" where it is disturbed."""
    spread = row.get(f"{prefix}_spread")
    if not isinstance(spread, float):
        return ""
    return f" ±{spread / 2:.0%}" + ("*" if row.get(f"{prefix}_disturbed") else "")


NOISE = "±: half the distance between the quartiles of its rounds; *: disturbed, its median is uncertain by more than a tenth"


def estimate(call: Call, warm_up: int) -> float:
    """Seconds of one call: the least of a few, warm-up calls among them. A stall of the machine lengthens one of them; none is
    shorter than the call.
    """
    least, spent = math.inf, 0.0
    for count in range(1, warm_up + TRIALS + 1):
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        least = min(least, took)
        if count > warm_up:
            spent += took
            if spent > TRIALS_S and count > 1:
                break
    return max(least, 1e-7)


def quieter(one: dict[str, Timing], other: dict[str, Timing]) -> dict[str, Timing]:
    """Of two measurements of the same contestants that in which the worst median is the less uncertain."""
    return min(one, other, key=lambda timings: max(found.uncertainty for found in timings.values()))


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

    budget: seconds for all of it (exceeded only to reach `min_rounds`; if a contestant is disturbed in so few rounds, all of
    them are measured once more, and the quieter measurement counts). burst: a contestant repeats until its turn lasts about
    this many seconds, so that the clock's resolution and the switch between contestants do not count.
    """
    singles = {name: estimate(call, warm_up) for name, call in calls.items()}
    repeats = {name: max(1, round(burst / single)) for name, single in singles.items()}
    turn = sum(singles[name] * repeats[name] for name in calls)
    rounds = max(min_rounds, min(max_rounds, int(budget / turn)))
    order = list(calls)
    shuffle = random.Random(seed)

    def measure() -> dict[str, Timing]:
        timings = {name: Timing() for name in calls}
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

    timings = measure()
    if rounds == min_rounds and any(found.disturbed for found in timings.values()):
        timings = quieter(timings, measure())
    return timings
