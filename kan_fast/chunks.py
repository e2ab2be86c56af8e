"""How work is split so that memory stays bounded."""

from collections.abc import Iterator

# Nothing holds more than this many numbers of a (samples, in, out) or (samples, in, bases) tensor at once:
# 32 MiB in float64, enough to keep a GPU busy and small beside any model.
CHUNK_ELEMENTS = 2**22


def chunks(total: int, row_elements: int) -> Iterator[slice]:
    """Slices of range(total) such that a slice's rows, of `row_elements` numbers each, stay below CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
