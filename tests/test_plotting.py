import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from kan_fast import KAN, plot_history, plot_kan, plot_layer  # noqa: E402
from kan_fast.history import History  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def boxes(ax):
    return [patch for patch in ax.patches if isinstance(patch, plt.Rectangle)]


def curves(ax):
    return [line for line in ax.lines if len(line.get_xdata()) == 200]


def test_every_living_edge_has_a_box_with_its_curve():
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    model.layers[0].edge_mask = torch.tensor([[True, False, True], [True, True, True]])
    x = torch.rand(50, 2, dtype=torch.float64)
    ax = plot_kan(model, x, input_names=["height", "depth"], output_names=["price"])
    assert len(boxes(ax)) == 8
    assert len(curves(ax)) == 8
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["height", "depth", "price"]
    # The first curve is edge (0, 0, 0) over what it sees, up to scales.
    at = torch.linspace(float(x[:, 0].min()), float(x[:, 0].max()), 200, dtype=torch.float64)
    values = model.layers[0].edge(0, 0)(at).detach()
    drawn = torch.as_tensor(curves(ax)[0].get_ydata())
    def normed(v):
        return (v - v.min()) / (v.max() - v.min())

    torch.testing.assert_close(normed(drawn), normed(values), rtol=0, atol=1e-9)
    ax.figure.canvas.draw()


def test_faded_by_importance():
    model = KAN([1, 2, 1], dtype=torch.float64)
    with torch.no_grad():
        model.layers[1].spline_weight[1] *= 1e-3
        model.layers[1].base_weight[1] *= 1e-3
    strong, weak = (line.get_alpha() for line in curves(plot_kan(model, torch.rand(50, 1, dtype=torch.float64)))[2:])
    assert strong > 3 * weak
    assert weak >= 0.15


def test_big_networks_show_their_strongest_edges():
    torch.manual_seed(0)
    model = KAN([40, 30, 5])
    ax = plot_kan(model, max_edges=25)
    assert len(boxes(ax)) == 25
    assert ax.get_title() == "25 of 1350 edges"
    assert len(boxes(plot_kan(model, threshold=0.99))) < 20


def test_layer_shows_curves_knots_and_data():
    torch.manual_seed(0)
    layer = KAN([2, 3], dtype=torch.float64).layers[0]
    x = torch.randn(100, 2, dtype=torch.float64)
    figure = plot_layer(layer, x, input_names=["a", "b"])
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == [f"{i} → out {o}" for i in "ab" for o in range(3)]
    assert sorted(axes[0].lines[1].get_xdata()) == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1])
    line = axes[4].lines[0]
    expected = layer.edge(1, 1)(torch.as_tensor(line.get_xdata())).detach()
    torch.testing.assert_close(torch.as_tensor(line.get_ydata()), expected, rtol=0, atol=1e-12)
    assert sum(len(ax.patches) for ax in figure.axes) >= 6 * 40
    figure.canvas.draw()
    assert "strongest of 6" in plot_layer(layer, max_edges=2).get_suptitle()


def test_history():
    history = History([1.0, 0.1, 0.2], [1.1, 0.3, 0.25], best_epoch=2)
    ax = history.plot()
    assert ax.get_yscale() == "log"
    assert [line.get_label() for line in ax.lines] == ["train", "validation", "best: 0.25"]
    assert list(ax.lines[1].get_ydata()) == [1.1, 0.3, 0.25]
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert plot_history(History([0.0], [0.0], best_epoch=0)).get_yscale() == "linear"


def test_errors():
    with pytest.raises(TypeError, match="model"):
        plot_kan(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="max_edges"):
        plot_kan(KAN([1, 1]), max_edges=0)
    with pytest.raises(ValueError, match="x: expected"):
        plot_layer(KAN([2, 1]).layers[0], torch.rand(5, 3))


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"kan_fast\[plot\]"):
        plot_kan(KAN([1, 1]))
