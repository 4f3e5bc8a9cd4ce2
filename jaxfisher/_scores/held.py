"""Scores held in memory, leaf by leaf."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._engine import (
    Basis,
    Leaf,
    Moments,
    Seal,
    cross_gram,
    diagonal,
    expanded_moments,
    gram_upper,
    outer,
    outer_moment,
    reduced_moments,
    squared_norms,
    squares_along,
)
from jaxfisher._linalg import inverse_power, matmul, power_of_two, square_root
from jaxfisher._once import Static, once
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._scores.centred import CenteredScores
from jaxfisher._scores.map import FactoredScores, Role, Scores, roles_of, total
from jaxfisher._tree import ParamSpec, joined


@array_fields("leaves", "weights", "provenance", repr=False)
class HeldScores(FactoredScores):
    """Scores held in memory, each parameter leaf in its own form: as factors, if its gradients have factors."""

    leaves: tuple[Leaf, ...]
    weights: Float[Array, " rows"]
    spec: ParamSpec
    provenance: Provenance = Provenance("scores")

    @property
    def _way(self) -> str:
        return "held"

    @property
    def _omega(self) -> Float[Array, "examples rows"]:
        return self._by_example(self.weights)

    def _by_example(self, w: Float[Array, " rows"]) -> Float[Array, "examples rows"]:
        return w.reshape(self.leaves[0].examples, self.leaves[0].rows)

    @property
    def roles(self) -> tuple[Role, ...]:
        return roles_of(self.leaves)

    @property
    def _distinct(self) -> list[Leaf]:
        """The leaves, with arrays that a layer's weight and bias share held once."""
        return [leaf if leaf.layer is None else leaf.beside(self.leaves[leaf.layer]) for leaf in self.leaves]

    def rescaled(self, factors: tuple[Scalar, ...]) -> HeldScores:
        leaves = tuple(leaf.times(factor) for leaf, factor in zip(self.leaves, factors, strict=True))
        return dataclasses.replace(self, leaves=leaves)

    def product(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        given = self.spec.leaves(v, "v")
        biases = {leaf.layer: x for leaf, x in zip(self.leaves, given, strict=True) if leaf.layer is not None}
        parts = [
            leaf.mv(x, seal, biases.get(k))
            for k, (leaf, x) in enumerate(zip(self.leaves, given, strict=True))
            if leaf.layer is None
        ]
        return total(parts).reshape(-1)

    @property
    def _num_examples(self) -> int:
        return self.leaves[0].examples

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        w = self._by_example(self._row_numbers(w))
        return joined(self.spec.tree([leaf.rmv(w) for leaf in self._distinct]))

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        return gram_upper(self.leaves, factor)

    def _crossed(self, other: Scores) -> Float[Array, "rows others"]:
        return other._beside(self.leaves).T

    def _beside(self, leaves: Sequence[Leaf]) -> Float[Array, "rows others"]:
        return cross_gram(self.leaves, leaves, jnp.ones((), self.spec.dtype))

    def squared_norms(self) -> Float[Array, " rows"]:
        return total([squared_norms(leaf) for leaf in self.leaves]).reshape(-1)

    def _clipped(self, max_norm: Scalar) -> tuple[Any, Int[Array, ""]]:
        # Scale each row by itself: in common units the square of a small row may underflow, and the row would not be clipped.
        tiny = float(jnp.finfo(self.spec.dtype).tiny)
        down = inverse_power(jnp.clip(self._row_sizes(), tiny, 1 / tiny))
        scaled = dataclasses.replace(self, leaves=tuple(leaf.rows_times(down) for leaf in self.leaves))
        norms = square_root(scaled.squared_norms())
        down = jnp.broadcast_to(down, self._omega.shape).reshape(-1)
        longer = norms > max_norm * down
        # Sum the scaled rows in units near the bound: a factor from a huge row to a small bound could underflow.
        unit = power_of_two(jnp.clip(max_norm, tiny, 1))
        share = jnp.where(longer, max_norm / unit / jnp.where(longer, norms, 1), 1 / jnp.where(longer, 1, down * unit))
        whole = jax.tree.map(lambda leaf: unit.astype(leaf.dtype) * leaf, scaled.rmv(share))
        return whole, jnp.sum(longer, dtype=jnp.int32)

    def _row_sizes(self) -> Float[Array, "n rows"]:
        """An upper bound on the entries of each row, as `bound` is for all; axes have length one if rows share the bound."""
        return functools.reduce(jnp.maximum, [leaf.sizes() for leaf in self.leaves if leaf.layer is None])

    def diagonal(self) -> Any:
        return joined(self.spec.tree([diagonal(leaf, self._omega) for leaf in self.leaves]))

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

    def centered(self, kinds: int = 1) -> Scores:
        return _centered(self, Static(kinds))

    def as_matrix(self) -> Float[Array, "rows p"]:
        return jnp.concatenate([leaf.gradient().reshape(self.num_rows, -1) for leaf in self.leaves], axis=1)

    def bound(self) -> Scalar:
        return jnp.max(self._row_sizes() * jnp.sqrt(self._omega))

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> HeldScores:
        return dataclasses.replace(self, leaves=kept_leaves(self.leaves, keep), spec=spec)


@partial(once, examples=lambda scores, kinds: scores)
def _centered(scores: HeldScores, kinds: Static[int]) -> Scores:
    means = [leaf.means(scores._omega, kinds.value) for leaf in scores.leaves]
    shifted = tuple(leaf.shifted(mean) for leaf, mean in zip(scores.leaves, means, strict=True))
    return CenteredScores(dataclasses.replace(scores, leaves=shifted), scores.weights, kinds.value)


def kept_leaves(leaves: tuple[Leaf, ...], keep: tuple[bool, ...]) -> tuple[Leaf, ...]:
    """Some of the leaves; a weight and a bias that lose each other are no longer a layer."""
    place = {old: new for new, old in enumerate(k for k, flag in enumerate(keep) if flag)}
    joined = {leaf.layer for k, leaf in enumerate(leaves) if keep[k]}
    return tuple(
        dataclasses.replace(leaf, layer=place.get(leaf.layer), bias=k in joined)  # type: ignore[arg-type]
        for k, leaf in enumerate(leaves)
        if keep[k]
    )
