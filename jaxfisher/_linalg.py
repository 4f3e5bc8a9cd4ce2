"""Small dense linear algebra: products, norms that do not overflow, symmetric matrices from one triangle, their eigenvalues.

One function decides for all which eigenvalues count as zero: `resolved`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._tree import HIGHEST, at_least_float32

matmul = partial(jnp.matmul, precision=HIGHEST)


def batched(x: Float[Array, "groups i j"], y: Float[Array, "groups j k"], along: tuple[int, int] = (2, 1)) -> Array:
    """The products of several pairs of matrices, contracted along one axis of each: one operation, where `matmul` reshapes."""
    contracted = ((along[0],), (along[1],)), ((0,), (0,))
    return jax.lax.dot_general(x, y, contracted, precision=HIGHEST)


def row_times(row: Float[Array, "groups 1 j"], y: Float[Array, "groups j k"]) -> Float[Array, "groups 1 k"]:
    """The products of rows and matrices, written as sums, which compile in a twentieth of the time on a CPU and run as fast."""
    return jnp.sum(row.swapaxes(1, 2) * y, 1, keepdims=True)


def diagonals(x: Float[Array, "groups m m"]) -> Float[Array, "groups m"]:
    """The diagonals of several matrices."""
    # A strided slice compiles in half the time of a masked sum.
    return x.reshape(x.shape[0], -1)[:, :: x.shape[-1] + 1]


def without_noise(values: Float[Array, " m"]) -> Float[Array, " m"]:
    """The eigenvalues, with those within the rounding error of the whole decomposition set to zero."""
    noise = values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), initial=0.0)
    return _zero_where(jnp.abs(values) <= noise, values)


def _zero_where(which: Bool[Array, "..."], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """The values, zero at some places with their derivatives: a zero eigenvalue of a Fisher has a second derivative."""
    return values - jnp.where(which, jax.lax.stop_gradient(values), 0)


def unit_diagonal(diagonal: Float[Array, " m"]) -> Float[Array, " m"]:
    """The powers of two that scale a matrix with this diagonal to a diagonal between 1/2 and 2."""
    there, tiny = diagonal > 0, jnp.finfo(diagonal.dtype).tiny
    unit = power_of_two(jax.lax.rsqrt(jnp.where(there, diagonal, 1)))
    # The unit of a zero diagonal entry is unknown: take the smallest of the others, so that its row does not dominate.
    return jnp.where(there, unit, jnp.min(jnp.where(there, unit, jnp.max(unit, initial=0.0)), initial=1 / tiny))


def unit_rank(matrix: Float[Array, "m m"]) -> Int[Array, ""]:
    """The rank of a symmetric matrix, decided after it is scaled to a unit diagonal."""
    unit = unit_diagonal(jnp.diagonal(matrix))
    values = jnp.linalg.eigvalsh(matrix * unit[:, None] * unit[None, :])
    return jnp.sum(kept_of(values, jnp.zeros((), matrix.dtype))[1], dtype=jnp.int32)


def null_vectors(matrix: Float[Array, "m m"]) -> Float[Array, "m k"]:
    """Orthonormal columns that span the null space, decided as `unit_rank` does. Not under ``jit``: k depends on the values."""
    if isinstance(matrix, jax.core.Tracer):
        raise TypeError(
            "null_space: the number of its vectors depends on the values of F, which are unknown under jit, vmap and grad. "
            "Call it outside of these. Inside, F.rank() counts the directions that F determines."
        )
    unit = unit_diagonal(jnp.diagonal(matrix))
    values, vectors = jnp.linalg.eigh(matrix * unit[:, None] * unit[None, :])
    _, kept, _ = kept_of(values, jnp.zeros((), matrix.dtype))
    # The first columns of Q span the first columns of the factored matrix: the null vectors, sorted to the front.
    order = jnp.argsort(kept, stable=True)
    return jnp.linalg.qr(unit[:, None] * vectors[:, order])[0][:, : int(jnp.sum(~kept))]


def mirrored(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric matrix with this upper triangle."""
    # Both entries of a pair are read from the same place, so they agree to the last bit, whatever XLA fuses the lookup with. A
    # sum of two triangles does not ensure that, nor does a `where` of them, which also takes jax 0.10 minutes to compile.
    rows, columns = jnp.indices(upper.shape)
    return upper.at[jnp.minimum(rows, columns), jnp.maximum(rows, columns)].get(mode="promise_in_bounds")


@jax.custom_jvp
def cholesky(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The lower Cholesky factor of the symmetric matrix with this upper triangle.

    LAPACK stores matrices by columns, so the lower triangle of the transpose is this upper one: no copy is made.
    """
    return jax.lax.linalg.cholesky(upper.T, symmetrize_input=False)


@cholesky.defjvp
def _cholesky_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX's rule reads both triangles of the tangent.
    whole, change = mirrored(primals[0]), mirrored(tangents[0])
    result: tuple[Array, Array] = jax.jvp(lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False), (whole,), (change,))
    return result


def kept_of(values: Float[Array, " m"], damping: Scalar) -> tuple[Float[Array, " m"], Bool[Array, " m"], Bool[Array, ""]]:
    """The eigenvalues, zero within rounding error; the directions to keep; whether the damping is above rounding error."""
    largest = jnp.max(jnp.abs(values), initial=0.0)
    values = resolved(values, damping, largest, values.shape[0])
    told = ~(jnp.abs(damping) <= jnp.finfo(values.dtype).eps * largest)
    return values, told | (values != 0), told


def resolved(values: Float[Array, "..."], damping: Scalar, largest: Scalar, size: int) -> Float[Array, "..."]:
    """Eigenvalues of a matrix of this size and largest eigenvalue, with those within rounding error set to zero.

    With damping the rounding error is that of one eigenvalue, ``eps largest``. Without damping it is the error of the whole
    decomposition, ``size eps largest``, the convention of `numpy.linalg.matrix_rank`.
    """
    eps = jnp.finfo(values.dtype).eps
    cut = jnp.where(jnp.abs(damping) > eps * largest, eps, size * eps) * largest
    # A NaN eigenvalue stays NaN.
    return _zero_where(jnp.abs(values) <= cut, values)


@jax.custom_jvp
def spectrum(matrix: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Ascending eigenvalues of a symmetric matrix. Symmetric functions of them have right derivatives at equal eigenvalues."""
    return jnp.linalg.eigvalsh(matrix, symmetrize_input=False)


@spectrum.defjvp
def _spectrum_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    values, vectors = pairs_of_rule(*primals)
    return values, jnp.sum(vectors * matmul(*tangents, vectors), 0)


def pairs_of_rule(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """The eigenpairs for a rule of a first derivative that holds at equal eigenvalues. Further derivatives are NaN at these.

    Equal ones that are zero are left as they are: a Fisher has no negative eigenvalues, so its zeros have derivatives of zero.
    """
    return _in_rule(*jnp.linalg.eigh(jax.lax.stop_gradient(matrix), symmetrize_input=False), matrix)


@jax.custom_jvp
def _in_rule(values: Array, vectors: Array, matrix: Array) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    return values, vectors


@_in_rule.defjvp
def _in_rule_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, vectors = _in_rule(*primals)
    change, apart = matmul(vectors.T, matmul(tangents[2], vectors)), are_apart(values)
    small = jnp.abs(values) <= values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), initial=0.0)
    settled = jnp.eye(values.shape[0], dtype=bool) | (small[:, None] & small[None, :])
    gaps = jnp.where(settled, 1, jnp.where(apart, values[None, :] - values[:, None], jnp.nan))
    return (values, vectors), (jnp.diagonal(change), matmul(vectors, jnp.where(settled, 0, change / gaps)))


@jax.custom_jvp
def eigenpairs(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Ascending eigenvalues of a symmetric matrix, and eigenvectors.

    The eigenvectors of equal eigenvalues are any basis of their space, and their derivative does not turn them within it. So a
    function of them has a derivative only if it does not depend on the choice of basis.
    """
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@eigenpairs.defjvp
def _eigenpairs_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, vectors = pairs_of_rule(*primals)
    change = matmul(vectors.T, matmul(*tangents, vectors))
    gaps, apart = values[None, :] - values[:, None], are_apart(values)
    turned = jnp.where(apart, change / jnp.where(apart, gaps, 1), 0)
    return (values, vectors), (jnp.diagonal(change), matmul(vectors, turned))


def are_apart(values: Float[Array, " m"]) -> Bool[Array, "m m"]:
    """Whether two eigenvalues differ by more than their rounding errors, by which a derivative would be divided."""
    gaps = jnp.abs(values[None, :] - values[:, None])
    return gaps > jnp.finfo(values.dtype).eps ** 0.5 * jnp.max(jnp.abs(values), initial=0.0)


def unit_root(matrix: Float[Array, "m m"], negative: float) -> Float[Array, "m m"]:
    """``R`` with ``R R^T`` equal to a positive semi-definite matrix.

    The root of an eigenvalue that is negative beyond rounding is the number ``negative``. The diagonal is scaled to one first,
    so that the threshold for rounding does not depend on the units of the entries. Derivatives are right at equal eigenvalues,
    and at eigenvalues that are zero and stay zero.
    """
    eps = float(jnp.finfo(matrix.dtype).eps)
    wide = matrix.astype(at_least_float32(matrix.dtype))  # there is no eigh below float32
    size = jnp.abs(jnp.diagonal(wide))
    scale = jnp.sqrt(jnp.where(size > 0, size, 1))
    root = _symmetric_root(wide / scale[:, None] / scale[None, :], negative, eps)
    return (scale[:, None] * root).astype(matrix.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _symmetric_root(matrix: Float[Array, "m m"], negative: float, eps: float) -> Float[Array, "m m"]:
    vectors, roots = _roots(matrix, negative, eps)
    return matmul(vectors * roots[None, :], vectors.T)


@_symmetric_root.defjvp
def _symmetric_root_jvp(negative: float, eps: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """``R dR + dR R = dM`` in the basis of the eigenvectors. Between two roots that are zero the derivative is set to zero."""
    vectors, roots = _roots(*primals, negative, eps)
    sums = roots[:, None] + roots[None, :]
    change = matmul(vectors.T, matmul(*tangents, vectors))
    change = jnp.where(sums == 0, 0, change / jnp.where(sums == 0, 1, sums))
    return _symmetric_root(*primals, negative, eps), matmul(vectors, matmul(change, vectors.T))


def _roots(matrix: Float[Array, "m m"], negative: float, eps: float) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """Eigenvectors of a matrix, and the roots of its eigenvalues; the root is zero for an eigenvalue within rounding error."""
    values, vectors = eigenpairs(mirrored(matrix))
    rounding = values.size * eps * jnp.max(jnp.abs(values), initial=0)
    seen = values > rounding
    roots = jnp.where(seen, jnp.sqrt(jnp.where(seen, values, 1)), jnp.where(values < -10 * rounding, negative, 0))
    return vectors, jnp.where(jnp.isnan(values), values, roots)


def eigenvalues(matrix: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Ascending eigenvalues of a symmetric matrix given by its upper triangle, those within rounding error set to zero.

    For positive eigenvalues that is the rounding error of one eigenvalue, as for a damping. For negative ones, which a Fisher
    does not have, it is that of the whole decomposition.
    """
    values = spectrum(mirrored(matrix))
    largest = jnp.max(jnp.abs(values), initial=0.0)
    values = resolved(values, largest, largest, values.size)
    return jnp.where(values < 0, without_noise(values), values)


def to_unit(*sizes: Scalar) -> Scalar:
    """The power of two that brings the largest of these sizes near one, so that squares of scaled numbers do not overflow.

    Apply the factor twice rather than squared, and as a product: XLA turns ``x / s / s`` into ``x / (s s)``, which may
    overflow. Callers undo the scaling, so no result depends on the factor, and no derivative goes through it.
    """
    sizes_together = jax.lax.stop_gradient(jnp.stack(sizes))
    # No multiple of zero is near one, so the factor is bounded.
    most = 2.0 ** (jnp.finfo(sizes_together.dtype).maxexp - 52)
    # The minimum comes last, since XLA computes it once, and would recompute a quotient wherever the factor is used. A NaN or
    # an infinity is passed on, to appear in the result.
    return jnp.min(power_of_two(1 / jnp.maximum(sizes_together, 1 / most)))


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The power of two nearest to each number. A product with it has no rounding error. No derivative goes through it."""
    return jax.lax.reduce_precision(jax.lax.stop_gradient(x), jnp.finfo(x.dtype).nexp, 0)


def as_it_is(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same numbers, in a form that XLA does not recognise as a product or quotient."""
    return jnp.where(x == x, x, jnp.nan)  # noqa: PLR0124


def twice(x: Scalar, factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x * factor * factor``, from left to right: for a constant x, XLA would square the factor, which may overflow."""
    return as_it_is(x * factor) * factor


def squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x^2`` of a product or quotient. If it has a constant, XLA would square the factors one by one, which may overflow."""
    return jnp.square(as_it_is(x))


def power_or_one(size: Scalar) -> Scalar:
    """The `power_of_two` of a size, or one if the size is zero."""
    return power_of_two(jnp.where(size > 0, size, 1))


def inverse_power(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``1 / x`` for powers of two, in a form that XLA does not recognise as a quotient.

    XLA would turn products of such quotients into one quotient by a product, which may overflow or underflow.
    """
    return power_of_two(1 / x)


@jax.custom_jvp
def square_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, with a derivative of zero at zero, where the rule of JAX gives NaN even for a tangent of zero."""
    return jnp.sqrt(x)


@square_root.defjvp
def _square_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root, zero = square_root(*primals), primals[0] == 0
    return root, jnp.where(zero, 0, 0.5 * tangents[0] / jnp.where(zero, 1, root))


@jax.custom_jvp
def without_derivative(x: Float[Array, "..."], where: Bool[Array, "..."]) -> Float[Array, "..."]:
    """The same numbers, whose derivative is NaN at some places."""
    return x


@without_derivative.defjvp
def _without_derivative_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    # A product, which stays NaN when it is transposed.
    return without_derivative(*primals), tangents[0] * jnp.where(primals[1], jnp.nan, 1)


def norm(x: Float[Array, " m"]) -> Scalar:
    """The Euclidean norm, without overflow or underflow of the squares; its derivative at zero is zero."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    safe = jnp.where(largest > 0, largest, 1)
    return safe * square_root(jnp.sum(jnp.square(x / safe)))


OTHER = 1.375
"""A number that is no power of two, so that products with it round."""


def in_another_rounding(product: Callable[[Any], Any], x: Any) -> Any:
    """``product(x)`` computed from a multiple of ``x``.

    It differs from ``product(x)`` by rounding errors of the size by which both differ from the true product.
    """
    return jax.tree.map(lambda y: (1 / OTHER) * y, product(jax.tree.map(lambda leaf: OTHER * leaf, x)))
