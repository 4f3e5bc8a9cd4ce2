"""Comparing the scores that the engine holds with JAX's own derivatives of the same log-density, for `check_fisher`."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from jaxfisher._examples import Batch, map_examples
from jaxfisher._model import Model, log_likelihood, predict
from jaxfisher._scores import scores
from jaxfisher._tree import cast_like, dot, split


class Product(NamedTuple):
    """The difference between a product with the scores and JAX's own, in parts.

    Attributes:
        off: the largest difference in each part.
        size: the order of magnitude that the part can have.
        moved: how far JAX's own product moves if the parameters move by one rounding.
    """

    off: Float[Array, " parts"]
    size: Float[Array, " parts"]
    moved: Float[Array, " parts"]


def products(
    model: Model, batch: Batch, params: chex.ArrayTree, near: chex.ArrayTree, v: Any, keys: PRNGKeyArray
) -> tuple[Product, Product, Product]:
    """``S v`` compared with `jax.jvp`, and leaf by leaf ``w^T S v`` and ``S^T w`` with `jax.vjp`, at one draw for each example.

    ``near`` are parameters one rounding away; ``v`` is a direction in the statistics dtype.
    """
    log_prob, dtype = log_likelihood(model), batch.spec.dtype
    targets = map_examples(lambda p, key, *example: predict(model, p, *example).sample(key), params, (keys, *batch.data))
    data = (*batch.data, targets)
    w = jax.random.normal(jax.random.fold_in(keys[0], 1), (batch.size,), dtype)

    def by_jax(params: chex.ArrayTree) -> tuple[Array, list[Array]]:
        def each(params: chex.ArrayTree) -> Array:
            return map_examples(log_prob, params, data).astype(dtype)

        _, along = jax.jvp(each, (params,), (cast_like(v, params),))
        _, pull_back = jax.vjp(each, params)
        return along, batch.spec.leaves(pull_back(w)[0], "gradient")

    (along, back), (near_along, near_back) = by_jax(params), by_jax(near)
    made = scores(log_prob)(params, *data)
    # Upper bounds on the sums of scores over the examples, which are reached without cancellation.
    sizes = jnp.stack([jnp.sqrt(batch.size * jnp.sum(part)) for part in jax.tree.leaves(split(made.diagonal()))])
    leaves = batch.spec.leaves(v, "v")
    lengths = jnp.stack([jnp.sqrt(dot(leaf, leaf)) for leaf in leaves])
    masks = jnp.eye(len(leaves), dtype=dtype)
    # The directional derivative along the part of v in one leaf, summed with w; JAX's own is that leaf of S^T w, times v.
    mine = jax.lax.map(
        lambda mask: jnp.sum(w * made.mv(batch.spec.tree([m * leaf for m, leaf in zip(mask, leaves, strict=True)]))), masks
    )
    theirs, near_theirs = (jnp.stack([jnp.sum(a * b) for a, b in zip(part, leaves, strict=True)]) for part in (back, near_back))
    length = jnp.sqrt(dot(w, w))
    by_leaf = Product(jnp.abs(mine - theirs), length * sizes * lengths, jnp.abs(near_theirs - theirs))
    whole = Product(_apart(made.mv(v), along)[None], jnp.sum(sizes * lengths)[None], _apart(near_along, along)[None])
    return (
        whole,
        by_leaf,
        Product(
            jnp.stack([_apart(a, b) for a, b in zip(jax.tree.leaves(split(made.rmv(w))), back, strict=True)]),
            length * sizes,
            jnp.stack([_apart(a, b) for a, b in zip(near_back, back, strict=True)]),
        ),
    )


def _apart(a: Array, b: Array) -> Scalar:
    return jnp.max(jnp.abs(a - b), initial=0.0)
