"""What this installation can do, and why not more: ``python -m kan_fast.info``."""

import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from kan_fast import backends

_PACKAGE = Path(__file__).parent


def info() -> dict[str, Any]:
    """Versions, backends and the build, as plain values.

    Keys: "kan_fast", "python", "torch" (versions), "cuda" (torch's CUDA release or None), "gpus" (names), "threads";
    "backends": {name: {"cpu": None or the reason why not, "cuda": likewise}};
    "build": {"built": none | cpp | cuda | unknown, "reason": why not more, or None, "torch": whose headers, or None};
    "native": what `_build_info.info()` says (compiler, instruction sets, CUDA architectures), or {"missing": reason}.
    """
    has_cuda = torch.cuda.is_available()
    build = _build_record()
    return {
        "kan_fast": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_cuda else [],
        "threads": torch.get_num_threads(),
        "backends": {name: {kind: _reason_not(name, kind, build) for kind in ("cpu", "cuda")} for name in backends.NAMES},
        "build": build,
        "native": _native(build),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("kan_fast")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (imported from its source folder)"


def _build_record() -> dict[str, str | None]:
    """What setup.py wrote down."""
    path = _PACKAGE / "_build_record.json"
    if not path.exists():
        reason = "neither `pip install` nor `make build` was run on this folder"
        if _has_library():
            reason = f"the library is there, but {path.name}, which says how it was built, is not"
        return {"built": "unknown", "reason": reason, "torch": None}
    record: dict[str, str | None] = json.loads(path.read_text())
    return record


def _has_library() -> bool:
    """Whether there is native code to be asked, built here or named by KAN_FAST_NATIVE_LIBRARY."""
    return bool(os.environ.get("KAN_FAST_NATIVE_LIBRARY")) or (_PACKAGE / "_native.so").exists()


def _native(build: dict[str, str | None]) -> dict[str, Any]:
    try:
        module = importlib.import_module("kan_fast._build_info")
    except ImportError as error:
        built = build["built"] not in ("none", "unknown") or _has_library()
        return {"missing": str(error) if built else build["reason"]}
    try:
        facts: dict[str, Any] = module.info()
    except RuntimeError as error:  # KAN_FAST_ISA asks for what there is not
        return {"missing": str(error)}
    return facts


def _reason_not(name: str, kind: str, build: dict[str, str | None]) -> str | None:
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
    if name == "native" and build["built"] in ("none", "unknown") and not _has_library():
        return f"it was not built: {build['reason']}"
    return backends.reason_not(name, torch.device(kind), torch.float32)


def report() -> str:
    """The same as text."""
    facts = info()
    native, build = facts["native"], facts["build"]
    lines = [
        f"kan_fast  {facts['kan_fast']}",
        f"python    {facts['python']} on {platform.machine()}",
        f"torch     {facts['torch']}, CUDA {facts['cuda'] or 'none'}, {facts['threads']} CPU threads",
        f"GPUs      {', '.join(facts['gpus']) or 'none'}",
        "",
        "backends, in the order of preference",
    ]
    for name, reasons in facts["backends"].items():
        for kind, reason in reasons.items():
            lines.append(f"  {name:<10}{kind:<5}{'yes' if reason is None else f'no: {reason}'}")
    lines += ["", "native code"]
    if "missing" in native:
        lines.append(f"  missing           {native['missing']}")
    else:
        lines += [
            f"  instruction sets  {', '.join(native['isa_built'])}; this machine runs {native['isa_chosen']}",
            f"  built by          {native['compiler']} for {native['target']}, headers of torch {native['torch']}",
            f"  CUDA              {', '.join(native['cuda_archs']) if native['cuda_archs'] else build['reason']}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
