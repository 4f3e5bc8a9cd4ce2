"""Influence against closed forms of leaving one out, and against dense float64 matrices for every form of curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, classifier, data, loop_scores, mlp_params

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

LOG_PROB = jf.log_likelihood(classifier)
DAMPING = 0.05


def problem():
    """A network, training and test data, and the scores of both by a loop of `jax.grad`."""
    params = mlp_params(jax.random.key(1))
    train, test = data(jax.random.key(2), n=11), data(jax.random.key(3), n=3)
    return params, train, test, *(loop_scores(LOG_PROB, params, *each) for each in (train, test))


VIEWS = {
    "scores": lambda F: F,
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "Kronecker": jf.kronecker,
    "eigen-Kronecker": jf.eigen_kronecker,
}


@pytest.mark.parametrize("view", VIEWS)
def test_influence_is_the_dense_formula(view):
    params, train, test, rows, others = problem()
    F = VIEWS[view](jf.exact_fisher(classifier)(params, train[0]))
    inverse = np.linalg.inv(np.asarray(F.as_matrix()) + DAMPING * np.eye(F.size))
    expected = others @ inverse @ rows.T / 11
    influence = jf.influence(LOG_PROB, F)
    found, info = influence(params, train, test, DAMPING)
    assert_close(found, expected, factor=1e4)
    assert info.residual.shape == (3,) and np.all(info.converged)
    own, info = jf.self_influence(LOG_PROB, F, batch_size=4)(params, train, DAMPING)
    assert_close(own, np.sum(rows @ inverse * rows, axis=1) / 11, factor=1e4)
    assert info.residual.shape == (11,)


def test_padding_and_weights_say_how_many_examples_there_were():
    params, train, test, rows, others = problem()
    weights = jnp.array([1.0, 2, 0, 3, 1, 0, 2, 1, 1, 0, 1])
    F = jf.diagonal(jf.exact_fisher(classifier)(params, train[0], weights=weights))
    expected = (others / (np.diag(F.as_matrix()) + DAMPING)) @ rows.T / 12
    assert_close(jf.influence(LOG_PROB, F)(params, train, test, DAMPING)[0], expected, factor=1e4)


def test_a_sum_of_means_does_not_say_how_many_examples_there_were():
    params, train, test, rows, others = problem()
    F = jf.diagonal(jf.exact_fisher(classifier)(params, train[0]))
    with pytest.raises(ValueError, match=r"influence: .* sum of several means.*Give `n`"):
        jf.influence(LOG_PROB, F + F)
    expected = (others / (2 * np.diag(F.as_matrix()) + DAMPING)) @ rows.T / 11
    assert_close(jf.influence(LOG_PROB, F + F, 11)(params, train, test, DAMPING)[0], expected, factor=1e4)
    with_prior = jf.influence(LOG_PROB, F + jf.scaled_identity(F, DAMPING))(params, train, test, 0.0)[0]
    assert_close(with_prior, (others / (np.diag(F.as_matrix()) + DAMPING)) @ rows.T / 11, factor=1e4)


def test_batches_and_pieces_are_the_whole():
    params, (x, y), test, _, _ = problem()
    F = jf.diagonal(jf.exact_fisher(classifier)(params, x))
    whole, _ = jf.influence(LOG_PROB, F)(params, (x, y), test, DAMPING)
    batches = ((x[k : k + 4], y[k : k + 4]) for k in range(0, 11, 4))
    assert_close(jf.influence(LOG_PROB, F)(params, batches, test, DAMPING)[0], whole)
    assert_close(jf.influence(LOG_PROB, F, batch_size=3)(params, (x, y), test, DAMPING)[0], whole)
    assert_close(jf.influence(LOG_PROB, F, n=22)(params, (x, y), test, DAMPING)[0], whole / 2)
    # A single array is data with one entry.
    normal = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    xs = jnp.arange(4.0)
    lone, _ = jf.influence(normal, jf.empirical_fisher(normal)(0.0, xs))(0.0, [xs[:1], xs[1:]], xs[:2], 1.0)
    assert_close(lone, np.outer(xs[:2], xs) / (np.mean(xs**2) + 1) / 4)


def test_conjugate_gradients_on_products_give_the_same():
    params, train, test, rows, others = problem()
    F = jf.implicit_fisher(classifier)(params, train[0])
    matrix = np.asarray(jf.exact_fisher(classifier)(params, train[0]).as_matrix())
    expected = others @ np.linalg.solve(matrix + DAMPING * np.eye(F.size), rows.T) / 11
    solver = jf.CG(rtol=1e-9, preconditioner=jf.eigen_kronecker)
    found, info = jf.influence(LOG_PROB, F, solver=solver)(params, train, test, DAMPING)
    assert_close(found, expected, factor=1e9)
    assert np.all(info.converged) and np.all(info.iterations > 0)


def test_leaving_one_out_of_a_linear_regression():
    """In closed form: least squares without example j is ``-X^+ x_j e_j / (1 - h_j)`` away."""
    rng = np.random.default_rng(0)
    x, y, noise = rng.normal(size=(9, 3)), rng.normal(size=9), 0.7
    x_test, y_test = rng.normal(size=(4, 3)), rng.normal(size=4)
    log_prob = jf.log_likelihood(lambda w, x: jf.Normal(x @ w, jnp.asarray(noise)))
    fit = lambda keep: np.linalg.lstsq(x[keep], y[keep], rcond=None)[0]  # noqa: E731
    w = fit(np.full(9, True))
    F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, jnp.asarray(noise)))(jnp.asarray(w), jnp.asarray(x))
    found, _ = jf.influence(log_prob, F)(jnp.asarray(w), (x, y), (x_test, y_test), 0.0)
    leverage = np.sum(x @ np.linalg.inv(x.T @ x) * x, axis=1)
    scores = (y_test - x_test @ w)[:, None] * x_test / noise**2
    without = np.stack([fit(np.arange(9) != j) for j in range(9)], axis=1)
    assert_close(-np.asarray(found) / (1 - leverage), scores @ (without - w[:, None]), factor=1e4)
    own, _ = jf.self_influence(log_prob, F)(jnp.asarray(w), (x, y), 0.0)
    assert_close(own, leverage * (y - x @ w) ** 2 / noise**2, factor=1e4)


def test_leaving_one_out_of_a_logistic_regression_to_first_order():
    """The model is retrained by Newton's method in NumPy, with the weight of each example changed a little."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 2)), rng.integers(0, 2, 20).astype(float)
    ridge, eps = 0.1, 1e-4

    def fit(weights):
        w = np.zeros(2)
        for _ in range(30):
            p = 1 / (1 + np.exp(-x @ w))
            hessian = (x.T * (weights * p * (1 - p))) @ x / 20 + ridge * np.eye(2)
            w = w - np.linalg.solve(hessian, x.T @ (weights * (p - y)) / 20 + ridge * w)
        return w

    model = lambda w, x: jf.Bernoulli(logits=x @ w)  # noqa: E731
    w = fit(np.ones(20))
    F = jf.exact_fisher(model)(jnp.asarray(w), jnp.asarray(x))
    found, _ = jf.influence(jf.log_likelihood(model), F)(jnp.asarray(w), (x, y), (x[:3], y[:3]), ridge)
    log_prob = lambda w: -np.logaddexp(0, -(2 * y[:3] - 1) * (x[:3] @ w))  # noqa: E731
    one_more = np.eye(20)
    slopes = [(log_prob(fit(1 + eps * one)) - log_prob(fit(1 - eps * one))) / (2 * eps) for one in one_more]
    np.testing.assert_allclose(found, np.stack(slopes, axis=1), rtol=0, atol=1e-5 * np.max(np.abs(found)))


def test_tracin_is_the_sum_over_checkpoints():
    params, train, test, rows, others = problem()
    second = mlp_params(jax.random.key(9))
    more = [loop_scores(LOG_PROB, second, *each) for each in (test, train)]
    expected = 0.5 * others @ rows.T + 0.25 * more[0] @ more[1].T
    for batch_size in (None, 4):
        found = jf.tracin(LOG_PROB, batch_size=batch_size)(iter([params, second]), train, test, [0.5, 0.25])
        assert_close(found, expected)


def test_the_matrix_of_a_large_layer_holds_no_gradients():
    """By XLA's own account: gradients of 64 examples of 512 x 512 weights take 64 MiB, two solved vectors 2 MiB."""
    params = {"w": jnp.zeros((512, 512), jnp.float32), "v": jnp.ones(512, jnp.float32)}
    log_prob = jf.log_likelihood(lambda p, x: jf.Normal(jnp.tanh(x @ p["w"]) @ p["v"], jnp.ones((), jnp.float32)))
    x, y = jnp.ones((64, 512), jnp.float32), jnp.ones(64, jnp.float32)
    vectors = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    program = jax.jit(lambda params, x, y, vectors: jf.scores(log_prob)(params, x, y).cross_gram(vectors))
    used = program.lower(params, x, y, vectors).compile().memory_analysis().temp_size_in_bytes
    assert used < 40 * 2**20
