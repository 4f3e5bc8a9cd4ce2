r"""A damped system by one Cholesky factor, refined as far as is asked for: the solve of a training step.

The matrix ``M`` of ``(M + damping I) c = b`` is known with rounding errors; its product is known better, by way of what ``M``
is made of. With a damping above zero no eigenvectors are needed. Where the damping is below what rounding does to the diagonal,
the factor is that of a larger one, and refinement takes the difference back.

Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 10 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._linalg import cholesky, diagonals, matmul
from jaxfisher._varying import cond, linear_solve, while_loop

SWEEPS = 60
"""How often a solution is refined at most."""


class Damped(NamedTuple):
    """``(M + damping I) c = b`` with ``M c = into(out(c))``, of which ``x = out(c)`` is wanted.

    Attributes:
        matrix: ``M``, rounded; its upper triangle is read.
        damping: above zero.
        out: ``X^T`` where ``M = X X^T``; the identity where ``M = X^T X``.
        into: ``X``, or a product with ``X^T X``.
        of_root: whether ``out`` is ``X^T``. Residuals are then measured after a product with it: as ``|X^T rest| / |X^T b|``.
    """

    matrix: Float[Array, "m m"]
    damping: Scalar
    out: Callable[[Float[Array, " m"]], Any]
    into: Callable[[Any], Float[Array, " m"]]
    of_root: bool

    def image(self, c: Float[Array, " m"], x: Any) -> Float[Array, " m"]:
        """``(M + damping I) c`` where ``x = out(c)``."""
        return self.into(x) + self.damping * c


class _Sweep(NamedTuple):
    """Where conjugate gradients are.

    Attributes:
        c: the solution.
        x: its image under ``out``.
        rest: what is left of the right-hand side.
        ahead: the direction taken last.
        curvature: ``rest^T (solve rest)`` before that direction was taken.
        size: of the right-hand side.
        least: the smallest rest so far.
        idle: how often in a row no smaller rest was found.
        steps: how often a factor was applied.
        going: whether to go on.
    """

    c: Float[Array, " m"]
    x: Any
    rest: Float[Array, " m"]
    ahead: Float[Array, " m"]
    curvature: Scalar
    size: Scalar
    least: Scalar
    idle: Int[Array, ""]
    steps: Int[Array, ""]
    going: Bool[Array, ""]


def solution(system: Damped, b: Float[Array, " m"], rtol: float) -> Any:
    """``x`` whose residual is about ``rtol`` of ``b``, or what rounding leaves; unrefined where ``rtol`` is infinite.

    Corrections are conjugate gradients, preconditioned by the factor: one or two where it is near, more where rounding made the
    matrix another one.
    """
    factor = _factored(system)
    system = system._replace(damping=factor.damping)

    def once(b: Array) -> tuple[Array, Any]:
        c = factor.solve(b)
        return c, system.out(c)

    def iterate(b: Array) -> tuple[Array, Any]:
        def sweep(state: _Sweep) -> _Sweep:
            first = state.steps == 0
            change = factor.solve(state.rest)
            curvature = jnp.vdot(state.rest, change)
            ahead = change + curvature / state.curvature * state.ahead
            moved = system.out(ahead)
            size = jnp.where(first, jnp.maximum(factor.least(b), system.damping * _size(moved)), state.size)
            # A product is taken only where a first solution may be off by more than is asked for.
            enough = first & (factor.error(ahead) <= rtol * size)
            image = cond(enough, lambda: state.rest, lambda: system.image(ahead, moved))
            along = jnp.vdot(ahead, image)
            length = curvature / jnp.where(along != 0, along, 1)
            rest = state.rest - length * image
            left = factor.size(rest)
            idle = jnp.where(left < 0.9 * state.least, 0, state.idle + 1)
            # Directions are added to x as well: most of c may cancel in it, and so would what is small in c.
            return _Sweep(
                state.c + length * ahead,
                jax.tree.map(lambda x, by: x + length * by, state.x, moved),
                rest,
                ahead,
                curvature,
                size,
                jnp.minimum(left, state.least),
                idle,
                state.steps + 1,
                ~enough & (left > rtol * size) & (idle < 10) & (state.steps < SWEEPS),
            )

        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(system.out, b))
        zeros, infinite, none = jnp.zeros_like(b), jnp.full((), jnp.inf, b.dtype), jnp.zeros((), jnp.int32)
        start = _Sweep(zeros, nothing, b, zeros, infinite, infinite, infinite, none, none, jnp.asarray(True))
        end = while_loop(lambda state: state.going, sweep, start)
        return end.c, end.x

    product: Callable[[Array], Array] = lambda c: system.image(c, system.out(c))  # noqa: E731
    c, x = linear_solve(product, b, lambda _, b: once(b) if math.isinf(rtol) else iterate(b))
    return _with_derivatives_of(x, system.out(c))


class _Factor(NamedTuple):
    """One factor of a rounded matrix with its damping.

    Attributes:
        damping: that of the system. If it could not be told from the rounding of the matrix, what could be.
        solve: a solve by it.
        error: a bound on the size of what the first solution leaves.
        size: of a residual, or somewhat more.
        least: a lower bound on the size of a right-hand side, by what is known of it to rounding.
    """

    damping: Scalar
    solve: Callable[[Array], Array]
    error: Callable[[Array], Scalar]
    size: Callable[[Array], Scalar]
    least: Callable[[Array], Scalar]


def _factored(system: Damped) -> _Factor:
    matrix, count = system.matrix, system.matrix.shape[0]
    eps = float(jnp.finfo(matrix.dtype).eps)
    # The rounding errors of a matrix with a unit diagonal are about those of a random one.
    rounding = 4 * math.sqrt(count) * eps
    damped = jnp.maximum(matrix + system.damping, (1 + rounding) * matrix)
    # A row of zeros without a damping, as of a padded example, has any number for a pivot.
    damped = jnp.where(damped == 0, 1, damped)
    lower = cholesky(jnp.where(jnp.eye(count, dtype=bool), damped, matrix))
    empty = (diagonals(matrix[None])[0] == 0) & (system.damping == 0)
    entries = jnp.where(empty, 0, jnp.sum(jnp.square(lower), 1))
    counts = entries if system.of_root else jnp.ones_like(entries)
    raised = jnp.where(empty, 1, jnp.maximum(rounding * entries, system.damping))
    # Of right-hand sides in the null space of X^T nothing is wanted, but what a smaller damping divides cancels no more. There
    # is such a space where rows depend on each other, to rounding.
    dependent = jnp.any(~empty & (jnp.square(diagonals(lower[None])[0]) < 16 * rounding * entries))
    floor = jnp.where(dependent, eps * jnp.max(entries), 0)
    damping = jnp.maximum(system.damping, floor) if system.of_root else system.damping

    def solve(b: Array) -> Array:
        solved: Array = jax.scipy.linalg.cho_solve((lower, True), b)
        return solved

    def error(c: Array) -> Scalar:
        """From the rounding of the matrix and of ``out``, and from what the diagonal was raised by."""
        rounded = 2 * eps * jnp.sqrt(jnp.vdot(counts, entries) * jnp.vdot(entries, c * c))
        return rounded + jnp.vdot(jnp.sqrt(counts) * (raised - damping), jnp.abs(c))

    def size(rest: Array) -> Scalar:
        return jnp.linalg.norm(matmul(rest, lower) if system.of_root else rest)

    def least(b: Array) -> Scalar:
        """``|X^T b|^2 = b^T M b``, where that is more than its rounding error."""
        if not system.of_root:
            return jnp.linalg.norm(b)
        known = jnp.square(size(b)) - jnp.vdot((raised + 4 * rounding * entries) * b, b)
        return jnp.sqrt(jnp.maximum(known, 0))

    return _Factor(damping, solve, error, size, least)


def _size(x: Any) -> Scalar:
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(x)))


@jax.custom_jvp
def _with_derivatives_of(x: Any, same: Any) -> Any:
    """``x``, with the derivatives of ``same``: the same but for rounding, and not computed where no derivative is taken."""
    return x


@_with_derivatives_of.defjvp
def _with_derivatives_of_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return primals[0], tangents[1]
