"""KANConv2d: nn.Conv2d with a learnable function on every weight's place."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kan_fast.nn.layer import KANLayer

# The names of nn.Conv2d and those of F.pad.
_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

Size2d = int | tuple[int, int]


class KANConv2d(nn.Module):
    """y[n,o,h,w] = bias[o] + sum over input channels c of o's group and kernel places (p, q) of phi_ocpq(x[n, c, h', w']),

    h' = stride h + dilation p - padding, w' likewise: nn.Conv2d with functions phi in place of the products by weights.

    forward: (N, in_channels, H, W) -> (N, out_channels, H', W'), or both without N; sizes, memory format and all arguments
    up to dtype are nn.Conv2d's. Padded pixels have the value that padding_mode says, 0 by default, and pass through phi like
    others. grid_size, spline_order and layer_kwargs (grid_range, base_activation, outside, backend) are KANLayer's.

    `kernels` holds a KANLayer(in_channels / groups * kh * kw, out_channels / groups) for every group, whose inputs stand in
    the order of (channel, p, q), so that KAN tools work on it. The patches are laid out in memory once: kh * kw / stride^2
    times the input, and the same again in training.

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
        patches = x.unfold(-2, self._reach[0], self.stride[0]).unfold(-2, self._reach[1], self.stride[1])
        # (..., channels, H', W', kh, kw) -> (..., H', W', channels, kh, kw)
        patches = patches[..., :: self.dilation[0], :: self.dilation[1]].movedim(-5, -3)
        parts = patches.split(self.in_channels // self.groups, -3)
        y = torch.cat([kernel(part.flatten(-3)) for kernel, part in zip(self.kernels, parts, strict=True)], -1)
        y = y.movedim(-1, -3)
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if channels_last else y.contiguous()

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


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(number, int) and number >= least for number in pair):
        raise ValueError(f"{name}: expected an int or two of at least {least}, got {value!r}")
    return pair
