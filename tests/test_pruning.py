import copy

import numpy as np
import pytest
import torch

from kan_fast import KAN, KANLayer
from kan_fast.pruning import compact, edge_scores, node_scores, prune_kan
from kan_fast.regularization import activation_regularization


def make_model(dims=(3, 4, 2), **options):
    torch.manual_seed(0)
    return KAN(dims, dtype=torch.float64, **options)


def edge_table(layer, x):
    """Every edge's values from its own function, one at a time: (N, in, out)."""
    with torch.no_grad():
        values = [layer.edge(i, o)(x[:, i]) for i in range(layer.in_features) for o in range(layer.out_features)]
    return torch.stack(values, 1).unflatten(1, (layer.in_features, layer.out_features))


def test_coefficient_score():
    model = make_model()
    layer = model.layers[0]
    score = edge_scores(model)["layers.0"]
    c, w = layer.spline_weight[1, :, 2].detach().numpy(), float(layer.base_weight[1, 2].detach())
    assert float(score[1, 2]) == pytest.approx(np.sqrt(np.mean(c**2) + w**2), rel=1e-14)
    spline_only = edge_scores(model, include_base=False)["layers.0"]
    assert float(spline_only[1, 2]) == pytest.approx(np.sqrt(np.mean(c**2)), rel=1e-14)


@pytest.mark.parametrize("outside", ["zero", "linear"])
def test_activation_and_attribution_scores(outside):
    model = make_model(outside=outside, bias=True)
    x = torch.randn(700, 3, dtype=torch.float64)
    first = edge_table(model.layers[0], x)
    hidden = model.layers[0](x).detach()
    second = edge_table(model.layers[1], hidden)
    scores = edge_scores(model, [(x[:300], 0), (x[300:], 0)])
    # Second moments by Gram matrices against direct sums, both in float64: some hundred eps before the root.
    torch.testing.assert_close(scores["layers.0"], first.square().mean(0).sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(scores["layers.1"], second.square().mean(0).sqrt(), rtol=1e-10, atol=0)

    def spread(values):
        return values.std(0, correction=0)

    expected_second = spread(second) / spread(model(x).detach())
    expected_first = spread(first) / spread(hidden) * expected_second.sum(1)
    attribution = edge_scores(model, x, "attribution")
    torch.testing.assert_close(attribution["layers.1"], expected_second, rtol=1e-8, atol=0)
    torch.testing.assert_close(attribution["layers.0"], expected_first, rtol=1e-8, atol=0)
    torch.testing.assert_close(node_scores(model, x)[0], expected_first.sum(1), rtol=1e-8, atol=0)


def test_pruning_takes_the_base_branch_with_the_spline():
    model = make_model((2, 2))
    layer = model.layers[0]
    with torch.no_grad():
        layer.spline_weight[0, :, 0] = 1e-4
        layer.base_weight[0, 0] = 1e-4
        layer.spline_weight[1, :, 1] = 1e-4  # weak spline under a strong base branch: stays
        layer.base_weight[1, 1] = 1.0
    report = prune_kan(model, 1e-2)
    assert report.removed["layers.0"].tolist() == [[0, 0]]
    assert report.remaining == {"layers.0": 3}
    x = torch.rand(9, 2, dtype=torch.float64)
    assert (layer.edge_values(x)[:, 0, 0] == 0).all()
    assert (layer.edge_values(x)[:, 1, 1] != 0).any()
    spline_only = prune_kan(model, 1e-2, branch="spline")
    assert spline_only.removed["layers.0"].tolist() == [[1, 1]]
    assert (layer.spline_weight[1, :, 1] == 0).all()
    assert layer.base_weight[1, 1] == 1


def test_masked_edges_stay_dead(tmp_path):
    model = make_model((2, 5, 1))
    x = torch.rand(100, 2, dtype=torch.float64)
    y = (x[:, :1] * x[:, 1:]).sin()
    prune_kan(model, 0.5, data=x, relative=True)
    dead = [~layer.edge_mask for layer in model.layers]
    assert all(d.any() and not d.all() for d in dead)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = make_model((2, 5, 1))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    for candidate in (model, loaded, copy.deepcopy(model)):
        hidden = x
        for layer, gone in zip(candidate.layers, dead):
            assert (layer.edge_values(hidden)[:, gone] == 0).all()
            hidden = layer(hidden)


@pytest.mark.slow
def test_masked_edges_stay_dead_when_compiled():
    model = make_model((2, 5, 1))
    x = torch.rand(100, 2, dtype=torch.float64)
    prune_kan(model, 0.5, data=x, relative=True)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drop_inputs", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "outside": "linear"}, {"base_activation": None}, {"base_activation": torch.cos}],
)
def test_compact_computes_the_same(options, drop_inputs):
    model = make_model((4, 6, 5, 2), **options)
    masks = [torch.ones(4, 6, dtype=torch.bool), torch.ones(6, 5, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool)]
    masks[0][2] = False  # an input that feeds nothing
    masks[0][:, 1] = False  # a hidden node that nothing feeds, with living edges: a constant
    masks[1][3] = False  # a hidden node that nothing hears
    masks[1][:, 0] = False
    masks[1][1, 0] = True  # a node fed by the constant alone: a constant again
    masks[0][0, 4] = False  # a dead edge between living nodes
    for layer, mask in zip(model.layers, masks):
        layer.edge_mask = mask
    x = 2 * torch.randn(300, 4, dtype=torch.float64)
    small = compact(model, drop_inputs)
    assert [layer.in_features for layer in small.layers] == [3 if drop_inputs else 4, 4, 4]
    assert small.layer_dims == [3 if drop_inputs else 4, 4, 4, 2]
    if drop_inputs:
        assert small.input_index.tolist() == [0, 1, 3]
        assert "input_index" in small.state_dict()
    given = x[:, small.input_index] if drop_inputs else x
    expected = model(x)
    # Sums of at most 6 terms in another order.
    torch.testing.assert_close(small(given), expected, rtol=0, atol=1e-13 * float(expected.detach().abs().max()))
    assert not small.layers[0].edge_mask.all()
    small(given).sum().backward()


def test_layers_in_several_places():
    """Places have nodes of their own; scores by attribution, which would need scores of places, are refused."""
    once, twice = (KANLayer(3, 3, dtype=torch.float64) for _ in range(2))
    once.edge_mask = torch.ones(3, 3, dtype=torch.bool)
    once.edge_mask[:, 1] = False
    model, x = KAN.from_layers([twice, once, twice]), torch.rand(20, 3, dtype=torch.float64)
    assert prune_kan(model, 0.0).dead_nodes == {"layers.1": [], "layers.2": [1]}
    torch.testing.assert_close(compact(model)(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="^model: expected every layer in one place for method 'attribution'"):
        node_scores(model, x)


def test_compact_of_an_unpruned_model_is_a_copy():
    model = make_model()
    small = compact(model)
    x = torch.rand(10, 3, dtype=torch.float64)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=0)
    assert all(layer.edge_mask is None and layer.bias is None for layer in small.layers)
    with torch.no_grad():
        small.layers[0].spline_weight.zero_()
    assert (model.layers[0].spline_weight != 0).all()


def test_compact_of_a_constant_model():
    model = make_model((2, 3, 1), bias=True)
    with torch.no_grad():
        model.layers[0].bias.fill_(0.3)
        model.layers[1].bias.fill_(0.2)
    model.layers[0].edge_mask = torch.zeros(2, 3, dtype=torch.bool)
    small = compact(model)
    x = torch.rand(7, 2, dtype=torch.float64)
    assert small.layer_dims == [2, 1, 1]
    torch.testing.assert_close(small(x), model(x), rtol=1e-14, atol=0)


def test_unused_features_are_named():
    torch.manual_seed(0)
    model = KAN([3, 4, 1], grid_size=3, dtype=torch.float64)
    x = 2 * torch.rand(400, 3, dtype=torch.float64) - 1
    y = torch.sin(2 * x[:, :1]) + x[:, 2:] ** 2  # the second feature plays no part
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        output, penalty = activation_regularization(model, x, return_output=True)
        loss = (output - y).square().mean() + 2e-3 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    report = prune_kan(model, 3e-2, data=x, method="attribution", input_names=["height", "noise", "depth"])
    assert report.unused_inputs == ["noise"]
    assert report.used_inputs == ["height", "depth"]
    assert "noise" in str(report)
    small = compact(model, drop_inputs=True)
    assert small.input_index.tolist() == [0, 2]


def test_node_threshold_silences_whole_nodes():
    model = make_model((2, 3, 1))
    with torch.no_grad():
        model.layers[1].spline_weight[1] *= 1e-6
        model.layers[1].base_weight[1] *= 1e-6
    x = torch.rand(100, 2, dtype=torch.float64)
    report = prune_kan(model, 0.0, data=x, node_threshold=1e-2)
    assert report.dead_nodes == {"layers.1": [1]}
    assert report.removed["layers.0"].tolist() == [[0, 1], [1, 1]]
    assert compact(model).layer_dims == [2, 2, 1]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: prune_kan(m, 1e9), ValueError, "threshold: .* every edge"),
        (lambda m: prune_kan(m, -1), ValueError, "threshold"),
        (lambda m: prune_kan(m, branch="base"), ValueError, "branch"),
        (lambda m: prune_kan(m, method="magic"), ValueError, "method"),
        (lambda m: edge_scores(m, None, "attribution"), ValueError, "data"),
        (lambda m: edge_scores(m, []), ValueError, "data"),
        (lambda m: prune_kan(m, node_threshold=0.1), ValueError, "node_threshold"),
        (lambda m: prune_kan(m, 0, input_names=["a"]), ValueError, "input_names"),
        (lambda m: compact(m.layers[0]), TypeError, "model"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(make_model())


@pytest.mark.parametrize("method", ["activation", "attribution"])
def test_data_of_another_width(method):
    model = KAN([3, 4, 2])
    for call in (edge_scores, prune_kan):
        with pytest.raises(ValueError, match=r"^x: expected in_features = 3 as spline_weight has, got shape \(5, 7\)"):
            call(model, data=torch.randn(5, 7), method=method)
