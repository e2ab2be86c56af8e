"""Files of named tensors in the safetensors format: 8 bytes length, a JSON header, the tensors' bytes.

Written here because the format is small and the package needs torch alone; the safetensors package and the tools around it
read these files too. Format: https://huggingface.co/docs/safetensors, version 0.x.
"""

import ctypes
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kan_fast.atomic import replacing
from kan_fast.checks import check_path

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any shape and device, and strings beside them; replaces what was there, or leaves it whole.

    Raises TypeError for a dtype that the format does not have, and for subclasses of Tensor such as DTensor.
    """
    check_path("path", path)
    _check_byte_order()
    # Widest first, then by name, as the safetensors package does: every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{name}: expected a plain tensor, got {type(tensor).__name__}; gather a sharded state first")
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, _NAMES))}, got {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            block = tensors[name].detach().cpu().contiguous()
            file.write((ctypes.c_char * (block.numel() * block.element_size())).from_address(block.data_ptr()))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and strings of a file; raises ValueError, with the path, for one that is not whole."""
    _check_byte_order()
    with open(check_path("path", path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(path, file, size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _damaged(path, "its metadata are not strings")
        places = {name: _place(path, name, entry) for name, entry in header.items()}
        ends = sorted(place[2:] for place in places.values())
        if any(before[1] != after[0] for before, after in zip([(0, 0), *ends], ends)):
            raise _damaged(path, "its tensors overlap or leave gaps")
        whole = start + (ends[-1][1] if ends else 0)
        if size != whole:
            raise ValueError(f"{path}: {'truncated' if size < whole else 'damaged'}: expected {whole} bytes, got {size}")
        tensors = {}
        for name, (dtype, shape, begin, end) in places.items():
            file.seek(start + begin)
            block = bytearray(end - begin)
            if file.readinto(block) != len(block):
                raise ValueError(f"{path}: truncated while it was read")
            flat = torch.frombuffer(block, dtype=dtype) if block else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
    return tensors, metadata


def _read_header(path: str | os.PathLike[str], file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header and where the tensors start."""
    first = file.read(9)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 9 or first[8:] != b"{" or length > _LONGEST_HEADER:
        raise ValueError(f"{path}: expected a safetensors file, got {'an empty file' if not first else 'something else'}")
    if size < 8 + length:
        raise ValueError(f"{path}: truncated: expected a header of {length} bytes, got {size - 8}")
    try:
        header = json.loads(b"{" + file.read(length - 1))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, 8 + length


def _place(path: str | os.PathLike[str], name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """dtype, shape, first and last byte of a tensor, checked against each other."""
    try:
        dtype, shape = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _damaged(path, f"the entry of {name!r} is not one of a tensor: {entry}") from None
    if min([*shape, begin]) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"the shape {shape} of {name!r} does not go with its {end - begin} bytes")
    return dtype, shape, begin, end


def _damaged(path: str | os.PathLike[str], reason: str) -> ValueError:
    return ValueError(f"{path}: damaged: {reason}")


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise RuntimeError("safetensors files hold little-endian numbers, this machine is big-endian")
