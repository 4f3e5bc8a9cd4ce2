r"""Solving a system with the inverse of a matrix that has rounding errors, refining the solution, and measuring its error.

Solutions are refined against a product without the errors of the matrix, and the report states what was measured then.

References: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12; Demmel, Hida, Kahan, Li, Mukherjee and
Riedy, Error bounds from extra-precise iterative refinement (ACM Transactions on Mathematical Software 2006), for the size of a
correction as a measure of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._inverse import Factored, Map, invert
from jaxfisher._linalg import OTHER, inverse_power, norm, power_or_one
from jaxfisher._varying import cond, linear_solve, while_loop


class SolveInfo(NamedTuple):
    """The report on a solve.

    Attributes:
        residual: ``|v - (F + damping I) x| / |v|``, computed from the ``x`` that is returned. If the rank is deficient at zero
            damping, it contains the part of ``v`` that no ``x`` reaches.
        iterations: the steps of an iterative solver; 0 for a direct route.
        converged: for an iterative solver, its own test, which its docstring states. For a direct route, whether the answer is
            finite and passes the following tests. With a damping that the dtype can tell from zero (above eps times the largest
            diagonal entry): the residual is at most the root of eps, in the parameters' own units and, if p is at most the
            number of rows, also in units in which ``F + damping I`` has a unit diagonal. Without such a damping: a further
            correction, which is as large as the error, would be at most an eighth of the root of eps of the solution (4e-5 in
            float32, 2e-9 in float64), in units in which F has a unit diagonal, or in the parameters' own if the rank is
            deficient; all eigenvalues that were kept are above four times the rounding error of the largest; the directions
            that were left out lie in the null space of F; and unless the damping is zero, none was left out, and the residual
            is as small as above.
        finite: whether every number of the answer is finite.
        rank: the number of directions inverted. It is p, unless the dtype cannot tell the damping from zero; then it is the
            number of eigenvalues of ``F + damping I`` that are not zero to rounding after a scaling to a unit diagonal.
        indefinite: whether an iterative solver met a direction in which ``F + damping I`` is negative, and stopped there.
        measured: whether the residual was computed. If it was not, as in `jaxfisher.kfac`, the residual is zero and says
            nothing.
    """

    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    finite: Bool[Array, ""]
    rank: Int[Array, ""]
    indefinite: Bool[Array, ""]
    measured: Bool[Array, ""] | np.bool_ = np.True_


class Solved(NamedTuple):
    """The result of an exact route for ``(F + damping I) x = v``, from which `direct_info` makes the report.

    Attributes:
        x: the solution.
        rest: ``v - (F + damping I) x``.
        rank: the number of directions inverted.
        sound: whether the solution passed the route's tests.
    """

    x: Any
    rest: Any
    rank: Int[Array, ""]
    sound: Bool[Array, ""]


class Rows(NamedTuple):
    """Products with X, if the matrix that was factored is ``X X^T``.

    Attributes:
        into: ``X y``.
        out: ``X^T c``.
    """

    into: Callable[[Float[Array, " p"]], Float[Array, " rows"]]
    out: Callable[[Float[Array, " rows"]], Float[Array, " p"]]


class System(NamedTuple):
    """The system ``(F + damping I) x = v`` in units: ``x = units y``, ``b = units v``, ``product(y) = b``.

    Attributes:
        product: the product with ``units (F + damping I) units``.
        solve: its inverse, as accurate as one application of the factors makes it.
        damping: the damping, in the units of F.
        units: one factor for each parameter, or one for all.
        factored: the inverse of the matrix that was factored.
        rank: the number of directions inverted.
        left_out: called with ``b`` and ``y`` if directions were left out. Returns whether these lie in the null space of F, and
            how much of ``units y`` may lie along them.
        rows: products with X if ``X X^T`` was factored; None if F was.
    """

    product: Map
    solve: Map
    damping: Scalar
    units: Float[Array, "*p"]
    factored: Factored
    rank: Int[Array, ""]
    left_out: Callable[[Float[Array, " p"], Float[Array, " p"]], tuple[Bool[Array, ""], Scalar]]
    rows: Rows | None = None


@jax.custom_jvp
def with_derivatives_of(x: Any, function: Callable[..., Any], *args: Any) -> Any:
    """``x``, which equals ``function(*args)`` up to rounding, with the derivatives of ``function``.

    The function is only traced if derivatives are taken. It is a pytree, such as `jax.tree_util.Partial`.
    """
    return x


@with_derivatives_of.defjvp
def _with_derivatives_of_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    return primals[0], jax.jvp(lambda function, *args: function(*args), primals[1:], tangents[1:])[1]


class Factorise(NamedTuple):
    """A method of inversion: how to factor a matrix, and how to solve a system with the factors.

    Attributes:
        factor: from a matrix, given by its upper triangle, to a function from a damping to the inverse.
        solved: from a system with such an inverse and a right-hand side to the solution and its measurements.
    """

    factor: Callable[[Float[Array, "m m"]], Callable[[Scalar], Factored]]
    solved: Callable[[System, Float[Array, " p"]], Solved]


class Scaled(NamedTuple):
    """The right-hand side of a system in its units, scaled to about unit length, with the maps back.

    Attributes:
        b: the scaled right-hand side.
        down: the factors from these units to the parameters' own.
        to_x: from the solution for ``b`` to that of the system.
        to_rest: from the residual for ``b`` to that of the system.
        settled: a solution for ``b`` without the parts that underflow on the way to ``x``.
    """

    b: Float[Array, " p"]
    down: Float[Array, "*p"]
    to_x: Map
    to_rest: Map
    settled: Map


def scaled(units: Float[Array, "*p"], v: Float[Array, " p"]) -> Scaled:
    """A right-hand side in these units, scaled so that nothing overflows or underflows unless the result does."""
    # Split the size of v into two factors, and apply other factors in between.
    half = power_or_one(jnp.sqrt(jnp.max(jnp.abs(v), initial=0.0)))
    b = v * inverse_power(half) * inverse_power(half) * units
    length = power_or_one(norm(b))
    down, shorter = inverse_power(units), inverse_power(length)

    def to_x(y: Array) -> Array:
        # Two factors of about the same size: neither overflows before the product does.
        return y * (units * half) * (length * half)

    def settled(y: Array) -> Array:
        return to_x(y) * (down * inverse_power(half)) * (shorter * inverse_power(half))

    def to_rest(r: Array) -> Array:
        return r * length * down * half * half

    return Scaled(b * shorter, down, to_x, to_rest, settled)


def solved(system: System, v: Float[Array, " p"]) -> Solved:
    """The refined solution of a system, and the measurements of its error."""
    units, factored = system.units, system.factored
    eps = jnp.finfo(v.dtype).eps
    b, down, to_x, to_rest, settled = scaled(units, v)
    deficient = (system.rank < v.size) & ~factored.told
    # If solutions are told apart by their norm alone, measure the error in that norm.
    metric = jnp.where(deficient, units, jnp.ones_like(units))
    y, (r, noise, error) = _refined(system, settled, b, metric, deficient)
    nothing = jnp.asarray(True), jnp.zeros((), b.dtype)
    unseen, astray = cond(deficient, lambda: system.left_out(b, jax.lax.stop_gradient(y)), lambda: nothing)
    bound = eps**0.5 / 8 * norm(metric * jax.lax.stop_gradient(y))
    near = (jnp.maximum(error, astray) <= bound) & factored.clear & unseen
    small = length(r) + 4 * length(noise) <= eps**0.5 * length(b)
    own = norm(down * r) + 4 * norm(down * noise) <= eps**0.5 * norm(down * b)
    # Without damping the residual may hold a part of v that no x reaches, and it is large for a long solution.
    sound = jnp.where(factored.told, small & own, near & ((small & ~deficient) | (system.damping == 0)))
    return Solved(to_x(y), to_rest(r), system.rank, sound)


TRUSTED = Factorise(lambda matrix: partial(invert, matrix), solved)
"""A factorisation for each damping, by Cholesky if that can be trusted and by eigenvectors if not."""


REFINING, MEASURING, WEIGHING, TURNING, LEAKING, DONE = range(6)
"""The stages of the refinement loop; each pass does one.

REFINING adds a correction. MEASURING recomputes the residual. WEIGHING takes the size of the correction for that residual, and
of the one for its rounding error. With a null space the residual should lie in it entirely: TURNING applies the product to the
residual and weighs what comes back, and LEAKING weighs the solution's part along it.
"""


class _Pass(NamedTuple):
    """The state of the refinement loop.

    Attributes:
        y: the solution.
        r: its residual.
        z: the correction for that residual, which is not yet added.
        p: the last direction.
        q: the product with the last direction.
        plain: whether the last correction was added with length one.
        moved: the size of the last correction.
        noise: the difference of two residuals of ``y``.
        error: the size of a further correction.
        steps: the number of corrections so far.
        stage: the stage of the next pass.
    """

    y: Array
    r: Array
    z: Array
    p: Array
    q: Array
    plain: Array
    moved: Array
    noise: Array
    error: Array
    steps: Array
    stage: Array


def _refined(
    system: System, settled: Map, b: Float[Array, " p"], metric: Array, deficient: Bool[Array, ""]
) -> tuple[Array, tuple[Array, ...]]:
    """``solve(b)`` refined against the product; its residual, the difference of two such residuals, and the error.

    The residuals are those of the ``settled`` solution. If ``solve`` uses a matrix with rounding errors, such as ``X X^T``, the
    product should go by way of ``X``: then refinement also corrects the rounding of the matrix, which is most of the error (a
    hundredfold in float32). One refinement is enough if the matrix is accurate beside the damping. If the damping is as small
    as the rounding error of the matrix, up to thirty directions are tried. Each is followed to the smallest residual, with its
    image orthogonal to the one before (conjugate residuals): this cannot diverge, and stops when nothing is gained. Without
    damping, part of ``b`` may lie outside the range of the matrix, so that the residual says nothing, and its inner product
    with an image is mostly rounding. Then the error is minimised in the norm of the matrix (conjugate gradients), by inner
    products with directions, to which the unreachable part is orthogonal, as long as corrections shrink in the norm that
    ``metric`` weighs. Derivatives are those of the solution, with a null space that was left out held fixed.

    The correction for the final residual is as large as the error. Two residuals of one solution differ by rounding, and the
    true residual differs from each by about as much. All of this is one loop, so that the product and the solve occur in the
    program once.

    Reference: Higham (2002), chapter 12; Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 6.20.
    """
    told, down = system.factored.told, inverse_power(metric)

    def iterate(product: Map, b: Array) -> tuple[Array, tuple[Array, ...]]:
        # A cotangent comes in units of its own, and the squares of its entries may overflow.
        size = power_or_one(norm(b))
        b = b * inverse_power(size)
        zero = jnp.zeros_like(b)

        def step(state: _Pass) -> _Pass:
            refining, measuring, weighing, turning, leaking = (state.stage == stage for stage in range(DONE))
            multiplied = (refining & (state.steps > 0)) | measuring | turning
            at = jnp.where(measuring, OTHER * settled(state.y), jnp.where(turning, state.r * down * down, state.z))
            image = cond(multiplied, lambda: product(at), lambda: zero)
            after = _chosen(refining, _further(state, image, metric, told), state)
            again = b - (1 / OTHER) * image
            after = _chosen(measuring, state._replace(r=again, noise=state.r - again), after)
            error = jnp.where(weighing | turning, jnp.maximum(state.error, norm(metric * state.z)), state.error)
            following = jnp.where(measuring, jnp.where(told, DONE, WEIGHING), jnp.where(deficient, state.stage + 1, DONE))
            stage = jnp.where(refining, after.stage, following.astype(jnp.int32))
            special = jnp.where(weighing, 2 * state.noise, jnp.where(turning, image, metric * (metric * state.z)))
            source = jnp.where(weighing | turning | leaking, special, after.r)
            needed = (stage != MEASURING) & ~((stage == DONE) & told)
            z = cond(needed, lambda: system.solve(source), lambda: zero)
            return after._replace(z=z, error=error, stage=stage)

        nothing, far = jnp.zeros((), b.dtype), jnp.asarray(jnp.finfo(b.dtype).max, b.dtype)
        begin = _Pass(zero, b, zero, zero, zero, jnp.asarray(True), far, zero, nothing, _stage(0), _stage(REFINING))
        end = while_loop(lambda state: state.stage != DONE, step, begin)
        error = jnp.maximum(end.error, norm(metric * end.z))
        return end.y * size, (end.r * size, end.noise * size, error * size)

    return linear_solve(system.product, b, iterate)


def _stage(which: Any) -> Int[Array, ""]:
    return jnp.asarray(which, jnp.int32)


def _chosen(flag: Bool[Array, ""], yes: _Pass, no: _Pass) -> _Pass:
    """``yes`` if the flag is true, else ``no``."""
    state: _Pass = jax.tree.map(lambda one, other: jnp.where(flag, one, other), yes, no)
    return state


def _further(state: _Pass, image: Array, metric: Array, told: Bool[Array, ""]) -> _Pass:
    """The state after one more direction, from the correction and its image; ``stage`` says whether it gained anything."""
    eps = jnp.finfo(image.dtype).eps

    def against(p: Array, q: Array) -> Array:
        return jnp.where(told, q, p)

    z, last, first = state.z, against(state.p, state.q), state.steps == 0
    back = _ratio(jnp.vdot(image, last), jnp.vdot(state.q, last))
    # If orthogonalising leaves little of an image, most of that is rounding. After a plain step do not orthogonalise at all.
    use = ~state.plain & (length(image - back * state.q) > 0.1 * length(image))
    back = jnp.where(use, back, 0)
    p, q = z - back * state.p, image - back * state.q
    along = _ratio(jnp.vdot(state.r, against(p, q)), jnp.vdot(q, against(p, q)))
    # A plain refinement, of length one, rounds less: take it if the best length is near one.
    plain = (jnp.abs(along - 1) < 0.01) | first
    along = jnp.where(plain, 1, along)
    y, r = state.y + along * p, state.r - along * q
    size, moved = length(r), norm(metric * z)
    gained = (size > 100 * eps) & (size < 0.95 * length(state.r))
    shrinking = ~told & (moved > 4 * eps * norm(metric * y)) & (moved < 0.5 * state.moved)
    going = (gained | shrinking | (state.steps < 2)) & (state.steps < 31)
    return state._replace(
        y=y,
        r=r,
        p=p,
        q=q,
        plain=plain,
        moved=jnp.where(first, state.moved, moved),
        steps=state.steps + 1,
        stage=_stage(jnp.where(going, REFINING, MEASURING)),
    )


def length(r: Float[Array, " p"]) -> Scalar:
    """The norm of a vector of at most about unit length; zero if its square underflows."""
    return jnp.sqrt(jnp.vdot(r, r))


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    """``a / b``, or zero if ``b`` is zero."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


def direct_info(found: Solved, v: Float[Array, " p"]) -> SolveInfo:
    """The report on a solution by a direct route, of flat vectors."""
    size = norm(v)
    relative = norm(found.rest) / jnp.where(size > 0, size, 1)
    finite = jnp.all(jnp.isfinite(found.x))
    return SolveInfo(relative, jnp.zeros((), jnp.int32), finite & found.sound, finite, found.rank, jnp.asarray(False))
