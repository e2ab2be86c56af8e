"""From tensors to kernel launches: arguments, tiles, and the cases that need no kernel.

plan_* functions describe launches without making them (they read shapes, dtypes, strides, never data, and work on meta
tensors): the backend runs the plans, offline compilation compiles the very same ones.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kan_fast.activations import ACTIVATIONS
from kan_fast.backends.triton import interpreted, tiles, tuning
from kan_fast.backends.triton.kernels.contract_input import contract_input_wide
from kan_fast.backends.triton.kernels.contract_output import contract_output_wide
from kan_fast.backends.triton.kernels.contract_weight import add_splits, contract_weight_split
from kan_fast.backends.triton.kernels.features import describe_knots
from kan_fast.backends.triton.kernels.narrow import contract_input_narrow, contract_output_narrow, contract_weight_narrow
from kan_fast.backends.triton.tiles import Target, Tile
from kan_fast.spline import OUTSIDE

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass
class Launch:
    """One kernel launch: (programs, ...), arguments by name, Triton's options."""

    kernel: Any
    programs: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """On the current device and stream; returns the compiled kernel."""
        return self.kernel[self.programs](**self.arguments, **self.options)


@dataclass(frozen=True)
class Problem:
    """What all kernels ask about a layer: sizes, modes, and how its products are computed."""

    batch: int
    in_features: int
    features: int
    out_features: int
    order: int
    activation: str
    outside: str
    n: int
    weight_dtype: torch.dtype
    target: Target

    @property
    def spline(self) -> bool:
        """Whether there is a spline part: derivatives of order above k are 0."""
        return self.n <= self.order

    @property
    def base(self) -> bool:
        """Whether there is a base branch."""
        return self.activation != "none"

    @property
    def products(self) -> str:
        """One of the ways in tiles.py, as torch.set_float32_matmul_precision says for float32.

        "highest" is three bfloat16 numbers, 24 bits together; "high" and "medium" are two, 16 bits. AMD has units for float32.
        """
        if self.weight_dtype == torch.float64:
            return tiles.DOUBLE
        if self.weight_dtype == torch.bfloat16 or (self.weight_dtype == torch.float16 and self.n < 2):
            return tiles.HALF
        if self.target.kind == "hip":
            return tiles.IEEE
        # Higher derivatives grow as 1/h^n, beyond float16: two bfloat16 numbers have more bits and the range.
        if self.weight_dtype == torch.float16:
            return tiles.TWO
        return tiles.THREE if torch.get_float32_matmul_precision() == "highest" else tiles.TWO

    def modes(self) -> dict[str, Any]:
        """The compile-time arguments that every kernel has."""
        return {
            "ORDER": self.order,
            "FEATURES": self.features,
            "ACTIVATION": ACTIVATIONS.index(self.activation),
            "OUTSIDE": OUTSIDE.index(self.outside),
            "N": self.n,
            "SPLINE": self.spline,
            "DTYPE": tl.float64 if self.weight_dtype == torch.float64 else tl.float32,
        }

    def product_modes(self) -> dict[str, Any]:
        """Those of the kernels that use tl.dot."""
        parts = {tiles.THREE: 3, tiles.TWO: 2}.get(self.products, 1)
        if parts > 1:
            return {"PARTS": parts, "OPERAND": tl.bfloat16}
        return {"PARTS": 1, "OPERAND": tl.float32 if self.products == tiles.IEEE else _TYPES[self.weight_dtype]}


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device; for the interpreter a small one, so that small tests meet every path."""
    if device.type != "cuda":
        return Target("interpreter", "cpu", 4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def run(launches: list[Launch], device: torch.device) -> list[Any]:
    """Make the launches of a plan on a device, on that device's current stream; interpreted if Triton is.

    Returns the compiled kernels, none if interpreted.
    """
    if interpreted():
        from kan_fast.backends.triton import interpreter

        interpreter.run(launches)
        return []
    if device.index == torch.cuda.current_device():
        return [step.run() for step in launches]
    with torch.cuda.device(device):
        return [step.run() for step in launches]


def plan_contract_output(
    x: Tensor,
    scale: Tensor | None,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    grid: Tensor,
    y: Tensor,
    problem: Problem,
    tile: Tile | None = None,
) -> list[Launch]:
    """Launches that fill y (B, O). Weights and grid contiguous; x and scale of any strides.

    tile: of the wide kernel, instead of what tiles.py or tuning.py say.
    """
    p = problem
    arguments = {
        "x": x, "scale": x if scale is None else scale, "spline_weight": spline_weight,
        "base_weight": spline_weight if base_weight is None else base_weight, "all_knots": grid, "y": y,
        "batch": p.batch, "in_features": p.in_features, "out_features": p.out_features,
        **_strides("x", x), **_strides("scale", x if scale is None else scale),
        "SCALED": scale is not None, **p.modes(),
    }  # fmt: skip
    if tile is None and tiles.is_narrow(p.batch, p.in_features, p.out_features, p.target):
        tile = tiles.narrow_tile(p.batch, p.in_features, p.out_features, p.order, p.products, p.target)
        arguments.update(ROWS=tile.rows, COLUMNS=tile.columns, INPUTS=tile.inputs, OUTPUTS=arguments.pop("out_features"))
        programs = tiles.narrow_programs(p.batch, tile, p.target)
        return [_launch(contract_output_narrow, (programs,), arguments, tile, p.target)]
    tile = tile or tuning.tile("contract_output", p, x.device)
    knots, described = _plan_knots(grid, p)
    arguments.update(p.product_modes(), **described, ROWS=tile.rows, COLUMNS=tile.columns)
    arguments.update(INPUTS=tile.inputs, BASES=tile.bases, DEPTH=tile.depth, GROUP=tile.group)
    arguments["WHOLE"] = p.in_features % tile.inputs == 0
    arguments["OFFSETS"] = tl.int32 if tile.inputs * p.features * p.out_features < 2**31 else tl.int64
    programs = -(-p.batch // tile.rows) * -(-p.out_features // tile.columns)
    return [*knots, _launch(contract_output_wide, (programs,), arguments, tile, p.target)]


def plan_contract_input(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    grid: Tensor,
    dx: Tensor,
    problem: Problem,
    tile: Tile | None = None,
) -> list[Launch]:
    """Launches that fill dx (B, I). Weights and grid contiguous; x and g of any strides. tile: as in the other plans."""
    p = problem
    arguments = {
        "x": x, "spline_weight": spline_weight, "base_weight": spline_weight if base_weight is None else base_weight,
        "g": g, "all_knots": grid, "dx": dx, "batch": p.batch, "in_features": p.in_features, "out_features": p.out_features,
        **_strides("x", x), **_strides("g", g), **p.modes(),
    }  # fmt: skip
    if tile is None and tiles.is_narrow(p.batch, p.in_features, p.out_features, p.target):
        tile = tiles.narrow_tile(p.batch, p.in_features, p.out_features, p.order, p.products, p.target)
        arguments.update(ROWS=tile.rows, INPUTS=tile.inputs, OUTPUTS=arguments.pop("out_features"))
        programs = tiles.narrow_programs(p.batch, tile, p.target)
        return [_launch(contract_input_narrow, (programs,), arguments, tile, p.target)]
    tile = tile or tuning.tile("contract_input", p, x.device)
    arguments.update(p.product_modes(), ROWS=tile.rows)
    arguments.update(INPUTS=tile.inputs, BASES=tile.bases, DEPTH=tile.depth, GROUP=tile.group)
    programs = -(-p.batch // tile.rows) * -(-p.in_features // tile.inputs)
    return [_launch(contract_input_wide, (programs,), arguments, tile, p.target)]


def plan_contract_weight(
    x: Tensor,
    scale: Tensor | None,
    g: Tensor,
    grid: Tensor,
    d_spline: Tensor,
    d_base: Tensor,
    problem: Problem,
    tile: Tile | None = None,
) -> list[Launch]:
    """Launches that fill d_spline (I, F, O), unless its derivative is 0, and d_base (I, O), if there is a base branch.

    tile: instead of what tiles.py or tuning.py say.
    """
    p = problem
    narrow = tile is None and tiles.is_narrow_weight(p.in_features, p.out_features)
    if narrow:
        tile = tiles.narrow_weight_tile(p.features, p.out_features, p.products)
    tile = tile or tuning.tile("contract_weight", p, x.device)
    parts = -(-p.in_features // tile.inputs) * -(-p.features // tile.bases) if p.spline else 0
    if narrow:
        parts = parts or p.in_features  # the base branch goes with the first bases
    elif p.base:
        parts += -(-p.in_features // (tile.inputs * tile.bases))
    programs = parts * -(-p.out_features // tile.columns)
    spline_size = p.in_features * p.features * p.out_features if p.spline else 0
    base_size = p.in_features * p.out_features if p.base else 0
    count, rows = tiles.splits(p.batch, programs, spline_size + base_size, tile.depth, p.target, tile.warps)
    spline_parts, base_parts = d_spline, d_base
    if count > 1:
        dtype = torch.promote_types(g.dtype, torch.float32)
        spline_parts = x.new_empty((count, spline_size), dtype=dtype)
        base_parts = x.new_empty((count, base_size), dtype=dtype)
    arguments = {
        "x": x, "scale": x if scale is None else scale, "g": g, "all_knots": grid,
        "d_spline": spline_parts, "d_base": base_parts,
        "batch": p.batch, "in_features": p.in_features, "out_features": p.out_features,
        **_strides("x", x), **_strides("scale", x if scale is None else scale), **_strides("g", g),
        "rows_per_split": rows, "SCALED": scale is not None, **p.modes(),
        "COLUMNS": tile.columns, "BASES": tile.bases,
    }  # fmt: skip
    if narrow:
        launches = [_launch(contract_weight_narrow, (programs, count), {**arguments, "ROWS": tile.rows}, tile, p.target)]
    else:
        arguments.update(p.product_modes(), INPUTS=tile.inputs, DEPTH=tile.depth)
        launches = [_launch(contract_weight_split, (programs, count), arguments, tile, p.target)]
    if count > 1:
        size, depth = tiles.sum_tile(spline_size + base_size, count, p.target)
        arguments = {
            "spline_parts": spline_parts, "base_parts": base_parts, "d_spline": d_spline, "d_base": d_base,
            "spline_size": spline_size, "base_size": base_size, "splits": count, "SIZE": size, "DEPTH": depth,
        }  # fmt: skip
        launches.append(Launch(add_splits, (-(-(spline_size + base_size) // size),), arguments, _options(4, 1)))
    return launches


def _plan_knots(grid: Tensor, p: Problem) -> tuple[list[Launch], dict[str, Any]]:
    """The launch that describes knots, if there are splines, and the arguments that say where it leaves what it found."""
    found = {"middles": grid, "scales": grid, "uniform": grid}
    if not p.spline:
        return [], {**found, "DESCRIBED": tiles.DESCRIBED}
    programs = -(-p.in_features // tiles.DESCRIBED)
    for name in ("middles", "scales"):
        found[name] = grid.new_empty(p.in_features, dtype=torch.promote_types(p.weight_dtype, torch.float32))
    found["uniform"] = grid.new_empty(programs, dtype=torch.int32)
    modes = p.modes()
    arguments = {"all_knots": grid, **found, "in_features": p.in_features, "INPUTS": tiles.DESCRIBED}
    arguments.update({name: modes[name] for name in ("ORDER", "FEATURES", "DTYPE")})
    return [Launch(describe_knots, (programs,), arguments, _options(1, 1))], {**found, "DESCRIBED": tiles.DESCRIBED}


def _launch(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any], tile: Tile, target: Target) -> Launch:
    """The launch of a kernel in tiles. Of small ones two blocks fit a multiprocessor whatever a thread's registers; left alone,
    NVIDIA's assembler aims at three or more and spills a few for it. AMD's compiler does not know the option.
    """
    launch = Launch(kernel, programs, arguments, _options(tile.warps, tile.stages))
    if tile.warps <= 4 and target.kind == "cuda":
        launch.options["maxnreg"] = 255
    return launch


def _options(warps: int, stages: int) -> dict[str, Any]:
    # Multiply-adds may be fused: said aloud, because the default differs between versions of Triton.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_row": tensor.stride(0), f"{name}_col": tensor.stride(1)}
