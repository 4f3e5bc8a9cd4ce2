"""The information on some of the parameters if the others are unknown."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfisher._linalg import inverse_power, matmul, unit_diagonal
from jaxfisher._operators.damping import damped_inverse
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.form import Form
from jaxfisher._tree import subtree


def schur_complement(form: Form, stays: tuple[bool, ...]) -> Dense:
    """``F_kk - F_kr F_rr^+ F_rk`` over the leaves that stay, where the other leaves are r.

    It is computed in units in which F has a diagonal near one: any generalised inverse of ``F_rr`` will do, and one computed
    in other units may have no accurate digits.
    """
    matrix = form.as_matrix()
    unit = unit_diagonal(jnp.diagonal(matrix))
    whole = Dense(unit[:, None] * matrix * unit[None, :], form.spec)
    goes = tuple(not flag for flag in stays)
    kept, rest = (whole.restrict(flags, subtree(form.spec.treedef, flags)) for flags in (stays, goes))
    of_entries = np.repeat(stays, form.spec.sizes)
    own, others = np.flatnonzero(of_entries), np.flatnonzero(~of_entries)
    cross = whole.matrix[np.ix_(own, others)]
    inverse = damped_inverse(rest, jnp.zeros((), form.spec.dtype))
    explained = jax.vmap(lambda row: rest.spec.ravel(inverse(rest.spec.unravel(row)).x, "x"))(cross)
    seen = _determined(jax.lax.stop_gradient(whole.matrix), own)
    left = matmul(seen, matmul(kept.matrix - matmul(cross, explained.T), seen))
    back = inverse_power(unit[own])
    return Dense(back[:, None] * (0.5 * (left + left.T)) * back[None, :], kept.spec)


def _determined(matrix: Float[Array, "p p"], own: np.ndarray) -> Float[Array, "k k"]:
    """The projection of the parameters ``own`` onto the complement of their part of the null space of the whole matrix.

    In that part the Schur complement is zero. The computed one has rounding errors there, large ones if ``F_rr`` is nearly
    singular.
    """
    eps = float(jnp.finfo(matrix.dtype).eps)
    values, vectors = jnp.linalg.eigh(matrix)
    null = jnp.where(values <= values.size * eps * values[-1], vectors, 0)[own]
    # The error of a null vector is the rounding error divided by the smallest nonzero eigenvalue.
    shares, basis = jnp.linalg.eigh(matmul(null, null.T))
    basis = jnp.where(shares > eps**0.5, basis, 0)
    seen = jnp.eye(own.size, dtype=matrix.dtype) - matmul(basis, basis.T)
    there = jnp.diagonal(seen) > eps**0.5
    return jnp.where(there[:, None] & there[None, :], seen, 0)
