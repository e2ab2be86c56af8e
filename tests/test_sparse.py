"""Edge lists: the dense layer's function on the edges there are, derivatives of every order, cost by edges."""

import copy

import numpy as np
import pytest
import torch
import truth
from samples import every_outside, make_grid
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import benchmarks.sparse
import kan_fast.chunks
from kan_fast import KAN, KANLayer, SparseKANLayer, edges, export_onnx, export_program, prune_kan, sparsify
from kan_fast.edges import Features
from kan_fast.nn.sparse import random_edges

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
        monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", request.param)


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


def total(model):
    return lambda x: model(x).sin().sum()


@pytest.mark.parametrize("activation", ["silu", None, torch.sin])
def test_transforms(activation):
    """Forward mode at every level, over and under backward mode and vmap."""
    dense = pruned_layer(base_activation=activation, outside="linear")
    layer = SparseKANLayer.from_dense(dense)
    x, tangent = inputs(3), inputs(3)
    jacfwd, jacrev, vmap = torch.func.jacfwd, torch.func.jacrev, torch.func.vmap
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: jacfwd(f)(x),
        lambda f: vmap(jacrev(f))(x),
        lambda f: vmap(jacrev(jacrev(f)))(x),
        lambda f: vmap(jacfwd(jacfwd(f)))(x),
        lambda f: torch.func.hessian(total(f))(x),
        lambda f: jacfwd(jacfwd(torch.func.grad(total(f))))(x),
        lambda f: vmap(f, in_dims=1)(torch.stack([x, tangent], 1)),
        lambda f: vmap(f)(x.new_empty(0, 2, 6)),
    ):
        torch.testing.assert_close(transform(layer), transform(dense), rtol=1e-9, atol=1e-9)


def test_forward_mode_by_weights():
    """Every argument has its tangent: all parameters at once, against a difference; and ensembles by vmap."""
    layer = SparseKANLayer(6, 4, 3, bias=True, dtype=torch.float64)
    x = inputs()
    values = dict(layer.named_parameters())
    tangents = {name: torch.randn_like(value) for name, value in values.items()}

    def function(values):
        return torch.func.functional_call(layer, values, (x,))

    _, slope = torch.func.jvp(function, (values,), (tangents,))
    # Linear in the weights: the difference is exact but for its rounding.
    moved = function({name: value + tangents[name] for name, value in values.items()})
    torch.testing.assert_close(slope, moved - function(values), rtol=1e-12, atol=1e-12)
    many = {name: torch.stack([value, value + tangents[name]]) for name, value in values.items()}
    torch.testing.assert_close(torch.func.vmap(function)(many), torch.stack([function(values), moved]), rtol=1e-13, atol=1e-13)


def operator_arguments(operation, requires_grad=True):
    layer = SparseKANLayer(5, 4, 3, dtype=torch.float64)
    features = Features("silu", layer.grid, 3, "linear")
    x, g, scale = (torch.randn(3, width, dtype=torch.float64) for width in (5, 4, 5))
    weight = torch.randn(12, 9, dtype=torch.float64)
    three = {"edge_output": (x, scale, weight), "edge_input": (x, weight, g), "edge_weight": (x, scale, g)}[operation]
    return *(tensor.requires_grad_(requires_grad) for tensor in three), *edges._rest(layer.edge_list(), features, 1)


# torch 2.14 reads .grad of its own views in there.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("operation", ["edge_output", "edge_input", "edge_weight"])
def test_operators(operation):
    """By torch's own checks, every derivative against differences, and the exporters' form against the one in chunks."""
    operator = getattr(torch.ops.kan_fast, operation).default
    args = operator_arguments(operation)
    torch.library.opcheck(operator, args)
    assert gradcheck(lambda *three: operator(*three, *args[3:]), args[:3], check_forward_ad=True)
    assert gradgradcheck(lambda *three: operator(*three, *args[3:]), args[:3], check_fwd_over_rev=True)
    torch.testing.assert_close(edges.WHOLE[operator](*args), operator(*args), rtol=1e-13, atol=1e-13)
    knots = args[3].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="^grid: the knots are not differentiable"):
        operator(*args[:3], knots, *args[4:])


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


@pytest.mark.parametrize("activation", ["silu", torch.sin])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_dense_layer(dtype, activation):
    """Weights and result in the autocast dtype; x, knots, bases and sums are float32, in both directions."""
    dense = KANLayer(8, 6, bias=True, base_activation=activation)
    dense.edge_mask = torch.rand(8, 6) < 0.5
    sparse, x = SparseKANLayer.from_dense(dense), torch.randn(40, 8, requires_grad=True)
    double = SparseKANLayer(8, 6, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        y, want = sparse(x), dense(x)
        assert double(x.double()).dtype == torch.float64
    assert y.dtype == want.dtype == dtype
    # A rounding of each part of the sum (the splines, another base branch, the bias) and of the sum, on either side.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, want, rtol=0, atol=4 * eps * want.abs().max().item())
    i, o = sparse.edges
    (dx, dw), (want_dx, want_dw) = (
        torch.autograd.grad(result.float().sum(), [x, layer.spline_weight]) for result, layer in ((y, sparse), (want, dense))
    )
    assert dw.dtype == dx.dtype == torch.float32
    want_dw = want_dw[i, :, o]
    for got, value in ((dx, want_dx), (dw, want_dw)):
        torch.testing.assert_close(got, value, rtol=0, atol=2 * eps * value.abs().max().item())


@pytest.mark.parametrize("operation", ["edge_output", "edge_input", "edge_weight"])
def test_contractions_know_nothing_of_autocast(operation):
    operator = getattr(torch.ops.kan_fast, operation)
    args = [value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for value in operator_arguments(operation, requires_grad=False)]  # fmt: skip
    want = operator(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator(*args), want)


def test_there_and_back():
    dense = pruned_layer(base_activation="tanh", outside="clamp")
    back = SparseKANLayer.from_dense(dense).to_dense()
    assert torch.equal(back.edge_mask, dense.edge_mask) and torch.equal(back.grid, dense.grid)
    x = inputs()
    assert torch.equal(back(x), dense(x))
    whole = KANLayer(3, 2)
    assert SparseKANLayer.from_dense(whole).to_dense().edge_mask is None


def test_sparsify_layers_in_several_places():
    twice, once = pruned_layer(6, 6), pruned_layer(6, 6)
    block = nn.Sequential(twice)
    model, x = nn.ModuleDict({"a": twice, "b": once, "c": block, "d": block}), inputs()
    want = twice(x)
    assert sparsify(model, 1.0) == ["a", "b"]
    assert isinstance(model["a"], SparseKANLayer) and isinstance(model["b"], SparseKANLayer)
    assert model["a"] is model["c"][0] is model["d"][0]
    torch.testing.assert_close(model["d"](x), want, rtol=1e-12, atol=1e-12)


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


def test_checkpoints(tmp_path):
    """Weights alone, into a layer without memory, with other edges; and what does not fit says why."""
    layer = SparseKANLayer(20, 6, 3, bias=True)
    x = torch.randn(5, 20)
    torch.save(layer.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert set(state) == {"spline_weight", "base_weight", "bias", "grid", "edges"}
    empty = SparseKANLayer(20, 6, edges=state["edges"], bias=True, device="meta")
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert empty(x.to("meta")).shape == (5, 6)
    for load in (
        lambda: empty.load_state_dict(state, assign=True),
        lambda: empty.to_empty(device="cpu").load_state_dict(state),
    ):
        load()
        assert torch.equal(empty(x), layer(x))
    with pytest.raises(RuntimeError, match=r"edges: the checkpoint has .* \(2, 18\), the layer has 12 of them; make it with"):
        SparseKANLayer(20, 6, 2, bias=True).load_state_dict(state)
    state["edges"] = state["edges"].flip(1)
    with pytest.raises(RuntimeError, match="edges: expected pairs sorted by output, then input"):
        layer.load_state_dict(state)


@pytest.mark.filterwarnings("ignore")  # of what dynamo does itself
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.compiler.reset()
    layer = SparseKANLayer.from_dense(pruned_layer())
    x = inputs().requires_grad_()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-12, atol=1e-12)
    for got, want in zip(
        *(torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (fast, layer)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    tangent = torch.randn_like(x)

    def slope(x):
        return torch.func.jvp(layer, (x,), (tangent,))[1]

    torch.testing.assert_close(torch.compile(slope, backend="aot_eager")(x), slope(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # of what torch.export does itself
def test_export(tmp_path):
    """A program of standard operators for any batch, the same numbers."""
    layer = SparseKANLayer.from_dense(pruned_layer(outside="linear", base_activation=torch.sin))
    x = inputs()
    program = export_program(layer, x)
    assert not any("kan_fast" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    run = torch.export.load(tmp_path / "layer.pt2").module()
    for rows in (1, 9, 30):
        x = inputs(rows)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # of what torch.onnx does itself
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(SparseKANLayer(7, 5, 3, bias=True), SparseKANLayer(5, 2, 2, outside="linear"))
    export_onnx(model, tmp_path / "model.onnx", torch.rand(4, 7))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(30, 7)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Sums of at most 3 * 9 terms of order 1 in float32, in another order.
    torch.testing.assert_close(torch.tensor(got), model(x), rtol=1e-5, atol=1e-5)


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
        ({"edges": [[0], [0]]}, TypeError, "^edges: expected a tensor or None, got list"),
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
    with pytest.raises(TypeError, match="^x: expected float32, .* got torch.int64"):
        SparseKANLayer(6, 5, 2)(torch.ones(4, 6, dtype=torch.long))


def test_made_under_a_default_device():
    with torch.device("meta"):
        empty, on_cpu = SparseKANLayer(6, 5, 2, bias=True), SparseKANLayer(6, 5, 2, device="cpu")
    assert all(value.is_meta for value in [*empty.parameters(), *empty.buffers()])
    assert empty(torch.rand(3, 6, device="meta")).shape == (3, 5)
    assert on_cpu(torch.rand(3, 6)).shape == (3, 5)


def test_edges_outlast_meta_and_to_empty():
    want, x = SparseKANLayer(6, 5, 2, bias=True), torch.randn(7, 6)
    given = SparseKANLayer(6, 5, edges=want.edges, bias=True, device="meta")
    for lost in (given, copy.deepcopy(want).to("meta"), copy.deepcopy(want)):
        filled = nn.Sequential(copy.deepcopy(lost)).to_empty(device="cpu")[0]
        for name in ("edges", "_used", "_place", "_per_output", "_by_input", "_per_used"):
            assert torch.equal(getattr(filled, name), getattr(want, name)), name
        filled.reset_parameters()
        with torch.no_grad():
            torch.testing.assert_close(filled(x), filled.to_dense()(x))
    drawn = SparseKANLayer(6, 5, 2, device="meta").to_empty(device="cpu")
    drawn.reset_parameters()
    assert drawn(x).isfinite().all()
    assert torch.equal(drawn.to_dense().edge_mask.sum(0), torch.full((5,), 2))
    # Edges of a checkpoint take the place of those that were known.
    other = SparseKANLayer(6, 5, edges=(want.edges + torch.tensor([[1], [0]])) % torch.tensor([[6], [5]]), bias=True)
    given.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(given.to_empty(device="cpu").edges, other.edges)


def test_benchmark_runs(capsys):
    rows = benchmarks.sparse.main(shapes=((20, 8), (40, 16)), batch=8)
    assert [edges for edges, _ in rows] == [8 * 16, 16 * 16]
    assert capsys.readouterr().out.count("\n| ") == 3
