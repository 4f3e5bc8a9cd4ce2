"""Variational Monte Carlo: a minimum-norm step of stochastic reconfiguration, from samples and their local energies."""

from __future__ import annotations

from engine import Row, Sizes, compiled, dense_layers, gains, megabytes, time_in_turn

# isort: split

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

import jaxfisher as jf

DAMPING = 1e-3


def log_amplitude(params: Any, spins: Float[Array, " d"]) -> Array:
    """A real log-amplitude: an MLP whose last layer is summed."""
    hidden = spins
    for weight, bias in params:
        hidden = jnp.log(jnp.cosh(hidden @ weight + bias))
    return hidden.sum()


def plain_step(params: Any, spins: Array, energies: Array) -> Array:
    """Minimum-norm stochastic reconfiguration by hand, from the centred n x p matrix of derivatives."""
    n = len(spins)
    _, unravel = ravel_pytree(params)
    flat = ravel_pytree(params)[0]
    derivatives = jax.vmap(jax.grad(lambda flat, spin: log_amplitude(unravel(flat), spin)), (None, 0))(flat, spins)
    centred = (derivatives - derivatives.mean(0)) / jnp.sqrt(n)
    centred_energies = (energies - energies.mean()) / jnp.sqrt(n)
    gram = jnp.matmul(centred, centred.T, precision="highest") + DAMPING * jnp.eye(n)
    return centred.T @ jax.scipy.linalg.solve(gram, centred_energies, assume_a="pos")


def our_step(params: Any, spins: Array, energies: Array) -> Array:
    """The same from the centred scores, which are never formed."""
    scores = jf.scores(log_amplitude, center=True)(params, spins)
    return ravel_pytree(jf.least_squares(scores, energies, DAMPING)[0])[0]


def rows(sizes: Sizes) -> list[Row]:
    """A minimum-norm step of stochastic reconfiguration, against the n x p matrix of derivatives in plain JAX."""
    lines = []
    for widths, n in [((64, 256, 256), 512), ((64, 960, 960), 512)]:
        small = sizes.widths(*widths)
        n = sizes.examples(n)
        key, other = jax.random.split(jax.random.key(0))
        spins = jax.random.rademacher(key, (n, widths[0]), jnp.float32)
        arguments = dense_layers(small), spins, jax.random.normal(other, (n,))
        plain, ours = compiled(plain_step, *arguments), compiled(our_step, *arguments)
        difference = jnp.linalg.norm(ours() - plain()) / jnp.linalg.norm(plain())
        memory = f"temporary memory {megabytes(plain.temporary)} and {megabytes(ours.temporary)}"
        p = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
        lines.append(
            gains(
                f"p = {p:,}, n = {n}",
                *time_in_turn([plain, ours], sizes.repeats),
                goal=30,
                note=f"relative difference {difference:.0e}; {memory}",
            )
        )
    return lines
