"""What README shows runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)
    # The first block fits sin(pi x0) + x1^2, whose variance on [-1, 1]^2 is 1/2 + 4/45.
    assert names["loss"].item() < 0.05 * (1 / 2 + 4 / 45)
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())
