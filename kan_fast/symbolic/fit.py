"""Fits of c * f(a * x + b) + d to many curves at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kan_fast.checks import check_number
from kan_fast.chunks import chunks
from kan_fast.symbolic.library import Library, SymbolicFunction, require_sympy, resolve_library

# Unexplained variance below this share is taken for the error of the curve itself (a trained spline).
_FLOOR = 1e-6
# Points of a curve that the search looks at; the final fit has them all.
_SEARCH_POINTS = 200
# Starts of every candidate that go on to the refinement, and candidates of every curve that go on to the final fit.
_KEPT_STARTS, _KEPT_CANDIDATES = 3, 3
_REFINEMENT_STEPS = 25

# f(-z) differs from f(z) in c and d only.
_MIRRORED = {
    *("x^2", "x^3", "x^4", "x^5", "1/x", "1/x^2", "1/x^3", "1/x^4", "abs", "tan", "tanh", "sigmoid", "gaussian"),
    *("arctan", "arcsin", "arccos", "arctanh", "sinh", "cosh", "erf"),
}


@dataclass
class SymbolicFit:
    """y = c * f(a * x + b) + d, f named `name`, with parameters (a, b, c, d).

    expression: a SymPy expression of the symbol x. r2: share of y's variance that it explains (1 for a constant y).
    alternatives: (name, r2, score) of the candidates that came closest, best first; the lowest score was chosen.
    """

    name: str
    expression: Any
    parameters: tuple[float, float, float, float]
    r2: float
    alternatives: list[tuple[str, float, float]] = field(default_factory=list)
    function: SymbolicFunction | None = field(default=None, repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """The formula's values: any shape -> the same shape."""
        a, b, c, d = self.parameters
        return torch.full_like(x, d) if self.function is None else c * self.function.function(a * x + b) + d


def fit_symbolic_function(
    x: Any,
    y: Any = None,
    library: Library | None = None,
    *,
    domain: tuple[float, float] = (-1.0, 1.0),
    samples: int = 400,
    complexity_weight: float = 1.5,
    device: torch.device | str | None = None,
) -> SymbolicFit:
    """Find the formula c * f(a * x + b) + d behind a curve.

    x, y (N,): points of it, tensors or what torch.as_tensor takes. Or x a function and y None: a tensor (samples,) of evenly
    spaced points of `domain` on `device` goes in, float64, or float32 where the function raises TypeError or ValueError for
    that; values come out.
    library: names of default_library() and SymbolicFunctions of your own; None means the 29 built-in ones.
    The choice has the lowest complexity_weight * complexity + log2(1 - r2 + 1e-6): a candidate may be more complex by one
    only if it leaves 2**complexity_weight times less unexplained. A candidate with a singularity between the smallest and
    the largest x is not considered.
    """
    if y is None:
        if not callable(x):
            raise TypeError(f"y: expected values for x, or a function in place of x, got None and {type(x).__name__}")
        x, y = _sampled(x, domain, samples, device)
    x = _values("x", x).detach().double().flatten()
    y = _values("y", y).detach().to(x).flatten()
    if x.shape != y.shape or len(x) < 5:
        raise ValueError(f"x, y: expected as many values of each, 5 at least, got {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x, y: expected finite values, got NaN or infinity")
    return fit_edges(x[:, None], y[:, None], library, complexity_weight)[0]


def _values(name: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # each of which torch raises for some kind of what is no number
        raise TypeError(f"{name}: expected a tensor or numbers, got {type(given).__name__}") from None


def fit_edges(
    x: Tensor, y: Tensor, library: Library | None = None, complexity_weight: float = 1.5
) -> list[SymbolicFit]:
    """fit_symbolic_function for E curves at once: x, y (N, E) -> E fits.

    All starts of a candidate are tried on all curves in one tensor operation, (curves, starts, points) in chunks, with c and d
    solved for; the best are refined by batched Gauss-Newton steps; the best candidates are polished by SciPy.
    """
    check_number("complexity_weight", complexity_weight)
    candidates = resolve_library(library)
    x, y = x.double().t().contiguous(), y.double().t().contiguous()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    centre, half = (low + high) / 2, ((high - low) / 2).clamp(min=1e-300)
    u = (x - centre) / half
    # The ends of the range are among the points that decide where a candidate may be used.
    some = torch.linspace(0, x.shape[1] - 1, min(x.shape[1], _SEARCH_POINTS), device=x.device).long()
    order = u.argsort(1)
    rough_u, rough_y = u.gather(1, order[:, some]), y.gather(1, order[:, some])
    constant = (y.amax(1) - y.amin(1) <= 1e-12 * y.abs().amax(1)) | (high - low <= 0)[:, 0]
    ab = torch.stack([_search(candidate, rough_u, rough_y) for candidate in candidates], 1)  # (E, candidates, 2)
    r2 = torch.stack([_r2(candidate, u, y, ab[:, i])[0] for i, candidate in enumerate(candidates)], 1)
    complexity = torch.tensor([candidate.complexity for candidate in candidates], device=x.device, dtype=x.dtype)
    score = _score(r2, complexity, complexity_weight)
    ranking = score.argsort(1)[:, :_KEPT_CANDIDATES].tolist()
    fits = []
    for e in range(len(x)):
        if constant[e]:
            value = float(y[e].mean())
            fits.append(SymbolicFit("constant", require_sympy().Float(value), (0.0, 0.0, 0.0, value), 1.0))
            continue
        best: list[tuple[float, SymbolicFit]] = []
        for i in ranking[e]:
            if math.isfinite(score[e, i]):
                fit = _polish(candidates[i], x[e], y[e], ab[e, i], float(centre[e]), float(half[e]))
                rank = float(_score(torch.tensor(fit.r2), complexity[i].cpu(), complexity_weight))
                # sin and cos, arcsin and arccos are the same but for shifts: the one with the smaller shifts.
                rank += 0.05 * sum(min(abs(fit.parameters[p]), 4.0) for p in (1, 3))
                best.append((rank, fit))
        if not best:
            names = ", ".join(candidate.name for candidate in candidates)
            raise ValueError(f"library: none of {names} has its domain around all x between {low[e]} and {high[e]}")
        best.sort(key=lambda pair: pair[0])
        best[0][1].alternatives = [(fit.name, fit.r2, rank) for rank, fit in best]
        fits.append(best[0][1])
    return fits


def _sampled(
    function: Callable[[Tensor], Any], domain: tuple[float, float], samples: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    low, high = domain
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"domain: expected finite low < high, got {domain}")
    x = torch.linspace(low, high, samples, dtype=torch.float64, device=device)
    with torch.no_grad():
        try:
            return x, torch.as_tensor(function(x))
        except (TypeError, ValueError):  # a float32 layer refuses float64
            return x, torch.as_tensor(function(x.float()))


def _score(r2: Tensor, complexity: Tensor, weight: float) -> Tensor:
    return weight * complexity + torch.log2(1 - r2 + _FLOOR)


def _starts(freedom: str, device: torch.device) -> Tensor:
    """Values of (a, b) to start from, for arguments that run from -1 to 1: (S, 2)."""

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        return torch.cartesian_prod(a, b)

    def spread(low: float, high: float, n: int) -> Tensor:
        return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)

    even = torch.linspace
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    if freedom == "none":
        starts = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    elif freedom == "shift":
        far = spread(1.002, 30, 24)
        starts = pairs(sign, torch.cat([even(-1, 1, 25, dtype=torch.float64), far, -far]))
    elif freedom == "scale":
        starts = pairs(torch.cat([spread(0.05, 20, 30), -spread(0.05, 20, 30)]), torch.zeros(1, dtype=torch.float64))
    elif freedom == "wave":
        # Frequencies closer than half the width of a peak of the correlation; phases of half a turn: c has a sign.
        starts = pairs(even(0.4, 40, 67, dtype=torch.float64), even(0, math.pi * 5 / 6, 6, dtype=torch.float64))
    else:
        slope = torch.cat([spread(0.08, 20, 24), -spread(0.08, 20, 24)])
        starts = pairs(slope, even(-1.5, 1.5, 13, dtype=torch.float64))
        starts[:, 1] *= -starts[:, 0]
    return starts.to(device)


def _r2(candidate: SymbolicFunction, u: Tensor, y: Tensor, ab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best share of variance over c and d, and these: u, y (E, N), ab (E, 2) or (E, S, 2) -> three (E,) or (E, S).

    Minus infinity where the candidate may not be used.
    """
    if ab.dim() == 3:
        u, y = u[:, None], y[:, None]
    z = ab[..., :1] * u + ab[..., 1:]
    f = candidate.function(z)
    f_mean, y_mean = f.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    f_centred, y_centred = f - f_mean, y - y_mean
    ff, yy, fy = f_centred.square().sum(-1), y_centred.square().sum(-1), (f_centred * y_centred).sum(-1)
    c = fy / ff
    d = (y_mean - c[..., None] * f_mean)[..., 0]
    # 1 - residual / total, not the squared correlation: no cancellation when the fit is good.
    r2 = 1 - (y_centred - c[..., None] * f_centred).square().sum(-1) / yy
    # Values that are all but equal carry no information but rounding.
    usable = r2.isfinite() & (ff > 1e-20 * f.square().sum(-1))
    if candidate.domain is not None:
        usable &= candidate.domain(z)
    return torch.where(usable, r2, -torch.inf), c, d


def _search(candidate: SymbolicFunction, u: Tensor, y: Tensor) -> Tensor:
    """The best (a, b) of one candidate for every curve: u, y (E, N) -> (E, 2)."""
    starts = _starts(candidate.freedom, u.device)
    result = u.new_empty(len(u), 2)
    for part in chunks(len(u), len(starts) * u.shape[1]):
        some_u, some_y = u[part], y[part]
        r2 = _r2(candidate, some_u, some_y, starts.expand(len(some_u), -1, -1))[0]
        kept = starts[r2.topk(min(_KEPT_STARTS, len(starts)), dim=1).indices]
        refined = _refine(candidate, some_u, some_y, kept)
        best = _r2(candidate, some_u, some_y, refined)[0].argmax(1)
        result[part] = refined[torch.arange(len(best), device=u.device), best]
    return result


def _refine(candidate: SymbolicFunction, u: Tensor, y: Tensor, ab: Tensor) -> Tensor:
    """Damped Gauss-Newton steps on (a, b) with c and d eliminated: u, y (E, N), ab (E, K, 2) -> (E, K, 2).

    Variable projection with Kaufman's Jacobian (L. Kaufman, BIT 15, 1975).
    """
    free = {"none": (0, 0), "shift": (0, 1), "scale": (1, 0), "wave": (1, 1), "full": (1, 1)}[candidate.freedom]
    if not any(free):
        return ab
    free_mask = torch.tensor(free, dtype=u.dtype, device=u.device)
    r2, c, d = _r2(candidate, u, y, ab)
    damping = torch.full_like(r2, 1e-3)
    for _ in range(_REFINEMENT_STEPS):
        z = (ab[..., :1] * u[:, None] + ab[..., 1:]).requires_grad_()
        with torch.enable_grad():
            f = candidate.function(z)
            slope = torch.autograd.grad(f.sum(), z)[0]
        f = f.detach()
        residual = y[:, None] - c[..., None] * f - d[..., None]
        columns = torch.stack([slope * u[:, None], slope], -1) * c[..., None, None] * free_mask
        features = torch.stack([f - f.mean(-1, keepdim=True)], -1)
        columns = columns - columns.mean(-2, keepdim=True)
        norm = features.square().sum(-2, keepdim=True).clamp(min=1e-300)
        columns = columns - features * ((features.mT @ columns) / norm)
        normal = columns.mT @ columns
        gradient = (columns.mT @ residual[..., None])[..., 0]
        # Held parameters get a unit pivot and a zero gradient.
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        pivot = torch.where(diagonal > 0, diagonal * damping[..., None], 1)
        system = torch.nan_to_num(normal + torch.diag_embed(pivot))
        step, info = torch.linalg.solve_ex(system, torch.nan_to_num(gradient))
        tried = ab + torch.where((info == 0)[..., None], torch.nan_to_num(step), 0) * free_mask
        tried_r2, tried_c, tried_d = _r2(candidate, u, y, tried)
        better = tried_r2 > r2
        ab = torch.where(better[..., None], tried, ab)
        r2, c, d = torch.where(better, tried_r2, r2), torch.where(better, tried_c, c), torch.where(better, tried_d, d)
        damping = torch.where(better, damping / 5, damping * 4).clamp(1e-12, 1e8)
    return ab


def _polish(candidate: SymbolicFunction, x: Tensor, y: Tensor, ab: Tensor, centre: float, half: float) -> SymbolicFit:
    """The final fit of one curve in SciPy, on all points: x, y (N,), ab (2,) for arguments (x - centre) / half."""
    try:
        import numpy
        from scipy.optimize import least_squares
    except ImportError as error:
        raise ImportError("symbolic regression needs SciPy: pip install 'kan_fast[symbolic]'") from error
    x, y, ab = x.cpu(), y.cpu(), ab.cpu()
    u = (x - centre) / half
    free = {"none": [], "shift": [1], "scale": [0], "wave": [0, 1], "full": [0, 1]}[candidate.freedom]
    _, c, d = _r2(candidate, u[None], y[None], ab[None])
    held = torch.cat([ab, c, d])
    varied = [*free, 2, 3]

    def arguments(values: Any) -> tuple[Tensor, Tensor]:
        trial = held.clone()
        trial[varied] = torch.as_tensor(values)
        return trial, trial[0] * u + trial[1]

    def residual(values: Any) -> Any:
        trial, z = arguments(values)
        if candidate.domain is not None and not candidate.domain(z):
            return torch.full_like(y, torch.inf).numpy()  # a step that SciPy takes back
        return torch.nan_to_num(trial[2] * candidate.function(z) + trial[3] - y, nan=torch.inf).numpy()

    def jacobian(values: Any) -> Any:
        trial, z = arguments(values)
        z.requires_grad_()
        with torch.enable_grad():
            f = candidate.function(z)
            slope = torch.autograd.grad(f.sum(), z)[0]
        columns = [trial[2] * slope * u, trial[2] * slope, f.detach(), torch.ones_like(u)]
        return torch.stack([columns[index] for index in varied], 1).nan_to_num().numpy()

    if free:
        start = held[varied].numpy()
        tolerances = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
        with numpy.errstate(all="ignore"):  # steps that overflow are taken back
            solution = least_squares(residual, start, jacobian, x_scale="jac", max_nfev=50, **tolerances)
        ab = arguments(solution.x)[0][:2]
    found = float(ab[0]) / half, float(ab[1]) - float(ab[0]) * centre / half
    neat = _canonical(candidate, *found)
    both_r2, both_c, both_d = _r2(candidate, x[None], y[None], torch.tensor([[found, neat]], dtype=x.dtype))
    # exp(a * x) without its shift may overflow far from 0.
    pick = int(both_r2[0, 1] >= both_r2[0, 0] - 1e-9)
    constants = (*(found, neat)[pick], float(both_c[0, pick]), float(both_d[0, pick]))
    expression = to_expression(candidate, constants)
    return SymbolicFit(candidate.name, expression, constants, float(both_r2[0, pick]), function=candidate)


def _canonical(candidate: SymbolicFunction, a: float, b: float) -> tuple[float, float]:
    """The (a, b) that people would write, among those that differ in c and d only."""
    if candidate.freedom == "none":
        return 1.0, 0.0
    if candidate.freedom == "shift":
        return (1.0, b / a) if a > 0 or candidate.name in _MIRRORED else (-1.0, -b / a)
    if candidate.freedom == "scale":
        return a, 0.0
    if candidate.freedom == "wave":
        if a < 0:
            a, b = -a, -b  # sin and cos: a sign of c
        return a, math.remainder(b, math.pi)
    return (-a, -b) if a < 0 and candidate.name in _MIRRORED else (a, b)


def to_expression(
    candidate: SymbolicFunction | None, parameters: tuple[float, float, float, float], argument: Any = None
) -> Any:
    """c * f(a * argument + b) + d in SymPy; the argument is the symbol x by default."""
    sympy = require_sympy()
    a, b, c, d = (sympy.Float(value) for value in parameters)
    if candidate is None:
        return d
    argument = sympy.Symbol("x") if argument is None else argument
    inner = argument if (float(a), float(b)) == (1.0, 0.0) else a * argument + b
    return c * candidate.expression(inner) + d
