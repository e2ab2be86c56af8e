"""PEP 517 backend: setuptools, plus the one question that decides what is built: which toolchain is there?

The operators use torch's stable ABI, so any torch >= 2.10 serves as a source of headers, whichever torch the user runs later.
A torch that lies in the environment is used even under pip's build isolation (which hides it from ``sys.path``, not from
``sysconfig``); only when there is none, and there is a compiler, is torch asked for as a build requirement.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import build_meta

MIN_TORCH = (2, 10)


@dataclass(frozen=True)
class Torch:
    """Where torch's headers and libraries are; ``cuda`` is the CUDA release it was built with, or None."""

    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Toolchain:
    """What the build will do: ``kind`` is none, cpp or cuda; ``reason`` says why it is not more."""

    kind: str
    reason: str | None
    cxx: tuple[str, ...] = ()
    target: str = ""
    torch: Torch | None = None
    nvcc: Path | None = None


class BuildError(RuntimeError):
    """What KAN_FAST_BUILD asked for cannot be built."""


def find_torch() -> Torch | None:
    """The first torch >= 2.10 on ``sys.path`` or in this interpreter's site-packages, read without importing it."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    sites = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        sites.append(site.getusersitepackages())
    roots += [Path(folder, "torch") for folder in sites]
    for root in roots:
        version_file = root / "version.py"
        if not (version_file.is_file() and (root / "include/torch/csrc/stable/library.h").is_file()):
            continue
        namespace: dict[str, Any] = {}
        exec(version_file.read_text(), namespace)  # importing torch would need its own dependencies, hidden by isolation
        version = str(namespace["__version__"])
        match = re.match(r"(\d+)\.(\d+)", version)
        if match and (int(match[1]), int(match[2])) >= MIN_TORCH:
            return Torch(root, version, namespace.get("cuda"))
    return None


def find_cxx() -> tuple[tuple[str, ...], str, str | None]:
    """(command, target triple, None), or ((), "", why there is no usable C++20 compiler)."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    commands = [tuple(shlex.split(name)) for name in names]
    command = next((c for c in commands if shutil.which(c[0])), None)
    if command is None:
        return (), "", f"no C++ compiler at build time (looked for {', '.join(names)})"
    probe = [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True, check=False).returncode:
        return (), "", f"{shlex.join(command)} at build time does not accept -std=c++20"
    machine = subprocess.run([*command, "-dumpmachine"], text=True, capture_output=True, check=False).stdout.strip()
    return command, machine, None


def find_nvcc() -> Path | None:
    """nvcc under CUDA_HOME (or CUDA_PATH) if set, else on PATH, else in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return nvcc if nvcc.is_file() else None
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return Path(found) if found else None


def find_python_h() -> Path | None:
    """The interpreter's C header, which distributions ship in a package of its own."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return header if header.is_file() else None


def decide(cuda_sources: bool) -> Toolchain:
    """What to build, from the tools found and KAN_FAST_BUILD (none | cpp | cuda); what is forced and impossible raises.

    A GPU in the box plays no part: wheels are built on machines that have none.
    """
    asked = os.environ.get("KAN_FAST_BUILD", "")
    if asked not in ("", "none", "cpp", "cuda"):
        raise BuildError(f"KAN_FAST_BUILD: expected none, cpp or cuda, got {asked!r}")
    if asked == "none":
        return Toolchain("none", "KAN_FAST_BUILD=none at build time")

    cxx, target, problem = find_cxx()
    torch = find_torch()
    if not sys.platform.startswith("linux"):
        problem = f"the native backend is built on Linux only, and this was {sys.platform}"
    elif problem is None and find_python_h() is None:
        problem = "no Python.h at build time (the interpreter's development headers)"
    elif problem is None and torch is None:
        problem = "no torch >= 2.10 at build time (with --no-build-isolation it must be installed first)"
    if problem is not None:
        if asked:
            raise BuildError(f"KAN_FAST_BUILD={asked}: {problem}")
        return Toolchain("none", problem)

    nvcc = find_nvcc()
    if asked == "cuda":
        if not cuda_sources:
            raise BuildError("KAN_FAST_BUILD=cuda: this version has no CUDA sources (csrc/cuda/*.cu)")
        if nvcc is None:
            raise BuildError("KAN_FAST_BUILD=cuda: no nvcc (looked in CUDA_HOME, PATH and /usr/local/cuda)")
        return Toolchain("cuda", None, cxx, target, torch, nvcc)
    if asked == "cpp":
        no_cuda = "KAN_FAST_BUILD=cpp at build time"
    elif not cuda_sources:
        no_cuda = "this version has no CUDA sources"
    elif torch is not None and torch.cuda is None:
        no_cuda = f"torch {torch.version} at build time has no CUDA (KAN_FAST_BUILD=cuda builds all the same)"
    elif nvcc is None:
        no_cuda = "no nvcc at build time (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    else:
        return Toolchain("cuda", None, cxx, target, torch, nvcc)
    return Toolchain("cpp", no_cuda, cxx, target, torch)


def _torch_requirement() -> list[str]:
    """torch, unless it is there already or nothing will be compiled."""
    if os.environ.get("KAN_FAST_BUILD") == "none" or not sys.platform.startswith("linux"):
        return []
    return [] if find_cxx()[2] is not None or find_torch() is not None else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' own build requirements and, where it must be fetched, torch."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]


get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
build_sdist = build_meta.build_sdist
