"""Scores less their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._engine import Basis, Leaf, Seal
from jaxfisher._linalg import matmul, mirrored
from jaxfisher._pytree import array_fields
from jaxfisher._scores.map import Scores
from jaxfisher._tree import ParamSpec, dot


@array_fields("scores", "mean_weights", repr=False)
class CenteredScores(Scores):
    r"""``Q S`` with ``Q = diag(live) (I - 1 omega^T)``: every row less the weighted mean row, and zero where it is padding.

    The projection acts on rows, so the factors of ``S`` stay. A mean that dominates the scores must be taken out of the
    factors first (`shifted`), or the difference is lost in rounding.
    """

    scores: Scores
    mean_weights: Float[Array, " rows"]

    @property
    def _way(self) -> str:
        return f"{self.scores._way}, centred"

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.scores.spec

    @property
    def weights(self) -> Float[Array, " rows"]:  # type: ignore[override]
        """The weights of the rows."""
        return self.scores.weights

    def rescaled(self, factors: tuple[Scalar, ...]) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.rescaled(factors))

    @property
    def _live(self) -> Bool[Array, " rows"]:
        """Which rows are those of examples: padding has no weight in the mean, and nothing to take it from."""
        return self.mean_weights != 0

    def _mean(self) -> Any:
        return self.scores.rmv(self.mean_weights)

    def product(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        product = self.scores.product(v, seal)
        return jnp.where(self._live, product - jnp.sum(self.mean_weights * product), 0)

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        w = jnp.where(self._live, self._row_numbers(w), 0)
        return self.scores.rmv(w - self.mean_weights * jnp.sum(w))

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        full = mirrored(self.scores.gram_upper(factor))
        mean = matmul(full, self.mean_weights)
        centred = full - (mean[:, None] + mean[None, :] - jnp.sum(self.mean_weights * mean))
        return jnp.where(self._live[:, None] & self._live[None, :], centred, 0)

    def _crossed(self, other: Scores) -> Float[Array, "rows others"]:
        return self._less_mean(self.scores._crossed(other))

    def _beside(self, leaves: Sequence[Leaf]) -> Float[Array, "rows others"]:
        return self._less_mean(self.scores._beside(leaves))

    def _less_mean(self, products: Float[Array, "rows others"]) -> Float[Array, "rows others"]:
        """``Q`` applied to a matrix."""
        return jnp.where(self._live[:, None], products - matmul(self.mean_weights, products)[None, :], 0)

    def squared_norms(self) -> Float[Array, " rows"]:
        mean = self._mean()
        norms = self.scores.squared_norms() - 2 * self.scores.mv(mean) + dot(mean, mean)
        return jnp.where(self._live, norms, 0)

    def _clipped(self, max_norm: Scalar) -> tuple[Any, Int[Array, ""]]:
        raise TypeError(
            f"clipped_sum: {self} are centred, and the mean that is taken from every row depends on all examples, so that no "
            "bound on the rows is one on what a single example changes. Use scores that are not centred."
        )

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
