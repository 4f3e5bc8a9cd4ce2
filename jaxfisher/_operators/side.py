"""One factor of a Kronecker product: its root, its eigenvectors, its share of a damping."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxfisher._bordered import Bordered, Rows
from jaxfisher._inverse import eigen, multiplied
from jaxfisher._linalg import are_apart, batched, cholesky, eigenpairs, resolved
from jaxfisher._null_space import projected
from jaxfisher._varying import cond


def roots(x: Float[Array, "groups m m"]) -> Float[Array, "groups m m"]:
    """The Cholesky factors of positive definite matrices."""
    return jax.vmap(cholesky)(x)


class Side(NamedTuple):
    """One factor of a Kronecker product by its eigenvectors, in its units; without a damping its null space is projected out.

    Attributes:
        vectors: the vectors that play the part of eigenvectors; zero for those that are left out.
        values: the eigenvalues, in the units of ``vectors``.
        kept: which of the vectors are not left out.
        clear: whether the eigenvalues that are kept are well above rounding.
        off: the null vectors that were left out, in the parameters' units.
    """

    vectors: Float[Array, "m m"]
    values: Float[Array, " m"]
    kept: Bool[Array, " m"]
    clear: Bool[Array, ""]
    off: Float[Array, "m m"]


@jax.vmap
def sides(matrix: Float[Array, "m m"], unit: Float[Array, " m"], told: Bool[Array, ""]) -> Side:
    """The eigenvectors of each factor in a stack, as a `Side`."""
    found = eigen(matrix, unit, told)
    inverted = jnp.where(found.kept, 1 / jnp.where(found.kept, found.values, 1), 0)
    vectors = cond(
        jnp.all(found.kept),
        lambda: found.vectors,
        lambda: projected(found.vectors, inverted, found.kept, unit, multiplied(matrix, jnp.zeros_like(unit[0]), unit))[0],
    )
    own = unit[:, None] * vectors
    return Side(jnp.where(found.kept, own, 0), found.values, found.kept, found.clear, jnp.where(found.kept, 0, own))


def balanced(
    a: Float[Array, " groups"], g: Float[Array, " groups"], damping: Float[Array, "*groups"]
) -> tuple[Float[Array, " groups"], Float[Array, " groups"]]:
    """Two numbers whose product is the damping and whose ratio is that of the factors' mean eigenvalues."""
    balance = jnp.sqrt(jnp.where((a > 0) & (g > 0), a / jnp.where(g > 0, g, 1), 1))
    return jnp.sqrt(damping) * balance, jnp.sqrt(damping) / balance


def balanced_shifts(
    a: Float[Array, " groups"], g: Float[Array, " groups"], damping: Float[Array, "*groups"], sizes: tuple[Any, Any]
) -> tuple[Float[Array, " groups"], Float[Array, " groups"]]:
    """The numbers to add to the diagonals of two factors, from mean eigenvalues and sizes; enough to make each invertible."""
    shifts = balanced(a, g, damping)
    rounding = [10 * size * jnp.finfo(mean.dtype).eps * mean for mean, size in zip((a, g), sizes, strict=True)]
    held = [jnp.maximum(shift, least) for shift, least in zip(shifts, rounding, strict=True)]
    return jnp.where(held[0] > 0, held[0], 1), jnp.where(held[1] > 0, held[1], 1)


def eigenvectors(factors: Bordered) -> tuple[Float[Array, "groups m"], Rows]:
    """The eigenvalues (zero if inside rounding error) and the eigenvectors of positive semi-definite factors."""
    x = factors.whole()
    values, vectors = jax.vmap(eigenpairs)(x)
    largest = jnp.max(jnp.abs(values), -1, keepdims=True)
    held = Rows(vectors) if factors.border is None else Rows(vectors[:, :-1], vectors[:, -1:])
    return resolved(values, jnp.zeros((), x.dtype), largest, x.shape[-1]), held


@jax.custom_jvp
def turned_within(
    inputs: Float[Array, "groups i i"],
    outputs: Float[Array, "groups o o"],
    slopes: Float[Array, "groups i o"],
    values: tuple[Float[Array, "groups i"], Float[Array, "groups o"]],
    bases: tuple[Float[Array, "groups i i"], Float[Array, "groups o o"]],
    v: Float[Array, "groups i o"],
) -> Float[Array, "groups i o"]:
    """Zeros, whose derivative is the part of that of ``f(A (x) G) v`` that the derivatives of `eigenpairs` leave out.

    These do not turn the eigenvectors of equal eigenvalues, as a change of the factor between them would: it changes
    ``f(A (x) G)`` between them by ``f'`` times as much. ``slopes`` is ``f'`` at the products of the eigenvalues.
    """
    return jnp.zeros_like(v)


@turned_within.defjvp
def _turned_within_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    _, _, slopes, (a, g), (left, right), v = primals
    along = batched(batched(left, v, (1, 1)), right)
    by_inputs = batched(_between_equal(a, left, tangents[0]), along) * g[:, None, :]
    by_outputs = batched(along, _between_equal(g, right, tangents[1])) * a[:, :, None]
    return jnp.zeros_like(v), batched(batched(left, slopes * (by_inputs + by_outputs)), right, (2, 2))


def _between_equal(
    values: Float[Array, "groups m"], vectors: Float[Array, "groups m m"], change: Float[Array, "groups m m"]
) -> Float[Array, "groups m m"]:
    """The change of a factor between different eigenvectors of equal eigenvalues."""
    other = ~jnp.eye(values.shape[-1], dtype=bool)[None] & ~jax.vmap(are_apart)(values)
    return jnp.where(other, batched(vectors, batched(change, vectors), (1, 1)), 0)
