"""Scores minus their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._engine import Basis, Leaf, Seal
from jaxfisher._linalg import mirrored
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._scores.map import Scores
from jaxfisher._tree import ParamSpec, dot, joined, split


@array_fields("scores", "mean_weights", repr=False)
class CenteredScores(Scores):
    r"""``Q S`` with ``Q = diag(live) (I - 1 omega^T)``: every row minus the weighted mean row, and zero for padding.

    Rows of several ``kinds`` may alternate, such as those of the real and the imaginary part of an amplitude. Each row is then
    taken relative to the mean of its own kind: ``Q`` is one such projection for each kind.

    The projection acts on rows, so the factors of ``S`` stay. A mean that dominates the scores must be subtracted from the
    factors first (`shifted`), or the difference is lost in rounding.
    """

    scores: Scores
    mean_weights: Float[Array, " rows"]
    kinds: int = 1

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

    @property
    def provenance(self) -> Provenance:  # type: ignore[override]
        """The provenance of a mean with these weights; a covariance is computed from all examples together."""
        known = self.scores.provenance
        return dataclasses.replace(known, kind=f"{known.kind}, centred").as_a_whole()

    @property
    def _num_examples(self) -> int:
        return self.scores._num_examples

    def rescaled(self, factors: tuple[Scalar, ...]) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.rescaled(factors))

    @property
    def _live(self) -> Bool[Array, " rows"]:
        """Which rows are not padding. Padding has no weight in the mean, and its rows stay zero."""
        return self.mean_weights != 0

    def _sums(self, numbers: Float[Array, "rows ..."]) -> Float[Array, "kinds ..."]:
        """The sum over the rows of each kind."""
        return jnp.sum(numbers.reshape(-1, self.kinds, *numbers.shape[1:]), 0)

    def _own(self, values: Float[Array, "kinds ..."]) -> Float[Array, "rows ..."]:
        """The value of its kind for every row."""
        return jnp.tile(values, (self.weights.size // self.kinds, *(1,) * (values.ndim - 1)))

    def _of_kind(self, w: Float[Array, " rows"], kind: int) -> Float[Array, " rows"]:
        return jnp.where(jnp.arange(w.size) % self.kinds == kind, w, 0)

    def _of_each(self, w: Float[Array, " rows"]) -> list[Any]:
        """The weighted sum of the rows of each kind, with complex leaves split into parts."""
        return [split(self.scores.rmv(self._of_kind(w, kind))) for kind in range(self.kinds)]

    def product(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        product = self.scores.product(v, seal)
        return jnp.where(self._live, product - self._own(self._sums(self.mean_weights * product)), 0)

    def rmv(self, w: Float[Array, " rows"]) -> Any:
        w = jnp.where(self._live, self._row_numbers(w), 0)
        return self.scores.rmv(w - self.mean_weights * self._own(self._sums(w)))

    def _felt(self, e: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """``e`` minus its mean, which the centred scores cancel; divided by a small damping, its rounding error would show."""
        e = jnp.where(self._live, e, 0)
        return jnp.where(self._live, e - self._own(self._sums(self.mean_weights * e)), 0)

    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        full = mirrored(self.scores.gram_upper(factor))
        along = self._sums(self.mean_weights[:, None] * full)  # [kinds, rows]
        both = self._sums((self.mean_weights[None] * along).T)  # [kinds, kinds]
        centred = full - (self._own(along) + self._own(along).T - self._own(self._own(both).T))
        return jnp.where(self._live[:, None] & self._live[None, :], centred, 0)

    def _crossed(self, other: Scores) -> Float[Array, "rows others"]:
        return self._less_mean(self.scores._crossed(other))

    def _beside(self, leaves: Sequence[Leaf]) -> Float[Array, "rows others"]:
        return self._less_mean(self.scores._beside(leaves))

    def _less_mean(self, products: Float[Array, "rows others"]) -> Float[Array, "rows others"]:
        """``Q`` applied to a matrix."""
        means = self._sums(self.mean_weights[:, None] * products)
        return jnp.where(self._live[:, None], products - self._own(means), 0)

    def squared_norms(self) -> Float[Array, " rows"]:
        means = self._of_each(self.mean_weights)
        lengths = self._own(jnp.stack([dot(mean, mean) for mean in means]))
        along = sum(self._of_kind(self.scores.mv(mean), kind) for kind, mean in enumerate(means))
        return jnp.where(self._live, self.scores.squared_norms() - 2 * along + lengths, 0)

    def _kinds(self) -> list[tuple[Any, Any, Scalar]]:
        """For each kind the weighted sum of its rows, their mean, and the sum of their weights."""
        masses = self._sums(self.weights)
        return list(zip(self._of_each(self.weights), self._of_each(self.mean_weights), masses, strict=True))

    def _clipped(self, max_norm: Scalar) -> tuple[Any, Int[Array, ""]]:
        raise TypeError(
            f"clipped_sum: {self} are centred, and the mean that is subtracted from every row depends on all examples, so that "
            "clipping the rows does not bound the change by a single example. Use scores that are not centred."
        )

    def diagonal(self) -> Any:
        # sum w (s - c)^2 = sum w s^2 - c (2 sum w s - c sum w).
        found = split(self.scores.diagonal())
        for weighted, mean, mass in self._kinds():
            found = jax.tree.map(lambda d, s, c, mass=mass: d - c * (2 * s - mass * c), found, weighted, mean)
        return joined(found)

    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        found = self.scores.scaled_moment(factor)
        for weighted, mean, mass in self._kinds():
            s, c = (factor * self.spec.ravel(vector, "mean") for vector in (weighted, mean))
            cross = s[:, None] * c[None, :]
            found = found - cross - cross.T + mass * c[:, None] * c[None, :]
        return found

    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        # As in `diagonal`.
        found = self.scores.squares_along(basis)
        for weighted, mean, mass in self._kinds():
            s, c = basis.turned(weighted), basis.turned(mean)
            found = found - c * (2 * s - mass * c)
        return found

    def as_matrix(self) -> Float[Array, "rows p"]:
        means = jnp.stack([self.spec.ravel(mean, "mean") for mean in self._of_each(self.mean_weights)])
        return jnp.where(self._live[:, None], self.scores.as_matrix() - self._own(means), 0)

    def bound(self) -> Scalar:
        return 2 * self.scores.bound()

    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.restrict(keep, spec))

    def centered(self, kinds: int = 1) -> Scores:
        return CenteredScores(self, self.weights, kinds)

    def reweighted(self, factor: Any) -> CenteredScores:
        return dataclasses.replace(self, scores=self.scores.reweighted(factor))
