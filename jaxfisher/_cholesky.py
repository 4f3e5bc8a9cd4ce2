"""Solves with a Fisher held as scores by one triangular factor, as accurate as the caller asks."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax

from jaxfisher._damped import by_cholesky
from jaxfisher._operators.damping import Damping, check_one_damping, is_one_damping
from jaxfisher._operators.operator import Operator, Solver, exact_solve, scores_of
from jaxfisher._solve import solve
from jaxfisher._system import SolveInfo
from jaxfisher._values import check_nonnegative, described, is_known_zero, is_number


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Cholesky:
    r"""Solve by one Cholesky factor of the smaller of ``S S^T`` and ``S^T S``, refined against the scores to ``rtol``.

    .. math:: x = (S^T \Omega S + \lambda I)^{-1} v, \qquad |v - (S^T \Omega S + \lambda I) x| \le \mathrm{rtol}\, |v|.

    It is the exact route of `jaxfisher.solve` for scores and a damping above zero, with the accuracy chosen by the caller. The
    factor is that of the rounded matrix. Conjugate gradients with the scores themselves, preconditioned by the factor, correct
    the rounding errors. No eigenvectors are computed, so the program is small and compiles fast.

    Attributes:
        rtol: the residual to reach, relative to ``v``: 1e-3 serves training, 1e-5 a standard error, 0 is as far as rounding
            allows.

    As a solver of `jaxfisher.solve` it takes one damping, which must be above zero; an array that holds zero counts as a
    damping that cannot be told from zero. ``info.converged`` is measured as for the exact route (see `SolveInfo`), and allows a
    residual of ``rtol`` if that is more than the root of eps. A damping of at most eps times the largest diagonal entry cannot
    be told from zero. With such a damping and fewer rows than parameters, directions outside the rows' span are left out, and
    the answer is not called converged. With at least as many rows it is called converged if every pivot, of F scaled to a unit
    diagonal, is above half the root of eps, and a further correction would be as small as `SolveInfo` says.

    Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 10 and 12.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> x, info = jf.solve(F, 2.5, damping=1.25, solver=jf.Cholesky(rtol=1e-3))
    >>> print(f"{x:.4f}", info.converged)
    1.0000 True
    """

    rtol: float = 1e-5

    def __post_init__(self) -> None:
        if not is_number(self.rtol) or isinstance(self.rtol, jax.Array):
            raise TypeError(f"Cholesky: `rtol` is {described(self.rtol)}; expected a Python number of at least zero.")
        check_nonnegative("rtol", self.rtol)
        # The value is part of the key of cached programs.
        object.__setattr__(self, "rtol", float(self.rtol))

    def __call__(self, fisher: Operator, v: chex.ArrayTree, damping: Damping) -> tuple[Any, SolveInfo]:
        scores_of(fisher, "Cholesky")
        check_one_damping(damping, fisher.spec, "Cholesky")
        check_nonnegative("damping", damping)
        if is_known_zero(damping, fisher.spec.dtype):
            raise ValueError(
                f"Cholesky: `damping` is {damping}, and without damping there may be no factor. Give a number above zero, or "
                "leave the solver out: jf.solve(F, v, 0.0) is the minimum-norm solution."
            )
        return exact_solve(fisher, v, damping, by_cholesky(self.rtol))


TRAINING = Cholesky(rtol=1e-3)
"""The solver that is as accurate as training needs."""


def training_solve(
    fisher: Operator, v: chex.ArrayTree, damping: Damping, solver: Solver | None = None
) -> tuple[Any, SolveInfo]:
    """`jaxfisher.solve`, but without a solver a Fisher held as scores is solved only as accurately as training needs."""
    one = is_one_damping(damping, fisher.spec) and not is_known_zero(damping, fisher.spec.dtype)
    if solver is None and one and fisher.form.as_scores() is not None:
        solver = TRAINING
    return solve(fisher, v, damping, solver)
