"""The CUDA kernels of whole networks, emulated: the numbers of the layers, faults, and planted bugs."""

import numpy as np
import pytest
import torch
import truth
from networks import assert_same, gradients, inputs, layered, make, true_gradients
from samples import KINDS, every_activation, every_outside

from kan_fast import KAN
from kan_fast.activations import ACTIVATIONS
from kan_fast.spline import OUTSIDE
from tests.cuda_emulation.backend import Backend, Fault
from tests.cuda_emulation.build import build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64")


@pytest.fixture
def gpu(library):
    """A GPU of one multiprocessor, whose few blocks walk over many tiles."""
    return Backend(library, multiprocessors=1)


def of_gpu(gpu, model, x, g):
    """y, then the gradients of x and of every parameter."""
    return gpu.network_output(model, x), *gpu.network_backward(model, x, g, True, True)


def compare(gpu, model, x, g):
    """Twice the error of the plain PyTorch reference and a floor, as in test_native_network.py."""
    oracle = layered(model)
    for layer in oracle.layers:
        layer.backend = "reference"
    triples = zip(of_gpu(gpu, model, x, g), true_gradients(model, x, g), gradients(oracle, x, g), strict=True)
    for mine, exact, other in triples:
        if exact.size == 0:
            continue
        error, allowed = (np.abs(truth.doubled(value) - exact).max() for value in (mine, other))
        floor = 400 * torch.finfo(torch.float32).eps * max(1.0, np.abs(exact).max())
        assert error <= 2 * allowed + floor, (error, allowed, floor)


@every_outside
@every_activation
def test_activations_and_outside_modes(gpu, activation, outside):
    model = make([3, 4, 2], torch.float32, kind="uneven", activation=activation, outside=outside, bias=True)
    compare(gpu, model, *inputs(130, [3, 2], torch.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_orders_and_knots(gpu, k, kind):
    for widths, grid_size, batch in (([2, 5, 1], 5, 700), ([1, 3, 2, 1], 12, 33), ([2, 3, 16], 1, 1)):
        outside, activation = OUTSIDE[(k + grid_size) % 3], ACTIVATIONS[(k + grid_size) % 6]
        model = make(widths, torch.float32, grid_size, k, kind, activation, outside, k == 2)
        compare(gpu, model, *inputs(batch, widths, torch.float32))


def test_order_zero(gpu):
    """Values jump at knots: the layers' own are the truth, where no hidden value comes near one."""
    model = make([2, 2, 1], torch.float32, k=0, bias=True)
    x, g = inputs(60, [2, 1], torch.float32)
    assert_same(of_gpu(gpu, model, x, g), gradients(layered(model), x, g), rtol=1e-4, atol=1e-5)


def test_six_layers_and_the_widest(gpu):
    compare(gpu, make([2, 3, 2, 3, 2, 3, 1], torch.float32), *inputs(40, [2, 1], torch.float32))
    compare(gpu, make([8, 8, 1], torch.float32), *inputs(40, [8, 1], torch.float32))


def test_parts_of_the_backward(gpu):
    model = make([2, 5, 1], torch.float32, bias=True)
    x, g = inputs(150, [2, 1], torch.float32)
    dx, *weights = gpu.network_backward(model, x, g, True, True)
    assert_same(gpu.network_backward(model, x, g, True, False), [dx], rtol=0, atol=0)
    assert_same(gpu.network_backward(model, x, g, False, True), weights, rtol=0, atol=0)
    # An empty batch: zeros.
    dx, *weights = gpu.network_backward(model, x[:0], g[:0], True, True)
    assert dx.shape == (0, 2)
    assert all((weight == 0).all() for weight in weights)
    assert gpu.network_output(model, x[:0]).shape == (0, 1)


def test_nan_stays_in_its_row(gpu):
    model = make([2, 5, 1], torch.float32)
    x, _ = inputs(200, [2, 1], torch.float32)
    x[150, 1] = torch.nan
    y = gpu.network_output(model, x)
    assert y.isnan().nonzero().tolist() == [[150, 0]]


def test_rows_that_do_not_exist_add_nothing(gpu):
    """A tile's last rows have no numbers, and the layers before might make infinities of their zeros."""
    model = make([1, 3, 1], torch.float32, k=1, activation="none")
    with torch.no_grad():
        model.layers[0].spline_weight[0, 2:4] = torch.inf
    x = torch.tensor([-0.95, -0.9, 0.9, 0.95, 0.97])[:, None]
    ours = of_gpu(gpu, model, x, torch.ones(5, 1))
    assert_same(ours, gradients(layered(model), x, torch.ones(5, 1)), equal_nan=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (KAN([2, 5, 1], spline_order=4), "spline orders above 3"),
        (KAN([2, 5, 17]), "such widths"),
        (KAN([2] * 8), "so many layers"),
        (KAN([16, 16, 16], 30), "beyond the shared memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_is_refused(gpu, model, reason):
    with pytest.raises(Fault, match=reason):
        gpu.network_output(model, torch.zeros(3, model.layers[0].in_features))


PLANTED = {
    "no barrier before the sums": ("cuda/network.cu", r"barrier\(\);  // all windows", "// all windows"),
    "no barrier behind the sums": ("cuda/network.cu", r"barrier\(\);  // nobody", "// nobody"),
    "sums of rows that do not exist": ("cuda/network.cu", r"exists \? (window\[q\]\.at\(met\.at\.u\)) : 0\.0f", r"\1"),
    "gradients of rows that do not exist": ("cuda/network.cu", r"exists \? value : 0\.0f", "value"),
    "slope by the place alone": ("cuda/network.cu", r" \* met\.inverse", ""),
    "base of another input": ("cuda/network.cu", r"\+ i \* plan\.base_pitch;\n        Cubic", ";\n        Cubic"),
    "one block's sums": ("cuda/network.cu", r"b < a\.blocks; b \+= 32", "b < 1; b += 32"),
}


@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED.keys())
def test_planted_bugs_are_seen(change):
    """Each fails the comparison, or the emulation says why it cannot be."""
    gpu = Backend(build(changes=[change]), multiprocessors=1)

    def run():
        compare(gpu, make([3, 5, 2], torch.float32, kind="uneven", bias=True), *inputs(700, [3, 2], torch.float32))
        test_rows_that_do_not_exist_add_nothing(gpu)

    with pytest.raises((AssertionError, Fault)):
        run()
