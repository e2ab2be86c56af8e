"""Fast B-spline Kolmogorov-Arnold layers for PyTorch."""

from kan_fast import functional
from kan_fast.backends import available_backends
from kan_fast.nn import KAN, KANLayer, KolmogorovArnoldNetwork

__all__ = ["KAN", "KANLayer", "KolmogorovArnoldNetwork", "available_backends", "functional"]
