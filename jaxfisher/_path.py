r"""Systems that differ in their damping only, solved together from one eigendecomposition.

The systems are ``(F + damping_k I) x_k = v``. With ``X X^T = V diag(s) V^T`` a solve at another damping is a division, so the
cost is in products with X. A solution takes only as many as it needs to be checked: one to compute it from its coordinates in
the rows, two for its residual, and two more for each correction. Everything that does not depend on the damping is computed
once, and the products for several dampings are matrix products.

Reference: Golub and Van Loan, Matrix Computations (2013), section 6.1.4; Higham, Accuracy and Stability of Numerical Algorithms
(2002), chapter 12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._inverse import Factored, LeavingNothingOut, Map, reciprocal
from jaxfisher._linalg import OTHER, inverse_power, kept_of, matmul, mirrored, twice, unit_diagonal
from jaxfisher._system import Factorise, Solved, System, length, scaled, with_derivatives_of
from jaxfisher._varying import linear_solve, while_loop

CORRECTIONS = 8
"""The most corrections of a solution."""


class ManyTimes(Factored, Protocol):
    """`Factored`, for one of several dampings."""

    def at_zero(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """``matrix^+ b``, at least approximately; the less it depends on the damping, the better."""
        ...

    def size(self, c: Float[Array, " m"]) -> Scalar:
        """The root of ``c^T (matrix + damping I) c``."""
        ...


@dataclasses.dataclass(frozen=True)
class Decomposed(LeavingNothingOut):
    """`ManyTimes` by eigenvectors that do not depend on the damping.

    With a damping that can be told from zero nothing is left out. With the same unit for all rows, the eigenvectors are already
    orthogonal.

    Attributes:
        vectors: the eigenvectors of the matrix in units.
        inverted: one over its eigenvalues plus the damping.
        undamped: the same without damping; zero if the eigenvalue is zero to rounding.
        unit: the factor that the matrix is multiplied by on both sides, the same for all rows.
        told: whether the damping could be told from zero.
    """

    vectors: Float[Array, "m m"]
    inverted: Float[Array, " m"]
    undamped: Float[Array, " m"]
    unit: Float[Array, " m"]
    told: Bool[Array, ""]

    @property
    def rank(self) -> Int[Array, ""]:
        """See `Factored`."""
        return jnp.sum(self.inverted != 0, dtype=jnp.int32)

    @property
    def clear(self) -> Bool[Array, ""]:
        """See `Factored`: only with a damping, since otherwise which eigenvalues count as zero depends on the units here."""
        return self.told

    def in_units(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        return self._with(self.inverted, b)

    def at_zero(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `ManyTimes`: the result is the same for all dampings."""
        return self.unit * self._with(self.undamped, self.unit * b)

    def size(self, c: Float[Array, " m"]) -> Scalar:
        """See `ManyTimes`."""
        roots = jnp.sqrt(jnp.where(self.inverted > 0, 1 / jnp.where(self.inverted > 0, self.inverted, 1), 0))
        return length(roots * matmul(self.vectors.T, inverse_power(self.unit) * c))

    def _with(self, values: Float[Array, " m"], b: Float[Array, " m"]) -> Float[Array, " m"]:
        return matmul(self.vectors, values * matmul(self.vectors.T, b))


def _by_eigenvectors(matrix: Float[Array, "m m"]) -> Callable[[Scalar], Decomposed]:
    """One eigendecomposition for all dampings."""
    largest = jnp.min(unit_diagonal(jnp.abs(jnp.diagonal(matrix))), initial=1 / jnp.finfo(matrix.dtype).tiny)
    unit = jnp.broadcast_to(largest, matrix.shape[:1])
    found, vectors = jnp.linalg.eigh(mirrored(largest * matrix * largest), symmetrize_input=False)

    def inverted(damping: Scalar) -> tuple[Float[Array, " m"], Bool[Array, ""]]:
        values, kept, told = kept_of(found, damping)
        return reciprocal(values, kept, damping), told

    undamped, _ = inverted(jnp.zeros((), found.dtype))

    def at(damping: Scalar) -> Decomposed:
        with_damping, told = inverted(twice(damping, largest))
        return Decomposed(vectors, with_damping, undamped, unit, told)

    return at


class _Lifted(NamedTuple):
    """A system for one right-hand side, in the coordinates in which its matrix was factored.

    Attributes:
        begin: the part of the solution that is known before any coordinates.
        target: the value that ``into(y) + shift c`` must reach, with ``y = begin + out(c)``.
        rest: the residual of ``begin`` in the target.
        out: from coordinates to their part of the solution.
        into: from a solution back to coordinates.
        shift: the damping term in coordinates.
        solve: the inverse of ``into(out) + shift``.
        size: from a residual in coordinates to about the size of the residual of the system.
        left: the residual of the system, from ``into(y)`` and y.
    """

    begin: Float[Array, " p"]
    target: Float[Array, " m"]
    rest: Float[Array, " m"]
    out: Callable[[Float[Array, " m"]], Float[Array, " p"]]
    into: Callable[[Float[Array, " p"]], Float[Array, " m"]]
    shift: Scalar
    solve: Map
    size: Callable[[Float[Array, " m"]], Scalar]
    left: Callable[[Float[Array, " m"], Float[Array, " p"]], Float[Array, " p"]]


def _lifted(system: System, b: Float[Array, " p"]) -> _Lifted:
    """The coordinates are y itself if F was factored, and those in the rows, of the part in their span, if ``X X^T`` was.

    ``b = X^T e + r`` gives ``y = X^T c + r / damping`` with ``(X X^T + damping I) c = e - X r / damping``, exactly, for any
    ``e``. The ``e`` with the smallest ``r`` is the same for all dampings.
    """
    factored, rows, size = cast("ManyTimes", system.factored), system.rows, length(b)
    if rows is None:
        nothing, none = jnp.zeros_like(b), jnp.zeros((), b.dtype)
        of_rest: Callable[[Array], Scalar] = lambda rest: length(rest) / size  # noqa: E731
        return _Lifted(nothing, b, b, lambda c: c, system.product, none, system.solve, of_rest, lambda image, _: b - image)
    damping, told = system.damping, factored.told
    share = jnp.where(told, 1 / jnp.where(told, damping, 1), 0)
    e = factored.at_zero(rows.into(b))
    outside = b - rows.out(e)
    return _Lifted(
        begin=share * outside,
        target=e,
        rest=e - share * rows.into(outside),
        out=rows.out,
        into=rows.into,
        shift=damping,
        solve=factored.apply,
        size=lambda rest: factored.size(rest) / size,
        left=lambda image, y: b - rows.out(image) - damping * y,
    )


class _State(NamedTuple):
    """The state of the refinement.

    Attributes:
        c: the coordinates of the solution.
        y: the solution.
        image: ``into(y)``.
        rest: the residual in the target.
        size: its size, relative to the right-hand side.
        before: the size before the last correction.
        steps: the number of corrections.
    """

    c: Float[Array, " m"]
    y: Float[Array, " p"]
    image: Float[Array, " m"]
    rest: Float[Array, " m"]
    size: Scalar
    before: Scalar
    steps: Int[Array, ""]


def _refined(system: System, settled: Map, b: Float[Array, " p"]) -> tuple[Array, tuple[Array, Scalar]]:
    """The solution, its residual, and the size of its residual in coordinates."""
    at, eps = _lifted(system, b), jnp.finfo(b.dtype).eps

    def step(state: _State) -> _State:
        more = at.solve(state.rest)
        c, y = state.c + more, state.y + at.out(more)
        # Alternate between two roundings, so that a correction is not measured by the residual that it was made from.
        times = jnp.where(state.steps % 2 == 0, OTHER, 1).astype(b.dtype)
        image = at.into(times * settled(y)) * (1 / times)
        rest = at.target - image - at.shift * c
        return _State(c, y, image, rest, at.size(rest), state.size, state.steps + 1)

    def going(state: _State) -> Bool[Array, ""]:
        gaining = (state.size > 100 * eps) & (state.size < 0.5 * state.before)
        return (state.steps == 0) | (gaining & (state.steps < CORRECTIONS))

    nothing, far = jnp.zeros_like(at.target), jnp.asarray(jnp.inf, b.dtype)
    begin = _State(nothing, at.begin, nothing, at.rest, far, far, jnp.zeros((), jnp.int32))
    end = while_loop(going, step, begin)
    return end.y, (at.left(end.image, settled(end.y)), end.size)


def _solved(system: System, v: Float[Array, " p"]) -> Solved:
    """The refined solution of a system, and its measurements."""
    b, _, to_x, to_rest, settled = scaled(system.units, v)

    def iterate(_: Map, b: Array) -> tuple[Array, Any]:
        return _refined(system, settled, b)

    y, (rest, size) = jax.lax.stop_gradient(_refined(system, settled, b))
    # The residual in coordinates does not see the rounding of the matrix; what is left of it is about its rounding error. The
    # rounding error of the residual of the system is at most of the order of both sizes.
    sound = length(rest) + 4 * (length(rest) + 2 * size * length(b)) <= jnp.finfo(b.dtype).eps ** 0.5 * length(b)
    same = jax.tree_util.Partial(lambda y: y)
    y = with_derivatives_of(y, same, linear_solve(system.product, b, iterate)[0])
    return Solved(to_x(y), to_rest(rest), system.rank, sound & system.factored.told)


PATH = Factorise(_by_eigenvectors, _solved)
"""One eigendecomposition for all dampings. Solutions that it cannot find, as at a damping of zero, are not called sound."""
