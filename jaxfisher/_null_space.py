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

from jaxfisher._linalg import inverse_power, matmul
from jaxfisher._varying import while_loop


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
    order = jnp.argsort(kept, stable=True)
    count = jnp.sum(~kept, dtype=jnp.int32)
    null, down = jnp.arange(kept.size, dtype=jnp.int32) < count, inverse_power(unit)

    def mend(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        place, basis, off = state
        vector = basis[:, place]
        change = matmul(vectors, inverted * matmul(vectors.T, product(vector)))
        return place + 1, basis.at[:, place].set(vector - change), off.at[:, place].set(change)

    def sweep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The first columns of Q span the first columns of what was factored.
        step, basis, off = state
        basis = down[:, None] * jnp.where(null[None, :], jnp.linalg.qr(unit[:, None] * basis)[0], 0)
        _, basis, off = while_loop(lambda state: state[0] < count, mend, (jnp.zeros_like(step), basis, off))
        return step + 1, basis, off

    # The second time shows how much the first one missed.
    begin = jnp.zeros((), jnp.int32), vectors[:, order], jnp.zeros_like(vectors)
    _, basis, off = while_loop(lambda state: state[0] < 2, sweep, begin)
    own = unit[:, None] * basis

    def aside(columns: Array) -> Array:
        return columns - matmul(own, matmul(own.T, columns))

    rest = down[:, None] * aside(aside(unit[:, None] * vectors))
    sizes = jnp.sqrt(jnp.sum(jnp.square(basis), 0))
    balanced = basis / jnp.where(sizes > 0, sizes, 1)[None, :]
    return jnp.where(kept[None, :], rest, off[:, jnp.argsort(order)]), combined(balanced, null)
