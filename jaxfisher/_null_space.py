r"""The null space of a symmetric matrix M: found in units in which M has a unit diagonal, projected out in M's own units.

With ``M' = s M s``, s diagonal, the null space of M is s times that of M'. Any ``G`` with ``M G M = M``, such as ``s M'^+ s``,
gives the pseudo-inverse ``M^+ = P G P``, where ``P`` is the orthogonal projection off the null space. It gives the solutions of
minimum norm in M's own units. The null vectors of an eigendecomposition have errors of the size of rounding divided by the
smallest eigenvalue that was kept. Products with M that are more precise than the matrix correct them and measure what remains.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxfisher._linalg import inverse_power, matmul, norm
from jaxfisher._varying import cond, while_loop


def combined(vectors: Float[Array, "m m"], which: Bool[Array, " m"]) -> Float[Array, " m"]:
    """A linear combination of some of the columns, with weights at which they cancel only by accident."""
    weights = jnp.cos(jnp.square(jnp.arange(which.size, dtype=vectors.dtype)))
    return matmul(vectors, jnp.where(which, weights, 0))


def projected(
    vectors: Float[Array, "m m"],
    inverted: Float[Array, " m"],
    kept: Bool[Array, " m"],
    unit: Float[Array, " m"],
    product: Callable[[Float[Array, " m"]], Float[Array, " m"]],
) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """The kept eigenvectors, projected off the null vectors in the matrix's own units, and one combination of the null vectors.

    Both are in units in which the matrix has a unit diagonal. The column of a null vector holds its last correction instead,
    which measures its error.

    Args:
        vectors: the eigenvectors of the matrix in units in which it has a unit diagonal.
        inverted: the inverse eigenvalues, zero for null vectors.
        kept: which eigenvectors are not null vectors.
        unit: the diagonal s that scales the matrix to a unit diagonal.
        product: the product with the matrix, in units in which it has a unit diagonal.
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

    # One null vector after the other, and all of them twice: the second corrections show how large the errors were.
    begin = jnp.zeros((), jnp.int32), jnp.where(kept[None, :], 0, unit[:, None] * vectors), jnp.zeros_like(vectors)
    _, basis, off = while_loop(lambda state: state[0] < 2 * size, mend, begin)
    rest = unit[:, None] * vectors
    # The corrected vectors are not exactly orthonormal, and a column may be much longer than what the projection leaves of it.
    for _ in range(4):
        rest = aside(basis, rest)
    rest = down[:, None] * rest
    null = down[:, None] * basis
    sizes = jnp.sqrt(jnp.sum(jnp.square(null), 0))
    balanced = null / jnp.where(sizes > 0, sizes, 1)[None, :]
    return jnp.where(kept[None, :], rest, off), combined(balanced, ~kept)


def aside(basis: Float[Array, "m m"], vectors: Array) -> Array:
    """The vectors, projected onto the orthogonal complement of the orthonormal columns of ``basis``."""
    return vectors - matmul(basis, matmul(basis.T, vectors))


def is_unseen(image: Float[Array, " p"], y: Float[Array, " p"], roots: Float[Array, " p"]) -> Bool[Array, ""]:
    """Whether the image of ``y`` under a matrix is rounding error in every entry; ``roots`` are those of its diagonal."""
    rounded = 10 * y.size * jnp.finfo(y.dtype).eps * jnp.vdot(roots, jnp.abs(y))
    return jnp.all(jnp.abs(image) <= rounded * roots)
