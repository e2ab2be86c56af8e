"""Fast B-spline Kolmogorov-Arnold layers for PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from kan_fast import functional
from kan_fast.backends import available_backends
from kan_fast.nn import KAN, KANConv2d, KANFeedForward, KANLayer, KolmogorovArnoldNetwork

if TYPE_CHECKING:
    from kan_fast.estimators import KANClassifier, KANRegressor
    from kan_fast.export import export_aoti, export_onnx, export_program
    from kan_fast.grid import adaptive_grid_refinement, tune_grid_size, update_grid
    from kan_fast.history import History
    from kan_fast.nn.interop import from_edges, from_efficient_kan, from_pykan, replace_layers, to_pykan
    from kan_fast.nn.sparse import SparseKANLayer, sparsify
    from kan_fast.parallel import ShardInputs, ShardOutputs, parallelize_kan
    from kan_fast.plotting import plot_history, plot_kan, plot_layer
    from kan_fast.pruning import compact, edge_scores, node_scores, prune_kan
    from kan_fast.ranks import on_this_rank
    from kan_fast.regularization import activation_regularization, advanced_regularization
    from kan_fast.symbolic import fit_symbolic_function, symbolic_extraction
    from kan_fast.training import train_kan

# Where the tools live. They load when they are asked for: some need matplotlib or SymPy, the layers need torch alone.
_TOOLS = {
    "History": "history",
    "KANClassifier": "estimators",
    "KANRegressor": "estimators",
    "ShardInputs": "parallel",
    "ShardOutputs": "parallel",
    "SparseKANLayer": "nn.sparse",
    "activation_regularization": "regularization",
    "adaptive_grid_refinement": "grid",
    "advanced_regularization": "regularization",
    "compact": "pruning",
    "edge_scores": "pruning",
    "export_aoti": "export",
    "export_onnx": "export",
    "export_program": "export",
    "fit_symbolic_function": "symbolic",
    "from_edges": "nn.interop",
    "from_efficient_kan": "nn.interop",
    "from_pykan": "nn.interop",
    "node_scores": "pruning",
    "on_this_rank": "ranks",
    "parallelize_kan": "parallel",
    "plot_history": "plotting",
    "plot_kan": "plotting",
    "plot_layer": "plotting",
    "prune_kan": "pruning",
    "replace_layers": "nn.interop",
    "sparsify": "nn.sparse",
    "symbolic_extraction": "symbolic",
    "to_pykan": "nn.interop",
    "train_kan": "training",
    "tune_grid_size": "grid",
    "update_grid": "grid",
}


def __getattr__(name: str) -> Any:
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kan_fast.{_TOOLS[name]}"), name)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "KAN",
    "History",
    "KANClassifier",
    "KANConv2d",
    "KANFeedForward",
    "KANLayer",
    "KANRegressor",
    "KolmogorovArnoldNetwork",
    "ShardInputs",
    "ShardOutputs",
    "SparseKANLayer",
    "activation_regularization",
    "adaptive_grid_refinement",
    "advanced_regularization",
    "available_backends",
    "compact",
    "edge_scores",
    "export_aoti",
    "export_onnx",
    "export_program",
    "fit_symbolic_function",
    "from_edges",
    "from_efficient_kan",
    "from_pykan",
    "functional",
    "node_scores",
    "on_this_rank",
    "parallelize_kan",
    "plot_history",
    "plot_kan",
    "plot_layer",
    "prune_kan",
    "replace_layers",
    "sparsify",
    "symbolic_extraction",
    "to_pykan",
    "train_kan",
    "tune_grid_size",
    "update_grid",
]
