"""What a KAN buys: accuracy against an MLP of equal parameter count, at equal training time, on published tasks.

digits      scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak, UCI 1998): error rate on a held-out fifth.
function    f(x) = exp((sin(pi (x1^2 + x2^2)) + sin(pi (x3^2 + x4^2))) / 2) on [-1, 1]^4, the four-dimensional toy of the
            KAN paper (arXiv 2404.19756, section 3.1): root mean square error on unseen points.
poisson     u_xx + u_yy = f on [-1, 1]^2 with u = sin(pi x) sin(pi y), the same paper's section 3.4, trained on the residual
            and the boundary alone: root mean square error of u, relative to u's.

Both sides have as many candidates: three KANs of about the same parameter count (widths, grid size), and three MLPs (SiLU) of
that count with one to three hidden layers. All train with Adam, the learning rate falling along a cosine. Candidate and rate
(one of four) are those that do best on validation data in a short trial with a seed that is not measured; the test data
enter only the figures that are reported. For poisson the validation data are points that the loss has not seen.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import cases, gate
from benchmarks.latency import mlp
from benchmarks.network import equal_mlp
from benchmarks.options import Options, count
from benchmarks.timing import time_interleaved

Row = dict[str, Any]
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
CURVE_POINTS = 12


@dataclass(frozen=True)
class Task:
    """kans: candidates (widths, grid size), the first of which sets the parameter count; loss(model, step) -> scalar for one
    step; metric(model) -> what is reported, lower is better, on test data, and what candidates are chosen by, on validation's.
    """

    name: str
    metric_name: str
    kans: list[tuple[list[int], int]]
    loss: Callable[[nn.Module, int], Tensor]
    metric: Callable[[nn.Module], float]
    metric_on_validation: Callable[[nn.Module], float]


def _batches(x: Tensor, y: Tensor, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Step number -> a batch; epochs in an order that the step number determines."""
    count = x.shape[0] // size

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(epoch)).to(x.device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        epoch, part = divmod(step, count)
        chosen = order(epoch)[part * size : (part + 1) * size]
        return x[chosen], y[chosen]

    return batch


def digits(device: str) -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32, device=device) / 8 - 1
    y = torch.tensor(data.target, device=device)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(device)
    test, validation, train = order[:360], order[360:660], order[660:]
    batch = _batches(x[train], y[train], 64)

    def error_rate(model: nn.Module, rows: Tensor) -> float:
        with torch.no_grad():
            return 1.0 - float((model(x[rows]).argmax(1) == y[rows]).double().mean())

    def loss(model: nn.Module, step: int) -> Tensor:
        images, labels = batch(step)
        return nn.functional.cross_entropy(model(images), labels)

    return Task(
        "digits", "test error rate", [([64, 32, 10], 5), ([64, 47, 10], 2), ([64, 28, 16, 10], 5)], loss,
        lambda model: error_rate(model, test),
        lambda model: error_rate(model, validation),
    )


def function(device: str) -> Task:
    def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)).to(device) * 2 - 1
        squares = x.square()
        angle = torch.pi * torch.stack([squares[:, 0] + squares[:, 1], squares[:, 2] + squares[:, 3]], dim=1)
        return x, (angle.sin().sum(1, keepdim=True) / 2).exp()

    batch = _batches(*points(20000, 1), 1000)
    test, validation = points(10000, 2), points(5000, 3)

    def rmse(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float((model(data[0]) - data[1]).square().mean().sqrt())

    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = batch(step)
        return nn.functional.mse_loss(model(x), y)

    kans = [([4, 4, 2, 1], 10), ([4, 6, 2, 1], 5), ([4, 3, 1], 20)]
    return Task("function", "test RMSE", kans, loss, lambda model: rmse(model, test), lambda model: rmse(model, validation))


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """u_xx + u_yy of u = model, at x (N, 2): (N,). Differentiable in the parameters."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    parts = []
    for axis in range(2):
        (second,) = torch.autograd.grad(gradient[:, axis].sum(), x, create_graph=True)
        parts.append(second[:, axis])
    return parts[0] + parts[1]


def poisson(device: str) -> Task:
    def solution(x: Tensor) -> Tensor:
        return (torch.sin(torch.pi * x[:, :1]) * torch.sin(torch.pi * x[:, 1:])).detach()

    ticks = torch.linspace(-1, 1, 41, device=device)
    inside = torch.cartesian_prod(ticks[1:-1], ticks[1:-1])
    edge = torch.stack([ticks, torch.ones_like(ticks)], dim=1)

    def around(edge: Tensor) -> Tensor:
        """All four sides of the square, from the one at the top."""
        down, left = (torch.tensor(signs, device=device) for signs in ([1.0, -1.0], [-1.0, 1.0]))
        return torch.cat([edge, edge * down, edge.flip(1), edge.flip(1) * left])

    boundary = around(edge)
    generator = torch.Generator().manual_seed(4)
    other = (torch.rand(1000, 2, generator=generator) * 2 - 1).to(device)
    place = (torch.rand(100, 1, generator=generator) * 2 - 1).to(device)
    other_boundary = around(torch.cat([place, torch.ones_like(place)], dim=1))

    def error(model: nn.Module) -> float:
        fine = torch.linspace(-1, 1, 101, device=device)
        grid = torch.cartesian_prod(fine, fine)
        with torch.no_grad():
            truth = solution(grid)
            return float(((model(grid) - truth).square().mean() / truth.square().mean()).sqrt())

    def loss_at(model: nn.Module, inside: Tensor, boundary: Tensor) -> Tensor:
        source = -2 * torch.pi**2 * solution(inside).squeeze(1)
        at_boundary: Tensor = model(boundary).square().mean()
        return 0.01 * (laplacian(model, inside) - source).square().mean() + at_boundary  # the paper's weight of the interior

    kans = [([2, 10, 1], 5), ([2, 6, 1], 10), ([2, 4, 4, 1], 5)]
    return Task("poisson", "relative RMSE of u", kans, lambda model, step: loss_at(model, inside, boundary), error,
                lambda model: float(loss_at(model, other, other_boundary).detach()))


TASKS: dict[str, Callable[[str], Task]] = {"digits": digits, "function": function, "poisson": poisson}


@dataclass
class Outcome:
    """Final metric, and (step, metric) along the way."""

    metric: float
    curve: list[tuple[int, float]]


def train(model: nn.Module, task: Task, rate: float, steps: int, metric: Callable[[nn.Module], float]) -> Outcome:
    """Adam for that many steps, the rate falling from `rate` to 0 along a cosine."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    stops = {max(1, round(steps * (point + 1) / CURVE_POINTS)) for point in range(CURVE_POINTS)}
    curve: list[tuple[int, float]] = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad(set_to_none=True)
        task.loss(model, step).backward()
        optimiser.step()
        if step + 1 in stops:
            curve.append((step + 1, metric(model)))
    return Outcome(curve[-1][1], curve)


def seconds_per_step(task: Task, models: dict[str, Callable[[], nn.Module]], options: Options) -> dict[str, float]:
    """Median time of a whole training step of each model, interleaved."""

    def stepper(model: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

        def call() -> None:
            optimiser.zero_grad(set_to_none=True)
            task.loss(model, 0).backward()
            optimiser.step()
            if options.device == "cuda":
                torch.cuda.synchronize()

        return call

    timings = time_interleaved({name: stepper(make()) for name, make in models.items()}, budget=2.0, warm_up=20)
    return {name: timing.median for name, timing in timings.items()}


def kept_times(task: Task, models: dict[str, Callable[[], nn.Module]], options: Options) -> dict[str, float]:
    """As `seconds_per_step`, and kept in the file `options.times`: what stands there is not measured again."""
    if options.times is None:
        return seconds_per_step(task, models, options)
    kept = json.loads(options.times.read_text()) if options.times.exists() else {}
    key = f"{task.name}, {options.one_backend()}, {options.device}, {torch.get_num_threads()} threads"
    if key not in kept:
        kept[key] = seconds_per_step(task, models, options)
        options.times.write_text(json.dumps(kept, indent=1))
    times: dict[str, float] = kept[key]
    options.report(f"{key}: " + ", ".join(f"{name} {time * 1e3:.3g} ms a step" for name, time in times.items()))
    return times


@dataclass(frozen=True)
class Candidate:
    """A model that may be chosen. family: "kan" or "mlp"."""

    family: str
    widths: list[int]
    grid_size: int | None
    make: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        return f"{self.family} {self.widths}" + (f", G={self.grid_size}" if self.grid_size else "")


def candidates(task: Task, options: Options) -> list[Candidate]:
    """The task's KANs, and as many MLPs of the first one's parameter count, with one hidden layer and more."""

    def kan(widths: list[int], grid_size: int) -> nn.Module:
        return kan_fast.KAN(widths, grid_size=grid_size, backend=options.one_backend()).to(options.device)

    made = [Candidate("kan", widths, size, functools.partial(kan, widths, size)) for widths, size in task.kans]
    parameters = sum(p.numel() for p in made[0].make().parameters())
    into, out = task.kans[0][0][0], task.kans[0][0][-1]
    for depth in range(1, len(task.kans) + 1):
        widths = equal_mlp([into, *[0] * depth, out], parameters)  # only the ends and the depth count
        made.append(Candidate("mlp", widths, None, lambda widths=widths: mlp(widths).to(options.device)))
    return made


def judge(candidate: Candidate, device: str) -> str | None:
    """What is wrong with a candidate on uniform inputs, before the steps of any are timed; None if nothing."""
    torch.manual_seed(0)
    x = cases.uniform_input(gate.ROWS, candidate.widths[0], device=device)
    return gate.judge_network(candidate.make(), x, cases.uniform_input(gate.ROWS, candidate.widths[-1], device=device, seed=1))


def choose(
    task: Task, family: str, some: list[Candidate], budgets: dict[str, int], options: Options
) -> tuple[Candidate, float]:
    """The candidate of a family and the learning rate that do best on validation data after a third of the budget."""
    trials: dict[tuple[int, float], float] = {}
    for index, candidate in enumerate(some):
        if candidate.family != family:
            continue
        for rate in RATES:
            torch.manual_seed(1000)
            options.progress(f"{task.name}: {candidate.name}, trial of learning rate {rate}")
            steps = max(1, budgets[candidate.name] // 3)
            found = train(candidate.make(), task, rate, steps, task.metric_on_validation).metric
            trials[index, rate] = found if math.isfinite(found) else math.inf
    index, rate = min(trials, key=lambda trial: trials[trial])
    return some[index], rate


def measure(task: Task, options: Options) -> list[Row]:
    """One row a family: metric of every seed after `options.seconds` worth of steps, and after equally many steps.

    How many steps a model gets is the time budget over its time per step, measured first and side by side with the
    others'; so the accuracies can be had again on a busy machine.
    """
    some = candidates(task, options)
    for candidate in some:
        wrong = judge(candidate, options.device)
        if wrong is not None:
            options.report(f"{task.name}: {candidate.name}: {wrong}")
            return [{"what": "training", "task": task.name, "model": candidate.family, "widths": candidate.widths,
                     "grid_size": candidate.grid_size, "backend": options.one_backend(), "failed": wrong}]
    times = kept_times(task, {candidate.name: candidate.make for candidate in some}, options)
    if options.seconds == 0:
        return []
    budgets = {name: max(1, round(options.seconds / time)) for name, time in times.items()}
    chosen = {family: choose(task, family, some, budgets, options) for family in ("kan", "mlp")}
    fewest = min(budgets[candidate.name] for candidate, _ in chosen.values())
    rows: list[Row] = []
    for family, (candidate, rate) in chosen.items():
        name = candidate.name
        outcomes, equal = [], []
        for seed in SEEDS:
            options.progress(f"{task.name}: {name}, seed {seed}")
            torch.manual_seed(seed)
            outcomes.append(train(candidate.make(), task, rate, budgets[name], task.metric))
            torch.manual_seed(seed)
            equal.append(
                outcomes[-1] if budgets[name] == fewest else train(candidate.make(), task, rate, fewest, task.metric)
            )
        metrics = [outcome.metric for outcome in outcomes]
        rows.append({
            "what": "training", "task": task.name, "metric": task.metric_name, "model": family, "widths": candidate.widths,
            "grid_size": candidate.grid_size, "parameters": sum(p.numel() for p in candidate.make().parameters()),
            "candidates": [one.name for one in some if one.family == family], "rates": list(RATES),
            "rate": rate, "seconds": options.seconds, "seeds": len(SEEDS), "backend": options.one_backend(),
            "dtype": "float32", "step_ms": times[name] * 1e3, "steps": budgets[name],
            "final": statistics.mean(metrics), "final_min": min(metrics), "final_max": max(metrics),
            "equal_steps": fewest, "at_equal_steps": statistics.mean(outcome.metric for outcome in equal),
            "curves": [outcome.curve for outcome in outcomes],
        })
        options.report(
            f"{task.name}: {name}, {rows[-1]['parameters']} parameters, {times[name] * 1e3:.3g} ms a step: "
            f"{task.metric_name} {rows[-1]['final']:.3g} ({min(metrics):.3g} to {max(metrics):.3g}) in "
            f"{options.seconds:g} s = {budgets[name]} steps, rate {rate:g}; after {fewest} steps "
            f"{rows[-1]['at_equal_steps']:.3g}"
        )
    return rows


def _progress(options: Options, prefix: str, text: str) -> None:
    options.progress(prefix + text)


def run(options: Options) -> list[Row]:
    chosen = options.tasks or list(TASKS)
    rows: list[Row] = []
    for at, name in enumerate(chosen, 1):
        one = replace(options, progress=functools.partial(_progress, options, count(at, len(chosen))))
        found = measure(TASKS[name](options.device), one)
        options.emit(found)
        rows += found
    return rows
