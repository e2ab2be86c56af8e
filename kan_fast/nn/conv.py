"""KANConv2d: nn.Conv2d with a learnable function on every weight's place."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn import functional as F

from kan_fast import chunks
from kan_fast.checks import expect
from kan_fast.nn.layer import KANLayer
from kan_fast.operators import dispatched

# The names of nn.Conv2d and those of F.pad.
_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

Pair = tuple[int, int]
Size2d = int | Pair
# First line and number of lines, several times.
Lines = tuple[Pair, ...]


class KANConv2d(nn.Module):
    """y[n,o,h,w] = bias[o] + sum over input channels c of o's group and kernel places (p, q) of phi_ocpq(x[n, c, h', w']),

    h' = stride h + dilation p - padding, w' likewise: nn.Conv2d with functions phi in place of the products by weights.

    forward: (N, in_channels, H, W) -> (N, out_channels, H', W'), or both without N; sizes, memory format and all arguments
    up to dtype are nn.Conv2d's. Padded pixels have the value that padding_mode says, 0 by default, and pass through phi like
    others. grid_size, spline_order and layer_kwargs (grid_range, base_activation, outside, backend) are KANLayer's.

    `kernels` holds a KANLayer(in_channels / groups * kh * kw, out_channels / groups) for every group, whose inputs stand in
    the order of (channel, p, q), so that KAN tools work on it.

    Patches are laid out in memory for a part of the output at a time: images, or rows of one image, whose patches have up to
    chunks.CHUNK_ELEMENTS numbers, or one row of pixels where that is more. Several parts are not kept for training: the
    backward pass lays them out once more from the (padded) input, which is. In compiled and exported programs, forward mode
    and torch.func all patches exist at once, kh * kw / stride^2 times the input.

    Raises ValueError for arguments that do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d = 1,
        padding: Size2d | str = 0,
        dilation: Size2d = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        grid_size: int = 5,
        spline_order: int = 3,
        **layer_kwargs: Any,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            expect(isinstance(value, int), name, "an int", value)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels = {in_channels} and out_channels = {out_channels}, got {groups}"
            )
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        self.padding, self.padding_mode = padding, padding_mode
        # Pixels that one patch reaches over.
        self._reach = [d * (size - 1) + 1 for d, size in zip(self.dilation, self.kernel_size)]
        self._margins = self._find_margins()
        patch = in_channels // groups * self.kernel_size[0] * self.kernel_size[1]
        layer_kwargs.update(bias=bias, device=device, dtype=dtype)
        self.kernels = nn.ModuleList(
            KANLayer(patch, out_channels // groups, grid_size, spline_order, **layer_kwargs) for _ in range(groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W'), or both without N"""
        expect(isinstance(x, Tensor), "x", "a tensor", x)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"x: expected shape (N, {self.in_channels}, H, W) or without N, got {tuple(x.shape)}")
        if any(self._margins):
            x = F.pad(x, self._margins, _PADDING_MODES[self.padding_mode])
        for axis in (0, 1):
            if x.shape[axis - 2] < self._reach[axis]:
                raise ValueError(
                    f"x: expected at least {self._reach[axis]} pixels, padding included, for a kernel of {self.kernel_size}"
                    f" with dilation {self.dilation}, got {tuple(x.shape[-2:])}"
                )
        y = (self._convolved(x) if x.dim() == 4 else self._convolved(x[None])[0]).movedim(-1, -3)
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if channels_last else y.contiguous()

    def _convolved(self, x: Tensor) -> Tensor:
        """Padded images (N, in_channels, H, W) -> (N, H', W', out_channels)"""
        height, width = ((x.shape[axis - 2] - self._reach[axis]) // self.stride[axis] + 1 for axis in (0, 1))
        line = width * self.in_channels * self.kernel_size[0] * self.kernel_size[1]  # a row of pixels, in patches
        if _watched() or len(x) * height * line <= chunks.CHUNK_ELEMENTS:
            return self._at_once(x, keep=True)
        sizes = [part.stop - part.start for part in chunks.chunks(len(x), height * line)]
        return torch.cat([self._by_lines(images, height, len(images) * line) for images in x.split(sizes)])

    def _by_lines(self, x: Tensor, height: int, line: int) -> Tensor:
        """Images (n, in_channels, H, W) of `height` lines each -> (n, height, W', out_channels)"""
        places = [(rows.start, rows.stop - rows.start) for rows in chunks.chunks(height, line)]
        bands = tuple((first * self.stride[0], (count - 1) * self.stride[0] + self._reach[0]) for first, count in places)
        parts = [x] if len(bands) == 1 else _Bands.apply(x, bands)
        return torch.cat([self._at_once(part, keep=False) for part in parts], 1)

    def _at_once(self, x: Tensor, keep: bool) -> Tensor:
        """(n, in_channels, h, W) -> (n, h', W', out_channels), whose patches autograd keeps or makes again."""
        outputs = []
        for group, kernel in enumerate(self.kernels):
            patches = self._patches(x, group)
            rows = patches.flatten(0, 2)
            with nullcontext() if keep else _made_again(rows, x, functools.partial(self._patches, group=group)):
                y = kernel(rows)
            outputs.append(y.view(*patches.shape[:3], y.shape[1]))
        return torch.cat(outputs, -1)

    def _patches(self, x: Tensor, group: int) -> Tensor:
        """(n, in_channels, h, W) -> (n, h', W', in_channels / groups * kh * kw)"""
        channels = self.in_channels // self.groups
        part, shape = x.narrow(1, group * channels, channels), (self.kernel_size, self.dilation, self.stride)
        patches: Tensor = _laid_out(part, *shape) if _watched() else _Patches.apply(part, *shape)
        return patches

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        for name, default in (("padding", 0), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    def _find_margins(self) -> list[int]:
        """Pixels to add on the left, right, top and bottom, in the order of F.pad."""
        if self.padding == "valid":
            return [0, 0, 0, 0]
        if self.padding == "same":
            if self.stride != (1, 1):
                raise ValueError(f"padding: expected 'same' with stride 1 only, got stride {self.stride}")
            before = [(reach - 1) // 2 for reach in self._reach]
            after = [reach - 1 - left for reach, left in zip(self._reach, before)]
        elif isinstance(self.padding, str):
            raise ValueError(f"padding: expected a number, two, 'same' or 'valid', got {self.padding!r}")
        else:
            before = after = list(_pair("padding", self.padding, 0))
        return [before[1], after[1], before[0], after[0]]


def _watched() -> bool:
    """Whether a compiler, exporter, transform of torch.func or forward mode is at work, to whom parts would be in the way."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def _made_again(made: Tensor, source: Tensor, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Autograd does not keep `made`, which is make(source) in another shape, where operations inside save it."""
    present, shape, version = [made], made.shape, source._version

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.shape == shape and saved.is_set_to(present[0]) else saved

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        if source._version != version:
            raise RuntimeError("x: changed in place between the forward and the backward pass of a convolution that needs it")
        return make(source.detach()).view(shape)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        present.clear()  # or the hooks would keep it themselves


def _laid_out(x: Tensor, kernel_size: Pair, dilation: Pair, stride: Pair) -> Tensor:
    """(n, C, h, W) -> (n, h', W', C * kh * kw)"""
    reach = [d * (size - 1) + 1 for d, size in zip(dilation, kernel_size)]
    windows = x.unfold(2, reach[0], stride[0]).unfold(3, reach[1], stride[1])
    return windows[..., :: dilation[0], :: dilation[1]].movedim(1, 3).flatten(3)


class _Patches(torch.autograd.Function):
    """_laid_out, whose gradient F.fold sums two to twenty times as fast as autograd does along the views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel_size: Pair, dilation: Pair, stride: Pair) -> Tensor:
        ctx.size, ctx.shape = x.shape, (kernel_size, dilation, stride)
        return _laid_out(x, kernel_size, dilation, stride)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kernel_size, dilation, stride = ctx.shape
        if dispatched(gradient):  # batched gradients, which F.fold takes one by one, with a warning
            with torch.enable_grad():
                x = torch.zeros(ctx.size, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
                (dx,) = torch.autograd.grad(_laid_out(x, *ctx.shape), x, gradient, create_graph=True)
        else:
            columns = gradient.flatten(1, 2).transpose(1, 2)
            dx = F.fold(columns, ctx.size[2:], kernel_size, dilation, 0, stride)
        return dx, None, None, None


class _Bands(torch.autograd.Function):
    """(n, C, H, W) -> for each (first, size) the lines [first, first + size) of the images, which may overlap.

    Slices, but for their gradient: theirs would fill and add images of zeros, one for each slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bands: Lines) -> tuple[Tensor, ...]:
        ctx.bands, ctx.height = bands, x.shape[2]
        return tuple(x.narrow(2, first, size) for first, size in bands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Overlapped.apply(ctx.height, ctx.bands, *gradients), None


class _Overlapped(torch.autograd.Function):
    """Bands -> the sum of them in their places, (n, C, height, W)"""

    @staticmethod
    def forward(ctx: Any, height: int, bands: Lines, *parts: Tensor) -> Tensor:
        ctx.bands = bands
        total = parts[0].new_zeros(*parts[0].shape[:2], height, parts[0].shape[3])
        for (first, size), part in zip(bands, parts, strict=True):
            total.narrow(2, first, size).add_(part)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, *_Bands.apply(gradient, ctx.bands)


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(number, int) and number >= least for number in pair):
        raise ValueError(f"{name}: expected an int or two of at least {least}, got {value!r}")
    return pair
