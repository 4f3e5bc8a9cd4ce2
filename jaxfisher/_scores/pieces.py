"""Scores that are processed in pieces: recomputed chunk by chunk whenever they are needed, or joined from blocks of rows."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._automatic import automatic
from jaxfisher._engine import Basis, Leaf, Moments, Seal, cross_gram, leaf_forms, trace
from jaxfisher._examples import num_examples
from jaxfisher._once import Static, once
from jaxfisher._pieces import Pieces, map_batches, pieces, sum_batches
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._row_functions import Rows
from jaxfisher._scores.centred import CenteredScores
from jaxfisher._scores.held import HeldScores, kept_leaves
from jaxfisher._scores.map import FactoredScores, Role, Scores, roles_of, total
from jaxfisher._tree import ParamSpec, kept, narrowed, param_spec


class ScoresInPieces(Scores):
    """Scores that are processed one block of held rows after the other; subclasses say in two methods how blocks are made."""

    @abc.abstractmethod
    def _map(self, function: Callable[..., Array], *given: Array) -> Array:
        """``function`` of each block's held rows and of the matching entries of ``given``; results are joined along rows."""

    @abc.abstractmethod
    def _sum(self, function: Callable[..., Any], *given: Array) -> Any:
        """The sum over blocks of ``function`` of the same arguments."""

    def product(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        return self._map(lambda held: held.product(v, seal))

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        return self._sum(HeldScores.rmv, self._row_numbers(w))

    def _crossed(self, other: Scores) -> Float[Array, "rows others"]:
        return self._map(lambda held: held._crossed(other))

    def _beside(self, leaves: Sequence[Leaf]) -> Float[Array, "rows others"]:
        return self._map(lambda held: held._beside(leaves))

    def squared_norms(self) -> Float[Array, " rows"]:
        return self._map(HeldScores.squared_norms)

    def _clipped(self, max_norm: Scalar) -> tuple[Any, Int[Array, ""]]:
        clipped: tuple[Any, Int[Array, ""]] = self._sum(lambda held: held._clipped(max_norm))
        return clipped

    def diagonal(self) -> Any:
        return self._sum(HeldScores.diagonal)

    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        moment: Array = self._sum(lambda held: held.scaled_moment(factor))
        return moment

    def _inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        found: Array = self._sum(lambda held: held._inner_products(vectors))
        return found

    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        squares: Array = self._sum(lambda held: held.squares_along(basis))
        return squares

    def as_matrix(self) -> Float[Array, "rows p"]:
        return self._map(HeldScores.as_matrix)

    def bound(self) -> Scalar:
        return jnp.max(self._map(lambda held: jnp.full(held.num_rows, held.bound())))


@array_fields("params", "data", "weights", "live", "shift", "factors", "provenance", repr=False)
class StreamedScores(ScoresInPieces, FactoredScores):
    """Scores recomputed whenever they are needed, ``batch_size`` examples at a time.

    ``live`` is true for examples and false for padding; None if there is no padding.
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
    provenance: Provenance = Provenance("scores")

    @property
    def _num_examples(self) -> int:
        return num_examples(self.data, "data")

    @property
    def _way(self) -> str:
        return f"in pieces of {self.batch_size:,}"

    @property
    def roles(self) -> tuple[Role, ...]:
        made = roles_of(kept_leaves(self._shapes(), self.keep))
        changed = self.factors is not None or self.shift is not None
        return tuple(role._replace(layer=None) for role in made) if changed else made

    def _shapes(self) -> tuple[Leaf, ...]:
        """The leaves of one example, without values."""
        shapes: tuple[Leaf, ...] = jax.eval_shape(_leaves_of_one, self)
        return shapes

    def rescaled(self, factors: tuple[Scalar, ...]) -> StreamedScores:
        old = factors if self.factors is None else tuple(a * b for a, b in zip(self.factors, factors, strict=True))
        return dataclasses.replace(self, factors=old)

    def _leaves(self, *data: Any) -> tuple[Leaf, ...]:
        """The leaves of a piece of the data, as the engine returns them."""
        traced = trace(self.rows, self.params, data)
        return leaf_forms(traced, self.params, data, param_spec(self.params))[1]

    def _held(self, weights: Float[Array, "n m"], live: Bool[Array, " n"] | None, *data: Any) -> HeldScores:
        leaves = masked(self._leaves(*data), live)
        if self.shift is not None:
            leaves = tuple(leaf.shifted(means) for leaf, means in zip(leaves, self.shift, strict=True))
        held = HeldScores(kept_leaves(leaves, self.keep), weights.reshape(-1), self.spec)
        return held if self.factors is None else held.rescaled(self.factors)

    def _by_example(self, w: Float[Array, " rows"]) -> Float[Array, "n m"]:
        return w.reshape(self._num_examples, -1)

    def _pieces(self, function: Callable[..., Any], gather: Callable[..., Any], given: Sequence[Array]) -> Any:
        def piece(own: tuple[Array, ...], data: tuple[Any, ...]) -> Any:
            return function(self._held(*data), *(entries.reshape(-1) for entries in own))

        return gather(piece, (tuple(map(self._by_example, given)), self._weighted_data()), self.batch_size)

    def _map(self, function: Callable[..., Array], *given: Array) -> Array:
        joined: Array = self._pieces(function, map_batches, given)
        return joined

    def _sum(self, function: Callable[..., Any], *given: Array) -> Any:
        return self._pieces(function, sum_batches, given)

    def _weighted_data(self) -> tuple[Any, ...]:
        return (self._by_example(self.weights), self.live, *self.data)

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        cut = pieces(self._weighted_data(), self.batch_size)
        if cut is None:
            return self._held(*self._weighted_data()).gram_upper(factor)
        whole = self._gram_of_pieces(cut, factor)
        if cut.rest is None:
            return whole
        last = self._held(*cut.rest)
        block = lambda i: cross_gram(self._held(*cut.piece(i)).leaves, last.leaves, factor)  # noqa: E731
        beside = cut.in_order(jax.lax.map(block, jnp.arange(cut.count)))
        return jnp.block([[whole, beside], [jnp.zeros_like(beside.T), last.gram_upper(factor)]])

    def _gram_of_pieces(self, cut: Pieces, factor: Scalar) -> Float[Array, "rows rows"]:
        """The inner products of pairs of pieces, each pair once; both pieces are computed on the spot."""
        one, other = np.triu_indices(cut.count)

        def tile(pair: tuple[Array, Array]) -> Array:
            first, second = (self._held(*cut.piece(i)).leaves for i in pair)
            return cross_gram(first, second, factor)

        tiles = jax.lax.map(tile, (jnp.asarray(one), jnp.asarray(other)))
        side = tiles.shape[1]
        grid = jnp.zeros((cut.count, cut.count, side, side), tiles.dtype).at[one, other].set(tiles)
        rows = cut.in_order(grid.swapaxes(1, 2))  # [rows, piece, row]
        known = cut.in_order(jnp.moveaxis(rows, 0, -1)).T
        # Each product was computed once, with the row of the earlier piece first; mirror it for the other order.
        piece = cut.in_order(jnp.repeat(jnp.arange(cut.count)[:, None], side, axis=1))
        return jnp.where(piece[:, None] <= piece[None, :], known, known.T)

    def expanded_moments(self) -> tuple[Moments | None, ...]:
        found: tuple[Moments | None, ...] = self._sum(HeldScores.expanded_moments)
        return found

    def reduced_moments(self) -> tuple[Moments | None, ...]:
        found: tuple[Moments | None, ...] = self._sum(HeldScores.reduced_moments)
        return found

    def centered(self, kinds: int = 1) -> Scores:
        # The shift may be any constant near the mean: take the mean of one piece.
        return CenteredScores(dataclasses.replace(self, shift=_first_means(self, Static(kinds))), self.weights, kinds)

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> StreamedScores:
        factors = None if self.factors is None else tuple(kept(self.factors, keep))
        return dataclasses.replace(self, keep=narrowed(self.keep, keep), spec=spec, factors=factors)


def _leaves_of_first(scores: StreamedScores) -> tuple[Leaf, ...]:
    return scores._leaves(*jax.tree.map(lambda leaf: leaf[:1], scores.data))


_leaves_of_one = automatic(_leaves_of_first)
"""`_leaves_of_first` as a single function object, so that JAX reuses its trace. The axes are made automatic, since the first
example cannot be sliced off data that are sharded over explicit axes."""


@once
def _first_means(scores: StreamedScores, kinds: Static[int]) -> tuple[Any, ...]:
    """The means of the factors over the examples of one piece."""
    cut = pieces(scores._weighted_data(), scores.batch_size)
    weights, _, *data = scores._weighted_data() if cut is None else cut.piece(jnp.zeros((), jnp.int32))
    return tuple(leaf.means(jnp.ones_like(weights), kinds.value) for leaf in scores._leaves(*data))


def masked(leaves: tuple[Leaf, ...], live: Bool[Array, " n"] | None) -> tuple[Leaf, ...]:
    """The leaves, with rows of zeros for padding."""
    return leaves if live is None else tuple(leaf.masked(live) for leaf in leaves)


@array_fields("parts", repr=False)
class JoinedScores(ScoresInPieces):
    """The rows of several blocks of scores, one after the other."""

    parts: tuple[HeldScores, ...]

    @property
    def _num_examples(self) -> int:
        return sum(part._num_examples for part in self.parts)

    @property
    def _way(self) -> str:
        return f"in {len(self.parts)} blocks"

    @property
    def provenance(self) -> Provenance:  # type: ignore[override]
        """The provenance of the sum of the blocks' means."""
        return functools.reduce(Provenance.plus, [part.provenance for part in self.parts])

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.parts[0].spec

    @property
    def weights(self) -> Float[Array, " rows"]:  # type: ignore[override]
        """The weights of all rows."""
        return _one_after_the_other([part.weights for part in self.parts])

    def rescaled(self, factors: tuple[Scalar, ...]) -> JoinedScores:
        return JoinedScores(tuple(part.rescaled(factors) for part in self.parts))

    def _blocks(self, given: Sequence[Array]) -> list[tuple[Any, ...]]:
        ends = np.cumsum([part.num_rows for part in self.parts])[:-1]
        return list(zip(self.parts, *(jnp.split(entries, ends) for entries in given), strict=True))

    def _map(self, function: Callable[..., Array], *given: Array) -> Array:
        return _one_after_the_other([function(*block) for block in self._blocks(given)])

    def _sum(self, function: Callable[..., Any], *given: Array) -> Any:
        return total([function(*block) for block in self._blocks(given)])

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        strips = []
        for i, part in enumerate(self.parts):
            blocks = [jnp.zeros((part.num_rows, before.num_rows), part.spec.dtype) for before in self.parts[:i]]
            beside = [cross_gram(part.leaves, after.leaves, factor) for after in self.parts[i + 1 :]]
            strips.append([*blocks, part.gram_upper(factor), *beside])
        return jnp.block(strips)

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> JoinedScores:
        return JoinedScores(tuple(part.restrict(keep, spec) for part in self.parts))

    def centered(self, kinds: int = 1) -> Scores:
        return CenteredScores(self, self.weights, kinds)

    def reweighted(self, factor: Any) -> JoinedScores:
        return JoinedScores(tuple(dataclasses.replace(part, weights=part.weights * factor) for part in self.parts))


@once
def _one_after_the_other(blocks: Sequence[Array]) -> Array:
    """Blocks of rows, concatenated; some may be sharded over explicit axes of a mesh and others not."""
    return jnp.concatenate(blocks)
