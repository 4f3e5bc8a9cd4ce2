"""Designs of experiments: the criterion of many designs in one call, beside ten lines of plain JAX."""

from __future__ import annotations

from engine import Row, Sizes, compiled, gains, time_in_turn

# isort: split

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jaxfisher as jf
from jaxfisher import design


def model(params: Float[Array, " p"], x: Float[Array, ""]) -> jf.Normal:
    """A decaying wave with a background: five parameters."""
    wave = params[0] * jnp.exp(-params[1] * x) * jnp.cos(params[2] * x + params[3])
    return jf.Normal(wave + params[4], jnp.ones(()))


def by_hand(params: Array, x: Array, weights: Array) -> Array:
    """The criterion in plain JAX: slopes of the mean, their weighted products, the log-determinant."""
    slopes = jax.vmap(jax.grad(lambda params, x: model(params, x).loc), (None, 0))(params, x)

    def one(weights: Array) -> Array:
        return jnp.linalg.slogdet(jnp.matmul(slopes.T * weights, slopes, precision="highest"))[1]

    return jax.vmap(one)(weights)


def ours(params: Array, x: Array, weights: Array) -> Array:
    """The criterion by the library: the information of each candidate, then of each design."""
    informations = design.informations(model)(params, x)
    return design.d_criterion(jnp.tensordot(weights, informations, 1, precision="highest"))


def rows(sizes: Sizes) -> list[Row]:
    """Five hundred designs of forty candidates, p = 5, in one call; against ten lines of plain JAX."""
    params, x = jnp.array([1.0, 0.3, 2.0, 0.1, 0.5]), jnp.linspace(0.0, 6.0, sizes.examples(40))
    weights = jax.random.dirichlet(jax.random.key(0), jnp.ones(x.size), (sizes.examples(500),))
    plain, own = compiled(by_hand, params, x, weights), compiled(ours, params, x, weights)
    difference = jnp.max(jnp.abs(own() - plain()))
    note = f"largest difference {difference:.0e} nats"
    case = f"{weights.shape[0]} designs of {x.size} candidates"
    return [gains(case, *time_in_turn([plain, own], sizes.repeats), goal=1, note=note)]
