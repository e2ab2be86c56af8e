"""Resource report of the Triton kernels, compiled offline: registers, spills, shared memory, tensor instructions.

    python -m benchmarks --what kernels

needs no GPU: it says what the compiler made of the kernels, and nothing about their speed.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.options import Options, count

if TYPE_CHECKING:
    from benchmarks.offline import Resources
    from kan_fast.backends.triton.launch import Launch

ARCHITECTURES: tuple[int | str, ...] = (80, 90, 100, "gfx942")
KERNELS = ("contract_output", "contract_input", "contract_weight")


@dataclass(frozen=True)
class Configuration:
    """One problem whose kernels get compiled. precision as in torch.set_float32_matmul_precision."""

    kernel: str
    arch: int | str
    dtype: torch.dtype = torch.bfloat16
    precision: str = "highest"
    batch: int = 16384
    in_features: int = 1024
    out_features: int = 1024
    grid_size: int = 5
    spline_order: int = 3
    activation: str = "silu"
    outside: str = "zero"
    n: int = 0
    scaled: bool = False
    x_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            dtype += f" {self.precision}"
        sizes = f"{self.batch},{self.in_features},{self.out_features},{self.grid_size},{self.spline_order}"
        parts = [self.kernel, f"({sizes})", dtype, self.activation, self.outside, f"n={self.n}"]
        return " ".join([*parts, *["scaled"] * self.scaled])

    def plan(self) -> list[Launch]:
        """The launches that the backend would make, on meta tensors."""
        from benchmarks.offline import target
        from kan_fast.backends.triton import launch

        b, i, o = self.batch, self.in_features, self.out_features
        features = self.grid_size + self.spline_order
        x_dtype = self.x_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)

        def meta(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, scale = meta(b, i, dtype=x_dtype), meta(b, i, dtype=x_dtype) if self.scaled else None
        spline, base = meta(i, features, o), meta(i, o) if self.activation != "none" else None
        grid = meta(i, features + self.spline_order + 1, dtype=torch.promote_types(x_dtype, torch.float32))
        modes = self.spline_order, self.activation, self.outside, self.n
        problem = launch.Problem(b, i, features, o, *modes, self.dtype, target(self.arch))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            if self.kernel == "contract_output":
                return launch.plan_contract_output(x, scale, spline, base, grid, meta(b, o), problem)
            if self.kernel == "contract_input":
                return launch.plan_contract_input(x, spline, base, meta(b, o), grid, meta(b, i, dtype=x_dtype), problem)
            d_base = meta(i if base is not None else 0, o)
            return launch.plan_contract_weight(x, scale, meta(b, o), grid, meta(i, features, o), d_base, problem)
        finally:
            torch.set_float32_matmul_precision(before)


def default_configurations(architectures: Iterable[int | str] = ARCHITECTURES) -> list[Configuration]:
    """The layer of the targets, (16384, 1024, 1024), G = 5, in every way that products are computed."""
    ways = (
        {"dtype": torch.bfloat16}, {"dtype": torch.float32, "precision": "high"}, {"dtype": torch.float32},
        {"dtype": torch.float64},
    )  # fmt: skip
    return [
        Configuration(kernel, arch, n=int(kernel == "contract_input"), **way)
        for arch, kernel, way in itertools.product(architectures, KERNELS, ways)
    ]


def all_configurations(architectures: Iterable[int | str] = ARCHITECTURES) -> list[Configuration]:
    """Every dimension of the kernels once in every kernel on every architecture, around the defaults."""
    variations: list[dict[str, Any]] = [
        {"dtype": torch.float16}, {"dtype": torch.float16, "n": 2}, {"dtype": torch.bfloat16, "x_dtype": torch.bfloat16},
        *({"spline_order": k} for k in (0, 1, 2, 4, 5)),
        *({"grid_size": g} for g in (1, 10, 20, 64)),
        *({"activation": a} for a in ("none", "identity", "gelu", "relu", "tanh")),
        *({"outside": o} for o in ("linear", "clamp")),
        *({"n": n} for n in (0, 1, 2, 3, 4)),
        {"n": 5, "spline_order": 5, "outside": "linear", "activation": "gelu"},
        {"batch": 1_000_000, "in_features": 2, "out_features": 5},
        {"batch": 1_000_000, "in_features": 64, "out_features": 1},
        {"batch": 1_000_000, "in_features": 2, "out_features": 256},
        {"batch": 64, "in_features": 784, "out_features": 64}, {"batch": 16, "in_features": 17, "out_features": 33},
        {"batch": 200, "in_features": 300, "out_features": 500},
    ]  # fmt: skip
    made = default_configurations(architectures)
    for arch, kernel, variation in itertools.product(architectures, KERNELS, variations):
        for dtype in (torch.bfloat16, torch.float32):
            made.append(Configuration(kernel, arch, **{"dtype": dtype, **variation}))
    for arch in architectures:
        made += [Configuration(kernel, arch, scaled=True, n=1) for kernel in ("contract_output", "contract_weight")]
    return list(dict.fromkeys(made))


def compile_configuration(configuration: Configuration) -> list[Resources]:
    """Compile every launch of a configuration."""
    from benchmarks.offline import compile_launch

    return [
        compile_launch(launch, f"{configuration.name}: {launch.kernel.__name__}", configuration.arch)
        for launch in configuration.plan()
    ]


def row(resources: Resources) -> dict[str, Any]:
    """One row of the report."""
    return {
        "what": "kernels", "measured": "compiled offline, not run", "kernel": resources.name, "arch": str(resources.arch),
        "registers": resources.registers,
        "spills": resources.spills, "shared": resources.shared, "warps": resources.warps,
        "instructions": resources.instructions, "tensor": resources.tensor, "compile_s": round(resources.seconds, 2),
    }  # fmt: skip


def run(options: Options) -> list[dict[str, Any]]:
    """Compile the default configurations and print what came out; one row for each kernel."""
    found: list[dict[str, Any]] = []
    if importlib.util.find_spec("triton") is None:
        options.report("not done: the package triton is not installed")
        return []
    options.report("compiled offline, not run: what the compiler made of the kernels, and nothing about their speed")
    configurations = default_configurations()
    for at, configuration in enumerate(configurations, 1):
        options.progress(count(at, len(configurations)) + configuration.name)
        for resources in compile_configuration(configuration):
            made = row(resources)
            found.append(made)
            options.emit([made])
            options.report(
                f"{made['arch']:>7} {made['registers']:4} registers {made['spills']:4} spills {made['shared']:7} B shared"
                f" {made['warps']:2} warps {made['instructions']:6} instructions  {made['kernel']}"
                f"  {' '.join(f'{count} {name}' for name, count in made['tensor'].items())}"
            )
    options.report(f"{len(found)} kernels compiled offline, none of them run")
    return found
