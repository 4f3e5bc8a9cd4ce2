"""Continual learning: the diagonal of a task's Fisher, beside per-example gradients and beside squared batch gradients."""

from __future__ import annotations

from engine import (
    Row,
    Sizes,
    compiled,
    costs,
    gains,
    mlp,
    mlp_log_prob,
    mlp_logits,
    mlp_model,
    plain_gradient,
    shape_name,
    time_in_turn,
)

# isort: split

from typing import Any

import jax
import jax.numpy as jnp

import jaxfisher as jf


def plain_diagonal(params: Any, x: jax.Array) -> Any:
    """The expectation over labels of squared gradients, one class after the other, of every example."""

    def of_class(label: jax.Array) -> Any:
        gradients = jax.vmap(jax.grad(mlp_log_prob), (None, 0, None))(params, x, label)
        share = jax.vmap(lambda x: jax.nn.softmax(mlp_logits(params, x))[label])(x) / len(x)
        return jax.tree.map(lambda leaf: jnp.tensordot(share, leaf**2, 1), gradients)

    classes = jnp.arange(params[-1][1].shape[0])
    return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.lax.map(of_class, classes))


def rows(sizes: Sizes) -> list[Row]:
    """The exact diagonal against per-example gradients of each class; the empirical one in plain gradients."""
    params, x, y = mlp(sizes.small, sizes.examples(512))
    name = shape_name(sizes.small, len(y))
    plain = compiled(plain_diagonal, params, x)
    exact = compiled(lambda params, x: jf.exact_fisher(mlp_model)(params, x).diagonal(), params, x)
    # What two libraries take for it: the square of the batch's gradient, which is another number.
    batch = compiled(lambda *given: jax.tree.map(jnp.square, plain_gradient(mlp_log_prob)(*given)), params, x, y)
    empirical = compiled(lambda *given: jf.empirical_fisher(mlp_log_prob)(*given).diagonal(), params, x, y)
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), exact(), plain())
    note = f"relative difference {max(map(float, jax.tree.leaves(differences))):.0e}"
    return [
        gains(f"exact diagonal, {name}", *time_in_turn([plain, exact], sizes.repeats), goal=5, note=note),
        costs(
            f"empirical diagonal, in squared batch gradients, {name}",
            *time_in_turn([batch, empirical], sizes.repeats),
            goal=1.3,
        ),
    ]
