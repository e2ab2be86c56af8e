"""Independent truth in float64: SciPy's B-splines, autograd's derivatives of the activations, NumPy's sums."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from torch import Tensor

Array = NDArray[np.float64]

ACTIVATION_FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "identity": lambda x: 1.0 * x,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


def activation(name: str, x: Array, n: int) -> Array:
    """n-th derivative at x, by differentiating torch's own function n times."""
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = ACTIVATION_FUNCTIONS[name](value)
    for _ in range(n):
        if not result.requires_grad:  # constant by now
            return np.zeros_like(x)
        (result,) = torch.autograd.grad(result.sum(), value, create_graph=True)
    return result.detach().numpy()


def bases(x: Array, knots: Array, k: int, outside: str, n: int) -> Array:
    """n-th derivative of every basis of one input: x (B), knots (G + 2k + 1) -> (B, G + k)."""
    num_bases = len(knots) - k - 1
    order = min(n, k + 1)  # 0 from there on; further on SciPy 1.15, the last for Python 3.10, writes beyond its memory
    if outside == "zero":
        # k more knots on either side make the range of SciPy's spline that of all our knots.
        step = np.arange(1, k + 1)
        padded = np.concatenate([knots[0] - step[::-1], knots, knots[-1] + step])
        values = BSpline(padded, np.eye(len(padded) - k - 1), k, extrapolate=False)(x, nu=order)[:, k : k + num_bases]
        held = (x >= knots[0]) & (x < knots[-1])  # half-open; SciPy closes the last interval
        return np.where(held[:, None], values, 0.0)
    a, b = knots[k], knots[num_bases]
    spline = BSpline(knots, np.eye(num_bases), k)
    nearest = np.clip(x, a, b)
    beyond = (x != nearest)[:, None]
    if outside == "clamp":
        return np.where(beyond, 0.0, spline(nearest, nu=order)) if n else spline(nearest)
    if n == 0:
        return spline(nearest) + np.where(beyond, spline(nearest, nu=1) * (x - nearest)[:, None], 0.0)
    return np.where(beyond & (n > 1), 0.0, spline(nearest, nu=order))


def features(x: Tensor, grid: Tensor, k: int, activation_name: str, outside: str, n: int) -> tuple[Array | None, Array]:
    """(base (B, I) or None, spline (B, I, G + k)) of float64 copies of x (B, I) and grid (I, G + 2k + 1)."""
    points, knots = x.detach().double().cpu().numpy(), grid.detach().double().cpu().numpy()
    num_bases = grid.shape[1] - k - 1
    spline = np.zeros((*points.shape, num_bases))
    for i in range(points.shape[1]):
        spline[:, i] = bases(points[:, i], knots[i], k, outside, n)
    return None if activation_name == "none" else activation(activation_name, points, n), spline


def doubled(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def contract_output(x, scale, spline_weight, base_weight, grid, activation_name, outside, n, magnitude=False):
    """(B, O); with `magnitude` the sum of the absolute values of the terms, which rounding errors are measured by."""
    base, spline = features(x, grid, grid.shape[1] - spline_weight.shape[1] - 1, activation_name, outside, n)
    tensors = [doubled(scale), doubled(spline_weight), doubled(base_weight), base, spline]
    scale, spline_weight, base_weight, base, spline = (_absolute(t) for t in tensors) if magnitude else tensors
    scale = 1.0 if scale is None else scale[..., None]
    y = np.einsum("bif,ifo->bo", spline * scale, spline_weight)
    return y if base is None else y + (base * np.squeeze(scale, -1) if np.ndim(scale) else base) @ base_weight


def contract_input(x, spline_weight, base_weight, g, grid, activation_name, outside, n, magnitude=False):
    """(B, I)"""
    base, spline = features(x, grid, grid.shape[1] - spline_weight.shape[1] - 1, activation_name, outside, n)
    tensors = [doubled(spline_weight), doubled(base_weight), doubled(g), base, spline]
    spline_weight, base_weight, g, base, spline = (_absolute(t) for t in tensors) if magnitude else tensors
    dx = np.einsum("bif,ifo,bo->bi", spline, spline_weight, g, optimize=True)
    return dx if base is None else dx + base * (g @ base_weight.T)


def contract_weight(x, scale, g, grid, k, activation_name, outside, n, magnitude=False):
    """(I, G + k, O) and (I, O), or (0, O)"""
    base, spline = features(x, grid, k, activation_name, outside, n)
    tensors = [doubled(scale), doubled(g), base, spline]
    scale, g, base, spline = (_absolute(t) for t in tensors) if magnitude else tensors
    scale = np.ones(x.shape) if scale is None else scale
    d_spline = np.einsum("bif,bo->ifo", spline * scale[..., None], g)
    return d_spline, np.zeros((0, g.shape[1])) if base is None else np.einsum("bi,bo->io", base * scale, g)


def contract_backward(x, spline_weight, base_weight, g, grid, activation_name, outside, n, magnitude=False):
    """contract_input of order n + 1, contract_weight of order n"""
    k = grid.shape[1] - spline_weight.shape[1] - 1
    dx = contract_input(x, spline_weight, base_weight, g, grid, activation_name, outside, n + 1, magnitude)
    return dx, *contract_weight(x, None, g, grid, k, activation_name, outside, n, magnitude)


def _absolute(array: Array | None) -> Array | None:
    return None if array is None else np.abs(array)
