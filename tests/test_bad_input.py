"""Errors name the argument, what was expected and what came, whatever the backend."""

import pytest
import torch
from samples import make_problem

from kan_fast import KAN, KANLayer, SparseKANLayer, available_backends, backends, ops
from kan_fast.functional import kan_linear
from kan_fast.spline import OUTSIDE


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"grid_size": 0}, ValueError, "^grid_size: expected 1 or more, got 0"),
        ({"grid_size": 2.5}, TypeError, "^grid_size: expected an int, got 2.5"),
        ({"spline_order": -1}, ValueError, "^spline_order: expected 0 or more, got -1"),
        ({"spline_order": True}, TypeError, "^spline_order: expected an int, got True"),
        ({"in_features": -3}, ValueError, "^in_features: expected 0 or more, got -3"),
        ({"in_features": "3"}, TypeError, "^in_features: expected an int, got '3'"),
        ({"in_features": None}, TypeError, "^in_features: expected it once, as in_features or input_dim"),
        ({"output_dim": 2}, TypeError, "^out_features: expected it once, as out_features or output_dim, got 2 and 2"),
        ({"grid_range": (1.0, -1.0)}, ValueError, r"^grid_range: expected finite a < b, got \(1, -1\)"),
        ({"grid_range": (0.0, 0.0)}, ValueError, "^grid_range: expected finite a < b"),
        ({"grid_range": (0.0, float("inf"))}, ValueError, "^grid_range: expected finite a < b"),
        ({"grid_range": 3.0}, TypeError, "^grid_range: expected two numbers, got 3.0"),
        ({"grid_range": (0, 1, 2)}, TypeError, "^grid_range: expected two numbers"),
        ({"base_activation": "swish"}, ValueError, "^base_activation: expected one of 'silu', .* got 'swish'"),
        ({"base_activation": 3}, ValueError, "^base_activation: expected one of .* got 3"),
        ({"base_activation": torch.nn.SiLU}, TypeError, "^base_activation: expected an instance.*got the class SiLU"),
        ({"outside": "extend"}, ValueError, "^outside: expected one of 'zero', 'linear', 'clamp', got 'extend'"),
        ({"backend": "cuda"}, ValueError, "^backend: expected one of 'auto', .* got 'cuda'"),
        ({"dtype": torch.int32}, TypeError, "^dtype: expected float32, .* got torch.int32"),
    ],
)
def test_layer_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        KANLayer(**{"in_features": 3, "out_features": 2, **kwargs})


def test_network_arguments():
    with pytest.raises(ValueError, match=r"^layer_dims: expected at least two widths, got \[3\]"):
        KAN([3])
    with pytest.raises(ValueError, match="^grid_size: expected 1 or more, got 0"):
        KAN([3, 2], 0)
    with pytest.raises(TypeError, match="shape"):
        KAN([3, 2], shape=3)
    with pytest.raises(TypeError, match="^layer_dims: expected a sequence of widths, got 3"):
        KAN(3)


def test_indices_of_edges():
    layer = KANLayer(3, 2)
    with pytest.raises(IndexError, match="^i: expected an index of 3 features, got 3"):
        layer.edge(3, 0)
    with pytest.raises(IndexError, match="^j: expected an index of 2 features, got -3"):
        layer.edge(0, -3)
    with pytest.raises(TypeError, match="^j: expected an int, got 0.0"):
        layer.edge(0, 0.0)
    with pytest.raises(ValueError, match="^derivative: expected 0 or more, got -1"):
        layer.edge(0, 0)(torch.zeros(4), derivative=-1)


def test_edge_values():
    layer = KANLayer(3, 2, base_activation=torch.sin)
    with pytest.raises(ValueError, match=r"^x: expected shape \(N, in_features\) with in_features = 3, got \(4,\)"):
        layer.edge_values(torch.zeros(4))
    with pytest.raises(ValueError, match="^derivative: expected 0 or more, got -1"):
        layer.edge_values(torch.zeros(4, 3), derivative=-1)
    with pytest.raises(TypeError, match="^derivative: expected an int, got 1.0"):
        layer.edge_values(torch.zeros(4, 3), derivative=1.0)


@pytest.mark.parametrize(
    "function",
    [KANLayer(3, 2).edge(0, 0), KANLayer(3, 2).edge_values, SparseKANLayer(3, 2, 1)],
    ids=["edge", "edge_values", "sparse"],
)
def test_what_is_no_dense_tensor(function):
    with pytest.raises(TypeError, match="^x: expected a tensor, got 'x'"):
        function("x")
    with pytest.raises(TypeError, match="^x: expected a dense tensor .*, got layout torch.sparse_coo"):
        function(torch.rand(4, 3).to_sparse())


def break_order(grid):
    grid[1, 4] = 2.0


def break_number(grid):
    grid[1, 4] = torch.nan


def break_range(grid):
    grid[1] = 0.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_order, "layers.1.grid: expected knots that do not decrease, got 2 followed by .* for input 1"),
        (break_number, "layers.1.grid: expected finite knots"),
        (break_range, r"layers.1.grid: expected an increasing range, got \[0, 0\] for input 1"),
    ],
)
def test_knots_that_make_no_splines_are_not_loaded(damage, message):
    model = KAN([3, 2, 1])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    damage(state["layers.1.grid"])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert model.layers[1].grid.diff(dim=1).min() > 0


# What to change in a sound call of kan_linear: x (7, 3), spline_weight (3, 8, 4), grid (3, 12), base_weight (3, 4).
BAD_CALLS = [
    ({"x": torch.zeros(7, 2)}, ValueError, r"^x: expected in_features = 3 as spline_weight has, got shape \(7, 2\)"),
    ({"x": torch.zeros(2, 7, 2)}, ValueError, "^x: expected in_features = 3"),
    ({"x": torch.zeros(())}, ValueError, r"^x: expected shape \(\.\.\., in_features\), got a scalar"),
    ({"x": torch.zeros(7, 3, dtype=torch.int64)}, TypeError, "^x: expected float32, .* got torch.int64"),
    ({"x": torch.zeros(7, 3, dtype=torch.float64)}, TypeError, "float64 goes only with float64, got x of torch.float64"),
    ({"spline_weight": torch.zeros(3, 8)}, ValueError, r"^spline_weight: expected shape \(in_features, .* got \(3, 8\)"),
    ({"spline_weight": torch.zeros(3, 8, 4, dtype=torch.complex64)}, TypeError, "^spline_weight: expected float32"),
    ({"spline_weight": torch.zeros(3, 12, 4)}, ValueError, "^grid: .* got 12 knots and 12 bases, that is spline_order = -1"),
    ({"spline_weight": torch.zeros(3, 5, 4)}, ValueError, "^grid: .* that is spline_order = 6 and grid_size = -1"),
    ({"grid": torch.zeros(12)}, ValueError, r"^grid: expected shape \(in_features, .* got \(12,\)"),
    ({"grid": torch.zeros(2, 12)}, ValueError, r"^grid: expected shape .* in_features = 3 as x has, got \(2, 12\)"),
    ({"grid": torch.zeros(3, 12).half()}, TypeError, "^grid: expected float32 or float64 knots, got torch.float16"),
    ({"base_weight": torch.zeros(4, 3)}, ValueError, r"^base_weight: expected shape .* = \(3, 4\), got \(4, 3\)"),
    ({"base_weight": torch.zeros(3, 4).bfloat16()}, TypeError, "^base_weight: expected torch.float32 as the spline weights"),
    ({"bias": torch.zeros(1)}, ValueError, r"^bias: expected shape \(out_features\) = \(4,\), got \(1,\)"),
    ({"bias": torch.zeros(4).bfloat16()}, TypeError, "^bias: expected torch.float32 as the spline weights have"),
    ({"base_activation": "swish"}, ValueError, "^base_activation: expected one of .* got 'swish'"),
    ({"base_activation": None}, ValueError, "^base_weight: expected None with base_activation None"),
    ({"base_activation": lambda x: x[:, :1]}, ValueError, r"^base_activation: expected a result of x's shape \(7, 3\)"),
    ({"base_activation": 3}, TypeError, "^base_activation: expected a name, a function or None, got 3"),
    ({"outside": "extend"}, ValueError, "^outside: expected one of .* got 'extend'"),
    ({"spline_weight": None}, TypeError, "^spline_weight: expected a tensor, got None"),
    ({"spline_weight": "w"}, TypeError, "^spline_weight: expected a tensor, got 'w'"),
    ({"grid": None}, TypeError, "^grid: expected a tensor, got None"),
    ({"grid": "g"}, TypeError, "^grid: expected a tensor, got 'g'"),
    ({"base_weight": "w"}, TypeError, "^base_weight: expected a tensor or None, got 'w'"),
    ({"bias": [0.0]}, TypeError, "^bias: expected a tensor or None, got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_calls(place, change, error, message):
    problem = make_problem(None, torch.float32, (7, 3, 4))
    sound = {
        "x": problem.x,
        "spline_weight": problem.spline_weight,
        "grid": problem.grid,
        "base_weight": problem.base_weight,
        "bias": torch.zeros(4),
        "backend": place.backend,
    }
    arguments = {
        name: value.to(place.device) if isinstance(value, torch.Tensor) else value
        for name, value in {**sound, **change}.items()
    }
    with pytest.raises(error, match=message):
        kan_linear(**arguments)


def test_what_only_the_native_backend_does_not_serve():
    if "native" not in available_backends("cpu"):
        pytest.skip("the native code is not built")
    x = torch.zeros(4, 3)
    for backend in ("auto", "native"):
        with pytest.raises(ValueError, match="^spline_order: expected 0 to 5 with backend 'native', got 6; backend='ref"):
            KANLayer(3, 2, spline_order=6, backend=backend)(x)
    assert KANLayer(3, 2, spline_order=6, backend="reference")(x).isfinite().all()
    with pytest.raises(ValueError, match="^n: expected 0 to 32 with backend 'native', got 33"):
        KANLayer(3, 2).edge(0, 0)(x, derivative=33)


@pytest.mark.parametrize(("outside", "most"), [("zero", 65525), ("linear", 65531), ("clamp", 65531)])
def test_grids_that_only_the_native_backend_does_not_serve(outside, most):
    """Its kernels for CPUs number intervals in 16 bits."""
    if "native" not in available_backends("cpu"):
        pytest.skip("the native code is not built")
    x = torch.rand(200, 1) * 2 - 1
    message = f"^grid: expected a grid_size of at most {most} with backend 'native' on CPUs, got {most + 1}; backend='ref"
    for backend in ("auto", "native"):
        options = {"grid_size": most + 1, "outside": outside, "backend": backend}
        for model in (KANLayer(1, 33, **options), KAN([1, 1, 1], **options)):
            with pytest.raises(ValueError, match=message):
                model(x)
    layer = KANLayer(1, 33, grid_size=most + 1, outside=outside, backend="reference")
    assert layer(x).isfinite().all()

    native, code = torch.ops.kan_fast_native, OUTSIDE.index(outside)
    weight, g, grid = layer.spline_weight.detach(), torch.zeros(200, 33), layer.grid
    for call in (
        lambda: native.contract_output(x, None, weight, None, grid, 0, code, 0),
        lambda: native.contract_input(x, weight, None, g, grid, 0, code, 0),
        lambda: native.contract_weight(x, None, g, grid, 3, 0, code, 0),
        lambda: native.contract_backward(x, weight, None, g, grid, 0, code, 0),
        lambda: native.network_output(x, [weight[..., :1], grid], 0, code, False),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"grid must hold at most {most} intervals .* got {most + 1}"):
            call()


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_what_is_no_tensor(backend):
    layer = KANLayer(3, 2, backend=backend)
    for x, name in (([0.0, 0.0, 0.0], "list"), (torch.zeros(3).numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"^x: expected a tensor, got {name}"):
            layer(x)
    with pytest.raises(TypeError, match="^x: expected a tensor, got list"):
        KAN([3, 2, 1], backend=backend)([0.0, 0.0, 0.0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(4, 3), (3,), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_layouts(backend, shape, grad):
    x = torch.rand(shape)
    layer, network = KANLayer(3, 2, backend=backend), KAN([3, 2, 1], backend=backend)
    for kept in (x.to_sparse(), x.to_mkldnn()):
        for model in (layer, network, KANLayer(3, 2, base_activation=None, backend=backend)):
            with pytest.raises(TypeError, match=f"^x: expected a dense tensor .*, got layout {kept.layout}"):
                model(kept.requires_grad_(grad) if kept.layout is torch.sparse_coo else kept)


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        ("contract_output", {"scale": torch.zeros(17, 4)}, r"^scale: expected shape .* = \(17, 3\), got \(17, 4\)"),
        ("contract_input", {"g": torch.zeros(16, 4)}, r"^g: expected shape .* = \(17, 4\), got \(16, 4\)"),
        ("contract_weight", {"g": torch.zeros(16, 4)}, r"^g: expected shape .* = \(17, 4\), got \(16, 4\)"),
        ("contract_weight", {"spline_order": -1}, "^grid: .* that is spline_order = -1"),
        ("contract_weight", {"spline_order": 6}, "^grid: .* that is spline_order = 6 and grid_size = -1"),
        ("contract_backward", {"g": torch.zeros(17, 4).bfloat16()}, "^g: expected torch.float32 as the spline weights have"),
        ("contract_output", {"base_weight": None}, "^base_weight: expected a tensor with base_activation 'silu'"),
    ],
)
def test_contractions(place, operation, change, message):
    problem = make_problem(place, torch.float32)
    change = {name: value.to(place.device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(ops, operation)(*problem._replace(**change).args(operation, 0), place.backend)
    with pytest.raises(ValueError, match="^n: expected a derivative order of 0 or more, got -1"):
        getattr(ops, operation)(*problem.args(operation, -1), place.backend)


def test_devices():
    problem = make_problem(None, torch.float32)
    for name in ("scale", "spline_weight", "base_weight", "grid"):
        moved = problem._replace(**{name: getattr(problem, name).to("meta")})
        with pytest.raises(ValueError, match=f"^{name}: expected device cpu as x has, got meta"):
            ops.contract_output(*moved.args("contract_output", 0), "reference")


def test_a_backend_that_was_asked_for_never_gives_way(monkeypatch):
    with pytest.raises(ValueError, match="^backend: expected 'auto' or one of 'native', 'triton', 'reference', got 'fused'"):
        backends.choose("fused", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends.get("native"), "reason_not", lambda *_: "it is away today")
    with pytest.raises(RuntimeError, match="^backend: 'native' cannot serve torch.float32 tensors on cpu: it is away today"):
        KANLayer(3, 2, backend="native")(torch.zeros(1, 3))
    with pytest.warns(UserWarning, match="by plain PyTorch.*native: it is away today"):
        assert backends.choose("auto", torch.device("cpu"), torch.float32) == "reference"
    assert available_backends("cpu") == ("reference",)
    meta = torch.device("meta")
    monkeypatch.undo()
    assert "meta" in backends.reason_not("native", meta, torch.float32) or "extension" in backends.reason_not(
        "native", meta, torch.float32
    )
