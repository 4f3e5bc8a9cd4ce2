r"""The inverse of a sum of two Kronecker products over one layer, in a basis that makes both diagonal.

Two positive semi-definite matrices have a basis in which both are diagonal, so :math:`A_1 \otimes G_1 + A_2 \otimes G_2` has
one: that of the inputs times that of the outputs. A third term, such as a multiple of the identity, is not diagonal in it.

Reference: Golub and Van Loan, Matrix Computations (2013), section 8.7.1, for the symmetric-definite problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._linalg import diagonals, matmul, unit_diagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.kronecker import Kronecker
from jaxfisher._operators.side import balanced
from jaxfisher._operators.sum import Sum


def pair_of(form: Form) -> tuple[Kronecker, Kronecker] | None:
    """The two Kronecker products of a form that is their sum, in one layout; else None."""
    if not isinstance(form, Sum) or len(form.terms) != 2:
        return None
    one, two = form.terms
    if not isinstance(one, Kronecker) or not isinstance(two, Kronecker) or one.weight != two.weight:
        return None
    turned = two.turned_to(one.layout)
    return None if turned is None else (one, turned)


def inverse_of_pair(one: Kronecker, two: Kronecker, damping: Scalar) -> Callable[[Any], Any]:
    """The inverse of the sum, with half of the damping in the factors of each product; exact without a damping.

    Directions along which both inputs or both outputs are zero are left out.
    """
    factors = [_damped(product, 0.5 * damping) for product in (one, two)]
    inputs, outputs = (jax.vmap(_common)(*sides) for sides in zip(*factors, strict=True))
    values = [a[:, :, None] * g[:, None, :] for a, g in ((inputs.first, outputs.first), (inputs.second, outputs.second))]
    total = values[0] + values[1]
    size, eps = max(total.shape[1:]), jnp.finfo(total.dtype).eps
    there = inputs.kept[:, :, None] & outputs.kept[:, None, :]
    kept = there & ~(total <= size * eps * jnp.max(total, (1, 2), keepdims=True))
    inverted = jnp.where(kept, 1 / jnp.where(kept, total, 1), 0)

    def apply(v: Any) -> Any:
        inside = inverted * matmul(matmul(inputs.vectors.swapaxes(1, 2), one._matrix(v)), outputs.vectors)
        return one._leaves(matmul(matmul(inputs.vectors, inside), outputs.vectors.swapaxes(1, 2)))

    return apply


def _damped(product: Kronecker, damping: Scalar) -> list[Float[Array, "groups m m"]]:
    """The two factors, each with its share of the damping on the diagonal."""
    factors = (product.inputs, product.outputs)
    a, g = (jnp.mean(diagonals(factor), 1) for factor in factors)
    pairs = zip(factors, balanced(a, g, damping), strict=True)
    return [factor + s[:, None, None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)[None] for factor, s in pairs]


class _Common(NamedTuple):
    """A basis ``U`` in which two matrices are diagonal.

    Attributes:
        vectors: ``U``, with columns of zeros for the common null space.
        first: the diagonal of ``U^T X U``, for the first matrix X.
        second: the same for the second matrix.
        kept: which columns are not zero.
    """

    vectors: Float[Array, "m m"]
    first: Float[Array, " m"]
    second: Float[Array, " m"]
    kept: Bool[Array, " m"]


def _common(x: Float[Array, "m m"], y: Float[Array, "m m"]) -> _Common:
    """A basis in which two positive semi-definite matrices are diagonal, orthonormal in the metric of their scaled sum."""
    # Scale each to unit size first: it does not matter how the size of a product is shared between its factors.
    sizes = [jnp.mean(jnp.diagonal(matrix)) for matrix in (x, y)]
    sizes = [jnp.where(size > 0, size, 1) for size in sizes]
    whole = x / sizes[0] + y / sizes[1]
    unit = unit_diagonal(jnp.diagonal(whole))
    values, vectors = jnp.linalg.eigh(unit[:, None] * whole * unit[None, :])
    # A NaN is kept, so that it shows in the result.
    kept = ~(values <= len(values) * jnp.finfo(values.dtype).eps * jnp.max(values))
    root = unit[:, None] * vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)[None, :]
    inside = matmul(root.T, matmul(x / sizes[0], root))
    # Give left-out directions an eigenvalue of -1, so that they do not mix with directions that are zero in the first only.
    values, turn = jnp.linalg.eigh(0.5 * (inside + inside.T) - jnp.diag(jnp.where(kept, 0, 1).astype(x.dtype)))
    made = matmul(root, turn)
    first, second = (jnp.maximum(jnp.sum(made * matmul(matrix, made), 0), 0) for matrix in (x, y))
    return _Common(made, first, second, ~(values < -0.5))
