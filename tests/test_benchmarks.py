"""The benchmarks' own machinery: what they would print must be true before it is fast."""

import dataclasses
import functools
import itertools
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import kan_fast
from benchmarks import (
    cases,
    ceilings,
    contestants,
    environment,
    gate,
    host,
    layer,
    memory,
    network,
    plot,
    rows,
    steps,
    sweep,
    timing,
    timing_cuda,
    training,
)
from benchmarks.cases import BARS, Shape
from benchmarks.options import Options
from kan_fast import backends

ROOT = Path(__file__).resolve().parent.parent
SMALL = Shape(24, 6, 7, 5)


def quiet(**given: object) -> Options:
    return Options(report=lambda line: None, **given)  # type: ignore[arg-type]


def test_shape_reads_what_it_writes() -> None:
    assert Shape.parse("256,64,32") == Shape(256, 64, 32, 5, 3)
    for shape in (Shape(1, 2, 3, 4), Shape(5, 6, 7, 8, 2)):
        assert Shape.parse(shape.key()) == shape


@pytest.mark.parametrize("text", ["", "1,2", "a,b,c", "1,2,3,4,5,6", "0,1,1", "8,4,4,0", "8,4,4,5,-1"])
def test_shape_names_what_came(text: str) -> None:
    with pytest.raises(ValueError, match="expected batch,in,out"):
        Shape.parse(text)


@pytest.mark.parametrize("shape", list(BARS))
def test_linear_has_as_many_parameters_as_the_layer(shape: Shape) -> None:
    ours = kan_fast.KANLayer(shape.in_features, shape.out_features, shape.grid_size, shape.spline_order, device="meta")
    linear = nn.Linear(shape.linear_features, shape.out_features, bias=False, device="meta")
    assert sum(p.numel() for p in ours.parameters()) == linear.weight.numel() == shape.parameters


def test_ratio_of_a_call_twice_as_long() -> None:
    # sleep overshoots by the scheduler's slack, well below a quarter of 4 ms on a machine that is not overloaded; the
    # ratio is a median over rounds and the bounds leave a factor of 1.6 either way.
    found = timing.time_interleaved({"long": lambda: time.sleep(0.008), "short": lambda: time.sleep(0.004)}, budget=0.3)
    assert 1.25 < found["long"].ratio_to(found["short"]) < 3.2
    assert len(found["long"].rounds) == len(found["short"].rounds) >= 7


def test_ratio_is_paired_by_round() -> None:
    # The second half of the rounds ran on a machine half as fast: unpaired medians could not tell.
    slow, fast = timing.Timing([2, 2, 4, 4]), timing.Timing([1, 1, 2, 2])
    assert slow.ratio_to(fast) == 2
    assert slow.spread > 0


def test_cuda_timing_flushes_before_every_call_and_interleaves(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 2.0  # milliseconds

    class Flush:
        def __call__(self) -> None:
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing_cuda, "Flush", Flush)
    calls = {name: functools.partial(happened.append, name) for name in ("a", "b")}
    found = timing_cuda.time_interleaved(calls, budget=0.0, min_rounds=4, warm_up=1)
    assert [found[name].rounds for name in calls] == [[0.002] * 4] * 2
    timed = happened[-4 * 2 * 4 :]  # four rounds of two calls of four events
    for index in range(0, len(timed), 4):
        assert timed[index] == "flush"
        assert timed[index + 1] == timed[index + 3] == "record"
    assert all(set(timed[index + 2 : index + 8 : 4]) == {"a", "b"} for index in range(0, len(timed), 8))
    assert happened.count("record") == 2 * (2 * 3 + 2 * 4)  # three trials and four rounds of each


def test_layer_times_every_phase_of_every_contestant() -> None:
    found = layer.run(quiet(shapes=[SMALL], peers=["linear", "cox-de-boor"], seconds=0.01))
    by_name = {row["contestant"]: row for row in found}
    ours = {f"kan_fast {name}": backends.reason_not(name, torch.device("cpu"), torch.float32) for name in backends.NAMES}
    assert by_name.keys() == ours.keys() | {"linear", "linear equal", "cox-de-boor"}
    for name, row in by_name.items():
        if ours.get(name) is not None:  # what is not there is named, and why
            assert row["absent"] == ours[name] and row["ours"]
            continue
        assert "failed" not in row, row
        for phase in ("forward", "step", "optimiser"):
            assert row[f"{phase}_ms"] > 0
        assert ("second_derivative_ms" in row) == (not name.startswith("linear"))
    # Same function, same coefficients: 1e-5 is 100 times float32's rounding of a sum of 60 terms of one size.
    assert by_name["cox-de-boor"]["error"] < 1e-5
    assert by_name["cox-de-boor"]["parameters"] == by_name["linear equal"]["parameters"] == SMALL.parameters


def test_absent_and_failing_rivals_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(contestants, "RIVALS", [
        ("ghost", "module_that_is_not_there", broken, True, None, "pip install ghost", ""),
        ("broken", "json", broken, True, None, "", ""),
    ])  # fmt: skip
    lines: list[str] = []
    found = layer.run(
        Options(
            shapes=[SMALL], backend="reference", peers=["ghost", "broken"], seconds=0.01, phases=["forward"],
            report=lines.append,
        )
    )  # fmt: skip
    by_name = {row["contestant"]: row for row in found}
    assert "pip install ghost" in by_name["ghost"]["absent"]
    assert by_name["broken"]["failed"] == "RuntimeError: no such kernel"
    text = "\n".join(lines)
    assert "ghost: absent" in text
    assert "no such kernel" in text


def test_what_the_host_needs() -> None:
    pytest.importorskip("triton")
    first, second = host.run(quiet())
    assert first["shape"] != second["shape"]
    for row in (first, second):
        for kernel in ("contract_output", "contract_input", "contract_weight"):
            assert 0 < row[f"plan_{kernel}_us"] < 1e5


def test_unknown_peer_is_named() -> None:
    with pytest.raises(ValueError, match="got 'nobody'"):
        contestants.contestants("reference", ["nobody"])


@pytest.mark.parametrize(
    ("name", "module"),
    [("inkan eager", "inkan"), ("flashkan", "flashkan"), ("pykan", "kan"), ("efficient-kan", "efficient_kan")],
)
def test_rival_gets_our_coefficients(name: str, module: str) -> None:
    pytest.importorskip(module)
    contestant = next(c for c in contestants.contestants("reference", [name]) if c.name == name)
    ours = layer.make_layer(SMALL, "cpu", torch.float32)
    x = cases.uniform_input(24, 6)
    with torch.no_grad():
        truth = gate.with_backend(ours, "reference", torch.float64)(x.double())
        # flashkan's truncated powers lose 4e-5 at G = 5; any wrong coefficient would cost 1e-1.
        assert gate.relative_error(contestants.build(contestant, SMALL, ours)(x), truth) < 1e-3


def test_second_derivative_step_differentiates_twice() -> None:
    class Cube(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a * x**3

    # u = a x^3 at x = 1: residual u_x + u_xx = 3 a + 6 a = 9 a, squared 81 a^2, derivative 162 a = 324.
    (gradient,) = steps.second_derivative_step(Cube(), torch.ones(1, 1, dtype=torch.float64))()
    assert gradient is not None
    assert gradient.item() == pytest.approx(324)


def test_work_counts_the_dense_product() -> None:
    flops, moved = ceilings.work(Shape(10, 2, 3, 5), "forward", 4)
    assert flops == 2 * 10 * (2 * 9) * 3
    assert moved == 4 * (10 * 2 + 2 * 9 * 3 + 10 * 3)
    assert ceilings.work(Shape(10, 2, 3, 5), "step", 4)[0] == 3 * flops


def _allocate(size: int) -> tuple[object, object]:
    return (lambda: None), (lambda: torch.ones(size, dtype=torch.int8))


def test_memory_of_a_call_is_what_it_touches() -> None:
    size = 64 * 2**20
    found = memory.peak_extra_cpu(_allocate, (size,), 1)  # type: ignore[arg-type]
    assert size * 0.95 < found < size * 1.25  # the kernel's counters lag by a few hundred KiB


def test_memory_reports_the_childs_error() -> None:
    with pytest.raises(RuntimeError, match="TypeError"):
        memory.peak_extra_cpu(_allocate, (), 1)  # type: ignore[arg-type]


def test_sweep_moves_one_axis() -> None:
    for axis in sweep.VALUES:
        for value, shape in sweep.points(axis, "cpu"):
            moved = (shape.in_features, shape.out_features) if axis == "width" else (getattr(shape, axis),)
            assert set(moved) == {value}


def test_equal_mlp_is_nearest() -> None:
    kan = kan_fast.KAN([64, 32, 10], device="meta")
    parameters = sum(p.numel() for p in kan.parameters())
    widths = network.equal_mlp([64, 32, 10], parameters)
    count = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    assert abs(count - parameters) <= (64 + 10 + 1) / 2 + 1  # one hidden unit costs in + out + 1


def test_laplacian_of_the_solution_is_the_source() -> None:
    def solution(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.pi * x[:, :1]) * torch.sin(torch.pi * x[:, 1:])

    x = cases.uniform_input(20, 2, dtype=torch.float64)
    expected = -2 * torch.pi**2 * solution(x).squeeze(1)
    torch.testing.assert_close(training.laplacian(solution, x), expected)  # type: ignore[arg-type]


def test_training_is_the_same_twice() -> None:
    task = training.function("cpu")

    def final() -> float:
        torch.manual_seed(0)
        return training.train(kan_fast.KAN([4, 2, 1]), task, 1e-2, 6, task.metric).metric

    assert final() == final()


@pytest.mark.parametrize("name", list(training.TASKS))
def test_candidates_are_of_one_size_and_as_many(name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    some = training.candidates(training.TASKS[name]("cpu"), quiet())
    sizes = [sum(p.numel() for p in one.make().parameters()) for one in some]
    # A hidden unit of the smallest networks costs a twentieth.
    assert all(abs(size - sizes[0]) <= 0.08 * sizes[0] for size in sizes), sizes
    assert [one.family for one in some] == ["kan"] * 3 + ["mlp"] * 3
    assert len({one.name for one in some}) == 6


def test_settings_are_chosen_by_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    task = training.poisson("cpu")
    looked = []
    blind = dataclasses.replace(task, metric=lambda model: looked.append(model) or 0.5)
    monkeypatch.setattr(training, "seconds_per_step", lambda task, models, options: dict.fromkeys(models, 0.01))
    some = training.candidates(task, quiet())
    training.choose(blind, "kan", some, {one.name: 6 for one in some}, quiet())
    assert not looked  # the test metric was not asked
    found = training.measure(blind, quiet(seconds=0.03))
    assert [row["model"] for row in found] == ["kan", "mlp"]
    assert all(row["steps"] == 3 and row["final"] == 0.5 and len(row["candidates"]) == 3 for row in found)
    assert looked


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    rows.write(path, [{"a": 1}, {"a": 2}], {"commit": "x"})
    rows.write(path, [{"a": 3}], {})
    assert rows.read([path]) == [{"a": 1, "commit": "x"}, {"a": 2, "commit": "x"}, {"a": 3}]
    path.write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r":2: expected a JSON object"):
        rows.read([path])


def test_circumstances_say_where() -> None:
    found = environment.describe("cpu", "default")
    assert found["device_name"]
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    with pytest.raises(ValueError, match="got 'odd'"):
        environment.set_allocator("odd")


def test_readme_tables_are_replaced_and_the_rest_is_kept() -> None:
    text = "before\n<!-- table:gpu -->\nold\n<!-- /table -->\nafter\n"
    filled = plot.fill(text, [])
    assert filled.startswith("before\n<!-- table:gpu -->\n| batch")
    assert filled.endswith("<!-- /table -->\nafter\n")
    assert "old" not in filled
    assert "not yet measured" in filled
    assert plot.fill(filled, []) == filled
    with pytest.raises(ValueError, match="got 'nonsense'"):
        plot.fill("<!-- table:nonsense -->\n<!-- /table -->", [])
    with pytest.raises(ValueError, match="1 markers and 0 ends"):
        plot.fill("<!-- table:gpu -->\n", [])


@pytest.mark.parametrize("page", plot.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_show_the_committed_rows(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table:" in text
    assert plot.fill(text, plot.committed()) == text, "python -m benchmarks.plot makes the tables anew"
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert (page.parent / picture).exists()
