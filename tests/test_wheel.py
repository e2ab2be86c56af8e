"""The wheel in an environment that holds torch and what torch requires, and nothing else."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow  # compiles the native code


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built here as `make wheel` does: without what an earlier one left, with the objects that are up to date."""
    folder = tmp_path_factory.mktemp("wheel")
    for left in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
        shutil.rmtree(left)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(folder), "."]
    # CUDA sources take much longer, and are compiled elsewhere.
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "KAN_FAST_BUILD": "cpp"})
    (path,) = folder.glob("*.whl")
    return path


def torch_alone():
    """The files at the top of every distribution that torch requires here, itself included."""
    seen, waiting = set(), ["torch"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of other systems
        seen.add(name)
        for text in distribution.requires or []:
            if "extra ==" not in text:
                waiting.append(re.match(r"[\w.-]+", text)[0].lower())
        for file in distribution.files or []:
            if file.parts[0] not in ("..", "__pycache__"):
                yield Path(distribution.locate_file(file.parts[0]))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a new environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True)
    program = folder / "env/bin/python"
    subprocess.run([program, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    for path in set(torch_alone()):
        if not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    return program


def run(python, code, folder):
    """What a program prints, started in an empty folder without the paths of this one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "KAN_FAST"))}
    done = subprocess.run([python, "-c", code], cwd=folder, env=clean, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"kan_fast/_native.so", "kan_fast/py.typed", "kan_fast/nn/interop/edges.py"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kan_fast"}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "kan_fast").rglob("*.py")}
    assert here == {name for name in names if name.endswith(".py")}


def test_it_trains_with_the_native_backend(python, tmp_path):
    code = """
import torch, kan_fast
from kan_fast import KAN
assert "native" in kan_fast.available_backends()
model = KAN([2, 4, 1], backend="native")
x = torch.rand(256, 2) * 2 - 1
y = torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(150):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
assert loss < 0.1 * y.var(), loss
model.save("model.kan")
assert torch.equal(KAN.load("model.kan")(x), model(x))
kan_fast.update_grid(model, x)
kan_fast.prune_kan(model, 1e-3, data=x)
print(kan_fast.__file__)
"""
    where = run(python, code, tmp_path)
    assert str(Path(python).parents[1]) in where


def test_what_is_missing_is_named(python, tmp_path):
    code = """
import kan_fast
for name, extra in (("KANRegressor", "sklearn"), ("plot_kan", "plot"), ("symbolic_extraction", "symbolic")):
    try:
        getattr(kan_fast, name)(kan_fast.KAN([1, 1]))
        print(name, "worked")
    except ImportError as error:
        print(f"kan_fast[{extra}]" in str(error), error)
"""
    lines = run(python, code, tmp_path).splitlines()
    assert [line[:4] for line in lines] == ["True"] * 3, lines


def test_info(python, tmp_path):
    text = run(python, "import runpy; runpy.run_module('kan_fast.info', run_name='__main__')", tmp_path)
    assert "native" in text
