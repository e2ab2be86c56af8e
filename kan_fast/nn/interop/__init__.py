"""Layers of other packages as KANLayers of the same function, and back."""

from kan_fast.nn.interop.edges import from_edges
from kan_fast.nn.interop.efficient_kan import from_efficient_kan
from kan_fast.nn.interop.pykan import from_pykan, to_pykan
from kan_fast.nn.interop.replace import PykanOutputs, replace_layers

__all__ = ["PykanOutputs", "from_edges", "from_efficient_kan", "from_pykan", "replace_layers", "to_pykan"]
