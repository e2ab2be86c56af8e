"""Every example runs from the command line, and reaches what it promises: it checks itself and exits with an error if not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for extra in ("matplotlib", "sklearn", "sympy", "scipy"):
    pytest.importorskip(extra)

EXAMPLES = Path(__file__).parent.parent / "examples"
# Seconds that an example may take: 180 for the heat and 300 for the Poisson equation are promised.
LIMITS = {
    "drop_in": 60,
    "feynman": 600,
    "function_approximation": 120,
    "heat_equation": 180,
    "poisson": 300,
    "symbolic_recovery": 300,
    "tabular": 120,
}


def test_every_example_is_listed():
    # The last two have tests of their own, in test_distributed.py.
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"_shared", "digits", "train_distributed", "scaling"}
    assert scripts == set(LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_example_keeps_its_promise(name, tmp_path):
    picture = EXAMPLES / "output" / f"{name}.png"
    picture.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMITS[name],
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "promised" in run.stdout
    assert picture.stat().st_size > 10_000


def test_a_missed_promise_is_an_error():
    code = "from _shared import check; check('error', float('nan'), 1.0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True)
    assert run.returncode == 1
    assert "error is nan" in run.stderr
