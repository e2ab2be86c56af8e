"""Layers of other packages against their published formulas in float64, built here."""

import itertools

import numpy as np
import pytest
import torch
import truth
from samples import make_grid
from torch import nn

import kan_fast
from kan_fast import KAN, KANLayer, from_edges, from_efficient_kan, from_pykan, replace_layers, to_pykan

# Weights of order one and 4 inputs: the sums of at most 5 products of an input reach 10, and conversion, knots and kernel
# round a handful of times each; 64 eps of float32 is 8e-6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def points(grid, rows=40):
    """Inside the range, beyond it and beyond the last knots, and on knots: (rows, in), float32."""
    low, high = grid[:, 0], grid[:, -1]
    x = low + (high - low) * (1.6 * torch.rand(rows, len(grid)) - 0.3)
    k = 3
    x[:4] = torch.stack([grid[:, 0], grid[:, k], grid[:, -1 - k], grid[:, -1]])
    return x.float()


def bases(x, grid, k):
    """(N, in, G + k), float64, by SciPy."""
    columns = [truth.bases(x[:, i].double().numpy(), grid[i].double().numpy(), k, "zero", 0) for i in range(len(grid))]
    return torch.tensor(np.stack(columns, 1))


def efficient_state(kind="uneven", scaler=True, dtype=torch.float32, shape=(4, 3)):
    """Keys and shapes of an efficient-kan KANLinear, with values that no initialisation would give."""
    inputs, outputs = shape
    state = {
        "base_weight": torch.randn(outputs, inputs, dtype=dtype),
        "spline_weight": torch.randn(outputs, inputs, 8, dtype=dtype),
        "grid": make_grid(kind, inputs, 5, 3).to(dtype),
    }
    if scaler:
        state["spline_scaler"] = torch.randn(outputs, inputs, dtype=dtype)
    return state


def efficient_value(state, x, act=nn.functional.silu):
    """F.linear(act(x), base_weight) + F.linear(B(x), spline_weight * spline_scaler), as KANLinear.forward has it."""
    x = x.double()
    weight = state["spline_weight"].double() * state.get("spline_scaler", torch.ones(())).double()[..., None]
    spline = torch.einsum("nif,oif->no", bases(x, state["grid"], 3), weight)
    return act(x) @ state["base_weight"].double().T + spline


def pykan_state(kind="uneven", shape=(4, 3)):
    """Keys and shapes of a pykan KANLayer."""
    inputs, outputs = shape
    return {
        "grid": make_grid(kind, inputs, 5, 3),
        "coef": torch.randn(inputs, outputs, 8),
        "mask": (torch.rand(inputs, outputs) > 0.4).float(),
        "scale_base": torch.randn(inputs, outputs),
        "scale_sp": torch.randn(inputs, outputs),
    }


def pykan_value(state, x, act=nn.functional.silu):
    """sum_i mask (scale_base act(x_i) + scale_sp sum_g coef B_g(x_i)), as KANLayer.forward has it."""
    x = x.double()
    spline = torch.einsum("nif,iof->nio", bases(x, state["grid"], 3), state["coef"].double())
    y = state["scale_base"].double() * act(x)[..., None] + state["scale_sp"].double() * spline
    return (state["mask"].double() * y).sum(1)


def multkan_state(widths):
    """Keys and shapes of a pykan MultKAN without multiplications: float32."""
    state = {}
    for number, shape in enumerate(itertools.pairwise(widths)):
        state.update({f"act_fun.{number}.{key}": value for key, value in pykan_state(shape=shape).items()})
        for name in ("node", "subnode"):
            state[f"{name}_bias_{number}"] = torch.randn(shape[1])
            state[f"{name}_scale_{number}"] = torch.randn(shape[1])
        state[f"symbolic_fun.{number}.mask"] = torch.zeros(shape[1], shape[0])
        state[f"symbolic_fun.{number}.affine"] = torch.randn(shape[1], shape[0], 4)
    return state


@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "uneven", "repeated"])
def test_efficient_kan_layer_from_its_state(kind, scaler):
    state = efficient_state(kind, scaler)
    layer = from_efficient_kan(state)
    x = points(state["grid"])
    torch.testing.assert_close(layer(x).double(), efficient_value(state, x), **CLOSE)
    assert torch.equal(layer.grid, state["grid"])
    assert layer.outside == "zero" and layer.bias is None
    assert all(parameter.requires_grad for parameter in layer.parameters())
    state["base_weight"].zero_()
    assert layer.base_weight.abs().min() > 0  # a copy


def test_efficient_kan_network_from_its_state():
    states = [efficient_state(shape=(4, 6)), efficient_state(shape=(6, 2), scaler=False)]
    whole = {f"module.layers.{n}.{key}": value for n, state in enumerate(states) for key, value in state.items()}
    model = from_efficient_kan(dict(reversed(whole.items())))
    assert isinstance(model, KAN) and model.layer_dims == [4, 6, 2]
    x = points(states[0]["grid"])
    want = efficient_value(states[1], efficient_value(states[0], x))
    # The first layer's rounding is magnified by the slopes of the second, of order ten.
    torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-4)


def test_other_activations_and_dtypes():
    state = efficient_state(dtype=torch.float64)
    x = points(state["grid"]).double()
    layer = from_efficient_kan(state, base_activation=nn.Tanh())
    assert layer.base_activation == "tanh" and layer.grid.dtype == torch.float64
    torch.testing.assert_close(layer(x), efficient_value(state, x, torch.tanh), rtol=1e-12, atol=1e-12)
    layer = from_efficient_kan(state, base_activation=torch.sin)
    torch.testing.assert_close(layer(x), efficient_value(state, x, torch.sin), rtol=1e-12, atol=1e-12)
    assert from_efficient_kan(state, base_activation=nn.GELU("tanh")).base_activation != "gelu"
    half = from_efficient_kan({key: value.bfloat16() for key, value in state.items()})
    assert half.spline_weight.dtype == torch.bfloat16 and half.grid.dtype == torch.float32


@pytest.mark.parametrize("kind", ["uniform", "uneven", "repeated"])
def test_pykan_layer_from_its_state(kind):
    state = pykan_state(kind)
    layer = from_pykan(state)
    x = points(state["grid"])
    torch.testing.assert_close(layer(x).double(), pykan_value(state, x), **CLOSE)
    assert torch.equal(layer.edge_mask, state["mask"].bool())


def test_pykan_input_with_collapsed_knots():
    """What pykan's grid update makes of a constant input: all knots one number, and a spline that is zero everywhere."""
    state = pykan_state()
    x = points(state["grid"])
    state["grid"][1] = 0.3
    layer = from_pykan(state)
    x[5:9, 1] = 0.3
    state["coef"][1] = 0
    state["grid"][1] = torch.arange(12.0)  # any, once the coefficients are zero
    torch.testing.assert_close(layer(x).double(), pykan_value(state, x), **CLOSE)
    assert layer.grid[1].diff().min() > 0


def test_multkan_from_its_state():
    state = multkan_state([4, 5, 2])
    model = from_pykan(state)
    x = points(state["act_fun.0.grid"])
    y = x.double()
    for n in range(2):
        y = pykan_value({key: state[f"act_fun.{n}.{key}"] for key in ("grid", "coef", "mask", "scale_base", "scale_sp")}, y)
        for part in ("subnode", "node"):
            y = state[f"{part}_scale_{n}"].double() * y + state[f"{part}_bias_{n}"].double()
    torch.testing.assert_close(model(x).double(), y, rtol=1e-4, atol=1e-4)


def test_round_trip_to_pykan():
    model = KAN([4, 5, 2], 6, bias=True)
    model.layers[1].bias.data.normal_()
    model.layers[0].edge_mask = torch.rand(4, 5) > 0.3
    model.layers[0].set_grid(make_grid("uneven", 4, 6, 3))
    back = from_pykan(to_pykan(model))
    x = torch.rand(50, 4) * 3 - 1.5
    torch.testing.assert_close(back(x), model(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(back.layers[0].edge_mask, model.layers[0].edge_mask)
    layer = KANLayer(3, 2, base_activation=None)
    torch.testing.assert_close(from_pykan(to_pykan(layer))(x[:, :3]), layer(x[:, :3]))


def test_plain_edges_fold_their_scale():
    """Coefficients, a scale per edge and a linear base: base_activation="identity"."""
    coefficients, scale, base = torch.randn(4, 3, 8), torch.randn(4, 3), torch.randn(4, 3)
    grid = make_grid("uneven", 1, 5, 3)[0]
    layer = from_edges(coefficients, grid, scale, base, torch.ones(3))
    x = points(layer.grid)
    want = torch.einsum("nif,iof,io->no", bases(x, layer.grid, 3), coefficients.double(), scale.double())
    torch.testing.assert_close(layer(x).double(), want + x.double() @ base.double() + 1, **CLOSE)
    assert from_edges(coefficients, grid).base_weight is None
    state = torch.get_rng_state()
    from_edges(coefficients, grid)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_edges(torch.zeros(4, 8), torch.zeros(12)), "coefficients: expected shape"),
        (lambda: from_edges(torch.zeros(4, 3, 8), torch.zeros(7)), "grid: expected grid_size"),
        (lambda: from_edges(torch.zeros(4, 3, 8), torch.arange(12.0), torch.zeros(3, 4)), "scale: expected shape"),
        (lambda: from_edges(torch.zeros(4, 3, 8), torch.arange(12.0), bias=torch.zeros(4)), "bias: expected shape"),
        (lambda: from_edges(torch.zeros(4, 3, 8), -torch.arange(12.0)), "knots that do not decrease"),
        (lambda: from_efficient_kan({}), "with the key spline_weight, got nothing"),
        (lambda: from_efficient_kan({"weight": torch.zeros(3)}), "got weight"),
        (lambda: from_efficient_kan({**efficient_state(), "head.weight": torch.zeros(3)}), "further keys head.weight"),
        (lambda: from_efficient_kan({"spline_weight": torch.zeros(3, 4, 8)}), "base_weight, grid are missing"),
        (lambda: from_efficient_kan({f"layers.1.{k}": v for k, v in efficient_state().items()}), "layers.0, layers.1, ..."),
        (lambda: from_pykan(efficient_state()), "with the key coef"),
        (lambda: to_pykan(KANLayer(2, 3, bias=True)), "without bias"),
        (lambda: to_pykan(KANLayer(2, 3, outside="clamp")), "outside='zero'"),
        (lambda: replace_layers(nn.Sequential(nn.Linear(2, 3))), "found none"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="expected a module or a state_dict, got int"):
        from_pykan(3)
    with pytest.raises(TypeError, match="expected tensors by name"):
        from_pykan({"coef": 3})
    with pytest.raises(TypeError, match="expected a KANLayer or KAN"):
        to_pykan(nn.Linear(2, 3))


def test_pykan_without_counterpart():
    state = multkan_state([4, 5, 2])
    state["symbolic_fun.1.mask"][1, 3] = 1
    with pytest.raises(ValueError, match="layer 1 has active symbolic edges, .*: 3 -> 1"):
        from_pykan(state)
    state = multkan_state([4, 5, 2])
    state["node_bias_0"] = state["node_scale_0"] = torch.ones(4)
    with pytest.raises(ValueError, match="layer 0 feeds multiplication nodes"):
        from_pykan(state)


class KANLinear(nn.Module):
    """The interface and the formula of efficient-kan's layer; `twist` makes it a variant."""

    def __init__(self, state, twist=0.0):
        super().__init__()
        for name, value in state.items():
            if name == "grid":
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.base_activation = nn.SiLU()
        self.twist = twist

    def forward(self, x):
        grid, x3 = self.grid, x.reshape(-1, x.shape[-1])[..., None]
        b = ((x3 >= grid[:, :-1]) & (x3 < grid[:, 1:])).to(x.dtype)
        for k in range(1, 4):
            left = (x3 - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1])
            right = (grid[:, k + 1 :] - x3) / (grid[:, k + 1 :] - grid[:, 1:-k])
            b = left * b[..., :-1] + right * b[..., 1:]
        weight = self.spline_weight * self.spline_scaler[..., None]
        y = self.base_activation(x) @ self.base_weight.T + torch.einsum("nif,oif->no", b, weight).view(*x.shape[:-1], -1)
        return y + self.twist


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = KANLinear(efficient_state(shape=(4, 6)))
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6, bias=False))])
        self.again = self.blocks[0]
        self.head = nn.ModuleDict({"out": nn.Linear(6, 2)})

    def forward(self, x):
        return self.head["out"](self.again(torch.tanh(self.blocks[1](self.blocks[0](self.first(x))))))


def test_replace_layers_in_place():
    model = Mixed()
    model.first.eval()
    model.first.base_weight.requires_grad_(False)
    x = points(model.first.grid)
    before = model(x)
    assert replace_layers(model) is model
    assert isinstance(model.first, KANLayer) and not model.first.training and model.blocks.training
    assert not model.first.base_weight.requires_grad and model.first.spline_weight.requires_grad
    assert isinstance(model.blocks[0], nn.Linear)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_replace_layers_takes_the_linear_ones_that_are_asked_for():
    model = Mixed().double()
    x = points(model.first.grid).double()
    before = model(x)
    model.blocks[0].weight.requires_grad_(False)
    replace_layers(model, linear=lambda name, module: name != "head.out", grid_size=7, grid_range=(-3.0, 3.0))
    assert isinstance(model.blocks[0], KANLayer) and model.again is model.blocks[0]
    assert isinstance(model.blocks[1][1], KANLayer) and model.blocks[1][1].bias is None
    assert type(model.head["out"]) is nn.Linear
    new = model.blocks[0]
    assert (new.grid_size, new.base_activation, new.spline_weight.dtype) == (7, "identity", torch.float64)
    assert not new.base_weight.requires_grad and new.bias.requires_grad
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)  # the first layer's scales were rounded in float64
    model(x).square().sum().backward()
    assert model.blocks[1][1].spline_weight.grad.abs().max() > 0


def test_replace_layers_of_a_model_that_is_one():
    layer = KANLinear(efficient_state())
    assert isinstance(replace_layers(layer), KANLayer)
    assert isinstance(replace_layers(nn.Linear(2, 3), linear=True), KANLayer)


def test_replace_layers_refuses_what_it_would_break():
    model = nn.ModuleDict({"first": KANLinear(efficient_state(), twist=0.5)})
    with pytest.raises(ValueError, match="first .*KANLinear. does not compute the published formula.* by 0.5"):
        replace_layers(model)
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="0 has hooks or parametrizations"):
        replace_layers(model, linear=True)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'1' shares a parameter .0.weight, 1.weight"):
        replace_layers(model, linear=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_replace_layers_in_a_transformer(masked):
    """PyTorch's encoder has a path for evaluation that reads linear1.weight without calling linear1."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5]) if masked else None
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=mask)
        replace_layers(encoder, linear=lambda name, module: name.endswith(("linear1", "linear2")))
        after = encoder(x, src_key_padding_mask=mask)
    assert isinstance(encoder.layers[0].linear1, KANLayer)
    assert type(encoder.layers[0].self_attn.out_proj) is not KANLayer
    seen = slice(None) if mask is None else ~mask
    torch.testing.assert_close(after[seen], before[seen], rtol=1e-5, atol=1e-5)


def test_names_are_exported():
    assert {"from_edges", "from_efficient_kan", "from_pykan", "replace_layers", "to_pykan"} <= set(kan_fast.__all__)
