"""Geometry: Fisher-Rao distances by shooting, of a family without a closed form, beside boundary-value problems by SciPy."""

from __future__ import annotations

from engine import Case, Row, Sizes, compiled, gains, time_in_turn

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxfisher as jf
from jaxfisher import geometry


def gamma(params: Float[Array, "2"]) -> jf.Gamma:
    """A gamma distribution in shape and rate."""
    return jf.Gamma(params[0], params[1])


def by_scipy(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The distances by SciPy: one boundary-value problem for each pair, with the metric written out."""
    from scipy.integrate import solve_bvp
    from scipy.special import polygamma

    def rates(_: np.ndarray, state: np.ndarray) -> np.ndarray:
        """``theta'' = -Gamma(theta', theta')`` of the metric ``[[psi'(k), -1/r], [-1/r, k/r^2]]``."""
        k, r, dk, dr = state
        metric = np.array([[polygamma(1, k), -1 / r], [-1 / r, k / r**2]])
        # The Christoffel symbols with all indices lowered, contracted twice with the velocity.
        first = 0.5 * polygamma(2, k) * dk**2 + 0.5 * dr**2 / r**2
        second = dk * dr / r**2 - k * dr**2 / r**3
        pull = np.array([first, second])
        det = metric[0, 0] * metric[1, 1] - metric[0, 1] ** 2
        pulled_k = (metric[1, 1] * pull[0] - metric[0, 1] * pull[1]) / det
        pulled_r = (metric[0, 0] * pull[1] - metric[0, 1] * pull[0]) / det
        return np.stack([dk, dr, -pulled_k, -pulled_r])

    found = []
    for start, end in zip(starts, ends, strict=True):
        grid = np.linspace(0, 1, 32)
        guess = np.concatenate([start[:, None] + (end - start)[:, None] * grid, np.repeat((end - start)[:, None], 32, 1)])
        state = solve_bvp(rates, lambda a, b, s=start, e=end: np.append(a[:2] - s, b[:2] - e), grid, guess, tol=1e-6).y[:, 0]
        metric = np.array([[polygamma(1, state[0]), -1 / state[1]], [-1 / state[1], state[0] / state[1] ** 2]])
        found.append(np.sqrt(state[2:] @ metric @ state[2:]))
    return np.array(found)


def ours(starts: Float[Array, "m 2"], ends: Float[Array, "m 2"]) -> Float[Array, " m"]:
    """The distances by the library, all pairs in one program."""
    return jax.vmap(lambda start, end: geometry.geodesic(gamma, steps=32)(start, end).distance)(starts, ends)


def rows(sizes: Sizes) -> list[Row]:
    """Distances of pairs of gamma distributions in float64, against SciPy's boundary-value problems."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        starts, ends = rng.uniform(0.8, 3.0, (2, sizes.examples(8), 2))
        plain, own = Case(by_scipy, (starts, ends)), compiled(ours, jnp.asarray(starts), jnp.asarray(ends))
        difference = np.max(np.abs(np.asarray(own()) / plain() - 1))
        note = f"relative difference {difference:.0e}"
        return [gains(f"{len(starts)} pairs", *time_in_turn([plain, own], sizes.repeats), goal=1, note=note)]
