"""The API pages, and the words about releases."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kan_fast

ROOT = Path(__file__).parents[1]


def test_pages_show_every_public_name_and_what_it_says(tmp_path):
    pytest.importorskip("pdoc")
    subprocess.run([sys.executable, ROOT / ".ci/docs.py", tmp_path], check=True, env={"PYTHONPATH": str(ROOT)})
    page = (tmp_path / "kan_fast.html").read_text()
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    for name in kan_fast.__all__:
        if name != "functional":
            assert f'id="{name}"' in page, name
            paragraph = getattr(kan_fast, name).__doc__.split("\n\n")[0].replace("`", "")
            assert re.sub(r"\s+", " ", paragraph) in re.sub(r"\s+", " ", text), name
    assert {"functional.html", "symbolic.html", "traverse.html"} <= {path.name for path in (tmp_path / "kan_fast").iterdir()}


def test_every_public_name_has_a_docstring():
    for name in kan_fast.__all__:
        assert len(getattr(kan_fast, name).__doc__ or "") > 20, name


def test_the_changelog_knows_this_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_exist():
    """Code words of the README that look like ours are ours."""
    verbs = "from|to|plot|update|prune|train|export|replace|adaptive|advanced|activation|fit|symbolic"
    words = set(re.findall(rf"`((?:{verbs})_\w+)", (ROOT / "README.md").read_text()))
    assert len(words) > 12
    assert words - {"symbolic_formula"} <= set(kan_fast.__all__)  # that one is pykan's
