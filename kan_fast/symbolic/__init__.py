"""From curves to formulas: candidates, fits of single functions, and whole networks."""

from kan_fast.symbolic.extraction import SymbolicModel, symbolic_extraction
from kan_fast.symbolic.fit import SymbolicFit, fit_symbolic_function
from kan_fast.symbolic.library import SymbolicFunction, default_library
from kan_fast.symbolic.module import SymbolicKAN, SymbolicLayer, snap_edges

__all__ = [
    "SymbolicFit",
    "SymbolicFunction",
    "SymbolicKAN",
    "SymbolicLayer",
    "SymbolicModel",
    "default_library",
    "fit_symbolic_function",
    "snap_edges",
    "symbolic_extraction",
]
