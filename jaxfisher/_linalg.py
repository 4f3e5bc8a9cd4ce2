r"""Small dense linear algebra behind every exact route: a symmetric matrix plus damping, inverted as well as the dtype allows.

One rule for all routes. With a damping above the rounding error of the matrix and a well-posed Cholesky factor: Cholesky and
one step of refinement. Otherwise an eigendecomposition. A damping that is zero, or too small beside the matrix for its dtype to
tell, leaves out the directions whose eigenvalues are zero to rounding: the minimum-norm solution. Which of these it was is not
hidden: the rank and the residual of the answer are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
    """

    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    finite: Bool[Array, ""]
    rank: Int[Array, ""]


class Inverse(NamedTuple):
    """A damped matrix, factored: by Cholesky where that can be trusted, else by its eigenvectors.

    Attributes:
        factor: the lower Cholesky factor, or the eigenvectors.
        inverted: the inverse eigenvalues of the damped matrix, zero along directions left out; unused with Cholesky.
        by_cholesky: which of the two ``factor`` is.
        rank: number of directions inverted.
        damped: whether the damping could be told from zero; where not, this is the pseudo-inverse of the matrix.
    """

    factor: Float[Array, "m m"]
    inverted: Float[Array, " m"]
    by_cholesky: Bool[Array, ""]
    rank: Int[Array, ""]
    damped: Bool[Array, ""]

    def apply(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """``(matrix + damping I)^+ b``, as well as one application of the factors does it; see `refined`."""
        return jax.lax.cond(
            self.by_cholesky,
            lambda: jax.scipy.linalg.cho_solve((self.factor, True), b),
            lambda: matmul(self.factor, self.inverted * matmul(self.factor.T, b)),
        )


def invert(matrix: Float[Array, "m m"], damping: Scalar) -> Inverse:
    """Factor ``matrix + damping I`` in the way that can be trusted; only that one runs. Only the upper triangle is read."""
    size, eps = matrix.shape[0], jnp.finfo(matrix.dtype).eps
    damped = matrix + damping * jnp.eye(size, dtype=matrix.dtype)
    factor = _cholesky(damped)
    # A pivot or a damping inside the rounding error of the matrix is noise, and so would be what is divided by it.
    rounding = eps * jnp.max(jnp.diagonal(damped))
    well_posed = (damping > rounding) & jnp.all(jnp.square(jnp.diagonal(factor)) > rounding)

    def by_cholesky() -> Inverse:
        nothing = jnp.zeros(size, matrix.dtype)
        return Inverse(factor, nothing, jnp.asarray(True), jnp.asarray(size, jnp.int32), jnp.asarray(True))

    def by_eigenvectors() -> Inverse:
        values, vectors = jnp.linalg.eigh(mirrored(matrix), symmetrize_input=False)
        values, kept, told = _resolved(values, damping)
        inverted = jnp.where(kept, 1 / jnp.where(kept, values + damping, 1), 0)
        return Inverse(vectors, inverted, jnp.asarray(False), jnp.sum(kept, dtype=jnp.int32), told)

    return jax.lax.cond(well_posed, by_cholesky, by_eigenvectors)


def mirrored(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric matrix with this upper triangle."""
    # A choice, not a sum of two triangles: fused into what made the triangle, a sum would be rounded differently in each. The
    # other triangle is cleared first since XLA of jax 0.10 takes minutes, or its stack, to compile a choice between a matrix
    # and its transpose.
    cleared = jnp.triu(upper)
    return jnp.where(jnp.tri(upper.shape[0], k=-1, dtype=bool), cleared.T, cleared)


@jax.custom_jvp
def _cholesky(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The lower Cholesky factor of the symmetric matrix with this upper triangle.

    LAPACK wants columns, and the lower triangle of the transpose is the upper one: no copy is made.
    """
    return jax.lax.linalg.cholesky(upper.T, symmetrize_input=False)


@_cholesky.defjvp
def _cholesky_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX's rule reads both triangles of the tangent.
    whole, change = mirrored(primals[0]), mirrored(tangents[0])
    result: tuple[Array, Array] = jax.jvp(lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False), (whole,), (change,))
    return result


def refined(solve: Callable[[Array], Array], product: Callable[[Array], Array], b: Array) -> Array:
    """``solve(b)`` and one step of iterative refinement against ``product``, the operator that ``solve`` inverts.

    Where the solve factored a rounded matrix, such as ``X X^T``, the product should be the unrounded one, by way of ``X``: that
    also mends the rounding of the matrix, which is most of the error (a hundredfold in float32).
    """
    x = solve(b)
    return x + solve(b - product(x))


def _resolved(values: Float[Array, " m"], damping: Scalar) -> tuple[Float[Array, " m"], Bool[Array, " m"], Bool[Array, ""]]:
    """Eigenvalues, zero where inside rounding error; which directions to keep; whether the damping is told from zero.

    With damping, every direction is kept and the rounding error is that of one eigenvalue; without, a direction needs an
    eigenvalue above the error of the whole decomposition, ``m eps max|value|``, the convention of `numpy.linalg.matrix_rank`.
    """
    eps = jnp.finfo(values.dtype).eps
    largest = jnp.max(jnp.abs(values), initial=0.0)
    told = damping > eps * largest
    cut = jnp.where(told, eps, values.shape[0] * eps) * largest
    # Written so that a NaN eigenvalue stays NaN.
    values = jnp.where(jnp.abs(values) <= cut, 0, values)
    return values, told | (values != 0), told


def eigenvalues(matrix: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Ascending eigenvalues of a symmetric matrix given by its upper triangle, those inside rounding error set to zero."""
    values = jnp.linalg.eigvalsh(mirrored(matrix), symmetrize_input=False)
    return _resolved(values, jnp.asarray(jnp.inf, matrix.dtype))[0]


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


def norm(x: Float[Array, " m"]) -> Scalar:
    """Euclidean norm, without overflow or underflow on the way."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    safe = jnp.where(largest > 0, largest, 1)
    return safe * jnp.sqrt(jnp.sum(jnp.square(x / safe)))


def direct_info(
    residual: Float[Array, " p"], v: Float[Array, " p"], x: Float[Array, " p"], damping: Scalar, rank: Int[Array, ""]
) -> SolveInfo:
    """The report of a direct route, from its residual vector."""
    size = norm(v)
    relative = norm(residual) / jnp.where(size > 0, size, 1)
    finite = jnp.all(jnp.isfinite(x))
    small = relative <= jnp.sqrt(jnp.finfo(x.dtype).eps)
    least_norm = (damping == 0) & (rank < x.size)
    return SolveInfo(relative, jnp.zeros((), jnp.int32), finite & (small | least_norm), finite, rank)
