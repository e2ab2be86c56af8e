import math

import pytest
import torch

from kan_fast import KAN
from kan_fast.regularization import activation_regularization, advanced_regularization, edge_l1


def test_coefficient_penalties_are_their_formulas():
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    l1 = rough = 0.0
    for layer in model.layers:
        for i in range(layer.in_features):
            for o in range(layer.out_features):
                c = layer.spline_weight[i, :, o].tolist()
                l1 += sum(abs(v) for v in c)
                rough += sum((c[f + 1] - c[f]) ** 2 for f in range(len(c) - 1))
    # The same sums of some hundred terms in another order.
    assert float(model.regularization_loss(1e-4).detach()) == pytest.approx(1e-4 * l1, rel=1e-13)
    penalty = advanced_regularization(model, 1e-2, 1e-1)
    assert float(penalty.detach()) == pytest.approx(1e-2 * l1 + 1e-1 * rough, rel=1e-13)
    penalty.backward()
    assert all(layer.spline_weight.grad.abs().max() > 0 for layer in model.layers)


def reference_penalty(model, x, l1_factor, entropy_factor):
    """Edge by edge, in Python floats."""
    total = 0.0
    with torch.no_grad():
        for layer in model.layers:
            norms = [
                float(layer.edge(i, o)(x[:, i]).abs().mean())
                for i in range(layer.in_features)
                for o in range(layer.out_features)
            ]
            if layer.edge_mask is not None:
                norms = [v for v, alive in zip(norms, layer.edge_mask.flatten().tolist()) if alive]
            whole = sum(norms)
            total += l1_factor * whole
            total += entropy_factor * -sum(v / whole * math.log(v / whole) for v in norms if v > 0)
            x = layer(x)
    return total


def test_activation_penalty_is_the_papers():
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    x = torch.rand(200, 2, dtype=torch.float64)
    output, penalty = activation_regularization(model, x, 0.5, 2.0, return_output=True)
    assert float(penalty.detach()) == pytest.approx(reference_penalty(model, x, 0.5, 2.0), rel=1e-12)
    torch.testing.assert_close(output, model(x))
    assert float(activation_regularization(model, x, 0.5, 2.0).detach()) == float(penalty.detach())


def test_one_pass_through_the_model():
    model = KAN([2, 3, 1])
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    activation_regularization(model, torch.rand(10, 2), return_output=True)
    assert len(calls) == 2


def test_dead_edges_give_no_nan():
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    layer = model.layers[0]
    layer.edge_mask = torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad():
        layer.spline_weight[0, :, 0] = 0
        layer.base_weight[0, 0] = 0
    x = torch.rand(50, 2, dtype=torch.float64)
    penalty = activation_regularization(model, x) + advanced_regularization(model)
    penalty.backward()
    assert penalty.isfinite()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
    assert (layer.spline_weight.grad[1, :, 0] == 0).all()
    assert float(activation_regularization(model, x).detach()) == pytest.approx(reference_penalty(model, x, 1, 1), rel=1e-12)


def test_wholly_dead_layer_gives_zero():
    model = KAN([2, 1])
    model.layers[0].edge_mask = torch.zeros(2, 1, dtype=torch.bool)
    penalty = activation_regularization(model, torch.rand(5, 2))
    penalty.backward()
    assert float(penalty.detach()) == 0
    assert (model.layers[0].spline_weight.grad == 0).all()


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    model = KAN([3, 4, 2], dtype=torch.float64)
    x = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)

    def value_and_gradients():
        penalty = activation_regularization(model, x)
        return penalty, torch.autograd.grad(penalty, [x, *model.parameters()])

    whole, whole_gradients = value_and_gradients()
    monkeypatch.setattr("kan_fast.chunks.CHUNK_ELEMENTS", 100)
    rows = []
    edge_values = type(model.layers[0]).edge_values

    def watched(self, x):
        rows.append(x.numel() * self.out_features)
        return edge_values(self, x)

    monkeypatch.setattr(type(model.layers[0]), "edge_values", watched)
    parts, part_gradients = value_and_gradients()
    assert max(rows) <= 100
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(part_gradients, whole_gradients)


def test_edge_l1_gradient():
    layer = KAN([2, 2], dtype=torch.float64).layers[0]
    x = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: edge_l1(layer, x), (x, layer.spline_weight))
