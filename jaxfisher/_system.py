r"""A system of equations solved with the inverse of a rounded matrix, refined, and what was measured of the solution.

Solutions are refined against the unrounded product, and the report is of what was measured then.

References: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12; Demmel, Hida, Kahan, Li, Mukherjee and
Riedy, Error bounds from extra-precise iterative refinement (ACM Transactions on Mathematical Software 2006), for the size of a
correction as a measure of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._inverse import Factored, Map, by_invert
from jaxfisher._linalg import OTHER, inverse_power, norm, power_or_one
from jaxfisher._varying import cond, linear_solve, while_loop


class SolveInfo(NamedTuple):
    """How a solve went; read it, nothing depends on it.

    Attributes:
        residual: ``|v - (F + damping I) x| / |v|``, computed anew from the ``x`` that is given. Where the rank is deficient at
            zero damping it contains the part of ``v`` that no ``x`` reaches.
        iterations: of an iterative solver; 0 for a direct route.
        converged: of an iterative solver, its own test, which its docstring states. Of a direct route, that the answer is
            finite and passes these. With a damping that the dtype can tell from zero (above eps times the largest diagonal
            entry): the residual is at most the root of eps, in the parameters' own units and, where p is not above the number
            of rows, in those in which ``F + damping I`` has a unit diagonal. Without one: a further correction, which is as
            large as the error, would be at most an eighth of the root of eps of the solution (4e-5 in float32, 2e-9 in
            float64), in units in which F has a unit diagonal, or in the parameters' own where the rank is deficient; all
            eigenvalues that were kept are above four times the rounding error of the largest; F does not see the directions
            that were left out; and unless the damping is zero, none was left out, and the residual is as small as above.
        finite: whether every number of the answer is finite.
        rank: number of directions inverted: p, unless the dtype cannot tell the damping from zero. Then it is the number of
            eigenvalues of ``F + damping I`` that are not zero to rounding after a scaling to a unit diagonal.
        indefinite: whether an iterative solver met a direction in which ``F + damping I`` is negative, and stopped there.
        measured: whether the residual was computed. Where it was not, as in `jaxfisher.kfac`, the residual is zero and says
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
    """What an exact route finds of ``(F + damping I) x = v``; `direct_info` makes the report of it.

    Attributes:
        x: the solution.
        rest: ``v - (F + damping I) x``.
        rank: number of directions inverted.
        sound: whether the answer passed the tests that the route makes of it.
    """

    x: Any
    rest: Any
    rank: Int[Array, ""]
    sound: Bool[Array, ""]


class Rows(NamedTuple):
    """Products with X, where the matrix that was factored is ``X X^T``.

    Attributes:
        into: ``X y``.
        out: ``X^T c``.
    """

    into: Callable[[Float[Array, " p"]], Float[Array, " rows"]]
    out: Callable[[Float[Array, " rows"]], Float[Array, " p"]]


class System(NamedTuple):
    """``(F + damping I) x = v`` in units: ``x = units y``, ``b = units v``, ``product(y) = b``.

    Attributes:
        product: ``units (F + damping I) units``.
        solve: its inverse, as well as one application of factors does it.
        damping: in the units of F.
        units: one for each parameter, or one for all.
        factored: what the inverse is made of.
        rank: number of directions inverted.
        left_out: called with ``b`` and ``y`` where directions were left out: whether F does not see them, and how much of
            ``units y`` may lie along them.
        rows: where the smaller matrix was factored; None where F was.
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
    """``x``, which is ``function(*args)`` but for rounding, with the derivatives of that, which is only traced for them.

    The function is a pytree, such as `jax.tree_util.Partial`.
    """
    return x


@with_derivatives_of.defjvp
def _with_derivatives_of_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    return primals[0], jax.jvp(lambda function, *args: function(*args), primals[1:], tangents[1:])[1]


class Factorise(NamedTuple):
    """A way to invert: how a matrix is factored, and how a system is solved with the factors.

    Attributes:
        factor: from a matrix, given by its upper triangle, to its inverse at any damping.
        solved: the solution of a system that has such an inverse, and what was measured of it.
    """

    factor: Callable[[Float[Array, "m m"]], Callable[[Scalar], Factored]]
    solved: Callable[[System, Float[Array, " p"]], Solved]


class Scaled(NamedTuple):
    """The right-hand side of a system in its units, of about unit length, and the ways back.

    Attributes:
        b: the right-hand side.
        down: what it is multiplied by for the parameters' own units.
        to_x: from the solution for ``b`` to that of the system.
        to_rest: from what is left of ``b`` to what is left of the right-hand side.
        settled: a solution less what underflows on the way to ``x`` and is no longer part of it.
    """

    b: Float[Array, " p"]
    down: Float[Array, "*p"]
    to_x: Map
    to_rest: Map
    settled: Map


def scaled(units: Float[Array, "*p"], v: Float[Array, " p"]) -> Scaled:
    """A right-hand side in these units, in which nothing leaves the dtype but what the result does."""
    # The size of v as a product of two, between which other factors are applied.
    half = power_or_one(jnp.sqrt(jnp.max(jnp.abs(v), initial=0.0)))
    b = v * inverse_power(half) * inverse_power(half) * units
    length = power_or_one(norm(b))
    down, shorter = inverse_power(units), inverse_power(length)

    def to_x(y: Array) -> Array:
        # Two factors of about one size: neither leaves the dtype before the product does.
        return y * (units * half) * (length * half)

    def settled(y: Array) -> Array:
        return to_x(y) * (down * inverse_power(half)) * (shorter * inverse_power(half))

    def to_rest(r: Array) -> Array:
        return r * length * down * half * half

    return Scaled(b * shorter, down, to_x, to_rest, settled)


def solved(system: System, v: Float[Array, " p"]) -> Solved:
    """The refined solution of a system, and what was measured of it."""
    units, factored = system.units, system.factored
    eps = jnp.finfo(v.dtype).eps
    b, down, to_x, to_rest, settled = scaled(units, v)
    deficient = (system.rank < v.size) & ~factored.told
    # Of solutions that are told apart by their norm alone, that norm counts.
    metric = jnp.where(deficient, units, jnp.ones_like(units))
    y, (r, noise, error) = _refined(system, settled, b, metric, deficient)
    nothing = jnp.asarray(True), jnp.zeros((), b.dtype)
    unseen, astray = cond(deficient, lambda: system.left_out(b, jax.lax.stop_gradient(y)), lambda: nothing)
    bound = eps**0.5 / 8 * norm(metric * jax.lax.stop_gradient(y))
    near = (jnp.maximum(error, astray) <= bound) & factored.clear & unseen
    small = length(r) + 4 * length(noise) <= eps**0.5 * length(b)
    own = norm(down * r) + 4 * norm(down * noise) <= eps**0.5 * norm(down * b)
    # Without any damping the residual may hold what is out of reach, and be large where the solution is long.
    sound = jnp.where(factored.told, small & own, near & ((small & ~deficient) | (system.damping == 0)))
    return Solved(to_x(y), to_rest(r), system.rank, sound)


TRUSTED = Factorise(by_invert, solved)
"""A factorisation for each damping, the one that can be trusted, with eigenvectors where it must be."""


REFINING, MEASURING, WEIGHING, TURNING, LEAKING, DONE = range(6)
"""What a pass of the loop does.

It adds a correction; takes the residual anew; weighs the correction for that, and the one for its rounding; then what of the
residual, all of which lies in the null space if that is known exactly, comes back out of the product, and what the solution has
of that.
"""


class _Pass(NamedTuple):
    """A solution, and where its refinement stands.

    Attributes:
        y: the solution.
        r: what it leaves of the right-hand side.
        z: the correction for that, which is not yet added.
        p: the last direction.
        q: its image.
        plain: whether all of it was added.
        moved: the size of the last correction.
        noise: how two residuals of ``y`` differ.
        error: the size of a further correction.
        steps: corrections so far.
        stage: what comes next.
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
    """``solve(b)``, refined against the product; what is ``settled`` of it leaves, how two such residuals differ, the error.

    Where the solve factored a rounded matrix, such as ``X X^T``, the product should be the unrounded one, by way of ``X``: that
    also mends the rounding of the matrix, which is most of the error (a hundredfold in float32). One refinement does where the
    rounded matrix is near. Where the damping is down at its rounding it is not, and up to thirty directions are tried, each as
    far as makes the residual smallest, their images orthogonal to the one before (conjugate residuals): that cannot diverge,
    and stops where nothing is gained. Without damping part of ``b`` may be out of reach, so that the residual says nothing, and
    a product of it with an image is mostly rounding. There the error is made smallest in the norm of the matrix (conjugate
    gradients), by products with directions, to which what is out of reach is orthogonal, while corrections shrink, as
    ``metric`` weighs them. Derivatives are those of the solution, with the null space as it is where one was left out.

    What corrects the residual is as large as the error. Two residuals of one solution differ by rounding, from which the true
    one differs as much. All of this is one loop, so that the product and the solve stand in the program once.

    Reference: Higham (2002), chapter 12; Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 6.20.
    """
    told, down = system.factored.told, inverse_power(metric)

    def iterate(product: Map, b: Array) -> tuple[Array, tuple[Array, ...]]:
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
        return end.y, (end.r, end.noise, jnp.maximum(end.error, norm(metric * end.z)))

    return linear_solve(system.product, b, iterate)


def _stage(which: Any) -> Int[Array, ""]:
    return jnp.asarray(which, jnp.int32)


def _chosen(flag: Bool[Array, ""], yes: _Pass, no: _Pass) -> _Pass:
    """One state or the other."""
    state: _Pass = jax.tree.map(lambda one, other: jnp.where(flag, one, other), yes, no)
    return state


def _further(state: _Pass, image: Array, metric: Array, told: Bool[Array, ""]) -> _Pass:
    """One more direction, made of the correction and its image; what comes next says whether anything was gained."""
    eps = jnp.finfo(image.dtype).eps

    def against(p: Array, q: Array) -> Array:
        return jnp.where(told, q, p)

    z, last, first = state.z, against(state.p, state.q), state.steps == 0
    back = _ratio(jnp.vdot(image, last), jnp.vdot(state.q, last))
    # Where little is left of an image, most of that is rounding; after a plain step no direction is to be left out.
    use = ~state.plain & (length(image - back * state.q) > 0.1 * length(image))
    back = jnp.where(use, back, 0)
    p, q = z - back * state.p, image - back * state.q
    along = _ratio(jnp.vdot(state.r, against(p, q)), jnp.vdot(q, against(p, q)))
    # A plain refinement where that does, which rounds less.
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
    """The norm of what is a right-hand side of unit length, or what is left of one: where its square vanishes, it does."""
    return jnp.sqrt(jnp.vdot(r, r))


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    """``a / b``, zero where ``b`` is."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


def direct_info(found: Solved, v: Float[Array, " p"]) -> SolveInfo:
    """The report of a direct route, of flat vectors."""
    size = norm(v)
    relative = norm(found.rest) / jnp.where(size > 0, size, 1)
    finite = jnp.all(jnp.isfinite(found.x))
    return SolveInfo(relative, jnp.zeros((), jnp.int32), finite & found.sound, finite, found.rank, jnp.asarray(False))
