r"""Powers of symmetric matrices, with derivatives of every order that are right at equal eigenvalues.

In the eigenbasis of A, the derivative of ``f(A)`` along a matrix E has the entries ``f[a_i, a_j] E_ij``, with the divided
difference of f, and each further derivative puts one more matrix between these:

.. math:: \sum_{jk} f[a_i, a_j, a_k]\, D_{ij} E_{jk} + \sum_{jk} f[a_i, a_j, a_k]\, E_{ij} D_{jk}.

No eigenvector is differentiated, whose derivative would be infinite where eigenvalues are equal.

Reference: Higham, Functions of Matrices (2008), theorem 3.11, after Daleckii and Krein; Bhatia, Matrix Analysis (1997), section
X.4, for higher derivatives.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Scalar

from jaxfisher._linalg import kept_of, matmul, mirrored
from jaxfisher._varying import alike, linear_solve


def power_mv(matrix: Float[Array, "m m"], v: Float[Array, " m"], power: Scalar, damping: Scalar) -> Float[Array, " m"]:
    """``(matrix + damping I)^power v``; at zero damping only along directions in which the matrix is not zero.

    Only the upper triangle of the matrix is read.
    """
    matrix = mirrored(matrix)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(matrix), symmetrize_input=False)
    values, kept, _ = kept_of(values, damping)
    # Any damping keeps every direction: an eigenvalue of zero becomes the damping, however small that is.
    points = jnp.where(kept | (damping > 0), values + damping, 0)
    damped = matrix + damping * jnp.eye(len(v), dtype=v.dtype)
    return _applied(0, (points, vectors), damped, (power, damping), v)


def power_of_rows_mv(gram: Float[Array, "m m"], v: Float[Array, " m"], power: Scalar, damping: Scalar) -> Float[Array, " m"]:
    """``h(gram) v`` with ``h(s) = ((s + damping)^power - damping^power) / s``.

    At an eigenvalue of zero h is the derivative of the power, or zero if the damping cannot be told from zero. Only the upper
    triangle is read. For a Gram matrix ``X X^T``, ``X^T h(X X^T) X + damping^power I`` is the power of ``X^T X + damping I``.
    """
    gram = mirrored(gram)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram), symmetrize_input=False)
    eps, largest = jnp.finfo(values.dtype).eps, jnp.max(values)
    points = jnp.where(values > len(v) * eps * largest, values, jnp.where(damping > eps * largest, 0, -1))
    damped = gram + damping * jnp.eye(len(v), dtype=v.dtype)
    return _applied(1, (points, vectors), damped, (power, damping), v)


class _Kind(NamedTuple):
    """Which function, see `_differences`: how often the damping is one of its points, and how often the power is derived by."""

    dampings: int
    logs: int = 0


Eigen = tuple[Float[Array, " m"], Float[Array, "m m"]]
Numbers = tuple[Scalar, Scalar]
"""The power and the damping."""


def _applied(dampings: int, eigen: Eigen, damped: Array, numbers: Numbers, v: Float[Array, " m"]) -> Float[Array, " m"]:
    made = _between(_Kind(dampings), *alike(jax.lax.stop_gradient(eigen), damped, numbers), ())
    return matmul(0.5 * (made + made.T), v)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _between(kind: _Kind, eigen: Eigen, matrix: Array, numbers: Numbers, edges: tuple[Array, ...]) -> Float[Array, "m m"]:
    """The sum over ``i, j, .., k`` of ``f[i, j, .., k] P_i E_1 P_j .. E_r P_k``, and over the orders of the matrices E.

    Here ``P_i`` projects on the eigenvector i of the matrix: it is the derivative of ``f(matrix)`` along all E. Eigenvectors
    are constants. All derivatives are by the matrix that they come from, by the E and by the numbers.
    """
    (points, vectors), (power, damping) = eigen, numbers

    def table(*points: Array) -> Array:
        found: Callable[[Array], Array] = lambda power: _differences(points, power, damping, kind.dampings)  # noqa: E731
        for _ in range(kind.logs):
            found = partial(_derivative, found)
        return found(power)

    inside = [matmul(vectors.T, matmul(edge, vectors)) for edge in edges]
    if not inside:
        return matmul(vectors * table(points)[None, :], vectors.T)
    if len(inside) == 1:
        return matmul(vectors, matmul(table(points[:, None], points[None, :]) * inside[0], vectors.T))
    axes = len(inside)

    def on(x: Array, first: int) -> Array:
        return x.reshape((1,) * first + x.shape + (1,) * (axes - first - x.ndim))

    def row(start: tuple[Array, ...]) -> Float[Array, " m"]:
        point, *given = start
        weights = table(point.reshape((1,) * axes), *(on(points, k) for k in range(axes)))
        orders = itertools.permutations(range(axes))
        chains = ([on(given[first], 0), *(on(inside[k], place) for place, k in enumerate(rest))] for first, *rest in orders)
        sums = (jnp.sum(functools.reduce(jnp.multiply, chain, weights), tuple(range(axes - 1))) for chain in chains)
        return functools.reduce(jnp.add, sums)

    # One row after the other, so that a second derivative takes no more memory than the matrix.
    return matmul(vectors, matmul(jax.lax.map(row, (points, *inside)), vectors.T))


@partial(_between.defjvp, symbolic_zeros=True)
def _between_jvp(kind: _Kind, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    eigen, matrix, numbers, edges = primals
    _, by_matrix, (by_power, by_damping), by_edges = tangents
    moved = [(by_matrix, edges), *((by_edge, (*edges[:k], *edges[k + 1 :])) for k, by_edge in enumerate(by_edges))]
    parts = [_linear(kind, eigen, matrix, numbers, *pair[::-1]) for pair in moved if not _is_zero(pair[0])]
    if not _is_zero(by_power):
        parts.append(by_power * _between(kind._replace(logs=kind.logs + 1), *primals))
    if kind.dampings and not _is_zero(by_damping):
        parts.append(by_damping * kind.dampings * _between(kind._replace(dampings=kind.dampings + 1), *primals))
    return _between(kind, *primals), sum(parts, start=jnp.zeros_like(matrix))


def _linear(
    kind: _Kind, eigen: Eigen, matrix: Array, numbers: Numbers, edges: tuple[Array, ...], moved: Float[Array, "m m"]
) -> Float[Array, "m m"]:
    """`_between` of the edges and one more, in which it is linear and symmetric.

    JAX transposes it by the operations of `_between`, whose derivatives are not those above. A linear solve is transposed as
    it stands: ``[[0, I], [I, -L]] (L e, e) = (e, 0)``.
    """

    # JAX asks that the right-hand side of a solve that it transposes be linear in every entry, in those that are zero too.
    def product(x: tuple[Array, Array]) -> tuple[Array, Array]:
        image = _between(kind, eigen, matrix, numbers, (*edges, x[1]))
        return x[1] + 0 * image, x[0] - image

    def solve(_: Any, b: tuple[Array, Array]) -> tuple[Any, tuple[()]]:
        return (b[1] + _between(kind, eigen, matrix, numbers, (*edges, b[0])), b[0]), ()

    found: Array = linear_solve(product, (moved, 0 * moved), solve)[0][0]
    return found


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _derivative(function: Callable[[Array], Array], at: Array) -> Array:
    found: Array = jax.jvp(function, (at,), (jnp.ones_like(at),))[1]
    return found


def _differences(points: Sequence[Array], power: Scalar, damping: Scalar, dampings: int) -> Array:
    """The divided differences, over these points, of ``x^power``; or of its divided differences from the damping.

    The latter are those over ``x + damping`` for each point, and ``dampings`` times the damping itself: at one point and one
    damping, ``((x + damping)^power - damping^power) / x``. Points below zero stand for zeros at which they count as zero.
    """
    if not dampings:
        return _divided(points, power)
    *_, largest = ordered = _ascending(points)
    at = [jnp.maximum(point, 0) + damping for point in ordered]
    inside, left_out = _divided([*at, *(jnp.full_like(largest, damping),) * dampings], power), ordered[0] < 0
    if len(points) == 1:
        return jnp.where(left_out, 0, inside)
    upper, lower = (_differences(part, power, damping, dampings) for part in (ordered[1:], ordered[:-1]))
    return jnp.where(left_out, _quotient(upper, lower, jnp.maximum(largest, 0)), inside)


def _divided(points: Sequence[Array], power: Scalar) -> Array:
    """The divided difference of ``x^power``, which counts as zero at zero."""
    if len(points) == 1:
        zero = points[0] == 0
        return jnp.where(zero, 0, jnp.where(zero, 1, points[0]) ** power)
    if len(points) == 2:
        return _slope(points[0], points[1], power)
    *_, largest = ordered = _ascending(points)
    smallest, gap = ordered[0], largest - ordered[0]
    near = (largest * jnp.sign(smallest) > 0) & (gap <= _NEAR * jnp.maximum(jnp.abs(largest), jnp.abs(smallest)))
    apart = _quotient(_divided(ordered[1:], power), _divided(ordered[:-1], power), gap)
    return jnp.where(near, _series(ordered, near, power), apart)


_NEAR = 0.1
"""The spread, relative to the largest, below which a divided difference is summed as a series, since quotients would cancel."""


def _series(points: Sequence[Array], near: Array, power: Scalar) -> Array:
    """The divided difference over r + 1 points ``c (1 + t)``: ``c^(power - r) sum_n binomial(power, n + r) h_n(t)``.

    Here ``h_n`` are the complete homogeneous symmetric polynomials.
    """
    centre = jnp.where(near, 0.5 * (points[0] + points[-1]), 1)
    polynomials = [jnp.ones_like(centre), *(jnp.zeros_like(centre),) * (14 if centre.dtype.itemsize > 4 else 6)]
    for point in points:
        t = jnp.where(near, point / centre - 1, 0)
        for n in range(1, len(polynomials)):
            polynomials[n] = polynomials[n] + t * polynomials[n - 1]
    order, binomial, total = len(points) - 1, jnp.ones_like(power), jnp.zeros_like(centre)
    for n in range(order + len(polynomials)):
        if n >= order:
            total = total + binomial * polynomials[n - order]
        binomial = binomial * (power - n) / (n + 1)
    return centre ** (power - order) * total


def _ascending(points: Sequence[Array]) -> list[Array]:
    return list(jnp.sort(jnp.stack(jnp.broadcast_arrays(*points)), axis=0))


def _quotient(upper: Array, lower: Array, gap: Array) -> Array:
    """A divided difference from two of one order less; zero if all points are zero."""
    return jnp.where(gap == 0, 0, (upper - lower) / jnp.where(gap == 0, 1, gap))


def _slope(x: Array, y: Array, power: Scalar) -> Array:
    """The divided difference of ``x^power`` over two points, relative to the larger one. It does not cancel."""
    x, y = jnp.broadcast_arrays(x, y)
    first = jnp.abs(x) >= jnp.abs(y)
    large, small = jnp.where(first, x, y), jnp.where(first, y, x)
    known = jnp.where(large == 0, 1, large)
    ratio = (small - large) / known
    near = (large * jnp.sign(small) > 0) & (ratio > -0.5)
    safe = jnp.where(near & (ratio != 0), ratio, -0.25)
    growth = jnp.where(ratio == 0, power, jnp.expm1(power * jnp.log1p(safe)) / safe)
    apart = _quotient(_divided([large], power), _divided([small], power), large - small)
    return jnp.where(near, known ** (power - 1) * growth, apart)
