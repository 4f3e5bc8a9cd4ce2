r"""Fishers that hold only model, parameters and inputs: ``F v = 1/n sum_i J_i^T M_i J_i v`` by jvp, output metric, vjp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine import Basis
from jaxfisher._examples import make_batch, map_examples
from jaxfisher._model import Model, float_fields, predict, tangent
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.form import Form, small_matrix
from jaxfisher._pieces import sum_batches
from jaxfisher._pytree import array_fields
from jaxfisher._row_functions import ExactRows, prediction
from jaxfisher._scores import Scores, make_scores
from jaxfisher._tree import ParamSpec, cast_like, dot, kept, narrowed, split, unstacked
from jaxfisher._varying import varying_like


@array_fields("params", "inputs", "weights", repr=False)
class Implicit(Form):
    """The exact Fisher by its products. The model is a static field, so only another model object causes a second trace.

    ``keep`` marks the parameter leaves that the matrix is over: all of them, or the part that an optimiser was given.
    """

    model: Model
    params: Any
    inputs: tuple[Any, ...]
    weights: Float[Array, " n"]
    batch_size: int | None
    keep: tuple[bool, ...]
    spec: ParamSpec

    name = "implicit, products only"

    @property
    def stack(self) -> tuple[int, ...]:
        return self.weights.shape[:-1]

    def product(self) -> Callable[[Any], Any]:
        if self.batch_size is not None and self.batch_size < self.weights.shape[0]:
            data = (self.weights, *self.inputs)
            return lambda v: sum_batches(lambda w, *inputs: self._pull_back(w, inputs)(v), data, self.batch_size)
        return self._pull_back(self.weights, self.inputs)

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        """``sum_i w_i (J_i v_k)^T M_i J_i v_l``: a jvp for each vector, and no vjp."""
        return sum_batches(partial(self._metric_along, vectors), (self.weights, *self.inputs), self.batch_size)

    def _metric_along(self, vectors: Any, weights: Float[Array, " n"], *inputs: Any) -> Float[Array, "k k"]:
        _, forward, predicted = jax.linearize(partial(self._fields, inputs), self._moving(), has_aux=True)
        wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(self.spec.dtype), tree)  # noqa: E731
        # One vector at a time: batched, XLA's CPU backend transposes every array.
        along = [forward(varying_like(v, inputs)) for v in unstacked(vectors)]
        pushed = [jax.vmap(_weighted_metric)(predicted, v, weights) for v in along]
        products = [[dot(wide(a), wide(b)) for b in pushed[: k + 1]] for k, a in enumerate(along)]
        # Only the lower half was computed; the matrix is symmetric.
        return jnp.stack([jnp.stack([products[max(i, j)][min(i, j)] for j in range(len(along))]) for i in range(len(along))])

    def _fields(self, inputs: tuple[Any, ...], moving: Any) -> tuple[list[Array], Any]:
        """The real fields of the predicted distributions, and the distributions themselves."""
        predicted = map_examples(partial(predict, self.model), self._all_leaves(moving), inputs)
        return float_fields(predicted), predicted

    def _pull_back(self, weights: Float[Array, " n"], inputs: tuple[Any, ...]) -> Callable[[Any], Any]:
        """``v -> sum_i w_i J_i^T M_i J_i v`` over one chunk; the model runs forward once."""
        moving = self._moving()
        _, forward, predicted = jax.linearize(partial(self._fields, inputs), moving, has_aux=True)
        backward = jax.linear_transpose(forward, moving)

        def product(v: Any) -> Any:
            v = varying_like(v, inputs)
            (pulled,) = backward(jax.vmap(_weighted_metric)(predicted, forward(v), weights))
            return pulled

        return product

    def _moving(self) -> Any:
        """The kept parameters in the statistics dtype, in the structure of the operator's vectors."""
        leaves = kept(jax.tree.leaves(self.params), self.keep)
        return self.spec.tree([jnp.asarray(leaf).astype(self.spec.dtype) for leaf in leaves])

    def _all_leaves(self, moving: Any) -> Any:
        """All parameters in their own dtypes, the kept ones taken from ``moving``."""
        leaves, treedef = jax.tree.flatten(self.params)
        rest = iter(jax.tree.leaves(moving))
        merged = [next(rest) if flag else leaf for leaf, flag in zip(leaves, self.keep, strict=True)]
        return cast_like(jax.tree.unflatten(treedef, merged), self.params)

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        return self.as_scores().squares_along(basis)

    def as_scores(self) -> Scores:
        """The exact Fisher's rows, in chunks: for results that would take p products."""
        batch = make_batch(self.params, self.inputs, None, self.batch_size or 1)
        moving = prediction(self.model, self.params, self.inputs).moving
        whole = make_scores(ExactRows(self.model, moving), self.params, batch)
        count = whole.num_rows // batch.size
        scores = whole.restrict(self.keep, self.spec)
        return dataclasses.replace(scores, weights=jnp.repeat(self.weights, count))  # type: ignore[type-var]

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.as_scores().second_moment()

    def diagonal(self) -> Any:
        return split(self.as_scores().diagonal())

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Implicit:
        return dataclasses.replace(self, keep=narrowed(self.keep, keep), spec=self.spec.restrict(keep, treedef))

    def rescaled(self, factors: Sequence[Scalar]) -> Dense:
        # A solve makes the matrix anyway.
        return Dense(small_matrix(self, "a damping for each leaf"), self.spec).rescaled(factors)

    def scaled(self, factor: Scalar) -> Implicit:
        return dataclasses.replace(self, weights=factor * self.weights)


def _weighted_metric(distribution: Any, along: list[Array], weight: Array) -> list[Array]:
    """``w M t`` for a tangent ``t`` in the fields of one prediction."""
    pushed = float_fields(distribution.fisher_mv(tangent(distribution, along)))
    return [weight.astype(leaf.dtype) * leaf for leaf in pushed]
