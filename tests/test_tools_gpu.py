"""The tools on a GPU: what they give there is what the reference gives on the CPU.

Every test runs on the CPU as well, where it compares the preferred backend with the reference.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from twins import close, close_networks, data, fit, pair

import kan_fast.chunks
from kan_fast import (
    KAN,
    KANConv2d,
    KANLayer,
    SparseKANLayer,
    adaptive_grid_refinement,
    advanced_regularization,
    compact,
    prune_kan,
    replace_layers,
    sparsify,
    update_grid,
)
from kan_fast.pruning import edge_scores, node_scores
from kan_fast.regularization import activation_regularization


def test_penalties(device):
    truth, model = pair(device)
    x, _ = data()
    for ours, theirs in (
        (model.regularization_loss(), truth.regularization_loss()),
        (advanced_regularization(model), advanced_regularization(truth)),
        (activation_regularization(model, x.to(device)), activation_regularization(truth, x)),
    ):
        close(ours, theirs)
        gradients = [
            torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
            for value, network in ((ours, model), (theirs, truth))
        ]
        for mine, other in zip(*gradients, strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                close(mine, other)


def test_penalties_in_chunks(device, monkeypatch):
    truth, model = pair(device)
    x, _ = data()
    want = activation_regularization(truth, x)
    monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", 600)
    got = activation_regularization(model, x.to(device))
    close(got, want)
    close(torch.autograd.grad(got, list(model.parameters())), torch.autograd.grad(want, list(truth.parameters())))


@pytest.mark.parametrize("method", ["coefficient", "activation", "attribution"])
def test_scores(device, method):
    truth, model = pair(device, outside="linear", bias=True)
    x, _ = data()
    close(edge_scores(model, x, method), edge_scores(truth, x, method))
    close(node_scores(model, DataLoader(x, 100)), node_scores(truth, x))


def test_pruning_and_what_is_left(device):
    truth, model = pair(device, (4, 6, 5, 2), bias=True)
    for network in (truth, model):
        with torch.no_grad():
            network.layers[0].spline_weight[1] = 0
            network.layers[0].base_weight[1] = 0
            network.layers[0].bias[2] = 0.3
            network.layers[0].spline_weight[:, :, 2] = 0
            network.layers[0].base_weight[:, 2] = 0
    x, _ = data(features=4)
    reports = [
        prune_kan(network, 0.2, data=x, relative=True, node_threshold=1e-3, input_names=list("abcd"))
        for network in (truth, model)
    ]
    want, got = reports
    assert {name: edges.tolist() for name, edges in got.removed.items()} == {
        name: edges.tolist() for name, edges in want.removed.items()
    }
    assert got.unused_inputs == want.unused_inputs == ["b"] and got.dead_nodes == want.dead_nodes
    assert str(got) == str(want)
    close_networks(model, truth, device)
    for drop in (False, True):
        small, theirs = compact(model, drop), compact(truth, drop)
        assert small.layer_dims == theirs.layer_dims
        close(small.state_dict(), theirs.state_dict())
        inputs = x.to(device)
        close(small(inputs[:, small.input_index] if drop else inputs), truth(x))


def test_silencing_splines_alone(device):
    truth, model = pair(device)
    for network in (truth, model):
        prune_kan(network, 0.1, branch="spline")
    close_networks(model, truth, device)


def test_refinement(device):
    truth, model = pair(device)
    x, _ = data()
    for network in (truth, model):
        place = x.to(network.layers[0].grid.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        for refined in (False, True):
            if refined:
                before = network(place)
                assert adaptive_grid_refinement(network, DataLoader(x, 150), optimizer=optimizer) == [10, 10]
                close(network(place), before)
            optimizer.zero_grad()
            network(place).square().sum().backward()
            optimizer.step()
    close_networks(model, truth, device)


def constant_column(x):
    x[:, 1] = 0.25
    return x


def constant_column_outside(x):
    x[:, 1] = 7.0
    return x


def repeated_values(x):
    return (x * 4).round() / 4


def few_samples(x):
    return x[:3]


def one_sample(x):
    return x[:1]


@pytest.mark.parametrize(
    "spoil", [lambda x: x, constant_column, constant_column_outside, repeated_values, few_samples, one_sample]
)
@pytest.mark.parametrize("outside", ["zero", "linear"])
def test_grid_update(device, spoil, outside):
    truth, model = pair(device, outside=outside)
    x = spoil(data()[0])
    changes = [update_grid(network, x.to(network.layers[0].grid.device)) for network in (truth, model)]
    close(*changes)
    close_networks(model, truth, device)
    # A second time: from a grid with cells of very different widths.
    y = 2 * data()[0]
    close(update_grid(model, y), update_grid(truth, y))
    close_networks(model, truth, device, rtol=1e-8, atol=1e-9)


def test_formula_of_an_edge(device):
    pytest.importorskip("sympy")
    pytest.importorskip("scipy")
    from kan_fast import fit_symbolic_function

    layer = pair(device)[1].layers[0]
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    y = 2 * torch.sin(3 * x + 0.4) - 1
    library = ["x", "x^2", "exp", "sin"]
    for found in (
        fit_symbolic_function(x.to(device), y.to(device), library),
        fit_symbolic_function(lambda z: 2 * torch.sin(3 * z + 0.4) - 1, library=library, device=device),
        fit_symbolic_function(x, y.to(device), library),
    ):
        assert found.name == "sin" and found.r2 > 1 - 1e-12
        close(found(x.to(device)), y, rtol=0, atol=1e-9)  # shifted by whole turns, and polished to a gradient of 1e-15
    edge = layer.edge(1, 2)
    with torch.no_grad():
        want = fit_symbolic_function(x, edge(x.to(device)).cpu(), library)
    got = fit_symbolic_function(edge, library=library, samples=200, device=device)
    assert got.name == want.name
    close(got(x), want(x), rtol=0, atol=1e-6)


def test_formulas_of_a_network(device):
    pytest.importorskip("sympy")
    pytest.importorskip("scipy")
    from kan_fast import symbolic_extraction

    truth, model = pair(device, (2, 2, 1), outside="linear", bias=True)
    x = data(300, 2)[0].clamp(-1, 1)
    targets = torch.exp(x[:, :1]) + x[:, 1:] ** 2
    library = ["x", "x^2", "exp"]
    for options in ({}, {"data": x, "targets": targets}):
        want, got = (symbolic_extraction(network, library=library, **options) for network in (truth, model))
        assert [(e.layer, e.input, e.output, e.fit.name) for e in got.edges] == [
            (e.layer, e.input, e.output, e.fit.name) for e in want.edges
        ]
        # Least squares stop at steps of 1e-15, relative; constants that nearly say the same twice have conditions up to 1e8.
        assert got.r2 == pytest.approx(want.r2, abs=1e-7)
        assert {value.device.type for value in got.module.state_dict().values()} == {device}
        with torch.no_grad():
            close(got.module(x.to(device)), want.module(x), rtol=0, atol=1e-5)
    assert got.refit(x.to(device), targets.to(device)).r2 >= got.r2 > 0.99
    assert got.latex() and got.table()


def test_pictures(device):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kan_fast import plot_history, plot_kan, plot_layer

    truth, model = pair(device)
    model.layers[0].edge_mask = torch.rand(3, 4, device=device) < 2
    x, _ = data()
    for options in ((), (x,)):
        drawn = []
        for network in (truth, model):
            axes = [plot_kan(network, *options), *plot_layer(network.layers[0], *options).axes]
            drawn.append([torch.tensor(line.get_xydata(), dtype=torch.float64) for ax in axes for line in ax.lines])
        close(drawn[1], drawn[0])
    assert plot_layer(model.layers[0], x.to(device)).axes
    assert plot_history(fit(pair(device, (3, 4, 1))[1], 2)).lines
    plt.close("all")


def generator_states():
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_estimators(device, optimizer):
    pytest.importorskip("sklearn")
    pytest.importorskip("sympy")
    from kan_fast import KANClassifier, KANRegressor

    x, y = (tensor.numpy() for tensor in data())
    options = {"hidden_layers": (), "random_state": 0, "device": device, "optimizer": optimizer, "dtype": "float64"}
    options |= {"epochs": 60, "lr": 0.05} if optimizer == "adamw" else {"epochs": 5, "lr": 1.0}
    before = generator_states()
    model = KANRegressor(grid_size=8, early_stopping=50, **options).fit(x, y[:, 0])
    assert all(map(torch.equal, before, generator_states()))
    # A cubic spline of 8 intervals on [-1.6, 1.6] errs by 5/384 h^4 max|f''''| = 0.005; y's spread is 0.7.
    assert model.score(x, y[:, 0]) > 0.98
    assert model.model_.layers[0].grid.device.type == device
    assert model.feature_importances_.shape == (3,) and model.feature_importances_[2] < 0.1
    again = KANRegressor(grid_size=8, early_stopping=50, **options).fit(x, y[:, 0])
    assert (again.predict(x) == model.predict(x)).all()
    labels = KANClassifier(**options).fit(x, y[:, 0] > 0.2)
    assert labels.score(x, y[:, 0] > 0.2) > 0.95
    if optimizer == "lbfgs":
        assert len(labels.formula_) == 2


def test_sparse_layers(device):
    torch.manual_seed(0)
    dense = KANLayer(6, 5, bias=True, dtype=torch.float64, outside="linear", backend="reference")
    dense.edge_mask = torch.rand(6, 5) < 0.5
    layer = SparseKANLayer.from_dense(copy.deepcopy(dense).to(device))
    x = data(200, 6)[0]
    results = []
    for network, leaf in ((layer, x.to(device)), (dense, x.clone())):
        y = network(leaf.requires_grad_())
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), leaf)
        results.append((y, dx, second))
    close(*results)
    again = [layer(x.to(device)) for _ in range(3)]
    assert all(torch.equal(again[0], y) for y in again)
    close(layer.to_dense()(x.to(device)), results[1][0])
    moved = SparseKANLayer(6, 5, 2, dtype=torch.float64)
    close(copy.deepcopy(moved).to(device)(x.to(device)), moved(x))
    made = SparseKANLayer(6, 5, 2, device=device)
    assert {t.device.type for t in [*made.parameters(), *made.buffers()]} == {device}
    narrow = made.bfloat16()
    assert narrow(x.to(device, torch.bfloat16)).dtype == torch.bfloat16
    given = SparseKANLayer(6, 5, edges=made.edges)  # edges there, weights on the default device
    assert {t.device.type for t in [*given.parameters(), *given.buffers()]} == {"cpu"}
    close(given(x.float()), given.to(device)(x.to(device, torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [None, 500], ids=["at once", "in parts"])
@pytest.mark.parametrize("arguments", [{"padding": 1, "groups": 2}, {"stride": 2, "dilation": 2, "padding_mode": "reflect"}])
def test_convolution(device, arguments, elements, monkeypatch):
    if elements:
        monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "outside": "linear", **arguments}
    truth = KANConv2d(4, 6, 3, backend="reference", **options)
    conv = KANConv2d(4, 6, 3, device=device, **options)
    conv.load_state_dict(truth.state_dict())
    image = data(2, 4 * 9 * 8)[0].view(2, 4, 9, 8)
    results = []
    for network, x in ((conv, image.to(device)), (truth, image.clone())):
        y = network(x.requires_grad_())
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])))
    close(*results)
    prune_kan(conv, 0.2, relative=True)
    changes = update_grid(conv, image.to(device))
    assert max(changes) < 1


def test_files_know_no_device(device, tmp_path):
    truth, model = pair(device)
    prune_kan(model, 0.5, relative=True)
    small = compact(model, drop_inputs=True)
    sparse = copy.deepcopy(model)
    assert sparsify(sparse, 1.0)
    for network, name in ((model, "model"), (small, "small"), (sparse, "sparse")):
        network.save(tmp_path / name)
        for place in ("cpu", device):
            back = KAN.load(tmp_path / name, device=place)
            state = back.state_dict()
            assert {value.device.type for value in state.values()} == {place}
            for key, value in network.state_dict().items():
                assert torch.equal(state[key].cpu(), value.cpu()), key
    torch.save(model.state_dict(), tmp_path / "state.pt")
    truth.load_state_dict(torch.load(tmp_path / "state.pt", map_location=device, weights_only=True))
    close_networks(model, truth, device)


def test_other_layers_replaced_on_the_device(device):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = copy.deepcopy(plain).to(device)
    replace_layers(model, linear=True)
    assert isinstance(model[0], KANLayer) and {p.device.type for p in model.parameters()} == {device}
    x, _ = data()
    close(model(x.to(device)), plain(x))
