"""Laplace's approximation against closed forms of Bayesian linear regression, dense matrices in NumPy, and draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree
from problems import assert_close

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

N, NOISE = 12, 0.5
PRIORS = {
    "one": 0.7,
    "a leaf": {"b": 0.3, "w": 2.0},
    "a parameter": {"b": np.array([0.3]), "w": np.array([2.0, 0.5, 1.0])},
}
ENTRIES = {"one": [0.7] * 4, "a leaf": [0.3, 2.0, 2.0, 2.0], "a parameter": [0.3, 2.0, 0.5, 1.0]}


def line(params, x):
    return jf.Normal(x @ params["w"] + params["b"][0], NOISE)


@functools.cache
def regression():
    """Inputs, targets, and the design matrix in the order of the parameters: the level first."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 3))
    return x, x @ [1.0, -0.5, 0.2] + 0.4 + NOISE * rng.normal(size=N), np.column_stack([np.ones(N), x])


def solved(prior):
    """Posterior covariance and mean by the normal equations."""
    _, y, design = regression()
    covariance = np.linalg.inv(design.T @ design / NOISE**2 + np.diag(ENTRIES[prior]))
    return covariance, covariance @ design.T @ y / NOISE**2


def fitted(prior, **options):
    x, y, _ = regression()
    mean = solved(prior)[1]
    return jf.laplace(line, {"b": mean[:1], "w": mean[1:]}, x, y, prior=PRIORS[prior], **options)


def marginal(design, y, entries):
    """The log density of the targets with the weights integrated out, ``N(0, s^2 I + X A^-1 X^T)``."""
    covariance = NOISE**2 * np.eye(len(y)) + design / entries @ design.T
    return scipy.stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


def inverse(posterior):
    return np.linalg.inv(np.asarray(posterior.precision()))


@pytest.mark.parametrize("prior", PRIORS)
def test_bayesian_linear_regression(prior):
    """Without an approximation, covariance, evidence with its derivative, and predictions are those of the closed form."""
    x, y, design = regression()
    covariance, _ = solved(prior)
    posterior = fitted(prior)
    assert_close(inverse(posterior), covariance, factor=1e4)
    assert_close(posterior.log_evidence(), marginal(design, y, np.array(ENTRIES[prior])), factor=1e4)
    predicted = posterior.predictive(x)
    assert_close(predicted.variance, NOISE**2 + np.sum(design @ covariance * design, 1), factor=1e4)
    assert_close(posterior.output_covariance(x)[:, 0, 0], np.sum(design @ covariance * design, 1), factor=1e4)
    # MacKay's derivative, from the normal equations.
    slope = jax.grad(posterior.log_evidence)(jax.tree.map(jnp.asarray, PRIORS[prior]))
    slopes = 0.5 * (1 / np.array(ENTRIES[prior]) - solved(prior)[1] ** 2 - np.diag(covariance))
    groups = {"one": [[0, 1, 2, 3]], "a leaf": [[0], [1, 2, 3]], "a parameter": [[0], [1], [2], [3]]}[prior]
    assert_close(ravel_pytree(slope)[0], [np.sum(slopes[group]) for group in groups], factor=1e4)


@pytest.mark.parametrize("prior", PRIORS)
def test_draws_have_the_covariance_of_the_posterior(prior):
    draws = fitted(prior).sample(jax.random.key(1), (40, 50))
    assert draws["w"].shape == (40, 50, 3)
    flat = np.column_stack([draws["b"].reshape(-1, 1), draws["w"].reshape(-1, 3)])
    covariance, mean = solved(prior)
    root = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2)
    assert np.all(np.abs(np.cov(flat, rowvar=False) - covariance) < 5 * root / len(flat) ** 0.5)
    assert np.all(np.abs(flat.mean(0) - mean) < 5 * np.sqrt(np.diag(covariance) / len(flat)))


def test_logistic_regression_against_numpy():
    x, y, design = regression()
    labels = (y > 0.4).astype(int)
    alpha, weights = 0.8, np.zeros(4)
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ weights))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + alpha * np.eye(4)
        weights = weights + np.linalg.solve(hessian, design.T @ (labels - p) - alpha * weights)
    model = lambda q, x: jf.Bernoulli(logits=x @ q["w"] + q["b"][0])  # noqa: E731
    posterior = jf.laplace(model, {"b": weights[:1], "w": weights[1:]}, x, labels, prior=alpha)
    assert_close(posterior.precision().as_matrix(), hessian)
    fit = np.sum(labels * np.log(p) + (1 - labels) * np.log(1 - p)) - 0.5 * alpha * weights @ weights
    assert_close(posterior.log_evidence(), fit + 2 * np.log(alpha) - 0.5 * np.linalg.slogdet(hessian)[1], factor=1e3)
    variance = np.sum(design @ np.linalg.inv(hessian) * design, 1)
    assert_close(posterior.predictive(x).logits, design @ weights / np.sqrt(1 + np.pi / 8 * variance), factor=1e3)


PARAMS = {
    "first": {"b": jnp.linspace(-0.3, 0.3, 4), "w": jnp.sin(jnp.arange(12.0)).reshape(3, 4)},
    "last": {"b": jnp.zeros(3), "w": jnp.cos(jnp.arange(12.0)).reshape(4, 3)},
}


def network(params, x):
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return jf.Categorical(logits=hidden @ params["last"]["w"] + params["last"]["b"])


LABELS = np.arange(N) % 3
VIEWS = {
    "as it is": None,
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "kronecker": jf.kronecker,
    "eigen-Kronecker": jf.eigen_kronecker,
    "blocks": jf.block_diagonal,
    "low rank": lambda F: jf.low_rank(F, 5),
}


@functools.cache
def jacobian():
    """Derivatives of the logits, ``[n, outputs, p]``."""
    flat, unravel = ravel_pytree(PARAMS)
    return np.asarray(jax.vmap(jax.jacrev(lambda w, x: network(unravel(w), x).logits), (None, 0))(flat, regression()[0]))


@functools.cache
def asked(view):
    """The quantities of a posterior under a view, as one program."""

    def run(params, x, y, alpha):
        posterior = jf.laplace(network, params, x, y, prior=alpha, view=VIEWS[view])
        evidence = jax.value_and_grad(posterior.log_evidence)(alpha)
        return posterior.fisher.as_matrix(), posterior.log_likelihood, posterior.output_covariance(x), evidence

    return jax.jit(run)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_against_its_matrix(view):
    matrix, fit, covariance, (evidence, slope) = asked(view)(PARAMS, regression()[0], LABELS, 0.9)
    if view in ("as it is", "dense"):
        p = np.asarray(jax.vmap(lambda x: network(PARAMS, x).probs)(regression()[0]))
        metric = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
        assert_close(matrix, np.einsum("ncp,ncd,ndq->pq", jacobian(), metric, jacobian()) / N)
    precision = N * np.asarray(matrix) + 0.9 * np.eye(31)
    inverse, theta = np.linalg.inv(precision), np.asarray(ravel_pytree(PARAMS)[0])
    assert_close(covariance, np.einsum("ncp,pq,ndq->ncd", jacobian(), inverse, jacobian()), factor=1e4)
    log_prob = jax.vmap(jf.log_likelihood(network), (None, 0, 0))(PARAMS, regression()[0], LABELS)
    assert_close(fit, jnp.sum(log_prob))
    size = 31 * np.log(0.9) - np.linalg.slogdet(precision)[1]
    assert_close(evidence, np.sum(log_prob) - 0.45 * theta @ theta + 0.5 * size, factor=1e4)
    assert_close(slope, 0.5 * (31 / 0.9 - theta @ theta - np.trace(inverse)), factor=1e4)


@pytest.mark.parametrize("prior", ["one", "a leaf", "a parameter", "all of them"])
def test_the_last_layer_alone(prior):
    x = regression()[0]
    given = {
        "one": 0.9,
        "a leaf": {"first": {"b": None, "w": None}, "last": {"b": 0.5, "w": 1.5}},
        "a parameter": {"first": {"b": None, "w": None}, "last": {"b": np.ones(3), "w": np.linspace(1, 2, 12).reshape(4, 3)}},
        "all of them": {"first": {"b": 9.0, "w": 9.0}, "last": {"b": 0.5, "w": 1.5}},
    }[prior]
    by_leaf = np.repeat([0.5, 1.5], [3, 12])
    entries = {"one": np.full(15, 0.9), "a leaf": by_leaf, "all of them": by_leaf}.get(
        prior, np.concatenate([np.ones(3), np.linspace(1, 2, 12)])
    )
    posterior = jf.laplace(network, PARAMS, x, LABELS, prior=given, keep=lambda path: "last" in path)
    whole = jf.laplace(network, PARAMS, x, LABELS, prior=1.0)
    precision = N * np.asarray(whole.fisher)[16:, 16:] + np.diag(entries)
    assert_close(posterior.precision().as_matrix(), precision)
    rows = jacobian()[:, :, 16:]
    covariance = np.einsum("ncp,pq,ndq->ncd", rows, np.linalg.inv(precision), rows)
    assert_close(posterior.output_covariance(x), covariance, factor=1e4)
    drawn = posterior.sample(jax.random.key(0), (5,))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(lambda leaf: (5, *leaf.shape), PARAMS)
    assert (
        np.all(np.asarray(drawn["first"]["w"]) == np.asarray(PARAMS["first"]["w"]))
        and np.ptp(drawn["last"]["w"], axis=0).min() > 0
    )
    assert np.isfinite(posterior.log_evidence())


def test_outputs_that_are_correlated():
    """A multivariate normal keeps the covariance between its outputs; independent normals keep the variances."""
    _, y, design = regression()
    targets = np.column_stack([y, -y])
    w = jnp.ones((4, 2))
    tril = jnp.array([[0.5, 0.0], [0.2, 0.4]])
    above = tril.at[0, 1].set(0.7)  # which does not count
    joint = lambda w, x: jf.MultivariateNormal(jnp.tanh(x @ w) + w[0], above)  # noqa: E731
    apart = lambda w, x: jf.Normal(jnp.tanh(x @ w) + w[0], jnp.array([0.5, 0.4]))  # noqa: E731
    for model in (joint, apart):
        posterior = jf.laplace(model, w, design, targets, prior=1.0)
        rows = np.asarray(jax.vmap(jax.jacrev(lambda w, x: jnp.tanh(x @ w) + w[0]), (None, 0))(w, design)).reshape(N, 2, 8)
        covariance = np.einsum("ncp,pq,ndq->ncd", rows, inverse(posterior), rows)
        assert_close(posterior.output_covariance(design), covariance, factor=1e4)
        predicted = posterior.predictive(design)
        if model is joint:
            made = predicted.scale_tril @ predicted.scale_tril.swapaxes(1, 2)
            assert_close(made, covariance + np.asarray(tril @ tril.T), factor=1e4)
        else:
            assert_close(predicted.variance, np.diagonal(covariance, 0, 1, 2) + np.array([0.25, 0.16]), factor=1e4)


def test_draws_of_the_linearised_model():
    """Their outputs have the covariance in closed form; a scale, linearised by its logarithm, stays positive."""
    x, y, _ = regression()
    model = lambda q, x: jf.Normal(x @ q["w"] + q["b"][0], jnp.exp(q["s"] + 0.1 * x[0]))  # noqa: E731
    params = {"b": jnp.zeros(1), "s": jnp.zeros(()), "w": jnp.ones(3)}
    posterior = jf.laplace(model, params, x, y, prior=1.0)
    drawn = jax.jit(lambda posterior, key, x: posterior.sample_predictive(key, x, num_samples=2000))(
        posterior, jax.random.key(3), x
    )
    assert drawn.loc.shape == (2000, N)
    variance = np.asarray(posterior.output_covariance(x)[:, 0, 0])
    assert np.all(np.abs(np.var(drawn.loc, axis=0) / variance - 1) < 5 * np.sqrt(2 / 2000))
    scale = np.log(np.asarray(drawn.scale))
    expected = inverse(posterior)[1, 1]
    assert np.all(np.abs(np.var(scale, axis=0) / expected - 1) < 5 * np.sqrt(2 / 2000))
    np.testing.assert_allclose(scale.mean(0), 0.1 * x[:, 0], atol=5 * np.sqrt(expected / 2000))


@pytest.mark.parametrize("prior", ["one", "a leaf"])
def test_the_tuned_prior_has_the_largest_evidence(prior):
    posterior = fitted(prior)
    tuned = jf.tune_prior(posterior, rtol=1e-9)
    slopes = jax.grad(posterior.log_evidence)(tuned.prior)
    for alpha, slope in zip(jax.tree.leaves(tuned.prior), jax.tree.leaves(slopes), strict=True):
        assert abs(alpha * slope) < 1e-6
    assert tuned.log_evidence() > posterior.log_evidence()
    assert jax.tree.structure(tuned) == jax.tree.structure(posterior)


def test_one_prior_a_parameter_is_tuned_away_where_the_data_do_not_want_it():
    """The third weight is small beside its error, so its precision grows."""
    tuned = jf.tune_prior(fitted("a parameter"), max_steps=20)
    assert tuned.log_evidence() > fitted("a parameter").log_evidence()
    assert np.argmax(np.asarray(tuned.prior["w"]) / PRIORS["a parameter"]["w"]) == np.argmin(
        np.abs(solved("a parameter")[1][1:])
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("view", [None, jf.dense, jf.block_diagonal, jf.kronecker])
def test_a_weak_prior_is_all_that_is_known_of_what_the_data_do_not_determine(view, dtype):
    """However weak beside the data: predictions and the root that draws are made by, against singular values in float64.

    A solve takes a prior that rounding hides for none, and its variances would be those of what the data determine alone.
    """
    rng = np.random.default_rng(5)
    model = lambda w, x: jf.Normal(jnp.dot(x, w), jnp.asarray(0.5, w.dtype))  # noqa: E731
    for n, p in ((1, 3), (4, 9), (12, 4)):
        x, v = rng.normal(size=(n, p)), rng.normal(size=p).astype(dtype)
        if n > p:
            x[:, -1] = x[:, 0]
        _, values, vectors = np.linalg.svd(x / 0.5)
        squares = np.zeros(p)
        squares[: len(values)] = np.where(values > 1e-10, values, 0) ** 2

        def made(prior, v, x, p=p, n=n):
            posterior = jf.laplace(model, jnp.zeros(p, dtype), x, jnp.zeros(n, dtype), prior=prior, view=view)
            root = posterior.fisher.inv_sqrt_mv(v, posterior.prior / n)
            return (
                posterior.output_covariance(v[None])[0, 0, 0],
                posterior.predictive(v[None]).variance[0],
                jnp.dot(root, root) / n,
            )

        for prior in (1.0, 1e-4, 1e-7, 1e-10):
            expected = np.square(vectors @ v) @ (1 / (squares + prior))
            for given in (dtype(prior), np.full(p, prior, dtype)):
                if view is jf.kronecker and given.ndim:
                    continue
                spread, variance, root = made(jnp.asarray(given), jnp.asarray(v), jnp.asarray(x, dtype))
                np.testing.assert_allclose([spread, variance - 0.25], expected, rtol=2e-2)
                if not given.ndim:
                    np.testing.assert_allclose(root, expected, rtol=2e-2)


def test_padding_and_weights():
    x, y, _ = regression()
    params = {"b": jnp.zeros(1), "w": jnp.ones(3)}
    short = jf.laplace(line, params, x[:8], y[:8], prior=1.0)
    padded = jf.laplace(line, params, np.where(np.arange(N)[:, None] < 8, x, np.nan), y, prior=1.0, weights=np.arange(N) < 8)
    twice = jf.laplace(line, params, x[:8], y[:8], prior=1.0, weights=np.full(8, 2.0), batch_size=3)
    double = jf.laplace(line, params, np.tile(x[:8], (2, 1)), np.tile(y[:8], 2), prior=1.0)
    for one, other in ((short, padded), (twice, double)):
        assert_close(one.precision().as_matrix(), other.precision().as_matrix())
        assert_close(one.log_evidence(), other.log_evidence())


def test_a_model_without_inputs_and_another_fisher():
    y = np.array([0.5, 1.5, 4.0])
    model = lambda mu: jf.Normal(mu, 1.0)  # noqa: E731
    posterior = jf.laplace(model, jnp.asarray(1.5), y, prior=1.0)
    assert_close(posterior.precision().as_matrix(), [[4.0]])
    assert_close(posterior.log_evidence(), scipy.stats.multivariate_normal(np.zeros(3), np.eye(3) + 1).logpdf(y), factor=1e3)
    assert_close(posterior.predictive().variance, [1.25])
    empirical = jf.laplace(model, jnp.asarray(1.5), y, prior=1.0, fisher=jf.empirical_fisher(jf.log_likelihood(model)))
    assert_close(empirical.precision().as_matrix(), [[np.sum((y - 1.5) ** 2) + 1]])


def largest(jaxpr):
    """The size of the largest array that a program makes, including those of inner programs."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


def test_the_derivatives_of_all_outputs_are_never_there_at_once():
    """The rows of 2,000 examples with 50 outputs over 42,000 parameters would be 4 billion numbers."""
    wide = lambda p, x: jf.Categorical(logits=jnp.tanh(x @ p["w1"]) @ p["w2"])  # noqa: E731
    shapes = {"w1": (300, 120), "w2": (120, 50)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, y = jax.ShapeDtypeStruct((2000, 300), jnp.float32), jax.ShapeDtypeStruct((2000,), jnp.int32)

    def run(params, x, y):
        return jf.laplace(wide, params, x[:50], y[:50], prior=jnp.float32(1.0), view=jf.kronecker).predictive(x)

    assert largest(jax.make_jaxpr(run)(params, x, y).jaxpr) <= 2**25


def test_bad_input_is_named():
    x, y, _ = regression()
    params = {"b": jnp.zeros(1), "w": jnp.ones(3)}
    make = functools.partial(jf.laplace, line, params, x, y)
    for prior, error, message in (
        (0.0, ValueError, "`prior` is zero; expected precisions above zero"),
        ({"b": 1.0, "w": np.array([1.0, 0.0, 1.0])}, ValueError, "`prior` is zero; expected precisions above zero"),
        (-1.0, ValueError, "`prior` is -1.0; expected a finite number of at least zero"),
        ("wide", TypeError, "`prior` is 'wide'; expected one real number"),
        ({"w": 1.0}, TypeError, "`prior` is a dict with leaves of shapes .*; expected one number"),
        ({"b": 1.0, "w": np.ones(2)}, TypeError, "with one number per leaf, or an array of the leaf's shape"),
        ({"b": 1.0, "w": np.array([1.0, -2.0, 1.0])}, ValueError, r"`prior` at \['w'\] holds -2.0"),
    ):
        with pytest.raises(error, match=message):
            make(prior=prior)
    with pytest.raises(ValueError, match="laplace: `keep` keeps no leaf of"):
        make(prior=1.0, keep=lambda path: False)
    with pytest.raises(TypeError, match="laplace: `view`: expected a Fisher operator"):
        make(prior=1.0, view=lambda F: 3.0)
    with pytest.raises(TypeError, match="laplace was called without data"):
        jf.laplace(line, params, prior=1.0)
    with pytest.raises(ValueError, match="has 12 examples, but"):
        jf.laplace(line, params, x, y[:3], prior=1.0)
    with pytest.raises(ValueError, match=r"`model` fails on one example.*Pass a single example as a batch of one, x\[None\]"):
        make(prior=1.0).predictive(x[0])
    poisson = lambda q, x: jf.Poisson(log_rate=x @ q["w"] + q["b"][0])  # noqa: E731
    posterior = jf.laplace(poisson, params, x, np.arange(N), prior=1.0)
    with pytest.raises(TypeError, match="returns a Poisson, for which there is no prediction in closed form"):
        posterior.predictive(x)
    with pytest.raises(ValueError, match="`num_samples` is 0; expected a whole number of draws"):
        posterior.sample_predictive(jax.random.key(0), x, num_samples=0)
    with pytest.raises(TypeError, match=r"tune_prior: `posterior` is 3; expected what jf.laplace returns"):
        jf.tune_prior(3)
    for options, error, message in (
        ({"rtol": -1.0}, ValueError, "`rtol` is -1.0; expected a finite number of at least zero"),
        ({"rtol": "x"}, TypeError, "`rtol` is 'x'; expected a Python number"),
        ({"max_steps": 0}, ValueError, "`max_steps` is 0; expected a whole number of steps"),
        ({"max_steps": 2.5}, ValueError, "`max_steps` is 2.5; expected a whole number of steps"),
    ):
        with pytest.raises(error, match=message):
            jf.tune_prior(posterior, **options)
    with pytest.raises(TypeError, match=r"Posterior.sample: `shape` is 3; expected a tuple"):
        posterior.sample(jax.random.key(0), 3)
    stacked = jax.vmap(lambda alpha: make(prior=alpha))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"Posterior came out of jax\.vmap"):
        stacked.predictive(x)


def test_complex_parameters_are_two_real_ones_each():
    """The posterior is the same as with real and imaginary parts as separate leaves."""
    x, y, _ = regression()
    whole = {"w": jnp.array([0.3 + 0.2j, -0.5j, 0.1 + 0j])}
    parts = {"im": whole["w"].imag, "re": whole["w"].real}
    model = lambda p, x: jf.Normal(jnp.sum(x * p["w"].real) * (1 + jnp.sum(x * p["w"].imag)), NOISE)  # noqa: E731
    split = lambda p, x: model({"w": jax.lax.complex(p["re"], p["im"])}, x)  # noqa: E731
    one, other = jf.laplace(model, whole, x, y, prior=0.7), jf.laplace(split, parts, x, y, prior=0.7)
    assert_close(one.log_evidence(), other.log_evidence())
    assert_close(one.output_covariance(x), other.output_covariance(x), factor=1e4)
    drawn = one.sample(jax.random.key(0), (2,))["w"]
    assert drawn.shape == (2, 3) and drawn.dtype == whole["w"].dtype


def test_the_tuned_prior_feels_information_that_is_about_to_arrive():
    """``9/(9 + a) + t^2/(t^2 + a) = 2 a`` has the second derivative ``(2/a) / (2 + 9/(9 + a)^2)`` by t at zero."""
    model = lambda w, x: jf.Normal(jnp.dot(w, x), 1.0)  # noqa: E731

    def tuned(t):
        x = jnp.array([[3.0, 0.0], [0.0, 0.0]]) + t * jnp.array([[0.0, 0.0], [0.0, 1.0]])
        return jf.tune_prior(jf.laplace(model, jnp.array([1.0, -1.0]), x, jnp.ones(2), prior=1.0), rtol=1e-13).prior

    slope = lambda t: jax.jvp(tuned, (t,), (1.0,))[1]  # noqa: E731
    a, bend = jax.jit(lambda t: (tuned(t), jax.jvp(slope, (t,), (1.0,))[1]))(0.0)
    np.testing.assert_allclose(9 / (9 + a), 2 * a, rtol=1e-10)
    np.testing.assert_allclose(bend, 2 / a / (2 + 9 / (9 + a) ** 2), rtol=1e-8)
