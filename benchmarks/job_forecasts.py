"""A forecast: the Fisher information of a simulator whose mean and covariance depend on its parameters, beside plain JAX."""

from __future__ import annotations

from engine import Row, Sizes, compiled, gains, time_in_turn

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfisher import forecasts

PARAMS = np.array([1.0, 0.3, 2.0, 0.5])
"""Amplitude, decay and frequency of a wave; the length over which its noise is correlated."""


def mean(params: Float[Array, " 4"], x: Float[Array, " d"]) -> Float[Array, " d"]:
    """A decaying wave."""
    return params[0] * jnp.exp(-params[1] * x) * jnp.cos(params[2] * x)


def covariance(params: Float[Array, " 4"], x: Float[Array, " d"]) -> Float[Array, "d d"]:
    """White noise, and correlated noise in proportion to the amplitude."""
    apart = jnp.square((x[:, None] - x[None, :]) / params[3])
    return 0.01 * (jnp.square(params[0]) * jnp.exp(-0.5 * apart) + jnp.eye(x.size, dtype=x.dtype))


def by_hand(params: Float[Array, " 4"], x: Float[Array, " d"]) -> Float[Array, "4 4"]:
    """The Fisher information in plain JAX, by the formula with the inverse of the covariance."""
    slopes = jax.jacfwd(mean)(params, x)
    changes = jnp.moveaxis(jax.jacfwd(covariance)(params, x), 2, 0)
    inverse = jnp.linalg.inv(covariance(params, x))
    relative = jnp.matmul(inverse, changes, precision="highest")
    traces = jnp.einsum("iab,jba->ij", relative, relative, precision="highest")
    return jnp.matmul(slopes.T, jnp.matmul(inverse, slopes, precision="highest"), precision="highest") + 0.5 * traces


def ours(params: Float[Array, " 4"], x: Float[Array, " d"]) -> Float[Array, "4 4"]:
    """The Fisher information by the library, as the matrix of an operator."""
    return forecasts.gaussian_fisher(lambda p: mean(p, x), lambda p: covariance(p, x))(params).as_matrix()


def off(matrix: Array, exact: Array) -> float:
    """The largest relative error of a marginal error."""
    errors, true = (np.sqrt(np.diag(np.linalg.inv(np.asarray(m, float)))) for m in (matrix, exact))
    return float(np.max(np.abs(errors / true - 1)))


def rows(sizes: Sizes) -> list[Row]:
    """A Gaussian likelihood of four parameters, float32; against eight lines of plain JAX with an inverse covariance."""
    found = []
    for size in (200, 800):
        x = np.linspace(0.0, 6.0, sizes.examples(size))
        with jax.enable_x64(True):
            exact = by_hand(jnp.asarray(PARAMS), jnp.asarray(x))
        given = jnp.asarray(PARAMS, jnp.float32), jnp.asarray(x, jnp.float32)
        plain, own = compiled(by_hand, *given), compiled(ours, *given)
        note = f"marginal errors are off by {off(own(), exact):.0e}, by hand by {off(plain(), exact):.0e}"
        found.append(gains(f"{x.size} data", *time_in_turn([plain, own], sizes.repeats), goal=1, note=note))
    return found
