"""What the build decides, and what it produced."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_backend
from build_backend import BuildError, Torch, decide

ROOT = Path(build_backend.__file__).parent
TORCH_CPU = Torch(Path("/t"), "2.13.0+cpu", None)
TORCH_CUDA = Torch(Path("/t"), "2.13.0+cu130", "13.0")
NVCC = Path("/c/bin/nvcc")
GCC = (("g++",), "x86_64-linux-gnu", None)
NO_GCC = ((), "", "no C++ compiler at build time (looked for c++)")


@pytest.fixture
def pretend(monkeypatch):
    """Pretends that the given tools, and no others, are on this machine."""

    def set_up(*, cxx=GCC, torch=TORCH_CPU, nvcc=None, header=Path("/i/Python.h"), asked=None, platform="linux"):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(build_backend, "find_cxx", lambda: cxx)
        monkeypatch.setattr(build_backend, "find_torch", lambda: torch)
        monkeypatch.setattr(build_backend, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(build_backend, "find_python_h", lambda: header)
        if asked is None:
            monkeypatch.delenv("KAN_FAST_BUILD", raising=False)
        else:
            monkeypatch.setenv("KAN_FAST_BUILD", asked)

    return set_up


@pytest.mark.parametrize(
    ("machine", "cuda_sources", "kind", "reason"),
    [
        ({}, True, "cpp", "has no CUDA"),
        ({"nvcc": NVCC}, True, "cpp", "has no CUDA"),
        ({"torch": TORCH_CUDA}, True, "cpp", "no nvcc"),
        ({"torch": TORCH_CUDA, "nvcc": NVCC}, True, "cuda", None),
        ({"torch": TORCH_CUDA, "nvcc": NVCC}, False, "cpp", "no CUDA sources"),
        ({"torch": TORCH_CUDA, "nvcc": NVCC, "asked": "cpp"}, True, "cpp", "KAN_FAST_BUILD=cpp"),
        ({"asked": "none"}, True, "none", "KAN_FAST_BUILD=none"),
        ({"nvcc": NVCC, "asked": "cuda"}, True, "cuda", None),
        ({"cxx": NO_GCC}, True, "none", "no C++ compiler"),
        ({"torch": None}, True, "none", "no torch >= 2.10"),
        ({"header": None}, True, "none", "no Python.h"),
        ({"platform": "darwin"}, True, "none", "Linux only"),
    ],
)
def test_decision_follows_the_tools(pretend, machine, cuda_sources, kind, reason):
    pretend(**machine)
    tools = decide(cuda_sources)
    assert tools.kind == kind
    assert (tools.reason is None) == (reason is None)
    assert reason is None or reason in tools.reason


@pytest.mark.parametrize(
    ("machine", "cuda_sources", "message"),
    [
        ({"asked": "gpu"}, True, "expected none, cpp or cuda, got 'gpu'"),
        ({"asked": "cpp", "cxx": NO_GCC}, True, "KAN_FAST_BUILD=cpp: no C[+][+] compiler"),
        ({"asked": "cuda", "torch": None, "nvcc": NVCC}, True, "KAN_FAST_BUILD=cuda: no torch"),
        ({"asked": "cuda"}, True, "KAN_FAST_BUILD=cuda: no nvcc"),
        ({"asked": "cuda", "nvcc": NVCC}, False, "KAN_FAST_BUILD=cuda: .*no CUDA sources"),
    ],
)
def test_what_is_forced_and_impossible_raises(pretend, machine, cuda_sources, message):
    pretend(**machine)
    with pytest.raises(BuildError, match=message):
        decide(cuda_sources)


def test_torch_is_fetched_only_where_it_is_needed(pretend):
    def required():
        return [r for r in build_backend.get_requires_for_build_wheel() if r.startswith("torch")]

    # setuptools runs setup.py for its own answer; that has no part in this one.
    pretend(torch=None)
    assert required() == ["torch>=2.10"]
    pretend()
    assert required() == []
    pretend(torch=None, cxx=NO_GCC)
    assert required() == []
    pretend(torch=None, asked="none")
    assert required() == []


def write_torch(folder, version):
    (folder / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (folder / "torch/include/torch/csrc/stable/library.h").touch()
    (folder / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = '13.0'\n")


@pytest.mark.parametrize(("version", "found"), [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0.0a0", True)])
def test_torch_is_found_unimported_and_by_version(monkeypatch, tmp_path, version, found):
    write_torch(tmp_path, version)
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_backend.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build_backend.site, "getsitepackages", list)
    monkeypatch.setattr(build_backend.site, "ENABLE_USER_SITE", False)
    torch = build_backend.find_torch()
    assert torch == (Torch(tmp_path / "torch", version, "13.0") if found else None)


def test_cxx_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    command, _, problem = build_backend.find_cxx()
    assert command == () and "no-such-compiler" in problem
    monkeypatch.setenv("CXX", sys.executable)
    command, _, problem = build_backend.find_cxx()
    assert command == () and "does not accept -std=c++20" in problem


@pytest.fixture(scope="module")
def native():
    path = ROOT / "kan_fast/_native.so"
    if not path.exists() and os.environ.get("KAN_FAST_REQUIRE_NATIVE") != "1":
        pytest.skip("kan_fast/_native.so is not built, and KAN_FAST_REQUIRE_NATIVE does not ask for it")
    assert path.exists()
    return path


def symbols(path, *options):
    """(kind, demangled name) of every symbol of an object or a library."""
    out = subprocess.run(["nm", "-C", *options, path], text=True, capture_output=True, check=True).stdout
    return [(m[1], m[2]) for m in re.finditer(r"^\s*(?:[0-9a-f]+ )?([a-zA-Z]) (.*)$", out, re.MULTILINE)]


def test_library_needs_only_the_stable_interface_of_torch(native):
    wanted = [name.partition("@")[0] for kind, name in symbols(native, "-D", "--undefined-only") if kind != "w"]
    torch = [name for name in wanted if "torch" in name.lower() or "c10" in name or "at::" in name]
    assert torch, "the library does not use torch at all"
    # C functions of the shim; a C++ name of torch would tie the library to one version of it.
    assert [name for name in torch if not re.fullmatch(r"(aoti_)?torch_\w+", name)] == []


def test_library_exports_nothing_of_its_own(native):
    exported = [name for kind, name in symbols(native, "-D", "--defined-only") if kind in "TDBR"]
    assert [name for name in exported if "kan" in name.lower()] == []


def test_no_shared_function_is_compiled_for_a_wider_instruction_set_only():
    # An inline function of a header outside the instruction set's namespace is one function to the linker, whichever object
    # it comes from. Linked in from an AVX-512 object it would crash older CPUs. The baseline objects come first in the link,
    # so a copy there makes it safe.
    folder = ROOT / "build/native"
    if not (folder / "avx512").is_dir() and os.environ.get("KAN_FAST_REQUIRE_NATIVE") != "1":
        pytest.skip("no x86-64 objects in build/native, and KAN_FAST_REQUIRE_NATIVE does not ask for them")
    wide = [p for isa in ("avx2", "avx512") for p in (folder / isa).rglob("*.o")]
    portable = [p for p in folder.rglob("*.o") if p not in wide]
    if not wide:
        assert "x86_64" not in os.uname().machine
        return
    own = re.compile(r"\b(avx2|avx512)::")
    shared = {n for path in wide for kind, n in symbols(path, "--defined-only") if kind in "WVu" and not own.search(n)}
    safe = {name for path in portable for kind, name in symbols(path, "--defined-only")}
    assert sorted(shared - safe) == [], "put these into namespace KAN_ISA"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked, made from a copy of what is shipped."""
    folder = tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns("__pycache__", "build", "dist", ".*", "*.egg-info", "output", "*.so")
    shutil.copytree(ROOT, folder / "copy", ignore=skip)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=folder / "copy", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return Path(str(archive).removesuffix(".tar.gz"))


def test_sdist_holds_every_source(sdist):
    for folder, pattern in (("csrc", "**/*.*"), ("kan_fast", "**/*.py"), ("tests", "**/*.py"), ("examples", "*.py")):
        here = {p.relative_to(ROOT) for p in (ROOT / folder).glob(pattern) if p.suffix not in (".so", ".pyc")}
        there = {p.relative_to(sdist) for p in (sdist / folder).glob(pattern)}
        assert here, folder
        assert here <= there | {Path("kan_fast/_build_record.json")}
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "kan_fast/py.typed"):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.so"))
