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
        fisher: an operator; of those held as a matrix or as scores, the smaller matrix is decomposed once. Solutions are found
            together, eight at once at most, and refined against F itself where they need it. One that does not converge, as
            without a damping that the dtype can tell from zero, is found as `jaxfisher.solve` does, by itself.
        v: a pytree shaped like the parameters.
        dampings: shape ``[k]``, each ``>= 0``. With one that is only known at run time to be negative the solution is NaN.

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
            f"solve_path: `dampings` is {described(dampings)}; expected an array of real numbers along one axis. Pass such as "
            "jnp.array([1e-3, 1e-2])."
        )
    dampings = nonnegative_entries("solve_path: `dampings`", dampings, fisher.spec.dtype)
    x, info = _path(fisher, fisher.spec.vector(v), dampings)
    return cast_like(x, v), info


@once
def _path(fisher: Operator, v: Any, dampings: Float[Array, " k"]) -> tuple[Any, SolveInfo]:
    # One that turned out negative, which is NaN, leaves the others as they are.
    largest = jnp.max(dampings, initial=0.0, where=dampings >= 0)
    spec, inverses = fisher.spec, fisher.form.inverses(largest, PATH)
    together = _in_pieces(lambda damping: reported(spec, inverses(damping), v), dampings, fisher.form.at_once)

    def checked(damping: Scalar, found: tuple[Any, SolveInfo]) -> tuple[Any, SolveInfo]:
        # As by itself: without a damping that can be told, or with one at the rounding of F.
        return cond(found[1].converged, lambda: found, lambda: reported(spec, fisher.form.inverse(damping), v))

    # In a map whose passes have nothing to do, every solution would be copied twice.
    enough = jnp.all(together[1].converged)
    return cond(enough, lambda: together, lambda: jax.lax.map(lambda each: checked(*each), (dampings, together)))


def _in_pieces(solve_at: Callable[[Scalar], Any], dampings: Float[Array, " k"], most: int) -> Any:
    """``jax.vmap(solve_at)(dampings)``, in pieces of equal sizes, the last of them filled up."""
    pieces = -(-dampings.size // most)
    if pieces <= 1:
        return jax.vmap(solve_at)(dampings)
    filled = jnp.resize(dampings, (pieces, -(-dampings.size // pieces)))
    found = jax.lax.map(jax.vmap(solve_at), filled)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: dampings.size], found)
