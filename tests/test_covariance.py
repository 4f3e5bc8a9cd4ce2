"""The covariance of the score as an operator, as in variational Monte Carlo, against dense float64 matrices in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import compiled
from problems import assert_close, flat
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

N = 12
WEIGHTS = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2.0, N))
SHAPES = {"bias": (4,), "visible": (6,), "w": (6, 4)}
PARAMS = {name: jnp.asarray(np.random.default_rng(i).normal(size=s)) for i, (name, s) in enumerate(SHAPES.items())}
SPINS = jnp.asarray(np.random.default_rng(5).choice([-1.0, 1.0], (N, 6)))
ENERGIES = np.random.default_rng(6).normal(size=N)
DAMPING = 0.03


def log_psi(params, spins):
    """The logarithm of an amplitude that is not normalised, so that the mean of its score is not zero."""
    return spins @ params["visible"] + jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + params["bias"])))


@functools.cache
def rows(count=N):
    """Centred scores times the roots of the weights, and the weights."""
    omega = np.asarray(WEIGHTS[:count] / jnp.sum(WEIGHTS[:count]))
    plain = traced(jax.vmap(jax.grad(log_psi), (None, 0)))(PARAMS, SPINS[:count])
    plain = np.concatenate([np.asarray(leaf).reshape(count, -1) for leaf in jax.tree.leaves(plain)], 1)
    return np.sqrt(omega)[:, None] * (plain - omega @ plain), omega


def scores(params=PARAMS, **options):
    return jf.scores(log_psi, center=True, **options)(params, SPINS, weights=WEIGHTS)


def test_an_operator_of_scores_is_the_one_that_its_function_makes():
    """In memory and in pieces, centred or not, the numbers are the same, and the name says what the operator is of."""

    def make():
        made = {"centred": [], "not": []}
        for name, center in (("centred", True), ("not", False)):
            for size in (None, 5):
                plain = jf.scores(log_psi, center, batch_size=size)(PARAMS, SPINS, weights=WEIGHTS)
                made[name].append(jf.fisher_from_scores(plain).as_matrix())
            made[name].append(jf.empirical_fisher(log_psi, center, batch_size=5)(PARAMS, SPINS, weights=WEIGHTS).as_matrix())
        return made

    x, _ = rows()
    made = traced(make)()
    for matrix in made["centred"]:
        assert_close(matrix, x.T @ x)
    for matrix in made["not"]:
        assert np.linalg.norm(matrix - x.T @ x) > 0.1 * np.linalg.norm(x.T @ x), "the control: the mean is not zero"
    assert repr(jf.fisher_from_scores(scores())) == "Fisher(scores, centred, weighted mean over 12, params 34, exact as scores)"
    fisher = jf.empirical_fisher(log_psi, center=True)(PARAMS, SPINS)
    assert repr(fisher) == "Fisher(empirical, centred, mean over 12, params 34, exact as scores)"


def test_an_operator_of_weighted_scores_knows_how_many_observations_it_is_over():
    """The mass is the sum of the weights, as for the empirical Fisher, and not the number of rows."""
    x, weights = np.array([1.0, -2.0, 0.5]), np.array([1.0, 0.0, 4.0])
    log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    for given, total in ((weights, 5), (np.full(3, 2.0), 6), (None, 3)):
        expected = jf.empirical_fisher(log_prob)(0.0, x, weights=given)
        variance = 1 / (total * np.average(x**2, weights=given))
        for options in ({}, {"batch_size": 2}):
            made = evaluated(lambda x, w, options=options: jf.scores(log_prob, **options)(0.0, x, weights=w), x, given)
            fisher = jf.fisher_from_scores(made)
            assert str(fisher.provenance) == str(expected.provenance).replace("empirical", "scores")
            np.testing.assert_allclose(float(jf.covariance(fisher).as_matrix()[0, 0]), variance, rtol=1e-5)
        centred = jf.fisher_from_scores(jf.scores(log_prob, center=True)(0.0, x, weights=given))
        assert float(centred.provenance.mass) == total


def test_spring_and_a_trust_region_on_centred_scores():
    """``u = mu u' + X^T (X X^T + damping I)^-1 (e - mu X u')`` step after step, then no farther than a radius."""
    mu, radius = 0.9, 1e-3
    opt = jf.scale_by_fisher(DAMPING, momentum=mu)
    bounded = optax.chain(jf.scale_by_fisher(DAMPING), optax.scale_by_learning_rate(1.0), jf.scale_to_kl(radius))

    def make(batch_size):
        made = scores(batch_size=batch_size)
        fisher = jf.fisher_from_scores(made)
        gradients = [made.rmv(made.weights * jnp.asarray(np.roll(ENERGIES, k))) for k in range(3)]
        state, path = opt.init(PARAMS), []
        for gradient in gradients:
            update, state = opt.update(gradient, state, PARAMS, fisher=fisher)
            path.append(update)
        step, _ = bounded.update(gradients[0], bounded.init(PARAMS), PARAMS, fisher=fisher)
        return path, step, 0.5 * fisher.quadratic(step)

    x, omega = rows()
    last, expected = np.zeros(34), []
    for k in range(3):
        e = np.sqrt(omega) * np.roll(ENERGIES, k)
        last = mu * last + x.T @ np.linalg.solve(x @ x.T + DAMPING * np.eye(N), e - mu * x @ last)
        expected.append(last)
    for batch_size in (None, 5):
        path, step, moved = traced(functools.partial(make, batch_size))()
        for update, vector in zip(path, expected, strict=True):
            assert_close(flat(update), vector, factor=1e4)
        assert_close(moved, radius, factor=1e4)
        assert_close(flat(step) / np.linalg.norm(flat(step)), -expected[0] / np.linalg.norm(expected[0]), factor=1e4)


def test_dampings_and_solvers():
    """Solves by the smaller matrix, one damping per leaf, by the diagonal, by least squares, and as a natural gradient."""
    by_leaf = {"bias": 0.1, "visible": 0.02, "w": 0.3}

    def make(count):
        fisher = jf.empirical_fisher(log_psi, center=True)(PARAMS, SPINS[:count], weights=WEIGHTS[:count])
        v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), PARAMS)
        natural = jf.natural_grad(log_psi, jf.empirical_fisher(log_psi, center=True), damping=DAMPING)
        return {
            "one": fisher.solve(v, DAMPING),
            "by leaf": fisher.solve(v, by_leaf),
            "by the diagonal": (fisher + 0.5 * jf.diagonal(fisher)).solve(v, DAMPING),
            "least squares": jf.solve(fisher, v, DAMPING, jf.LSMR(rtol=1e-13))[0],
            "iterations": jf.solve(fisher, v, DAMPING, jf.CG(rtol=1e-13))[0],
        }, natural(PARAMS, SPINS[:count], weights=WEIGHTS[:count])

    v = np.concatenate([np.cos(np.arange(np.prod(shape))) for shape in SHAPES.values()])
    each = np.repeat(list(by_leaf.values()), [np.prod(shape) for shape in SHAPES.values()])
    for count in (N, 3):
        x, omega = rows(count)
        matrix = x.T @ x
        damped = matrix + DAMPING * np.eye(34)
        expected = {
            "one": damped,
            "by leaf": matrix + np.diag(each),
            "by the diagonal": damped + 0.5 * np.diag(np.diag(matrix)),
            "least squares": damped,
            "iterations": damped,
        }
        made, natural = traced(functools.partial(make, count))()
        for name, solution in made.items():
            assert_close(flat(solution), np.linalg.solve(expected[name], v), factor=1e6)
        plain = traced(jax.vmap(jax.grad(log_psi), (None, 0)))(PARAMS, SPINS[:count])
        mean = np.concatenate([omega @ np.asarray(leaf).reshape(count, -1) for leaf in jax.tree.leaves(plain)])
        assert_close(flat(natural), np.linalg.solve(damped, -mean), factor=1e4)


@pytest.mark.compiled
def test_a_mean_that_dominates_costs_no_digits_in_float32():
    """Scores that deviate by 1 from a mean of 1e4: the solve is as accurate as one with the deviations."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
    spins = (SPINS + 1e4).astype(jnp.float32)

    def far(params, spins):
        return spins @ params["visible"] + jnp.sum(jnp.log(jnp.cosh(0.1 * (spins - 1e4) @ params["w"] + params["bias"])))

    v = {name: jnp.ones(shape, jnp.float32) for name, shape in SHAPES.items()}
    solve = lambda params: jf.empirical_fisher(far, center=True)(params, spins).solve(v, 0.1)  # noqa: E731
    plain = traced(jax.vmap(jax.grad(far), (None, 0)))(PARAMS, SPINS + 1e4)
    plain = np.concatenate([np.asarray(leaf).reshape(N, -1) for leaf in jax.tree.leaves(plain)], 1)
    plain = plain - plain.mean(0)
    expected = np.linalg.solve(plain.T @ plain / N + 0.1 * np.eye(34), np.ones(34))
    found = flat(compiled(solve)(params))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_views_other_than_kronecker_are_those_of_the_matrix():
    x, _ = rows()
    matrix = x.T @ x

    def make():
        fisher = jf.fisher_from_scores(scores(batch_size=5))
        uncentred = jf.empirical_fisher(log_psi)(PARAMS, SPINS)
        views = [jf.dense(fisher), jf.block_diagonal(fisher), jf.diagonal(fisher), jf.low_rank(fisher, 4)]
        return [view.as_matrix() for view in views], jf.eigen_kronecker(fisher, jf.kronecker(uncentred)).trace()

    (dense, blocks, diagonal, low), trace = traced(make)()
    assert_close(dense, matrix)
    groups = np.repeat(np.arange(3), [np.prod(shape) for shape in SHAPES.values()])
    assert_close(blocks, np.where(groups[:, None] == groups[None, :], matrix, 0))
    assert_close(diagonal, np.diag(np.diag(matrix)))
    values, vectors = np.linalg.eigh(matrix)
    assert_close(low, (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T, factor=1e4)
    assert_close(trace, np.trace(matrix))


def test_what_is_no_scores_is_refused():
    for bad, match in ((jf.scores(log_psi), "a function: call it"), (3.0, "`scores` is 3.0"), (None, "`scores` is None")):
        with pytest.raises(TypeError, match=match):
            jf.fisher_from_scores(bad)


def test_scores_of_a_fisher_know_the_examples_that_it_is_over():
    """Whoever made them; the Fisher of the scores in a sum is over those of all terms."""
    model = lambda mu, x: jf.Normal(mu * x, 1.0)  # noqa: E731
    x, weights = jnp.array([1.0, -2.0, 0.5]), np.array([1.0, 0.0, 4.0])
    log_prob, loss = jf.log_likelihood(model), lambda mean, x: (mean - x) ** 2
    makers = {
        "empirical": lambda **options: lambda w: jf.empirical_fisher(log_prob, **options)(1.0, x, x, weights=w),
        "centred": lambda **options: lambda w: jf.empirical_fisher(log_prob, center=True, **options)(1.0, x, x, weights=w),
        "exact": lambda **options: lambda w: jf.exact_fisher(model, **options)(1.0, x, weights=w),
        "sampled": lambda **options: lambda w: jf.sampled_fisher(model, **options)(1.0, jax.random.key(0), x, weights=w),
        "loss": lambda **options: lambda w: jf.gauss_newton(lambda p, x: p * x, loss, **options)(1.0, x, x, weights=w),
    }
    for name, maker in makers.items():
        for options in ({}, {"batch_size": 2}):
            for given, n in ((None, 3), (weights, 2)):
                F = maker(**options)(given)
                assert f"{jf.fisher_from_scores(F.form.scores).n:g}" == f"{F.n:g}" == str(n), (name, options)
    F, G = makers["empirical"]()(None), makers["exact"]()(weights)
    assert f"{jf.fisher_from_scores((F + G).form.scores).n:g}" == f"{(F + G).n:g}" == "5"
