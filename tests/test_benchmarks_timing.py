"""Times: how they are estimated before the rounds, what says that they were disturbed, and that no phase changes the next."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks import layer, steps, timing
from benchmarks.cases import Shape
from benchmarks.options import Options

SMALL = Shape(24, 6, 7, 5)


class Clock:
    """Stands for `time`: calls take as long as they say."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, *seconds: float, then: float):  # type: ignore[no-untyped-def]
        """A contestant that takes these times, and `then` ever after."""
        durations = itertools.chain(seconds, itertools.repeat(then))

        def call() -> None:
            self.now += next(durations)
            self.count = getattr(self, "count", 0) + 1

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


@pytest.mark.parametrize("stalled", range(8))
def test_a_stall_does_not_set_the_repeats(stalled: int, clock: Clock) -> None:
    """Whichever of the first calls it hits: a call of 20 us is repeated for a millisecond, in all the rounds of the budget."""
    quiet, hit = clock.call(then=20e-6), clock.call(*[20e-6] * stalled, 16e-3, then=20e-6)
    found = timing.time_interleaved({"quiet": quiet, "hit": hit}, budget=0.1)
    assert len(found["hit"].rounds) == len(found["quiet"].rounds) == 50
    assert found["hit"].median == pytest.approx(20e-6)
    assert clock.now < 0.1 * 1.3 + 16e-3


def test_slow_contestants_are_not_tried_for_long(clock: Clock) -> None:
    assert timing.estimate(clock.call(then=3.0), 2) == 3.0
    assert clock.now == 3 * 3.0  # two to warm up, one more
    assert timing.estimate(clock.call(7.0, then=1.0), 0) == 1.0  # there is a second call beside a stall of any length


def test_uncertainty_of_the_median_is_its_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 1 + 0.1 * torch.randn(4000, 51, generator=generator, dtype=torch.float64)
    medians = draws.median(dim=1).values
    said = [timing.Timing(row.tolist()).uncertainty for row in draws[:400]]
    # The mean of 400 estimates of a quartile distance from 51 draws is off by a per cent, the deviation of 4000 medians by one.
    assert sum(said) / len(said) == pytest.approx(float(medians.std()), rel=0.06)


def test_disturbed_rounds_are_marked() -> None:
    rough, smooth = timing.Timing([1.0, 1.1, 1.5, 2.0, 2.2]), timing.Timing([1.0, 1.01, 1.02, 1.03, 1.04])
    assert rough.disturbed and not smooth.disturbed
    assert rough.columns("step") == {"step_spread": rough.spread, "step_rounds": 5, "step_disturbed": True}
    assert timing.noise(rough.columns("step"), "step") == f" ±{rough.spread / 2:.0%}*"
    assert timing.noise(smooth.columns("step"), "step") == f" ±{smooth.spread / 2:.0%}"
    assert timing.noise({"step_ms": 1.0}, "step") == ""


def test_disturbed_rounds_that_were_few_are_measured_once_more(clock: Clock) -> None:
    # Two to warm up and one trial, then seven rounds of which every other is half as fast, then quiet ones.
    rough = clock.call(0.1, 0.1, 0.1, *[0.1, 0.2] * 4, then=0.1)
    found = timing.time_interleaved({"rough": rough}, budget=0.0)
    assert clock.count == 3 + 7 + 7
    assert found["rough"].spread < 0.5 and len(found["rough"].rounds) == 7
    clock.count = 0
    timing.time_interleaved({"always": clock.call(0.1, 0.1, 0.1, *[0.1, 0.3] * 20, then=0.1)}, budget=0.0)
    assert clock.count == 3 + 7 + 7  # once
    clock.count = 0
    timing.time_interleaved({"quiet": clock.call(then=0.1)}, budget=0.0)
    assert clock.count == 3 + 7


def test_what_trains_a_module_leaves_it_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module[0].bias.grad = torch.ones(4)
    x, target = torch.randn(5, 3), torch.zeros(5, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with steps.unchanged([module]):
        steps.optimiser_step(module, x, target)()
        assert not torch.equal(module[1].running_mean, before["1.running_mean"])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert module[0].weight.grad is None and torch.equal(module[0].bias.grad, torch.ones(4))


def test_the_optimiser_does_not_loosen_the_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam moves a weight by up to its rate at every step; with a large one it shows."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda wanted, lr, fused: adam(wanted, lr=0.05, fused=fused))

    def errors(*phases: str) -> dict[str, float]:
        found = layer.run(Options(
            report=lambda line: None, shapes=[SMALL], peers=["cox-de-boor"], seconds=0.01, phases=list(phases),
        ))  # fmt: skip
        return {row["contestant"]: row["second_derivative_error"] for row in found if "second_derivative_error" in row}

    alone, after = errors("second_derivative"), errors("optimiser", "second_derivative")
    assert alone.keys() == after.keys() and len(alone) >= 2
    for name, error in alone.items():
        assert after[name] == pytest.approx(error, rel=1e-3), name
        assert error < 1e-4  # far below what a rival is allowed
