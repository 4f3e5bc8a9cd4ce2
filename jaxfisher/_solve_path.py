"""Solves of one system at many dampings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._once import once
from jaxfisher._operators.inverted import reported
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._path import PATH
from jaxfisher._system import SolveInfo
from jaxfisher._tree import cast_like, described, dtype_of
from jaxfisher._values import check_array, is_array, nonnegative_entries
from jaxfisher._varying import cond


def solve_path(fisher: Operator, v: chex.ArrayTree, dampings: Float[Array, " k"]) -> tuple[Any, SolveInfo]:
    r"""Solve ``(F + damping I) x = v`` for many dampings from one eigendecomposition.

    Args:
        fisher: an operator. If it is held as a matrix or as scores, the smaller matrix is decomposed once. Solutions are
            computed together, at most eight at once, and refined against F itself if they need it. A solution that does not
            converge, as with a damping that the dtype cannot tell from zero, is computed again by itself, as
            `jaxfisher.solve` does.
        v: a pytree shaped like the parameters.
        dampings: shape ``[k]``, each ``>= 0``. For one that is only known at run time to be negative, the solution is NaN.

    Returns:
        ``(x, info)``, both with a leading axis of ``k``.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``dampings`` is not one axis of real numbers, or known to hold a negative one; as in `jaxfisher.solve`.

    Reference: Golub and Van Loan, Matrix Computations (2013), section 6.1.4 (ridge regression by the singular values).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> print(jf.solve_path(F, 2.5, jnp.array([0.0, 1.25]))[0].round(4))
    [2. 1.]
    """
    fisher = as_operator(fisher, "solve_path")
    check_array("solve_path: `dampings`", dampings)
    if not is_array(dampings) or jnp.ndim(dampings) != 1 or not jnp.issubdtype(dtype_of(dampings), jnp.floating):
        raise ValueError(
            f"solve_path: `dampings` is {described(dampings)}; expected an array of real numbers along one axis. Pass one such "
            "as jnp.array([1e-3, 1e-2])."
        )
    dampings = nonnegative_entries("solve_path: `dampings`", dampings, fisher.spec.dtype)
    x, info = _path(fisher, fisher.spec.vector(v), dampings)
    return cast_like(x, v), info


@once
def _path(fisher: Operator, v: Any, dampings: Float[Array, " k"]) -> tuple[Any, SolveInfo]:
    # A damping that turned out negative is NaN; leave it out of the maximum, so that it does not spoil the others.
    largest = jnp.max(dampings, initial=0.0, where=dampings >= 0)
    spec, inverses = fisher.spec, fisher.form.inverses(largest, PATH)
    together = _in_pieces(lambda damping: reported(spec, inverses(damping), v), dampings, fisher.form.at_once)

    def checked(damping: Scalar, found: tuple[Any, SolveInfo]) -> tuple[Any, SolveInfo]:
        # The damping cannot be told from zero, or is at the rounding error of F: solve by itself.
        return cond(found[1].converged, lambda: found, lambda: reported(spec, fisher.form.inverse(damping), v))

    # Skip the map if all converged: even with nothing to do, it would copy every solution twice.
    enough = jnp.all(together[1].converged)
    return cond(enough, lambda: together, lambda: jax.lax.map(lambda each: checked(*each), (dampings, together)))


def _in_pieces(solve_at: Callable[[Scalar], Any], dampings: Float[Array, " k"], most: int) -> Any:
    """``jax.vmap(solve_at)(dampings)`` in chunks of equal size, the last one padded."""
    pieces = -(-dampings.size // most)
    if pieces <= 1:
        return jax.vmap(solve_at)(dampings)
    filled = jnp.resize(dampings, (pieces, -(-dampings.size // pieces)))
    found = jax.lax.map(jax.vmap(solve_at), filled)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: dampings.size], found)
