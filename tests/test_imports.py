"""Imports run one way, and the layers need torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import kan_fast

PACKAGE = Path(kan_fast.__file__).parent

# From the bottom to the top; a module may import from its own row and the rows before it. What is not named here is a tool.
ROWS = [
    {"spline", "activations", "atomic", "autocast", "chunks"},
    {"checks"},
    {"backends.fake", "backends.reference", "backends.native", "backends.triton"},
    {"backends"},
    {"operators", "batching"},
    {"derivatives"},
    {"ops", "edges"},
    {"functional", "stack"},
    {"nn"},
]


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")


def row(module):
    """Position in ROWS by the longest name that fits; above all of them for tools; None for the package itself."""
    if module == "":
        return None
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for position, names in enumerate(ROWS):
            if name in names:
                return position
    return len(ROWS)


def imports_of(path):
    """Names of kan_fast modules that a file imports, wherever in the file."""
    modules = {module_of(p) for p in PACKAGE.rglob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.startswith("kan_fast")]
            yield from (name.removeprefix("kan_fast").strip(".") for name in names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            if node.module and node.module.split(".")[0] == "kan_fast":
                base = node.module.removeprefix("kan_fast").strip(".")
                for name in node.names:
                    whole = f"{base}.{name.name}".strip(".")
                    yield whole if whole in modules else base


def test_imports_run_one_way():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        module = module_of(path)
        mine = row(module)
        if mine is None:
            continue  # the package itself gathers everything
        for target in imports_of(path):
            theirs = row(target)
            assert theirs is not None, f"{module} imports the package itself"
            # `backends` gathers its members by name; `fake` sits beside it and is used by `native`.
            shares_package = module.startswith("backends.") and target == "backends"
            assert theirs <= mine or shares_package, f"{module} imports {target}, which is above it"
            seen += 1
    assert seen > 30


def test_the_layers_need_torch_alone():
    """Any other package is forbidden to be found; torch's own dependencies (NumPy among them) are torch's business."""
    code = """
import builtins, sys
import torch
allowed = set(sys.stdlib_module_names) | {"torch", "kan_fast"} | {name.split(".")[0] for name in sys.modules}
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and importer.split(".")[0] == "kan_fast" and name.split(".")[0] not in allowed:
        raise ImportError(f"{importer} imports {name}")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import kan_fast
model = kan_fast.KAN([2, 3, 1])
model(torch.rand(4, 2)).sum().backward()
extra = {name.split(".")[0] for name in sys.modules} - allowed
assert not extra, extra
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_import_is_quick():
    """Neither the compiler nor Triton is loaded until somebody compiles."""
    code = "import sys, kan_fast; assert not {'torch._dynamo', 'triton', 'torch._inductor'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
