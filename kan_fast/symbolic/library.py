"""The candidates: for each a function of a tensor, the same in SymPy, its complexity, and where it may be used."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kan_fast.checks import check_iterable

# What of (a, b) in c * f(a * x + b) + d matters beside c and d:
# "none": neither (f = x); "shift": b, with a = 1 or -1 (powers, log: a scale comes out of f);
# "scale": a (exp: a shift comes out of f); "wave": both, and b is a phase; "full": both, and -b / a is a place on the axis.
FREEDOMS = ("none", "shift", "scale", "wave", "full")


@dataclass(frozen=True)
class SymbolicFunction:
    """A candidate f for c * f(a * x + b) + d.

    function: elementwise on a float64 tensor, differentiable. expression: the same of a SymPy expression.
    complexity: what the choice charges for it, about the number of symbols and free constants. freedom: see FREEDOMS.
    domain(z): from z (..., N), the arguments of all samples, to (...) of bool: f is smooth on all that lies between them.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    expression: Callable[[Any], Any]
    complexity: float
    freedom: str = "full"
    domain: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.freedom not in FREEDOMS:
            raise ValueError(f"freedom: expected one of {', '.join(FREEDOMS)}, got {self.freedom!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Built-in candidates are pickled by name: their functions are lambdas."""
        if _BY_NAME.get(self.name) is self:
            return _builtin, (self.name,)
        return SymbolicFunction, (self.name, self.function, self.expression, self.complexity, self.freedom, self.domain)


def require_sympy() -> ModuleType:
    """SymPy, or an ImportError that says how to get it."""
    try:
        import sympy
    except ImportError as error:
        raise ImportError("symbolic regression needs SymPy: pip install 'kan_fast[symbolic]'") from error
    module: ModuleType = sympy
    return module


def _sympy(name: str) -> Callable[[Any], Any]:
    return lambda z: getattr(require_sympy(), name)(z)


# A hair away from the singularity, relative to how far the samples reach.
_MARGIN = 1e-3


def _positive(z: Tensor) -> Tensor:
    return z.amin(-1) > _MARGIN * z.amax(-1)


def _not_negative(z: Tensor) -> Tensor:
    return z.amin(-1) >= 0


def _one_sign(z: Tensor) -> Tensor:
    return _positive(z) | _positive(-z)


def _inside_one(z: Tensor) -> Tensor:
    return z.abs().amax(-1) <= 1


def _well_inside_one(z: Tensor) -> Tensor:
    return z.abs().amax(-1) < 1 - _MARGIN


def _one_branch(z: Tensor) -> Tensor:
    """No pole of tan between the samples."""
    low, high = z.amin(-1) / math.pi + 0.5, z.amax(-1) / math.pi + 0.5
    return (low.floor() == high.floor()) & (low - low.floor() > _MARGIN) & (high - high.floor() < 1 - _MARGIN)


def _power(exponent: int) -> Callable[[Tensor], Tensor]:
    return lambda z: z**exponent


_FUNCTIONS = (
    SymbolicFunction("x", lambda z: z, lambda z: z, 1, "none"),
    SymbolicFunction("x^2", _power(2), lambda z: z**2, 2, "shift"),
    SymbolicFunction("x^3", _power(3), lambda z: z**3, 3, "shift"),
    SymbolicFunction("x^4", _power(4), lambda z: z**4, 4, "shift"),
    SymbolicFunction("x^5", _power(5), lambda z: z**5, 5, "shift"),
    SymbolicFunction("1/x", _power(-1), lambda z: 1 / z, 2, "shift", _one_sign),
    SymbolicFunction("1/x^2", _power(-2), lambda z: 1 / z**2, 3, "shift", _one_sign),
    SymbolicFunction("1/x^3", _power(-3), lambda z: 1 / z**3, 4, "shift", _one_sign),
    SymbolicFunction("1/x^4", _power(-4), lambda z: 1 / z**4, 5, "shift", _one_sign),
    SymbolicFunction("sqrt", torch.sqrt, _sympy("sqrt"), 2, "shift", _not_negative),
    SymbolicFunction("x^1.5", lambda z: z * z.sqrt(), lambda z: z * _sympy("sqrt")(z), 4, "shift", _not_negative),
    SymbolicFunction("1/sqrt", torch.rsqrt, lambda z: 1 / _sympy("sqrt")(z), 3, "shift", _positive),
    SymbolicFunction("log", torch.log, _sympy("log"), 2, "shift", _positive),
    SymbolicFunction("abs", torch.abs, _sympy("Abs"), 3, "shift"),
    SymbolicFunction("exp", torch.exp, _sympy("exp"), 2, "scale"),
    SymbolicFunction("sin", torch.sin, _sympy("sin"), 3, "wave"),
    SymbolicFunction("cos", torch.cos, _sympy("cos"), 3, "wave"),
    SymbolicFunction("tan", torch.tan, _sympy("tan"), 4, "full", _one_branch),
    SymbolicFunction("tanh", torch.tanh, _sympy("tanh"), 4),
    SymbolicFunction("sigmoid", torch.sigmoid, lambda z: 1 / (1 + _sympy("exp")(-z)), 5),
    SymbolicFunction("gaussian", lambda z: torch.exp(-z * z), lambda z: _sympy("exp")(-(z**2)), 4),
    SymbolicFunction("arctan", torch.arctan, _sympy("atan"), 4),
    SymbolicFunction("arcsin", torch.arcsin, _sympy("asin"), 5, "full", _inside_one),
    SymbolicFunction("arccos", torch.arccos, _sympy("acos"), 5, "full", _inside_one),
    SymbolicFunction("arctanh", torch.arctanh, _sympy("atanh"), 5, "full", _well_inside_one),
    SymbolicFunction("sinh", torch.sinh, _sympy("sinh"), 5),
    SymbolicFunction("cosh", torch.cosh, _sympy("cosh"), 5),
    SymbolicFunction("erf", torch.erf, _sympy("erf"), 6),
    SymbolicFunction("softplus", torch.nn.functional.softplus, lambda z: _sympy("log")(1 + _sympy("exp")(z)), 6),
)


_BY_NAME = {function.name: function for function in _FUNCTIONS}


def default_library() -> dict[str, SymbolicFunction]:
    """The built-in candidates by name: a fresh dict, to add to or to take from."""
    return dict(_BY_NAME)


def _builtin(name: str) -> SymbolicFunction:
    return _BY_NAME[name]


Library = Iterable[str | SymbolicFunction]


def resolve_library(library: Library | None) -> list[SymbolicFunction]:
    """Names of built-in candidates and SymbolicFunctions of the user's own, mixed; None means all built-in ones."""
    known = default_library()
    if library is None:
        return list(known.values())
    if isinstance(library, dict):
        library = library.values()
    check_iterable("library", library, "names and SymbolicFunctions")
    chosen = []
    for entry in library:
        if isinstance(entry, str):
            if entry not in known:
                raise ValueError(f"library: expected SymbolicFunctions or names among {', '.join(known)}, got {entry!r}")
            entry = known[entry]
        chosen.append(entry)
    if not chosen:
        raise ValueError("library: expected at least one candidate, got none")
    return chosen
