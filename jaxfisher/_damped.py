r"""A damped system by one Cholesky factor, refined as far as is asked for: a training step, and solves at a known damping.

The matrix ``M`` of ``(M + damping I) c = b`` is known with rounding errors; its product is known better, by way of what ``M``
is made of. With a damping above zero no eigenvectors are needed. Where the damping is below what rounding does to the diagonal,
the factor is that of a larger one, and refinement takes the difference back: conjugate gradients, preconditioned by the factor,
one or two where that is near, more where rounding made the matrix another one.

References: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 10 and 12; Saad, Iterative Methods for
Sparse Linear Systems (2003), algorithm 9.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._inverse import Map
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
"""How often a solution is refined at most."""
EMPTY = 2.0**100
"""The pivot of a row of zeros: no other one is as large, since the largest score is near one."""


class _State(NamedTuple):
    """Where conjugate gradients are.

    Attributes:
        found: the solution, and what else the caller makes of its directions.
        rest: what is left of the right-hand side.
        ahead: the last direction.
        curvature: ``rest^T (solve rest)`` for the rest that this direction was made of.
        left: the size of the rest.
        target: what that is to come down to.
        least: the smallest so far.
        idle: how often in a row no smaller one was found.
        sweeps: how often a step was taken.
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
    """With a solution of zero, of this shape."""
    # The zeros are made of what comes late: XLA would make constant ones first of all, and hold them while there is much else.
    late = jnp.minimum(target, 0)
    zero = jax.tree.map(lambda leaf: jax.lax.broadcast(late, leaf.shape), found)
    infinite, none = jnp.full((), jnp.inf, b.dtype), jnp.zeros((), jnp.int32)
    return _State(zero, b, jnp.zeros_like(b), infinite, infinite, target, infinite, none, none)


def _turned(solve: Map, state: _State) -> _State:
    """With the next direction."""
    change = solve(state.rest)
    curvature = jnp.vdot(state.rest, change)
    # What is left may be so small that its square is zero.
    share = jnp.where(state.curvature != 0, curvature / jnp.where(state.curvature != 0, state.curvature, 1), 0)
    return state._replace(ahead=change + share * state.ahead, curvature=curvature)


def _stepped(product: Float[Array, " m"], size: Callable[[Array], Scalar], state: _State) -> tuple[Scalar, _State]:
    """As far along the direction, of this product, as makes the error smallest in the norm of the matrix; how far that is."""
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
    # Written so that a NaN is not taken for a solution.
    return ~(state.left <= state.target) & (state.idle < 10) & (state.sweeps < SWEEPS)


# --- known by coordinates in the rows -------------------------------------------------------------------------------------


class Damped(NamedTuple):
    """``(M + damping I) c = b`` with ``M c = into(out(c))``, of which ``x = unit out(c)`` is wanted.

    Attributes:
        matrix: ``M``, rounded; its upper triangle is read.
        damping: above zero.
        out: ``X^T`` where ``M = X X^T``; the identity where ``M = X^T X``. A pytree of what derivatives are taken by.
        into: ``X``, or a product with ``X^T X``.
        unit: of the solution.
        of_root: whether ``out`` is ``X^T``. Residuals are then measured after a product with it: as ``|X^T rest| / |X^T b|``.
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
    """``x`` whose residual is about ``rtol`` of ``b``, or what rounding leaves; unrefined where ``rtol`` is infinite."""
    factor = _factored(system)
    system = system._replace(damping=factor.damping)
    # Rows of zeros make nothing of the solution, and may have a pivot of any size.
    b = jnp.where(factor.there, b, 0)
    product: Map = lambda c: system.image(c, system.out(c))  # noqa: E731
    if math.isinf(rtol):
        return _solution(system.out, system.unit, linear_solve(product, b, lambda _, b: (factor.solve(b), ()))[0])

    def iterate(_: Map, b: Array) -> tuple[Array, Any]:
        def step(state: _State) -> _State:
            state = _turned(factor.solve, state)
            out, first = system.out(state.ahead), state.sweeps == 0
            # A product is taken only where the first solution may be off by more than is asked for. Otherwise that solves it.
            enough = first & (factor.error(state.ahead) <= state.target)
            image = cond(enough, lambda: state.rest, lambda: system.image(state.ahead, out))
            # The right-hand side is at least the damping times the solution, of which the first one is near.
            least = jnp.where(first, system.damping * system.length(state.ahead, image), 0)
            state = state._replace(target=jnp.maximum(state.target, rtol * least))
            length, after = _stepped(image, factor.size, state)
            # What was found of x is no product with what was found of c, most of which may cancel in that, and with it what is
            # small. It is the sum of what products were taken of, with its rounding.
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
    """One factor of a rounded matrix with its damping.

    Attributes:
        damping: that of the system. If it could not be told from the rounding of the matrix, what could be.
        there: which rows are not zero.
        solve: a solve by it.
        error: a bound on the size of what the first solution leaves.
        size: of a residual, or somewhat more.
        least: a lower bound on the size of a right-hand side, by what is known of it to rounding.
    """

    damping: Scalar
    there: Bool[Array, " m"]
    solve: Map
    error: Callable[[Array], Scalar]
    size: Callable[[Array], Scalar]
    least: Callable[[Array], Scalar]


def _rounding(matrix: Float[Array, "m m"]) -> float:
    """What rounding may do to an eigenvalue of a matrix with a unit diagonal: its errors are about those of a random one."""
    return 4 * math.sqrt(matrix.shape[0]) * float(jnp.finfo(matrix.dtype).eps)


def raised(matrix: Float[Array, "m m"], damping: Float[Array, "*m"]) -> Float[Array, "m m"]:
    """A matrix whose diagonal is that of ``matrix`` and its damping, which counts for no less than rounding does to that."""
    damped = jnp.maximum(matrix + damping, (1 + _rounding(matrix)) * matrix)
    # A row of zeros without a damping, as of a padded example, has any number for a pivot, and is known by this one.
    return jnp.where(damped == 0, EMPTY, damped)


def _raised_cholesky(matrix: Float[Array, "m m"], damping: Float[Array, "*m"]) -> Float[Array, "m m"]:
    """The lower factor of ``matrix + damping``, which stands on the diagonal and is no less than rounding does to that."""
    return cholesky(jnp.where(jnp.eye(matrix.shape[0], dtype=bool), raised(matrix, damping), matrix))


def _factored(system: Damped) -> _Factor:
    matrix, rounding = system.matrix, _rounding(system.matrix)
    eps = float(jnp.finfo(matrix.dtype).eps)
    lower = _raised_cholesky(matrix, system.damping)
    # The diagonal, of the factor: where that of the matrix is used, XLA makes the whole matrix again.
    entries = jnp.einsum("ij,ij->i", lower, lower, precision=HIGHEST)
    there = entries != EMPTY
    entries = jnp.where(there, entries, 0)
    raised = jnp.maximum(rounding * entries, system.damping)
    # Of right-hand sides in the null space of X^T nothing is wanted, but what a smaller damping divides cancels no more. There
    # is such a space where rows depend on each other, to rounding.
    dependent = there & (jnp.square(diagonals(lower[None])[0]) < 16 * rounding * entries)
    floor = eps * jnp.max(entries) * jnp.max(dependent.astype(entries.dtype))
    damping = jnp.maximum(system.damping, floor) if system.of_root else system.damping
    # From the rounding of the matrix and of ``out``, and from what the diagonal was raised by.
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
        """``|X^T b|^2 = b^T M b``, where that is more than its rounding error."""
        if not system.of_root:
            return _size(b)
        known = jnp.square(size(b)) - jnp.vdot((raised + 4 * rounding * entries) * b, b)
        return jnp.sqrt(jnp.maximum(known, 0))

    return _Factor(damping, there, solve, error, size, least)


def _size(x: Float[Array, " m"]) -> Scalar:
    return jnp.sqrt(jnp.vdot(x, x))


# --- any vector -----------------------------------------------------------------------------------------------------------


class Triangular(NamedTuple):
    """`Factored` by one Cholesky factor, of a damping that is known to be above zero.

    Attributes:
        lower: the factor of ``unit (matrix + damping I) unit``, or of one whose diagonal was raised by its rounding.
        unit: what the matrix is multiplied by on both sides.
        told: whether the damping could be told from zero.
        pivots: as shares of the diagonal entries.
    """

    lower: Float[Array, "m m"]
    unit: Float[Array, " m"]
    told: Bool[Array, ""]
    pivots: Float[Array, " m"]

    @property
    def _resolved(self) -> Bool[Array, " m"]:
        """Which pivots are above the rounding of the matrix."""
        return self.pivots > 16 * _rounding(self.lower)

    @property
    def rank(self) -> Int[Array, ""]:
        """See `Factored`; where the damping cannot be told, the pivots that are above rounding are counted."""
        return jnp.where(self.told, self.unit.size, jnp.sum(self._resolved, dtype=jnp.int32))

    @property
    def clear(self) -> Bool[Array, ""]:
        """See `Factored`: the rounding of a residual, over the least pivot, is a small part of the solution."""
        return self.told | jnp.all(self.pivots > jnp.finfo(self.lower.dtype).eps ** 0.5 / 2)

    @property
    def floor(self) -> Scalar:
        """See `Factored`: of what the dtype takes for singular, the least that can be told from zero.

        Without it the rounding of a right-hand side, along directions that F does not see, would be divided by next to nothing.
        """
        return jnp.where(self.told | jnp.all(self._resolved), 0, 16 * _rounding(self.lower))

    @property
    def left_out(self) -> Float[Array, " m"]:
        """See `Factored`: nothing is."""
        return jnp.zeros_like(self.unit)

    def in_units(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        solved: Array = jax.scipy.linalg.cho_solve((self.lower, True), b)
        return solved

    def apply(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        return self.unit * self.in_units(self.unit * b)

    def projected(self, product: Map) -> Triangular:
        """See `Factored`: nothing was left out."""
        return self

    def astray(self, b: Float[Array, " m"], y: Float[Array, " m"]) -> Scalar:
        """See `Factored`."""
        return jnp.zeros((), b.dtype)


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
    """One triangular factor for each damping, all of them known to be above zero, and solutions to a relative residual.

    They are as accurate as rounding allows where ``rtol`` is zero. There is one object for each ``rtol``: programs are found
    again by it.
    """
    return Factorise(lambda matrix: functools.partial(triangular, matrix), functools.partial(_solved, rtol=rtol))


def _solved(system: System, v: Float[Array, " p"], rtol: float) -> Solved:
    """The solution of a system whose ``solve`` is near, and what was measured of it."""
    units, factored = system.units, system.factored
    # By way of the rows there are directions outside their span in any case, and a damping that is not told leaves them out.
    floor = factored.floor if factored.unit.size == v.size else jnp.zeros((), v.dtype)
    eps = float(jnp.finfo(v.dtype).eps)
    b, down, to_x, to_rest, settled = scaled(units, v)
    scales = [jnp.ones((), b.dtype), down * inverse_power(power_or_one(norm(down * b)))][: 1 + down.ndim]
    # What the iteration closes over varies over devices where the product does.
    b, floor, *scales = alike(varying_through(system.product, b), floor, *scales)
    sizes = [jnp.where(whole > 0, whole, 1) for whole in (_size(scale * b) for scale in scales)]

    def size(r: Array) -> Scalar:
        """Relative to the right-hand side: in its units, and in the parameters' own where there are several."""
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
        # Of the solution that is given, and on another way through the product than the one that led there.
        rest = b - in_another_rounding(product, settled(y))
        return y, (rest, rest - end.rest - floor * y)

    y, (rest, noise) = linear_solve(system.product, b, iterate)
    small = size(rest) + 4 * size(noise) <= max(rtol, eps**0.5)
    sound = small & (factored.told | _is_near(system, jax.lax.stop_gradient(y), rest + 2 * noise))
    return Solved(to_x(y), to_rest(rest), system.rank, sound)


def _is_near(system: System, y: Float[Array, " p"], rest: Float[Array, " p"]) -> Bool[Array, ""]:
    """Whether a solution is right although its damping cannot be told from zero: a correction is as large as the error."""
    if system.factored.unit.size < y.size:
        return jnp.asarray(False)
    bound = float(jnp.finfo(y.dtype).eps) ** 0.5 / 8 * norm(y)
    return system.factored.clear & (norm(system.solve(rest)) <= bound)
