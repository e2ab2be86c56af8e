"""The emulated kernels as a backend, on CPU tensors: the same four functions as kan_fast/backends/*.py."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kan_fast.activations import ACTIVATIONS
from kan_fast.backends import fake
from kan_fast.spline import OUTSIDE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RESULTS = ("y", "dx", "d_spline", "d_base")
POINTERS = ("x", "scale", "spline_weight", "base_weight", "grid", "g", *RESULTS)


class Problem(ctypes.Structure):
    """kan::cuda::Problem of csrc/kernels.h."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "in_features", "out_features")],
        *[(name, ctypes.c_int) for name in ("grid_size", "spline_order", "activation", "outside", "n")],
        *[(name, ctypes.c_int) for name in ("x_dtype", "weight_dtype", "precision")],
        *[(name, ctypes.c_void_p) for name in POINTERS],
    ]


class NetworkLayer(ctypes.Structure):
    """kan::cuda::NetworkLayer of csrc/kernels.h."""

    _fields_ = [("problem", Problem), ("bias", ctypes.c_void_p), ("d_bias", ctypes.c_void_p)]


class Network(ctypes.Structure):
    """kan::cuda::Network of csrc/kernels.h."""

    _fields_ = [("depth", ctypes.c_int), ("layers", ctypes.POINTER(NetworkLayer))]


class Device(ctypes.Structure):
    """kan::cuda::Device of csrc/kernels.h."""

    _fields_ = [
        ("architecture", ctypes.c_int), ("multiprocessors", ctypes.c_int), ("shared_memory", ctypes.c_int64),
    ]  # fmt: skip


class TileCut(ctypes.Structure):
    """kan::cuda::TileCut of csrc/cuda/launch.h."""

    _fields_ = [
        *[(name, ctypes.c_int) for name in ("whole", "rest", "slices")],
        ("rows", ctypes.c_int64), ("offset", ctypes.c_size_t),
    ]  # fmt: skip


class Fault(Exception):
    """What the emulation found wrong."""


MARGIN = 4096  # numbers of NaN before and behind every tensor: a read shows in results, a write is looked for


# Signalling NaNs: one that comes out of arithmetic is quiet, and looks different.
BITS = {
    torch.float32: (torch.int32, 0x7FBADBAD), torch.float64: (torch.int64, 0x7FF4DBADBADDBAD0),
    torch.bfloat16: (torch.int16, 0x7FBA), torch.float16: (torch.int16, 0x7DBA),
}  # fmt: skip


def _with_margins(tensor: Tensor) -> Tensor:
    """All of a tensor's numbers, contiguous, between margins: 1-D."""
    integer, bits = BITS[tensor.dtype]
    flat = torch.full((tensor.numel() + 2 * MARGIN,), bits, dtype=integer).view(tensor.dtype)
    flat[MARGIN:-MARGIN] = tensor.detach().reshape(-1)
    return flat


def _margins_are_whole(flat: Tensor) -> bool:
    integer, bits = BITS[flat.dtype]
    raw = flat.view(integer)
    return bool((raw[:MARGIN] == bits).all() and (raw[-MARGIN:] == bits).all())


class Backend:
    """The library at `path`, on a GPU of the given architecture with few multiprocessors, so that all paths are met."""

    def __init__(self, path: Path, architecture: int = 80, multiprocessors: int = 4) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.kan_error.restype = ctypes.c_char_p
        self.library.kan_why_not_network.restype = ctypes.c_char_p
        self.device = Device(architecture, multiprocessors, 99 * 1024)
        self.buffers: list[tuple[int, int]] = []  # of the launch under way: addresses and bytes, without margins

    def _held(self, tensor: Tensor) -> tuple[Tensor, int]:
        """A tensor's numbers between margins, and the address of the first: one of the launch's buffers."""
        flat = _with_margins(tensor)
        address = flat.data_ptr() + MARGIN * flat.element_size()
        self.buffers.append((address, tensor.numel() * tensor.element_size()))
        return flat, address

    def _call(self, name: str, problem: ctypes.Structure) -> None:
        """Runs a launch function of the library."""
        failed = getattr(self.library, f"kan_{name}")(ctypes.byref(problem), ctypes.byref(self.device))
        self.buffers = []
        if failed:
            raise Fault(self.library.kan_error().decode())

    def _run(
        self, name: str, grid: Tensor, order: int, activation: str, outside: str, n: int, **tensors: Tensor | None
    ) -> None:
        x = tensors["x"]
        out = next(tensors[key] for key in ("spline_weight", "g") if tensors.get(key) is not None)
        assert x is not None and out is not None
        knots = grid.to(torch.float64 if out.dtype == torch.float64 else torch.float32)
        given = {"grid": knots, **{key: tensor for key, tensor in tensors.items() if tensor is not None}}
        held = {key: self._held(tensor) for key, tensor in given.items()}
        problem = Problem(
            *x.shape, out.shape[-1], grid.shape[1] - 2 * order - 1, order, ACTIVATIONS.index(activation),
            OUTSIDE.index(outside), n, DTYPES.index(x.dtype), DTYPES.index(out.dtype),
            0 if torch.get_float32_matmul_precision() == "highest" else 1,
            **{key: address for key, (_, address) in held.items()},
        )  # fmt: skip
        self._call(name, problem)
        for key, (flat, _) in held.items():
            if not _margins_are_whole(flat):
                raise Fault(f"{key} was written out of bounds")
            if key in RESULTS:
                given[key].copy_(flat[MARGIN:-MARGIN].view(given[key].shape))

    def cut_of_weight(
        self, shape: tuple[int, int, int], grid_size: int, order: int, dtype: torch.dtype, with_base: bool = True
    ) -> TileCut:
        """What contract_weight by warpgroups does for x of dtype: no kernel runs."""
        problem = Problem(
            *shape, grid_size, order, x_dtype=DTYPES.index(dtype), weight_dtype=DTYPES.index(dtype),
            d_base=1 if with_base else None,
        )  # fmt: skip
        cut = TileCut()
        self.library.kan_cut_of_weight(ctypes.byref(problem), ctypes.byref(self.device), ctypes.byref(cut))
        return cut

    def contract_output(
        self, x: Tensor, scale: Tensor | None, spline_weight: Tensor, base_weight: Tensor | None, grid: Tensor, *modes: Any
    ) -> Tensor:
        y = fake.contract_output(x, scale, spline_weight, base_weight, grid, *modes).fill_(torch.nan)
        order = grid.shape[1] - spline_weight.shape[1] - 1
        tensors = {"x": x, "scale": scale, "spline_weight": spline_weight, "base_weight": base_weight, "y": y}
        self._run("contract_output", grid, order, *modes, **tensors)
        return y

    def contract_input(
        self, x: Tensor, spline_weight: Tensor, base_weight: Tensor | None, g: Tensor, grid: Tensor, *modes: Any
    ) -> Tensor:
        dx = fake.contract_input(x, spline_weight, base_weight, g, grid, *modes).fill_(torch.nan)
        tensors = {"x": x, "spline_weight": spline_weight, "base_weight": base_weight, "g": g, "dx": dx}
        self._run("contract_input", grid, grid.shape[1] - spline_weight.shape[1] - 1, *modes, **tensors)
        return dx

    def contract_weight(
        self, x: Tensor, scale: Tensor | None, g: Tensor, grid: Tensor, spline_order: int, *modes: Any
    ) -> tuple[Tensor, Tensor]:
        d_spline, d_base = fake.contract_weight(x, scale, g, grid, spline_order, *modes)
        for result in (d_spline, d_base):
            result.fill_(torch.nan)
        written = {"d_spline": d_spline, "d_base": None if modes[0] == "none" else d_base}
        self._run("contract_weight", grid, spline_order, *modes, x=x, scale=scale, g=g, **written)
        return d_spline, d_base

    def contract_backward(
        self,
        x: Tensor,
        spline_weight: Tensor,
        base_weight: Tensor | None,
        g: Tensor,
        grid: Tensor,
        activation: str,
        *modes: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        outside, n = modes
        order = grid.shape[1] - spline_weight.shape[1] - 1
        dx = self.contract_input(x, spline_weight, base_weight, g, grid, activation, outside, n + 1)
        return dx, *self.contract_weight(x, None, g, grid, order, activation, outside, n)

    def _network(
        self, name: str, model: Any, first: dict[str, Tensor], last: dict[str, Tensor], gradients: bool
    ) -> list[Tensor]:
        """Runs an operator on a KAN; the gradients of its weights, in the order of its parameters, where they are wanted.

        first, last: further tensors of the first and the last layer.
        """
        flats: list[tuple[Tensor, Tensor | None]] = []

        def place(tensor: Tensor | None, result: Tensor | None = None) -> int | None:
            if tensor is None:
                return None
            flat, address = self._held(tensor)
            flats.append((flat, result))
            return address

        found: list[Tensor] = []
        layers = (NetworkLayer * len(model.layers))()
        batch = len(first["x"])
        for at, (layer, c) in enumerate(zip(model.layers, layers, strict=True)):
            activation = "none" if layer.base_weight is None else layer.base_activation
            ends = (first if at == 0 else {}) | (last if at == len(layers) - 1 else {})
            c.problem = Problem(
                batch, layer.in_features, layer.out_features, layer.grid_size, layer.spline_order,
                ACTIVATIONS.index(activation), OUTSIDE.index(layer.outside), 0, 0, 0, 0,
                spline_weight=place(layer.spline_weight), base_weight=place(layer.base_weight), grid=place(layer.grid),
                **{key: place(tensor, tensor if key in RESULTS else None) for key, tensor in ends.items()},
            )  # fmt: skip
            c.bias = place(layer.bias)
            if gradients:
                for key, target, field in (
                    ("spline_weight", c.problem, "d_spline"), ("base_weight", c.problem, "d_base"), ("bias", c, "d_bias"),
                ):  # fmt: skip
                    if getattr(layer, key) is not None:
                        found.append(torch.full_like(getattr(layer, key), torch.nan))
                        setattr(target, field, place(found[-1], found[-1]))
        network = Network(len(layers), layers)
        reason = self.library.kan_why_not_network(ctypes.byref(network), ctypes.byref(self.device))
        if reason is not None:
            raise Fault(f"it does not serve {reason.decode()}")
        self._call(name, network)
        for flat, result in flats:
            if not _margins_are_whole(flat):
                raise Fault("a tensor was written out of bounds")
            if result is not None:
                with torch.no_grad():
                    result.copy_(flat[MARGIN:-MARGIN].view(result.shape))
        return found

    def network_output(self, model: Any, x: Tensor) -> Tensor:
        """model(x)"""
        y = torch.full((len(x), model.layers[-1].out_features), torch.nan)
        self._network("network_output", model, {"x": x}, {"y": y}, False)
        return y

    def network_backward(self, model: Any, x: Tensor, g: Tensor, need_x: bool, need_weights: bool) -> list[Tensor]:
        """[dx where need_x, gradients of all parameters where need_weights]"""
        dx = torch.full_like(x, torch.nan)
        first = {"x": x, "dx": dx} if need_x else {"x": x}
        found = self._network("network_backward", model, first, {"g": g}, need_weights)
        return [dx] * need_x + found
