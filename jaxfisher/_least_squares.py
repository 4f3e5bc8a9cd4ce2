"""Damped least squares on scores: the solve for a right-hand side that is given by one number per row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._cholesky import Cholesky
from jaxfisher._linalg import in_another_rounding, norm
from jaxfisher._once import Static, once
from jaxfisher._operators.from_scores import FromScores
from jaxfisher._scores import Scores, one_a_row
from jaxfisher._system import SolveInfo
from jaxfisher._tree import all_finite, joined, split
from jaxfisher._values import check_nonnegative, is_known_zero, nonnegative


def least_squares(
    scores: Scores, e: Float[Array, " rows"], damping: float | Scalar, *, rtol: float = 1e-5
) -> tuple[Any, SolveInfo]:
    r"""The damped least-squares fit of one number per row by the scores.

    .. math:: x = \arg\min_x \sum_i \omega_i (s_i^T x - e_i)^2 + \lambda |x|^2 = (S^T \Omega S + \lambda I)^{-1} S^T \Omega\, e.

    It is ``(F + damping I)^-1 v`` for ``F = jf.fisher_from_scores(scores)`` and ``v = scores.rmv(scores.weights * e)``, but
    accurate where that solve cannot be. If there are fewer rows than parameters, it solves
    ``(X X^T + damping I) c = diag(omega)^(1/2) e`` with ``X = diag(omega)^(1/2) S``, and returns ``x = X^T c``. The vector
    ``v`` is never rounded; in the other solve, an error of ``v`` outside the span of the rows is divided by the damping.

    With ``e = -1`` it is the natural gradient of the mean negative log-likelihood; with centred scores and local energies the
    minimum-norm step of stochastic reconfiguration; with residuals and the scores of a residual the Levenberg-Marquardt step.

    Args:
        scores: the scores that `jaxfisher.scores` returns, held or in chunks, centred or not.
        e: one number for each row, shape ``[rows]``; for a row of weight zero it may be anything, NaN included.
        damping: a number above zero.
        rtol: the residual to reach, relative to ``v``: a Python number, 1e-3 for training, 0 for as far as rounding allows.

    Returns:
        ``(x, info)``: a pytree like the parameters, in the scores' dtype, and a `SolveInfo` whose residual is that of
        ``(F + damping I) x = v``. ``info.converged`` says that the damping is above eps times the largest ``omega_i |s_i|^2``,
        and that the residual, measured in two roundings, is at most the larger of ``rtol`` and the root of eps.

    Raises:
        TypeError: ``scores`` is not a `jaxfisher.Scores`, or ``rtol`` is no Python number.
        ValueError: ``e`` is not one real number per row; the damping is negative or zero (the minimum-norm fit without damping
            is ``jf.solve(jf.fisher_from_scores(scores), v, 0.0)``).

    Reference: Chen and Heyl, Empowering deep neural quantum states through efficient optimization (Nature Physics 2024),
    equation 6; Marquardt (SIAM Journal 1963), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> S = jf.scores(lambda theta, t: theta[0] + theta[1] * t)(jnp.zeros(2), jnp.array([0.0, 1.0, 2.0]))
    >>> line, info = jf.least_squares(S, jnp.array([1.0, 3.0, 5.0]), damping=1e-6)
    >>> print(line.round(3), info.converged)
    [1. 2.] True
    """
    e = one_a_row("least_squares", scores, e)
    check_nonnegative("damping", damping)
    if is_known_zero(damping, scores.spec.dtype):
        raise ValueError(
            f"least_squares: `damping` is {damping}; expected a number above zero. Without damping, the fit of minimum norm is "
            "jf.solve(jf.fisher_from_scores(scores), scores.rmv(scores.weights * e), 0.0)."
        )
    rtol = Cholesky(rtol).rtol
    dtype = scores.spec.dtype
    x, info = _fitted(FromScores(scores), e, nonnegative("damping", damping, dtype), Static(rtol))
    return joined(x), info


@once
def _fitted(form: FromScores, e: Float[Array, " rows"], damping: Scalar, rtol: Static[float]) -> tuple[Any, SolveInfo]:
    scores = form.scores
    e = scores._felt(e)
    x = form.solve_row_space(e, damping, rtol)

    def rest(fitted: Float[Array, " rows"]) -> Float[Array, " p"]:
        unfitted = split(scores.rmv(scores.weights * (e - fitted)))
        return scores.spec.ravel(jax.tree.map(lambda r, leaf: r - damping * leaf, unfitted, x), "rest")

    size = norm(scores.spec.ravel(scores.rmv(scores.weights * e), "v"))
    residual, other = (
        norm(rest(fitted)) / jnp.where(size > 0, size, 1) for fitted in (scores.mv(x), in_another_rounding(scores.mv, x))
    )
    finite = all_finite(x)
    eps = float(jnp.finfo(e.dtype).eps)
    enough = max(rtol.value, eps**0.5)
    # A smaller damping was replaced by one that the dtype can tell from zero, so it had no effect.
    felt = damping > eps * jnp.max(scores.weights * scores.squared_norms(), initial=0.0)
    converged = finite & felt & (residual <= enough) & (other <= 2 * enough)
    rank = jnp.asarray(scores.spec.size, jnp.int32)
    return x, SolveInfo(residual, jnp.zeros((), jnp.int32), converged, finite, rank, jnp.asarray(False))
