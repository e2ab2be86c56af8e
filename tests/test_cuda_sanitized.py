"""The emulated CUDA kernels under the address and thread sanitizers, and whether those would see anything."""

import os
import subprocess

import pytest

from tests.cuda_emulation.build import build, compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="emulation needs g++ on x86-64"),
]

PLANTED = {
    "address": ("cuda/contract_output.cu", r"b >= p\.batch \|\| ", ""),
    "thread": ("cuda/contract_output.cu", r"\[lane\] = total\[r\];\n    barrier\(\);", "[lane] = total[r];"),
}


def run(program):
    # The first race ends the program: a planted one is reported thousands of times otherwise.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("sanitizer", PLANTED)
def test_nothing_is_found(sanitizer):
    done = run(build("sanitize.cpp", sanitizer))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problems ran" in done.stdout


@pytest.mark.parametrize("sanitizer", PLANTED)
def test_a_planted_bug_is_found(sanitizer):
    done = run(build("sanitize.cpp", sanitizer, [PLANTED[sanitizer]]))
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr
