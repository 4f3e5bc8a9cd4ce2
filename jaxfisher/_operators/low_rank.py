r"""Fishers held by a few eigenpairs: the largest ones exactly, or approximate ones from products, for preconditioning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from jaxfisher._engine import Basis
from jaxfisher._linalg import are_apart, matmul, mirrored, norm, pairs_of_rule, to_unit, without_derivative
from jaxfisher._once import Static, once
from jaxfisher._operators.form import Form, small_matrix
from jaxfisher._operators.from_scores import FromScores, Scaled
from jaxfisher._operators.identity import ScaledIdentity, Shifted
from jaxfisher._operators.operator import Operator, viewed
from jaxfisher._operators.spectral import Spectral
from jaxfisher._pytree import array_fields
from jaxfisher._scores import Scores
from jaxfisher._tree import HIGHEST, ParamSpec, as_key, described
from jaxfisher._values import whole


@array_fields("vectors", "values", "floor", repr=False)
class LowRank(Spectral):
    """``U diag(values) U^T + floor (I - U U^T)``: a few eigenpairs, and one eigenvalue for all other directions."""

    vectors: Float[Array, "p k"]
    values: Float[Array, " k"]
    floor: Scalar
    spec: ParamSpec

    @property
    def name(self) -> str:  # type: ignore[override]
        """The words low rank, and how many eigenpairs are held."""
        return f"low rank: {self.values.shape[0]:,} eigenpairs"

    def counted_eigenvalues(self) -> list[tuple[Array, int]]:
        return [(self.values, 1), (self.floor[None], self.spec.size - self.values.shape[0])]

    def apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        flat, rest = self.spec.ravel(v, "v"), function(self.floor)
        # The vectors are orthonormal only to rounding, and f(floor) may be so large that it shows: project twice.
        inside = matmul(self.vectors.T, flat)
        outside = flat - matmul(self.vectors, inside)
        outside = outside - matmul(self.vectors, matmul(self.vectors.T, outside))
        within = _turned(function(self.values) * inside, inside, self.vectors, self._missing(function))
        return self.spec.unravel(matmul(self.vectors, within) + rest * outside)

    def _missing(self, function: Callable[[Array], Array]) -> Float[Array, "k k"]:
        """What the derivative of ``f(F)`` between eigenvectors of equal value lacks, for a change of one in their angle.

        A change of F by ``values - floor`` is such a change of the angle, see `_largest_jvp`. It changes ``f(F)`` by the slope
        of f times as much, where the vectors alone give ``f(values)``.
        """
        values, images = self.values, function(self.values)
        gap, mean = values[:, None] - values[None, :], pair_means(values)
        equal = jnp.abs(gap) <= jnp.finfo(values.dtype).eps ** 0.5 * jnp.abs(mean)
        _, slope = jax.jvp(function, (mean,), (jnp.ones_like(mean),))
        slope = jnp.where(equal, slope, (images[:, None] - images[None, :]) / jnp.where(equal, 1, gap))
        return (mean - self.floor) * slope - pair_means(images)

    @property
    def stack(self) -> tuple[int, ...]:
        return self.vectors.shape[:-2]

    def as_matrix(self) -> Float[Array, "p p"]:
        full = matmul(self.vectors * (self.values - self.floor)[None, :], self.vectors.T)
        return 0.5 * (full + full.T) + self.floor * jnp.eye(self.spec.size, dtype=full.dtype)

    def diagonal(self) -> Any:
        return self.spec.unravel(matmul(jnp.square(self.vectors), self.values - self.floor) + self.floor)

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        turned = jax.vmap(lambda vector: basis.turned(self.spec.unravel(vector)))(self.vectors.T)
        ones = self.spec.unravel(jnp.ones(self.spec.size, self.spec.dtype))
        inside = jnp.einsum("k,kgio->gio", self.values - self.floor, jnp.square(turned), precision=HIGHEST)
        return inside + self.floor * basis.of_diagonal(ones)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> LowRank:
        if all(keep):
            return dataclasses.replace(self, spec=self.spec.restrict(keep, treedef))
        # Restricted to some leaves the vectors are no longer orthonormal, so compute the eigenvectors of the part.
        part = jnp.concatenate([rows for rows, flag in zip(self._by_leaf(), keep, strict=True) if flag])
        basis, root = jnp.linalg.qr(part)
        inner = matmul(root * (self.values - self.floor)[None, :], root.T)
        values, vectors = jnp.linalg.eigh(0.5 * (inner + inner.T), symmetrize_input=False)
        spec = self.spec.restrict(keep, treedef)
        return LowRank(matmul(basis, vectors), values + self.floor, self.floor, spec)

    def _by_leaf(self) -> list[Float[Array, "size k"]]:
        ends = [sum(self.spec.sizes[: i + 1]) for i in range(len(self.spec.sizes))]
        return jnp.split(self.vectors, ends[:-1])

    def scaled(self, factor: Scalar) -> LowRank:
        return dataclasses.replace(self, values=factor * self.values, floor=factor * self.floor)


def pair_means(values: Float[Array, " k"]) -> Float[Array, "k k"]:
    """The mean of each two values."""
    return 0.5 * (values[:, None] + values[None, :])


@jax.custom_jvp
def _turned(
    image: Float[Array, " k"], inside: Float[Array, " k"], vectors: Float[Array, "p k"], missing: Float[Array, "k k"]
) -> Float[Array, " k"]:
    """The image of ``inside``; its derivative gains ``missing`` times that of the angles between the vectors."""
    return image


@_turned.defjvp
def _turned_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    _, inside, vectors, missing = primals
    return _turned(*primals), tangents[0] + matmul(missing * _angles(vectors, tangents[2]), inside)


def _angles(vectors: Float[Array, "p k"], change: Float[Array, "p k"]) -> Float[Array, "k k"]:
    """The change of the angles between orthonormal vectors; their lengths stay."""
    made = matmul(vectors.T, change)
    return jnp.where(jnp.eye(made.shape[0], dtype=bool), 0, made + made.T)


@jax.custom_jvp
def with_angles(vectors: Float[Array, "p k"], factor: Float[Array, "k k"]) -> Float[Array, "p k"]:
    """The same vectors, with changes of their angles multiplied by factors."""
    return vectors


@with_angles.defjvp
def _with_angles_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    vectors, factor = primals
    return with_angles(*primals), tangents[0] + matmul(vectors, 0.5 * (factor - 1) * _angles(vectors, tangents[0]))


def low_rank(fisher: Operator, rank: int) -> Operator:
    r"""The Fisher's largest eigenpairs, computed exactly; all other eigenvalues are set to zero.

    The view of ``F + c I`` is the view of F plus all of ``c I``: a prior is kept in every direction.

    .. math:: F \approx U_k \Lambda_k U_k^T, \qquad (F + \lambda I)^{-1} v \approx U_k (\Lambda_k + \lambda)^{-1} U_k^T v +
        \tfrac1\lambda (v - U_k U_k^T v).

    From scores it takes the eigenvectors of the n x n Gram matrix, if that is the smaller one, and k weighted sums of scores:
    ``p k`` numbers are held. With all eigenpairs it equals F. Derivatives are right where eigenvalues are equal, as long as the
    smallest one kept is separate from those left out. Second derivatives are NaN there, and where one that is kept is zero.

    Args:
        fisher: an operator held as scores; or any other for p up to 4096, whose matrix is then made.
        rank: the number of eigenpairs, k: at least 1, at most p, and for scores at most the number of rows.

    Returns:
        An operator of the same kind, held by its eigenpairs.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``rank`` out of range; an operator without scores for p above 4096.

    Reference: Eckart and Young, The approximation of one matrix by another of lower rank (Psychometrika 1936).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.dot(x, p), 1.0)
    >>> F = jf.exact_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> print(jf.low_rank(F, 1).eigvalsh().round(4))  # of 2 and 1/2
    [0. 2.]
    """
    fisher = viewed(fisher, "low_rank")
    return Operator(_truncated(fisher.form, rank), fisher.provenance)


def _truncated(form: Form, rank: int) -> LowRank:
    if isinstance(form, Shifted):
        made = _truncated(form.base, rank)
        return dataclasses.replace(made, values=made.values + form.shift, floor=made.floor + form.shift)
    if isinstance(form, FromScores) and form.scores.num_rows < form.spec.size:
        _check_rank(rank, form.scores.num_rows, "low_rank")
    values, vectors = largest_of(form, rank, rank, "low_rank")
    floor = form.scale if isinstance(form, ScaledIdentity) else jnp.zeros((), form.spec.dtype)
    return LowRank(vectors, values, floor, form.spec)


def largest_of(form: Form, rank: int, most: int, caller: str) -> tuple[Float[Array, " k"], Float[Array, "p k"]]:
    """The largest eigenpairs, ascending: ``most`` of them, or all if there are fewer. ``rank`` is the user's, to be checked."""
    _check_rank(rank, form.spec.size, caller)
    if isinstance(form, FromScores) and form.scores.num_rows < form.spec.size:
        return _largest_of_rows(form.scores, Static(min(most, form.scores.num_rows)))
    return _largest(small_matrix(form, caller), min(most, form.spec.size))


@once
def _largest_of_rows(scores: Scores, rank: Static[int]) -> tuple[Float[Array, " k"], Float[Array, "p k"]]:
    """The largest eigenpairs, from the Gram matrix."""
    factor = to_unit(scores.bound())
    scaled = Scaled(scores, factor)
    # One vector at a time: a batch of vectors would need a batch of all factors.
    outwards = lambda rows: jax.lax.map(scaled.out_of_rows, rows.T).T  # noqa: E731
    values, vectors = pairs_of_gram(mirrored(scaled.gram()), rank.value, outwards)
    return values * (1 / factor) * (1 / factor), vectors


def pairs_of_gram(
    gram: Float[Array, "n n"], rank: int, outwards: Callable[[Array], Array]
) -> tuple[Float[Array, " k"], Float[Array, "p k"]]:
    """The largest eigenpairs of ``X^T X``, from the matrix ``X X^T`` and products with ``X^T``."""
    values, rows = _largest_of_gram(gram, rank)
    # u = X^T w / sqrt(value), or zero if the value is zero.
    weights = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 0)
    return values, _orthonormal(outwards(rows * weights[None, :]), values)


def _orthonormal(vectors: Float[Array, "p k"], values: Float[Array, " k"]) -> Float[Array, "p k"]:
    """The vectors of ascending eigenvalues, each made orthogonal to those of larger ones, which are more accurate.

    The rounding error of an eigenvalue is relative to the largest one, so that a vector divided by its root is not of unit
    length. Derivatives are those of the given vectors.
    """
    found, root = jnp.linalg.qr(jax.lax.stop_gradient(vectors)[:, ::-1])
    found = (found * jnp.sign(jnp.diagonal(root))[None, :])[:, ::-1]
    return vectors + jax.lax.stop_gradient(jnp.where((values > 0)[None, :], found - vectors, 0))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(matrix: Float[Array, "m m"], rank: int) -> tuple[Float[Array, " k"], Float[Array, "m k"]]:
    """The largest eigenpairs of a positive semi-definite matrix; values inside rounding error are zero.

    Derivatives of ``U diag(values) U^T`` and of symmetric functions of the values are right also where values are equal.
    """
    return _pairs(matrix)[0][-rank:], _pairs(matrix)[1][:, -rank:]


@_largest.defjvp
def _largest_jvp(rank: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # Rotating two eigenvectors of equal value does not change U diag(values) U^T between them. The change goes into the angle
    # of the two vectors instead, half of it into each.
    return _moved(*primals, *tangents, rank, lambda change, one, two: change / (one + two))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest_of_gram(gram: Float[Array, "n n"], rank: int) -> tuple[Float[Array, " k"], Float[Array, "n k"]]:
    """`_largest` of ``X X^T``, with derivatives for ``X^T W W^T X``, where W are the vectors: rotating W changes nothing."""
    return _largest(gram, rank)


@_largest_of_gram.defjvp
def _largest_of_gram_jvp(rank: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    return _moved(*primals, *tangents, rank, lambda change, one, two: jnp.zeros_like(change))


def _pairs(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """All eigenpairs; values inside rounding error are zero."""
    values, vectors = pairs_of_rule(matrix)
    cut = values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return jnp.where(values <= cut, jnp.where(jnp.isnan(values), values, 0), values), vectors


def _moved(
    matrix: Array, change: Array, rank: int, equal: Callable[[Array, Array, Array], Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The largest eigenpairs and their tangents; ``equal`` gives the coefficients of vectors between equal values."""
    values, vectors = _pairs(matrix)
    change = matmul(vectors.T, matmul(change, vectors))[:, -rank:]
    one, two = values[:, None], values[None, -rank:]
    near = ~are_apart(values)[:, -rank:]
    inside = (jnp.arange(values.size) >= values.size - rank)[:, None] & (one > 0) & (two > 0)
    same = jnp.arange(values.size)[:, None] == jnp.arange(values.size)[None, -rank:]
    apart = change / jnp.where(two != one, two - one, 1)
    turned = jnp.where(inside & near, equal(change, one, jnp.where(two > 0, two, 1)), jnp.where(two != one, apart, 0))
    moved = jnp.diagonal(change, rank - values.size)
    zero = values[-rank:] == 0
    # An eigenvalue of zero has a second derivative, and with it come vectors that depend on the direction of the change.
    tangents = without_derivative(jnp.where(zero, 0, moved), zero), matmul(vectors, jnp.where(same, 0, turned))
    return (values[-rank:], vectors[:, -rank:]), tangents


def nystrom(fisher: Operator, key: PRNGKeyArray, rank: int) -> Operator:
    r"""A randomised approximation of the largest eigenpairs from ``rank`` products, made for preconditioning.

    With ``Y = F Omega`` for a random orthonormal ``Omega``, ``Y (Omega^T Y)^+ Y^T`` is the best approximation of F from below
    that ``Y`` allows. All other eigenvalues are set to the smallest one found, so that
    ``jf.CG(preconditioner=jf.nystrom(F, key, k))`` is the Nystrom preconditioner. With ``k`` about twice the effective
    dimension at the damping, the condition number is small.

    Args:
        fisher: any operator; only its products are used.
        key: a random key.
        rank: the number of products, at least 1, at most p.

    Raises:
        TypeError: ``fisher`` is not an operator, ``key`` no random key.
        ValueError: ``rank`` out of range.

    Reference: Frangella, Tropp and Udell, Randomized Nystrom preconditioning (SIAM J. Matrix Anal. Appl. 2023), algorithm 2.1
    and equation 5.3.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.dot(x, p), 1.0)
    >>> F = jf.implicit_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> print(jf.nystrom(F, jax.random.key(0), 2).trace().round(4))  # with all directions, F itself: 2 + 1/2
    2.5
    """
    fisher = viewed(fisher, "nystrom")
    _check_rank(rank, fisher.size, "nystrom")
    sketch = jnp.linalg.qr(jax.random.normal(as_key(key, "nystrom"), (fisher.size, rank), fisher.spec.dtype))[0]
    vectors, values = _seen_by(fisher.form, sketch)
    return Operator(LowRank(vectors, values, values[-1], fisher.spec), fisher.provenance)


@once
def _seen_by(form: Form, sketch: Float[Array, "p k"]) -> tuple[Float[Array, "p k"], Float[Array, " k"]]:
    """The eigenvectors and eigenvalues that follow from products with the orthonormal columns of a sketch."""
    spec, product, rank = form.spec, form.product(), sketch.shape[1]
    # One product at a time: a batch of products would need a batch of all factors. Scale the image to unit norm.
    image = jax.lax.map(lambda v: spec.ravel(product(spec.unravel(v)), "v"), sketch.T).T
    size = norm(image.reshape(-1))
    image = image / jnp.where(size > 0, size, 1)
    shift = 10 * jnp.finfo(spec.dtype).eps * rank**0.5
    image = image + shift * sketch
    core = matmul(sketch.T, image)
    root = jnp.linalg.cholesky(0.5 * (core + core.T))
    half = jax.scipy.linalg.solve_triangular(root, image.T, lower=True).T
    vectors, singular, _ = jnp.linalg.svd(half, full_matrices=False)
    return vectors, jnp.maximum(jnp.square(singular) - shift, 0) * size


def partial_cholesky(fisher: Operator, rank: int) -> Operator:
    r"""The first columns of a pivoted Cholesky factor, as eigenpairs, made for preconditioning.

    ``F \approx L L^T`` is made from ``rank`` columns of F, each time the one whose diagonal entry is approximated worst. Other
    eigenvalues are set to the remaining diagonal divided by their number. The factor needs the diagonal and ``rank`` products,
    and no random numbers.

    Args:
        fisher: any operator.
        rank: the number of columns, at least 1, at most p.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``rank`` out of range.

    Reference: Harbrecht, Peters and Schneider, On the low-rank approximation by the pivoted Cholesky decomposition (Applied
    Numerical Mathematics 2012), algorithm 1.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.dot(x, p), 1.0)
    >>> F = jf.exact_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> print(jf.partial_cholesky(F, 1).eigvalsh().round(4))  # all that is left is the 1/2
    [0.5 2. ]
    """
    fisher = viewed(fisher, "partial_cholesky")
    _check_rank(rank, fisher.size, "partial_cholesky")
    factor, floor = _columns(fisher.form, jnp.zeros((fisher.size, rank), fisher.spec.dtype))
    vectors, singular, _ = jnp.linalg.svd(factor, full_matrices=False)
    return Operator(LowRank(vectors, jnp.square(singular), floor, fisher.spec), fisher.provenance)


@once
def _columns(form: Form, empty: Float[Array, "p k"]) -> tuple[Float[Array, "p k"], Scalar]:
    """As many columns of the pivoted Cholesky factor as ``empty`` has, and the remaining diagonal over the other directions."""
    spec, product, rank = form.spec, form.product(), empty.shape[1]
    left = spec.ravel(form.diagonal(), "diagonal")
    start = jnp.sum(left)

    def column(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, left = carry
        pivot = jnp.argmax(left)
        unit = jnp.zeros_like(left).at[pivot].set(1)
        fresh = spec.ravel(product(spec.unravel(unit)), "v") - matmul(factor, factor[pivot])
        # A pivot inside rounding error adds nothing but noise.
        variance = left[pivot]
        useful = variance > spec.size * jnp.finfo(left.dtype).eps * jnp.max(start)
        fresh = jnp.where(useful, fresh * jax.lax.rsqrt(jnp.where(useful, variance, 1)), 0)
        left = jnp.where(useful, jnp.maximum(left - jnp.square(fresh), 0).at[pivot].set(0), left)
        return factor.at[:, k].set(fresh), left

    factor, left = jax.lax.fori_loop(0, rank, column, (empty, left))
    return factor, jnp.sum(left) / max(spec.size - rank, 1)


def _check_rank(rank: int, most: int, caller: str) -> None:
    if not 1 <= (whole(rank) or 0) <= most:
        raise ValueError(f"{caller}: `rank` is {described(rank)}; expected a whole number from 1 to {most:,}.")
