"""The converters against the packages themselves, where they are installed.

efficient-kan is on no package index: KAN_FAST_EFFICIENT_KAN names the folder that holds its package `efficient_kan`.
"""

import os

import pytest
import torch
from torch import nn

from kan_fast import KAN, KANLayer, from_edges, from_efficient_kan, from_pykan, replace_layers, to_pykan
from kan_fast.nn.interop import PykanOutputs

# Both sides compute in float32: a handful of roundings each on sums of at most 8 inputs and values of order one to ten.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Where two layers follow each other the second magnifies the first one's rounding by its slopes.
CLOSE_DEEP = {"rtol": 1e-4, "atol": 1e-4}

pytestmark = pytest.mark.filterwarnings("ignore")  # what they warn of is their business


@pytest.fixture
def efficient_kan(monkeypatch):
    if folder := os.environ.get("KAN_FAST_EFFICIENT_KAN"):
        monkeypatch.syspath_prepend(folder)
    return pytest.importorskip("efficient_kan")


@pytest.fixture
def pykan(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it writes checkpoints where it runs
    monkeypatch.setenv("MPLBACKEND", "agg")
    return pytest.importorskip("kan")


def points(features, rows=64, reach=2.5):
    x = (torch.rand(rows, features) * 2 - 1) * reach  # the last of 12 knots of [-1, 1] lies at 2.2
    x[0], x[1] = -1.0, 1.0
    return x


def shaken(model):
    """Every trainable parameter drawn anew, so that nothing is a lucky one or zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@pytest.mark.parametrize("options", [{}, {"enable_standalone_scale_spline": False}, {"base_activation": nn.GELU},
                                     {"grid_size": 9, "spline_order": 2, "grid_range": [-2, 1]}], ids=str)
def test_efficient_kan_layer(efficient_kan, options):
    theirs = shaken(efficient_kan.KANLinear(5, 4, **options))
    x = points(5)
    torch.testing.assert_close(from_efficient_kan(theirs)(x), theirs(x), **CLOSE)
    if "base_activation" not in options:
        torch.testing.assert_close(from_efficient_kan(theirs.state_dict())(x), theirs(x), **CLOSE)


def test_efficient_kan_with_updated_grids(efficient_kan):
    theirs = shaken(efficient_kan.KAN([5, 6, 3]))
    theirs(torch.randn(500, 5), update_grid=True)
    assert theirs.layers[0].grid.diff(dim=1).std() > 0.01
    x = points(5)
    ours = from_efficient_kan(theirs)
    assert isinstance(ours, KAN)
    want = theirs(x)
    # Adaptive knots lie close: the local coordinate has an error of eps max|t| / width, and theirs is as large.
    torch.testing.assert_close(ours(x), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double()), rtol=1e-4, atol=1e-4)


def test_replace_efficient_kan(efficient_kan):
    model = nn.Sequential(nn.LayerNorm(5), shaken(efficient_kan.KAN([5, 6, 3])), nn.Linear(3, 3)).eval()
    x = torch.randn(2, 7, 5)
    before = model(x)
    replace_layers(model)
    assert [type(layer) for layer in model[1].layers] == [KANLayer, KANLayer]
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x), before, **CLOSE_DEEP)


@pytest.mark.parametrize("options", [{}, {"num": 8, "k": 2, "grid_range": [-2, 1]}, {"sparse_init": True},
                                     {"base_fun": nn.Identity()}, {"base_fun": torch.sin}], ids=str)
def test_pykan_layer(pykan, options):
    theirs = shaken(pykan.KANLayer(5, 4, **options))
    x = points(5)
    want = theirs(x)[0]
    ours = from_pykan(theirs)
    torch.testing.assert_close(ours(x), want, **CLOSE)
    model = nn.ModuleDict({"kan": theirs})
    replace_layers(model)
    y, *others = model["kan"](x)
    assert isinstance(model["kan"], PykanOutputs) and others == [None] * 3
    torch.testing.assert_close(y, want, **CLOSE)


def multkan(pykan, **options):
    return pykan.KAN(**{"width": [4, 5, 2], "grid": 5, "k": 3, "seed": 0, "auto_save": False, **options})


@pytest.mark.parametrize("options", [{}, {"affine_trainable": True}, {"base_fun": "identity"}, {"base_fun": "zero"},
                                     {"base_fun": torch.tanh}, {"grid": [4, 9], "k": [2, 3]}], ids=str)
def test_multkan(pykan, options):
    theirs = shaken(multkan(pykan, **options))
    x = points(4)
    want = theirs(x)
    ours = from_pykan(theirs)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, want.abs().max().item())}
    torch.testing.assert_close(ours(x), want, **tolerance)
    assert (ours.layers[0].bias is not None) == ("affine_trainable" in options)
    model = nn.Sequential(theirs)
    replace_layers(model)
    assert isinstance(model[0], KAN)
    torch.testing.assert_close(model(x), want, **tolerance)
    if not options:
        torch.testing.assert_close(from_pykan(theirs.state_dict())(x), want, **tolerance)


def test_multkan_with_moved_grids_and_pruned(pykan):
    theirs = multkan(pykan, width=[4, 5, 1], auto_save=True)  # its pruning turns that on, and expects the folder
    data = pykan.create_dataset(lambda x: x[:, [0]] ** 2 + x[:, [1]], n_var=4, train_num=200, test_num=50)
    theirs.fit(data, opt="LBFGS", steps=6, lamb=0.01, log=100)
    theirs(data["train_input"])
    pruned = theirs.prune(node_th=1e-3, edge_th=1e-2)
    x = points(4, reach=1.3)
    want = pruned(x)
    ours = from_pykan(pruned)
    torch.testing.assert_close(ours(x), want, **CLOSE_DEEP)
    pruned.attribute()
    fewer = pruned.prune_input(active_inputs=[1, 0])
    ours = from_pykan(fewer)
    assert ours.input_index.tolist() == [1, 0]
    torch.testing.assert_close(ours(x[:, ours.input_index]), fewer(x), **CLOSE_DEEP)
    with pytest.raises(ValueError, match="has lost inputs"):
        replace_layers(nn.Sequential(fewer))


def test_multkan_without_counterpart(pykan):
    with pytest.raises(ValueError, match=r"layer 0 feeds multiplication nodes \(7 sums become 5 nodes\)"):
        from_pykan(multkan(pykan, width=[4, [3, 2], 2]))
    theirs = multkan(pykan)
    theirs.fix_symbolic(1, 3, 0, "sin", fit_params_bool=False, log_history=False)
    with pytest.raises(ValueError, match=r"layer 1 has active symbolic edges, .*: 3 -> 0 \(sin\); .*unfix_symbolic"):
        from_pykan(theirs)
    theirs.unfix_symbolic(1, 3, 0, log_history=False)
    x = points(4)
    torch.testing.assert_close(from_pykan(theirs)(x), theirs(x), **CLOSE_DEEP)


def test_to_pykan(pykan):
    ours = KAN([4, 5, 2], 6, bias=True)
    shaken(ours).layers[0].edge_mask = torch.rand(4, 5) > 0.3
    theirs = multkan(pykan, width=list(ours.layer_dims), grid=6)
    theirs.load_state_dict(to_pykan(ours))
    x = points(4)
    torch.testing.assert_close(theirs(x), ours(x), **CLOSE_DEEP)
    layer = KANLayer(4, 5, 7, 2, base_activation="identity")
    theirs = pykan.KANLayer(4, 5, num=7, k=2, base_fun=nn.Identity())
    theirs.load_state_dict(to_pykan(layer))
    torch.testing.assert_close(theirs(x)[0], layer(x), **CLOSE)


def test_inkan_by_its_edges():
    """weight (out, in * K + in) holds spline | base, and basis j starts at grid_starts[j]."""
    inkan = pytest.importorskip("inkan")
    theirs = inkan.KANLayer(5, 4, grid_size=6, compile_basis=False, grid_range=(-2.0, 1.0))
    k, bases = 3, 9
    step = 1 / theirs.inv_h
    grid = theirs.grid_starts[0] + step * torch.arange(bases + k + 1)
    spline, base = theirs.weight.split([5 * bases, 5], 1)
    ours = from_edges(spline.view(4, 5, bases).transpose(0, 1), grid, None, base.t(), base_activation="silu")
    x = points(5)
    # Its own error grows with the grid: up to 5e-7 for values of order one at this size.
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_flashkan_by_its_edges():
    flashkan = pytest.importorskip("flashkan")
    theirs = flashkan.KANLayer(5, 4, grid_size=5).double()  # float32 cancels to errors of 4e-5 in its formula
    grid = theirs.grid_starts[0] + 0.4 * torch.arange(12, dtype=torch.float64)
    ours = from_edges(theirs.spline_weight.transpose(0, 1), grid, None, theirs.base_weight.t(), base_activation="silu")
    x = points(5).double()
    # It stores grid_starts and 1/6 in single precision.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_kanditioned_by_its_edges():
    """Linear splines through P control points on a width w, going on with their slope: k = 1, outside="linear"."""
    kanditioned = pytest.importorskip("KANditioned")
    theirs = kanditioned.KANLayer(5, 4, init="random_normal", num_control_points=9, impl="embedding")
    grid = torch.arange(-1, 10) * 0.5 - 2.0
    ours = from_edges(theirs.kan_weight.transpose(1, 2), grid, outside="linear")
    x = points(5, reach=4.0)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
