r"""The null space of a symmetric matrix, known in units in which it has a unit diagonal, and projected out in its own.

With ``M' = s M s`` the null space of M is ``s N'`` of that of M'. Any ``G`` with ``M G M = M``, such as ``s M'^+ s``, gives the
pseudo-inverse ``M^+ = P G P``, with ``P`` the orthogonal projection off the null space: solutions of minimum norm in the own
units of M. Null vectors that an eigendecomposition finds are off by rounding over the smallest eigenvalue that was kept; a
product of M that is more precise than the matrix mends this, and shows what is left.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxfisher._linalg import inverse_power, matmul, norm
from jaxfisher._varying import cond, while_loop


def combined(vectors: Float[Array, "m m"], which: Bool[Array, " m"]) -> Float[Array, " m"]:
    """A combination of some of the columns, with weights at which nothing cancels but by accident."""
    weights = jnp.cos(jnp.square(jnp.arange(which.size, dtype=vectors.dtype)))
    return matmul(vectors, jnp.where(which, weights, 0))


def projected(
    vectors: Float[Array, "m m"],
    inverted: Float[Array, " m"],
    kept: Bool[Array, " m"],
    unit: Float[Array, " m"],
    product: Callable[[Float[Array, " m"]], Float[Array, " m"]],
) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """The eigenvectors that were kept, projected off the others in the own units of the matrix; a combination of the others.

    All in units in which the matrix has a unit diagonal. In the place of a null vector stands how far off it still is.
    """
    size, down = kept.size, inverse_power(unit)
    places = jnp.arange(size, dtype=jnp.int32)

    def mend(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, basis, off = state
        place = step % size
        before = jnp.where(places[None, :] < place, basis, 0)

        def mended() -> tuple[Array, Array]:
            vector = aside(before, aside(before, basis[:, place]))
            length = norm(vector)
            vector = vector / jnp.where(length > 0, length, 1)
            change = unit * matmul(vectors, inverted * matmul(vectors.T, product(down * vector)))
            return basis.at[:, place].set(vector - change), off.at[:, place].set(down * change)

        basis, off = cond(kept[place], lambda: (basis, off), mended)
        return step + 1, basis, off

    # One after the other, and all of them twice: the second time shows how much the first one missed.
    begin = jnp.zeros((), jnp.int32), jnp.where(kept[None, :], 0, unit[:, None] * vectors), jnp.zeros_like(vectors)
    _, basis, off = while_loop(lambda state: state[0] < 2 * size, mend, begin)
    rest = unit[:, None] * vectors
    # Mended vectors are orthonormal only as far as they were right before, and columns may be much longer than what is left.
    for _ in range(4):
        rest = aside(basis, rest)
    rest = down[:, None] * rest
    null = down[:, None] * basis
    sizes = jnp.sqrt(jnp.sum(jnp.square(null), 0))
    balanced = null / jnp.where(sizes > 0, sizes, 1)[None, :]
    return jnp.where(kept[None, :], rest, off), combined(balanced, ~kept)


def aside(basis: Float[Array, "m m"], vectors: Array) -> Array:
    """What is left of vectors beside orthonormal ones."""
    return vectors - matmul(basis, matmul(basis.T, vectors))


def is_unseen(image: Float[Array, " p"], y: Float[Array, " p"], roots: Float[Array, " p"]) -> Bool[Array, ""]:
    """Whether the image of ``y`` is nothing but rounding, entry by entry, of a matrix with these roots of its diagonal."""
    rounded = 10 * y.size * jnp.finfo(y.dtype).eps * jnp.vdot(roots, jnp.abs(y))
    return jnp.all(jnp.abs(image) <= rounded * roots)
