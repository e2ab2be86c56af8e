"""Modules: one layer, networks of them, and what convolutional networks and transformers use."""

from kan_fast.nn.conv import KANConv2d
from kan_fast.nn.feed_forward import KANFeedForward
from kan_fast.nn.layer import KANLayer
from kan_fast.nn.network import KAN, KolmogorovArnoldNetwork

__all__ = ["KAN", "KANConv2d", "KANFeedForward", "KANLayer", "KolmogorovArnoldNetwork"]
