"""Natural gradients against dense float64 solves, and as replacements of `jax.grad`."""

import itertools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from problems import N, assert_close, class_sum_fisher, classifier, data, flat, mean_loss, mlp_params, reference
from programs.evaluate import evaluated, traced

import jaxfisher as jf
from jaxfisher import geometry, statistics

pytestmark = pytest.mark.usefixtures("in_numpy")

LOG_PROB = jf.log_likelihood(classifier)


def exact(params, x, y, weights=None):
    return jf.exact_fisher(classifier)(params, x, weights=weights)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fused_empirical_step(batch_size, weighted):
    params, x, y, weights, rows = reference()
    omega = np.asarray(weights) / np.sum(weights) if weighted else np.full(N, 1 / N)
    given = {"weights": weights} if weighted else {}
    step = jf.value_and_natural_grad(LOG_PROB, damping=0.1, batch_size=batch_size)
    loss, d = evaluated(lambda *at: step(*at, **given), params, x, y)
    losses = -evaluated(jax.vmap(LOG_PROB, (None, 0, 0)), params, x, y)
    F, g = rows.T @ (omega[:, None] * rows), -rows.T @ omega
    assert_close(loss, omega @ losses)
    assert_close(flat(d), np.linalg.solve(F + 0.1 * np.eye(31), g), factor=1e4)


@pytest.mark.parametrize("n", [4, 60])
def test_both_sides_of_the_push_through(n, key):
    params, *_ = reference()
    x, y = data(key, n)
    F = evaluated(lambda *at: jf.empirical_fisher(LOG_PROB)(*at).as_matrix(), params, x, y)
    g = flat(evaluated(jax.grad(mean_loss), params, x, y))
    d = jax.jit(jf.natural_grad(LOG_PROB, damping=0.01))(params, x, y)
    assert_close(flat(d), np.linalg.solve(F + 0.01 * np.eye(31), g), factor=1e5)
    free = jax.jit(jf.natural_grad(LOG_PROB, damping=0.0))(params, x, y)
    assert_close(flat(free), np.linalg.pinv(F, rcond=1e-12) @ g, factor=1e8)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_with_a_fisher_of_one_s_own(batch_size, weighted):
    params, x, y, weights, rows = reference()
    omega = np.asarray(weights) / np.sum(weights) if weighted else np.full(N, 1 / N)
    given = {"weights": weights} if weighted else {}
    step = jf.value_and_natural_grad(LOG_PROB, exact, damping=0.1, batch_size=batch_size)
    loss, d = evaluated(lambda *at: step(*at, **given), params, x, y)
    losses = -evaluated(jax.vmap(LOG_PROB, (None, 0, 0)), params, x, y)
    F = class_sum_fisher(params, x, omega)
    assert_close(loss, omega @ losses)
    assert_close(flat(d), np.linalg.solve(F + 0.1 * np.eye(31), -rows.T @ omega), factor=1e4)


def test_a_view():
    params, x, y, _, rows = reference()
    g = -rows.mean(0)
    d = evaluated(jf.natural_grad(LOG_PROB, damping=0.1, view=jf.diagonal), params, x, y)
    assert_close(flat(d), g / (np.mean(rows**2, axis=0) + 0.1), factor=1e3)
    d = evaluated(jf.natural_grad(LOG_PROB, exact, damping=0.1, view=jf.diagonal), params, x, y)
    assert_close(flat(d), g / (np.diag(class_sum_fisher(params, x)) + 0.1), factor=1e3)


def test_it_descends_where_jax_grad_would(key):
    """Steps ``theta - lr * d`` decrease the loss: the sign and scale are those of `jax.grad`."""
    params, *_ = reference()
    x, y = data(key, 50)
    step = traced(jf.value_and_natural_grad(LOG_PROB, exact, damping=1e-2))
    losses = []
    for _ in range(5):
        loss, d = step(params, x, y)
        losses.append(float(loss))
        params = jax.tree.map(lambda p, d: np.asarray(p) - 0.5 * d, params, d)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_parameter_dtype_comes_back(dtype):
    params, x, y, _, _ = reference()
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    for fisher in (None, exact):
        step = traced(jf.natural_grad(LOG_PROB, fisher, damping=0.1))
        d, full = step(narrow, x.astype(dtype), y), step(params, x, y)
        chex.assert_trees_all_equal_dtypes(d, narrow)
        eps = float(jnp.finfo(dtype).eps)
        assert np.linalg.norm(flat(d).astype(float) - flat(full)) < 100 * eps * np.linalg.norm(flat(full))


def test_jit_vmap_scan_and_grad():
    params, x, y, _, _ = reference()
    step = jf.natural_grad(LOG_PROB, exact, damping=0.1)
    alone = flat(step(params, x, y))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    assert_close(flat(jax.tree.map(lambda leaf: leaf[1], jax.vmap(step, (0, None, None))(stacked, x, y))), alone, factor=1e4)

    def descend(params, _):
        return jax.tree.map(lambda p, d: p - d, params, step(params, x, y)), None

    scanned, _ = jax.lax.scan(descend, params, length=3)
    looped = params
    for _ in range(3):
        looped, _ = jax.jit(descend)(looped, None)
    assert_close(flat(scanned), flat(looped), factor=1e5)

    # The derivative of the length of d by the damping is -d^T (F + damping)^-1 d / |d|.
    length = lambda damping: jnp.linalg.norm(  # noqa: E731
        jax.flatten_util.ravel_pytree(jf.natural_grad(LOG_PROB, exact, damping=damping)(params, x, y))[0]
    )
    inverse = np.linalg.inv(class_sum_fisher(params, x) + 0.1 * np.eye(31))
    np.testing.assert_allclose(jax.jit(jax.grad(length))(0.1), -alone @ inverse @ alone / np.linalg.norm(alone), rtol=1e-8)


def test_one_trace_for_two_steps():
    params, x, y, _, _ = reference()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(jf.natural_grad(LOG_PROB, exact, damping=0.1), n=1))
    for _ in range(2):
        params = jax.tree.map(lambda p, d: p - d, params, step(params, x, y))


@pytest.mark.parametrize("fisher", [None, jf.exact_fisher(classifier)], ids=["empirical", "exact"])
def test_with_a_solver_and_with_a_damping_for_each_leaf(fisher):
    params, x, y, _, rows = reference()
    dense = rows.T @ rows / len(rows) if fisher is None else class_sum_fisher(params, x)
    gradient = -np.mean(rows, axis=0)
    direction = lambda **given: evaluated(jf.natural_grad(LOG_PROB, fisher, **given), params, x, y)  # noqa: E731
    by_cg = direction(damping=0.1, solver=jf.CG(rtol=1e-12, preconditioner=jf.kronecker))
    np.testing.assert_allclose(flat(by_cg), np.linalg.solve(dense + 0.1 * np.eye(31), gradient), rtol=1e-8, atol=1e-10)
    dampings = {"hidden": {"b": 0.3, "w": 0.1}, "out": [0.05, 0.7]}
    each = np.repeat(jax.tree.leaves(dampings), [4, 12, 12, 3])
    assert_close(flat(direction(damping=dampings)), np.linalg.solve(dense + np.diag(each), gradient), factor=1e4)


MAKERS = {
    "exact": jf.exact_fisher(classifier),
    "implicit": jf.implicit_fisher(classifier),
    "KL Hessian": jf.kl_hessian(classifier),
    "empirical": jf.empirical_fisher(jf.log_likelihood(classifier)),
    "observed": jf.observed_information(jf.log_likelihood(classifier)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_makes_a_fisher_is_given_as_it_is(name, key):
    """A function such as `jf.exact_fisher(model)` can be passed as it is: it is known whether it takes the targets."""
    fisher, params, (x, y) = MAKERS[name], mlp_params(key), data(key)
    whole = name in ("empirical", "observed")
    solver = jf.CG(rtol=1e-10)
    optimiser = jf.natural_gradient(1.0, 1.0, solver=solver)

    def directions(params, x, y):
        operator = fisher(params, x, y) if whole else fisher(params, x)
        by_hand = jf.solve(operator, jax.grad(mean_loss)(params, x, y), 1.0, solver)[0]
        moved, _, _ = jf.training_step(classifier, optimiser, fisher)(params, optimiser.init(params), x, y)
        return by_hand, jf.natural_grad(LOG_PROB, fisher, damping=1.0, solver=solver)(params, x, y), moved

    expected, found, moved = evaluated(directions, params, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, expected)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a - b, c, rtol=1e-6, atol=1e-9), params, moved, expected)


def test_a_model_without_inputs_takes_weights_and_counts():
    """All examples have the same prediction, with Fisher F: with weights w and counts c the mean is ``sum w F / sum w c``."""

    def model(log_rate):
        return jf.Poisson(log_rate)

    y, weights, counts = jnp.array([1.0, 4.0, 2.0]), jnp.array([1.0, 0.0, 3.0]), jnp.array([2.0, 9.0, 1.0])
    rate = np.exp(0.3)
    opt = jf.natural_gradient(1.0, 0.0)
    exact = jf.exact_fisher(model)
    for given, terms in (({}, 1.0), ({"weights": weights}, 1.0), ({"weights": weights, "counts": counts}, 5 / 4)):
        omega = np.asarray(given.get("weights", jnp.ones(3)))
        gradient, fisher = (rate - omega @ np.asarray(y) / omega.sum()) / terms, rate / terms

        def moves(start, given):
            direction = jf.natural_grad(jf.log_likelihood(model), exact, damping=0.5)(start, y, **given)
            steps = [jf.training_step(model, optimiser) for optimiser in (opt, jf.kfac())]
            return direction, *(step(start, step.init(start, y, **given), y, **given)[0] for step in steps)

        direction, new, by_kfac = evaluated(moves, 0.3, given)
        assert_close(direction, gradient / (fisher + 0.5), factor=100)
        assert_close(new, 0.3 - gradient / fisher, factor=100)
        assert np.isfinite(by_kfac)
    path = evaluated(lambda start: geometry.natural_gradient_flow(model, 1.0, 10)(start, y, weights=weights), 0.3)
    goal = np.asarray(weights) @ np.asarray(y) / 4
    np.testing.assert_allclose(np.exp(path[-1]), goal + (rate - goal) * np.exp(-1.0), rtol=1e-6)  # of ten steps
    params = evaluated(lambda start: jf.fit(model, penalty=statistics.firth(model))(start, y, weights=weights).params, 0.3)
    assert_close(np.exp(params), goal + 1 / 8, factor=1e8)  # the penalty of a Poisson rate is half an observation
