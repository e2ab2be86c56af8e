"""Memory and communication per rank when a big KAN is trained, calculated: the tables of examples/SCALING.md.

Run: python examples/scaling.py [--write]

P parameters in L layers of width D, a batch of B rows in all, N ranks; float32 weights, gradients and AdamW's two moments.
A ring sends 2 (N - 1) / N of its buffer per rank for a sum, and (N - 1) / N for a gather or a reduce-scatter.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kan_fast import KAN

PAGE = Path(__file__).parent / "SCALING.md"
BYTES = 4
# Weight, gradient and AdamW's two moments.
STATES = 4
# fully_shard gathers the next layer while the present one computes.
LAYERS_AT_ONCE = 2
# Ranks that share one machine, and so a tensor-parallel group.
TENSOR_RANKS = 8
GIB = 2**30


@dataclass
class Job:
    """A KAN of equal widths, grid_size 5 and spline_order 3, and its batch."""

    width: int = 8192
    layers: int = 16
    rows: int = 16384

    @property
    def layer_parameters(self) -> int:
        one = KAN([self.width, self.width], device="meta")
        return sum(parameter.numel() for parameter in one.parameters())

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters


@dataclass
class Cost:
    """Bytes per rank: states (weights, gradients, moments), gathered weights and their gradients, saved inputs, sent."""

    states: float
    gathered: float
    inputs: float
    sent: float

    @property
    def memory(self) -> float:
        return self.states + self.gathered + self.inputs


def data_parallel(job: Job, ranks: int) -> Cost:
    """Every rank has all weights and its rows; the gradients are summed."""
    weights = job.parameters * BYTES
    return Cost(STATES * weights, 0, saved_inputs(job, job.rows / ranks), 2 * share(ranks) * weights)


def fully_sharded(job: Job, ranks: int) -> Cost:
    """Every rank keeps 1/N of every layer; weights are gathered for forward and backward, gradients scattered."""
    weights, layer = job.parameters * BYTES, job.layer_parameters * BYTES
    gathered = LAYERS_AT_ONCE * layer + layer
    return Cost(STATES * weights / ranks, gathered, saved_inputs(job, job.rows / ranks), 3 * share(ranks) * weights)


def tensor_parallel(job: Job, ranks: int) -> Cost:
    """Every rank computes with its 1/N of every layer and all rows; a pair of layers sums (B, D) forward and backward."""
    pairs = job.layers / 2
    # The first layer of a pair has saved its whole input, the second one its part.
    inputs = pairs * job.rows * job.width * BYTES * (1 + 1 / ranks)
    sent = pairs * 2 * 2 * share(ranks) * job.rows * job.width * BYTES
    return Cost(STATES * job.parameters * BYTES / ranks, 0, inputs, sent)


def both(job: Job, ranks: int) -> Cost:
    """Tensor parallel within a machine, fully sharded across machines."""
    inner, outer = min(TENSOR_RANKS, ranks), max(1, ranks // TENSOR_RANKS)
    tensor = tensor_parallel(Job(job.width, job.layers, job.rows // outer), inner)
    weights, layer = job.parameters * BYTES / inner, job.layer_parameters * BYTES / inner
    gathered = (LAYERS_AT_ONCE + 1) * layer if outer > 1 else 0
    return Cost(tensor.states / outer, gathered, tensor.inputs, tensor.sent + 3 * share(outer) * weights)


def share(ranks: int) -> float:
    return (ranks - 1) / ranks


def saved_inputs(job: Job, rows: float) -> float:
    """A layer saves its input for the backward pass, and no bases: (rows, D) for each."""
    return job.layers * rows * job.width * BYTES


ENGINES: dict[str, Callable[[Job, int], Cost]] = {
    "DDP": data_parallel,
    "fully_shard": fully_sharded,
    "tensor parallel": tensor_parallel,
    f"tensor parallel in groups of {TENSOR_RANKS}, fully_shard across": both,
}


def table(job: Job, rank_counts: tuple[int, ...] = (1, 8, 64, 512)) -> str:
    lines = [
        f"{job.layers} layers of {job.width} x {job.width}: {job.parameters / 1e9:.2f} billion parameters;"
        f" {job.rows} rows a step. GiB per rank.",
        "",
        "| engine | ranks | states | gathered | inputs | memory | sent a step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, engine in ENGINES.items():
        for ranks in rank_counts:
            cost = engine(job, ranks)
            parts = (cost.states, cost.gathered, cost.inputs, cost.memory, cost.sent)
            lines.append(f"| {name} | {ranks} | " + " | ".join(f"{part / GIB:.1f}" for part in parts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    text = table(Job())
    print(text)
    if parser.parse_args().write:
        pattern = r"(?<=<!-- table -->\n).*?(?=\n<!-- /table -->)"
        PAGE.write_text(re.sub(pattern, lambda _: text, PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
