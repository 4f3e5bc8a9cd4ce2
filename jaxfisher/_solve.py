"""Solving: ``(F + damping I) x = v``, by the operator's own exact route or by a solver of one's choice."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import lineax

from jaxfisher._linalg import SolveInfo, norm
from jaxfisher._operators.base import Operator, as_operator, nonnegative
from jaxfisher._tree import all_finite, cast_like, described


class Solver(Protocol):
    """``solver(fisher, v, damping) -> (x, info)``."""

    def __call__(self, fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric) -> tuple[Any, SolveInfo]: ...


@dataclasses.dataclass(frozen=True)
class CG:
    """Conjugate gradients: for operators known by their products only.

    Attributes:
        rtol: stop when the residual is about ``rtol`` times ``|v|``, and steps about ``rtol`` times ``|x|`` (root mean
            squares).
        max_steps: give up after so many products; None means ten times the number of parameters.

    The answer is not exact: read ``info.converged`` and ``info.residual``. The right-hand side is normalised first, so the
    stopping rule does not depend on its scale. At zero damping F must not be singular. The iteration is lineax's.

    Reference: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems (1952).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.implicit_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> x, info = jf.solve(F, 2.5, damping=0.0, solver=jf.CG())
    >>> print(x, info.converged)
    2.0 True
    """

    rtol: float = 1e-5
    max_steps: int | None = None

    def __post_init__(self) -> None:
        nonnegative("rtol", self.rtol, jnp.float32)
        steps = self.max_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"`max_steps` is {described(steps)}; expected a whole number of at least one, or None.")

    def __call__(self, fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric) -> tuple[Any, SolveInfo]:
        spec = fisher.spec
        damping = nonnegative("damping", damping, spec.dtype)
        b = spec.ravel(v, "v")
        # In units of its root mean square, since lineax's test adds an absolute and a relative tolerance, entry by entry.
        size = norm(b) / spec.size**0.5
        size = jnp.where(size > 0, size, 1)
        product = fisher.linearised()

        def damped(x: Any) -> Any:
            return spec.ravel(product(spec.unravel(x)), "v") + damping * x

        operator = lineax.FunctionLinearOperator(
            damped, jax.ShapeDtypeStruct(b.shape, b.dtype), lineax.positive_semidefinite_tag
        )
        method = lineax.CG(rtol=self.rtol, atol=self.rtol, norm=_root_mean_square, max_steps=self.max_steps)
        solution = lineax.linear_solve(operator, b / size, method, throw=False)
        x = solution.value
        residual = norm(b / size - damped(x)) / jnp.maximum(norm(b / size), jnp.finfo(b.dtype).tiny)
        steps = jnp.asarray(solution.stats["num_steps"], jnp.int32)
        finite = all_finite(x)
        converged = (solution.result == lineax.RESULTS.successful) & finite
        info = SolveInfo(residual, steps, converged, finite, jnp.asarray(spec.size, jnp.int32))
        return cast_like(spec.unravel(x * size), v), info


def _root_mean_square(x: chex.ArrayTree) -> chex.Numeric:
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(x)])
    return norm(flat) / flat.size**0.5


def solve(fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric, solver: Solver | None = None) -> tuple[Any, SolveInfo]:
    r"""Solve ``(F + damping I) x = v`` and say how it went.

    Without a solver the operator takes its own cheapest exact route: elementwise for a diagonal, one p x p Cholesky factor for
    a matrix, and for scores the smaller of p x p and n x n (push-through). Cholesky is refined once; where it cannot be trusted
    (zero damping, or a damping below rounding) an eigendecomposition takes its place, and at zero damping a singular F gives
    the minimum-norm solution ``F^+ v``, its rank reported.

    Args:
        fisher: the operator.
        v: a pytree shaped like the parameters, for instance a gradient.
        damping: ``>= 0``, absolute, in the units of F; the same meaning in every form.
        solver: such as `CG`; None for the exact route.

    Returns:
        ``(x, info)``: ``x`` like ``v``, and a `SolveInfo` with residual, iterations, converged, finite and rank. Nothing is
        raised at run time: non-finite scores give a non-finite ``x`` and ``info.finite = False``.

    Raises:
        TypeError: ``fisher`` is not an operator, ``damping`` not one real number.
        ValueError: a negative ``damping``; ``v`` not shaped like the parameters (the first bad path is named); an exact route
            that would need a dense matrix for p above 4096.

    Reference: Martens (JMLR 2020), section 6; Ren and Goldfarb (arXiv 1906.02353), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> x, info = jf.solve(F, 2.5, damping=0.0)
    >>> print(f"{x:.4f}", info.rank)
    2.0000 1
    """
    fisher = as_operator(fisher, "solve")
    if solver is None:
        return fisher.solve_with_info(v, damping)
    if not callable(solver) or isinstance(solver, type):
        raise TypeError(f"`solver` is {solver!r}; expected None or a solver such as jf.CG(), with its brackets.")
    return solver(fisher, v, damping)


def as_lineax(fisher: Operator) -> lineax.AbstractLinearOperator:
    """The Fisher as a lineax operator tagged positive semi-definite, so that any lineax solver runs on it.

    Args:
        fisher: the operator; its vectors keep the parameters' structure, in the statistics dtype.

    Returns:
        A `lineax.FunctionLinearOperator`. Add damping with ``+ damping * lineax.IdentityLinearOperator(structure)``.

    Raises:
        TypeError: ``fisher`` is not an operator.

    Reference: Rader, Lyons and Kidger, Lineax: unified linear solves and linear least-squares in JAX and Equinox (2023).

    >>> import jax.numpy as jnp, jaxfisher as jf, lineax
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> print(lineax.linear_solve(jf.as_lineax(F), jnp.array(2.5), lineax.CG(rtol=1e-6, atol=1e-6)).value)
    2.0
    """
    fisher = as_operator(fisher, "as_lineax")
    structure = jax.eval_shape(fisher.spec.zeros)
    return lineax.FunctionLinearOperator(fisher.linearised(), structure, lineax.positive_semidefinite_tag)
