"""Modules: one layer, and networks of them."""

from kan_fast.nn.layer import KANLayer
from kan_fast.nn.network import KAN, KolmogorovArnoldNetwork

__all__ = ["KAN", "KANLayer", "KolmogorovArnoldNetwork"]
