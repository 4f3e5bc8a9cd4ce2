"""Private gradients: the clipped sum of per-example gradients, against the plain gradient and against clipping each of them."""

from __future__ import annotations

from engine import Row, Sizes, compiled, costs, difference, gains, mlp, mlp_log_prob, plain_gradient, shape_name, time_in_turn

# isort: split

from typing import Any

import jax
import optax
from jaxtyping import Array

import jaxfisher as jf

MAX_NORM = 1.0


def plain_clipped(params: Any, x: Array, y: Array) -> Any:
    """The usual way: per-example gradients, each clipped by Optax."""
    gradients = jax.vmap(jax.grad(lambda p, x, y: -mlp_log_prob(p, x, y)), (None, 0, 0))(params, x, y)
    leaves, treedef = jax.tree.flatten(gradients)
    return jax.tree.unflatten(treedef, optax.per_example_global_norm_clip(leaves, MAX_NORM)[0])


def our_clipped(params: Any, x: Array, y: Array) -> Any:
    """The clipped sum by the library, from the factors of the scores."""
    return jf.clipped_grad(mlp_log_prob, MAX_NORM)(params, x, y).sum


def rows(sizes: Sizes) -> list[Row]:
    """The clipped sum of per-example gradients, against the gradient of the batch and against Optax's clipping of them all."""
    lines = []
    for widths, n in [((64, 256, 256, 10), 128), ((64, 256, 256, 10), 512), ((64, 1024, 1024, 10), 128)]:
        widths, n = sizes.widths(*widths), sizes.examples(n)
        arguments = mlp(widths, n)
        gradient, plain, ours = (
            compiled(function, *arguments) for function in (plain_gradient(mlp_log_prob), plain_clipped, our_clipped)
        )
        times = time_in_turn([gradient, plain, ours], sizes.repeats)
        name = shape_name(widths, n)
        lines.append(costs(f"{name}, gradient", times[0], times[2], goal=2.3))
        lines.append(gains(f"{name}, vmap(grad)", times[1], times[2], goal=10, note=difference(ours(), plain())))
    return lines
