"""Formulas of whole networks: one for every edge, put together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kan_fast.checks import check_iterable
from kan_fast.chunks import CHUNK_ELEMENTS
from kan_fast.nn import KAN
from kan_fast.pruning import _alive
from kan_fast.symbolic.fit import SymbolicFit, fit_edges, to_expression
from kan_fast.symbolic.library import Library, require_sympy
from kan_fast.symbolic.module import SymbolicKAN, SymbolicLayer, r2_score, snap_edges
from kan_fast.traverse import Data, first_rows, network_layers

# Larger expressions are left as they come: SymPy would take minutes.
_MOST_OPERATIONS = 150


@dataclass
class EdgeFormula:
    """One edge of the network: its place, and the formula in the place of its spline."""

    layer: int
    input: int
    output: int
    fit: SymbolicFit


@dataclass
class SymbolicModel:
    """A network as formulas.

    expressions: a SymPy expression for every output. edges: every living edge with its own fit and R2. r2: share of the
    variance of the network's outputs, or of the targets where they were given, that the formulas explain.
    module: the same as a torch module, whose constants train. input_names, output_names: as given.
    """

    expressions: list[Any]
    edges: list[EdgeFormula]
    r2: float
    module: SymbolicKAN = field(repr=False)
    input_names: list[str]
    output_names: list[str]

    def table(self) -> str:
        """Every edge on a line: place, function, R2, formula."""
        lines = ["layer  edge      function   R2          formula"]
        for edge in self.edges:
            place = f"{edge.input}->{edge.output}"
            lines.append(f"{edge.layer:<6} {place:<9} {edge.fit.name:<10} {edge.fit.r2:<11.8f} {_short(edge.fit.expression)}")
        return "\n".join(lines)

    def latex(self, digits: int | None = None) -> list[str]:
        """`name = formula` for every output in LaTeX, constants rounded to `digits` decimals if given."""
        sympy = require_sympy()
        expressions = self.expressions if digits is None else self.rounded(digits)
        return [f"{sympy.latex(sympy.Symbol(name))} = {sympy.latex(e)}" for name, e in zip(self.output_names, expressions)]

    def rounded(self, digits: int = 3) -> list[Any]:
        """The expressions with constants rounded to `digits` decimals; see round_constants."""
        return [round_constants(expression, digits) for expression in self.expressions]

    def refit(self, x: Tensor, y: Tensor, max_steps: int = 100) -> "SymbolicModel":
        """Train the remaining constants on data: x (N, in), y (N, out). A new SymbolicModel that shares `module`.

        Its r2 is that of the data. The edges keep the fits to their splines.
        """
        r2 = self.module.refit(x, y, max_steps)
        expressions = _compose(self.module, self.input_names)
        return SymbolicModel(expressions, self.edges, r2, self.module, self.input_names, self.output_names)


def symbolic_extraction(
    model: KAN,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    *,
    data: Data | None = None,
    targets: Tensor | None = None,
    library: Library | None = None,
    complexity_weight: float = 1.5,
    digits: int | None = None,
    max_samples: int = 2000,
) -> SymbolicModel:
    """The formulas of a whole KAN: every living edge becomes c * f(a * x + b) + d, then the layers are composed.

    input_names, output_names: x_0, x_1, ... and y_0, ... by default. data: inputs (N, in), or an iterable of inputs or
    (input, ...) tuples, of which the first max_samples rows count; without data, points spread evenly at random over the
    first layer's grid ranges. targets (N, out): retrain the constants on (data, targets) after the edges are snapped.
    library, complexity_weight: see fit_symbolic_function. digits: round the constants of the expressions (not of the
    module) to so many decimals.

    All edges of a layer are fitted at once, in groups whose (samples, edges) values stay below the chunk limit. Prune and
    `compact` the model first: the formulas of edges that do nothing are noise.
    """
    if not isinstance(model, KAN):
        raise TypeError(f"model: expected a KAN, got {type(model).__name__}")
    require_sympy()
    layers = network_layers(model)
    inputs = _names("input_names", input_names, "x", layers[0].in_features)
    outputs = _names("output_names", output_names, "y", layers[-1].out_features)
    if targets is not None and not isinstance(data, Tensor):
        raise TypeError(f"data: expected a tensor that goes with targets, got {type(data).__name__}")
    x = _spread(model, max_samples) if data is None else first_rows(data, model, max_samples)
    fits: dict[tuple[int, int, int], SymbolicFit] = {}
    with torch.no_grad():
        hidden = x
        for place, layer in enumerate(layers):
            alive = _alive(layer).nonzero()
            step = max(1, CHUNK_ELEMENTS // max(1, len(hidden) * layer.out_features))
            for start in range(0, layer.in_features, step):
                some = alive[(alive[:, 0] >= start) & (alive[:, 0] < start + step)]
                if not len(some):
                    continue
                values = _edge_values(layer, hidden, some)
                found = fit_edges(hidden[:, some[:, 0]], values, library, complexity_weight)
                fits.update({(place, i, o): fit for (i, o), fit in zip(some.tolist(), found)})
            hidden = layer(hidden)
    module = snap_edges(model, fits)
    edges = [EdgeFormula(*place, fit) for place, fit in fits.items()]
    if targets is None:
        with torch.no_grad():
            r2 = r2_score(module(x), hidden)
    else:
        given = next(iter([data])) if isinstance(data, Tensor) else x
        r2 = module.refit(given.to(x), targets.to(x))
    expressions = _compose(module, inputs)
    if digits is not None:
        expressions = [round_constants(expression, digits) for expression in expressions]
    return SymbolicModel(expressions, edges, r2, module, inputs, outputs)


def round_constants(expression: Any, digits: int = 3) -> Any:
    """A SymPy expression with every number rounded to `digits` decimals.

    Within half a unit of that decimal of an integer, a small fraction (denominators to 4) or a small multiple of pi over
    1, 2, 3, 4 or 6, a number becomes that.
    """
    sympy = require_sympy()
    tolerance = 0.5 * 10.0**-digits

    def rounded(number: Any) -> Any:
        value = float(number)
        for denominator in (1, 2, 3, 4):
            nearest = round(value * denominator)
            if abs(value - nearest / denominator) <= tolerance and (denominator == 1 or abs(nearest) <= 12):
                return sympy.Rational(nearest, denominator)
        for denominator in (1, 2, 3, 4, 6):
            nearest = round(value / math.pi * denominator)
            if nearest and abs(nearest) <= 12 and abs(value - nearest * math.pi / denominator) <= tolerance:
                return sympy.Rational(nearest, denominator) * sympy.pi
        return sympy.Float(round(value, digits))

    numbers = {number: rounded(number) for number in expression.atoms(sympy.Float)}
    result = expression.xreplace(numbers)
    return sympy.simplify(result) if result.count_ops() <= _MOST_OPERATIONS else result


def _compose(module: SymbolicKAN, names: Sequence[str]) -> list[Any]:
    """The expressions of a SymbolicKAN without splines."""
    sympy = require_sympy()
    nodes = [sympy.Symbol(name) for name in names]
    for layer in module.formulas:
        assert isinstance(layer, SymbolicLayer)
        sums = [sympy.Float(value) for value in layer.bias.tolist()]
        for function, (i, o), (a, b, c) in zip(layer.functions, layer.edges.tolist(), layer.constants.tolist()):
            sums[o] += _tidy(to_expression(function, (a, b, c, 0.0), nodes[i]))
        nodes = sums
    return nodes


def _tidy(term: Any) -> Any:
    """Multiply out small powers of sums, and take constants out of exp: what makes c * exp(a + x) and exp(x) look alike."""
    sympy = require_sympy()

    def multiplied_out(power: Any) -> Any:
        terms, exponent = len(power.base.args), int(power.exp)
        return sympy.expand_multinomial(power) if math.comb(terms + exponent - 1, exponent) <= 15 else power

    def split(exponential: Any) -> Any:
        constant, rest = exponential.args[0].as_coeff_Add()
        return sympy.exp(constant) * sympy.exp(rest)

    term = term.replace(lambda e: e.is_Pow and e.base.is_Add and e.exp.is_Integer and e.exp > 1, multiplied_out)
    term = term.replace(lambda e: isinstance(e, sympy.exp) and e.args[0].is_Add, split)
    return sympy.expand_mul(term) if term.count_ops() <= _MOST_OPERATIONS else term


def _edge_values(layer: Any, x: Tensor, edges: Tensor) -> Tensor:
    """Values of some edges, those of neighbouring inputs: x (N, in), edges (M, 2) -> (N, M)."""
    first, last = int(edges[0, 0]), int(edges[-1, 0])
    # A layer of these inputs alone, so that no more edges are computed than are looked at.
    spline, base = layer.masked_weights()
    part = type(layer)(
        last - first + 1,
        layer.out_features,
        layer.grid_size,
        layer.spline_order,
        base_activation=layer.base_activation,
        outside=layer.outside,
        device=spline.device,
        dtype=spline.dtype,
    )
    part.set_grid(layer.grid[first : last + 1], spline[first : last + 1])
    if base is not None:
        part.base_weight.copy_(base[first : last + 1])
    values: Tensor = part.edge_values(x[:, first : last + 1])
    return values[:, edges[:, 0] - first, edges[:, 1]]


def _spread(model: KAN, samples: int) -> Tensor:
    """Points at random over the first layer's ranges, the same every time: (samples, in)."""
    layer = network_layers(model)[0]
    k = layer.spline_order
    low, high = layer.grid[:, k], layer.grid[:, layer.grid.shape[1] - 1 - k]
    unit = torch.rand(samples, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (low + (high - low) * unit.to(low.device)).to(layer.spline_weight.dtype)


def _names(argument: str, names: Sequence[str] | None, letter: str, count: int) -> list[str]:
    if names is not None:
        check_iterable(argument, names, "names")
    result = [f"{letter}_{i}" for i in range(count)] if names is None else list(names)
    if len(result) != count:
        raise ValueError(f"{argument}: expected {count} names, got {len(result)}")
    return result


def _short(expression: Any) -> str:
    return str(expression.xreplace({number: number.n(5) for number in expression.atoms(require_sympy().Float)}))
