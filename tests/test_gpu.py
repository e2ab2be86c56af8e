"""What only a GPU can show of a backend's kernels: streams, graphs, other devices, tensors of more than 2^31 numbers."""

import pytest
import torch
from conftest import parameters

from kan_fast import KAN, KANLayer
from kan_fast.backends import get, reference
from kan_fast.spline import uniform_grid

# The reference is PyTorch's own operators, whose promises are not ours to test.
KERNELS = [p for p in parameters(torch.float32) if p.values[0].device.type == "cuda" and p.values[0].backend != "reference"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
every_kernel = pytest.mark.parametrize("place", KERNELS)
every_size = pytest.mark.parametrize("size", [(300, 40, 50), (3000, 3, 4)], ids=["wide", "narrow"])


def make(place, size, device="cuda"):
    batch, into, out = size
    layer = KANLayer(into, out, backend=place.backend, device=device)
    return layer, 2 * torch.rand(batch, into, device=device) - 1, torch.randn(batch, out, device=device)


def results(layer, x, g):
    """y and the gradients of x and of the parameters."""
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], g)]


@every_kernel
@every_size
def test_kernels_run_on_the_current_stream(place, size):
    layer, real, _ = make(place, size)
    x = torch.zeros_like(real)
    with torch.no_grad():
        expected, _ = layer(real), layer(x)  # compiled before the race
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # some 30 ms; who does not wait for them reads zeros
            x.copy_(real)
            y = layer(x)
        side.synchronize()
    assert torch.equal(y, expected)


@every_kernel
@every_size
def test_later_calls_give_the_numbers_of_the_first(place, size):
    """Of Triton these are remembered launches; of other tensors they have to be right as well."""
    layer, x, g = make(place, size)
    other = x.flip(0).contiguous().requires_grad_()
    expected = results(layer, x.requires_grad_(), g)
    for _ in range(3):
        assert all(map(torch.equal, results(layer, x, g), expected))
    y, dx, *_ = results(layer, other, g.flip(0).contiguous())
    torch.testing.assert_close(y, expected[0].flip(0))
    torch.testing.assert_close(dx, expected[1].flip(0))


@every_kernel
@every_size
def test_a_captured_step_can_be_replayed(place, size):
    layer, first, g = make(place, size)
    x = first.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(layer, x, g)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Without their history: autograd warns where gradients meet nodes that were made on another stream.
        captured = [result.detach() for result in results(layer, x, g)]
    for seed in range(3):
        torch.manual_seed(seed)
        other = 2 * torch.rand_like(first) - 1
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        for ours, expected in zip(captured, results(layer, other.requires_grad_(), g), strict=True):
            assert torch.equal(ours, expected)


@every_kernel
@every_size
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_than_the_current_device(place, size):
    layer, x, g = make(place, size, "cuda:1")
    assert torch.cuda.current_device() == 0
    truth = KANLayer(size[1], size[2], backend="reference", device="cuda:1")
    truth.load_state_dict(layer.state_dict())
    found = results(layer, x.requires_grad_(), g)
    assert torch.cuda.current_device() == 0
    for ours, expected in zip(found, results(truth, x, g), strict=True):
        assert ours.device == expected.device
        # Two sums in float32, in different orders, of at most 3000 terms.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@every_kernel
@every_size
def test_the_same_bits_a_hundred_times(place, size):
    layer, x, g = make(place, size)
    first = results(layer, x.requires_grad_(), g)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, results(layer, x, g), strict=True))


@every_kernel
@pytest.mark.parametrize(("batch", "into", "out"), [(70_000, 1, 32_768), (2**29 + 3, 4, 1)], ids=["wide", "narrow"])
def test_more_numbers_than_32_bits_count(place, batch, into, out):
    free = torch.cuda.mem_get_info()[0]
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.0f}")
    assert batch * max(into, out) > 2**31
    backend, rows = get(place.backend), 5
    x = torch.rand(batch, into, device="cuda", dtype=torch.bfloat16) * 2 - 1
    spline = torch.randn(into, 8, out, device="cuda").bfloat16()
    base = torch.randn(into, out, device="cuda").bfloat16()
    grid = uniform_grid(into, 5, 3, (-1.0, 1.0), device="cuda")
    g = torch.zeros(batch, out, device="cuda", dtype=torch.bfloat16)
    g[-rows:] = torch.randn(rows, out, device="cuda").bfloat16()  # so the last rows alone decide every sum
    modes = "silu", "zero", 0
    last = (x[-rows:].double(), spline.double(), base.double(), g[-rows:].double(), grid.double())
    y = backend.contract_output(x, None, spline, base, grid, *modes)[-rows:]
    close(y, reference.contract_output(last[0], None, last[1], last[2], last[4], *modes))
    dx = backend.contract_input(x, spline, base, g, grid, *modes)[-rows:]
    close(dx, reference.contract_input(*last[:3], last[3], last[4], *modes))
    found = backend.contract_weight(x, None, g, grid, 3, *modes)
    for ours, expected in zip(found, reference.contract_weight(last[0], None, last[3], last[4], 3, *modes), strict=True):
        close(ours, expected)


def close(ours, expected):
    """bfloat16 features, weights and results: three roundings of 2^-9 in every term and one of the sum."""
    assert (ours.double() - expected).abs().max() <= 2.0**-6 * expected.abs().max()


@every_kernel
@pytest.mark.parametrize("batch", [1, 300, 20_000, 70_000])
def test_a_network_as_one_call_has_the_numbers_of_its_layers(place, batch, monkeypatch):
    if place.backend != "native":
        pytest.skip("networks are one call of the native backend")
    calls = []
    for name in ("network_output", "network_backward"):
        operation = getattr(get("native"), name)
        monkeypatch.setattr(get("native"), name, lambda *args, run=operation, name=name: calls.append(name) or run(*args))
    model = KAN([2, 5, 5, 1], bias=True, device="cuda", backend="native")
    x = (3 * torch.rand(batch, 2, device="cuda") - 1.5).requires_grad_()
    g = torch.randn(batch, 1, device="cuda")
    ours = results(model, x, g)
    assert calls == ["network_output", "network_backward"] * (batch <= 65_536)
    assert all(torch.equal(mine, again) for mine, again in zip(ours, results(model, x, g), strict=True))
    model.fused = False
    for mine, other in zip(ours, results(model, x, g), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max()))
