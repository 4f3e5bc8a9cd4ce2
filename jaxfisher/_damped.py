r"""Solving a damped system by one Cholesky factor, refined as far as the caller asks: for training steps and known dampings.

The matrix ``M`` of ``(M + damping I) c = b`` has rounding errors; products with it can be computed more accurately, from the
scores that ``M`` is made of. With a damping above zero no eigenvectors are needed. If the damping is below the rounding error
of the diagonal, the factor is computed with a larger damping, and refinement corrects the difference. Refinement is by
conjugate gradients, preconditioned by the factor: one or two steps if the factor is close, more if rounding changed the matrix.

References: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 10 and 12; Saad, Iterative Methods for
Sparse Linear Systems (2003), algorithm 9.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._inverse import LeavingNothingOut, Map
from jaxfisher._linalg import (
    cholesky,
    diagonals,
    in_another_rounding,
    inverse_power,
    matmul,
    norm,
    power_or_one,
    twice,
    unit_diagonal,
)
from jaxfisher._system import Factorise, Solved, System, scaled, with_derivatives_of
from jaxfisher._tree import HIGHEST
from jaxfisher._varying import alike, cond, linear_solve, varying_through, while_loop

SWEEPS = 60
"""The most refinement steps of a solution."""
EMPTY = 2.0**100
"""The pivot given to a row of zeros. No other pivot is as large, since the largest score is near one."""


class _State(NamedTuple):
    """The state of conjugate gradients.

    Attributes:
        found: the solution, and whatever else the caller accumulates along its directions.
        rest: the residual.
        ahead: the last direction.
        curvature: ``rest^T (solve rest)`` for the residual that this direction was made from.
        left: the size of the residual.
        target: the size at which to stop.
        least: the smallest size so far.
        idle: for how many steps in a row no smaller size was found.
        sweeps: the number of steps taken.
    """

    found: Any
    rest: Float[Array, " m"]
    ahead: Float[Array, " m"]
    curvature: Scalar
    left: Scalar
    target: Scalar
    least: Scalar
    idle: Int[Array, ""]
    sweeps: Int[Array, ""]


def _begin(b: Float[Array, " m"], found: Any, target: Scalar) -> _State:
    """The first state, with a solution of zero in the shape of ``found``."""
    # Make the zeros depend on a late value: XLA would allocate constant zeros first of all, and hold them at peak memory.
    late = jnp.minimum(target, 0)
    zero = jax.tree.map(lambda leaf: jax.lax.broadcast(late, leaf.shape), found)
    infinite, none = jnp.full((), jnp.inf, b.dtype), jnp.zeros((), jnp.int32)
    return _State(zero, b, jnp.zeros_like(b), infinite, infinite, target, infinite, none, none)


def _turned(solve: Map, state: _State) -> _State:
    """The state with the next direction."""
    change = solve(state.rest)
    curvature = jnp.vdot(state.rest, change)
    # The residual may be so small that its square underflows to zero.
    share = jnp.where(state.curvature != 0, curvature / jnp.where(state.curvature != 0, state.curvature, 1), 0)
    return state._replace(ahead=change + share * state.ahead, curvature=curvature)


def _stepped(product: Float[Array, " m"], size: Callable[[Array], Scalar], state: _State) -> tuple[Scalar, _State]:
    """One step along the direction, whose product is given: its length, and the state after it.

    The length minimises the error in the norm of the matrix.
    """
    along = jnp.vdot(state.ahead, product)
    length = state.curvature / jnp.where(along != 0, along, 1)
    rest = state.rest - length * product
    left = size(rest)
    return length, state._replace(
        rest=rest,
        left=left,
        least=jnp.minimum(left, state.least),
        idle=jnp.where(left < 0.9 * state.least, 0, state.idle + 1),
        sweeps=state.sweeps + 1,
    )


def _going(state: _State) -> Bool[Array, ""]:
    # `~(a <= b)` rather than `a > b`, so that a NaN is not taken for a solution.
    return ~(state.left <= state.target) & (state.idle < 10) & (state.sweeps < SWEEPS)


# --- right-hand sides given by coordinates in the rows --------------------------------------------------------------------


class Damped(NamedTuple):
    """The system ``(M + damping I) c = b`` with ``M c = into(out(c))``; the caller wants ``x = unit out(c)``.

    Attributes:
        matrix: ``M``, with rounding errors; only its upper triangle is read.
        damping: a number above zero.
        out: ``X^T`` if ``M = X X^T``, the identity if ``M = X^T X``; a pytree, whose leaves derivatives are taken by.
        into: ``X``, or a product with ``X^T X``.
        unit: the factor from ``out(c)`` to the solution.
        of_root: whether ``out`` is ``X^T``. Residuals are then measured after a product with it, as ``|X^T rest| / |X^T b|``.
    """

    matrix: Float[Array, "m m"]
    damping: Scalar
    out: Callable[[Float[Array, " m"]], Any]
    into: Callable[[Any], Float[Array, " m"]]
    unit: Scalar
    of_root: bool

    def image(self, c: Float[Array, " m"], x: Any) -> Float[Array, " m"]:
        """``(M + damping I) c`` where ``x = out(c)``."""
        return self.into(x) + self.damping * c

    def length(self, c: Float[Array, " m"], image: Float[Array, " m"]) -> Scalar:
        """``|out(c)|``, given the image of ``c``."""
        return jnp.sqrt(jnp.maximum(jnp.vdot(c, image - self.damping * c if self.of_root else c), 0))


def solution(system: Damped, b: Float[Array, " m"], rtol: float) -> Any:
    """The ``x`` with a residual of about ``rtol`` times ``b``, or what rounding allows; unrefined if ``rtol`` is infinite."""
    factor = _factored(system)
    system = system._replace(damping=factor.damping)
    # Rows of zeros contribute nothing to the solution, whatever their pivot.
    b = jnp.where(factor.there, b, 0)
    product: Map = lambda c: system.image(c, system.out(c))  # noqa: E731
    if math.isinf(rtol):
        return _solution(system.out, system.unit, linear_solve(product, b, lambda _, b: (factor.solve(b), ()))[0])

    def iterate(_: Map, b: Array) -> tuple[Array, Any]:
        def step(state: _State) -> _State:
            state = _turned(factor.solve, state)
            out, first = system.out(state.ahead), state.sweeps == 0
            # Skip the product if the error bound of the first solution meets the target: then `rest` stands for the image.
            enough = first & (factor.error(state.ahead) <= state.target)
            image = cond(enough, lambda: state.rest, lambda: system.image(state.ahead, out))
            # The right-hand side is at least the damping times the solution, which the first iterate approximates.
            least = jnp.where(first, system.damping * system.length(state.ahead, image), 0)
            state = state._replace(target=jnp.maximum(state.target, rtol * least))
            length, after = _stepped(image, factor.size, state)
            # Accumulate x along with c. Computed as out(c) at the end, x would lose its small parts to cancellation in c.
            coordinates, x = state.found
            x = jax.tree.map(lambda leaf, by: leaf + length * system.unit * by, x, out)
            return after._replace(found=(coordinates + length * state.ahead, x))

        begin = _begin(b, jax.eval_shape(lambda: (b, system.out(b))), rtol * factor.least(b))
        return while_loop(_going, step, begin).found

    c, x = linear_solve(product, b, iterate)
    return with_derivatives_of(x, jax.tree_util.Partial(_solution), system.out, system.unit, c)


def _solution(out: Callable[[Array], Any], unit: Scalar, c: Float[Array, " m"]) -> Any:
    return jax.tree.map(lambda leaf: unit * leaf, out(c))


class _Factor(NamedTuple):
    """The Cholesky factor of a damped matrix with rounding errors, and error bounds from it.

    Attributes:
        damping: the damping of the system, raised if it is lost in the rounding errors of the matrix.
        there: which rows are not zero.
        solve: a solve with the factor.
        error: from the first solution to a bound on the size of its residual.
        size: the size of a residual, or somewhat more.
        least: a lower bound on the size of a right-hand side, allowing for rounding.
    """

    damping: Scalar
    there: Bool[Array, " m"]
    solve: Map
    error: Callable[[Array], Scalar]
    size: Callable[[Array], Scalar]
    least: Callable[[Array], Scalar]


def _rounding(matrix: Float[Array, "m m"]) -> float:
    """A bound on the rounding error of an eigenvalue of a matrix with unit diagonal, if the entries' errors act as random."""
    return 4 * math.sqrt(matrix.shape[0]) * float(jnp.finfo(matrix.dtype).eps)


def raised(matrix: Float[Array, "m m"], damping: Float[Array, "*m"]) -> Float[Array, "m m"]:
    """A matrix whose diagonal is that of ``matrix`` plus the damping, or plus its rounding error if that is larger."""
    damped = jnp.maximum(matrix + damping, (1 + _rounding(matrix)) * matrix)
    # A row of zeros without damping, as of a padded example, may have any pivot; this one marks it.
    return jnp.where(damped == 0, EMPTY, damped)


def _raised_cholesky(matrix: Float[Array, "m m"], damping: Float[Array, "*m"]) -> Float[Array, "m m"]:
    """The lower Cholesky factor of ``matrix`` with its diagonal as `raised` gives it."""
    return cholesky(jnp.where(jnp.eye(matrix.shape[0], dtype=bool), raised(matrix, damping), matrix))


def _factored(system: Damped) -> _Factor:
    matrix, rounding = system.matrix, _rounding(system.matrix)
    eps = float(jnp.finfo(matrix.dtype).eps)
    lower = _raised_cholesky(matrix, system.damping)
    # Take the diagonal from the factor: if that of the matrix were used, XLA would compute the whole matrix again.
    entries = jnp.einsum("ij,ij->i", lower, lower, precision=HIGHEST)
    there = entries != EMPTY
    entries = jnp.where(there, entries, 0)
    raised = jnp.maximum(rounding * entries, system.damping)
    # If rows are linearly dependent to rounding, X^T has a null space. Right-hand sides in it should contribute nothing to x,
    # but once divided by too small a damping they no longer cancel. So the damping gets a floor.
    dependent = there & (jnp.square(diagonals(lower[None])[0]) < 16 * rounding * entries)
    floor = eps * jnp.max(entries) * jnp.max(dependent.astype(entries.dtype))
    damping = jnp.maximum(system.damping, floor) if system.of_root else system.damping
    # The error bound: rounding of the matrix and of ``out``, and the amount by which the diagonal was raised.
    beyond = jnp.where(there, (raised - damping) * jax.lax.rsqrt(jnp.where(there, entries, 1)), 0)
    counts = entries if system.of_root else jnp.ones_like(entries)
    rounded = 2 * eps * jnp.sqrt(jnp.vdot(counts, entries)) + jnp.sqrt(jnp.vdot(counts * beyond, beyond))

    def solve(b: Array) -> Array:
        solved: Array = jax.scipy.linalg.cho_solve((lower, True), b)
        return solved

    def error(c: Array) -> Scalar:
        return rounded * jnp.sqrt(jnp.vdot(entries * c, c))

    def size(rest: Array) -> Scalar:
        return _size(matmul(rest, lower) if system.of_root else rest)

    def least(b: Array) -> Scalar:
        """A lower bound on ``|X^T b|``, from ``|X^T b|^2 = b^T M b`` less its rounding error."""
        if not system.of_root:
            return _size(b)
        known = jnp.square(size(b)) - jnp.vdot((raised + 4 * rounding * entries) * b, b)
        return jnp.sqrt(jnp.maximum(known, 0))

    return _Factor(damping, there, solve, error, size, least)


def _size(x: Float[Array, " m"]) -> Scalar:
    return jnp.sqrt(jnp.vdot(x, x))


# --- any right-hand side --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Triangular(LeavingNothingOut):
    """`Factored` by one Cholesky factor, for a damping that is known to be above zero.

    Attributes:
        lower: the factor of ``unit (matrix + damping I) unit``, whose diagonal is raised by its rounding error if necessary.
        unit: the factors that the matrix is multiplied by on both sides.
        told: whether the damping could be told from zero.
        pivots: the pivots, as shares of the diagonal entries.
    """

    lower: Float[Array, "m m"]
    unit: Float[Array, " m"]
    told: Bool[Array, ""]
    pivots: Float[Array, " m"]

    @property
    def _resolved(self) -> Bool[Array, " m"]:
        """Which pivots are above the rounding error of the matrix."""
        return self.pivots > 16 * _rounding(self.lower)

    @property
    def rank(self) -> Int[Array, ""]:
        """See `Factored`; if the damping cannot be told from zero, the number of pivots above rounding."""
        return jnp.where(self.told, self.unit.size, jnp.sum(self._resolved, dtype=jnp.int32))

    @property
    def clear(self) -> Bool[Array, ""]:
        """See `Factored`: whether the rounding error of a residual, over the least pivot, is a small part of the solution."""
        return self.told | jnp.all(self.pivots > jnp.finfo(self.lower.dtype).eps ** 0.5 / 2)

    @property
    def floor(self) -> Scalar:
        """See `Factored`: for a matrix that is singular to rounding, the least number that can be told from zero.

        Without it the rounding error of a right-hand side, along directions in the null space of F, would be divided by almost
        nothing.
        """
        return jnp.where(self.told | jnp.all(self._resolved), 0, 16 * _rounding(self.lower))

    def in_units(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        solved: Array = jax.scipy.linalg.cho_solve((self.lower, True), b)
        return solved


def triangular(matrix: Float[Array, "m m"], damping: Scalar) -> Triangular:
    """One Cholesky factor of ``matrix + damping I``. Only the upper triangle is read."""
    eps = jnp.finfo(matrix.dtype).eps
    diagonal = jnp.abs(diagonals(matrix[None])[0]) + damping
    unit = unit_diagonal(diagonal)
    told = ~(damping <= eps * jnp.max(diagonal, initial=0.0))
    lower = _raised_cholesky(unit[:, None] * matrix * unit[None, :], twice(damping, unit)[:, None])
    entries = twice(diagonal, unit)
    pivots = jnp.where(entries > 0, jnp.square(diagonals(lower[None])[0]) / jnp.where(entries > 0, entries, 1), 0)
    return Triangular(lower, unit, told, pivots)


@functools.cache
def by_cholesky(rtol: float) -> Factorise:
    """Factorise by one triangular factor for each damping, known to be above zero, and solve to the relative residual ``rtol``.

    With ``rtol`` zero solutions are as accurate as rounding allows. The cache makes one object for each ``rtol``, which is part
    of the key of compiled programs.
    """
    return Factorise(lambda matrix: functools.partial(triangular, matrix), functools.partial(_solved, rtol=rtol))


def _solved(system: System, v: Float[Array, " p"], rtol: float) -> Solved:
    """The solution of a system whose ``solve`` is approximate, and measurements of it."""
    units, factored = system.units, system.factored
    # With fewer rows than parameters no floor is needed: directions outside the rows' span are left out anyway.
    floor = factored.floor if factored.unit.size == v.size else jnp.zeros((), v.dtype)
    eps = float(jnp.finfo(v.dtype).eps)
    b, down, to_x, to_rest, settled = scaled(units, v)
    scales = [jnp.ones((), b.dtype), down * inverse_power(power_or_one(norm(down * b)))][: 1 + down.ndim]
    # The values that the iteration closes over must vary over the same mesh axes as the product.
    b, floor, *scales = alike(varying_through(system.product, b), floor, *scales)
    sizes = [jnp.where(whole > 0, whole, 1) for whole in (_size(scale * b) for scale in scales)]

    def size(r: Array) -> Scalar:
        """The size of a residual relative to the right-hand side, in its units and, if they differ, in the parameters' own."""
        parts = [_size(scale * r) / whole for scale, whole in zip(scales, sizes, strict=True)]
        return functools.reduce(jnp.maximum, parts)

    def iterate(product: Map, b: Array) -> tuple[Array, tuple[Array, Array]]:
        def step(state: _State) -> _State:
            state = _turned(system.solve, state)
            length, after = _stepped(product(state.ahead) + floor * state.ahead, size, state)
            return after._replace(found=state.found + length * state.ahead)

        begin = _begin(b, b, jnp.full((), max(rtol, 32 * eps), b.dtype))._replace(left=size(b))
        end = while_loop(_going, step, begin)
        y = end.found
        # The residual of the solution as it is returned, with the product rounded differently than in the iteration.
        rest = b - in_another_rounding(product, settled(y))
        return y, (rest, rest - end.rest - floor * y)

    y, (rest, noise) = linear_solve(system.product, b, iterate)
    small = size(rest) + 4 * size(noise) <= max(rtol, eps**0.5)
    sound = small & (factored.told | _is_near(system, jax.lax.stop_gradient(y), rest + 2 * noise))
    return Solved(to_x(y), to_rest(rest), system.rank, sound)


def _is_near(system: System, y: Float[Array, " p"], rest: Float[Array, " p"]) -> Bool[Array, ""]:
    """Whether a solution is accurate although its damping cannot be told from zero, judged by the size of a correction."""
    if system.factored.unit.size < y.size:
        return jnp.asarray(False)
    bound = float(jnp.finfo(y.dtype).eps) ** 0.5 / 8 * norm(y)
    return system.factored.clear & (norm(system.solve(rest)) <= bound)
