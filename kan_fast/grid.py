"""Grids that follow the data: refinement by knot insertion, moving the knots, and a rule of thumb for the size."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.checks import check_int, check_number, check_plain, expect
from kan_fast.chunks import chunks
from kan_fast.nn import KANLayer
from kan_fast.ranks import laid_out_as, whole
from kan_fast.spline import bases
from kan_fast.traverse import Data, check_data, kan_layers, layer_inputs

# Directions of the least-squares system weaker than this share of the strongest one keep the old function instead of
# chasing the data. The old function's own representation is untouched by it: the ridge acts on the correction only.
_RIDGE = 1e-4
_WRITTEN = ("spline_weight",)


class InputsNotFinite(ValueError):
    """The inputs of a layer, named `layer`, hold NaN or infinity."""

    def __init__(self, layer: str) -> None:
        super().__init__(f"loader_or_x: expected finite inputs of layer {layer!r}, got NaN or infinity")
        self.layer = layer


def tune_grid_size(data_complexity: float, input_dim: int) -> int:
    """Number of grid intervals to start with.

    data_complexity: about the number of samples, above 0 and finite. input_dim: number of inputs, at least 1.
    max(5, min(20, int(2 * ln(data_complexity)))), two fewer (3 at least) for more than 10 inputs, three more (25 at most)
    for fewer than 3.
    """
    check_number("data_complexity", data_complexity)
    check_number("input_dim", input_dim)
    if not 0 < data_complexity < math.inf:
        raise ValueError(f"data_complexity: expected a finite number above 0, got {data_complexity}")
    if input_dim < 1:
        raise ValueError(f"input_dim: expected at least 1, got {input_dim}")
    base = max(5, min(20, int(2 * math.log(data_complexity))))
    if input_dim > 10:
        return max(3, base - 2)
    return min(25, base + 3) if input_dim < 3 else base


def insert_knots(spline_weight: Tensor, grid: Tensor, new_grid: Tensor) -> Tensor:
    """Coefficients of the same splines on a grid that has more knots.

    spline_weight (I, G + k, O), grid (I, G + 2k + 1), new_grid (I, G' + 2k + 1) -> (I, G' + k, O) of spline_weight's dtype.
    Every row of new_grid holds the row of grid, with the same k knots outside the range on either side. The splines agree
    everywhere on the real line: inside the range, in the partial sums around it, and in the zero beyond.

    A coefficient on the new grid is sum_i alpha_i(j) c_i with the discrete B-splines alpha, which obey the recurrence of
    B-splines with the new knot j + r in place of x at step r (E. Cohen, T. Lyche, R. Riesenfeld, "Discrete B-splines and
    subdivision techniques", 1980: the Oslo algorithm). All alpha >= 0 and at most k + 1 of them count.
    """
    num_bases, k = spline_weight.shape[1], grid.shape[1] - spline_weight.shape[1] - 1
    old, new = grid.double(), new_grid.double()
    new_bases = new_grid.shape[1] - k - 1
    if new_bases < num_bases:
        raise ValueError(f"new_grid: expected at least the {grid.shape[1]} knots of grid, got {new_grid.shape[1]}")
    starts = new[:, :new_bases].contiguous()
    span = torch.searchsorted(old, starts, right=True) - 1
    rows = torch.arange(len(old), device=old.device)[:, None]
    knots = {offset: old[rows, (span + offset).clamp(0, old.shape[1] - 1)] for offset in range(1 - k, k + 1)}
    alpha = [torch.ones_like(starts)]
    for r in range(1, k + 1):
        x = new[:, r : r + new_bases]
        ratios = []
        for q in range(r):
            width = knots[q + 1] - knots[q + 1 - r]
            ratios.append(torch.where(width > 0, alpha[q] / width, 0))
        rising = [ratios[q] * (x - knots[q + 1 - r]) for q in range(r)]
        falling = [ratios[q] * (knots[q + 1] - x) for q in range(r)]
        alpha = [falling[0], *(rising[q] + falling[q + 1] for q in range(r - 1)), rising[-1]]
    result = spline_weight.new_empty(len(old), new_bases, spline_weight.shape[2])
    for part in chunks(len(old), new_bases * spline_weight.shape[2]):
        total = torch.zeros_like(result[part], dtype=torch.float64)
        for q in range(k + 1):
            index = span[part] - k + q
            exists = (index >= 0) & (index < num_bases)
            taken = spline_weight[part].double()[rows[: len(index)], index.clamp(0, num_bases - 1)]
            total += torch.where(exists, alpha[q][part], 0)[..., None] * taken
        result[part] = total.to(result.dtype)
    return result


@torch.no_grad()
def adaptive_grid_refinement(
    model: nn.Module,
    loader: Data,
    refinement_factor: int = 2,
    *,
    uniform_share: float = 0.1,
    max_samples: int = 16384,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: str = "carry",
) -> list[int]:
    """Insert knots where each layer's own inputs are dense, without changing what the model computes.

    model: any module with KANLayers. loader: inputs (N, ...), or an iterable of inputs or (input, ...) tuples.
    Each layer goes from G to refinement_factor * G intervals. The old knots stay; the new ones split, again and again, the
    interval whose pieces hold the most of that layer's inputs, evenly. `uniform_share` of the weight goes to the intervals'
    widths instead. Returns the new grid size of every layer.

    The parameters stay the same objects with a new shape, so an optimiser keeps them. Its state has the old shape: pass
    `optimizer`, and choose optimizer_state "carry" (moments go through the same knot insertion as the coefficients) or
    "reset". Where an optimiser keeps more of a spline_weight than moments of its shape and single numbers, as Adafactor's
    row and column sums are, the state of that weight is reset either way, and other parameters' stays. L-BFGS can only be
    reset. Raises ValueError for parametrized spline weights.
    """
    if isinstance(refinement_factor, bool) or not isinstance(refinement_factor, int) or refinement_factor < 2:
        raise ValueError(f"refinement_factor: expected an integer of 2 or more, got {refinement_factor!r}")
    check_data("loader", loader)
    check_int("max_samples", max_samples, 1)
    _check_share("uniform_share", uniform_share, 0.0)
    _check_optimizer(optimizer, optimizer_state)
    for name, layer in kan_layers(model).items():
        check_plain(layer, name, _WRITTEN)
    inputs = layer_inputs(model, loader, max_samples, all_ranks=True)
    sizes = []
    for name, layer in kan_layers(model).items():
        old, k = layer.grid, layer.spline_order
        size = refinement_factor * layer.grid_size
        inner = _split_dense(inputs[name].double(), old[:, k : k + layer.grid_size + 1].double(), size, uniform_share)
        new = torch.cat([old[:, :k], inner.to(old.dtype), old[:, old.shape[1] - k :]], 1)
        # Convex combinations: what is not negative, as squared gradients are, stays so.
        insert = functools.partial(insert_knots, grid=old, new_grid=new)
        _resize(layer, new, insert, insert, optimizer, optimizer_state)
        sizes.append(size)
    return sizes


@torch.no_grad()
def update_grid(
    model: nn.Module,
    loader_or_x: Data,
    *,
    grid_eps: float = 0.02,
    margin: float = 0.01,
    max_samples: int = 16384,
    trainable_only: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: str = "carry",
) -> list[float]:
    """Move the knots of every layer to its data, keep the size, and refit the coefficients.

    model: any module with KANLayers. loader_or_x: inputs (N, ...), or an iterable of inputs or (input, ...) tuples.
    Knots: grid_eps * uniform + (1 - grid_eps) * quantiles of that layer's inputs, 0 < grid_eps <= 1, on their range widened
    by `margin` of its width at both ends; the knots outside go on at the spacing of the nearest interval. An input that is
    constant in the data keeps its width, and is moved only if the constant lies outside.
    Coefficients: least squares on the data in float64, by orthogonal factors; where the data say nothing the spline keeps
    the old function's shape. Returns the relative change ||new - old|| / ||old|| of every layer's output on its data.

    trainable_only: layers whose spline_weight does not require a gradient stay as they are; their change is 0.
    optimizer, optimizer_state: as in adaptive_grid_refinement; moments go through the same refit as the coefficients.
    Layers are taken in order, each with the inputs that the already updated ones before it produce.
    Raises ValueError for parametrized spline weights.
    """
    check_data("loader_or_x", loader_or_x)
    check_int("max_samples", max_samples, 1)
    _check_share("grid_eps", grid_eps, 1e-6)
    check_number("margin", margin, 0)
    _check_optimizer(optimizer, optimizer_state)
    frozen = {name for name, layer in kan_layers(model).items() if trainable_only and not _is_trainable(layer)}
    for name, layer in kan_layers(model).items():
        if name not in frozen:
            check_plain(layer, name, _WRITTEN)
    changes = []
    for name, layer in kan_layers(model).items():
        if name in frozen:
            changes.append(0.0)
            continue
        x = layer_inputs(model, loader_or_x, max_samples, all_ranks=True)[name]
        if not x.isfinite().all():
            raise InputsNotFinite(name)
        before = layer(x).double()
        old = layer.grid
        new = _moved_grid(x.double(), old.double(), layer.spline_order, grid_eps, margin).to(old.dtype)
        refit = _refit_matrix(x.double(), old.double(), new.double(), layer.spline_order, layer.outside)
        # If m' = R m then |m'_i|^2 <= F sum_j R_ij^2 m_j^2: squared gradients mapped by R_ij^2 are never negative and keep
        # the steps of Adam, m / sqrt(v), within sqrt(F) of what they were.
        first, second = functools.partial(_mapped, matrix=refit), functools.partial(_mapped, matrix=refit.square())
        _resize(layer, new, first, second, optimizer, optimizer_state)
        size = before.norm()
        changes.append(float((layer(x).double() - before).norm() / size) if size > 0 else 0.0)
    return changes


def _is_trainable(layer: KANLayer) -> bool:
    with torch.enable_grad():  # or a parametrized weight, which is computed here, would never require a gradient
        return layer.spline_weight.requires_grad


def _mapped(spline_weight: Tensor, matrix: Tensor) -> Tensor:
    return torch.bmm(matrix, spline_weight.double()).to(spline_weight.dtype)


def _split_dense(x: Tensor, inner: Tensor, size: int, uniform_share: float) -> Tensor:
    """Split the intervals of a grid into `size` ones: x (N, I), inner (I, G + 1) -> (I, size + 1), float64."""
    grid_size = inner.shape[1] - 1
    extra = size - grid_size
    width = inner.diff(dim=1)
    share = width / width.sum(1, keepdim=True)
    below = torch.searchsorted(x.t().contiguous().sort(1).values, inner.contiguous())
    counts = below.diff(dim=1).double()
    counts = torch.where(counts.sum(1, keepdim=True) > 0, counts / counts.sum(1, keepdim=True).clamp(min=1), share)
    weight = (1 - uniform_share) * counts + uniform_share * share
    finest = torch.finfo(torch.float32).eps ** 0.5  # of the range: narrower cells lose their meaning in float32
    pieces = torch.arange(1, extra + 1, device=x.device, dtype=x.dtype)
    result = inner.new_empty(len(inner), size + 1)
    for part in chunks(len(inner), grid_size * extra):
        # Highest averages: the m-th cut of an interval is worth its weight over the m pieces it then has.
        worth = weight[part, :, None] / pieces
        too_fine = share[part, :, None] / (pieces + 1) < finest
        worth = torch.where(too_fine, share[part, :, None] / pieces - 2, worth)
        chosen = worth.flatten(1).topk(extra, dim=1).indices // extra
        # Counted in integers: sums along a row of floats are not deterministic on GPUs.
        cuts = torch.zeros_like(below[part, 1:]).scatter_add(1, chosen, torch.ones_like(chosen))
        end = (cuts + 1).cumsum(1)
        index = torch.arange(size, device=x.device).expand(len(end), -1).contiguous()
        interval = torch.searchsorted(end, index, right=True)
        taken = cuts.gather(1, interval) + 1
        position = (index - (end.gather(1, interval) - taken)).to(x.dtype) / taken
        result[part, :size] = inner[part].gather(1, interval) + position * width[part].gather(1, interval)
        result[part, size] = inner[part, grid_size]
    return result


def _moved_grid(x: Tensor, grid: Tensor, spline_order: int, grid_eps: float, margin: float) -> Tensor:
    """Knots of update_grid: x (N, I), grid (I, G + 2k + 1) -> the same shape, float64."""
    k, grid_size = spline_order, grid.shape[1] - 2 * spline_order - 1
    ordered = x.sort(0).values
    low, high = ordered[0], ordered[-1]
    old_low, old_high = grid[:, k], grid[:, k + grid_size]
    half = (old_high - old_low) / 2
    constant = high - low <= 1e-9 * torch.maximum(half, low.abs())
    inside = (low >= old_low) & (high <= old_high)
    centre = torch.where(inside, (old_low + old_high) / 2, low)
    slack = margin * (high - low)
    a = torch.where(constant, centre - half, low - slack)
    b = torch.where(constant, centre + half, high + slack)
    step = torch.linspace(0, 1, grid_size + 1, device=x.device, dtype=x.dtype)
    uniform = a[:, None] + step * (b - a)[:, None]
    # Quantiles by index and linear interpolation: torch.quantile refuses more than 2**24 elements.
    position = step * (len(x) - 1)
    left = position.floor().long().clamp(max=len(x) - 1)
    right = (left + 1).clamp(max=len(x) - 1)
    quantiles = torch.lerp(ordered[left], ordered[right], (position - left)[:, None]).t().clone()
    quantiles[:, 0], quantiles[:, -1] = a, b
    inner = torch.where(constant[:, None], uniform, grid_eps * uniform + (1 - grid_eps) * quantiles)
    # A first basis reaches into the range by one interval only: were its other knots much wider apart, its value there
    # would be tiny, its coefficient undetermined and the spline outside the range wild. Hence the nearest spacing.
    outer = torch.arange(1, k + 1, device=x.device, dtype=x.dtype)
    before = inner[:, :1] - outer.flip(0) * (inner[:, 1] - inner[:, 0])[:, None]
    after = inner[:, -1:] + outer * (inner[:, -1] - inner[:, -2])[:, None]
    return torch.cat([before, inner, after], 1)


def _refit_matrix(x: Tensor, old: Tensor, new: Tensor, spline_order: int, outside: str) -> Tensor:
    """The linear map from coefficients on `old` to coefficients on `new`: (I, G + k, G + k), float64.

    x (N, I), old and new (I, G + 2k + 1), float64. First a fit of the old splines on points spread over every interval of
    the new grid, which has full rank; then the least-squares correction on the data. Both act on bases alone, so the number
    of outputs does not matter: minimising ||B_new T - B_old|| serves all coefficients at once.
    """
    k = spline_order
    grid_size = new.shape[1] - 2 * k - 1
    # Chebyshev points of every interval.
    angle = (torch.arange(k + 2, device=x.device, dtype=x.dtype) + 0.5) * (math.pi / (k + 2))
    place = (1 - angle.cos()) / 2
    inner = new[:, k : k + grid_size + 1]
    points = (inner[:, :-1, None] + place * inner.diff(dim=1)[..., None]).flatten(1)
    identity = torch.eye(grid_size + k, device=x.device, dtype=x.dtype)
    result = identity.repeat(len(new), 1, 1)
    unchanged = (old == new).all(1)
    for part in chunks(len(new), 2 * (grid_size + k) * max(points.shape[1], 4 * (grid_size + k))):
        old_part, new_part = old[part], new[part]
        triangle = _triangle(points[part].t(), old_part, new_part, k, outside)
        result[part] = _solve(triangle, identity.expand(len(old_part), -1, -1) * 0, 0.0)
        triangle = _triangle(x[:, part], old_part, new_part, k, outside)
        result[part] = _solve(triangle, result[part], _RIDGE)
    return torch.where(unchanged[:, None, None], identity, result)


def _triangle(x: Tensor, old: Tensor, new: Tensor, spline_order: int, outside: str) -> Tensor:
    """The triangular factor of [B_new | B_old] over all rows of x (N, I), made in chunks of rows: (I, 2F, 2F)."""
    width = 2 * (new.shape[1] - spline_order - 1)
    triangle = x.new_zeros(len(new), width, width)
    for rows in chunks(len(x), len(new) * width):
        block = [bases(x[rows], grid, spline_order, outside, 0) for grid in (new, old)]
        triangle = torch.linalg.qr(torch.cat([triangle, torch.cat(block, 2).transpose(0, 1)], 1), mode="r").R
    return triangle


def _solve(triangle: Tensor, start: Tensor, ridge: float) -> Tensor:
    """argmin ||B_new T - B_old||^2 + (ridge * strongest singular value)^2 ||T - start||^2: (I, F, F)."""
    num_bases = start.shape[1]
    factor, target = triangle[:, :num_bases, :num_bases], triangle[:, :num_bases, num_bases:]
    u, s, vh = torch.linalg.svd(factor)
    strongest = s[:, :1].clamp(min=torch.finfo(s.dtype).tiny)
    weak = s <= torch.finfo(s.dtype).eps * num_bases * strongest
    gain = torch.where(weak, 0, s / (s * s + (ridge * strongest) ** 2))
    correction = u.mT @ (target - factor @ start)
    solution: Tensor = start + vh.mT @ (gain[..., None] * correction)
    return solution


def _resize(
    layer: KANLayer,
    grid: Tensor,
    convert: Callable[[Tensor], Tensor],
    convert_squares: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
    optimizer_state: str,
) -> None:
    """Give a layer a new grid and converted coefficients, its optimiser the matching state."""
    weight = layer.spline_weight
    old = whole(weight.detach())
    converted = convert(old)
    if converted.shape != old.shape and hasattr(weight, "full_tensor"):
        raise ValueError("model: expected plain weights, whose shape can change, got sharded ones: refine before sharding")
    if optimizer is not None:
        state = optimizer.state.get(weight, {})
        if optimizer_state == "reset":
            state.clear()
        if not all(_can_follow(value, weight) for value in state.values()):
            state.clear()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                full = whole(value)
                changed = convert_squares(full) if bool((full >= 0).all()) else convert(full)
                state[key] = laid_out_as(changed, value)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()
            optimizer._numel_cache = None
    weight.grad = None  # by the old coefficients
    layer.set_grid(grid, laid_out_as(converted, weight))


def _can_follow(value: Any, weight: Tensor) -> bool:
    """Whether an optimiser's value for a weight, one per coefficient or one for all, outlasts a change of coefficients.

    Sums over coefficients, as factored second moments are, and whatever containers hold, do not.
    """
    if isinstance(value, Tensor):
        return value.shape == weight.shape or value.numel() == 1
    return not isinstance(value, dict | list | tuple)


def _check_share(name: str, value: float, least: float) -> None:
    check_number(name, value)
    if not least <= value <= 1:
        raise ValueError(f"{name}: expected a number from {least:g} to 1, got {value}")


def _check_optimizer(optimizer: torch.optim.Optimizer | None, optimizer_state: str) -> None:
    expect(optimizer is None or isinstance(optimizer, torch.optim.Optimizer), "optimizer", "an Optimizer or None", optimizer)
    if optimizer_state not in ("carry", "reset"):
        raise ValueError(f"optimizer_state: expected 'carry' or 'reset', got {optimizer_state!r}")
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer_state == "carry":
        raise ValueError("optimizer_state: expected 'reset' with L-BFGS, whose history has no new coordinates, got 'carry'")
