"""Sums and products of arrays that have leading axes for examples and for the rows of an example.

Factors have axes ``[n, rows, groups, T, size]``. The first or second axis has length one if the array does not depend on the
example, or on its row; the array is then stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxfisher._linalg import as_it_is, matmul
from jaxfisher._tree import HIGHEST

TILE = 2**22
"""How many numbers a temporary may hold before the work is done in chunks (16 MiB of float32)."""


def room() -> int:
    """The value of `TILE` at the time of the call, since tests change it."""
    return TILE


def few(size: float) -> int:
    """How many items of this size to work on at a time, at least one."""
    return max(1, int(room() // size))


Seal = Callable[[Array], Array]
"""A function applied to a product with a vector before it is summed: `sealed`, or `unsealed` if the vector is no constant."""


def sealed(x: Array) -> Array:
    """The same numbers, in a form that XLA does not fuse with the product they come from.

    On CPU (jax 0.10 to 0.12) a product with a vector of equal constants, fused with the sum that follows, reads memory that
    was never written. An optimisation barrier does not prevent the fusion. To JAX a comparison is not linear, but the solution
    of a linear system is, here of ``I y = x``, and so `jax.linear_transpose` accepts it.
    """
    made: Array = jax.lax.custom_linear_solve(lambda y: y, x, lambda _, b: as_it_is(b), symmetric=True)
    return made


def unsealed(x: Array) -> Array:
    """The same numbers, unchanged, for a vector that was computed and is no constant of the program."""
    return x


def total(parts: Sequence[Any]) -> Any:
    """The sum of arrays, at least one."""
    return sum(parts[1:], start=parts[0])


def magnitude(x: Array, axes: int | Sequence[int], least: float = 0.0) -> Array:
    """The largest entry in absolute value along some axes, which stay with length one; no less than ``least``.

    Callers only divide by the result and multiply it back, so no derivative goes through it.
    """
    sizes = jnp.abs(jax.lax.stop_gradient(x))
    if least > 0:
        # Apply the bound before the maximum: XLA would recompute an operation after it wherever the result is used.
        sizes = jnp.maximum(sizes, least)
    return jnp.max(sizes, axes, keepdims=True, initial=None if x.size else least)


def divisor(size: Array, largest: Array | None = None) -> Array:
    """A `magnitude` to divide by, with a small number in place of zero.

    A product with a factor of zeros has a derivative by that factor, which a division by nothing and a product with nothing
    would lose. Nothing overflows: neither the inverse of two such numbers, nor the product of one with the sizes of other
    factors, squared if the ``largest`` numbers that it meets are given.
    """
    tiny = float(jnp.finfo(size.dtype).tiny)
    small = tiny**0.4 if largest is None else 1 / jnp.clip(jax.lax.stop_gradient(largest), 1, 1 / tiny)
    return jnp.where(size < tiny, small, size)


def taken(tree: Any, examples: slice, count: int) -> Any:
    """Some of ``count`` examples; arrays that do not depend on the example stay."""
    return jax.tree.map(lambda x: x[examples] if x.shape[0] == count else x, tree)


def sum_to(x: Array, shape: Sequence[int]) -> Array:
    """The sum over leading (n, rows) axes along which ``shape`` has length one."""
    axes = tuple(i for i in (0, 1) if shape[i] == 1 and x.shape[i] != 1)
    return jnp.sum(x, axes, keepdims=True) if axes else x


def weighted(w: Float[Array, "n r"], x: Float[Array, "n r b t o"], shape: Sequence[int]) -> Array:
    """The sum of ``w x`` over leading (n, rows) axes along which ``shape`` has length one."""
    if shape[1] == 1 and shape[0] == x.shape[0] == w.shape[0] and x.shape[1] == w.shape[1] > 1:
        # Use a matrix product: XLA's CPU backend takes a hundred times as long for a sum along a middle axis.
        return jnp.einsum("nr,nrbto->nbto", w, x, precision=HIGHEST)[:, None]
    return sum_to(w[:, :, None, None, None] * x, shape)


def mean(array: Array, w: Float[Array, "n r"], by_row: bool = False) -> Array:
    """The weighted mean over examples and rows, with axes of length one for them; zero if no weight is positive.

    With ``by_row`` the mean is over examples only, separately for each row of an example.
    """
    weight = sum_to(w, array.shape[:2])
    whole = jnp.sum(weight, 0 if by_row else None, keepdims=True)
    weight = jnp.broadcast_to(weight / jnp.where(whole > 0, whole, 1), array.shape[:2])
    if by_row:
        return jnp.einsum("nr,nr...->r...", weight, array, precision=HIGHEST)[None]
    return jnp.einsum("nr,nr...->...", weight, array, precision=HIGHEST)[None, None]


def extent(x: Float[Array, "n r b t o"]) -> Float[Array, "n r"]:
    """The largest entry of each row in absolute value, divided by the largest of all rows; one if all are zero."""
    largest = jnp.max(jnp.abs(x), (2, 3, 4), initial=0.0)
    whole = jnp.max(largest)
    return jnp.where(whole > 0, largest / jnp.where(whole > 0, whole, 1), 1)


def masked(array: Array, live: Bool[Array, " n"]) -> Array:
    """The array, with zeros for the examples that are not live."""
    return jnp.where(live.reshape(-1, *(1,) * (array.ndim - 1)), array, 0)


def times(x: Float[Array, "n r b t i"], matrix: Float[Array, "b i o"]) -> Float[Array, "n r b t o"]:
    """Every factor times the matrix of its group."""
    if matrix.shape[0] == 1:
        return matmul(x.reshape(-1, x.shape[-1]), matrix[0]).reshape(*x.shape[:-1], matrix.shape[-1])
    return jnp.einsum("nrbti,bio->nrbto", x, matrix, precision=HIGHEST)


def contracted(left: Float[Array, "n r b t i"], right: Float[Array, "n r b t o"]) -> Float[Array, "b i o"]:
    """``sum left (x) right`` over rows and positions.

    Where both factors have a leading axis of length one, the caller has already summed over it.
    """
    shape = jnp.broadcast_shapes(left.shape[:4], right.shape[:4])
    left, right = (jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (left, right))
    if shape[2] == 1:
        return matmul(left.reshape(-1, left.shape[-1]).T, right.reshape(-1, right.shape[-1]))[None]
    return jnp.einsum("nrbti,nrbto->bio", left, right, precision=HIGHEST)


def inner(x: Float[Array, "n r b t i"], y: Float[Array, "m q b s i"]) -> Float[Array, "b n r t m q s"]:
    """Inner products over the last axis of all pairs of rows and positions, group by group."""
    shape = (x.shape[2], *x.shape[:2], x.shape[3], *y.shape[:2], y.shape[3])
    if shape[0] == 1:
        return matmul(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).T).reshape(shape)
    x, y = (z.transpose(2, 0, 1, 3, 4).reshape(z.shape[2], -1, z.shape[-1]) for z in (x, y))
    return matmul(x, y.swapaxes(1, 2)).reshape(shape)
