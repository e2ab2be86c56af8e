"""Render the docstrings of the public names: python .ci/docs.py FOLDER (needs pdoc)."""

import html
import re
import sys
from pathlib import Path

import pdoc
import pdoc.render

import kan_fast

# Beside kan_fast itself, which shows what `import kan_fast` offers: modules that have more to offer than that.
MODULES = ("kan_fast.nn.interop", "kan_fast.symbolic", "kan_fast.traverse", "kan_fast.info")


def plain(docstring: str) -> str:
    """HTML of a docstring whose lines stay as they are; `names` become code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(docstring, quote=False))


def main(folder: Path) -> None:
    """Write the pages into the folder."""
    for name in kan_fast.__all__:
        value = getattr(kan_fast, name)  # loads the tools, which pdoc would not find
        vars(kan_fast)[name] = value
    pdoc.render.configure(template_directory=Path(__file__).parent / "docs", show_source=False)
    pdoc.render.env.filters["plain"] = plain
    pdoc.pdoc("kan_fast", *MODULES, output_directory=folder)
    print(f"{folder / 'kan_fast.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
