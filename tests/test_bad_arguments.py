"""Tools name the argument, what was expected and what came, before they touch the model."""

import copy

import numpy as np
import pytest
import torch

import kan_fast
from kan_fast import KAN, KANLayer

X, Y = torch.rand(16, 2), torch.rand(16, 1)
TRAIN = {"model": KAN([2, 3, 1]), "train_loader": [(X, Y)], "val_loader": None, "epochs": 1, "progress": False}
MODEL_AND_X = {"model": TRAIN["model"], "loader_or_x": X}
REFINE = {"model": TRAIN["model"], "loader": X}
EXPORT = {"model": TRAIN["model"], "example": X}
PRUNE = {"model": TRAIN["model"], "threshold": 0.0, "data": X}
ITERABLE = "expected a tensor, or an iterable of inputs or .input, .... tuples, got"

# Function, sound arguments, the one that is bad, error.
BAD = [
    ("train_kan", TRAIN, "train_loader", None, "expected an iterable of batches .x, y., got None"),
    ("train_kan", TRAIN, "train_loader", 3, "expected an iterable of batches .x, y., got 3"),
    ("train_kan", TRAIN, "val_loader", 3, "expected None or an iterable of batches .x, y., got 3"),
    ("train_kan", TRAIN, "model", None, "expected a module, got None"),
    ("train_kan", TRAIN, "epochs", "3", "expected an int, got '3'"),
    ("train_kan", TRAIN, "epochs", 1.5, "expected an int, got 1.5"),
    ("train_kan", TRAIN, "epochs", X, "expected an int, got Tensor"),
    ("train_kan", TRAIN, "epochs", -1, "expected 0 or more, got -1"),
    ("train_kan", TRAIN, "lr", None, "expected a number, got None"),
    ("train_kan", TRAIN, "lr", float("nan"), "expected 0 or more, got nan"),
    ("train_kan", TRAIN, "weight_decay", "a", "expected a number, got 'a'"),
    ("train_kan", TRAIN, "clip_norm", "a", "expected a number, got 'a'"),
    ("train_kan", TRAIN, "activation_l1", "a", "expected a number, got 'a'"),
    ("train_kan", TRAIN, "loss", 3, "expected a function or None, got 3"),
    ("train_kan", TRAIN, "regularization", X, "expected a function or None, got Tensor"),
    ("train_kan", TRAIN, "callback", 3, "expected a function or None, got 3"),
    ("train_kan", TRAIN, "metrics", 3, "expected a dict of functions or None, got 3"),
    ("train_kan", TRAIN, "autocast", "half", "expected a torch.dtype or None, got 'half'"),
    ("train_kan", TRAIN, "grid_update_every", -1, "expected 0 or more, got -1"),
    ("train_kan", TRAIN, "grid_update_until", "a", "expected an int, got 'a'"),
    ("train_kan", TRAIN, "early_stopping", "a", "expected an int, got 'a'"),
    ("update_grid", MODEL_AND_X, "loader_or_x", None, f"{ITERABLE} None"),
    ("update_grid", MODEL_AND_X, "model", None, "expected a module that holds KANLayers, got None"),
    ("update_grid", MODEL_AND_X, "grid_eps", "a", "expected a number, got 'a'"),
    ("update_grid", MODEL_AND_X, "margin", "a", "expected a number, got 'a'"),
    ("update_grid", MODEL_AND_X, "margin", float("nan"), "expected 0 or more, got nan"),
    ("update_grid", MODEL_AND_X, "max_samples", 2.5, "expected an int, got 2.5"),
    ("update_grid", MODEL_AND_X, "max_samples", 0, "expected 1 or more, got 0"),
    ("update_grid", MODEL_AND_X, "optimizer", "adam", "expected an Optimizer or None, got 'adam'"),
    ("adaptive_grid_refinement", REFINE, "loader", None, f"{ITERABLE} None"),
    ("adaptive_grid_refinement", REFINE, "uniform_share", "a", "expected a number, got 'a'"),
    ("adaptive_grid_refinement", REFINE, "max_samples", "a", "expected an int, got 'a'"),
    ("tune_grid_size", {"input_dim": 2}, "data_complexity", "x", "expected a number, got 'x'"),
    ("tune_grid_size", {"data_complexity": 2}, "input_dim", None, "expected a number, got None"),
    ("prune_kan", PRUNE, "threshold", "a", "expected a number, got 'a'"),
    ("prune_kan", PRUNE, "threshold", None, "expected a number, got None"),
    ("prune_kan", PRUNE, "threshold", X, "expected a number, got Tensor"),
    ("prune_kan", PRUNE, "threshold", np.ones(2), "expected a number, got ndarray"),
    ("prune_kan", PRUNE, "node_threshold", "a", "expected a number, got 'a'"),
    ("prune_kan", PRUNE, "data", 3, f"{ITERABLE} 3"),
    ("prune_kan", PRUNE, "input_names", 3, "expected names, got 3"),
    ("edge_scores", MODEL_AND_X, "model", "model", "expected a module that holds KANLayers, got 'model'"),
    ("advanced_regularization", MODEL_AND_X, "l1_factor", "a", "expected a number, got 'a'"),
    ("advanced_regularization", MODEL_AND_X, "smoothness_factor", "a", "expected a number, got 'a'"),
    ("activation_regularization", MODEL_AND_X, "x", [1.0, 2.0], "expected a tensor, got list"),
    ("activation_regularization", {**MODEL_AND_X, "x": X}, "entropy_factor", None, "expected a number, got None"),
    ("replace_layers", {}, "model", None, "expected a module, got None"),
    ("sparsify", {}, "model", None, "expected a module, got None"),
    ("sparsify", MODEL_AND_X, "max_density", "a", "expected a number, got 'a'"),
    ("from_edges", {"grid": X}, "coefficients", None, "expected a tensor, got None"),
    ("from_edges", {"coefficients": X}, "grid", [1], "expected a tensor, got list"),
    ("export_program", {"example": X}, "model", None, "expected a module, got None"),
    ("available_backends", {}, "device", 3, "expected a torch.device, its name or None, got 3"),
    ("available_backends", {}, "device", "gpu", "expected a name such as 'cpu' or 'cuda:0', got 'gpu'"),
    ("available_backends", {}, "dtype", "float32", "expected a torch.dtype, got 'float32'"),
    ("parallelize_kan", {"model": KAN([2, 1])}, "mesh", None, "expected a DeviceMesh, got None"),
    ("SparseKANLayer", {"in_features": 3, "out_features": 2}, "fan_in", "a", "expected an int, got 'a'"),
    ("SparseKANLayer", {"in_features": 3, "out_features": 2}, "fan_in", 4, "expected 1 to in_features = 3, got 4"),
    ("SparseKANLayer", {"out_features": 2, "fan_in": 1}, "in_features", "a", "expected an int, got 'a'"),
    ("SparseKANLayer", {"in_features": 3, "fan_in": 1}, "out_features", -1, "expected 0 or more, got -1"),
    ("train_kan", TRAIN, "checkpoint_dir", 3, "expected a path, got 3"),
    ("export_onnx", EXPORT, "path", 3, "expected a path, got 3"),
    ("export_aoti", EXPORT, "path", None, "expected a path, got None"),
    ("KANFeedForward", {}, "d_model", "a", "expected an int, got 'a'"),
    ("KANConv2d", {"out_channels": 2, "kernel_size": 3}, "in_channels", "a", "expected an int, got 'a'"),
]


@pytest.mark.parametrize(("function", "sound", "name", "value", "message"), BAD)
def test_arguments_of_tools(function, sound, name, value, message):
    used = {key: given for key, given in sound.items() if key != "loader_or_x" or function == "update_grid"}
    model = sound.get("model")
    before = copy.deepcopy(model.state_dict()) if model is not None else {}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}"):
        getattr(kan_fast, function)(**{**used, name: value})
    assert all(torch.equal(before[key], now) for key, now in (model.state_dict() if model is not None else {}).items())


def test_arguments_of_methods():
    layer, model = KANLayer(2, 3), KAN([2, 1])
    for call, message in (
        (lambda: layer.edge_values([[0.0, 0.0]]), "x: expected a tensor, got list"),
        (lambda: layer.set_grid(None), "grid: expected a tensor, got None"),
        (lambda: model.regularization_loss("a"), "regularization_factor: expected a number, got 'a'"),
        (lambda: KAN.from_layers([layer, 3]), r"layers\[1\]: expected a KANLayer or SparseKANLayer, got 3"),
        (lambda: KAN.from_layers(None), "layers: expected layers, got None"),
        (lambda: model.save(3), "path: expected a path, got 3"),
        (lambda: KAN.load(3), "path: expected a path, got 3"),
        (lambda: kan_fast.KANConv2d(1, 2, 3)(None), "x: expected a tensor, got None"),
        (lambda: kan_fast.train_kan(model, [([0.0], [0.0])]), "loader: expected batches .x, y. of tensors, got list"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            call()


def test_names_of_inputs_and_libraries_of_formulas():
    pytest.importorskip("sympy")
    with pytest.raises(TypeError, match="^input_names: expected names, got 3"):
        kan_fast.symbolic_extraction(KAN([2, 1]), 3)
    with pytest.raises(TypeError, match="^library: expected names and SymbolicFunctions, got 3"):
        kan_fast.fit_symbolic_function(X[:, 0], Y[:, 0], library=3)
    with pytest.raises(TypeError, match="^complexity_weight: expected a number, got 'a'"):
        kan_fast.fit_symbolic_function(X[:, 0], Y[:, 0], complexity_weight="a")
    with pytest.raises(TypeError, match="^complexity_weight: expected a number, got None"):
        kan_fast.symbolic_extraction(KAN([2, 1]), complexity_weight=None)
    for name, points in (("x", ("x", Y[:, 0])), ("y", (X[:, 0], "y"))):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor or numbers, got str"):
            kan_fast.fit_symbolic_function(*points)


def test_a_history_is_expected_where_it_is_plotted():
    pytest.importorskip("matplotlib")
    with pytest.raises(TypeError, match="^history: expected a History, which train_kan returns, got None"):
        kan_fast.plot_history(None)
