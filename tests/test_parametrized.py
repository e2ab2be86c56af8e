"""Weights that torch.nn.utils computes from others: layers use and train them, tools that would write into them refuse."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import kan_fast
from kan_fast import KAN, KANLayer, SparseKANLayer
from kan_fast.symbolic.fit import SymbolicFit
from kan_fast.symbolic.library import default_library
from kan_fast.symbolic.module import snap_edges

X = torch.rand(30, 2) * 2 - 1
WEIGHTS = ("spline_weight", "base_weight", "bias")
REMOVE = r"torch.nn.utils.parametrize.remove_parametrizations\(layer, '{}'\) makes it one"


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


def model_with(weight, place=1, **options):
    """A network of two layers, one of which has a parametrized weight."""
    model = KAN([2, 3, 1], bias=True, **options)
    nn.utils.parametrize.register_parametrization(model.layers[place], weight, Halved())
    return model


def state_of(model):
    """Everything that a tool could change, shapes, masks and classes of layers included."""
    kinds = [type(module) for module in model.modules()]
    return kinds, {name: value.clone() for name, value in model.state_dict().items()}


def expect_refusal(call, model, weight, name="layers.1."):
    kinds, before = state_of(model)
    message = f"^{name}{weight}: expected a plain parameter, got a parametrized one: {REMOVE.format(weight)}$"
    with pytest.raises(ValueError, match=message):
        call(model)
    after_kinds, after = state_of(model)
    assert after_kinds == kinds and after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


WRITE_SPLINES = {
    "update_grid": lambda model: kan_fast.update_grid(model, 3 * X),
    "update_grid_of_trainable": lambda model: kan_fast.update_grid(model, 3 * X, trainable_only=True),
    "adaptive_grid_refinement": lambda model: kan_fast.adaptive_grid_refinement(model, X),
    "prune_kan": lambda model: kan_fast.prune_kan(model, 1e9, branch="spline"),
}
TAKE_ALL = {
    "reset_parameters": KAN.reset_parameters,
    "compact": kan_fast.compact,
    "save": lambda model: model.save("never written"),
}


@pytest.mark.parametrize("tool", WRITE_SPLINES)
def test_tools_that_write_splines(tool):
    expect_refusal(WRITE_SPLINES[tool], model_with("spline_weight"), "spline_weight")
    WRITE_SPLINES[tool](model_with("bias"))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("tool", TAKE_ALL)
def test_tools_that_take_all_weights(tool, weight):
    expect_refusal(TAKE_ALL[tool], model_with(weight), weight)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_methods_of_layers(weight):
    layer = model_with(weight).layers[1]
    expect_refusal(lambda layer: layer.reset_parameters(), layer, weight, "")
    expect_refusal(SparseKANLayer.from_dense, layer, weight, "")
    sparse = SparseKANLayer(3, 2, 2, bias=True)
    nn.utils.parametrize.register_parametrization(sparse, weight, Halved())
    expect_refusal(lambda layer: layer.reset_parameters(), sparse, weight, "")
    expect_refusal(lambda layer: layer.to_dense(), sparse, weight, "")


@pytest.mark.parametrize("grid_size", [5, 10])
def test_set_grid(grid_size):
    layer = model_with("spline_weight").layers[1]
    grid = kan_fast.spline.uniform_grid(3, grid_size, 3, (-2, 2))
    weight = torch.randn(3, grid_size + 3, 1)
    expect_refusal(lambda layer: layer.set_grid(grid, weight), layer, "spline_weight", "")
    if grid_size == 5:
        layer.set_grid(grid)  # writes no weight
        assert torch.equal(layer.grid, grid)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_tensor_parallel_layers(weight):
    parallel = pytest.importorskip("kan_fast.parallel")
    expect_refusal(lambda layer: parallel.ShardOutputs()._apply(layer, None), model_with(weight).layers[1], weight, "")


def test_sparsify_leaves_all_layers_or_none():
    model = model_with("bias")
    for layer in model.layers:
        layer.edge_mask = torch.zeros(layer.in_features, layer.out_features, dtype=torch.bool)
        layer.edge_mask[0, 0] = True
    expect_refusal(lambda model: kan_fast.sparsify(model, 0.5), model, "bias")
    assert kan_fast.sparsify(model, 0.2) == ["layers.0"]


def test_snapped_edges_take_the_place_of_the_bias():
    fit = SymbolicFit("sin", None, (1.0, 0.0, 1.0, 0.0), 1.0, function=default_library()["sin"])
    expect_refusal(lambda model: snap_edges(model, {(1, 0, 0): fit}), model_with("bias"), "bias")
    model = model_with("spline_weight").double()
    module = snap_edges(model, {})
    torch.testing.assert_close(module(X.double()), model(X.double()))


def test_a_frozen_layer_is_passed_over():
    model = model_with("spline_weight")
    model.layers[1].parametrizations.spline_weight.original.requires_grad_(False)
    changes = kan_fast.update_grid(model, 3 * X, trainable_only=True)
    assert changes[0] > 0 and changes[1] == 0


@pytest.mark.parametrize("how", ["prune", "weight_norm"])
def test_weights_of_hooks(how):
    model = KAN([2, 3, 1])
    layer = model.layers[0]
    if how == "prune":
        prune.l1_unstructured(layer, "spline_weight", 0.5)
    else:
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(layer, "spline_weight")
    message = r"^layers.0.spline_weight: expected a plain parameter, got one that a hook computes .*prune.remove\(layer, 'spl"
    for call in (*WRITE_SPLINES.values(), *TAKE_ALL.values()):
        with pytest.raises(ValueError, match=message):
            call(model)
    if how == "prune":
        prune.remove(layer, "spline_weight")
    else:
        nn.utils.remove_weight_norm(layer, "spline_weight")
    kan_fast.update_grid(model, X)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_layers_train(kind):
    layer = KANLayer(2, 3, bias=True) if kind == "dense" else SparseKANLayer(2, 3, 1, bias=True)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for weight in WEIGHTS:
            getattr(twin, weight).div_(2)
    for weight in WEIGHTS:
        nn.utils.parametrize.register_parametrization(layer, weight, Halved())
        getattr(layer.parametrizations, weight).original.data.div_(2)
    torch.testing.assert_close(layer(X), twin(X))
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((layer(X) - X.sum(1, keepdim=True)).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    for weight in WEIGHTS:
        nn.utils.parametrize.remove_parametrizations(layer, weight)
    layer.reset_parameters()


def test_pruning_masks_edges():
    model = model_with("spline_weight")
    report = kan_fast.prune_kan(model, 0.5, relative=True)
    assert len(report.removed["layers.0"])
    assert model(X).isfinite().all()


def test_a_mask_comes_with_the_checkpoint():
    model, fresh, masked = model_with("spline_weight"), model_with("spline_weight"), model_with("spline_weight")
    kan_fast.prune_kan(model, 0.5, relative=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    kan_fast.prune_kan(masked, 0.5, relative=True)
    plain = model_with("spline_weight")
    masked.load_state_dict(plain.state_dict())
    assert torch.equal(masked(X), plain(X))
