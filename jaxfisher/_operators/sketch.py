r"""Sketches: low-rank views with shrunk eigenvalues, whose means over a stream of batches keep an error bound."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._linalg import matmul, mirrored, square_root
from jaxfisher._operators.averaging import mean_of
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import Shifted
from jaxfisher._operators.low_rank import LowRank, largest_of, pair_means, pairs_of_gram, with_angles
from jaxfisher._operators.operator import Operator, viewed
from jaxfisher._pytree import array_fields


@array_fields("vectors", "values", "floor", "error", repr=False)
class Sketch(LowRank):
    """`LowRank` with zero for all other eigenvalues; it lies below the sketched matrix by at most ``error I``."""

    error: Scalar

    @property
    def name(self) -> str:  # type: ignore[override]
        """The word sketch, and how many eigenpairs are held."""
        return f"sketch: {self.values.shape[0]:,} eigenpairs"

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Sketch:
        part = super().restrict(keep, treedef)
        return Sketch(part.vectors, part.values, part.floor, part.spec, self.error)

    def scaled(self, factor: Scalar) -> Sketch:
        return dataclasses.replace(self, values=factor * self.values, error=factor * self.error)


def sketch(fisher: Operator, rank: int) -> Operator:
    r"""A low-rank view whose means over batches also have low rank and a known error bound: *frequent directions*.

    .. math:: \hat F = U_k (\Lambda_k - \lambda_{k+1} I)\, U_k^T, \qquad 0 \preceq F - \hat F \preceq \epsilon I, \qquad
        \epsilon \le \min_{j \le k} \frac{\sum_{i > j} \lambda_i(F)}{k + 1 - j}.

    For one Fisher :math:`\epsilon` is :math:`\lambda_{k+1}`, which is subtracted from all eigenvalues that are kept. For a mean
    of two, which `jaxfisher.merge` and `jaxfisher.accumulate` make, the 2 k eigenpairs are reduced to k in the same way, and
    the number subtracted is added to the mean of both errors. So ``F.form.error``, the total subtracted, bounds the error of
    the whole stream, and both bounds hold for any batches in any order: a direction that is small in every batch but large in
    the sum is kept. The middle of the two bounds is the best guess: ``F + jf.scaled_identity(F, F.form.error / 2)`` is off by
    at most half of the error.

    **When it is the wrong one.** If all data are available at once, `jaxfisher.low_rank` has exact eigenpairs.

    Args:
        fisher: as in `jaxfisher.low_rank`.
        rank: the number of eigenpairs, k: at least 1, at most p. Fewer rows than that give some eigenvalues of zero.

    Returns:
        An operator of the same kind, held by its eigenpairs: ``p k`` numbers, however many batches went in.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``rank`` out of range; an operator without scores for p above 4096; in `jaxfisher.merge`, of two ranks.

    Reference: Ghashami, Liberty, Phillips and Woodruff, Frequent directions: simple and deterministic matrix sketching (SIAM J.
    Comput. 2016), theorem 1.1 and section 3.3 for merging.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.dot(x, p), 1.0)
    >>> batches = [(jnp.array([[2.0, 0.0], [0.0, 1.0]]),), (jnp.array([[2.0, 0.0]]),)]
    >>> F = jf.accumulate(jf.exact_fisher(model), lambda F: jf.sketch(F, 1))(jnp.zeros(2), batches)
    >>> print(f"{F.trace():.3f} {F.form.error:.3f}")  # the largest eigenvalue is 8/3, the other 1/3
    2.333 0.333
    """
    fisher = viewed(fisher, "sketch")
    return Operator(_sketched(fisher.form, rank), fisher.provenance)


def _sketched(form: Form, rank: int) -> Form:
    if isinstance(form, Shifted):
        return dataclasses.replace(form, base=_sketched(form.base, rank))
    values, vectors = largest_of(form, rank, rank + 1, "sketch")
    return _made(values, vectors, rank, jnp.zeros((), form.spec.dtype), form)


def _made(values: Float[Array, " m"], vectors: Float[Array, "p m"], rank: int, error: Scalar, like: Form) -> Sketch:
    """The sketch of a matrix with these ascending eigenpairs: the largest eigenvalue left out is subtracted from the others."""
    extra = values.shape[0] - rank
    if extra < 0:
        values, vectors = jnp.pad(values, (-extra, 0)), jnp.pad(vectors, ((0, 0), (-extra, 0)))
    left = values[extra - 1] if extra > 0 else jnp.zeros((), values.dtype)
    values, vectors = values[max(extra, 0) :], vectors[:, max(extra, 0) :]
    kept = values - left
    # A change of F between vectors of equal value is in their angle, by the value times it, see `_largest_jvp`.
    means = [pair_means(x) for x in (values, kept)]
    vectors = with_angles(vectors, jnp.where(means[1] > 0, means[0] / jnp.where(means[1] > 0, means[1], 1), 1))
    return Sketch(vectors, kept, jnp.zeros((), values.dtype), like.spec, error + left)


@mean_of.register
def _(form: Sketch, other: Sketch, share: Scalar) -> Sketch:
    """The sketch of the mean; its error is the mean of both errors plus the number subtracted here."""
    rank = form.values.shape[0]
    if rank != other.values.shape[0]:
        raise ValueError(f"merge: sketches of ranks {rank} and {other.values.shape[0]}; expected one rank.")
    share = share.astype(form.values.dtype)
    # A zero that pads a sketch stays zero; so its root has a derivative, which is zero.
    parts = [jnp.sqrt(w) * of.vectors * square_root(of.values)[None, :] for w, of in ((1 - share, form), (share, other))]
    root = jnp.concatenate(parts, 1)
    most = min(rank + 1, *root.shape)
    values, vectors = pairs_of_gram(mirrored(matmul(root.T, root)), most, partial(matmul, root))
    return _made(values, vectors, rank, form.error + share * (other.error - form.error), form)
