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
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._engine import (
    Basis,
    Leaf,
    Moments,
    Seal,
    Traced,
    cross_gram,
    diagonal,
    expanded_moments,
    gram_upper,
    leaf_forms,
    outer,
    outer_moment,
    reduced_moments,
    sealed,
    squared_norms,
    squares_along,
    trace,
    unsealed,
    working,
)
from jaxfisher._examples import Batch, make_batch, map_batches, map_examples, needs_data, num_examples, sum_batches
from jaxfisher._linalg import matmul, mirrored
from jaxfisher._model import LOG_PROB, LogProb, of_one_example
from jaxfisher._once import Static, once, once_for
from jaxfisher._rows import Rows, ScoreRows
from jaxfisher._stack import of_one
from jaxfisher._tree import ParamSpec, check_function, described, dot, dtype_of, kept, narrowed, param_spec
from jaxfisher._values import check_array, check_flag


class Scores(abc.ABC):
    r"""Per-example scores as a linear map ``S`` with ``rows`` rows and ``p`` columns.

    Row ``i`` is :math:`s_i = \nabla_\theta \log p_\theta(x_i)`. Columns are ordered as `jax.flatten_util.ravel_pytree`
    orders the parameters. Made by `jaxfisher.scores`; a pytree that crosses ``jit``.
    """

    spec: ParamSpec
    weights: Float[Array, " rows"]

    def __init_subclass__(cls, **options: Any) -> None:
        """What each way of holding rows computes in its own way is one program, compiled once."""
        super().__init_subclass__(**options)
        for name in _PROGRAMS:
            if name in vars(cls):
                setattr(cls, name, once(of_one(name)(vars(cls)[name])))

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that `jax.vmap` or `jax.lax.scan` has put before the rows; () of one matrix of scores."""
        return self.weights.shape[:-1]

    @property
    def num_rows(self) -> int:
        """Number of rows: the examples, times the rows each contributes."""
        return self.weights.shape[0]

    def mv(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        """``S v``: the directional derivative of every log-density along ``v``, shape ``[rows]``."""
        return _product(self, self.spec.tree(self.spec.leaves(v, "v")))

    def mv_computed(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        """``S v`` of a vector that was computed in the same program, and is no constant of it.

        Less memory may do, and `jax.linear_transpose` takes it.
        """
        return self._mv(v, unsealed)

    @abc.abstractmethod
    def _mv(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]: ...

    @abc.abstractmethod
    def rmv(self, w: Float[Array, " rows"]) -> Any:
        """``S^T w``: the weighted sum of the scores, a pytree like the parameters."""

    @once
    def gram(self) -> Float[Array, "rows rows"]:
        """``S S^T``: inner products of all pairs of scores; one triangle is the mirror image of the other."""
        return mirrored(self.gram_upper(jnp.ones((), self.spec.dtype)))

    @abc.abstractmethod
    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        """The upper triangle of ``(factor S) (factor S)^T``; what is below it means nothing.

        Multiplied in such a way that nothing overflows or underflows which the result can hold.
        """

    @abc.abstractmethod
    def squared_norms(self) -> Float[Array, " rows"]:
        """``|s_i|^2`` for each row."""

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonal of ``S^T S / n`` (with weights, of ``S^T diag(omega) S``), a pytree like the parameters."""

    @once
    def second_moment(self) -> Float[Array, "p p"]:
        """``S^T S / n`` (with weights, ``S^T diag(omega) S``) as a dense matrix."""
        return self.scaled_moment(jnp.ones((), self.spec.dtype))

    @abc.abstractmethod
    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        """The second moment of ``factor S``, as `gram_upper` is the Gram matrix of it."""

    @abc.abstractmethod
    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        """The diagonal of ``S^T diag(omega) S`` in the basis of the layer that all its leaves are: the eigenvalues of EKFAC.

        Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018).
        """

    @property
    @abc.abstractmethod
    def mass(self) -> Scalar:
        """The sum of the weights of the examples."""

    @abc.abstractmethod
    def rescaled(self, factors: tuple[Scalar, ...]) -> Scores:
        """The columns of each leaf multiplied by a number."""

    @abc.abstractmethod
    def as_matrix(self) -> Float[Array, "rows p"]:
        """``S`` as a dense matrix, shape ``[rows, p]``."""

    @abc.abstractmethod
    def bound(self) -> Scalar:
        """A bound on the entries of ``S`` in absolute value, of their order of magnitude."""

    @abc.abstractmethod
    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> Scores:
        """The columns of the kept leaves only."""

    @abc.abstractmethod
    def centered(self) -> Scores:
        """The scores less their weighted mean."""

    def _row_numbers(self, w: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """``w`` in the statistics dtype, after checking that it has one real number for each row."""
        check_array("`w`", w)
        if not hasattr(w, "dtype") or jnp.shape(w) != (self.num_rows,) or jnp.issubdtype(dtype_of(w), jnp.complexfloating):
            raise ValueError(
                f"`w` is {described(w)}; expected an array with one real number for each row, shape ({self.num_rows},)."
            )
        return jnp.asarray(w).astype(self.spec.dtype)

    def reweighted(self, factor: Any) -> Scores:
        """The same rows with every weight multiplied by ``factor``."""
        return dataclasses.replace(self, weights=self.weights * factor)  # type: ignore[type-var]


_PROGRAMS = (
    *("rmv", "gram_upper", "squared_norms", "diagonal", "scaled_moment", "as_matrix", "bound"),
    *("expanded_moments", "reduced_moments", "squares_along"),
)
"""Methods of `Scores` that compute."""


@once
@of_one("mv")
def _product(scores: Scores, v: Any) -> Float[Array, " rows"]:
    return scores._mv(v, sealed)


class FactoredScores(Scores):
    """Scores that are the gradients themselves, which may have factors; a covariance of them is no sum of products."""

    @abc.abstractmethod
    def expanded_moments(self) -> tuple[Moments | None, ...]:
        """Second moments of each leaf's factors with positions as if they were examples; None for a leaf without factors.

        Positions that carry no gradient are not counted. A layer's bias goes with its weight. Reference: Eschenhagen et al.
        (NeurIPS 2023), KFAC-expand.
        """

    @abc.abstractmethod
    def reduced_moments(self) -> tuple[Moments | None, ...]:
        """Second moments of each leaf's factors taken together over positions; None for a leaf without factors.

        Those of the mean of ``a_t`` over positions that carry a gradient, and of the sum of ``g_t``. Reference: Eschenhagen et
        al. (NeurIPS 2023), KFAC-reduce.
        """

    @property
    @abc.abstractmethod
    def layers(self) -> tuple[int | None, ...]:
        """For every leaf that is the bias of a layer, the place of the layer's weight among the leaves."""

    @property
    @abc.abstractmethod
    def touched(self) -> tuple[bool, ...]:
        """Whether the function depends on a leaf at all; where it does not, its scores are zero."""


@partial(jax.tree_util.register_dataclass, data_fields=("leaves", "weights"), meta_fields=("spec",))
@dataclasses.dataclass(frozen=True)
class HeldScores(FactoredScores):
    """Scores in memory, each parameter leaf in its own form: factors of its gradients where the gradients have some."""

    leaves: tuple[Leaf, ...]
    weights: Float[Array, " rows"]
    spec: ParamSpec

    @property
    def _omega(self) -> Float[Array, "examples rows"]:
        return self._by_example(self.weights)

    def _by_example(self, w: Float[Array, " rows"]) -> Float[Array, "examples rows"]:
        return w.reshape(self.leaves[0].examples, self.leaves[0].rows)

    @property
    def layers(self) -> tuple[int | None, ...]:
        return tuple(leaf.layer for leaf in self.leaves)

    @property
    def touched(self) -> tuple[bool, ...]:
        return tuple(bool(leaf.forms) for leaf in self.leaves)

    @property
    def mass(self) -> Scalar:
        return jnp.sum(self.weights) / self.leaves[0].rows

    def rescaled(self, factors: tuple[Scalar, ...]) -> HeldScores:
        leaves = tuple(leaf.times(factor) for leaf, factor in zip(self.leaves, factors, strict=True))
        return dataclasses.replace(self, leaves=leaves)

    def _mv(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        parts = [leaf.mv(x, seal) for leaf, x in zip(self.leaves, self.spec.leaves(v, "v"), strict=True)]
        return total(parts).reshape(-1)

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        w = self._by_example(self._row_numbers(w))
        return self.spec.tree([leaf.rmv(w) for leaf in self.leaves])

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        return gram_upper(self.leaves, factor)

    def cross_gram(self, other: HeldScores, factor: Scalar) -> Float[Array, "rows others"]:
        """``(factor S) (factor S')^T`` against the rows of another block."""
        return cross_gram(self.leaves, other.leaves, factor)

    def squared_norms(self) -> Float[Array, " rows"]:
        return total([squared_norms(leaf) for leaf in self.leaves]).reshape(-1)

    def diagonal(self) -> Any:
        return self.spec.tree([diagonal(leaf, self._omega) for leaf in self.leaves])

    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        parts = [outer(leaf) for leaf in self.leaves]
        if self.leaves[0].rows > 1 and all(part is not None for part in parts):
            return outer_moment([part for part in parts if part is not None], self._omega, factor)
        matrix = factor * self.as_matrix()
        full = matmul((self.weights[:, None] * matrix).T, matrix)
        return 0.5 * (full + full.T)

    def expanded_moments(self) -> tuple[Moments | None, ...]:
        return tuple(expanded_moments(leaf, self._omega) for leaf in self.leaves)

    def reduced_moments(self) -> tuple[Moments | None, ...]:
        return tuple(reduced_moments(leaf, self._omega) for leaf in self.leaves)

    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        return squares_along(basis, self.leaves, self._omega)

    def centered(self) -> Scores:
        means = [leaf.means(self._omega) for leaf in self.leaves]
        shifted = tuple(leaf.shifted(mean) for leaf, mean in zip(self.leaves, means, strict=True))
        return CenteredScores(dataclasses.replace(self, leaves=shifted), self.weights)

    def as_matrix(self) -> Float[Array, "rows p"]:
        return jnp.concatenate([leaf.gradient().reshape(self.num_rows, -1) for leaf in self.leaves], axis=1)

    def bound(self) -> Scalar:
        return jnp.max(functools.reduce(jnp.maximum, [leaf.sizes() for leaf in self.leaves if leaf.layer is None]))

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> HeldScores:
        return HeldScores(_kept_leaves(self.leaves, keep), self.weights, spec)


def _kept_leaves(leaves: tuple[Leaf, ...], keep: tuple[bool, ...]) -> tuple[Leaf, ...]:
    """Some of the leaves; a layer that has lost its weight or its bias is no longer one."""
    place = {old: new for new, old in enumerate(k for k, flag in enumerate(keep) if flag)}
    joined = {leaf.layer for k, leaf in enumerate(leaves) if keep[k]}
    return tuple(
        dataclasses.replace(leaf, layer=place.get(leaf.layer), bias=k in joined)  # type: ignore[arg-type]
        for k, leaf in enumerate(leaves)
        if keep[k]
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "data", "weights", "live", "shift", "factors"),
    meta_fields=("rows", "spec", "batch_size", "keep"),
)
@dataclasses.dataclass(frozen=True)
class StreamedScores(FactoredScores):
    """Scores made again, ``batch_size`` examples at a time, whenever they are needed.

    ``live`` tells the examples from padding; None where nothing is padding.
    """

    rows: Rows
    params: Any
    data: tuple[Any, ...]
    weights: Float[Array, " rows"]
    spec: ParamSpec
    batch_size: int
    keep: tuple[bool, ...]
    live: Bool[Array, " n"] | None = None
    shift: tuple[Any, ...] | None = None
    factors: tuple[Scalar, ...] | None = None

    @property
    def layers(self) -> tuple[int | None, ...]:
        if self.factors is not None or self.shift is not None:
            return (None,) * len(self.spec.paths)
        return tuple(leaf.layer for leaf in _kept_leaves(self._shapes(), self.keep))

    @property
    def touched(self) -> tuple[bool, ...]:
        return tuple(bool(leaf.forms) for leaf in kept(self._shapes(), self.keep))

    def _shapes(self) -> tuple[Leaf, ...]:
        """The leaves of one example, without values."""
        shapes: tuple[Leaf, ...] = jax.eval_shape(self._leaves, *jax.tree.map(lambda leaf: leaf[:1], self.data))
        return shapes

    @property
    def mass(self) -> Scalar:
        return jnp.sum(self.weights) * num_examples(self.data, "data") / self.num_rows

    def rescaled(self, factors: tuple[Scalar, ...]) -> StreamedScores:
        old = factors if self.factors is None else tuple(a * b for a, b in zip(self.factors, factors, strict=True))
        return dataclasses.replace(self, factors=old)

    def _leaves(self, *data: Any) -> tuple[Leaf, ...]:
        """The leaves of a piece of the data, as the engine gives them."""
        traced = trace(self.rows, self.params, data)
        return leaf_forms(traced, self.rows, self.params, data, param_spec(self.params))[1]

    def _held(self, weights: Float[Array, "n m"], live: Bool[Array, " n"] | None, *data: Any) -> HeldScores:
        leaves = _masked(self._leaves(*data), live)
        if self.shift is not None:
            leaves = tuple(leaf.shifted(means) for leaf, means in zip(leaves, self.shift, strict=True))
        held = HeldScores(_kept_leaves(leaves, self.keep), weights.reshape(-1), self.spec)
        return held if self.factors is None else held.rescaled(self.factors)

    def _by_example(self, w: Float[Array, " rows"]) -> Float[Array, "n m"]:
        return w.reshape(num_examples(self.data, "data"), -1)

    def _weighted_data(self) -> tuple[Any, ...]:
        return (self._by_example(self.weights), self.live, *self.data)

    def _map(self, function: Callable[[HeldScores], Array]) -> Array:
        """``function`` of the held rows of each piece, joined along its leading axis."""
        joined: Array = map_batches(lambda *piece: function(self._held(*piece)), self._weighted_data(), self.batch_size)
        return joined

    def _sum(self, function: Callable[[HeldScores], Any]) -> Any:
        """The sum over pieces of ``function`` of their held rows."""
        return sum_batches(lambda *piece: function(self._held(*piece)), self._weighted_data(), self.batch_size)

    def _mv(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        return self._map(lambda held: held._mv(v, seal))

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        def piece(w: Array, *data: Any) -> Any:
            return self._held(*data).rmv(w.reshape(-1))

        data = (self._by_example(self._row_numbers(w)), *self._weighted_data())
        return sum_batches(piece, data, self.batch_size)

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        # Tiles of the upper triangle, each from two blocks of rows made on the spot.
        n = num_examples(self.data, "data")
        blocks = -(-n // self.batch_size)
        index = jnp.minimum(jnp.arange(blocks * self.batch_size), n - 1).reshape(blocks, self.batch_size)
        data = self._weighted_data()

        def block(i: Array) -> HeldScores:
            return self._held(*jax.tree.map(lambda leaf: leaf[index[i]], data))

        upper, lower = np.triu_indices(blocks)
        tiles = jax.lax.map(
            lambda pair: block(pair[0]).cross_gram(block(pair[1]), factor), (jnp.asarray(upper), jnp.asarray(lower))
        )
        side = tiles.shape[1]
        grid = jnp.zeros((blocks, blocks, side, side), tiles.dtype)
        grid = grid.at[upper, lower].set(tiles)
        return grid.swapaxes(1, 2).reshape(blocks * side, blocks * side)[: self.num_rows, : self.num_rows]

    def squared_norms(self) -> Float[Array, " rows"]:
        return self._map(HeldScores.squared_norms)

    def diagonal(self) -> Any:
        return self._sum(HeldScores.diagonal)

    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        return self._sum(lambda held: held.scaled_moment(factor))

    def expanded_moments(self) -> tuple[Moments | None, ...]:
        found: tuple[Moments | None, ...] = self._sum(HeldScores.expanded_moments)
        return found

    def reduced_moments(self) -> tuple[Moments | None, ...]:
        found: tuple[Moments | None, ...] = self._sum(HeldScores.reduced_moments)
        return found

    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        squares: Array = self._sum(lambda held: held.squares_along(basis))
        return squares

    def centered(self) -> Scores:
        # Any constant near the mean will do for the shift: that of the first examples.
        return CenteredScores(dataclasses.replace(self, shift=_first_means(self)), self.weights)

    def as_matrix(self) -> Float[Array, "rows p"]:
        return self._map(HeldScores.as_matrix)

    def bound(self) -> Scalar:
        return jnp.max(self._map(lambda held: held.bound()[None]))

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> StreamedScores:
        factors = None if self.factors is None else tuple(kept(self.factors, keep))
        return dataclasses.replace(self, keep=narrowed(self.keep, keep), spec=spec, factors=factors)


@once
def _first_means(scores: StreamedScores) -> tuple[Any, ...]:
    """The means of the factors over the first examples."""
    weights, _, *first = jax.tree.map(lambda leaf: leaf[: scores.batch_size], scores._weighted_data())
    return tuple(leaf.means(jnp.ones_like(weights)) for leaf in scores._leaves(*first))


@partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class JoinedScores(Scores):
    """The rows of several blocks of scores, one after the other."""

    parts: tuple[HeldScores, ...]

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.parts[0].spec

    @property
    def weights(self) -> Float[Array, " rows"]:  # type: ignore[override]
        """The weights of all rows."""
        return jnp.concatenate([part.weights for part in self.parts])

    @property
    def mass(self) -> Scalar:
        masses: Scalar = total([part.mass for part in self.parts])
        return masses

    def rescaled(self, factors: tuple[Scalar, ...]) -> JoinedScores:
        return JoinedScores(tuple(part.rescaled(factors) for part in self.parts))

    def _mv(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        return jnp.concatenate([part._mv(v, seal) for part in self.parts])

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        ends = np.cumsum([part.num_rows for part in self.parts])[:-1]
        pieces = jnp.split(self._row_numbers(w), ends)
        return total([part.rmv(piece) for part, piece in zip(self.parts, pieces, strict=True)])

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        strips = []
        for i, part in enumerate(self.parts):
            blocks = [jnp.zeros((part.num_rows, before.num_rows), part.spec.dtype) for before in self.parts[:i]]
            strips.append(
                [*blocks, part.gram_upper(factor), *(part.cross_gram(after, factor) for after in self.parts[i + 1 :])]
            )
        return jnp.block(strips)

    def squared_norms(self) -> Float[Array, " rows"]:
        return jnp.concatenate([part.squared_norms() for part in self.parts])

    def diagonal(self) -> Any:
        return total([part.diagonal() for part in self.parts])

    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        return total([part.scaled_moment(factor) for part in self.parts])

    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        squares: Array = total([part.squares_along(basis) for part in self.parts])
        return squares

    def as_matrix(self) -> Float[Array, "rows p"]:
        return jnp.concatenate([part.as_matrix() for part in self.parts])

    def bound(self) -> Scalar:
        return jnp.max(jnp.stack([part.bound() for part in self.parts]))

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> JoinedScores:
        return JoinedScores(tuple(part.restrict(keep, spec) for part in self.parts))

    def centered(self) -> Scores:
        return CenteredScores(self, self.weights)

    def reweighted(self, factor: Any) -> JoinedScores:
        return JoinedScores(tuple(dataclasses.replace(part, weights=part.weights * factor) for part in self.parts))


@partial(jax.tree_util.register_dataclass, data_fields=("scores", "mean_weights"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class CenteredScores(Scores):
    r"""``Q S`` with ``Q = diag(live) (I - 1 omega^T)``: every row less the weighted mean row, and zero where it is padding.

    The projection acts on rows, so the factors of ``S`` stay. A mean that dominates the scores must be taken out of the
    factors first (`shifted`), or the difference is lost in rounding.
    """

    scores: Scores
    mean_weights: Float[Array, " rows"]

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.scores.spec

    @property
    def weights(self) -> Float[Array, " rows"]:  # type: ignore[override]
        """The weights of the rows."""
        return self.scores.weights

    @property
    def mass(self) -> Scalar:
        return self.scores.mass

    def rescaled(self, factors: tuple[Scalar, ...]) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.rescaled(factors))

    @property
    def _live(self) -> Bool[Array, " rows"]:
        """Which rows are those of examples: padding has no weight in the mean, and nothing to take it from."""
        return self.mean_weights != 0

    def _mean(self) -> Any:
        return self.scores.rmv(self.mean_weights)

    def _mv(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        product = self.scores._mv(v, seal)
        return jnp.where(self._live, product - jnp.sum(self.mean_weights * product), 0)

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        w = jnp.where(self._live, self._row_numbers(w), 0)
        return self.scores.rmv(w - self.mean_weights * jnp.sum(w))

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        full = mirrored(self.scores.gram_upper(factor))
        mean = matmul(full, self.mean_weights)
        centred = full - (mean[:, None] + mean[None, :] - jnp.sum(self.mean_weights * mean))
        return jnp.where(self._live[:, None] & self._live[None, :], centred, 0)

    def squared_norms(self) -> Float[Array, " rows"]:
        mean = self._mean()
        norms = self.scores.squared_norms() - 2 * self.scores.mv(mean) + dot(mean, mean)
        return jnp.where(self._live, norms, 0)

    def diagonal(self) -> Any:
        # sum w (s - c)^2 = sum w s^2 - c (2 sum w s - c sum w).
        whole, weighted, mean = self.scores.diagonal(), self.scores.rmv(self.weights), self._mean()
        mass = jnp.sum(self.weights)
        return jax.tree.map(lambda d, s, c: d - c * (2 * s - mass * c), whole, weighted, mean)

    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        means = self.scores.rmv(self.weights), self._mean()
        weighted, mean = (factor * self.spec.ravel(vector, "mean") for vector in means)
        cross = weighted[:, None] * mean[None, :]
        return self.scores.scaled_moment(factor) - cross - cross.T + jnp.sum(self.weights) * mean[:, None] * mean[None, :]

    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        # As in `diagonal`.
        whole, weighted, mean = self.scores.squares_along(basis), self.scores.rmv(self.weights), self._mean()
        s, c = basis.turned(weighted), basis.turned(mean)
        return whole - c * (2 * s - jnp.sum(self.weights) * c)

    def as_matrix(self) -> Float[Array, "rows p"]:
        centred = self.scores.as_matrix() - self.spec.ravel(self._mean(), "mean")[None, :]
        return jnp.where(self._live[:, None], centred, 0)

    def bound(self) -> Scalar:
        return 2 * self.scores.bound()

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.restrict(keep, spec))

    def centered(self) -> Scores:
        return CenteredScores(self, self.weights)

    def reweighted(self, factor: Any) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.reweighted(factor))


def total(parts: Sequence[Any]) -> Any:
    """The sum of arrays or of trees of them."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)


def make_scores(rows: Rows, params: chex.ArrayTree, batch: Batch) -> Scores:
    """The scores of a row function over a batch: held in memory, or streamed where memory is bounded."""
    return _values_and_scores(rows, params, batch)[1]


def values_and_scores(log_prob: LogProb, params: chex.ArrayTree, batch: Batch) -> tuple[Float[Array, " n"], Scores]:
    """Every example's log-density with its score: one backward pass where the scores are held."""
    values, made = _values_and_scores(ScoreRows(log_prob), params, batch)
    if isinstance(made, StreamedScores):
        values = _values(log_prob, params, batch, Static(made.batch_size))
    return values.astype(batch.spec.dtype), made


@once_for
def _values(log_prob: LogProb, params: chex.ArrayTree, batch: Batch, pieces: Static[int]) -> Float[Array, " n"]:
    values: Array = map_batches(lambda *piece: map_examples(log_prob, params, piece), batch.data, pieces.value)
    return values


def _values_and_scores(rows: Rows, params: chex.ArrayTree, batch: Batch) -> tuple[Any, Scores]:
    made, weights = _run(rows, params, batch)
    if not isinstance(made, Static):
        aux, leaves = made
        return (aux[0] if aux else None), HeldScores(leaves, weights, batch.spec)
    keep = (True,) * len(batch.spec.paths)
    return None, StreamedScores(rows, params, batch.data, weights, batch.spec, made.value, keep, batch.live)


@once_for
def _run(rows: Rows, params: chex.ArrayTree, batch: Batch) -> tuple[tuple[Any, Any] | Static[int], Float[Array, " rows"]]:
    """What rows come with and the forms of their leaves, or how many examples make them at a time; and their weights."""
    with of_one_example(rows.function, rows.name, params, batch.data[rows.own :]):
        traced = trace(rows, params, batch.data)
    weights = jnp.repeat(batch.weights, traced.rows)
    batch_size = _batch_size(traced, rows, params, batch)
    if batch_size is None or batch_size >= batch.size:
        aux, leaves = leaf_forms(traced, rows, params, batch.data, batch.spec)
        return (aux, _masked(leaves, batch.live)), weights
    return Static(batch_size), weights


def _masked(leaves: tuple[Leaf, ...], live: Bool[Array, " n"] | None) -> tuple[Leaf, ...]:
    """The leaves with rows of zeros for padding."""
    return leaves if live is None else tuple(leaf.masked(live) for leaf in leaves)


PLAIN_BYTES = 2**30
"""What gradients formed against the library's wish may take in all before they are made in pieces instead of held."""


def _batch_size(traced: Traced, rows: Rows, params: chex.ArrayTree, batch: Batch) -> int | None:
    """How many examples to work on at a time: as asked for, else by the memory one example takes; None for all at once."""
    limit = batch.max_bytes
    if limit is None:
        if batch.batch_size is not None:
            return batch.batch_size
        shapes = jax.eval_shape(lambda data: leaf_forms(traced, rows, params, data, batch.spec)[1], batch.data)
        if sum(leaf.bytes for leaf in shapes if leaf.why is not None) <= PLAIN_BYTES:
            return None
        limit = PLAIN_BYTES
    first = jax.tree.map(lambda leaf: leaf[:1], batch.data)
    one = jax.eval_shape(lambda data: leaf_forms(traced, rows, params, data, batch.spec)[1], first)
    beside = max(working(leaf) for leaf in one)
    taken = sum(leaf.bytes for leaf in one) + batch.spec.dtype.itemsize * (traced.rows * traced.program.size + beside)
    if taken > limit:
        raise ValueError(
            f"`max_bytes` is {limit:,}, but the scores of one example take {taken:,}: its activations, what is held of its "
            "scores and what is made of them. Allow more, or see jf.explain for the leaf that takes most."
        )
    return int(limit // taken)


def scores(
    log_prob: LogProb, center: bool = False, *, batch_size: int | None = None, max_bytes: int | None = None
) -> Callable[..., Scores]:
    r"""Per-example scores: a function ``(params, *data, weights=None) -> Scores``.

    .. math:: S_{ij} = \partial_{\theta_j} \log p_\theta(x_i), \qquad S \in R^{n \times p}.

    Args:
        log_prob: ``(params, *example) -> scalar``, the log-density of ONE example; the library maps it over the data.
        center: subtract the (weighted) mean score, so that ``S^T S / n`` is the covariance of the score.
        batch_size: make the scores again in pieces of so many examples whenever they are needed, instead of holding them.
        max_bytes: instead of a ``batch_size``: as many examples at a time as keep what is held and what is made of it below
            this, results aside.

    Returns:
        A function of the parameters and the data, every array of which has a leading axis of n examples; ``weights``, shape
        ``[n]``, turn means into ``sum w_i (.) / sum w_i``, and a weight of zero is padding: a row of zeros, whatever the data.

    Raises:
        ValueError: (when called) arrays of different lengths, a non-scalar ``log_prob``, one that is a batch mean, weights of
            another shape, or known to be negative, not finite or all zero; a ``batch_size`` below one, a ``max_bytes`` that
            one example exceeds. Weights whose values are not known when it is traced, and that are such, give NaN.
        TypeError: ``center`` is neither True nor False; (when called) a parameter that is not a real floating array.

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

    def scores_of(params: chex.ArrayTree, *data: Any, weights: Float[Array, " n"] | None = None) -> Scores:
        needs_data(data, "scores")
        made = make_scores(rows, params, make_batch(params, data, weights, batch_size, max_bytes))
        return made.centered() if center else made

    return scores_of
