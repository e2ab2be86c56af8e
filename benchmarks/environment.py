"""Where a row was measured: commit, versions, device, threads, allocator."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from kan_fast.info import info as kan_fast_info

ROOT = Path(__file__).resolve().parent.parent
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h


def set_allocator(regime: str) -> str:
    """"keep": glibc gives no memory back to the system, so that no call pays page faults for fresh buffers of a
    size it has used before. "default": glibc as it is, where every buffer above its threshold is mapped afresh.
    Returns the regime in force ("default" where there is no glibc). ValueError for another name.
    """
    if regime not in ("keep", "default"):
        raise ValueError(f"allocator: expected 'keep' or 'default', got {regime!r}")
    if regime == "keep":
        if platform.libc_ver()[0] != "glibc":
            return "default"
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
            return "default"
    return regime


def cpu_name() -> str:
    """The CPU's model name, the widest vector extension it has, and KAN_FAST_ISA where that asks for a narrower one."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = {
        key.strip(): value.strip()
        for key, found, value in (line.partition(":") for line in info.splitlines())
        if found
    }
    name = lines.get("model name", platform.machine())
    if "cpu family" in lines:  # a virtual machine's "AMD EPYC" may be of any generation
        name += f" family {lines['cpu family']} model {lines.get('model', '?')}"
    flags = lines.get("flags", "").split()
    vector = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    forced = os.environ.get("KAN_FAST_ISA")
    notes = [vector] * bool(vector) + [f"KAN_FAST_ISA={forced}"] * bool(forced)
    return f"{name} ({', '.join(notes)})" if notes else name


def isa() -> str:
    """The instruction set of the native kernels that run here; "baseline" where there are none."""
    return str(kan_fast_info()["native"].get("isa_chosen", "baseline"))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def commit() -> str:
    """Short commit of the working tree, with "+" if its code differs from it; "unknown" outside a checkout.

    KAN_FAST_COMMIT says it instead, for a copy that came to another machine without its history.
    """
    if told := os.environ.get("KAN_FAST_COMMIT"):
        return told

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        code = ("kan_fast", "csrc", "benchmarks", ":!benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: str, allocator: str) -> dict[str, object]:
    """Everything a row says about its circumstances."""
    found: dict[str, object] = {
        "commit": commit(),
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kan_fast": version("kan_fast") or "in place",
        "triton": version("triton"),
        "allocator": allocator,
        "tuned": os.environ.get("KAN_FAST_TUNE", "0"),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["cuda_kernel"] = os.environ.get("KAN_FAST_CUDA_KERNEL", "")
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
