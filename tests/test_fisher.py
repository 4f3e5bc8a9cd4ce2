"""The four Fishers against loops, dense sums over classes and each other; draws tied to examples; n, weights, pieces."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from problems import N, assert_close, class_sum_fisher, classifier, data, flat, reference
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

LOG_PROB = jf.log_likelihood(classifier)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_empirical_exact_and_implicit_against_their_definitions(batch_size, weighted):
    params, x, y, weights, rows = reference()
    given = {"weights": weights} if weighted else {}
    omega = np.asarray(weights) / np.sum(weights) if weighted else np.full(N, 1 / N)
    v = jax.tree.map(np.ones_like, params)

    def matrices(params, x, y):
        empirical = jf.empirical_fisher(LOG_PROB, batch_size=batch_size)(params, x, y, **given)
        exact = jf.exact_fisher(classifier, batch_size=batch_size)(params, x, **given)
        implicit = jf.implicit_fisher(classifier, batch_size=batch_size)(params, x, **given)
        divergence = jf.kl_hessian(classifier)(params, x, **given)
        return [F.as_matrix() for F in (empirical, exact, implicit, divergence)], implicit.mv(v), implicit.diagonal()

    (empirical, *others), product, diagonal = evaluated(matrices, params, x, y)
    assert_close(empirical, rows.T @ (omega[:, None] * rows))
    expected = class_sum_fisher(params, x, omega)
    for matrix in others:
        assert_close(matrix, expected)
    assert_close(flat(product), expected @ flat(v))
    assert_close(flat(diagonal), np.diag(expected))


def test_empirical_is_not_exact():
    params, x, _, _, rows = reference()
    exact, empirical = class_sum_fisher(params, x), rows.T @ rows / N
    assert np.linalg.norm(exact - empirical) > 0.3 * np.linalg.norm(exact)


@pytest.mark.parametrize("num_samples", [1, 2, 10, 1000])
def test_sampled_fisher_is_unbiased(num_samples, key):
    """Quadratic forms at a fixed direction, by z-score with the estimator's own standard error, and its scale for every m."""
    params, x, _, _, _ = reference()
    v = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), params)
    repeats = max(4000 // num_samples, 8)
    fisher = jf.sampled_fisher(classifier, num_samples=num_samples)
    estimates = traced(jax.vmap(lambda key: fisher(params, key, x).quadratic(v)))(jax.random.split(key, repeats))
    expected = flat(v) @ class_sum_fisher(params, x) @ flat(v)
    z = (np.mean(estimates) - expected) / (np.std(estimates, ddof=1) / np.sqrt(repeats))
    assert abs(z) < 5, z


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_draws_belong_to_examples_whatever_the_key(implementation):
    """A key of another implementation draws other numbers under `jax.vmap` than alone; here the batch size does not matter."""
    key, x, loc = jax.random.key(5, impl=implementation), jnp.arange(5.0), jnp.ones(())
    drawn = lambda size: jf.sampled_fisher(lambda loc, x: jf.Normal(loc * x, 1.0), 2, batch_size=size)  # noqa: E731
    rows = {size: traced(lambda size=size: drawn(size)(loc, key, x).form.scores.as_matrix())() for size in (None, 2)}
    assert_close(rows[2], rows[None])
    mapped = traced(jax.vmap(lambda key: drawn(None)(loc, key, x).form.scores.as_matrix()))(jnp.stack([key, key]))
    assert_close(mapped[1], rows[None])
    assert np.unique(rows[None][2:]).size == 8


def test_draws_belong_to_examples(key):
    """A draw does not depend on pieces or on the rest of the batch; it depends on the key."""
    params, x, _, _, _ = reference()

    def rows(key, x=x, batch_size=None):
        drawn = jf.sampled_fisher(classifier, num_samples=2, batch_size=batch_size)
        return evaluated(lambda key, x: drawn(params, key, x).form.scores.as_matrix(), key, x)

    whole = rows(key)
    for batch_size in (1, 2, 3):
        assert_close(rows(key, batch_size=batch_size), whole)
    assert_close(rows(key, np.asarray(x)[:4]), whole[:8])
    assert np.max(np.abs(rows(jax.random.key(1)) - whole)) > 0.1
    assert np.array_equal(rows(jax.random.key_data(key)), whole)


def test_an_unconditional_model_has_no_inputs():
    F = jf.exact_fisher(lambda theta: jf.Normal(theta["mu"], jnp.exp(theta["s"])))({"mu": 0.0, "s": 0.5})
    assert_close(F.as_matrix(), np.diag([np.exp(-1.0), 2.0]))


def test_a_vector_target_is_a_product_of_parts():
    """A batch of three normals is one target of three parts: the Fisher is three times that of one."""

    def model(mu):
        return jf.Normal(jnp.broadcast_to(mu, (3,)), 2.0)

    assert_close(jf.exact_fisher(model)(0.0).as_matrix(), [[0.75]])
    observed = jf.observed_information(jf.log_likelihood(model))(0.0, jnp.array([[1.0, 2.0, 3.0]]))
    assert_close(observed.as_matrix(), [[0.75]])


def test_data_twice_is_the_same_mean(key):
    params, x, y, _, _ = reference()
    matrix = lambda *data, **given: jf.empirical_fisher(LOG_PROB)(params, *data, **given).as_matrix()  # noqa: E731
    once = evaluated(matrix, x, y)
    assert_close(evaluated(matrix, np.concatenate([x, x]), np.concatenate([y, y])), once)
    assert_close(evaluated(lambda *data: matrix(*data, weights=np.full(N, 2.0)), x, y), once)


def test_one_example_and_one_parameter():
    model = lambda w, x: jf.Poisson(log_rate=w * x)  # noqa: E731
    log_prob = jf.log_likelihood(model)
    x, y = jnp.array([2.0]), jnp.array([3.0])
    assert_close(evaluated(lambda w: jf.exact_fisher(model)(w, x).as_matrix(), 0.5), [[4 * np.exp(1.0)]])
    step = evaluated(jf.natural_grad(log_prob, lambda w, x, y: jf.exact_fisher(model)(w, x), damping=0.0), 0.5, x, y)
    assert_close(step, (np.exp(1.0) - 3) / (2 * np.exp(1.0)))


def test_pytree_data_and_inputs():
    """Inputs may be any pytree of arrays with one leading axis."""
    params, x, y, _, rows = reference()
    log_prob = lambda params, batch: LOG_PROB(params, batch["x"], batch["y"])  # noqa: E731
    matrix = evaluated(lambda batch: jf.empirical_fisher(log_prob)(params, batch).as_matrix(), {"x": x, "y": y})
    assert_close(matrix, rows.T @ rows / N)


def test_repr_says_what_it_is(key):
    params, x, y, weights, _ = reference()
    p = 31
    empirical = jf.empirical_fisher(LOG_PROB)(params, x, y)
    exact = jf.exact_fisher(classifier)(params, x, weights=weights)
    assert repr(empirical) == f"Fisher(empirical, mean over 7, params {p}, exact as scores)"
    assert repr(exact) == f"Fisher(exact, weighted mean over 6, params {p}, exact as scores)"
    assert repr(jf.implicit_fisher(classifier)(params, x)) == f"Fisher(exact, mean over 7, params {p}, implicit, products only)"
    assert repr(jf.sampled_fisher(classifier)(params, key, x)) == (
        f"Fisher(sampled, 1 draw, mean over 7, params {p}, exact as scores)"
    )
    assert repr(jf.diagonal(2 * empirical)) == f"Fisher(empirical, scaled mean over 7, params {p}, diagonal)"
    assert repr(jf.dense(empirical) + jf.diagonal(exact)) == (
        f"Fisher((empirical, mean over 7) + (exact, weighted mean over 6), params {p}, dense + diagonal)"
    )


def test_divergences_of_a_model():
    """The mean over examples, and the Monte Carlo estimate of the same with its standard error."""
    params, x, _, weights, _ = reference()
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, params)
    softmaxes = traced(jax.vmap(lambda q, x: jax.nn.softmax(classifier(q, x).logits), (None, 0)))
    logits_p, logits_q = (np.log(np.asarray(softmaxes(q, x))) for q in (params, moved))
    each = np.sum(np.exp(logits_p) * (logits_p - logits_q), axis=1)
    divergence = lambda **given: evaluated(lambda q: jf.kl(classifier)(params, q, x, **given), moved)  # noqa: E731
    assert_close(divergence(), each.mean(), factor=1e3)
    assert_close(divergence(weights=weights), np.average(each, weights=weights), factor=1e3)

    n = 4000
    repeated = jnp.tile(x, (n, 1))
    keys = jax.random.split(jax.random.key(3), n * N)
    labels = traced(jax.vmap(lambda key, x: classifier(params, x).sample(key)))(keys, repeated)
    estimate = jf.monte_carlo_kl(LOG_PROB)(params, moved, (repeated, labels))
    differences = (logits_p - logits_q)[np.tile(np.arange(N), n), labels]
    assert abs(float(estimate) - each.mean()) < 5 * np.std(differences) / np.sqrt(n * N)
    nodes = (jnp.repeat(x, 3, axis=0), jnp.tile(jnp.arange(3), N))
    exact = jf.monte_carlo_kl(LOG_PROB)(params, moved, nodes, weights=jnp.asarray(np.exp(logits_p)).reshape(-1))
    assert_close(exact, each.mean(), factor=1e3)


def test_observed_information_is_minus_the_mean_hessian():
    params, x, y, weights, _ = reference()
    start, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda flat, x, y: LOG_PROB(unravel(flat), x, y))
    hessians = traced(jax.vmap(hessian, (None, 0, 0)))(start, x, y)
    information = lambda **given: evaluated(  # noqa: E731
        lambda params: jf.observed_information(LOG_PROB)(params, x, y, **given).as_matrix(), params
    )
    assert_close(information(), -np.mean(hessians, axis=0))
    assert_close(information(weights=weights), -np.average(hessians, axis=0, weights=np.asarray(weights)))


def test_both_arguments_moving_have_no_curvature():
    """The classic mistake: with both sides of the divergence live, its Hessian is zero."""
    params, x, _, _, _ = reference()
    start, unravel = jax.flatten_util.ravel_pytree(params)
    both = traced(jax.hessian(lambda flat: jf.kl(classifier)(unravel(flat), unravel(flat), x)))(start)
    assert np.max(np.abs(both)) < 1e-12


@pytest.mark.parametrize("make", [jf.exact_fisher, jf.implicit_fisher])
def test_differentiable_in_the_parameters(make):
    """The trace's derivative along a direction, against central differences."""
    params, x, _, _, _ = reference()
    start, unravel = jax.flatten_util.ravel_pytree(params)
    of = lambda flat: make(classifier)(unravel(flat), x).trace()  # noqa: E731
    trace = traced(of)
    direction = np.cos(np.arange(start.size))
    h = 1e-5
    numeric = (trace(start + h * direction) - trace(start - h * direction)) / (2 * h)
    np.testing.assert_allclose(evaluated(jax.grad(of), start) @ direction, numeric, rtol=1e-8)


def test_vmap_over_parameters(key):
    params, x, y, _, _ = reference()
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 0.3]), params)
    matrix = lambda params: jf.empirical_fisher(LOG_PROB)(params, x, y).as_matrix()  # noqa: E731
    matrices = evaluated(jax.vmap(matrix), stacked)
    operators = evaluated(jax.vmap(lambda params: jf.exact_fisher(classifier)(params, x)), stacked)
    traces = evaluated(jax.vmap(lambda F: F.trace()), operators)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        assert_close(matrices[i], evaluated(matrix, one))
        assert_close(traces[i], np.trace(class_sum_fisher(one, x)))


def test_frozen_leaves_have_no_information():
    params, x, _, _, _ = reference()

    def frozen(params, x):
        return classifier(params | {"hidden": jax.lax.stop_gradient(params["hidden"])}, x)

    diagonal = evaluated(lambda params: jf.exact_fisher(frozen)(params, x).diagonal(), params)
    assert np.max(np.abs(diagonal["hidden"]["w"])) == 0
    assert_close(flat(diagonal["out"]), np.diag(class_sum_fisher(params, x))[-15:])


def test_float32_and_bfloat16_parameters(key):
    params, x, _, _, _ = reference()
    expected = class_sum_fisher(params, x)
    for dtype, eps in ((jnp.float32, 1.2e-7), (jnp.bfloat16, 8e-3)):
        narrow = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)

        @traced
        def numbers(params, x):
            fishers = jf.exact_fisher(classifier)(params, x), jf.implicit_fisher(classifier)(params, x)
            return [(F.as_matrix(), F.mv(jax.tree.map(jnp.ones_like, params))) for F in fishers]

        for matrix, product in numbers(narrow, x.astype(dtype)):
            assert matrix.dtype == jnp.float32
            assert_close(matrix, expected, factor=50, eps=eps)
            assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product))
            assert_close(flat(product), expected @ np.ones(31), factor=50, eps=eps)


def test_more_rows_than_parameters_and_fewer(key):
    """The routes for n < p and for n > p give the same matrix and the same solve."""
    params, *_ = reference()
    v = jax.tree.map(np.ones_like, params)

    @traced
    def numbers(x, y):
        F = jf.empirical_fisher(LOG_PROB)(params, x, y)
        return F.as_matrix(), F.solve(v, 0.1)

    for n in (2, 40):
        dense, solved = numbers(*data(key, n))
        assert_close(flat(solved), np.linalg.solve(dense + 0.1 * np.eye(31), flat(v)), factor=1e4)


def test_fishers_of_different_numbers_of_examples_have_one_structure():
    """A last short batch, a loop's carry and an array-by-array mean accept them; the counts are averaged with the rest."""
    log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    one, other = (jf.diagonal(jf.empirical_fisher(log_prob)(0.0, jnp.arange(n, dtype=float))) for n in (4, 12))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    mean = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, one, other)
    assert repr(mean) == "Fisher(empirical, mean over 6, params 1, diagonal)"
    expected = 0.75 * np.mean(np.arange(4.0) ** 2) + 0.25 * np.mean(np.arange(12.0) ** 2)
    np.testing.assert_allclose(mean.trace(), expected, rtol=1e-12)
    seen = []
    jax.jit(lambda F: (seen.append(repr(F)), F.mv(1.0))[1])(one)
    assert seen == ["Fisher(empirical, mean over n, params 1, diagonal)"]
    assert (one + other).n == 16
