"""The information on some of the parameters if the others are unknown."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxfisher._linalg import matmul
from jaxfisher._operators.damping import damped_inverse
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.form import Form
from jaxfisher._tree import subtree


def schur_complement(form: Form, stays: tuple[bool, ...]) -> Dense:
    """``F_kk - F_kr F_rr^+ F_rk`` over the leaves that stay, where the other leaves are r."""
    whole = Dense(form.as_matrix(), form.spec)
    goes = tuple(not flag for flag in stays)
    kept, rest = (whole.restrict(flags, subtree(form.spec.treedef, flags)) for flags in (stays, goes))
    of_entries = np.repeat(stays, form.spec.sizes)
    cross = whole.matrix[np.ix_(np.flatnonzero(of_entries), np.flatnonzero(~of_entries))]
    inverse = damped_inverse(rest, jnp.zeros((), form.spec.dtype))
    explained = jax.vmap(lambda row: rest.spec.ravel(inverse(rest.spec.unravel(row)).x, "x"))(cross)
    matrix = kept.matrix - matmul(cross, explained.T)
    return Dense(0.5 * (matrix + matrix.T), kept.spec)
