"""Floors of a layer's time on a GPU, from operations and bytes: to judge a measured time at once.

Nothing here is a measurement. A floor is the larger of three times, each at its published peak: matrix products on the
units that the dtype allows, the making of features on the general-purpose lanes, and the bytes that must move. A kernel
that is well made comes within about 1.5 of it; one that is below it was mismeasured.

    python -m benchmarks.model [card] [batch,in,out[,grid_size[,spline_order]] ...]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from benchmarks.cases import Shape

# Instructions to find the span and evaluate k + 1 local bases, to place one feature, and for a base activation: counted
# in kan_fast/backends/triton/kernels on uniform knots. They set the scale; compilers differ by a fifth.
SPAN, PER_ORDER, PLACE, ACTIVATION = 8, 4, 4, 12


@dataclass(frozen=True)
class Card:
    """Peaks of a GPU: dense products in FLOP/s by way, instruction lanes (32-bit operations a second), bytes/s."""

    name: str
    products: dict[str, float]
    lanes: float
    bandwidth: float


def _card(name: str, float16: float, tf32: float, tf32x3: float, float64: float, lanes: float, bandwidth: float) -> Card:
    """Its peaks, in TFLOP/s, TFLOP/s of lanes, and TB/s. A product in halves (csrc/cuda/split.h) is three of float16."""
    ways = {"bfloat16": float16, "tf32": tf32, "tf32x3": tf32x3, "float16x3": float16 / 3, "float64": float64}
    return Card(name, {way: rate * 1e12 for way, rate in ways.items()}, lanes * 1e12, bandwidth * 1e12)


# Vendors' data sheets, dense (no structured sparsity): H100 SXM5, H200 SXM (NVIDIA H200 Tensor Core GPU datasheet: the H100's
# chip with HBM3e; its rates with sparsity, halved), A100 SXM4 80 GB, and MI300X. "tf32x3" is three tf32 products on NVIDIA, or
# six of bfloat16, which take as long.
# Lanes: float32 FMA peak / 2. float64: that of the tensor cores, where there are any.
CARDS = {
    made.name: made
    for made in (
        _card("H100", 989, 494, 494 / 3, 67, 33.5, 3.35),
        _card("H200", 989, 494, 494 / 3, 67, 33.5, 4.8),
        _card("A100", 312, 156, 156 / 3, 19.5, 9.75, 2.04),
        _card("MI300X", 1307, 654, 163, 163, 81.7, 5.3),
    )
}

ELEMENT_BYTES = {"bfloat16": 2, "tf32": 4, "tf32x3": 4, "float16x3": 4, "float64": 8}


@dataclass(frozen=True)
class Floor:
    """Least seconds of one kernel, by what they go to; the floor is the largest. x counts as float32 or wider."""

    products: float
    features: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.features, self.memory)

    @property
    def bound(self) -> str:
        """What the floor is made of."""
        return max(("products", "features", "memory"), key=lambda part: getattr(self, part))


def floor(shape: Shape, kernel: str, way: str, card: Card, columns: int = 256) -> Floor:
    """The floor of contract_output, contract_input or contract_weight.

    way: "bfloat16", "tf32", "tf32x3", "float16x3" or "float64". columns: width of the tile that shares the features of one
    program; contract_output and contract_weight make them anew for every tile of so many outputs, contract_input once.
    """
    size, x_size = ELEMENT_BYTES[way], 8 if way == "float64" else 4
    inputs, outputs = shape.batch * shape.in_features, shape.batch * shape.out_features
    bases = shape.grid_size + shape.spline_order
    times = 1 if kernel == "contract_input" else -(-shape.out_features // columns)
    # Weights once (read or written), x once, y or its gradient once; contract_input writes dx besides.
    moved = size * (shape.parameters + outputs) + x_size * inputs * (2 if kernel == "contract_input" else 1)
    narrow = shape.out_features <= 16 and kernel != "contract_weight"
    # The narrow kernels touch k + 2 weights of an edge on the general-purpose lanes, and place nothing.
    made = SPAN + PER_ORDER * shape.spline_order + ACTIVATION + (0 if narrow else PLACE * bases)
    local = inputs * shape.out_features * (shape.spline_order + 2) if narrow else 0
    products = 0.0 if narrow else 2.0 * shape.batch * shape.parameters / card.products[way]
    return Floor(products, (inputs * made * times + local) / card.lanes, moved / card.bandwidth)


def linear_floor(shape: Shape, way: str, card: Card) -> float:
    """Least seconds of the forward of the nn.Linear with as many parameters: (batch, in * (G + k + 1)) x (..., out)."""
    size = ELEMENT_BYTES[way]
    moved = size * (shape.batch * (shape.linear_features + shape.out_features) + shape.parameters)
    return max(2.0 * shape.batch * shape.parameters / card.products[way], moved / card.bandwidth)


def step_floor(shape: Shape, way: str, card: Card) -> float:
    """Least seconds of forward, gradient of x and gradient of the weights, one after the other."""
    return sum(floor(shape, kernel, way, card).seconds for kernel in ("contract_output", "contract_input", "contract_weight"))


DEFAULT_SHAPES = ("16384,1024,1024", "4096,784,64", "1024,256,256,20", "1000000,2,5", "65536,5,1")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.model", description="Floors of a layer's time on a GPU.")
    made.add_argument("card", nargs="?", metavar="CARD", help=f"one of {', '.join(CARDS)} (default: H100)")
    made.add_argument("shapes", nargs="*", metavar="B,I,O[,G[,K]]", help=f"shapes (default: {' '.join(DEFAULT_SHAPES)})")
    return made


def main(arguments: list[str]) -> None:
    """Print the floors of shapes on a card."""
    made = parser()
    given = made.parse_args(arguments)
    name, texts = given.card or "H100", given.shapes
    if "," in name:  # a shape: the card was left out
        name, texts = "H100", [name, *texts]
    if name not in CARDS:
        made.error(f"CARD: expected one of {', '.join(CARDS)}, got {name!r}")
    try:
        shapes = [Shape.parse(text) for text in texts or DEFAULT_SHAPES]
    except ValueError as error:
        made.error(str(error))
    card = CARDS[name]
    print(f"floors on {card.name} by its data sheet, in microseconds; calculated, not measured")
    for shape in shapes:
        for way in ("bfloat16", "tf32", "tf32x3", "float16x3"):
            parts = []
            for kernel in ("contract_output", "contract_input", "contract_weight"):
                least = floor(shape, kernel, way, card)
                parts.append(f"{kernel} {least.seconds * 1e6:9.1f} ({least.bound})")
            linear = linear_floor(shape, way, card) * 1e6
            step = step_floor(shape, way, card) * 1e6
            print(f"{shape!s:32} {way:9} {'  '.join(parts)}  step {step:9.1f}  nn.Linear {linear:9.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
