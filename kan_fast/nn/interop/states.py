"""What the converters share: tensors by name from a module or a state_dict, and one layer's share of them."""

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Source = nn.Module | Mapping[str, Any]


def tensors(source: Source) -> dict[str, Tensor]:
    """Parameters and buffers by name; those of a module keep requires_grad."""
    if isinstance(source, nn.Module):
        return dict(source.state_dict(keep_vars=True))
    if not isinstance(source, Mapping):
        raise TypeError(f"source: expected a module or a state_dict, got {type(source).__name__}")
    for key, value in source.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"source: expected tensors by name, got {key!r}: {type(value).__name__}")
    return dict(source)


def layer_prefixes(state: Mapping[str, Tensor], leaf: str, within: str, package: str) -> tuple[list[str], str | None]:
    """What stands before `leaf` in the keys of every layer, in order, and what stands before `within` in a network's.

    A network numbers its layers: `{head}{within}.{number}.{leaf}`; for a lone layer the second result is None.
    """
    prefixes = [key.removesuffix(leaf) for key in state if f".{key}".endswith(f".{leaf}")]
    if not prefixes:
        some = ", ".join(sorted(state)[:5]) or "nothing"
        raise ValueError(f"source: expected a state of {package} with the key {leaf}, got {some}")
    found = [re.fullmatch(rf"((?:.*\.)?){within}\.(\d+)\.", prefix) for prefix in prefixes]
    if len(prefixes) == 1 and found[0] is None:
        return prefixes, None
    numbered = {int(match[2]): match[1] for match in found if match is not None}
    if None in found or sorted(numbered) != list(range(len(prefixes))) or len(set(numbered.values())) > 1:
        raise ValueError(
            f"source: expected one layer, or the layers {within}.0, {within}.1, ... of one {package} network,"
            f" got {', '.join(prefixes)}"
        )
    head = numbered[0]
    return [f"{head}{within}.{number}." for number in range(len(prefixes))], head


def take(state: dict[str, Tensor], prefix: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Removes one layer's tensors from the state: name -> tensor, None for an optional one that is not there."""
    missing = [prefix + name for name in needed if prefix + name not in state]
    if missing:
        raise ValueError(f"source: the keys {', '.join(missing)} are missing")
    return {name: state.pop(prefix + name, None) for name in needed + optional}


def forget(state: dict[str, Tensor], prefix: str) -> None:
    """Removes what stands below a prefix, such as the parameters of an activation that is copied as a whole."""
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def nothing_left(state: Mapping[str, Tensor], package: str) -> None:
    """Raise for keys that no layer took."""
    if state:
        raise ValueError(
            f"source: expected a state of {package} alone, got the further keys {', '.join(sorted(state)[:5])}"
            f"{', ...' if len(state) > 5 else ''}"
        )


def copied(function: Any) -> Any:
    """A base activation that shares no parameters with its source."""
    return copy.deepcopy(function) if isinstance(function, nn.Module) else function
