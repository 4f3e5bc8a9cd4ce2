"""Operations on the bits of numbers, in NumPy."""

import numpy as np


def reduce_precision(x, *, exponent_bits, mantissa_bits):
    fraction, exponent = np.frexp(x if x.dtype.itemsize > 4 else x.astype(np.float32))
    rounded = np.ldexp(np.rint(np.ldexp(fraction, mantissa_bits + 1)), exponent - mantissa_bits - 1)
    return rounded.astype({5: np.float16, 8: np.float32, 11: np.float64}[exponent_bits])


def bitcast(x, *, new_dtype):
    assert np.dtype(new_dtype).itemsize == x.dtype.itemsize
    return np.ascontiguousarray(x).view(new_dtype).reshape(x.shape)


def shift_right_logical(x, by):
    plain = x.astype(f"u{x.dtype.itemsize}") >> by.astype(f"u{x.dtype.itemsize}")
    return np.where((by >= 0) & (by < 8 * x.dtype.itemsize), plain, 0)


def ends(dtype):
    """The least and the largest number of a dtype, infinities among them: what is the largest of no numbers, and the least."""
    if dtype.kind == "b":
        return False, True
    if np.issubdtype(dtype, np.integer):
        return np.iinfo(dtype).min, np.iinfo(dtype).max
    return dtype.type(-np.inf), dtype.type(np.inf)
