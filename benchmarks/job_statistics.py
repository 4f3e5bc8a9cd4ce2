"""Statistics: a generalised linear model with its standard errors and its sandwich, beside statsmodels."""

from __future__ import annotations

from engine import Case, Row, Sizes, compiled, gains, time_in_turn

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxfisher as jf
from jaxfisher import statistics


def poisson(beta: Float[Array, " p"], x: Float[Array, " p"]) -> jf.Poisson:
    """The Poisson regression of one example."""
    return jf.Poisson(x @ beta)


LOG_PROB = jf.log_likelihood(poisson)


def our_fit(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The estimates, and their covariance by White's sandwich."""
    found = jf.fit(poisson)(jnp.zeros(x.shape[1]), x, y)
    bread = jf.observed_information(LOG_PROB)(found.params, x, y)
    return found.params, jf.sandwich(bread, statistics.meat(LOG_PROB)(found.params, x, y)).as_matrix()


def white(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The same by statsmodels, imported here since no other job needs it."""
    import statsmodels.api as sm

    return np.asarray(sm.GLM(y, x, sm.families.Poisson()).fit(cov_type="HC0", tol=1e-12).cov_params())


def rows(sizes: Sizes) -> list[Row]:
    """A Poisson regression of eight columns with the sandwich HC0 in float64, against statsmodels."""
    lines = []
    with jax.enable_x64(True):
        for n in (1000, 20000):
            count = sizes.examples(n)
            rng = np.random.default_rng(0)
            x = np.column_stack([np.ones(count), rng.normal(size=(count, 7))])
            y = rng.poisson(np.exp(0.3 * x @ rng.normal(size=8))).astype(float)
            plain, ours = Case(white, (x, y)), compiled(our_fit, jnp.asarray(x), jnp.asarray(y))
            expected = plain()
            difference = np.max(np.abs(np.asarray(ours()[1]) - expected)) / np.max(np.abs(expected))
            note = f"relative difference {difference:.0e}"
            lines.append(gains(f"n = {count}, p = 8", *time_in_turn([plain, ours], sizes.repeats), goal=1, note=note))
    return lines
