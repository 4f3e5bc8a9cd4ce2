"""The information on some of the parameters if the others are unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfisher._linalg import inverse_power, matmul, unit_diagonal
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.form import Form
from jaxfisher._operators.from_scores import FromScores
from jaxfisher._tree import subtree

Moments = Callable[[Float[Array, "p m"]], Float[Array, "m m"]]


def schur_complement(form: Form, stays: tuple[bool, ...]) -> Dense:
    """``F_kk - F_kr F_rr^+ F_rk = C^T F C``, where the other leaves are r, and C is the identity over ``-F_rr^+ F_rk``.

    It is computed in units in which F has a diagonal near one: any generalised inverse of ``F_rr`` will do, and one computed
    in other units may have no accurate digits. If the form knows an H of ``F = H^T H``, no result goes through the matrix: its
    eigenvalues are squares of H's singular values, so that it holds half as many digits of nearly collinear parameters.
    """
    matrix, scores = form.as_matrix(), form.as_scores()
    if not form.halved:
        form = Dense(matrix, form.spec) if scores is None else FromScores(scores)
    unit = unit_diagonal(jnp.diagonal(matrix))

    def moments(columns: Float[Array, "p m"]) -> Float[Array, "m m"]:
        found = form.inner_products(jax.vmap(form.spec.unravel)((unit[:, None] * columns).T))
        return 0.5 * (found + found.T)

    root = jax.lax.stop_gradient(_root(unit[:, None] * matrix * unit[None, :], moments if form.halved else None))
    of_entries = np.repeat(stays, form.spec.sizes)
    own, others = np.flatnonzero(of_entries), np.flatnonzero(~of_entries)
    # F_rr^+ = T T^T. The derivative of C is that of one step of refinement, C - T T^T F C.
    left, turned = _factors(root, others)
    explained = matmul(turned, matmul(left.T, root.matrix[:, own]))
    in_order = np.argsort(np.concatenate([own, others]))
    first = jnp.concatenate([jnp.eye(own.size, dtype=matrix.dtype), -explained])[in_order]
    turned = jnp.concatenate([jnp.zeros((own.size, others.size), matrix.dtype), turned])[in_order]
    rest = moments(jnp.concatenate([turned, first], 1))[: others.size, others.size :]
    seen = _determined(root, own)
    result = matmul(seen, matmul(moments(first - matmul(turned, rest)), seen))
    back = inverse_power(unit[own])
    spec = form.spec.restrict(stays, subtree(form.spec.treedef, stays))
    return Dense(back[:, None] * (0.5 * (result + result.T)) * back[None, :], spec)


class _Root(NamedTuple):
    """A square ``R`` of ``F = R^T R``, where F has a diagonal near one.

    Singular values up to ``cut`` times the largest are rounding errors. A null vector has an error of ``(cut / s)^power``,
    where s is the smallest of the others relative to the largest.
    """

    matrix: Float[Array, "p p"]
    cut: float
    power: int


def _root(matrix: Float[Array, "p p"], moments: Moments | None) -> _Root:
    """The root of a matrix. From ``V^T F V`` by products it is as accurate as if it were that of H itself."""
    size, eps = matrix.shape[0], float(jnp.finfo(matrix.dtype).eps)
    values, vectors = jnp.linalg.eigh(matrix)
    if moments is None:
        return _Root(jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T, (size * eps) ** 0.5, 2)
    # Small directions are enlarged as far as the matrix knows them, and decomposed once more, as in Fukaya et al., Shifted
    # Cholesky QR (2020), but with eigenvectors, since F may be singular. If F is not zero, its largest eigenvalue is above 1/2.
    sizes = jnp.sqrt(jnp.maximum(values, size * eps * jnp.maximum(values[-1], 0.5)))
    values, turn = jnp.linalg.eigh(moments(vectors / sizes[None, :]))
    return _Root(jnp.sqrt(jnp.maximum(values, 0))[:, None] * matmul(turn.T * sizes[None, :], vectors.T), 10 * size * eps, 1)


def _factors(root: _Root, others: np.ndarray) -> tuple[Float[Array, "p r"], Float[Array, "r r"]]:
    """U and T of the columns ``others`` of R, with ``T U^T`` the pseudo-inverse of these columns."""
    left, values, right = jnp.linalg.svd(root.matrix[:, others], full_matrices=False)
    kept = (values > root.cut * jnp.linalg.norm(root.matrix))[None, :]
    return left, jnp.where(kept, right.T / jnp.where(kept, values[None, :], 1), 0)


def _determined(root: _Root, own: np.ndarray) -> Float[Array, "k k"]:
    """The projection of the parameters ``own`` onto the complement of their part of the null space of the whole matrix.

    In that part the Schur complement is zero. The computed one has rounding errors there, large ones if ``F_rr`` is nearly
    singular.
    """
    _, values, vectors = jnp.linalg.svd(root.matrix)
    values = values / jnp.maximum(values[0], 0.5)
    kept = values > root.cut
    null = jnp.where(kept[:, None], 0, vectors)[:, own]
    eps = float(jnp.finfo(values.dtype).eps)
    # The error of a null vector is the rounding error divided by the smallest nonzero singular value, or its square.
    blur = jnp.minimum(10 * (root.cut / jnp.min(values, where=kept, initial=1.0)) ** root.power, eps**0.25)
    shares, basis = jnp.linalg.eigh(matmul(null.T, null))
    basis = jnp.where(shares > jnp.square(blur), basis, 0)
    seen = jnp.eye(own.size, dtype=values.dtype) - matmul(basis, basis.T)
    there = jnp.diagonal(seen) > eps**0.5
    return jnp.where(there[:, None] & there[None, :], seen, 0)
