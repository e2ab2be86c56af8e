"""KANConv2d and KANFeedForward against explicit unfolding and explicit formulas in float64."""

import pytest
import torch
import truth
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kan_fast.chunks
from kan_fast import KAN, KANConv2d, KANFeedForward, KANLayer, available_backends, prune_kan, update_grid
from kan_fast.traverse import kan_layers

EXACT = {"rtol": 1e-12, "atol": 1e-12}

ARGUMENTS = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": 1, "dilation": (2, 1), "bias": False},
    {"kernel_size": 3, "groups": 2, "padding": 2, "stride": 2},
    {"kernel_size": (2, 1), "groups": 4},
    {"kernel_size": 1},
    {"kernel_size": (4, 3), "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
]


@pytest.fixture(params=[None, 2000, 500, 1], ids=["at once", "images", "lines", "single lines"])
def parts(request, monkeypatch):
    """An image of 9 x 8 pixels of 4 channels has some 2000 numbers in patches of 9, a line some 250."""
    if request.param:
        monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", request.param)


def make(arguments, **options):
    conv = KANConv2d(4, 8, **arguments, dtype=torch.float64, **options)
    for kernel in conv.kernels:
        if kernel.bias is not None:
            kernel.bias.data.normal_()
    return conv


def by_unfolding(conv, x):
    """The same by F.unfold on an image padded by nn.Conv2d's rule, then SciPy's splines on every patch."""
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    else:
        padding = 0 if conv.padding == "valid" else conv.padding
        height, width = padding if isinstance(padding, tuple) else (padding, padding)
        sides = [width, width, height, height]
    x = F.pad(x, sides, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    size = [(n - t - 1) // s + 1 for n, t, s in zip(x.shape[2:], total, conv.stride, strict=True)]
    outputs = []
    for kernel, part in zip(conv.kernels, x.chunk(conv.groups, 1), strict=True):
        columns = F.unfold(part, conv.kernel_size, conv.dilation, 0, conv.stride)  # (N, C kh kw, L)
        rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        arguments = kernel.spline_weight, kernel.base_weight, kernel.grid, kernel.base_activation, kernel.outside, 0
        y = torch.tensor(truth.contract_output(rows, None, *arguments))
        y = y if kernel.bias is None else y + kernel.bias
        outputs.append(y.view(len(x), *size, -1).permute(0, 3, 1, 2))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_convolution_is_unfolding_and_the_formula(arguments, parts):
    conv = make(arguments, grid_size=4, spline_order=2, outside="linear")
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    y = conv(x)
    torch.testing.assert_close(y, by_unfolding(conv, x), **EXACT)
    assert y.is_contiguous()
    assert torch.equal(conv(x[0]), conv(x[:1])[0])
    assert len(conv.kernels) == conv.groups


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_with_linear_edges_it_is_a_convolution(arguments):
    """The identity for a base activation and no splines: nn.Conv2d itself, its shapes and its paddings."""
    conv = make(arguments, base_activation="identity")
    plain = nn.Conv2d(4, 8, **arguments, dtype=torch.float64)
    with torch.no_grad():
        for kernel, weight in zip(conv.kernels, plain.weight.chunk(conv.groups), strict=True):
            kernel.spline_weight.zero_()
            kernel.base_weight.copy_(weight.flatten(1).t())
        if plain.bias is not None:
            plain.bias.copy_(torch.cat([kernel.bias for kernel in conv.kernels]))
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x), **EXACT)


@pytest.mark.parametrize("elements", [None, 40, 1])
def test_gradients_of_the_convolution(elements, monkeypatch):
    if elements:
        monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", elements)
    conv = make({"kernel_size": 2, "padding": 1, "groups": 2}, outside="linear")
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, (x,))
    assert torch.autograd.gradgradcheck(conv, (x,))
    parameters = dict(conv.named_parameters())

    def of_weights(*values):
        return torch.func.functional_call(conv, dict(zip(parameters, values, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(of_weights, tuple(parameters.values()))


def derivatives(conv, x, v):
    """Output, gradients of x and parameters, and second derivatives by all of them."""
    leaves = [x, *conv.parameters()]
    y = conv(x)
    first = torch.autograd.grad((y * v).sum() + y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return y, *first, *second


@pytest.mark.parametrize("activation", ["silu", torch.sin])
@pytest.mark.parametrize("arguments", [ARGUMENTS[1], ARGUMENTS[3], ARGUMENTS[6], ARGUMENTS[10]], ids=str)
def test_parts_have_the_derivatives_of_the_whole(arguments, activation, monkeypatch):
    conv = make(arguments, outside="linear", base_activation=activation)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(conv(x))
    want = derivatives(conv, x, v)
    for elements in (6000, 2000, 500, 1):
        monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", elements)
        for mine, whole in zip(derivatives(conv, x, v), want, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10)
    # Batched gradients, forward mode and transforms find their way too.
    few = conv(x)[:, 0, 0].flatten()
    batched = torch.autograd.grad(few, x, torch.eye(len(few), dtype=few.dtype), is_grads_batched=True, retain_graph=True)[0]
    for place in range(len(few)):
        torch.testing.assert_close(batched[place], torch.autograd.grad(few[place], x, retain_graph=True)[0], **EXACT)
    torch.testing.assert_close(torch.func.grad(lambda x: (conv(x) * v).sum() + conv(x).square().sum())(x), want[1])


class Sizes(TorchDispatchMode):
    """The largest result of any operation that is not a view."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("shape", [(40, 3, 12, 12), (1, 3, 75, 75)], ids=["images", "lines"])
def test_patches_exist_in_parts(shape, monkeypatch):
    """Nothing is larger than the input, the output or a part, forwards and backwards; and the patches are not kept."""
    monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", 5000)
    conv = KANConv2d(3, 4, 3, padding=1, backend="native" if "native" in available_backends("cpu") else "reference")
    x = torch.randn(shape, requires_grad=True)
    pixels = shape[0] * shape[2] * shape[3]
    limit = max(2 * x.numel(), 4 * pixels)
    assert limit < 27 * pixels / 3
    with Sizes() as forwards:
        y = conv(x)
    with Sizes() as backwards:
        y.square().sum().backward()
    if conv.kernels[0].backend == "native":
        assert max(forwards.largest, backwards.largest) <= limit
    monkeypatch.undo()
    want = torch.autograd.grad(conv(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_an_image_that_changes_before_the_backward_pass(monkeypatch):
    monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", 100)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    y = make({"kernel_size": 3})(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="^x: changed in place between the forward and the backward pass"):
        y.sum().backward()
    y = make({"kernel_size": 3, "padding": 1})(x)  # whose padding is a copy
    x.mul_(2)
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_devices_and_memory_formats(place, dtype):
    conv = KANConv2d(3, 5, 3, padding=1, device=place.device, dtype=dtype, backend=place.backend)
    x = torch.randn(2, 3, 6, 7, device=place.device, dtype=dtype)
    y = conv(x)
    assert y.dtype == dtype and y.shape == (2, 5, 6, 7)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(conv(leaf).float().square().sum(), leaf)
    wide, copy = KANConv2d(3, 5, 3, padding=1, device=place.device, dtype=torch.float32), leaf.detach().float().requires_grad_()
    wide.load_state_dict(conv.state_dict())
    (want,) = torch.autograd.grad(wide(copy).square().sum(), copy)
    # Results, gradients by y and the nine terms of a pixel's gradient are rounded.
    torch.testing.assert_close(dx.float(), want, rtol=0, atol=16 * torch.finfo(dtype).eps * float(want.abs().max()))
    assert torch.autograd.grad(conv(leaf[:0]).sum(), leaf)[0].count_nonzero() == 0
    last = conv(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    assert conv(x[:0]).shape == (0, 5, 6, 7)
    with torch.autocast(place.device.type, torch.bfloat16):
        assert KANConv2d(3, 5, 3, device=place.device)(x.float()).dtype == torch.bfloat16


def test_one_graph(monkeypatch):
    monkeypatch.setattr(kan_fast.chunks, "CHUNK_ELEMENTS", 100)
    conv = KANConv2d(4, 8, 3, padding="same", groups=2)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x))


def test_tools_see_the_kernels():
    model = nn.Sequential(KANConv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), KANLayer(12, 2))
    x = torch.rand(6, 1, 6, 6) * 2 - 1
    assert list(kan_layers(model)) == ["0.kernels.0", "3"]
    before = model(x)
    assert max(update_grid(model, x)) < 0.1
    prune_kan(model, 0.01, data=x, relative=True)
    assert (model(x) - before).abs().mean() < 0.2 * before.std()
    other = nn.Sequential(KANConv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), KANLayer(12, 2))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_repr_of_the_convolution():
    assert "4, 8, kernel_size=(3, 3), stride=(2, 2), padding=1, groups=2" in repr(KANConv2d(4, 8, 3, 2, 1, groups=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "groups: expected a divisor of in_channels = 4 and out_channels = 8, got 3"),
        ({"padding": "full"}, "padding: expected a number, two, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding: expected 'same' with stride 1 only, got stride \(2, 2\)"),
        ({"padding": -1}, "padding: expected an int or two of at least 0, got -1"),
        ({"kernel_size": (1, 2, 3)}, "kernel_size: expected an int or two"),
        ({"stride": 0}, "stride: expected an int or two of at least 1, got 0"),
        ({"padding_mode": "mirror"}, "padding_mode: expected one of zeros, reflect, replicate, circular, got 'mirror'"),
    ],
)
def test_wrong_arguments_of_the_convolution(arguments, message):
    with pytest.raises(ValueError, match=message):
        KANConv2d(4, 8, **{"kernel_size": 3, **arguments})


def test_wrong_images():
    conv = KANConv2d(4, 8, 3, dilation=3)
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 4, H, W\) or without N, got \(2, 3, 9, 9\)"):
        conv(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match=r"x: expected at least 7 pixels, .*, got \(9, 6\)"):
        conv(torch.zeros(2, 4, 9, 6))


def test_feed_forward_in_a_block():
    """x + second(first(norm(x))), the formula by SciPy."""
    block = KANFeedForward(6, 5, dropout=0.5, dtype=torch.float64, bias=True).eval()
    for layer in (block.first, block.second):
        layer.bias.data.normal_()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    normed = F.layer_norm(x, (6,))
    want = normed.reshape(-1, 6)
    for layer in (block.first, block.second):
        arguments = layer.spline_weight, layer.base_weight, layer.grid, "silu", "zero", 0
        want = torch.tensor(truth.contract_output(want, None, *arguments)) + layer.bias.detach()
    torch.testing.assert_close(x + block(normed), x + want.view(3, 7, 6), **EXACT)
    block.train()
    assert not torch.equal(block(normed), block(normed))
    assert block.first.grid_range == (-3.0, 3.0)


@pytest.mark.parametrize(("d_model", "grid_size"), [(64, 5), (48, 12), (96, 2)])
def test_feed_forward_has_the_parameters_of_the_mlp(d_model, grid_size):
    """8 d^2 weights; rounding the hidden width changes it by at most half a unit of it."""
    ours = sum(p.numel() for p in KANFeedForward(d_model, grid_size=grid_size).parameters())
    hidden = 4 * d_model / (grid_size + 4)
    assert ours == pytest.approx(8 * d_model**2, rel=0.5 / hidden + 1e-9)


def test_a_transformer_learns_with_it():
    """One block finds the largest of five numbers; the mean of the targets leaves their variance."""
    d_model = 8
    embed, attention, head = nn.Linear(1, d_model), nn.MultiheadAttention(d_model, 2, batch_first=True), KAN([d_model, 1])
    model = nn.ModuleList([embed, attention, KANFeedForward(d_model), head, nn.LayerNorm(d_model)])
    x = torch.rand(128, 5, 1) * 2 - 1
    target = x.amax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        h = embed(x)
        h = h + attention(h, h, h, need_weights=False)[0]
        h = h + model[2](model[4](h))
        loss = (head(h.mean(1)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target.var()
