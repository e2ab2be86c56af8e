"""What the example scripts share: where pictures go, and how a result is checked."""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no display is needed

PICTURES = Path(__file__).parent / "output"


def save_picture(figure: Any, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.png", dpi=90)
    print(f"picture: {PICTURES.name}/{name}.png")


def check(what: str, value: float, bound: float) -> None:
    """End the script with an error where a result misses what this example promises."""
    print(f"{what}: {value:.3g} (promised: at most {bound:.3g})")
    if not value <= bound:
        sys.exit(f"{what} is {value:.3g}, above {bound:.3g}")
