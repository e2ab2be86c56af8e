"""Networks whose edges are formulas, or formulas on some edges and splines on the others."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.checks import check_plain
from kan_fast.chunks import CHUNK_ELEMENTS, chunks
from kan_fast.nn import KAN, KANLayer
from kan_fast.symbolic.fit import SymbolicFit
from kan_fast.symbolic.library import SymbolicFunction
from kan_fast.traverse import network_layers

# Layer, input and output of an edge.
Edge = tuple[int, int, int]

# Above this many free constants the refit uses L-BFGS: a Jacobian would be too large.
_MOST_JACOBIAN_COLUMNS = 400


class SymbolicLayer(nn.Module):
    """A layer whose edges are c * f(a * x + b): (..., in) -> (..., out), plus a bias.

    Parameters: constants (M, 3), a row (a, b, c) for each of its M edges; bias (out), which also holds the sum of the
    edges' d. Buffers: edges (M, 2) int64, their (input, output); free (M, 3) of bool: where it is False the constant
    would say again what others say, and gets no gradient. Edges that do not exist are zero.
    """

    edges: Tensor
    free: Tensor

    def __init__(self, in_features: int, out_features: int, fits: Mapping[tuple[int, int], SymbolicFit], bias: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bias = bias.detach().clone()
        rows = []
        for (i, o), fit in fits.items():
            bias[o] += fit.parameters[3]
            if fit.function is not None:
                rows.append((fit.function, i, o, fit.parameters[:3]))
        # Edges of one function stand together: the forward takes them in one operation.
        rows.sort(key=lambda row: row[0].name)
        self.functions = [row[0] for row in rows]
        held = {"none": (False, False, True), "shift": (False, True, True), "scale": (True, False, True)}
        free = [held.get(function.freedom, (True, True, True)) for function in self.functions]
        constants = torch.tensor([row[3] for row in rows], dtype=bias.dtype, device=bias.device)
        self.constants = nn.Parameter(constants.reshape(-1, 3))
        self.bias = nn.Parameter(bias)
        self.register_buffer("edges", torch.tensor([row[1:3] for row in rows], device=bias.device).reshape(-1, 2).long())
        self.register_buffer("free", torch.tensor(free, device=bias.device).reshape(-1, 3).bool())

    def groups(self) -> list[tuple[SymbolicFunction, slice]]:
        """Each function with the rows of `constants` that use it."""
        result: list[tuple[SymbolicFunction, slice]] = []
        for row, function in enumerate(self.functions):
            if result and result[-1][0] is function:
                result[-1] = function, slice(result[-1][1].start, row + 1)
            else:
                result.append((function, slice(row, row + 1)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features)
        if rows.numel() and len(rows) * len(self.functions) > CHUNK_ELEMENTS:
            y = torch.cat([self._rows(rows[part]) for part in chunks(len(rows), len(self.functions))])
        else:
            y = self._rows(rows)
        return y.view(*x.shape[:-1], self.out_features)

    def _rows(self, x: Tensor) -> Tensor:
        a, b, c = torch.where(self.free, self.constants, self.constants.detach()).unbind(1)
        y = self.bias.expand(len(x), -1)
        for function, part in self.groups():
            inputs, outputs = self.edges[part].unbind(1)
            values = c[part] * function.function(a[part] * x[:, inputs] + b[part])
            y = y.index_add(1, outputs, values.to(y.dtype))
        return y


class SymbolicKAN(nn.Module):
    """A KAN with formulas on snapped edges, and splines on the rest: (..., in) -> (..., out).

    `formulas`: one SymbolicLayer per layer. `splines`: for each a KANLayer whose snapped edges are masked, or nn.Identity
    where no spline is left.
    """

    def __init__(self, formulas: list[SymbolicLayer], splines: list[KANLayer | None]) -> None:
        super().__init__()
        self.formulas = nn.ModuleList(formulas)
        self.splines = nn.ModuleList([nn.Identity() if layer is None else layer for layer in splines])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        for formula, spline in zip(self.formulas, self.splines):
            x = formula(x) + spline(x) if isinstance(spline, KANLayer) else formula(x)
        return x

    @property
    def is_symbolic(self) -> bool:
        """No spline is left."""
        return not any(isinstance(spline, KANLayer) for spline in self.splines)

    def refit(self, x: Tensor, y: Tensor, max_steps: int = 100) -> float:
        """Train the remaining constants, and splines if any, on data by least squares: x (N, in), y (N, out) -> R2.

        Levenberg-Marquardt steps of SciPy on up to 400 parameters, L-BFGS beyond that. In place; the values before come
        back if no step was an improvement.
        """
        x, y = x.detach(), y.detach().reshape(len(x), -1)
        free = {
            name: self._free(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad
        }
        count = sum(int(mask.sum()) for mask in free.values())
        before = copy.deepcopy(self.state_dict())
        r2_before = self._r2(x, y)
        if count > _MOST_JACOBIAN_COLUMNS or count * y.numel() > CHUNK_ELEMENTS:
            self._lbfgs(x, y, max_steps)
        else:
            self._least_squares(x, y, free, max_steps)
        r2 = self._r2(x, y)
        if not r2 > r2_before:
            self.load_state_dict(before)
        return max(r2, r2_before)

    def _free(self, name: str, parameter: Tensor) -> Tensor:
        owner, _, field = name.rpartition(".")
        module = self.get_submodule(owner)
        if field == "constants" and isinstance(module, SymbolicLayer):
            return module.free
        mask: Tensor | None = getattr(module, "edge_mask", None)
        if mask is None or field == "bias":
            return torch.ones_like(parameter, dtype=torch.bool)
        return (mask[:, None] if parameter.dim() == 3 else mask).expand_as(parameter)

    @torch.no_grad()
    def _r2(self, x: Tensor, y: Tensor) -> float:
        return r2_score(self(x), y)

    def _least_squares(self, x: Tensor, y: Tensor, free: dict[str, Tensor], max_steps: int) -> None:
        from scipy.optimize import least_squares

        parameters = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        start = torch.cat([parameters[name][mask] for name, mask in free.items()])
        sizes = [int(mask.sum()) for mask in free.values()]
        # Where every number of a parameter is found in (all of it, its free ones): a gather, which torch.func can vectorise.
        places = {}
        for name, mask in free.items():
            rank = mask.flatten().cumsum(0) - 1 + mask.numel()
            places[name] = torch.where(mask.flatten(), rank, torch.arange(mask.numel(), device=rank.device))

        def assembled(flat: Tensor) -> dict[str, Tensor]:
            trial = dict(parameters)
            for name, part in zip(free, flat.split(sizes)):
                held = parameters[name]
                trial[name] = torch.cat([held.flatten(), part])[places[name]].view_as(held)
            return trial

        def residual(flat: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(self, assembled(flat), (x,))
            return (output - y).flatten()

        jacobian = torch.func.jacfwd(residual)

        def to_tensor(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=start.dtype, device=start.device)

        solution = least_squares(
            lambda v: torch.nan_to_num(residual(to_tensor(v)).detach(), nan=torch.inf).double().cpu().numpy(),
            start.double().cpu().numpy(),
            jac=lambda v: jacobian(to_tensor(v)).detach().double().cpu().numpy(),
            x_scale="jac",
            max_nfev=max_steps,
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
        )
        with torch.no_grad():
            solved = assembled(to_tensor(solution.x))
            for name, parameter in self.named_parameters():
                parameter.copy_(solved[name])

    def _lbfgs(self, x: Tensor, y: Tensor, max_steps: int) -> None:
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=max_steps, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (self(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def snap_edges(model: KAN, fits: Mapping[Edge, SymbolicFit]) -> SymbolicKAN:
    """Put formulas in place of some edges of a KAN: a new module, the model stays as it is.

    fits: (layer, input, output) -> the formula, from fit_symbolic_function or symbolic_extraction. The other edges keep
    their splines, which train on together with the formulas' constants; masked edges stay dead. Raises ValueError where the
    bias of a layer that keeps splines is parametrized: the formulas take its place.
    """
    formulas: list[SymbolicLayer] = []
    splines: list[KANLayer | None] = []
    layers = network_layers(model)
    for layer_index, i, o in fits:
        if not 0 <= layer_index < len(layers):
            raise ValueError(f"fits: expected layers 0 to {len(layers) - 1}, got {layer_index}")
        layer = layers[layer_index]
        if not (0 <= i < layer.in_features and 0 <= o < layer.out_features):
            raise ValueError(f"fits: layer {layer_index} has no edge ({i}, {o})")
    for place, layer in enumerate(layers):
        own = {(i, o): fit for (at, i, o), fit in fits.items() if at == place}
        weight = layer.spline_weight
        bias = weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        formulas.append(SymbolicLayer(layer.in_features, layer.out_features, own, bias))
        left = weight.new_ones(layer.in_features, layer.out_features, dtype=torch.bool)
        if layer.edge_mask is not None:
            left &= layer.edge_mask
        for i, o in own:
            left[i, o] = False
        if not bool(left.any()):
            splines.append(None)
            continue
        check_plain(layer, f"layers.{place}", ("bias",))
        rest = copy.deepcopy(layer)
        rest.edge_mask = left
        if rest.bias is not None:  # the formulas' bias has it
            rest.bias.data.zero_()
            rest.bias.requires_grad_(False)
        splines.append(rest)
    return SymbolicKAN(formulas, splines)


def r2_score(prediction: Tensor, target: Tensor) -> float:
    """Share of the variance of target (N, out) about each output's mean that the prediction explains; 1 for constants met.

    Targets are constants where they vary by rounding alone, a few ulp of each, and are met to as much.
    """
    exact = target.double()
    rounding = (4 * torch.finfo(target.dtype).eps * exact).square().sum()
    residual = (prediction.double() - exact).square().sum()
    total = (exact - exact.mean(0)).square().sum()
    if total <= rounding:
        return 1.0 if residual <= 4 * rounding else -float("inf")
    return float(1 - residual / total)
