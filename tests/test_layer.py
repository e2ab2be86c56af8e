"""KANLayer: values, parameters, buffers, casts, masks, checkpoints, edges."""

import copy
import pickle

import pytest
import torch
import truth
from samples import every_outside, make_grid
from torch import nn
from torch.nn import functional as F

from kan_fast import KANLayer, ops, spline
from kan_fast.functional import kan_linear

NAMES = ("silu", "identity", "gelu", "relu", "tanh")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def true_values(layer, x, bias=True):
    """The layer's formula from its own tensors, by SciPy and NumPy."""
    name = layer.base_activation if isinstance(layer.base_activation, str) else "none"
    base = layer.base_weight if name != "none" else None
    y = torch.tensor(truth.contract_output(x, None, layer.spline_weight, base, layer.grid, name, layer.outside, 0))
    return y + layer.bias.detach().double().cpu() if bias and layer.bias is not None else y


@every_outside
@pytest.mark.parametrize("activation", [*NAMES, None])
def test_forward_is_the_formula(place64, activation, outside):
    options = {"device": place64.device, "dtype": torch.float64, "backend": place64.backend}
    layer = KANLayer(3, 4, 6, 2, base_activation=activation, outside=outside, bias=True, grid_range=(-2.0, 1.0), **options)
    layer.bias.data.normal_()
    x = (torch.rand(20, 3, dtype=torch.float64) * 6 - 3).to(place64.device)
    torch.testing.assert_close(layer(x).cpu(), true_values(layer, x), **EXACT)
    assert (layer.base_weight is None) == (activation is None)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 3), (2, 5, 3), (2, 0, 3), (0, 3), (2, 2, 2, 3)])
@pytest.mark.parametrize("activation", ["silu", torch.sin, None])
def test_leading_dimensions(place, shape, activation):
    layer = KANLayer(3, 4, base_activation=activation, bias=True, backend=place.backend, device=place.device)
    x = torch.rand(shape, device=place.device)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    torch.testing.assert_close(y.reshape(-1, 4), layer(x.reshape(-1, 3)))
    transposed = torch.rand(3, 2, 5, device=place.device).permute(2, 1, 0)
    torch.testing.assert_close(layer(transposed), layer(transposed.contiguous()))


def test_zero_features():
    assert KANLayer(0, 4)(torch.zeros(5, 0)).tolist() == [[0.0] * 4] * 5
    assert KANLayer(3, 0)(torch.zeros(2, 5, 3)).shape == (2, 5, 0)


@pytest.mark.parametrize("function", [torch.sin, nn.SiLU(), F.softplus])
def test_any_callable_as_base_activation(function):
    layer = KANLayer(3, 2, base_activation=function, dtype=torch.float64)
    x = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    want = true_values(layer, x) + function(x) @ layer.base_weight
    torch.testing.assert_close(layer(x), want, **EXACT)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    if isinstance(function, nn.SiLU):
        fused = KANLayer(3, 2, base_activation="silu", dtype=torch.float64)
        fused.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), fused(x), **EXACT)


def test_a_module_as_base_activation_is_trained_and_saved():
    layer = KANLayer(3, 2, base_activation=nn.PReLU())
    assert "base_activation.weight" in layer.state_dict()
    layer(-torch.rand(4, 3)).sum().backward()
    assert layer.base_activation.weight.grad.abs() > 0


def test_parameters_and_buffers():
    layer = KANLayer(3, 4, 6, 2, bias=True)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "spline_weight": (3, 8, 4),
        "base_weight": (3, 4),
        "bias": (4,),
    }
    assert {name: tuple(b.shape) for name, b in layer.named_buffers()} == {"grid": (3, 11)}
    assert list(layer.state_dict()) == ["spline_weight", "base_weight", "bias", "grid"]
    assert layer.grid_size == 6
    assert (layer.in_features, layer.out_features, layer.input_dim, layer.output_dim) == (3, 4, 3, 4)
    same = KANLayer(input_dim=3, output_dim=4)
    assert (same.in_features, same.out_features) == (3, 4)
    assert not layer.bias.any()
    assert "in_features=3, out_features=4, grid_size=6, spline_order=2, base_activation='silu', bias=True" in repr(layer)
    assert "outside='clamp', backend='reference'" in repr(KANLayer(1, 1, outside="clamp", backend="reference"))


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        layer = KANLayer(2, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.spline_weight.dtype == layer.grid.dtype == torch.float64


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float16 by to", "tensor by to"])
def test_the_grid_is_never_narrower_than_float32(cast):
    layer = KANLayer(2, 2, 20, bias=True)
    knots = layer.grid.clone()
    if cast == "float16 by to":
        layer.to(torch.float16)
    elif cast == "tensor by to":
        layer.to(torch.zeros(1, dtype=torch.bfloat16))
    else:
        getattr(layer, cast)()
    assert layer.spline_weight.dtype == layer.base_weight.dtype == layer.bias.dtype in (torch.float16, torch.bfloat16)
    assert layer.grid.dtype == torch.float32
    assert torch.equal(layer.grid, knots)
    assert layer(torch.rand(3, 2, dtype=layer.bias.dtype)).dtype == layer.bias.dtype
    assert KANLayer(2, 2, dtype=torch.bfloat16).grid.dtype == torch.float32
    narrow = {name: value.half() for name, value in layer.state_dict().items()}
    loaded = KANLayer(2, 2, 20, bias=True)
    loaded.load_state_dict(narrow, assign=True)
    assert loaded.spline_weight.dtype == torch.float16
    assert loaded.grid.dtype == torch.float32
    assert layer.double().grid.dtype == torch.float64
    assert layer.float().grid.dtype == torch.float32
    assert torch.equal(layer.grid, knots)


def test_autocast_is_that_of_linear(place):
    """Weights and result in the autocast dtype; x and the knots stay as they are."""
    layer = KANLayer(3, 4, 20, bias=True, backend=place.backend, device=place.device)
    linear = nn.Linear(3, 4, device=place.device)
    x = torch.rand(50, 3, device=place.device) * 2 - 1
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(place.device.type, dtype):
            y = layer(x)
            assert y.dtype == linear(x).dtype == dtype
            again = layer(torch.nn.functional.pad(y, (0, -1)))  # input in the narrow dtype
            assert again.dtype == dtype
        # As if the weights alone had been rounded: knots and x untouched, to one rounding of the result.
        want = kan_linear(
            x,
            layer.spline_weight.to(dtype).float(),
            layer.grid,
            layer.base_weight.to(dtype).float(),
            layer.bias.to(dtype).float(),
        )
        scale = torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(y.float(), want, rtol=0, atol=2 * scale)
        y.float().sum().backward()
        assert layer.spline_weight.grad.dtype == torch.float32
        # The contraction itself knows nothing of autocast: bases are not rounded.
        args = x, None, layer.spline_weight, layer.base_weight, layer.grid, "silu", "zero", 0, place.backend
        want = ops.contract_output(*args)
        with torch.autocast(place.device.type, dtype):
            assert torch.equal(ops.contract_output(*args), want)
    empty = KANLayer(3, 4, device="meta")
    double = KANLayer(3, 4, dtype=torch.float64)
    with torch.autocast("cpu"):
        assert double(torch.rand(2, 3, dtype=torch.float64)).dtype == torch.float64
        assert empty(torch.rand(2, 3, device="meta")).shape == (2, 4)


def test_copies_and_pickles_are_the_same_function():
    layer = KANLayer(3, 2, bias=True, base_activation="tanh", outside="linear")
    layer.edge_mask = torch.rand(3, 2) > 0.3
    x = torch.randn(10, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.spline_weight is not layer.spline_weight


def test_meta_device():
    layer = KANLayer(3, 2, bias=True, device="meta")
    assert layer(torch.empty(5, 3, device="meta")).shape == (5, 2)
    torch.manual_seed(3)
    layer.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(3)
    want = KANLayer(3, 2, bias=True)
    for name, value in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_reset_parameters():
    layer = KANLayer(3, 2, bias=True, grid_range=(0.0, 2.0))
    before = copy.deepcopy(layer.state_dict())
    layer.grid += 1
    layer.bias.data.fill_(1)
    layer.reset_parameters()
    assert torch.equal(layer.grid, before["grid"])
    assert torch.equal(layer.bias, before["bias"])
    assert not torch.equal(layer.spline_weight, before["spline_weight"])


class TestMask:
    @pytest.fixture
    def layer(self, place):
        layer = KANLayer(4, 3, backend=place.backend, device=place.device)
        layer.edge_mask = (torch.rand(4, 3) > 0.5).to(place.device)
        return layer

    def test_masked_edges_are_zero(self, layer):
        x = torch.rand(10, 4, device=layer.grid.device)
        without = copy.deepcopy(layer)
        without.edge_mask = None
        want = (without.edge_values(x) * layer.edge_mask).sum(1)
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer.edge_values(x).sum(1), want)
        assert not layer.edge_values(x)[:, ~layer.edge_mask].any()
        i, j = (~layer.edge_mask).nonzero()[0].tolist()
        assert not layer.edge(i, j)(x[:, i]).any()

    def test_masked_edges_stay_dead_in_training(self, layer):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        x = torch.rand(10, 4, device=layer.grid.device)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            assert not layer.spline_weight.grad.permute(0, 2, 1)[~layer.edge_mask].any()
            assert not layer.base_weight.grad[~layer.edge_mask].any()
            assert layer.base_weight.grad[layer.edge_mask].all()
            optimizer.step()
        assert not layer.edge_values(x)[:, ~layer.edge_mask].any()

    def test_not_even_nan_passes(self, layer):
        with torch.no_grad():
            layer.spline_weight.masked_fill_(~layer.edge_mask[:, None, :], torch.nan)
        assert layer(torch.rand(10, 4, device=layer.grid.device)).isfinite().all()

    def test_the_mask_travels_with_checkpoints(self, layer):
        fresh = KANLayer(4, 3, device=layer.grid.device)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh.edge_mask, layer.edge_mask)
        unpruned = KANLayer(4, 3, device=layer.grid.device)
        layer.load_state_dict(unpruned.state_dict())
        assert layer.edge_mask is None
        again = KANLayer(4, 3, device=layer.grid.device)
        again.load_state_dict(fresh.state_dict(), assign=True)
        assert torch.equal(again.edge_mask, fresh.edge_mask)

    def test_the_mask_survives_casts(self, layer):
        mask = layer.edge_mask.clone()
        assert torch.equal(layer.half().edge_mask, mask)
        assert layer.edge_mask.dtype == torch.bool


def test_a_partial_state_dict_leaves_the_mask():
    layer = KANLayer(2, 2, bias=True)
    layer.edge_mask = torch.eye(2, dtype=torch.bool)
    layer.load_state_dict({"bias": torch.ones(2)}, strict=False)
    assert layer.edge_mask is not None


def test_a_state_dict_of_another_grid_size_names_the_sizes():
    layer, other = KANLayer(3, 2, 5, 3), KANLayer(3, 2, 10, 2)
    before = copy.deepcopy(layer.state_dict())
    message = "the checkpoint has grid_size = 10 and spline_order = 2, the layer has grid_size = 5 and spline_order = 3"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(other.state_dict())
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_set_grid_while_a_graph_of_the_old_shape_is_alive(dtype):
    layer, x = KANLayer(3, 4, dtype=dtype), torch.randn(5, 3, dtype=dtype)
    loss = layer(x).square().mean()
    loss.backward()
    weight, values = layer.spline_weight, torch.randn(3, 13, 4, dtype=dtype)
    layer.set_grid(spline.uniform_grid(3, 10, 3, (-1, 1)), values)
    assert layer.spline_weight is weight and weight.grad is None and weight.dtype == dtype
    assert torch.equal(weight, values) and weight.data_ptr() != values.data_ptr()
    layer(x).square().mean().backward()
    assert weight.grad.shape == (3, 13, 4)
    assert loss.isfinite()


def test_set_grid_wants_a_tensor():
    with pytest.raises(TypeError, match="^spline_weight: expected a tensor or None, got list"):
        KANLayer(1, 1).set_grid(spline.uniform_grid(1, 5, 3, (-1, 1)), [1.0])


@every_outside
@pytest.mark.parametrize("activation", ["silu", "gelu", torch.sin, None])
def test_edges(activation, outside):
    layer = KANLayer(3, 2, base_activation=activation, outside=outside, dtype=torch.float64, bias=True)
    x = (torch.rand(11, 3, dtype=torch.float64) * 3 - 1.5).requires_grad_()
    values = layer.edge_values(x)
    assert values.shape == (11, 3, 2)
    torch.testing.assert_close(values.sum(1) + layer.bias, layer(x), **EXACT)
    for i, j in ((0, 0), (2, 1), (-1, -2)):
        edge = layer.edge(i, j)
        torch.testing.assert_close(edge(x[:, i]), values[:, i, j], **EXACT)
        assert edge(x[:, i].reshape(11, 1, 1)).shape == (11, 1, 1)
        assert edge(x[0, i]).shape == ()
        value = edge(x[:, i])
        for n in (1, 2, 3):
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            value = slope[:, i]
            torch.testing.assert_close(edge(x[:, i], n), value, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(layer.edge_values(x, n)[:, i, j], value, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        layer.spline_weight.mul_(2)
    assert not torch.equal(edge(x[:, i]), values[:, i, j])  # it follows the layer


def test_edge_values_are_differentiable():
    layer = KANLayer(2, 2, dtype=torch.float64)
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer.edge_values(x), (x, *layer.parameters()))


@pytest.mark.parametrize("activation", ["silu", torch.sin, None])
def test_edge_values_under_autocast(activation):
    """Values and gradients are the same bits."""
    layer, x = KANLayer(4, 3, base_activation=activation), torch.rand(20, 4)
    want = layer.edge_values(x)
    with torch.autocast("cpu", torch.bfloat16):
        values = layer.edge_values(x)
    assert torch.equal(values, want)
    gradients = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (values, want))
    assert all(map(torch.equal, *gradients))


class TestSetGrid:
    def test_knots_alone(self):
        layer = KANLayer(2, 3)
        weight = layer.spline_weight
        grid = make_grid("uneven", 2, 5, 3)
        layer.set_grid(grid)
        assert torch.equal(layer.grid, grid)
        grid += 1
        assert not torch.equal(layer.grid, grid)  # a copy
        assert layer.spline_weight is weight

    def test_another_size(self):
        layer = KANLayer(2, 3, dtype=torch.bfloat16)
        weight = layer.spline_weight
        layer(torch.rand(4, 2, dtype=torch.bfloat16)).sum().backward()
        layer.set_grid(make_grid("uneven", 2, 9, 3).double(), torch.ones(2, 12, 3))
        assert layer.spline_weight is weight  # optimisers keep it
        assert weight.shape == (2, 12, 3)
        assert weight.grad is None
        assert weight.dtype == torch.bfloat16
        assert layer.grid.dtype == torch.float32
        assert layer.grid_size == 9
        assert "grid_size=9" in repr(layer)
        layer(torch.rand(4, 2, dtype=torch.bfloat16)).sum().backward()
        assert weight.grad.shape == (2, 12, 3)

    @pytest.mark.parametrize(
        ("grid", "weight", "message"),
        [
            (torch.zeros(2, 12), None, "^grid: expected an increasing range"),
            (torch.zeros(3, 12), None, r"^grid: expected shape \(in_features, .*\(2, 8 or more\).*got \(3, 12\)"),
            (make_grid("uniform", 2, 6, 3), None, "^spline_weight: needed .* grid_size = 5, got knots of grid_size = 6"),
            (make_grid("uniform", 2, 6, 3), torch.zeros(2, 8, 3), r"= \(2, 9, 3\), got \(2, 8, 3\)"),
        ],
    )
    def test_refuses(self, grid, weight, message):
        with pytest.raises(ValueError, match=message):
            KANLayer(2, 3).set_grid(grid, weight)


def test_parametrized_weights_are_seen():
    """torch.nn.utils.parametrize takes the parameter's place by a property."""

    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    layer = KANLayer(2, 3, base_activation=None)
    x = torch.rand(4, 2)
    want = layer(x) / 2
    nn.utils.parametrize.register_parametrization(layer, "spline_weight", Halved())
    torch.testing.assert_close(layer(x), want)


def test_grid_size_follows_a_checkpoint_of_the_same_size():
    layer = KANLayer(2, 3)
    moved = KANLayer(2, 3)
    moved.set_grid(make_grid("uneven", 2, 5, 3))
    layer.load_state_dict(moved.state_dict())
    x = torch.rand(5, 2)
    assert torch.equal(layer(x), moved(x))
