"""Why the empirical Fisher is not the Fisher: the linear regression of Kunstner, Balles and Hennig (NeurIPS 2019), in numbers.

The model is a normal of scale one. For ``y = theta x`` and residuals ``r_i = y_i - theta x_i`` everything is a mean:

    gradient  -mean(r x),    exact Fisher  mean(x^2),    empirical Fisher  mean(r^2 x^2),

so the exact step is least squares, from anywhere, and the empirical one is off by the factor ``mean(x^2) / mean(r^2 x^2)``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf

EPS = float(np.finfo(float).eps)
RNG = np.random.default_rng(2019)
X = RNG.lognormal(0.0, 0.75, 200)
NOISE = RNG.standard_normal(200)
NOISE -= X * (X @ NOISE) / (X @ X)  # without noise along x, least squares through the origin gives SLOPE itself
SLOPE = 2.0


def through_the_origin(theta, x):
    return jf.Normal(theta * x, 1.0)


def line(theta, x):
    return jf.Normal(theta[0] + theta[1] * x, 1.0)


@functools.lru_cache
def compiled_steps(model):
    log_p = jf.log_likelihood(model)
    exact = jf.natural_grad(log_p, lambda theta, x, y: jf.exact_fisher(model)(theta, x), damping=0.0)
    empirical = jf.natural_grad(log_p, damping=0.0)
    plain = jax.grad(lambda theta, x, y: -jnp.mean(jax.vmap(log_p, (None, 0, 0))(theta, x, y)))
    return jax.jit(lambda *args: (exact(*args), empirical(*args), plain(*args)))


def steps(model, theta, x, y):
    """The exact and the empirical natural gradient, and the plain one."""
    return map(np.asarray, compiled_steps(model)(jnp.asarray(theta), jnp.asarray(x), jnp.asarray(y)))


@pytest.mark.parametrize("distance", [-100.0, -1.0, 0.01, 1.0, 100.0])
def test_the_exact_step_solves_from_anywhere_and_the_empirical_one_is_off_by_a_known_factor(distance):
    y = SLOPE * X + 0.1 * NOISE
    exact, empirical, _ = steps(through_the_origin, SLOPE + distance, X, y)
    np.testing.assert_allclose(exact, distance, rtol=0, atol=100 * EPS * (abs(distance) + SLOPE))
    residual = y - (SLOPE + distance) * X
    factor = np.mean(X**2) / np.mean((residual * X) ** 2)
    np.testing.assert_allclose(empirical / exact, factor, rtol=1e5 * EPS)


def test_the_empirical_step_shrinks_with_distance_and_overshoots_near_the_optimum():
    """Far away ``r = -distance x``, and the step falls as 1/distance. Near the optimum the step is 1/noise^2 times too long."""
    y = SLOPE * X + 0.1 * NOISE
    size = {}
    for distance in (1e-3, 10.0, 100.0):
        _, size[distance], _ = steps(through_the_origin, SLOPE + distance, X, y)
    np.testing.assert_allclose(size[10.0] / size[100.0], 10, rtol=1e-3)
    assert size[100.0] < 1e-5 * 100, "from far away the step covers less than a hundred-thousandth of the way"
    # The noise has deviation 0.1, and the model says 1.
    np.testing.assert_allclose(size[1e-3], 1e-3 / 0.1**2, rtol=0.2)


def test_the_empirical_direction_is_misleading_in_two_dimensions():
    """Around the optimum of a line fit the exact direction points at it; the empirical one may be off by over a right angle."""
    y = SLOPE * X + 2.0 + NOISE
    design = np.column_stack([np.ones_like(X), X])
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    angles = []
    for turn in np.linspace(0, 2 * np.pi, 8, endpoint=False):
        theta = solution + 3.0 * np.array([np.cos(turn), np.sin(turn)])
        exact, empirical, plain = steps(line, theta, X, y)
        np.testing.assert_allclose(theta - exact, solution, rtol=0, atol=1e4 * EPS * np.max(np.abs(theta)))
        scores = design * (y - design @ theta)[:, None]
        np.testing.assert_allclose(empirical, np.linalg.solve(scores.T @ scores / len(X), plain), rtol=1e6 * EPS)
        cosine = empirical @ exact / np.linalg.norm(empirical) / np.linalg.norm(exact)
        angles.append(np.degrees(np.arccos(cosine)))
    assert max(angles) > 90, angles
    assert np.median(angles) > 45, angles


def test_descent_with_the_empirical_fisher_needs_many_steps_where_the_exact_one_needs_one():
    y = SLOPE * X + 0.1 * NOISE
    start = 12.0
    exact, empirical, _ = steps(through_the_origin, start, X, y)
    np.testing.assert_allclose(start - exact, SLOPE, rtol=100 * EPS)
    theta = start
    for _ in range(20):
        theta = theta - empirical
        _, empirical, _ = steps(through_the_origin, theta, X, y)
    assert theta - SLOPE > 0.98 * (start - SLOPE), "twenty empirical steps cover less than a fiftieth of the way"


def test_the_square_of_a_batch_mean_is_not_a_fisher():
    """Two scores, one and minus one: the square of their mean is zero, while the mean of their squares is one."""
    log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    data = jnp.array([1.0, -1.0])
    gradient = jax.grad(lambda mu: jnp.mean(jax.vmap(log_prob, (None, 0))(mu, data)))(0.0)
    assert gradient**2 == 0
    assert jf.diagonal(jf.empirical_fisher(log_prob)(0.0, data)).as_matrix() == 1
    assert jf.exact_fisher(lambda mu: jf.Normal(mu, 1.0))(0.0).as_matrix() == 1
