"""Penalties and merged models against dense float64 algebra in NumPy, and against the fit to all data if that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, classifier, data, flat, mlp_params

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

VIEWS = {
    "scores": lambda F: F,
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "Kronecker": jf.kronecker,
    "eigen-Kronecker": jf.eigen_kronecker,
    "low rank": lambda F: jf.low_rank(F, 5),
}


def fishers(view):
    """Two models with a Fisher each, and the Fishers as matrices."""
    models = [mlp_params(jax.random.key(seed)) for seed in (1, 2)]
    made = [view(jf.exact_fisher(classifier)(theta, data(jax.random.key(9), 5)[0])) for theta in models]
    return models, made, [np.asarray(F.as_matrix()) for F in made]


@pytest.mark.parametrize("view", VIEWS)
def test_the_penalty_and_its_gradient_are_those_of_the_matrix(view):
    (anchor, params), (F, _), (matrix, _) = fishers(VIEWS[view])
    value, slope = jax.jit(lambda F, params: jax.value_and_grad(jf.ewc_penalty(F, anchor, 3.0))(params))(F, params)
    moved = flat(params) - flat(anchor)
    assert_close(value, 1.5 * moved @ matrix @ moved, factor=1e3)
    assert_close(flat(slope), 3.0 * matrix @ moved, factor=1e3)


def test_the_penalty_of_products_only():
    anchor, params = mlp_params(jax.random.key(1)), mlp_params(jax.random.key(2))
    x = data(jax.random.key(9), 5)[0]
    penalties = [jf.ewc_penalty(make(classifier)(anchor, x), anchor) for make in (jf.implicit_fisher, jf.exact_fisher)]
    slopes = [flat(jax.grad(penalty)(params)) for penalty in penalties]
    assert_close(*slopes, factor=1e3)


@pytest.mark.parametrize("view", ["scores", "dense", "diagonal", "Kronecker"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_merging_solves_the_sum_of_quadratics(view, damping):
    models, made, matrices = fishers(VIEWS[view])
    merged, info = jf.fisher_average(models, made, damping)
    thetas = [flat(theta) for theta in models]
    mean = np.mean(thetas, axis=0)
    right = sum(matrix @ (theta - mean) for matrix, theta in zip(matrices, thetas, strict=True))
    whole = sum(matrices) + damping * np.eye(mean.size)
    # Without damping the residual is checked, and the solution is the one nearest to the mean.
    assert_close(whole @ (flat(merged) - mean), right, factor=1e6)
    if damping:
        assert_close(flat(merged), mean + np.linalg.solve(whole, right), factor=1e5)
    assert info.finite


def test_kronecker_views_merge_by_their_factors_alone():
    """The sum is solved as one product: exact where the models have the same factors, and at equal models in any case."""
    models, (F, G), _ = fishers(jf.kronecker)
    same, _ = jf.fisher_average([models[0]] * 2, [F, G], 0.01, view=jf.kronecker)
    assert_close(flat(same), flat(models[0]), factor=1e4)
    merged, _ = jf.fisher_average(models, [F, 3.0 * F], 0.0, view=jf.kronecker)
    middle = np.mean([flat(theta) for theta in models], axis=0)
    expected = 0.25 * flat(models[0]) + 0.75 * flat(models[1])
    # Along directions where F is zero, the mean stays.
    matrix = np.asarray(F.as_matrix())
    assert_close(matrix @ (flat(merged) - middle), matrix @ (expected - middle), factor=1e6)


def test_linear_regressions_merge_to_the_fit_of_all_data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    parts = [(x[:6], y[:6]), (x[6:], y[6:])]
    fits = [np.linalg.lstsq(*part, rcond=None)[0] for part in parts]
    fisher = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, jnp.asarray(0.7)))
    made = [len(part[0]) * fisher(jnp.asarray(w), jnp.asarray(part[0])) for part, w in zip(parts, fits, strict=True)]
    merged, info = jf.fisher_average([jnp.asarray(w) for w in fits], made)
    assert_close(merged, np.linalg.lstsq(x, y, rcond=None)[0], factor=1e4)
    assert info.converged


def test_the_square_of_a_batch_gradient_is_not_the_fisher():
    """Its expectation over batches of b scores of mean zero is the diagonal over b. Two libraries take it for the diagonal."""
    scores = np.random.default_rng(0).normal(size=(400, 16, 3))  # batches, examples of each, parameters
    squared = np.mean(np.mean(scores, axis=1) ** 2, axis=0)
    log_prob = lambda theta, s: jnp.vdot(theta, s)  # noqa: E731
    F = jf.diagonal(jf.empirical_fisher(log_prob)(jnp.zeros(3), jnp.asarray(scores.reshape(-1, 3))))
    np.testing.assert_allclose(16 * squared, np.asarray(F.diagonal()), rtol=0.3)
