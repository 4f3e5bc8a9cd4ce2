"""Making scores from a row function over a batch: held, or recomputed in chunks if memory is bounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxfisher._engine import Leaf, Traced, leaf_forms, trace, working
from jaxfisher._examples import Batch, check_centred, make_batch, map_examples, needs_data
from jaxfisher._model import LOG_PROB, LogProb, check_real, of_one_example
from jaxfisher._once import Static, once_for
from jaxfisher._pieces import map_batches
from jaxfisher._provenance import mean_over
from jaxfisher._row_functions import Rows, ScoreRows
from jaxfisher._scores.held import HeldScores
from jaxfisher._scores.map import Scores, examples_of
from jaxfisher._scores.pieces import StreamedScores, masked
from jaxfisher._tree import check_function, joined, split
from jaxfisher._values import check_flag


def make_scores(rows: Rows, params: chex.ArrayTree, batch: Batch) -> Scores:
    """The scores of a row function over a batch: held in memory, or recomputed in chunks if memory is bounded."""
    return _values_and_scores(rows, params, batch)[1]


def values_and_scores(log_prob: LogProb, params: chex.ArrayTree, batch: Batch) -> tuple[Float[Array, " n"], Scores]:
    """The log-density and the score of every example; one backward pass gives both if the scores are held."""
    values, made = _values_and_scores(ScoreRows(log_prob), params, batch)
    if isinstance(made, StreamedScores):
        values = _values(log_prob, params, batch, Static(made.batch_size))
    check_real(values, "log_prob")
    return values.astype(batch.spec.dtype), made


@partial(once_for, examples=lambda params, batch, *_: batch.data)
def _values(log_prob: LogProb, params: chex.ArrayTree, batch: Batch, pieces: Static[int]) -> Float[Array, " n"]:
    values: Array = map_batches(lambda *piece: map_examples(log_prob, joined(params), piece), batch.data, pieces.value)
    return values


def _values_and_scores(rows: Rows, params: chex.ArrayTree, batch: Batch) -> tuple[Any, Scores]:
    params = split(params)
    (made, weights), known = _run(rows, params, batch), mean_over("scores", batch)
    if not isinstance(made, Static):
        aux, leaves = made
        return (aux[0] if aux else None), HeldScores(leaves, weights, batch.spec, provenance=known)
    keep = (True,) * len(batch.spec.paths)
    return None, StreamedScores(rows, params, batch.data, weights, batch.spec, made.value, keep, batch.live, provenance=known)


@partial(once_for, examples=lambda params, batch: batch.data)
def _run(rows: Rows, params: chex.ArrayTree, batch: Batch) -> tuple[tuple[Any, Any] | Static[int], Float[Array, " rows"]]:
    """The weights of the rows, after either their auxiliary output and leaf forms, or the number of examples in a chunk."""
    with of_one_example(rows.function, rows.name, joined(params), batch.data[rows.own :]):
        traced = trace(rows, params, batch.data)
    weights = jnp.repeat(batch.weights, traced.rows)
    # Jitted, so that one trace serves for shapes and, if the scores are held, for numbers.
    forms = jax.jit(lambda data: leaf_forms(traced, params, data, batch.spec), inline=True)
    batch_size = _batch_size(traced, forms, batch)
    if batch_size is None or batch_size >= batch.size:
        aux, leaves = forms(batch.data)
        return (aux, masked(leaves, batch.live)), weights
    return Static(batch_size), weights


PLAIN_BYTES = 2**30
"""The most bytes that gradients without factors may take in total; above, scores are recomputed in chunks, not held."""


def _batch_size(traced: Traced, forms: Callable[[Any], tuple[Any, tuple[Leaf, ...]]], batch: Batch) -> int | None:
    """The number of examples in a chunk: as the user set it, else from the memory that one example takes; None for all."""
    limit = batch.max_bytes
    if limit is None:
        if batch.batch_size is not None:
            return batch.batch_size
        # If all gradients together would fit, there is no need to find out which of them have factors.
        if batch.size * traced.rows * batch.spec.size * batch.spec.dtype.itemsize <= PLAIN_BYTES:
            return None
        _, shapes = jax.eval_shape(forms, batch.data)
        if sum(leaf.bytes for leaf in shapes if leaf.why is not None) <= PLAIN_BYTES:
            return None
        limit = PLAIN_BYTES
    first = jax.tree.map(lambda leaf: leaf[:1], batch.data)
    _, one = jax.eval_shape(forms, first)
    beside = max(working(leaf) for leaf in one)
    taken = sum(leaf.bytes for leaf in one) + batch.spec.dtype.itemsize * (traced.rows * traced.program.size + beside)
    if taken > limit:
        raise ValueError(
            f"`max_bytes` is {limit:,}, but the scores of one example take {taken:,} bytes: its activations, its scores, and "
            "the working memory for these. Allow more, or see jf.explain for the leaf that takes most."
        )
    return int(limit // taken)


def scores(
    log_prob: LogProb, center: bool = False, *, batch_size: int | None = None, max_bytes: int | None = None
) -> Callable[..., Scores]:
    r"""Per-example scores: a function ``(params, *data, weights=None, counts=None) -> Scores``.

    .. math:: S_{ij} = \partial_{\theta_j} \log p_\theta(x_i), \qquad S \in R^{n \times p}.

    A complex ``log_prob``, such as the log-amplitude of a wave function, has two rows per example: for its real and for its
    imaginary part, one after the other. Parameters may be complex too: a complex leaf counts as two real numbers, and results
    for it are complex again.

    Args:
        log_prob: ``(params, *example) -> scalar``, the log-density of ONE example; the library maps it over the data.
        center: subtract the (weighted) mean score, with a mean of their own for real and for imaginary parts, so that
            ``S^T S / n`` is the covariance of the score.
        batch_size: recompute the scores in chunks of at most this many examples whenever they are needed, instead of holding
            them.
        max_bytes: instead of a ``batch_size``: the memory that the scores of one chunk, and the computations on them, may take,
            not counting results. The library chooses the size of the chunks.

    Returns:
        A function of the parameters and the data; every array of the data has a leading axis of n examples. ``weights``, shape
        ``[n]``, turn means into ``sum w_i (.) / sum w_i``, and ``counts`` turn them into means over terms, as in
        `exact_fisher`; centred scores take no ``counts``. A weight of zero marks padding: its row is zero, whatever the data,
        and a derivative with respect to this weight is that for a score of zero. A weight of 1e-30 has the example's own.

    Raises:
        ValueError: (when called) arrays of different lengths; a ``log_prob`` that returns no scalar or is a batch mean; weights
            of another shape, or known to be negative, not finite or all zero; a ``batch_size`` below one; a ``max_bytes`` that
            one example exceeds. Bad weights whose values are not known at trace time give NaN.
        TypeError: ``center`` is neither True nor False; (when called) a parameter that is not a floating array.

    Reference: Amari, Natural gradient works efficiently in learning (Neural Computation 1998), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> S = jf.scores(log_prob)(0.0, jnp.array([1.0, -2.0]))
    >>> print(S.as_matrix())  # x - mu
    [[ 1.]
     [-2.]]
    """
    check_function("log_prob", log_prob, LOG_PROB)
    check_flag("scores: `center`", center)
    rows = ScoreRows(log_prob)

    def scores_of(
        params: chex.ArrayTree,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Scores:
        needs_data(data, "scores")
        batch = make_batch(params, data, weights, batch_size, max_bytes, counts)
        check_centred(center, batch, "scores")
        made = make_scores(rows, params, batch)
        return centred(made) if center else made

    return scores_of


def centred(scores: Scores) -> Scores:
    """The scores minus their mean, with a mean for each of the rows that an example has."""
    return scores.centered(scores.num_rows // examples_of(scores))
