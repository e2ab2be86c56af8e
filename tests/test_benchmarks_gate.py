"""What is wrong gets no time: a layer, a network as it is timed, a rival's second derivative."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kan_fast
from benchmarks import bars, cases, contestants, gate, latency, layer, network, tables, training
from benchmarks.cases import Shape
from benchmarks.options import Options
from kan_fast import backends

SMALL = Shape(24, 6, 7, 5)
needs_native = pytest.mark.skipif("native" not in kan_fast.available_backends("cpu"), reason="the native code is not built")


def quiet(**given: object) -> Options:
    return Options(report=lambda line: None, **given)  # type: ignore[arg-type]


def test_gate_passes_the_reference_and_catches_a_planted_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = layer.make_layer(SMALL, "cpu", torch.float32)
    x, cotangent = cases.uniform_input(24, 6), cases.uniform_input(24, 7, seed=1)
    assert gate.judge(ours, x, cotangent).right

    plain_forward = kan_fast.KANLayer.forward

    def off_by_a_little(self: kan_fast.KANLayer, x: torch.Tensor) -> torch.Tensor:
        y = plain_forward(self, x)
        return y if y.dtype == torch.float64 or self.backend == "reference" else y * (1 + 1e-4)

    monkeypatch.setattr(kan_fast.KANLayer, "forward", off_by_a_little)
    wrong = gate.with_backend(ours, "auto")
    verdict = gate.judge(wrong, x, cotangent)
    assert not verdict.right
    assert verdict.error > 5e-5


def test_gate_counts_nan_as_wrong() -> None:
    assert gate.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_no_time_for_a_backend_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "judge", lambda *_: gate.Verdict(1.0, 1e-7, 1e-6))
    found = layer.run(quiet(shapes=[SMALL], peers=[], backend="reference", seconds=0.01, phases=["forward"]))
    ours = next(row for row in found if row["ours"])
    assert ours["failed"].startswith("wrong")
    assert "forward_ms" not in ours


class Ripple(nn.Module):
    """Our layer and a ripple of 1e-3, whose second derivative is of order 1000."""

    def __init__(self, ours: kan_fast.KANLayer) -> None:
        super().__init__()
        self.ours = gate.with_backend(ours, "reference")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.ours(x) + 1e-3 * torch.sin(1000 * x[:, :1])
        return y


class Square(torch.autograd.Function):
    """x squared; its derivative has none."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * g * ctx.saved_tensors[0]


class Once(nn.Linear):
    def __init__(self) -> None:
        super().__init__(SMALL.in_features, SMALL.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Square.apply(super().forward(x))
        return y


def test_a_rival_with_a_wrong_second_derivative_is_listed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "RIVALS", [
        ("ripple", "json", lambda shape, ours: Ripple(ours), True, None, "", ""),
        ("honest", "json", lambda shape, ours: Ripple(ours), False, None, "", ""),  # of its own function it is right
        ("once", "json", lambda shape, ours: Once(), False, None, "", ""),
    ])  # fmt: skip
    found = layer.run(
        quiet(shapes=[SMALL], backend="reference", peers=["ripple", "honest", "once", "cox-de-boor"], seconds=0.01,
              phases=["second_derivative"])
    )  # fmt: skip
    by_name = {row["contestant"]: row for row in found}
    assert by_name["ripple"]["second_derivative_failed"].startswith("wrong: second derivative")
    assert "second_derivative_ms" not in by_name["ripple"]
    for name in ("kan_fast reference", "cox-de-boor", "honest"):
        assert by_name[name]["second_derivative_ms"] > 0
        assert by_name[name]["second_derivative_error"] < 1e-3
    assert "second_derivative_failed" in by_name["once"]
    text = tables.second_derivative([{**row, "device": "cpu"} for row in found])
    assert "| ripple | wrong |" in text and "| once | fails |" in text
    assert "ripple: wrong: second derivative off by" in text


def judge_network(kan: kan_fast.KAN, batch: int, seed: int = 0) -> str | None:
    x = cases.uniform_input(batch, kan.layer_dims[0], seed=2 * seed)
    return gate.judge_network(kan, x, cases.uniform_input(batch, kan.layer_dims[-1], seed=2 * seed + 1))


@pytest.mark.parametrize("widths", [[2, 5, 1], [3, 4, 4, 2], [8, 64, 64, 1], [20, 3]], ids=str)
@pytest.mark.parametrize("batch", [1, 64, 700])
def test_networks_that_are_right_pass(widths: list[int], batch: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        assert judge_network(kan_fast.KAN(widths), batch, seed) is None


def test_a_network_of_others_is_not_judged() -> None:
    assert gate.judge_network(latency.mlp([2, 3, 1]), torch.zeros(4, 2), torch.zeros(4, 1)) is None


def spoilt(operation: Callable[..., Any], place: int | None = None) -> Callable[..., Any]:
    """The operation with a relative error of 1e-4 in its result, or in one tensor of its list of results."""

    @functools.wraps(operation)
    def call(*args: Any) -> Any:
        result = operation(*args)
        if place is None:
            return result * (1 + 1e-4)
        result[place] = result[place] * (1 + 1e-4)
        return result

    return call


@needs_native
@pytest.mark.parametrize(
    ("operation", "place", "named"),
    [("network_output", None, "y"), ("network_backward", 0, "dx"), ("network_backward", -1, "layers.1.base_weight")],
)
def test_no_time_for_a_fused_network_that_is_wrong(
    operation: str, place: int | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer on its own is right: it is the call of the whole network that is not."""
    native = backends.get("native")
    monkeypatch.setattr(native, operation, spoilt(getattr(native, operation), place))
    wrong = judge_network(kan_fast.KAN([2, 5, 1]), 64)
    assert wrong is not None and wrong.startswith(f"wrong: {named}: error 1.0e-04 to float64, allowed ")
    row = latency.measure([2, 5, 1], [2, 50, 1], 64, quiet(seconds=0.01))
    assert row["failed"].startswith("wrong: ") and "forward_us" not in row and "step_us" not in row


@needs_native
def test_a_fused_step_without_the_gradient_of_x_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    native = backends.get("native")
    plain = native.network_backward

    def wrong_without_dx(*args: Any) -> list[torch.Tensor]:
        return plain(*args) if args[6] else [part * (1 + 1e-4) for part in plain(*args)]

    monkeypatch.setattr(native, "network_backward", wrong_without_dx)
    assert str(judge_network(kan_fast.KAN([2, 5, 1]), 64)).startswith("wrong: layers.0.spline_weight without dx: error")


def test_no_time_for_a_network_whose_layers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    (other, *_) = kan_fast.available_backends("cpu")
    if other == "reference":
        pytest.skip("no backend besides the reference")
    plain_forward = kan_fast.KANLayer.forward

    def off_by_a_little(self: kan_fast.KANLayer, x: torch.Tensor) -> torch.Tensor:
        y = plain_forward(self, x)
        return y if self.backend == "reference" else y * (1 + 1e-4)

    monkeypatch.setattr(kan_fast.KANLayer, "forward", off_by_a_little)
    monkeypatch.setattr(network, "NETWORKS", [([20, 4, 1], 8)])  # too wide to be fused
    monkeypatch.setattr(network, "PROTOCOL_WIDTHS", (20, 4, 1))
    found = network.run(quiet(seconds=0.01, peers=["linear"], backend=other))
    ours = [row for row in found if row.get("contestant", "kan_fast").startswith("kan_fast")]
    assert len(ours) == 2 and all("wrong: y: error" in row["failed"] and "forward_ms" not in row for row in ours)
    assert any("forward_ms" in row for row in found)


def test_no_time_for_training_steps_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "judge_network", lambda *_: "wrong: y")
    (row,) = training.measure(training.poisson("cpu"), quiet(seconds=0.01))
    assert row["failed"] == "wrong: y" and "step_ms" not in row
    assert tables.training([{**row, "device": "cpu"}]) == tables.NOT_YET


@pytest.mark.parametrize("place", [1, 2])
def test_no_bar_for_a_variant_that_is_wrong(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([gate.Verdict(1.0 * (at == place), 1e-7, 1e-6) for at in range(3)])
    monkeypatch.setattr(bars, "judge", lambda *_: next(verdicts))
    row = bars.measure_shape(SMALL, "auto", 0.01, extras=True)
    assert ("bfloat16", "non-uniform grid")[place - 1] in row["failed"] and "step_ms" not in row
