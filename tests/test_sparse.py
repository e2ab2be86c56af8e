"""Edge lists: the dense layer's function on the edges there are, derivatives of every order, cost by edges."""

import copy

import numpy as np
import pytest
import torch
import truth
from samples import every_outside, make_grid
from torch.autograd import gradcheck, gradgradcheck

import benchmarks.sparse
import kan_fast.traverse
from kan_fast import KAN, KANLayer, SparseKANLayer, prune_kan, sparsify
from kan_fast.sparse import random_edges

ACTIVATIONS = ("silu", "gelu", None, torch.sin)


def pruned_layer(in_features=6, out_features=5, kind="uneven", share=0.4, **options):
    layer = KANLayer(in_features, out_features, dtype=torch.float64, bias=True, **options)
    layer.set_grid(make_grid(kind, in_features, 5, 3).double())
    with torch.no_grad():
        layer.bias.normal_()
    layer.edge_mask = torch.rand(in_features, out_features) < share
    layer.edge_mask[2] = False  # an input without edges
    layer.edge_mask[:, 3] = False  # and an output
    return layer


def inputs(rows=9, features=6):
    return torch.randn(rows, features, dtype=torch.float64) * 1.5


@pytest.fixture(params=[None, 40], ids=["one chunk", "chunks"])
def small_chunks(request, monkeypatch):
    """With 40 numbers to a chunk every row is a chunk of its own, and four edges are one."""
    if request.param:
        monkeypatch.setattr(kan_fast.traverse, "CHUNK_ELEMENTS", request.param)


@every_outside
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["uniform", "repeated"])
def test_the_function_of_the_pruned_layer(activation, outside, kind, small_chunks):
    dense = pruned_layer(kind=kind, base_activation=activation, outside=outside)
    sparse = SparseKANLayer.from_dense(dense)
    assert sparse.spline_weight.shape == (int(dense.edge_mask.sum()), 8)
    x = inputs().requires_grad_()
    y = x.detach().clone().requires_grad_()
    # float64 sums of at most 5 * 9 terms of order 1 in another order: 45 eps = 1e-14.
    torch.testing.assert_close(sparse(x), dense(y), rtol=1e-12, atol=1e-12)
    sparse(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-11)
    i, o = sparse.edges
    torch.testing.assert_close(sparse.spline_weight.grad, dense.spline_weight.grad[i, :, o], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-11, atol=1e-11)
    if activation is not None:
        torch.testing.assert_close(sparse.base_weight.grad, dense.base_weight.grad[i, o], rtol=1e-11, atol=1e-11)


def test_the_truth():
    """SciPy's splines, edge by edge."""
    layer = SparseKANLayer(6, 4, 2, dtype=torch.float64)
    x = inputs()
    want = np.zeros((len(x), 4))
    for edge, (i, o) in enumerate(layer.edges.t().tolist()):
        base, spline = truth.features(x[:, i : i + 1], layer.grid[i : i + 1], 3, "silu", "zero", 0)
        weight = layer.spline_weight[edge].detach().numpy()
        want[:, o] += spline[:, 0] @ weight + base[:, 0] * layer.base_weight[edge].item()
    np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("activation", "outside"), [("silu", "linear"), (None, "zero"), (torch.sin, "clamp")])
def test_derivatives(activation, outside, small_chunks):
    """By x, both weights and bias: first and second order against differences, third order against the dense layer."""
    dense = pruned_layer(3, 4, share=0.8, base_activation=activation, outside=outside)
    layer = SparseKANLayer.from_dense(dense)
    # Off the knots, where derivatives jump.
    x = torch.tensor([[-0.93, 0.11, 0.52], [0.33, -1.71, 0.07]], dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    arguments = [value.detach().clone().requires_grad_() for value in (x, *parameters.values())]
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)

    def third(model):
        leaf = x.clone().requires_grad_()
        value = model(leaf).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    # Third derivatives of cubic splines on intervals of about 0.4 are of order 6 / 0.4^3 = 100, cubed by the squares.
    torch.testing.assert_close(third(layer), third(dense), rtol=1e-9, atol=1e-9)


def test_transforms():
    dense = pruned_layer()
    layer = SparseKANLayer.from_dense(dense)
    x = inputs(3)
    for transform in (torch.func.jacrev, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        got, want = (torch.func.vmap(transform(model))(x) for model in (layer, dense))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_bits_on_every_run(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layer = SparseKANLayer(300, 50, 20, device=device)
    x = torch.randn(400, 300, device=device, requires_grad=True)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    first = step()
    for _ in range(3):
        assert all(map(torch.equal, step(), first))


def test_there_and_back():
    dense = pruned_layer(base_activation="tanh", outside="clamp")
    back = SparseKANLayer.from_dense(dense).to_dense()
    assert torch.equal(back.edge_mask, dense.edge_mask) and torch.equal(back.grid, dense.grid)
    x = inputs()
    assert torch.equal(back(x), dense(x))
    whole = KANLayer(3, 2)
    assert SparseKANLayer.from_dense(whole).to_dense().edge_mask is None


def test_sparsify_a_pruned_network():
    model = KAN([6, 8, 2], dtype=torch.float64)
    x = inputs(50)
    prune_kan(model, 0.6, relative=True)
    density = [float(layer.edge_mask.double().mean()) for layer in model.layers]
    assert density[0] < 0.5
    want = model(x)
    assert sparsify(model, density[0]) == [f"layers.{place}" for place in range(2) if density[place] <= density[0]]
    assert isinstance(model.layers[0], SparseKANLayer)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    assert model.regularization_loss().requires_grad
    assert sparsify(KAN([6, 8, 2])) == []


def test_random_edges():
    pairs = random_edges(10, 4000, 3)
    inputs = pairs[0].view(4000, 3).sort(1).values
    assert torch.equal(pairs[1], torch.arange(4000).repeat_interleave(3))
    assert (inputs.diff(dim=1) > 0).all()
    # Each of 10 inputs is in 3 of 10 sets: 1200 times of 4000, standard deviation sqrt(4000 * 0.3 * 0.7) = 29; 5 of them.
    counts = torch.bincount(pairs[0], minlength=10)
    assert (counts - 1200).abs().max() < 145
    assert torch.equal(random_edges(3, 2, 3)[0].view(2, 3).sort(1).values, torch.arange(3).expand(2, 3))


def test_variance_is_kept():
    """A layer of the signal's own variance; E over 200 outputs of a ratio that scatters by about sqrt(2 / 20) each."""
    layer = SparseKANLayer(1000, 200, 20)
    x = torch.rand(2000, 1000) * 2 - 1
    with torch.no_grad():
        ratio = layer(x).var(0) / (1 / 3)
    assert 0.8 < ratio.mean() < 1.25


def test_wide_input_costs_by_edges(monkeypatch):
    """A million inputs, 64 edges: no intermediate is wider than the edges, and dense weights would be 0.5 GB."""
    layer = SparseKANLayer(1_000_000, 8, 8)
    assert sum(p.numel() for p in layer.parameters()) == 64 * 9
    widths = []
    inner = kan_fast.edges.bases
    monkeypatch.setattr(kan_fast.edges, "bases", lambda x, *rest: widths.append(x.shape[1]) or inner(x, *rest))
    x = torch.randn(4, 1_000_000, requires_grad=True)
    layer(x).sum().backward()
    assert widths and max(widths) <= 64
    assert (x.grad != 0).sum() <= 4 * 64


def test_state_dict_carries_the_edges():
    layer, other = SparseKANLayer(20, 6, 3), SparseKANLayer(20, 6, 3)
    x = torch.randn(5, 20)
    other(x)  # its own edges are known by now
    assert not torch.equal(layer.edges, other.edges)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_dtypes_and_shapes():
    layer = SparseKANLayer(6, 4, 3, bias=True).bfloat16()
    assert layer.grid.dtype == torch.float32 and layer.spline_weight.dtype == torch.bfloat16
    x = torch.randn(2, 3, 6)
    y = layer(x)
    assert y.shape == (2, 3, 4) and y.dtype == torch.bfloat16
    want = layer.to_dense()(x)
    # The same float32 sums, rounded to bfloat16 before and after the bias.
    torch.testing.assert_close(y, want, rtol=2**-7, atol=2**-7)
    assert layer(torch.randn(0, 6)).shape == (0, 4)
    assert layer(torch.full((1, 6), torch.nan)).isnan().all()
    empty = SparseKANLayer(6, 4, edges=torch.empty(2, 0, dtype=torch.long))
    x.requires_grad_()
    empty(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.filterwarnings("ignore")  # of what dynamo does itself
def test_compile():
    torch.compiler.reset()
    layer = SparseKANLayer.from_dense(pruned_layer())
    x = inputs().requires_grad_()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-12, atol=1e-12)
    for got, want in zip(
        *(torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (fast, layer)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "^fan_in: expected either fan_in or edges, got fan_in = None and edges None"),
        ({"fan_in": 7}, ValueError, "^fan_in: expected 1 to in_features = 6, got 7"),
        (
            {"edges": torch.ones(5, 6, dtype=torch.bool)},
            ValueError,
            r"^edges: expected bool of shape .* = \(6, 5\), got \(5, 6\)",
        ),
        ({"edges": torch.ones(2, 3)}, ValueError, r"^edges: expected \(2, E\) of int64 .* torch.float32"),
        ({"edges": torch.tensor([[6], [0]])}, ValueError, "^edges: expected inputs from 0 to 5, got 6 to 6"),
        ({"edges": torch.tensor([[1, 1], [0, 0]])}, ValueError, "^edges: expected every pair once"),
        ({"fan_in": 2, "outside": "wrap"}, ValueError, "^outside: "),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseKANLayer(6, 5, **arguments)


def test_inputs_are_checked():
    with pytest.raises(ValueError, match=r"^x: expected shape \(..., in_features\) with in_features = 6, got \(4, 5\)"):
        SparseKANLayer(6, 5, 2)(torch.rand(4, 5))
    with pytest.raises(TypeError, match="^x: float64 goes only with float64"):
        SparseKANLayer(6, 5, 2)(torch.rand(4, 6).double())


def test_benchmark_runs(capsys):
    rows = benchmarks.sparse.main(shapes=((20, 8), (40, 16)), batch=8)
    assert [edges for edges, _ in rows] == [8 * 16, 16 * 16]
    assert capsys.readouterr().out.count("\n| ") == 3
