"""KAN: stacks of layers, and the signal through deep ones at the start."""

import pytest
import torch

from kan_fast import KAN, KANLayer, KolmogorovArnoldNetwork


def test_structure():
    model = KAN([2, 5, 1], 7, 2, bias=True, outside="clamp")
    assert isinstance(model.layers, torch.nn.ModuleList)
    assert [type(layer) for layer in model.layers] == [KANLayer, KANLayer]
    assert [(layer.in_features, layer.out_features) for layer in model.layers] == [(2, 5), (5, 1)]
    assert {(layer.grid_size, layer.spline_order, layer.outside) for layer in model.layers} == {(7, 2, "clamp")}
    assert model.layer_dims == [2, 5, 1]
    assert KolmogorovArnoldNetwork is KAN
    assert "layers.1.bias" in model.state_dict()


def test_forward_is_one_layer_after_the_other(place):
    model = KAN([3, 4, 2], backend=place.backend, device=place.device)
    x = torch.randn(2, 7, 3, device=place.device)
    want = model.layers[1](model.layers[0](x))
    if place.device.type == "cpu":
        assert torch.equal(model(x), want)
    else:  # one kernel for the whole network sums in another order
        torch.testing.assert_close(model(x), want)


def test_reset_parameters_draws_every_layer_anew():
    model = KAN([3, 4, 2])
    before = [layer.spline_weight.clone() for layer in model.layers]
    model.reset_parameters()
    assert not any(torch.equal(layer.spline_weight, old) for layer, old in zip(model.layers, before, strict=True))


def test_regularization_loss():
    model = KAN([3, 4, 2])
    want = sum(layer.spline_weight.abs().sum() for layer in model.layers)
    loss = model.regularization_loss(0.5)
    torch.testing.assert_close(loss, 0.5 * want)
    assert loss.shape == ()
    loss.backward()
    assert torch.equal(model.layers[0].spline_weight.grad, 0.5 * model.layers[0].spline_weight.sign())
    torch.testing.assert_close(model.regularization_loss(), 1e-4 * want)
    model.layers[0].edge_mask = torch.zeros(3, 4, dtype=torch.bool)
    torch.testing.assert_close(model.regularization_loss(1.0), model.layers[1].spline_weight.abs().sum())


@pytest.mark.parametrize("options", [{}, {"outside": "linear"}, {"base_activation": None}, {"base_activation": "relu"},
                                     {"base_activation": "identity"}, {"base_activation": torch.sin},
                                     {"grid_size": 20}, {"spline_order": 1}, {"grid_range": (-3.0, 3.0)}], ids=str)
def test_the_signal_keeps_its_variance_through_ten_layers(options):
    """Second moments of U(a, b) through KAN([64] * 11), geometric mean over 8 draws of the weights.

    The rule is exact in expectation for values of the assumed distribution, normal with the variance of U(a, b). One draw
    spreads: the mean square of 64 normal values has a standard deviation of sqrt(2 / 64) = 18 %, which a mean of 8 draws
    brings to 6 %, and activations that grow faster than linearly pass on 1.2 times what reaches them. Hence 25 % for
    one layer, four of those deviations, and a factor of 1.6 in all.
    """
    a, b = options.get("grid_range", (-1.0, 1.0))
    moments = torch.zeros(8, 11)
    variances = torch.zeros(8, 11)
    for draw in range(8):
        torch.manual_seed(draw)
        model = KAN([64] * 11, **options)
        x = torch.rand(1024, 64) * (b - a) + a
        with torch.no_grad():
            for depth in range(11):
                moments[draw, depth] = x.square().mean()
                variances[draw, depth] = x.var(0).mean()
                if depth < 10:
                    x = model.layers[depth](x)
    moments, variances = moments.log().mean(0).exp(), variances.log().mean(0).exp()
    ratios = moments[1:] / moments[:-1]
    assert ratios.min() > 0.8, ratios
    assert ratios.max() < 1.25, ratios
    assert 1 / 1.6 < moments[-1] / moments[0] < 1.6
    # Part of the second moment becomes the mean of a unit, the same for all data: ReLU, all of whose values are positive,
    # ends with a sixth of what varies over the data. It must not die out.
    assert variances[-1] / variances[0] > 0.1


@pytest.mark.parametrize("widths", [[2, 64, 1], [1, 5, 100, 3]])
def test_the_variance_does_not_depend_on_the_width(widths):
    outputs = []
    for draw in range(20):
        torch.manual_seed(draw)
        outputs.append(KAN(widths)(torch.rand(500, widths[0]) * 2 - 1).detach().square().mean())
    # 20 draws of at least a hundred weights each: the mean is good to a third.
    assert 1 / 3 / 2 < torch.stack(outputs).mean() < 2 / 3


def test_a_nearly_dead_activation_does_not_get_enormous_weights():
    layer = KANLayer(8, 8, base_activation="relu", grid_range=(-3.0, -2.0))
    assert layer.base_weight.abs().max() < 1


def test_gradients_reach_the_first_of_ten_layers():
    model = KAN([16] * 11)
    model(torch.rand(256, 16) * 2 - 1).square().mean().backward()
    norms = torch.stack([layer.base_weight.grad.norm() for layer in model.layers])
    assert norms.max() / norms.min() < 30


def test_learns():
    """Two hundred steps of Adam fit a smooth function to a few per cent."""
    torch.manual_seed(1)
    x = torch.rand(512, 2) * 2 - 1
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2)
    model = KAN([2, 5, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * y.var()
