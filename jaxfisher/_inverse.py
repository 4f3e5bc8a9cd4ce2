r"""Small dense linear algebra behind every exact route: a symmetric matrix plus damping, inverted as well as the dtype allows.

One rule for all routes. Where the Cholesky factor is well posed, Cholesky; otherwise an eigendecomposition. Either is refined
against the unrounded matrix. A damping that is zero, or too small beside the matrix for its dtype to tell, leaves out the
directions whose eigenvalues are zero to rounding: the minimum-norm solution. What is zero to rounding is decided after the
matrix was scaled to a unit diagonal, so that a parameter in other units is not taken for a null direction. Which of these it
was is not hidden: the rank and the residual of the answer are reported.

Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), theorem 10.7 (Demmel: Cholesky and unit diagonals).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._linalg import cholesky, eigenvalues, kept_of, matmul, mirrored, norm, null_basis, unit_diagonal, without_noise
from jaxfisher._varying import cond, linear_solve, while_loop


class SolveInfo(NamedTuple):
    """How a solve went; read it, nothing depends on it.

    Attributes:
        residual: ``|v - (F + damping I) x| / |v|``. Where the rank is deficient at zero damping it contains the part of ``v``
            that no ``x`` reaches.
        iterations: of an iterative solver; 0 for a direct route.
        converged: an iterative solver's own test; for a direct route, that the answer is finite and its residual below the
            square root of the dtype's eps, or that a minimum-norm solution was asked for (zero damping) and found.
        finite: whether every number of the answer is finite.
        rank: number of directions inverted: p, unless F is singular to rounding and the damping zero, or too small beside F for
            the dtype to tell.
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
    """

    x: Any
    rest: Any
    rank: Int[Array, ""]


class Inverse(NamedTuple):
    """A damped matrix, inverted: by its Cholesky factor where that can be trusted, else as a matrix.

    Attributes:
        factor: the lower Cholesky factor, or the (pseudo-)inverse itself.
        by_cholesky: which of the two ``factor`` is.
        rank: number of directions inverted.
        damped: whether the damping could be told from zero; where not, this is the pseudo-inverse of the matrix.
    """

    factor: Float[Array, "m m"]
    by_cholesky: Bool[Array, ""]
    rank: Int[Array, ""]
    damped: Bool[Array, ""]

    def apply(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """``(matrix + damping I)^+ b``, as well as one application of the factors does it; see `refined`."""
        return cond(
            self.by_cholesky,
            lambda: jax.scipy.linalg.cho_solve((self.factor, True), b),
            lambda: matmul(self.factor, b),
        )


def invert(matrix: Float[Array, "m m"], damping: Scalar) -> Inverse:
    """Factor ``matrix + damping I`` in the way that can be trusted; only that one runs. Only the upper triangle is read."""
    size = matrix.shape[0]
    damped = matrix + damping * jnp.eye(size, dtype=matrix.dtype)
    factor = cholesky(damped)
    well_posed, told = _trusted(factor, jnp.diagonal(damped), damping)

    def by_cholesky() -> Inverse:
        return Inverse(factor, jnp.asarray(True), jnp.asarray(size, jnp.int32), told)

    def by_eigenvectors() -> Inverse:
        return Inverse(*_pseudo_inverse(mirrored(matrix), damping, told), told)

    return cond(well_posed, by_cholesky, by_eigenvectors)


def _trusted(
    factor: Float[Array, "m m"], diagonal: Float[Array, " m"], damping: Scalar
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether a Cholesky factor of a damped matrix with this diagonal is well posed; whether the damping is told from zero."""
    eps = jnp.finfo(factor.dtype).eps
    # Written so that a NaN is told: it must not be taken for zero.
    told = ~(jnp.abs(damping) <= eps * jnp.max(jnp.abs(diagonal), initial=0.0))
    # What a pivot is of its diagonal entry does not depend on units. With damping it may come down to the rounding error of one
    # entry; without, to that of the whole matrix.
    share = jnp.square(jnp.diagonal(factor)) / diagonal
    return jnp.all(share > jnp.where(told, eps, factor.shape[0] * eps)), told


def log_determinant(matrix: Float[Array, "m m"], damping: Scalar) -> Scalar:
    """``log det (matrix + damping I)``, from pivots where they can be trusted: each is right to a few digits of its own.

    Small eigenvalues are right only to digits of the largest. Only the upper triangle is read.
    """
    damped = matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    factor = cholesky(damped)
    well_posed, _ = _trusted(factor, jnp.diagonal(damped), damping)
    by_pivots: Scalar = cond(
        well_posed,
        lambda: 2 * jnp.sum(jnp.log(jnp.diagonal(factor))),
        lambda: jnp.sum(jnp.log(eigenvalues(matrix) + damping)),
    )
    return by_pivots


class Decomposed(NamedTuple):
    """A matrix by its eigenvectors, inverted at one damping: what `Inverse` is, for a path of dampings."""

    vectors: Float[Array, "m m"]
    inverted: Float[Array, " m"]
    rank: Int[Array, ""]
    damped: Bool[Array, ""]

    def apply(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """``(matrix + damping I)^+ b``."""
        return matmul(self.vectors, self.inverted * matmul(self.vectors.T, b))


Factorise = Callable[[Float[Array, "m m"]], Callable[[Scalar], Inverse | Decomposed]]
"""From a matrix, given by its upper triangle, to its inverse at any damping."""


def by_invert(matrix: Float[Array, "m m"]) -> Callable[[Scalar], Inverse]:
    """A factorisation for each damping, the way that can be trusted: `invert`."""
    return partial(invert, matrix)


def by_eigenvectors(matrix: Float[Array, "m m"]) -> Callable[[Scalar], Decomposed]:
    """One eigendecomposition for all dampings. What counts as zero without damping depends on the units here."""
    found, vectors = jnp.linalg.eigh(mirrored(matrix), symmetrize_input=False)

    def at(damping: Scalar) -> Decomposed:
        values, kept, told = kept_of(found, damping)
        inverted = _inverted(values, kept, damping)
        return Decomposed(vectors, inverted, jnp.sum(kept, dtype=jnp.int32), told)

    return at


def _pseudo_inverse(
    matrix: Float[Array, "m m"], damping: Scalar, told: Bool[Array, ""]
) -> tuple[Float[Array, "m m"], Bool[Array, ""], Int[Array, ""]]:
    """``(matrix + damping I)^-1``, or ``matrix^+`` where no damping is told; that it is no Cholesky factor; and the rank.

    Without damping the null space ``N'`` is found of ``M' = s M s`` with a unit diagonal; that of the matrix is ``s N'``. Any
    ``G`` with ``M G M = M``, such as ``s M'^+ s``, gives ``M^+ = P G P`` with ``P`` the projection off the null space.
    """
    unit = jnp.where(told, 1, unit_diagonal(matrix))
    damping = jnp.where(told, damping, 0)
    values, vectors = jnp.linalg.eigh(matrix * unit[:, None] * unit[None, :], symmetrize_input=False)
    values, kept, _ = kept_of(values, damping)
    inverted = _inverted(values, kept, damping)
    scaled = unit[:, None] * vectors
    null = null_basis(scaled, kept)
    scaled = scaled - matmul(null, matmul(null.T, scaled))
    return matmul(scaled * inverted[None, :], scaled.T), jnp.asarray(False), jnp.sum(kept, dtype=jnp.int32)


def _inverted(values: Float[Array, " m"], kept: Bool[Array, " m"], damping: Scalar) -> Float[Array, " m"]:
    """``1 / (values + damping)`` of what is kept, else zero."""
    # What is negative within rounding may outweigh a small damping: the inverse would have a wrong sign there.
    values = jnp.where(values < 0, without_noise(values), values)
    return jnp.where(kept, 1 / jnp.where(kept, values + damping, 1), 0)


class _Refining(NamedTuple):
    """A solution and its residual, the last direction and its image, and what stops it."""

    x: Array
    r: Array
    p: Array
    q: Array
    steps: Array
    going: Array


Map = Callable[[Float[Array, " m"]], Float[Array, " m"]]


def refined(solve: Map, product: Map, b: Float[Array, " m"]) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """``solve(b)``, refined against ``product``, the operator that ``solve`` inverts; and the residual ``b - product(x)``.

    Where the solve factored a rounded matrix, such as ``X X^T``, the product should be the unrounded one, by way of ``X``: that
    also mends the rounding of the matrix, which is most of the error (a hundredfold in float32). One refinement does where the
    rounded matrix is near. Where the damping is down at its rounding it is not, and up to thirty directions are tried, each as
    far as makes the residual smallest, their images orthogonal to the one before (conjugate residuals): that cannot diverge,
    and stops where nothing is gained, as in a null space. Derivatives are those of the solution.

    Reference: Higham (2002), chapter 12; Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 6.20.
    """
    enough = 100 * jnp.finfo(b.dtype).eps

    def iterate(product: Map, b: Array) -> tuple[Array, Array]:
        def step(state: _Refining) -> _Refining:
            z = solve(state.r)
            image = product(z)
            back = _ratio(jnp.vdot(image, state.q), jnp.vdot(state.q, state.q))
            # Where little is left of an image, most of that is rounding.
            back = jnp.where(norm(image - back * state.q) > 0.1 * norm(image), back, 0)
            p, q = z - back * state.p, image - back * state.q
            length = _ratio(jnp.vdot(state.r, q), jnp.vdot(q, q))
            # A plain refinement where that does, which rounds less.
            length = jnp.where(jnp.abs(length - 1) < 0.01, 1, length)
            r = state.r - length * q
            size = norm(r)
            gained = (size > enough) & (size < 0.95 * norm(state.r)) & (state.steps < 30)
            return _Refining(state.x + length * p, r, p, q, state.steps + 1, gained | (state.steps < 1))

        zero = jnp.zeros_like(b)
        begin = _Refining(zero, b, zero, zero, jnp.zeros((), jnp.int32), jnp.asarray(True))
        x = while_loop(lambda state: state.going, step, begin).x
        return x, b - product(x)

    # Inner products of tiny vectors would vanish.
    length = norm(b)
    length = jnp.where(length > 0, length, 1)
    x, residual = linear_solve(product, b / length, iterate)
    return x * length, residual * length


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    """``a / b``, zero where ``b`` is."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


def direct_info(
    rest: Float[Array, " p"], v: Float[Array, " p"], x: Float[Array, " p"], damping: Scalar, rank: Int[Array, ""]
) -> SolveInfo:
    """The report of a direct route, from the flat vectors of a `Solved`."""
    # Both norms at once: sums over long vectors are what compiles slowly.
    left, size = jax.vmap(norm)(jnp.stack([rest, v]))
    relative = left / jnp.where(size > 0, size, 1)
    finite = jnp.all(jnp.isfinite(x))
    small = relative <= jnp.sqrt(jnp.finfo(x.dtype).eps)
    least_norm = (damping == 0) & (rank < x.size)
    return SolveInfo(relative, jnp.zeros((), jnp.int32), finite & (small | least_norm), finite, rank, jnp.asarray(False))
