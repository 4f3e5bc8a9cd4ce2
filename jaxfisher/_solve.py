"""Solving ``(F + damping I) x = v``: by the operator's own exact route, by conjugate gradients or by LSMR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine import unsealed
from jaxfisher._linalg import in_another_rounding, inverse_power, norm, power_or_one, square_root, to_unit
from jaxfisher._once import once
from jaxfisher._operators.damping import (
    Damping,
    Dampings,
    check_one_damping,
    checked_damping,
    damped_inverse,
    entries_of,
)
from jaxfisher._operators.operator import Operator, Solver, View, as_operator, exact_solve, scores_of
from jaxfisher._pytree import array_fields
from jaxfisher._scores import Scores, one_a_row
from jaxfisher._system import SolveInfo
from jaxfisher._tree import ParamSpec, all_finite, cast_like, described, joined
from jaxfisher._values import check_nonnegative, is_known_zero, nonnegative, whole
from jaxfisher._varying import alike, cond, linear_solve, varying_axes, while_loop


@array_fields("preconditioner", "start")
class CG:
    r"""Preconditioned conjugate gradients: for operators known by their products only.

    Attributes:
        rtol: stop when ``|v - (F + damping I) x| <= rtol |v|``. Before that is believed, the residual is recomputed from ``x``,
            and once more with different rounding.
        max_steps: give up after this many products; None means ten times the number of parameters.
        preconditioner: an operator near F that is cheap to solve with, such as ``jf.kronecker(F)`` or ``jf.nystrom(F, key,
            50)``, or a view that makes one from F, such as ``jf.kronecker``. It is inverted once, with the same damping.
        start: a first guess of ``x``, such as the last step's solution; None for zero.

    The answer is not exact: read ``info.converged`` and ``info.residual``. The stopping rule does not depend on the scale of
    ``v`` or of F. If the iteration meets a direction along which ``F + damping I`` is negative, as the Hessian behind
    `observed_information` may be, it stops there, returns its current solution and sets ``info.indefinite``. The solver is a
    pytree, so it crosses ``jit`` as an argument.

    Reference: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems (1952); Martens, Deep learning
    via Hessian-free optimization (ICML 2010), section 4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.implicit_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> x, info = jf.solve(F, 2.5, damping=0.0, solver=jf.CG())
    >>> print(x, info.converged)
    2.0 True
    """

    rtol: float = 1e-5
    max_steps: int | None = None
    preconditioner: Operator | View | None = None
    start: Any = None

    def __post_init__(self) -> None:
        _check_rule(self.rtol, self.max_steps)
        if self.preconditioner is None or isinstance(self.preconditioner, Operator | jax.tree_util.Partial):
            return
        if callable(self.preconditioner):
            # As a `Partial`, the function crosses ``jit`` as part of a pytree.
            object.__setattr__(self, "preconditioner", jax.tree_util.Partial(self.preconditioner))
        elif isinstance(self.preconditioner, str) or not jax.tree_util.all_leaves([self.preconditioner]):
            as_operator(self.preconditioner, "CG: `preconditioner`")

    def __call__(self, fisher: Operator, v: chex.ArrayTree, damping: Damping) -> tuple[Any, SolveInfo]:
        near = self.preconditioner
        if near is not None:
            # Call the view outside the compiled program: it is the user's function, and may be a new object at each call.
            near = as_operator(near(fisher) if callable(near) else near, "CG: `preconditioner`")
            fisher.spec.check_same(near.spec, f"CG: cannot precondition {fisher} with `preconditioner`, {near}")
        x, info = dataclasses.replace(self, preconditioner=near)._solution(
            fisher, fisher.spec.vector(v), checked_damping(damping, fisher.spec)
        )
        return cast_like(x, v), info

    @once
    def _solution(self, fisher: Operator, v: Any, known: Dampings) -> tuple[Any, SolveInfo]:
        self, fisher, v, known = alike(self, fisher, v, known)
        spec = fisher.spec
        b = spec.ravel(v, "v")
        size = power_or_one(norm(b))
        exact = _damped(fisher, known)
        # Products with F may overflow or underflow, so the iteration solves (s F s) y = b / |b|, and x = |b| s^2 y.
        s = to_unit(_root_size(fisher.spec, exact), jnp.sqrt(jnp.max(entries_of(known, fisher.spec))))
        product: Callable[[Array], Array] = lambda y: s * exact(s * y)  # noqa: E731
        to_x: Callable[[Array], Array] = lambda y: y * s * size * s  # noqa: E731
        up, shorter = inverse_power(s), inverse_power(size)
        to_y: Callable[[Array], Array] = lambda x: x * up * shorter * up  # noqa: E731
        start = None if self.start is None else to_y(spec.ravel(self.start, "start"))
        precondition: Callable[[Array], Array] = lambda r: r  # noqa: E731
        if isinstance(self.preconditioner, Operator):
            inverse = damped_inverse(self.preconditioner.form, known)
            precondition = lambda r: spec.ravel(inverse(spec.unravel(r * up)).x, "r") * up  # noqa: E731
        most = 10 * spec.size if self.max_steps is None else self.max_steps

        def settled(y: Array) -> Array:
            # Drop from y what underflows on the way to x.
            return to_y(to_x(y))

        def iterate(product: Callable[[Array], Array], b: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
            end = _conjugate_gradients(product, precondition, settled, b, start, self.rtol, most)
            again = b - in_another_rounding(product, settled(end.x))
            return end.x, (end.r, again, end.steps, end.indefinite)

        # Differentiate the solution implicitly, not the iteration.
        y, (rest, again, steps, indefinite) = linear_solve(product, b * shorter, iterate)
        length = norm(b * shorter)
        residual, other = (norm(r) / jnp.where(length > 0, length, 1) for r in (rest, again))
        # With numbers that are not finite the iteration stops with its last solution, which may look like an answer.
        x = to_x(jnp.where(jnp.isfinite(residual), y, jnp.nan))
        finite = all_finite(x)
        converged = finite & (residual <= self.rtol) & (other <= 2 * self.rtol) & ~indefinite
        info = SolveInfo(residual, steps, converged, finite, jnp.asarray(spec.size, jnp.int32), indefinite)
        return spec.unravel(x), info


def _check_rule(rtol: float, max_steps: int | None) -> None:
    check_nonnegative("rtol", rtol)
    if max_steps is not None and (whole(max_steps) or 0) < 1:
        raise ValueError(f"`max_steps` is {described(max_steps)}; expected a whole number of at least one, or None.")


def _damped(fisher: Operator, damping: Dampings) -> Callable[[Float[Array, " p"]], Float[Array, " p"]]:
    """``x -> (F + damping I) x`` on flat vectors."""
    spec, product, entries = fisher.spec, fisher.form.product(), entries_of(damping, fisher.spec)
    return lambda x: spec.ravel(product(spec.unravel(x)), "x") + entries * x


def _root_size(spec: ParamSpec, product: Callable[[Float[Array, " p"]], Float[Array, " p"]]) -> Scalar:
    """The order of magnitude of the root of an operator's largest eigenvalue, from its product; zero if unknown."""
    # The vector is so small that the product is finite even if F itself overflows.
    small = 2.0**-40
    trial = jnp.cos(jnp.arange(spec.size, dtype=spec.dtype)) * (small / spec.size**0.5)
    return jnp.sqrt(norm(product(trial))) * small**-0.5


RESTARTS = 3
"""How often the iteration restarts from the true residual after its recursion wrongly reported convergence."""


class _State(NamedTuple):
    """The state of conjugate gradients: solution, residual and its size, direction, ``r^T M r`` of the step before.

    ``best`` is the solution with the smallest residual so far, and ``least`` is the size of that residual.
    """

    x: Array
    r: Array
    size: Array
    p: Array
    rz: Array
    best: Array
    least: Array
    steps: Array
    restarts: Array
    going: Array
    indefinite: Array


def _conjugate_gradients(
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    settled: Callable[[Array], Array],
    b: Float[Array, " p"],
    start: Float[Array, " p"] | None,
    rtol: float,
    most: int,
) -> _State:
    """The final state of the iteration. Its residual is ``b - product(settled(x))``, not the one of the recursion.

    If part of ``b`` lies outside the range of the product, the iteration comes near and then drifts off along the null space;
    it then returns the best solution that it had.
    """
    # Not lineax's CG, which tests step and residual together to stop, and does not report negative curvature.
    target, eps = rtol * norm(b), jnp.finfo(b.dtype).eps

    def step(state: _State) -> _State:
        z = precondition(state.r)
        rz = jnp.vdot(state.r, z)
        # `rz` is zero before the first step and after a restart, where the old directions are not conjugate to the residual.
        share = jnp.where(state.rz != 0, rz / jnp.where(state.rz != 0, state.rz, 1), 0)
        p = z + share * state.p
        q = product(p)
        curvature = jnp.vdot(p, q)
        # Without positive curvature there is nothing more to gain.
        forward = curvature > 0
        length = jnp.where(forward, rz / jnp.where(forward, curvature, 1), 0)
        x, r = state.x + length * p, state.r - length * q
        size = norm(r)
        best, least = jnp.where(size < state.least, x, state.best), jnp.minimum(size, state.least)
        # The residual of a sound iteration never oscillates by so much: it has gone off along the null space.
        gone = eps**0.75 * size > least
        x = jnp.where(gone, best, x)
        arrived, last = size <= target, (state.steps + 1 >= most) | ~forward | gone
        r = cond(arrived | last, lambda: b - product(settled(x)), lambda: r)
        size = norm(r)
        again = arrived & (size > target)
        restarts = state.restarts + again.astype(jnp.int32)
        going = (size > target) & ~last & (restarts < RESTARTS)
        indefinite = curvature < -10 * eps * norm(p) * norm(q)
        rz = jnp.where(again, 0, rz)
        return _State(x, r, size, p, rz, best, least, state.steps + 1, restarts, going, indefinite)

    x, r = (jnp.zeros_like(b), b) if start is None else (start, b - product(start))
    zero, size = jnp.zeros((), jnp.int32), norm(r)
    begin = _State(
        x, r, size, jnp.zeros_like(b), jnp.zeros((), b.dtype), x, size, zero, zero, size > target, jnp.asarray(False)
    )
    return while_loop(lambda state: state.going, step, begin)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LSMR:
    r"""Damped least squares on scores, where ``F = X^T X`` is never used, only ``X`` and ``X^T``.

    .. math:: \min_x \sum_i \omega_i (s_i^T x - e_i)^2 + \lambda |x|^2.

    Its solution is ``(F + \lambda I)^{-1} S^T diag(omega) e``. It converges with the condition number of ``X``, the square root
    of that of F, and keeps the digits that squaring would lose.

    Attributes:
        rtol: the tolerance of the tests of residual and gradient, relative to the sizes of X and of the right-hand side.
        max_steps: give up after this many steps; None means ten times the smaller of rows and parameters.

    ``info.converged`` says that one of the tests was met, and that the recomputed residual of the solution is at most
    ``100 rtol`` or the root of the dtype's eps. Both are relative to ``v``, which may be small beside its terms.

    As a solver of `jaxfisher.solve` it takes any ``v``, with a damping above zero. If ``v = S^T diag(omega) e`` with a known
    ``e``, as for the gradient of a mean of log-densities (``e`` is one everywhere), `least_squares` is more accurate. The
    iteration is lineax's, on ``X`` with ``sqrt(damping) I`` stacked below it.

    Reference: Fong and Saunders, LSMR: an iterative algorithm for sparse least-squares problems (SIAM J. Sci. Comput. 2011).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> x, info = jf.solve(F, 2.5, damping=1.25, solver=jf.LSMR())
    >>> print(f"{x:.4f}", info.converged)
    1.0000 True
    """

    rtol: float = 1e-7
    max_steps: int | None = None

    def __post_init__(self) -> None:
        _check_rule(self.rtol, self.max_steps)

    def __call__(self, fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric) -> tuple[Any, SolveInfo]:
        if is_known_zero(damping, fisher.spec.dtype):
            raise ValueError(
                f"LSMR: `damping` is {damping}, and then the right-hand side must be given by its coordinates in the scores: "
                "jf.LSMR().least_squares(scores, e, damping=0.0)."
            )
        check_one_damping(damping, fisher.spec, "LSMR")
        strength = nonnegative("damping", damping, fisher.spec.dtype)
        x, info = self._solution(fisher, fisher.spec.vector(v), strength)
        return cast_like(x, v), info

    @once
    def _solution(self, fisher: Operator, v: Any, strength: Scalar) -> tuple[Any, SolveInfo]:
        scores, right = scores_of(fisher, "LSMR"), fisher.spec.ravel(v, "v")
        # A power of two, since XLA would divide by the product of a size and the root of the damping, which may underflow.
        size = power_or_one(norm(right))
        shorter = inverse_power(size)
        # v = X^T 0 + sqrt(damping) (v / sqrt(damping))
        below = fisher.spec.unravel(right * shorter / jnp.sqrt(strength))
        x, steps, stopped = self._run(scores, jnp.zeros(scores.num_rows, fisher.spec.dtype), below, strength)
        x = fisher.spec.ravel(x, "x") * size
        exact, y, b = _damped(fisher, strength), x * shorter, right * shorter
        length = norm(b)
        rest, again = ((b - image) / jnp.where(length > 0, length, 1) for image in (exact(y), in_another_rounding(exact, y)))
        # The two residuals differ by rounding, and the true residual differs from each by about as much.
        info = self._info(x, norm(rest), steps, stopped & (norm(rest) + 4 * norm(rest - again) <= self._promise(x.dtype)))
        return fisher.spec.unravel(x), info

    def least_squares(self, scores: Scores, e: Float[Array, " rows"], damping: chex.Numeric) -> tuple[Any, SolveInfo]:
        """``(F + damping I)^-1 S^T diag(omega) e`` and a report, whose residual is that of this right-hand side.

        Arguments and errors are those of `jaxfisher.least_squares`, except that the damping may be zero.
        """
        e = one_a_row("LSMR.least_squares", scores, e)
        x, info = self._least_squares(scores, e, nonnegative("damping", damping, scores.spec.dtype))
        return joined(x), info

    @once
    def _least_squares(self, scores: Scores, e: Float[Array, " rows"], strength: Scalar) -> tuple[Any, SolveInfo]:
        spec = scores.spec
        root = square_root(scores.weights)
        e = root * jnp.where(scores.weights == 0, 0, e)  # a row of padding may hold any number, or NaN
        x, steps, stopped = self._run(scores, e, spec.zeros(), strength)
        right = spec.ravel(scores.rmv(root * e), "v")
        left = spec.ravel(scores.rmv(scores.weights * scores.mv(x)), "x") + strength * spec.ravel(x, "x")
        size = norm(right)
        residual = norm(right - left) / jnp.where(size > 0, size, 1)
        return x, self._info(spec.ravel(x, "x"), residual, steps, stopped)

    def _run(self, scores: Scores, above: Array, below: Any, damping: Scalar) -> tuple[Any, Array, Array]:
        """The solution, the number of steps, and whether one of lineax's tests stopped the iteration."""
        # Lineax 0.1.1 starts its iteration in the default dtype, so float32 vectors must be widened if float64 is enabled.
        wide, narrow = jnp.result_type(float), scores.spec.dtype
        if varying_axes(scores):
            raise NotImplementedError(
                "LSMR inside jax.shard_map: lineax's loops do not run on data that vary over devices. "
                "Use jf.CG() or the exact solve, or give shard_map check_vma=False."
            )
        root, strength = square_root(scores.weights), jnp.sqrt(damping)
        # Lineax's tests are only in part relative to the right-hand side, so scale it and the operator to unit size.
        size = norm(jnp.concatenate([above, scores.spec.ravel(below, "below")]))
        size = jnp.where(size > 0, size, 1)
        unit = to_unit(scores.bound(), strength)

        def stacked(x: Any) -> tuple[Array, Any]:
            x = jax.tree.map(lambda leaf: unit * leaf, _as_type(x, narrow))
            return _as_type((root * scores.product(x, unsealed), jax.tree.map(lambda leaf: strength * leaf, x)), wide)

        structure = jax.eval_shape(lambda: _as_type(scores.spec.zeros(), wide))
        operator = lineax.FunctionLinearOperator(stacked, structure)
        # Set no limit on the condition number: the user's damping bounds it.
        method = lineax.LSMR(rtol=self.rtol, atol=self.rtol, max_steps=self.max_steps, conlim=float("inf"))
        right = jax.tree.map(lambda leaf: leaf / size, (above, below))
        solution = lineax.linear_solve(operator, _as_type(right, wide), method, throw=False)
        x = jax.tree.map(lambda leaf: leaf * unit * size, _as_type(solution.value, narrow))
        return x, jnp.asarray(solution.stats["num_steps"], jnp.int32), solution.result == lineax.RESULTS.successful

    def _promise(self, dtype: Any) -> float:
        return max(100 * self.rtol, float(jnp.finfo(dtype).eps) ** 0.5)

    def _info(self, x: Array, residual: Scalar, steps: Array, stopped: Array) -> SolveInfo:
        finite = all_finite(x)
        converged = stopped & finite & (residual <= self._promise(x.dtype))
        return SolveInfo(residual, steps, converged, finite, jnp.asarray(x.size, jnp.int32), jnp.asarray(False))


def _as_type(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def solve(fisher: Operator, v: chex.ArrayTree, damping: Damping, solver: Solver | None = None) -> tuple[Any, SolveInfo]:
    r"""Solve ``(F + damping I) x = v``, with a report on the solution.

    Without a solver the operator takes its own cheapest exact route: elementwise for a diagonal, the factors' eigenvectors for
    a Kronecker product, one p x p Cholesky factor for a matrix, and for scores the smaller of p x p and n x n (push-through).
    Solutions are refined against F. Where Cholesky cannot be trusted an eigendecomposition takes its place, and at zero damping
    a singular F gives the minimum-norm solution ``F^+ v`` and reports its rank. The rank is decided with F scaled to a unit
    diagonal, so it does not depend on the units of the parameters.

    Args:
        fisher: the operator.
        v: a pytree shaped like the parameters, for instance a gradient.
        damping: ``>= 0``, absolute, in the units of F; the same meaning in every form. Or a pytree like the parameters with one
            number above zero for each leaf; see also `relative_damping`. With a Python number above zero no eigendecomposition
            is compiled; if F is singular, a number below eps times its largest diagonal entry counts as the least one that can
            be told from zero (see `Cholesky`).
        solver: a solver such as `CG`, `LSMR` or `factored_solve`; None for the exact route.

    Returns:
        ``(x, info)``: ``x`` like ``v``, and a `SolveInfo` with residual, iterations, converged, finite and rank. Nothing is
        raised at run time: non-finite scores give a non-finite ``x`` and ``info.finite = False``.

    Raises:
        TypeError: ``fisher`` is not an operator; ``damping`` is not of real numbers, or has another structure.
        ValueError: a negative ``damping``; ``v`` not shaped like the parameters (the message names the first bad path); an
            exact route that would need a dense matrix for p above 4096.

    Reference: Martens (JMLR 2020), section 6; Ren and Goldfarb (arXiv 1906.02353), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> x, info = jf.solve(F, 2.5, damping=0.0)
    >>> print(f"{x:.4f}", info.rank)
    2.0000 1
    """
    fisher = as_operator(fisher, "solve")
    check_solver(solver)
    return exact_solve(fisher, v, damping) if solver is None else solver(fisher, v, damping)


def check_solver(solver: Any) -> None:
    """Raise `TypeError` unless ``solver`` is None or a solver."""
    if solver is not None and (not callable(solver) or isinstance(solver, type)):
        raise TypeError(f"`solver` is {solver!r}; expected None or a solver such as jf.CG(), with its brackets.")


def as_lineax(fisher: Operator) -> lineax.AbstractLinearOperator:
    """The Fisher as a lineax operator tagged positive semi-definite, so that any lineax solver runs on it.

    Args:
        fisher: the operator; its vectors keep the parameters' structure, in the statistics dtype.

    Returns:
        A `lineax.FunctionLinearOperator`. Add damping to the Fisher, with ``jf.as_lineax(F + jf.scaled_identity(F, damping))``.
        The sum with a multiple of lineax's identity has lost the tag, and ``lineax.CG`` and ``lineax.Cholesky`` refuse it.

    Raises:
        TypeError: ``fisher`` is not an operator, or is one over complex parameters. Such an operator is linear in their real
            and imaginary parts, and not in complex numbers as lineax's solvers assume: use
            ``jf.solve(F, v, damping, jf.CG())``.

    Reference: Rader, Lyons and Kidger, Lineax: unified linear solves and linear least-squares in JAX and Equinox (2023).

    >>> import jax.numpy as jnp, jaxfisher as jf, lineax
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> print(lineax.linear_solve(jf.as_lineax(F), jnp.array(2.5), lineax.CG(rtol=1e-6, atol=1e-6)).value)
    2.0
    >>> damped = jf.as_lineax(F + jf.scaled_identity(F, 1.25))
    >>> print(lineax.linear_solve(damped, jnp.array(2.5), lineax.CG(rtol=1e-6, atol=1e-6)).value)
    1.0
    """
    fisher = as_operator(fisher, "as_lineax")
    structure = jax.eval_shape(fisher.spec.zeros)
    if len(jax.tree.leaves(joined(fisher.spec.zeros()))) < len(jax.tree.leaves(structure)):
        raise TypeError(
            f"as_lineax: {fisher} is over complex parameters, each two real numbers; expected real ones, since lineax's "
            "solvers assume that an operator is linear in complex numbers. Solve with jf.solve(F, v, damping, jf.CG())."
        )
    return lineax.FunctionLinearOperator(fisher.form.product(), structure, lineax.positive_semidefinite_tag)
