"""Who is measured: kan_fast's backends, linear layers, a plain PyTorch KAN, and rivals, by a small adapter each.

An adapter builds the rival's layer for a shape and, where the rival computes the same function, gives it kan_fast's
coefficients, so that the gate compares outputs and not merely shapes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import kan_fast
from benchmarks import environment
from benchmarks.cases import Shape
from benchmarks.gate import with_backend
from benchmarks.plain import PlainKANLayer
from kan_fast import backends

Make = Callable[[Shape, kan_fast.KANLayer], nn.Module]


@dataclass(frozen=True)
class Contestant:
    """One line of the table.

    make: (shape, our layer) -> a module from x (batch, width) to y (batch, out). exact: computes our function, given
    our coefficients. ours: a backend of kan_fast. wide: takes x of in * (G + k + 1) features (equal parameters).
    absent: why it cannot take part here, or None. version: of the package that is measured besides torch and kan_fast, or the
    commit of its checkout.
    """

    name: str
    make: Make
    exact: bool = False
    ours: bool = False
    wide: bool = False
    absent: str | None = None
    version: str | None = None
    note: str = ""

    def versions(self) -> dict[str, str]:
        """A row's column of it."""
        return {} if self.version is None else {"version": self.version}


def _require_cubic(shape: Shape, name: str) -> None:
    if shape.spline_order != 3:
        raise ValueError(f"{name} has cubic splines only, got spline_order {shape.spline_order}")


def _coefficients(ours: kan_fast.KANLayer) -> tuple[Tensor, Tensor]:
    """spline_weight (in, G + k, out) and base_weight (in, out), float32."""
    assert ours.base_weight is not None
    return ours.spline_weight.detach().float(), ours.base_weight.detach().float()


def _linear(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    return nn.Linear(shape.in_features, shape.out_features, bias=False)


def _linear_equal(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    return nn.Linear(shape.linear_features, shape.out_features, bias=False)


def _plain(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    layer = PlainKANLayer(shape.in_features, shape.out_features, ours.grid.float(), shape.spline_order)
    spline, base = _coefficients(ours)
    layer.weight.data = torch.cat([base.T, spline.flatten(0, 1).T], dim=1).contiguous()
    return layer


def _compiled(make: Make) -> Make:
    def made(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
        module = make(shape, ours)
        module.compile()
        return module

    return made


def _inkan(compile_basis: bool) -> Make:
    def make(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
        _require_cubic(shape, "inkan")
        inkan: Any = importlib.import_module("inkan")
        layer: Any = inkan.KANLayer(shape.in_features, shape.out_features, shape.grid_size, compile_basis=compile_basis)
        spline, base = _coefficients(ours)
        layer.weight.data = torch.cat([spline.flatten(0, 1).T, base.T], dim=1).contiguous()
        return cast(nn.Module, layer)

    return make


def _flashkan(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    _require_cubic(shape, "flashkan")
    flashkan: Any = importlib.import_module("flashkan")
    spline, base = _coefficients(ours)
    layer: Any = flashkan.KANLayer(shape.in_features, shape.out_features, shape.grid_size)
    layer.spline_weight.data = spline.permute(2, 0, 1).contiguous()
    layer.base_weight.data = base.T.contiguous()
    return cast(nn.Module, layer)


def _efficient_kan(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    efficient: Any = importlib.import_module("efficient_kan")
    # Without the standalone scaler the layer has our parameter count. Its constructor solves a least-squares problem.
    spline, base = _coefficients(ours)
    layer: Any = efficient.KANLinear(
        shape.in_features, shape.out_features, shape.grid_size, shape.spline_order, enable_standalone_scale_spline=False
    )
    layer.spline_weight.data = spline.permute(2, 0, 1).contiguous()
    layer.base_weight.data = base.T.contiguous()
    return cast(nn.Module, layer)


class _FirstOutput(nn.Module):
    """pykan's layer also returns the activations of every edge; the first output is y."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


PYKAN_LIMIT = 2**28  # numbers in pykan's (batch, out, in) tensors, of which it makes several


def _pykan(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    size = shape.batch * shape.in_features * shape.out_features
    if size > PYKAN_LIMIT // 2:
        raise MemoryError(f"not run: pykan makes several tensors of batch x out x in = {size:.1e} numbers")
    kan: Any = importlib.import_module("kan")
    spline, base = _coefficients(ours)
    layer: Any = kan.KANLayer(shape.in_features, shape.out_features, num=shape.grid_size, k=shape.spline_order)
    layer.coef.data = spline.permute(0, 2, 1).contiguous()
    layer.scale_base.data = base.clone()
    layer.scale_sp.data = torch.ones_like(layer.scale_sp)
    return _FirstOutput(layer)


def _fast_kan(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    fastkan: Any = importlib.import_module("fastkan")
    bases = shape.grid_size + shape.spline_order
    layer: nn.Module = fastkan.FastKANLayer(shape.in_features, shape.out_features, -1.0, 1.0, bases)
    return layer


def _kanditioned(shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    package: Any = importlib.import_module("KANditioned")
    layer: nn.Module = package.KANLayer(
        shape.in_features, shape.out_features, "random_normal", num_control_points=shape.features, spline_width=2.0,
        impl="embedding_bag",  # the default implementation raises
    )
    return layer


def _backend(name: str) -> Make:
    return lambda shape, ours: with_backend(ours, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pykan writes a folder into the working directory and prints when it is imported or built."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(here)


def _missing(module: str, hint: str) -> str | None:
    try:
        with _quiet():
            importlib.import_module(module)
    except ImportError as error:
        return f"{error} ({hint})"
    except Exception as error:
        return f"importing {module} failed: {type(error).__name__}: {error}"
    return None


_peer_paths: list[Path] = []


def add_peer_paths(folders: list[Path]) -> None:
    """Let checkouts be imported from; FileNotFoundError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"--peer-path: expected a folder, got {folder}")
        if folder.resolve() in _peer_paths:
            continue
        _peer_paths.append(folder.resolve())
        for place in (folder, folder / "src"):
            if place.is_dir():
                sys.path.append(str(place.resolve()))


def version_of(module: str, package: str | None) -> str | None:
    """The commit of the --peer-path checkout that a module is from, else its distribution's version; None if unknown."""
    found = getattr(sys.modules[module], "__file__", None)
    for folder in _peer_paths:
        if found is not None and Path(found).resolve().is_relative_to(folder):
            return _commit(folder)
    return environment.version(package) if package is not None else None


def _commit(folder: Path) -> str | None:
    """The short commit of a checkout; None where the folder is in no repository, or only in ours."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == environment.ROOT:
            return None
        return git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


PIP, CHECKOUT = "pip install .[peers]", "not on PyPI: --peer-path DIR"
# name, module, make, same function as ours, distribution, how to get it, remark
RIVALS: list[tuple[str, str, Make, bool, str | None, str, str]] = [
    ("efficient-kan", "efficient_kan", _efficient_kan, True, None, CHECKOUT, ""),
    ("inkan", "inkan", _inkan(True), True, "inkan", PIP, "basis compiled"),
    ("inkan eager", "inkan", _inkan(False), True, "inkan", PIP, ""),
    ("flashkan", "flashkan", _flashkan, True, "flashkan", PIP, "basis compiled"),
    ("pykan", "kan", _pykan, True, "pykan", PIP, "KANLayer"),
    ("fast-kan", "fastkan", _fast_kan, False, None, CHECKOUT, "Gaussian bases, layer norm"),
    ("kanditioned", "KANditioned", _kanditioned, False, "kanditioned", PIP, "piecewise linear, no base branch"),
]


def peer_names() -> list[str]:
    """Who can be measured besides kan_fast and the equal-parameter linear layer."""
    return ["linear", "cox-de-boor", "cox-de-boor compiled", *(rival[0] for rival in RIVALS)]


def contestants(
    backend: str = "auto",
    peers: list[str] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Contestant]:
    """All lines of the table, in its order.

    backend: "auto" for every backend, absent where it does not serve `dtype` on `device`, else that one. peers: names of those
    to measure besides kan_fast and the equal-parameter linear layer; None for all. ValueError names an unknown peer.
    """
    known = peer_names()
    chosen = known if peers is None else peers
    for peer in chosen:
        if peer not in known:
            raise ValueError(f"peers: expected any of {known}, got {peer!r}")
    names = backends.NAMES if backend == "auto" else [backend]
    reasons = {name: backends.reason_not(name, torch.device(device), dtype) for name in names}
    ours = [Contestant(f"kan_fast {name}", _backend(name), exact=True, ours=True, absent=reasons[name]) for name in names]
    others = [
        Contestant("linear", _linear, note="same in and out"),
        Contestant("cox-de-boor", _plain, exact=True, note="plain PyTorch"),
        Contestant("cox-de-boor compiled", _compiled(_plain), exact=True, note="torch.compile"),
    ]
    for name, module, make, exact, package, hint, note in RIVALS:
        if name in chosen:
            absent = _missing(module, hint)
            version = None if absent is not None else version_of(module, package)
            others.append(Contestant(name, make, exact=exact, absent=absent, version=version, note=note))
    equal = Contestant("linear equal", _linear_equal, wide=True, note="in * (G + k + 1) inputs: equal parameters")
    return [*ours, equal, *(other for other in others if other.name in chosen)]


def build(contestant: Contestant, shape: Shape, ours: kan_fast.KANLayer) -> nn.Module:
    """The contestant's module with our coefficients, on our layer's device and dtype."""
    weight = ours.spline_weight
    with _quiet():
        module = contestant.make(shape, ours).to(weight.device)
    return module if contestant.ours else module.to(weight.dtype)
