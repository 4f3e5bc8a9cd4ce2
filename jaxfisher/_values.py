"""Arrays and numbers as users pass them: how messages show them, and which of them JAX does not accept."""

from __future__ import annotations

import math
import numbers
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Scalar


def is_array(value: Any) -> bool:
    """Whether the value is an array or a number of any kind."""
    return isinstance(value, (jax.Array, jax.ShapeDtypeStruct, float, int, complex)) or hasattr(value, "__array__")


def dtype_of(value: Any) -> Any:
    """The dtype of an array or number, even if JAX does not support it, such as NumPy's strings."""
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)


def described(value: Any) -> str:
    """A value as a message shows it: the shape and dtype of an array, a number or string itself, else its type."""
    if hasattr(value, "dtype") and np.shape(value) != ():
        return f"an array of shape {np.shape(value)} and dtype {value.dtype}"
    if hasattr(value, "dtype") or isinstance(value, (numbers.Number, str, type(None))):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def is_number(value: Any) -> bool:
    """Whether the value is a real scalar: Python's, NumPy's, or an array without axes; a boolean does not count."""
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or hasattr(value, "dtype")) or np.shape(value) != ():
        return False
    return any(jnp.issubdtype(dtype_of(value), kind) for kind in (jnp.floating, jnp.integer))


def is_sparse(value: Any) -> bool:
    """Whether the value is a sparse matrix of SciPy, or a sparse array of JAX, whose parts are leaves of a pytree."""
    return type(value).__module__.startswith(("jax.experimental.sparse", "scipy.sparse"))


def whole(value: Any) -> int | None:
    """Python's or NumPy's whole number as a Python int; None for any other value."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def count_of(name: str, value: Any, what: str = "a whole number of", least: int = 1) -> int:
    """Python's or NumPy's whole number as a Python int, after checking that it is at least ``least``."""
    count = whole(value)
    if count is None or count < least:
        raise ValueError(f"{name} is {described(value)}; expected {what} at least {least}.")
    return count


def checked_shape(caller: str, shape: Any) -> tuple[int, ...]:
    """The shape of draws: whole numbers of at least zero, in a tuple or list."""
    sizes = [whole(size) for size in shape] if isinstance(shape, tuple | list) else [None]
    known = tuple(size for size in sizes if size is not None and size >= 0)
    if len(known) != len(sizes):
        raise TypeError(
            f"{caller}: `shape` is {shape!r}; expected a tuple of whole numbers, such as (100,) for a hundred draws, or ()."
        )
    return known


def is_table(value: Any) -> bool:
    """Whether the value is a frame or column of pandas or polars."""
    return type(value).__module__.split(".")[0] in ("pandas", "polars")


def check_array(name: str, value: Any) -> None:
    """Raise `TypeError` if JAX does not accept a value that looks like an array, and say what to convert it to."""
    kind, dtype = type(value).__name__, getattr(value, "dtype", None)
    if is_sparse(value):
        dense = "toarray()" if type(value).__module__.startswith("scipy") else "todense()"
        raise TypeError(f"{name} is a sparse {kind} of shape {value.shape}; expected a dense array. Pass x.{dense}.")
    if is_table(value) and not isinstance(dtype, np.dtype):
        seen = f"{type(value).__module__.split('.')[0]} {kind} of " + (
            f"shape {value.shape}" if dtype is None else f"dtype {dtype}"
        )
        raise TypeError(
            f"{name} is a {seen}; expected an array of numbers. Replace what is missing and pass x.to_numpy(float)."
        )
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array of shape {value.shape}; expected one without a mask. Pass x.filled(0), and give the "
            "weight zero to examples in which something is missing."
        )
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iufc":
        return
    if not dtype.isnative:
        raise TypeError(
            f"{name} is {described(value)}, whose bytes are in another order than this machine's, which JAX expects. Pass "
            "x.astype(x.dtype.newbyteorder('='))."
        )
    double = {"f": np.dtype(np.float64), "c": np.dtype(np.complex128)}.get(dtype.kind)
    if double is not None and dtype.itemsize > double.itemsize:
        raise TypeError(
            f"{name} is {described(value)}; expected {double} or narrower, the widest of JAX. Pass x.astype({double.str!r})."
        )


def real_array(name: str, values: Any) -> Array:
    """Real numbers, also in a list, as a floating array."""
    held = np.asarray(values) if isinstance(values, list | tuple) else values
    if not is_array(held) or not any(jnp.issubdtype(dtype_of(held), kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} is {described(held)}; expected real numbers.")
    check_array(name, held)
    array = jnp.asarray(held)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.result_type(float))


def check_flag(name: str, value: Any) -> None:
    """Raise `TypeError` unless the argument is a boolean. Most other values, such as the word "no", would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {described(value)}; expected True or False.")


def nonnegative(name: str, value: chex.Numeric, dtype: Any) -> Scalar:
    """The argument as a scalar of this dtype, after `check_nonnegative`; NaN if it is negative at run time."""
    check_nonnegative(name, value)
    return _nan_below_zero(value, dtype)


def positive(name: str, value: chex.Numeric, dtype: Any) -> Scalar:
    """The argument as a scalar of this dtype. A known value must be above zero; a run-time value that is not becomes NaN."""
    check_number(name, value, "one real number above zero")
    if is_known(value) and not 0 < float(value) < math.inf:
        raise ValueError(f"`{name}` is {value}; expected a finite number above zero.")
    array = jnp.asarray(value, dtype)
    return jnp.where(array > 0, array, jnp.nan) if isinstance(value, jax.Array) else array


def fraction(name: str, value: chex.Numeric, dtype: Any) -> Scalar:
    """The argument as a scalar of this dtype, after `check_fraction`; NaN if it is outside ``[0, 1)`` at run time."""
    check_fraction(name, value)
    array = jnp.asarray(value, dtype)
    return jnp.where((array >= 0) & (array < 1), array, jnp.nan) if isinstance(value, jax.Array) else array


def check_fraction(name: str, value: chex.Numeric) -> None:
    """Raise unless the argument is a real number, or if it is known to be outside ``[0, 1)``."""
    check_number(name, value, "one real number in [0, 1), the weight of the past")
    if is_known(value) and not 0 <= float(value) < 1:
        raise ValueError(f"`{name}` is {value}; expected a number in [0, 1), the weight of the past.")


def nonnegative_entries(name: str, values: Any, dtype: Any) -> Array:
    """`nonnegative` for each entry of an array."""
    check_array(name, values)
    # The values of a JAX array are run-time numbers: reading them would wait for the device.
    known = values if isinstance(values, np.ndarray) else np.zeros(0)
    wrong = known[~((known >= 0) & (known < np.inf))]
    if wrong.size:
        raise ValueError(f"{name} holds {wrong[0]}; expected finite numbers of at least zero.")
    return _nan_below_zero(values, dtype)


def _nan_below_zero(value: Any, dtype: Any) -> Array:
    array = jnp.asarray(value, dtype)
    return jnp.where(array >= 0, array, jnp.nan) if isinstance(value, jax.Array) else array


def check_nonnegative(name: str, value: chex.Numeric) -> None:
    """Raise unless the argument is a real number, or if it is known to be negative.

    The check makes no array, which would initialise the devices: objects that are made before there are data may be made before
    `jax.distributed.initialize` is called.
    """
    check_number(name, value, "one real number of at least zero")
    # The value of a JAX array is a run-time number: reading it would wait for the device.
    if is_known(value) and not 0 <= float(value) < math.inf:
        raise ValueError(f"`{name}` is {value}; expected a finite number of at least zero.")


def is_known(value: Any) -> bool:
    """Whether a number can be read at trace time, without waiting for a device."""
    return isinstance(value, (numbers.Real, np.ndarray, np.generic))


def check_definite(name: str, covariance: Any) -> None:
    """Raise `ValueError` for a covariance, or a stack of them, that is known and not symmetric and positive definite."""
    if not is_known(covariance) or np.ndim(covariance) < 2 or np.any(np.isnan(covariance)):
        return
    matrix = np.asarray(covariance, jnp.result_type(float, covariance))
    eps = float(np.finfo(matrix.dtype).eps)
    if not np.allclose(matrix, np.swapaxes(matrix, -1, -2), rtol=eps**0.5, atol=eps**0.5 * np.max(np.abs(matrix), initial=0.0)):
        raise ValueError(f"{name} is not symmetric; expected a covariance. For its lower Cholesky factor L give L @ L.T.")
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"{name} has the eigenvalue {np.min(np.linalg.eigvalsh(matrix)):.3g}; expected a positive definite matrix. Leave "
            "out numbers that follow from the others, or add the variance of their noise to the diagonal."
        ) from error


def is_known_zero(value: chex.Numeric, dtype: Any) -> bool:
    """Whether an argument is known at trace time to be zero in this dtype, or below its normal numbers.

    For an array it is enough that one entry is.
    """
    return is_known(value) and bool(np.any(np.abs(np.asarray(value, dtype)) < jnp.finfo(dtype).tiny))


def is_known_positive(value: chex.Numeric, dtype: Any) -> bool:
    """Whether an argument is known at trace time to be positive in this dtype, and a normal number of it.

    For an array all entries must be.
    """
    return is_known(value) and bool(np.all(np.asarray(value, dtype) >= jnp.finfo(dtype).tiny))


def check_number(name: str, value: Any, expected: str = "one real number") -> None:
    """Raise `TypeError` unless the argument is a real scalar: Python's, NumPy's, or an array without axes."""
    if not is_number(value):
        raise TypeError(f"`{name}` is {described(value)}; expected {expected}.")
