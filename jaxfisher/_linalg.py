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
from jaxtyping import Array, Bool, Float, Int, Scalar

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


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
    """

    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    finite: Bool[Array, ""]
    rank: Int[Array, ""]
    indefinite: Bool[Array, ""]


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
        return jax.lax.cond(
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

    return jax.lax.cond(well_posed, by_cholesky, by_eigenvectors)


def _trusted(
    factor: Float[Array, "m m"], diagonal: Float[Array, " m"], damping: Scalar
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether a Cholesky factor of a damped matrix with this diagonal is well posed; whether the damping is told from zero."""
    eps = jnp.finfo(factor.dtype).eps
    # Written so that a NaN is told: it must not be taken for zero.
    told = ~(jnp.abs(damping) <= eps * jnp.max(jnp.abs(diagonal)))
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
    by_pivots: Scalar = jax.lax.cond(
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
        values, kept, told = _resolved(found, damping)
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
    unit = jnp.where(told, 1, _unit_diagonal(matrix))
    damping = jnp.where(told, damping, 0)
    values, vectors = jnp.linalg.eigh(matrix * unit[:, None] * unit[None, :], symmetrize_input=False)
    values, kept, _ = _resolved(values, damping)
    inverted = _inverted(values, kept, damping)
    scaled = unit[:, None] * vectors
    null = _null_basis(scaled, kept)
    scaled = scaled - matmul(null, matmul(null.T, scaled))
    return matmul(scaled * inverted[None, :], scaled.T), jnp.asarray(False), jnp.sum(kept, dtype=jnp.int32)


def _inverted(values: Float[Array, " m"], kept: Bool[Array, " m"], damping: Scalar) -> Float[Array, " m"]:
    """``1 / (values + damping)`` of what is kept, else zero."""
    # What is negative within rounding may outweigh a small damping: the inverse would have a wrong sign there.
    values = jnp.where(values < 0, _without_noise(values), values)
    return jnp.where(kept, 1 / jnp.where(kept, values + damping, 1), 0)


def _without_noise(values: Float[Array, " m"]) -> Float[Array, " m"]:
    """Eigenvalues, zero where the rounding error of the whole decomposition could have made them."""
    noise = values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), initial=0.0)
    return jnp.where(jnp.abs(values) <= noise, 0, values)


def _unit_diagonal(matrix: Float[Array, "m m"]) -> Float[Array, " m"]:
    """The factors that scale a matrix to a unit diagonal; one where it is zero."""
    variances = jnp.diagonal(matrix)
    return jnp.where(variances > 0, jax.lax.rsqrt(jnp.where(variances > 0, variances, 1)), 1)


def _null_basis(vectors: Float[Array, "m m"], kept: Bool[Array, " m"]) -> Float[Array, "m m"]:
    """Orthonormal columns that span those vectors which are not kept, and then zeros."""
    # The first columns of Q span the first columns of what was factored.
    basis = jnp.linalg.qr(vectors[:, jnp.argsort(kept, stable=True)])[0]
    return jnp.where(jnp.arange(kept.size)[None, :] < jnp.sum(~kept), basis, 0)


def unit_rank(matrix: Float[Array, "m m"]) -> Int[Array, ""]:
    """The rank of a symmetric matrix, decided after it is scaled to a unit diagonal."""
    unit = _unit_diagonal(matrix)
    values = jnp.linalg.eigvalsh(matrix * unit[:, None] * unit[None, :])
    return jnp.sum(_resolved(values, jnp.zeros((), matrix.dtype))[1], dtype=jnp.int32)


def null_vectors(matrix: Float[Array, "m m"]) -> Float[Array, "m k"]:
    """Orthonormal columns that span the null space, decided as `unit_rank` does. Not under ``jit``: k depends on the values."""
    unit = _unit_diagonal(matrix)
    values, vectors = jnp.linalg.eigh(matrix * unit[:, None] * unit[None, :])
    _, kept, _ = _resolved(values, jnp.zeros((), matrix.dtype))
    return _null_basis(unit[:, None] * vectors, kept)[:, : int(jnp.sum(~kept))]


def mirrored(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric matrix with this upper triangle."""
    # Looked up: an entry and its mirror image are then one expression at one place, the same to the last bit whatever that is
    # fused with. Sums of, and choices between, two triangles are not, and the latter jax 0.10 takes minutes to compile.
    rows, columns = jnp.indices(upper.shape)
    return upper.at[jnp.minimum(rows, columns), jnp.maximum(rows, columns)].get(mode="promise_in_bounds")


@jax.custom_jvp
def cholesky(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The lower Cholesky factor of the symmetric matrix with this upper triangle.

    LAPACK wants columns, and the lower triangle of the transpose is the upper one: no copy is made.
    """
    return jax.lax.linalg.cholesky(upper.T, symmetrize_input=False)


@cholesky.defjvp
def _cholesky_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX's rule reads both triangles of the tangent.
    whole, change = mirrored(primals[0]), mirrored(tangents[0])
    result: tuple[Array, Array] = jax.jvp(lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False), (whole,), (change,))
    return result


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
        x = jax.lax.while_loop(lambda state: state.going, step, begin).x
        return x, b - product(x)

    # Inner products of tiny vectors would vanish.
    length = norm(b)
    length = jnp.where(length > 0, length, 1)
    x, residual = jax.lax.custom_linear_solve(product, b / length, iterate, symmetric=True, has_aux=True)
    return x * length, residual * length


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    """``a / b``, zero where ``b`` is."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


def _resolved(values: Float[Array, " m"], damping: Scalar) -> tuple[Float[Array, " m"], Bool[Array, " m"], Bool[Array, ""]]:
    """Eigenvalues, zero where inside rounding error; which directions to keep; whether the damping is told from zero."""
    largest = jnp.max(jnp.abs(values), initial=0.0)
    values = resolved(values, damping, largest, values.shape[0])
    told = ~(jnp.abs(damping) <= jnp.finfo(values.dtype).eps * largest)
    return values, told | (values != 0), told


def resolved(values: Float[Array, "..."], damping: Scalar, largest: Scalar, size: int) -> Float[Array, "..."]:
    """Eigenvalues of a matrix of this size and largest eigenvalue, zero where inside rounding error.

    With damping that is the rounding error of one eigenvalue; without, a direction needs an eigenvalue above the error of the
    whole decomposition, ``size eps largest``, the convention of `numpy.linalg.matrix_rank`.
    """
    eps = jnp.finfo(values.dtype).eps
    cut = jnp.where(jnp.abs(damping) > eps * largest, eps, size * eps) * largest
    # Written so that a NaN eigenvalue stays NaN.
    return jnp.where(jnp.abs(values) <= cut, 0, values)


def eigenvalues(matrix: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Ascending eigenvalues of a symmetric matrix given by its upper triangle, those inside rounding error set to zero.

    A positive one counts from the rounding error of one eigenvalue on, since a damping may; a negative one, which a Fisher does
    not have, from that of the whole decomposition on.
    """
    values = jnp.linalg.eigvalsh(mirrored(matrix), symmetrize_input=False)
    values = _resolved(values, jnp.asarray(jnp.inf, matrix.dtype))[0]
    return jnp.where(values < 0, _without_noise(values), values)


def spectral_mv(matrix: Float[Array, "m m"], v: Float[Array, " m"], power: Scalar, damping: Scalar) -> Float[Array, " m"]:
    """``(matrix + damping I)^power v``; at zero damping only along directions in which the matrix is not zero."""
    values, vectors = jnp.linalg.eigh(mirrored(matrix), symmetrize_input=False)
    values, kept, _ = _resolved(values, damping)
    powers = jnp.where(kept, jnp.where(kept, values + damping, 1) ** power, 0)
    return matmul(vectors, powers * matmul(vectors.T, v))


def to_unit(*sizes: Scalar) -> Scalar:
    """The factor that brings the largest of these sizes to one, so that squares of what it multiplies stay in the dtype.

    It is applied twice rather than squared, and as a product: XLA turns ``x / s / s`` into ``x / (s s)``, which may overflow.
    """
    largest = jnp.max(jnp.stack(sizes))
    # A NaN or an infinity is left to show itself in the result.
    return jnp.where(largest > jnp.finfo(largest.dtype).tiny, 1 / largest, 1)


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The power of two next below each number above zero: a product with it rounds nothing. No derivative goes through it."""
    x = jax.lax.stop_gradient(x)
    # Twice the mantissa is in [1, 2), and the quotient exact.
    return x / (2 * jnp.frexp(x)[0])


def norm(x: Float[Array, " m"]) -> Scalar:
    """Euclidean norm, without overflow or underflow on the way."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    safe = jnp.where(largest > 0, largest, 1)
    return safe * jnp.sqrt(jnp.sum(jnp.square(x / safe)))


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
