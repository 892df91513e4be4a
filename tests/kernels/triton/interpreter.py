"""Triton's CPU interpreter, made faithful.

Casts to bf16 round to nearest even, tl.fma rounds once, and arithmetic on bf16, which the interpreter would do on raw
bits, is an error.

To be imported in a process that has TRITON_INTERPRET=1 in its environment from the start.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def repair() -> None:
    """Replace what is wrong in the interpreter, for the rest of the process."""
    stock_binary_op = InterpreterBuilder.binary_op
    stock_convert = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << 16
        if source == tl.float32 and target == tl.bfloat16:
            wide = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32).reshape(-1).copy())
            return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return stock_convert(data, source, target, rounding)

    def binary_op(self, left, right, operation):
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar) and operation not in _BITWISE:
            raise TypeError("a kernel computes in bf16: it must widen what it loads")
        return stock_binary_op(self, left, right, operation)

    def create_fma(self, x, y, z):
        return TensorHandle(fused_multiply_add(x.data, y.data, z.data), z.dtype.scalar)

    interpreter._convert_float = convert_float
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_fma = create_fma


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of fp32 arrays, rounded once.

    fp64 holds the product exactly. Its sum with z is rounded to odd (an inexact sum gets an odd last bit), after which
    rounding to fp32 gives what rounding the exact sum would (Boldo and Melquiond,
    https://doi.org/10.1109/TC.2007.70819).
    """
    product, z = np.asarray(x, np.float64) * np.asarray(y, np.float64), np.asarray(z, np.float64)
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    bits = np.atleast_1d(total).view(np.int64)
    toward = np.where(error > 0, np.inf, -np.inf)
    nudge = np.isfinite(total) & (error != 0) & (bits.reshape(total.shape) & 1 == 0)
    return np.where(nudge, np.nextafter(total, toward), total).astype(np.float32)
