"""Laplace's approximation: evidence and predictions of a network with a dense posterior, against its Jacobian in plain JAX."""

from __future__ import annotations

from engine import Row, Sizes, compiled, costs, time_in_turn

# isort: split

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import jaxfisher as jf

NOISE, PRIOR = 0.1, 1.0


def mean(params: Any, x: Array) -> Array:
    """Two tanh layers and one output."""
    hidden = jnp.tanh(jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])
    return (hidden @ params["w3"])[0]


def model(params: Any, x: Array) -> jf.Normal:
    """A normal distribution with known noise."""
    return jf.Normal(mean(params, x), NOISE)


def plain(params: Any, x: Array, y: Array, new: Array) -> tuple[Array, Array]:
    """Evidence and predictive variance by hand: the Jacobian of all examples, one Cholesky factor."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.vmap(jax.jacrev(lambda w, x: mean(unravel(w), x)), (None, 0))
    design = jacobian(flat, x) / NOISE
    precision = jnp.matmul(design.T, design, precision="highest") + PRIOR * jnp.eye(flat.size)
    lower = jnp.linalg.cholesky(precision)
    rest = (y - jax.vmap(mean, (None, 0))(params, x)) / NOISE
    fit = -0.5 * jnp.sum(rest**2) - len(y) * (math.log(NOISE) + 0.5 * math.log(2 * math.pi))
    volume = flat.size * math.log(PRIOR) - 2 * jnp.sum(jnp.log(jnp.diagonal(lower)))
    half = jax.scipy.linalg.solve_triangular(lower, jacobian(flat, new).T, lower=True)
    return fit - 0.5 * PRIOR * flat @ flat + 0.5 * volume, NOISE**2 + jnp.sum(half**2, 0)


def ours(params: Any, x: Array, y: Array, new: Array) -> tuple[Array, Array]:
    """The same by `jf.laplace`."""
    posterior = jf.laplace(model, params, x, y, prior=PRIOR, view=jf.dense)
    return posterior.log_evidence(), posterior.predictive(new).variance


def rows(sizes: Sizes) -> list[Row]:
    """Evidence and 200 predictions of a dense network, against its Jacobian and a Cholesky factor by hand."""
    _, width, _ = sizes.widths(1, 48, 1)
    n = sizes.examples(500)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w1": (1, width), "w2": (width, width), "w3": (width, 1)}
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5 for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params |= {"b1": jnp.zeros(width), "b2": jnp.zeros(width)}
    x = jnp.linspace(-1, 1, n)[:, None]
    arguments = params, x, jnp.sin(3 * x[:, 0]), x[: n // 2]
    by_hand, by_us = compiled(plain, *arguments), compiled(ours, *arguments)
    (evidence, variance), (our_evidence, our_variance) = by_hand(), by_us()
    note = (
        f"log evidence {our_evidence:.1f} and {evidence:.1f} in float32; "
        f"relative difference of the variances {jnp.max(jnp.abs(our_variance / variance - 1)):.0e}"
    )
    p = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [costs(f"p = {p:,}, n = {n}", *time_in_turn([by_hand, by_us], sizes.repeats), goal=None, note=note)]
