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


def random(keys, *, bit_width, shape):
    """Random bits by JAX's default generator, Threefry: a hash of each place with a key, two numbers on its last axis."""
    places = np.arange(np.prod(shape, dtype=int), dtype=np.uint64).reshape(shape)
    keys = [keys[..., k].reshape(keys.shape[:-1] + (1,) * len(shape)) for k in (0, 1)]
    high, low = _hashed(*keys, (places >> 32).astype(np.uint32), places.astype(np.uint32))
    return high.astype(np.uint64) << 32 | low if bit_width == 64 else (high ^ low).astype(f"u{bit_width // 8}")


def _hashed(first, second, a, b):
    keys = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    a, b = a + first, b + second
    for turn in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            a = a + b
            b = (b << by | b >> (32 - by)) ^ a
        a, b = a + keys[(turn + 1) % 3], b + keys[(turn + 2) % 3] + (turn + 1)
    return a, b


def ends(dtype):
    """The least and the largest number of a dtype, including infinities: the maximum and the minimum of an empty array."""
    if dtype.kind == "b":
        return False, True
    if np.issubdtype(dtype, np.integer):
        return np.iinfo(dtype).min, np.iinfo(dtype).max
    return dtype.type(-np.inf), dtype.type(np.inf)
