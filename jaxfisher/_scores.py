r"""Scores: the gradients of log-densities, one row for each example, as one linear map ``S : R^p -> R^rows``.

A *row function* maps the parameters and one example to the rows that example contributes: one for a score at a datum, one per
draw for a sampled Fisher, one per column of the output metric's square root for the exact Fisher. Its result is a pytree
like the parameters whose leaves have a leading axis of rows. Everything the library computes from scores goes through the
methods of `Scores`; nothing outside this file knows how the rows are held.

Rows carry weights ``omega_i`` (``1/n`` each for a mean over n examples), so that the Fisher is ``S^T diag(omega) S``.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._examples import Batch, make_batch, map_batches, map_examples, needs_data, num_examples, sum_batches
from jaxfisher._linalg import matmul
from jaxfisher._model import LOG_PROB, LogProb, of_one_example
from jaxfisher._rows import Rows, ScoreRows
from jaxfisher._tree import ParamSpec, check_function, described, dtype_of, kept, narrowed

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Scores(abc.ABC):
    r"""Per-example scores as a linear map ``S`` with ``rows`` rows and ``p`` columns.

    Row ``i`` is :math:`s_i = \nabla_\theta \log p_\theta(x_i)`. Columns are ordered as `jax.flatten_util.ravel_pytree`
    orders the parameters. Made by `jaxfisher.scores`; a pytree that crosses ``jit``.
    """

    spec: ParamSpec
    weights: Float[Array, " rows"]

    @property
    def num_rows(self) -> int:
        """Number of rows: the examples, times the rows each contributes."""
        return self.weights.shape[0]

    @abc.abstractmethod
    def mv(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        """``S v``: the directional derivative of every log-density along ``v``, shape ``[rows]``."""

    @abc.abstractmethod
    def rmv(self, w: Float[Array, " rows"]) -> Any:
        """``S^T w``: the weighted sum of the scores, a pytree like the parameters."""

    @abc.abstractmethod
    def gram(self) -> Float[Array, "rows rows"]:
        """``S S^T``: inner products of all pairs of scores, symmetric to the last bit."""

    @abc.abstractmethod
    def squared_norms(self) -> Float[Array, " rows"]:
        """``|s_i|^2`` for each row."""

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonal of ``S^T S / n`` (with weights, of ``S^T diag(omega) S``), a pytree like the parameters."""

    @abc.abstractmethod
    def second_moment(self) -> Float[Array, "p p"]:
        """``S^T S / n`` (with weights, ``S^T diag(omega) S``) as a dense matrix."""

    @abc.abstractmethod
    def as_matrix(self) -> Float[Array, "rows p"]:
        """``S`` as a dense matrix, shape ``[rows, p]``."""

    @abc.abstractmethod
    def max_abs(self) -> Scalar:
        """The largest entry of ``S`` in absolute value."""

    @abc.abstractmethod
    def times(self, factor: Scalar) -> Scores:
        """``factor * S``."""

    @abc.abstractmethod
    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> Scores:
        """The columns of the kept leaves only."""

    @abc.abstractmethod
    def centered(self) -> Scores:
        """The scores less their weighted mean."""

    def _row_numbers(self, w: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """``w`` in the statistics dtype, after checking that it has one real number for each row."""
        if not hasattr(w, "dtype") or jnp.shape(w) != (self.num_rows,) or jnp.issubdtype(dtype_of(w), jnp.complexfloating):
            raise ValueError(
                f"`w` is {described(w)}; expected an array with one real number for each row, shape ({self.num_rows},)."
            )
        return jnp.asarray(w).astype(self.spec.dtype)

    def reweighted(self, factor: Any) -> Scores:
        """The same rows with every weight multiplied by ``factor``."""
        return dataclasses.replace(self, weights=self.weights * factor)  # type: ignore[type-var]


@partial(jax.tree_util.register_dataclass, data_fields=("leaves", "weights"), meta_fields=("spec",))
@dataclasses.dataclass(frozen=True)
class HeldScores(Scores):
    """Scores in memory: one array ``[rows, *leaf.shape]`` for each parameter leaf."""

    leaves: tuple[Array, ...]
    weights: Float[Array, " rows"]
    spec: ParamSpec

    def mv(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        parts = [matmul(_flat(s), x.reshape(-1)) for s, x in zip(self.leaves, self.spec.leaves(v, "v"), strict=True)]
        return sum(parts[1:], start=parts[0])

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        w = self._row_numbers(w)
        return self.spec.tree([_einsum("r,r...->...", w, s) for s in self.leaves])

    def gram(self) -> Float[Array, "rows rows"]:
        total = self.cross_gram(self)
        return 0.5 * (total + total.T)

    def cross_gram(self, other: HeldScores) -> Float[Array, "rows others"]:
        """``S S'^T`` against the rows of another block."""
        parts = [matmul(_flat(s), _flat(t).T) for s, t in zip(self.leaves, other.leaves, strict=True)]
        return sum(parts[1:], start=parts[0])

    def joined(self, other: HeldScores) -> HeldScores:
        """The rows of both."""
        leaves = tuple(jnp.concatenate(pair) for pair in zip(self.leaves, other.leaves, strict=True))
        return dataclasses.replace(self, leaves=leaves, weights=jnp.concatenate([self.weights, other.weights]))

    def squared_norms(self) -> Float[Array, " rows"]:
        parts = [jnp.sum(jnp.square(_flat(s)), axis=1) for s in self.leaves]
        return sum(parts[1:], start=parts[0])

    def diagonal(self) -> Any:
        return self.spec.tree([_einsum("r,r...->...", self.weights, jnp.square(s)) for s in self.leaves])

    def second_moment(self) -> Float[Array, "p p"]:
        matrix = self.as_matrix()
        total = matmul((self.weights[:, None] * matrix).T, matrix)
        return 0.5 * (total + total.T)

    def as_matrix(self) -> Float[Array, "rows p"]:
        return jnp.concatenate([_flat(s) for s in self.leaves], axis=1)

    def max_abs(self) -> Scalar:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(s), initial=0.0) for s in self.leaves]))

    def times(self, factor: Scalar) -> HeldScores:
        return dataclasses.replace(self, leaves=tuple(factor * s for s in self.leaves))

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> HeldScores:
        return HeldScores(kept(self.leaves, keep), self.weights, spec)

    def centered(self) -> HeldScores:
        means = [_einsum("r,r...->...", self.weights, s) for s in self.leaves]
        return dataclasses.replace(self, leaves=tuple(s - m[None] for s, m in zip(self.leaves, means, strict=True)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "data", "weights", "mean", "factor"),
    meta_fields=("rows", "spec", "batch_size", "keep"),
)
@dataclasses.dataclass(frozen=True)
class StreamedScores(Scores):
    """Scores made again, ``batch_size`` examples at a time, whenever they are needed: nothing of size n x p exists."""

    rows: Rows
    params: Any
    data: tuple[Any, ...]
    weights: Float[Array, " rows"]
    mean: tuple[Array, ...]
    factor: Scalar
    spec: ParamSpec
    batch_size: int
    keep: tuple[bool, ...]

    def _held(self, weights: Float[Array, "n m"], *data: Any) -> HeldScores:
        rows = kept(_stack(map_examples(self.rows, self.params, data), self.spec.dtype), self.keep)
        leaves = tuple(self.factor * (leaf - mean[None]) for leaf, mean in zip(rows, self.mean, strict=True))
        return HeldScores(leaves, weights.reshape(-1), self.spec)

    def _by_example(self, w: Float[Array, " rows"]) -> Float[Array, "n m"]:
        return w.reshape(num_examples(self.data, "data"), -1)

    def _weighted_data(self) -> tuple[Any, ...]:
        return (self._by_example(self.weights), *self.data)

    def _map(self, function: Callable[[HeldScores], Array]) -> Array:
        """``function`` of the held rows of each piece, joined along its leading axis."""
        joined: Array = map_batches(lambda *piece: function(self._held(*piece)), self._weighted_data(), self.batch_size)
        return joined

    def _sum(self, function: Callable[[HeldScores], Any]) -> Any:
        """The sum over pieces of ``function`` of their held rows."""
        return sum_batches(lambda *piece: function(self._held(*piece)), self._weighted_data(), self.batch_size)

    def mv(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        return self._map(lambda held: held.mv(v))

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        def piece(w: Array, *data: Any) -> Any:
            return self._held(*data).rmv(w.reshape(-1))

        data = (self._by_example(self._row_numbers(w)), *self._weighted_data())
        return sum_batches(piece, data, self.batch_size)

    def gram(self) -> Float[Array, "rows rows"]:
        # Tiles of the upper triangle, each from two blocks of rows made on the spot.
        n = num_examples(self.data, "data")
        blocks = -(-n // self.batch_size)
        index = jnp.minimum(jnp.arange(blocks * self.batch_size), n - 1).reshape(blocks, self.batch_size)
        data = self._weighted_data()

        def block(i: Array) -> HeldScores:
            return self._held(*jax.tree.map(lambda leaf: leaf[index[i]], data))

        upper, lower = jnp.triu_indices(blocks)
        tiles = jax.lax.map(lambda pair: block(pair[0]).cross_gram(block(pair[1])), (upper, lower))
        side = tiles.shape[1]
        grid = jnp.zeros((blocks, blocks, side, side), tiles.dtype)
        grid = grid.at[lower, upper].set(tiles.swapaxes(1, 2)).at[upper, lower].set(tiles)
        full = grid.swapaxes(1, 2).reshape(blocks * side, blocks * side)[: self.num_rows, : self.num_rows]
        return 0.5 * (full + full.T)

    def squared_norms(self) -> Float[Array, " rows"]:
        return self._map(HeldScores.squared_norms)

    def diagonal(self) -> Any:
        return self._sum(HeldScores.diagonal)

    def second_moment(self) -> Float[Array, "p p"]:
        return self._sum(HeldScores.second_moment)

    def as_matrix(self) -> Float[Array, "rows p"]:
        return self._map(HeldScores.as_matrix)

    def max_abs(self) -> Scalar:
        return jnp.max(self._map(lambda held: held.max_abs()[None]))

    def times(self, factor: Scalar) -> StreamedScores:
        return dataclasses.replace(self, factor=factor * self.factor)

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> StreamedScores:
        return dataclasses.replace(self, keep=narrowed(self.keep, keep), mean=kept(self.mean, keep), spec=spec)

    def centered(self) -> StreamedScores:
        return dataclasses.replace(self, mean=tuple(jax.tree.leaves(self.rmv(self.weights))))


def _flat(leaf: Float[Array, "rows ..."]) -> Float[Array, "rows size"]:
    return leaf.reshape(leaf.shape[0], -1)


def _stack(rows: Any, dtype: Any) -> tuple[Array, ...]:
    """Rows ``[examples, rows, *leaf.shape]`` as ``[examples * rows, *leaf.shape]`` in the statistics dtype."""
    leaves = jax.tree.leaves(rows)
    return tuple(leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]).astype(dtype) for leaf in leaves)


def make_scores(rows: Rows, params: chex.ArrayTree, batch: Batch, batch_size: int | None) -> Scores:
    """The scores of a row function over a batch: held in memory, or streamed where ``batch_size`` bounds them."""
    with of_one_example(rows.function, rows.name, params, batch.data):
        if batch_size is None or batch_size >= batch.size:
            return _held(map_examples(rows, params, batch.data), batch)
        one = jax.tree.map(lambda leaf: leaf[0], batch.data)
        count = jax.tree.leaves(jax.eval_shape(rows, params, *one))[0].shape[0]
    zero = tuple(jnp.zeros(shape, batch.spec.dtype) for shape in batch.spec.shapes)
    return StreamedScores(
        rows=rows,
        params=params,
        data=batch.data,
        weights=jnp.repeat(batch.weights, count),
        mean=zero,
        factor=jnp.ones((), batch.spec.dtype),
        spec=batch.spec,
        batch_size=batch_size,
        keep=(True,) * len(zero),
    )


def values_and_scores(
    log_prob: LogProb, params: chex.ArrayTree, batch: Batch, batch_size: int | None
) -> tuple[Float[Array, " n"], Scores]:
    """Every example's log-density with its score: one backward pass where the scores are held."""
    rows = ScoreRows(log_prob)
    if batch_size is not None and batch_size < batch.size:
        scores = make_scores(rows, params, batch, batch_size)
        values = map_batches(lambda *piece: map_examples(log_prob, params, piece), batch.data, batch_size)
        return values.astype(batch.spec.dtype), scores
    with of_one_example(log_prob, rows.name, params, batch.data):
        values, stacked = map_examples(rows.with_value, params, batch.data)
    return values.astype(batch.spec.dtype), _held(stacked, batch)


def _held(stacked: Any, batch: Batch) -> HeldScores:
    count = jax.tree.leaves(stacked)[0].shape[1]
    return HeldScores(_stack(stacked, batch.spec.dtype), jnp.repeat(batch.weights, count), batch.spec)


def scores(log_prob: LogProb, center: bool = False, *, batch_size: int | None = None) -> Callable[..., Scores]:
    r"""Per-example scores: a function ``(params, *data, weights=None) -> Scores``.

    .. math:: S_{ij} = \partial_{\theta_j} \log p_\theta(x_i), \qquad S \in R^{n \times p}.

    Args:
        log_prob: ``(params, *example) -> scalar``, the log-density of ONE example; the library maps it over the data.
        center: subtract the (weighted) mean score, so that ``S^T S / n`` is the covariance of the score.
        batch_size: make the scores again in pieces of so many examples whenever they are needed, instead of holding them.

    Returns:
        A function of the parameters and the data, every array of which has a leading axis of n examples; ``weights``, shape
        ``[n]``, turn means into ``sum w_i (.) / sum w_i``, and a weight of zero is padding.

    Raises:
        ValueError: (when called) arrays of different lengths, a non-scalar ``log_prob``, one that is a batch mean, weights of
            another shape, a ``batch_size`` below one.
        TypeError: (when called) a parameter that is not a real floating array.

    Reference: Amari, Natural gradient works efficiently in learning (Neural Computation 1998), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> S = jf.scores(log_prob)(0.0, jnp.array([1.0, -2.0]))
    >>> print(S.as_matrix())  # x - mu
    [[ 1.]
     [-2.]]
    """
    check_function("log_prob", log_prob, LOG_PROB)
    rows = ScoreRows(log_prob)

    def scores_of(params: chex.ArrayTree, *data: Any, weights: Float[Array, " n"] | None = None) -> Scores:
        needs_data(data, "scores")
        made = make_scores(rows, params, make_batch(params, data, weights, batch_size), batch_size)
        return made.centered() if center else made

    return scores_of
