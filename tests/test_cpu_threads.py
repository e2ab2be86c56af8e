"""The CPU kernels in real threads under the thread and address sanitizers, and whether these would see anything."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs g++ with its sanitizers")]

# The tasks of every instruction set are cut alike; the baseline runs on every CPU.
FLAGS = ["-std=c++20", "-O1", "-g", "-fno-math-errno", "-fno-trapping-math", "-DKAN_ISA=baseline", "-DKAN_ISA_BASELINE=1"]


# What each of them must see: scratch memory that all threads share, and less of it than was asked for.
PLANTED = {
    "thread": (
        "next_ = runtime_.workspace(total_);",
        "static char* const shared = runtime_.workspace(size_t(1) << 26); next_ = shared;",
    ),
    "address": ("total_ += count * sizeof(T) + 64 * 16;", "total_ += count * sizeof(T) / 2;"),
}


def build(csrc: Path, sanitizer: str, folder: Path) -> Path:
    """The program of cpu_threads/main.cpp with the kernels in `csrc`."""
    flags = [*FLAGS, f"-fsanitize={sanitizer}", f"-I{csrc}"]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}-{sanitizer}.o"
        subprocess.run([COMPILER, *flags, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sorted((csrc / "cpu").glob("*.cpp")), ROOT / "tests/cpu_threads/main.cpp"]))
    program = folder / sanitizer
    subprocess.run([COMPILER, f"-fsanitize={sanitizer}", *objects, "-o", program, "-lpthread"], check=True)
    return program


def run(program: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, "1", "100"], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("sanitizer", PLANTED)
def test_nothing_is_found(sanitizer, tmp_path):
    done = run(build(ROOT / "csrc", sanitizer, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "100 problems ran" in done.stdout


@pytest.mark.parametrize("sanitizer", PLANTED)
def test_a_planted_bug_is_found(sanitizer, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    right, wrong = PLANTED[sanitizer]
    arena = (csrc / "cpu/arena.h").read_text()
    assert right in arena
    (csrc / "cpu/arena.h").write_text(arena.replace(right, wrong))
    done = run(build(csrc, sanitizer, tmp_path))
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr
