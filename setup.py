"""Builds the native code with ninja: kan_fast/_native.so (operators, torch's stable ABI) and kan_fast/_build_info (pybind11).

Environment: KAN_FAST_BUILD=none|cpp|cuda forces what is built, CXX and CUDA_HOME choose the compilers, CXXFLAGS and LDFLAGS
are appended, TORCH_CUDA_ARCH_LIST replaces the CUDA architectures, MAX_JOBS bounds the parallel compilations, and
KAN_FAST_SANITIZE=1 builds build/sanitize/_native.so with address and undefined-behaviour sanitizers and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import BuildError, Toolchain, decide  # noqa: E402  (the line above makes it importable)

CSRC = ROOT / "csrc"
SANITIZE = os.environ.get("KAN_FAST_SANITIZE", "0") not in ("", "0")

# One binary serves every x86-64 CPU: each kernel file is compiled once per instruction set and chosen at run time. Other
# machines get the baseline alone. No -march=native: what is installed may run on another machine of a cluster.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vbmi2"),
        *("-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mprefer-vector-width=512"),
        # GCC 12 sees uninitialized values inside its own AVX-512 intrinsics (its bug 105593); the other two builds look.
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}
# Errors are not reported through errno or floating-point traps, which would keep loops scalar, and a * b + c may be one
# instruction (ISO mode forbids it otherwise); but no -ffast-math: NaN, sums and the order of operations mean what they say.
COMMON_FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"),
]
OPTIMIZE_FLAGS = ["-O3", "-DNDEBUG"]
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The stable ABI of torch 2.10: a newer symbol is then a compile error, so one binary loads in 2.10 and every later version.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0"


def ninja_path(path: Path | str) -> str:
    """A path as ninja writes it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def command(*words: str | Path) -> str:
    """A command line as ninja writes it: shell-quoted, with $in and $out kept and every other dollar escaped."""
    return " ".join(str(w) if str(w) in ("$in", "$out", "$out.d") else shlex.quote(str(w)).replace("$", "$$") for w in words)


class Ninja:
    """Collects compile and link steps of one build folder and runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = ["ninja_required_version = 1.8"]
        self.rules = 0

    def _step(self, words: list[str | Path], out: Path, inputs: list[Path], depfile: bool) -> Path:
        self.rules += 1
        self.lines += [f"rule r{self.rules}", f"  command = {command(*words)}"]
        self.lines.append(f"  description = {out.relative_to(self.folder)}")
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append(f"build {ninja_path(out)}: r{self.rules} {' '.join(map(ninja_path, inputs))}")
        return out

    def compile(self, compiler: list[str | Path], source: Path, variant: str = "") -> Path:
        """One object; ``variant`` keeps several compilations of one source apart."""
        out = self.folder / variant / f"{source.relative_to(CSRC)}.o"
        dep = ["-MD", "-MF", "$out.d"] if source.suffix == ".cu" else ["-MMD", "-MF", "$out.d"]
        return self._step([*compiler, *dep, "-c", "$in", "-o", "$out"], out, [source], depfile=True)

    def link(self, linker: list[str | Path], out: Path, objects: list[Path], libraries: list[str | Path]) -> Path:
        """One shared object."""
        return self._step([*linker, "-shared", "-o", "$out", "$in", *libraries], out, objects, depfile=False)

    def run(self) -> None:
        """Writes build.ninja and brings everything up to date, one process at a time per folder."""
        ninja = shutil.which("ninja")
        if ninja is None:
            try:
                import ninja as package
            except ImportError:
                raise BuildError("ninja: neither the program nor the Python package is there (pip install ninja)") from None
            ninja = str(Path(package.BIN_DIR, "ninja"))
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            if subprocess.run([ninja, "-C", str(self.folder), *jobs], check=False).returncode:
                raise CompileError("the native code did not compile, see above; KAN_FAST_BUILD=none leaves it out")


def isas(tools: Toolchain) -> list[str]:
    """Instruction sets to compile for, the portable one first."""
    return list(ISA_FLAGS) if tools.target.startswith("x86_64") else ["baseline"]


def cuda_archs() -> list[str]:
    """Architectures such as "9.0a"; a trailing "+PTX" adds intermediate code."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{CUDA_ARCHS} 8.0+PTX"
    return text.replace(";", " ").replace(",", " ").split()


def gencode(arch: str) -> list[str]:
    """nvcc's flags for one architecture."""
    number = arch.removesuffix("+PTX").replace(".", "")
    kinds = ["sm", "compute"] if arch.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def cuda_home(nvcc: Path) -> Path:
    """The toolkit that nvcc belongs to: what it says itself, since nvcc may be a script or a link from elsewhere."""
    said = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-E", "/dev/null"], text=True, capture_output=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else nvcc.resolve().parent.parent


def plan(tools: Toolchain, version: str, folder: Path) -> tuple[Ninja, Path, Path]:
    """(steps, the operator library, the build information module)."""
    if tools.torch is None:
        raise BuildError("no torch headers")
    build = Ninja(folder)
    built = isas(tools)
    if SANITIZE:  # runs on this machine alone: a third less to compile without the vectors that it does not choose
        cpu = Path("/proc/cpuinfo")
        wide = cpu.exists() and "avx512_vbmi2" in cpu.read_text()
        built = [isa for isa in built if isa != ("avx2" if wide else "avx512")]
    mode = SANITIZE_FLAGS if SANITIZE else OPTIMIZE_FLAGS
    cxx: list[str | Path] = [*tools.cxx, *COMMON_FLAGS, *mode, f"-I{CSRC}"]
    cxx += [f"-DKAN_BUILT_{isa.upper()}=1" for isa in built]
    if tools.kind == "cuda":
        cxx.append("-DKAN_BUILT_CUDA=1")
        if "9.0a" in (arch.removesuffix("+PTX") for arch in cuda_archs()):  # the one with warpgroups' instructions
            cxx.append("-DKAN_BUILT_SM90A=1")
    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    torch: list[str | Path] = ["-isystem", tools.torch.root / "include", TORCH_TARGET]

    # Objects in the order of the link: where files share an inline function of a header, the linker keeps the first copy, and
    # that must be one which every CPU can run.
    dispatch = CSRC / "cpu/dispatch.cpp"
    kernels = sorted(f for f in (CSRC / "cpu").glob("*.cpp") if f != dispatch)
    bindings = sorted(f for f in CSRC.glob("*.cpp") if f.name != "build_info.cpp")
    objects = [build.compile([*cxx, *torch, *user_flags], source) for source in bindings]
    objects.append(build.compile([*cxx, *user_flags], dispatch))
    for isa in built:
        flags = [*ISA_FLAGS[isa], f"-DKAN_ISA={isa}", f"-DKAN_ISA_{isa.upper()}=1"]
        objects += [build.compile([*cxx, *flags, *user_flags], source, isa) for source in kernels]

    linker: list[str | Path] = [*tools.cxx, *shlex.split(os.environ.get("LDFLAGS", ""))]
    if SANITIZE:
        linker.append("-fsanitize=address,undefined")
        if "clang" in tools.cxx[0]:
            linker.append("-shared-libasan")
    # No rpath: torch is imported first, and the loader finds its libraries by name. libtorch.so is kept although no symbol
    # of it is used directly, since in CUDA builds of torch it brings libtorch_cuda.so into scope.
    libraries: list[str | Path] = [f"-L{tools.torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    libraries += ["-Wl,--as-needed", "-Wl,--no-undefined"]
    if tools.kind == "cuda" and tools.nvcc is not None:
        home = cuda_home(tools.nvcc)
        archs = [flag for arch in cuda_archs() for flag in gencode(arch)]
        nvcc: list[str | Path] = [tools.nvcc, "-ccbin", tools.cxx[-1], "-std=c++20", "-O3", f"-I{CSRC}", *archs]
        nvcc += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        objects += [build.compile(nvcc, source) for source in sorted((CSRC / "cuda").glob("*.cu"))]
        host = [*cxx, *user_flags, "-isystem", home / "include"]
        objects += [build.compile(host, source) for source in sorted((CSRC / "cuda").glob("*.cpp"))]
        libraries += [f"-L{home / 'lib64'}", f"-L{home / 'lib'}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    native = build.link(linker, folder / "_native.so", objects, libraries)

    module = folder / f"_build_info{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not SANITIZE:
        import pybind11  # a build requirement, absent where nothing is compiled

        facts = {
            "KAN_FAST_VERSION": version,
            "KAN_TARGET": tools.target,
            "KAN_TORCH_VERSION": tools.torch.version,
            "KAN_ISAS": " ".join(built),
            "KAN_CUDA_ARCHS": " ".join(cuda_archs()) if tools.kind == "cuda" else "",
        }
        includes: list[str | Path] = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        defines = [f'-D{name}="{value}"' for name, value in facts.items()]
        build.link(linker, module, [build.compile([*cxx, *includes, *defines], CSRC / "build_info.cpp")], [])
    return build, native, module


def write_record(tools: Toolchain, package: Path) -> None:
    """kan_fast/_build_record.json: what was built and why not more, for ``python -m kan_fast.info``."""
    torch = tools.torch.version if tools.torch is not None and tools.kind != "none" else None
    record = {"built": tools.kind, "reason": tools.reason, "torch": torch}
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_record.json").write_text(json.dumps(record, indent=1) + "\n")


class BuildNative(build_ext):
    """build_ext through ninja; also writes the record, since ``build_ext --inplace`` runs without build_py."""

    def get_ext_filename(self, fullname: str) -> str:
        """_native.so has no Python ABI in its name: it does not use Python's."""
        if fullname.rpartition(".")[2] == "_native":
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        """Compiles, links and copies the products to where setuptools expects them."""
        folder = ROOT / "build" / ("sanitize" if SANITIZE else "native")
        build, native, module = plan(TOOLS, self.distribution.get_version(), folder)
        build.run()
        if SANITIZE:
            self.extensions.clear()  # the product stays in the build folder; nothing is to be copied into the package
            return
        for ext, product in zip(self.extensions, (native, module), strict=True):
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(product, target)

    def run(self) -> None:
        """Builds, and records it where the package is used from its source folder."""
        super().run()
        if self.inplace:
            write_record(TOOLS, ROOT / "kan_fast")


class BuildPython(build_py):
    """build_py, plus the record of the build."""

    def run(self) -> None:
        """Copies the modules and writes the record beside them."""
        super().run()
        write_record(TOOLS, ROOT / "kan_fast" if self.editable_mode else Path(self.build_lib, "kan_fast"))


# Metadata commands run before the build requirements are installed, so they must not ask for a toolchain.
if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
    TOOLS = Toolchain("none", "metadata only")
else:
    TOOLS = decide(cuda_sources=any((CSRC / "cuda").glob("*.cu")))
    if SANITIZE and TOOLS.kind == "none":
        raise BuildError(f"KAN_FAST_SANITIZE: {TOOLS.reason}")
    if TOOLS.kind == "none":
        print(f"\n*** kan_fast: WITHOUT the native backend: {TOOLS.reason} ***\n", file=sys.stderr)

if "--inplace" in sys.argv and int(setuptools_version.partition(".")[0]) < 77:
    # An older setuptools refuses the licence in pyproject.toml, and a build in place needs nothing from that file but the
    # version: machines where nothing can be installed may have only the old one.
    Distribution.parse_config_files = lambda self, filenames=None, ignore_option_errors=False: None
    text = (ROOT / "pyproject.toml").read_text()
    METADATA = {"name": "kan_fast", "version": text.partition('\nversion = "')[2].partition('"')[0]}
else:
    METADATA = {}

setup(
    **METADATA,
    ext_modules=[] if TOOLS.kind == "none" else [Extension("kan_fast._native", []), Extension("kan_fast._build_info", [])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
