"""Compiles the kernels with the host's compiler into build/cuda_emulation; objects are kept by what they are made of."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build/cuda_emulation"
ASK_CUDA = ("device.cpp", "tensor_map.cpp")  # host code that asks the CUDA runtime or the driver
RUNTIME = ("runtime.cpp", "fibers.cpp", "warpgroup.cpp", "cluster.cpp")
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]

# A planted bug: file below csrc, pattern, replacement. Every occurrence is replaced, and there must be one.
Change = tuple[str, str, str]


def compiler() -> str | None:
    """g++ or what CXX says; None where it is not there or not for x86-64."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    return found if found and os.uname().machine == "x86_64" else None


def digest(*parts: str) -> str:
    """A short name for these texts together."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def sources(changes: Sequence[Change] = ()) -> Path:
    """csrc itself, or a copy of it with the changes made."""
    if not changes:
        return ROOT / "csrc"
    copy = FOLDER / f"changed-{digest(*(part for change in changes for part in change))}"
    for path in (ROOT / "csrc").rglob("*.*"):
        name, text = str(path.relative_to(ROOT / "csrc")), path.read_text()
        for file, pattern, replacement in changes:
            if file == name:
                text, count = re.subn(pattern, replacement, text)
                assert count, f"{pattern!r} is not in {file}"
        _write(copy / name, text)
    return copy


def included(path: Path, csrc: Path, seen: dict[Path, str]) -> dict[Path, str]:
    """The texts of a source and of all headers of ours that it includes, and they."""
    if path not in seen:
        seen[path] = path.read_text()
        for name in re.findall(r'#include "([^"]+)"', seen[path]):
            for folder in (path.parent, csrc):
                if (folder / name).exists():
                    included((folder / name).resolve(), csrc, seen)
                    break
    return seen


def _compile(source: Path, flags: list[str], csrc: Path) -> Path:
    command = [compiler() or "g++", *FLAGS, *flags]
    texts = included(source, csrc, {}) | included(HERE / "emulation.h", csrc, {})
    out = FOLDER / f"{source.stem}-{digest(*(texts[path] for path in sorted(texts)), *flags[1:])}.o"
    if not out.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-x", "c++", "-c", source, "-o", part], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        part.replace(out)
    return out


def build(main: str = "library.cpp", sanitizer: str = "", changes: Sequence[Change] = (), kernels: bool = True) -> Path:
    """A shared library of `main`, kernels and runtime; with a sanitizer ("address", "thread") a program. Without the kernels of
    csrc where `main` has its own."""
    csrc = sources(changes)
    optimize = ["-O1", "-g", f"-fsanitize={sanitizer}"] if sanitizer else ["-O1"]
    emulated = [f"-I{csrc}", *optimize, "-include", str(HERE / "emulation.h")]
    switches = [f"-DKAN_EMULATE_{'ASAN' if sanitizer == 'address' else 'TSAN'}"] if sanitizer else []
    hosted = sorted(path for path in (csrc / "cuda").glob("*.cpp") if path.name not in ASK_CUDA)
    jobs = [(path, emulated) for path in sorted((csrc / "cuda").glob("*.cu")) if kernels]
    jobs += [(path, [f"-I{csrc}", *optimize, "-DKAN_BUILT_SM90A"]) for path in [*(hosted if kernels else []), HERE / main]]
    jobs += [(HERE / name, [f"-I{csrc}", "-O2", *switches]) for name in RUNTIME]
    workers = int(os.environ.get("MAX_JOBS") or min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        objects = list(pool.map(lambda job: _compile(*job, csrc), jobs))
    out = FOLDER / f"{Path(main).stem}-{digest(sanitizer, *map(str, objects))}{'' if sanitizer else '.so'}"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")
        link = [f"-fsanitize={sanitizer}"] if sanitizer else ["-shared"]
        subprocess.run([compiler() or "g++", *link, *objects, "-o", part], check=True)
        part.replace(out)
    return out
