"""Repairs of Triton's interpreter, which is wrong in silence where these kernels need it (seen in 3.6.0 and 3.9.0).

- tl.dot and arithmetic on bfloat16 treat the bit patterns as integers. Repaired for products, unary and binary operations.
- float32 becomes bfloat16 by truncation, which is wrong for one number in two. Here it rounds to nearest even.
- A product too small for a GPU is accepted. Here it is refused.
- Triton 3.6 makes loop bounds of arrays of one number in a way that NumPy 2.5 refuses. Here the number is taken out.

Out-of-bounds accesses and races stay unseen: offline compilation and a GPU have to find those.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter as _interpreter

# What triton 3.6 asks of the depth of every product; 3.9 asks less for wide numbers.
_LEAST_DEPTH = 16


@functools.cache
def repair() -> None:
    """Mend the interpreter for this process; a second call does nothing."""
    builder = _interpreter.InterpreterBuilder
    builder.binary_op = _binary(builder.binary_op)
    builder.unary_op = _unary(builder.unary_op)
    builder.create_dot = _dot(builder.create_dot)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _convert(builder.create_fp_to_fp)
    _interpreter._patch_lang_tensor = _bounds(_interpreter._patch_lang_tensor)


def run(launches: Iterable[Any]) -> None:
    """Run launches in the mended interpreter, as silent about 1 / 0 and overflow as a GPU."""
    repair()
    with np.errstate(all="ignore"):
        for launch in launches:
            launch.run()


def from_bfloat16(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """uint16 bit patterns of bfloat16 -> float32."""
    widened: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened


def to_bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float32 -> uint16 bit patterns of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    result: npt.NDArray[np.uint16] = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return result


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not _is_bfloat16(lhs):
            return original(self, lhs, rhs, op)
        result = op(from_bfloat16(lhs.data), from_bfloat16(rhs.data))
        if result.dtype == np.bool_:
            return _interpreter.TensorHandle(result, tl.int1)
        return _interpreter.TensorHandle(to_bfloat16(result), tl.bfloat16)

    return binary_op


def _unary(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
        if not _is_bfloat16(arg):
            return original(self, arg, op)
        return _interpreter.TensorHandle(to_bfloat16(op(from_bfloat16(arg.data))), tl.bfloat16)

    return unary_op


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if src.dtype.scalar == to or tl.bfloat16 not in (src.dtype.scalar, to):
            return original(self, src, dst_type)
        values = from_bfloat16(src.data) if _is_bfloat16(src) else src.data
        if to == tl.bfloat16:
            return _interpreter.TensorHandle(to_bfloat16(values), to)
        return _interpreter.TensorHandle(values.astype(_interpreter._get_np_dtype(dst_type)), to)

    return cast_impl


def _convert(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        nearest = rounding_mode is None or rounding_mode == _interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _bounds(original: Callable[..., None]) -> Callable[..., None]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        (rows, depth), columns = a.data.shape[-2:], b.data.shape[-1]
        if depth < _LEAST_DEPTH:
            raise ValueError(f"tl.dot: expected a depth of at least {_LEAST_DEPTH}, got {rows} x {depth} x {columns}")
        if not _is_bfloat16(a):
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        left, right = from_bfloat16(a.data), from_bfloat16(b.data)
        return _interpreter.TensorHandle(np.matmul(left, right, dtype=np.float32) + d.data, d.dtype.scalar)

    return create_dot
