"""The kernels of csrc/cuda as nvcc compiles them, run by the interpreter: a backend on CPU tensors.

Host code is that of the emulation (tests/cuda_emulation), which says of every launch which kernel it is for, on what grid and
with what arguments; here the kernel's PTX runs in place of the emulated one, on the same memory.
"""

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from build_backend import find_nvcc
from tests.cuda_emulation import backend as emulated
from tests.cuda_emulation.build import ROOT, Change, digest, included, sources
from tests.ptx.block import run
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import Program, parse

HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build/ptx"
SHARED_ALIGNMENT = 128  # what the kernels' declaration of shared memory promises, and no more
OBSERVER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.c_int,
)  # fmt: skip


class Scratch(ctypes.Structure):
    """That of tests/cuda_emulation/library.cpp."""

    _fields_ = [("memory", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


def compile_to_ptx(source: str, changes: Sequence[Change] = ()) -> str:
    """csrc/cuda/<source>.cu for the least architecture it is for, perhaps with planted bugs; kept in build/ptx by what it is
    made of."""
    csrc, hopper = sources(changes), source.startswith(("warpgroup", "cluster"))
    return compile_file(csrc / f"cuda/{source}.cu", "compute_90a" if hopper else "compute_80", csrc)


def compile_file(path: Path, name: str = "compute_90a", csrc: Path = ROOT / "csrc") -> str:
    """A source for an architecture of that name; kept in the same way."""
    nvcc = find_nvcc()
    assert nvcc is not None
    texts = included(path, csrc, {})
    out = FOLDER / f"{path.stem}-{digest(name, str(nvcc), *(texts[key] for key in sorted(texts)))}.ptx"
    if not out.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++20", "-O3", f"-I{csrc}", f"-gencode=arch={name},code={name}", "-ptx", path]
        out.write_bytes(subprocess.run([*command, "-o", "-"], capture_output=True, check=True).stdout)
    return out.read_text()


def one_name(mangled: str) -> str:
    """The name of a kernel, alike for compilers that name a source's own namespace differently."""
    found = re.search(r"(?<!\d)(\d+)(?=_GLOBAL__N_)", mangled)
    if found is None:
        return mangled
    return mangled[: found.start()] + mangled[found.end() + int(found[1]) :]


class Interpreted(emulated.Backend):
    """A GPU that runs the PTX of the given sources; those in front are looked through first. strict: as SharedMemory has it.
    changes and edit plant bugs, in the sources and in their PTX.

    Afterwards `ran` has the names of the kernels that ran.
    """

    def __init__(
        self, library: Path, compiled: Sequence[str], architecture: int = 80, *,
        multiprocessors: int = 4, strict: bool = True, changes: Sequence[Change] = (), edit: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        super().__init__(library, architecture, multiprocessors)
        self.path, self.compiled, self.strict, self.changes, self.edit = library, compiled, strict, changes, edit
        self.ran: list[str] = []
        self.library.kan_scratch.restype = ctypes.POINTER(Scratch)
        self.raised: Exception | None = None
        self.programs: dict[str, Program] = {}

    @cached_property
    def kernels(self) -> dict[int, str]:
        """Names of the library's functions by their addresses."""
        listed = subprocess.run(["nm", self.path], capture_output=True, text=True, check=True).stdout
        places = {name: int(place, 16) for place, name in re.findall(r"(?m)^([0-9a-f]+) [tTwW] (\S+)$", listed)}
        moved = ctypes.cast(self.library.kan_error, ctypes.c_void_p).value - places["kan_error"]
        return {place + moved: one_name(name) for name, place in places.items()}

    def program(self, kernel: str) -> Program:
        """The kernel of that name, in the first source that has it."""
        if kernel not in self.programs:
            for source in self.compiled:
                ptx = compile_to_ptx(source, self.changes)
                names = {one_name(name): name for name in re.findall(r"\.entry\s+([\w$]+)", ptx)}
                if kernel in names:
                    self.programs[kernel] = parse(self.edit(ptx), names[kernel])
                    break
            else:
                raise LookupError(f"none of {', '.join(self.compiled)} has the kernel {kernel}")
        return self.programs[kernel]

    def _call(self, name: str, problem: ctypes.Structure) -> None:
        self.raised = None
        observer = OBSERVER(self._launch)
        self.library.kan_observe(observer)
        try:
            super()._call(name, problem)
        finally:
            self.library.kan_observe(OBSERVER())
        if self.raised is not None:
            raise self.raised

    def _launch(
        self, kernel: int, grid: Any, cluster: Any, threads: int, shared: int, arguments: Any, sizes: Any, count: int
    ) -> None:
        """What the host code calls; no exception may pass through it."""
        if self.raised is not None:
            return
        try:
            name = self.kernels[kernel]
            memory = GlobalMemory()
            scratch = self.library.kan_scratch().contents
            for address, size in [*self.buffers, (scratch.memory, scratch.bytes)]:
                if size:
                    memory.add(np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8), address)
            given = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
            sides = cluster[:3]
            run(self.program(name), grid[:3], threads, shared, given, memory, self.strict, base=SHARED_ALIGNMENT, cluster=sides)
            self.ran.append(name)
        except Exception as raised:  # raised again behind the host code
            self.raised = raised
