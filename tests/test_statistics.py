"""Fits, covariances, sandwiches, intervals and information criteria, against statsmodels and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
import statsmodels.api as sm
from models import compiled

import jaxfisher as jf
from jaxfisher import forecasts, statistics

pytestmark = pytest.mark.usefixtures("in_numpy")

RNG = np.random.default_rng(19)
N = 60
X = np.column_stack([np.ones(N), RNG.normal(size=N), RNG.uniform(-1, 1, N)])
COUNTS = RNG.poisson(np.exp(X @ [0.4, 0.5, -0.3])) * RNG.integers(0, 3, N)
HEAVY = X @ [0.4, 0.5, -0.3] + X[:, 1] ** 2 * RNG.normal(size=N)
GROUPS = RNG.integers(0, 11, N)
REPEATS = RNG.integers(1, 4, N).astype(float)


def relative(actual, expected):
    return np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))


def poisson(beta, x):
    return jf.Poisson(x @ beta)


def linear(beta, x):
    return jf.Normal(x @ beta, 1.0)


@functools.cache
def fitted(model, weighted=False):
    """Our fit of one of the two models with its observed information, the log-density, and the targets."""
    y = {poisson: COUNTS.astype(float), linear: HEAVY}[model]
    weights = REPEATS if weighted else None
    log_prob = jf.log_likelihood(model)

    def make(x, y, weights):
        found = jf.fit(model)(jnp.zeros(3), x, y, weights=weights)
        return found, jf.observed_information(log_prob)(found.params, x, y, weights=weights)

    return compiled(make)(X, y, weights), log_prob, y


def test_a_glm_and_every_covariance_of_it():
    """A fit to overdispersed Poisson counts, and all its covariances, within 1e-8 of statsmodels."""
    (found, bread), log_prob, y = fitted(poisson)
    assert bool(found.converged) and int(found.rank) == 3 and not np.any(found.separated)
    theirs = lambda **options: sm.GLM(y, X, sm.families.Poisson()).fit(tol=1e-14, maxiter=100, **options)  # noqa: E731
    assert relative(found.params, theirs().params) < 1e-8
    assert abs(float(found.log_likelihood) / theirs().llf - 1) < 1e-12
    assert relative(jf.covariance(found.fisher).as_matrix(), theirs().cov_params()) < 1e-8
    assert relative(jf.standard_errors(found.fisher), theirs().bse) < 1e-8

    scale = compiled(statistics.dispersion(poisson))(found.params, X, y)
    assert relative((scale * jf.covariance(found.fisher)).as_matrix(), theirs(scale="X2").cov_params()) < 1e-8
    meat = statistics.meat(log_prob)
    white = jf.sandwich(bread, meat(found.params, X, y))
    assert relative(white.as_matrix(), theirs(cov_type="HC0").cov_params()) < 1e-8
    assert (
        relative(white.as_matrix(), jf.sandwich(bread, jf.empirical_fisher(log_prob)(found.params, X, y)).as_matrix()) < 1e-12
    )
    clustered = jf.sandwich(bread, meat(found.params, X, y, groups=GROUPS))
    corrected = statistics.cluster_factor(GROUPS, 3) * clustered
    expected = theirs(cov_type="cluster", cov_kwds={"groups": GROUPS}).cov_params()
    assert relative(corrected.as_matrix(), expected) < 1e-8
    by_name = meat(found.params, X, y, groups=np.array(list("abcdefghijk"))[GROUPS])
    assert relative(jf.sandwich(bread, by_name).as_matrix(), np.asarray(clustered)) < 1e-12
    assert abs(float(statistics.aic(log_prob)(found.params, X, y)) / theirs().aic - 1) < 1e-12


def test_weights_say_how_often_an_observation_occurs():
    (found, bread), log_prob, y = fitted(poisson, weighted=True)
    fit = sm.GLM(y, X, sm.families.Poisson(), freq_weights=REPEATS).fit(tol=1e-14, maxiter=100)
    robust = sm.GLM(y, X, sm.families.Poisson(), freq_weights=REPEATS).fit(tol=1e-14, maxiter=100, cov_type="HC0")
    assert relative(found.params, fit.params) < 1e-8
    assert relative(jf.covariance(found.fisher).as_matrix(), fit.cov_params()) < 1e-8
    meat = statistics.meat(log_prob)(found.params, X, y, weights=REPEATS)
    assert relative(jf.sandwich(bread, meat).as_matrix(), robust.cov_params()) < 1e-8
    repeated = np.repeat(np.arange(N), REPEATS.astype(int))
    again = statistics.meat(log_prob)(found.params, X[repeated], y[repeated], groups=GROUPS[repeated])
    grouped = statistics.meat(log_prob)(found.params, X, y, groups=GROUPS, weights=REPEATS)
    assert relative(grouped.as_matrix(), np.asarray(again)) < 1e-12


def test_factors_know_how_often_an_observation_occurs():
    weights = np.where(np.arange(N) % 5 == 0, 0.0, REPEATS)
    labels = np.where(weights > 0, GROUPS, 99)
    repeated = np.repeat(np.arange(N), weights.astype(int))
    again = statistics.leverages(linear)(jnp.zeros(3), X[repeated])
    h = statistics.leverages(linear)(jnp.zeros(3), X, weights=weights)
    np.testing.assert_allclose(h[repeated], again, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(statistics.hc1)(h, weights)[repeated], statistics.hc1(again), rtol=1e-12)
    assert np.all(np.isnan(jax.jit(statistics.hc1)(h, -weights)))
    # What stands beside padding counts for nothing, whatever it is.
    beside = np.where(weights > 0, h, np.nan)
    np.testing.assert_array_equal(statistics.hc1(beside, weights), statistics.hc1(h, weights))
    meats = [statistics.meat(jf.log_likelihood(linear))(np.ones(3), X, HEAVY, factors=f, weights=weights) for f in (h, beside)]
    np.testing.assert_array_equal(meats[1].as_matrix(), meats[0].as_matrix())
    ours = statistics.cluster_factor(labels, 3, weights=weights)
    np.testing.assert_allclose(ours, statistics.cluster_factor(labels[repeated], 3), rtol=1e-14)


def test_an_input_without_arrays_is_an_input():
    y = jnp.array([1.0, 2.0, 4.0])
    found = jf.fit(lambda mu, settings: jf.Normal(mu, 2.0))(0.0, {}, y, weights=jnp.array([1.0, 1.0, 0.0]))
    assert abs(found.params - 1.5) < 1e-6 and abs(jf.standard_errors(found.fisher) - 2**0.5) < 1e-6


def test_a_dispersion_counts_every_number_of_an_example():
    """With k outputs per example there are n k - p degrees of freedom, as many as k regressions have together."""
    y = np.column_stack([HEAVY, -2 * HEAVY + COUNTS])
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    of_both = statistics.dispersion(lambda b, x: jf.Normal(x @ b, 1.0))(beta, X, y)
    np.testing.assert_allclose(of_both, np.sum((y - X @ beta) ** 2) / (2 * N - 6), rtol=1e-12)
    each = [statistics.dispersion(linear)(beta[:, j], X, y[:, j]) for j in range(2)]
    np.testing.assert_allclose(of_both, np.mean(each), rtol=1e-12)
    for few in (2, 3):
        assert np.isnan(statistics.dispersion(linear)(beta[:, 0], X[:few], y[:few, 0])), "no degree of freedom is left"


@pytest.mark.parametrize(
    ("predicted", "target", "error", "message"),
    [
        (lambda x: jf.Categorical(x), 1, TypeError, "returns Categorical"),
        (lambda x: jf.MultivariateNormal(x, jnp.eye(3)), X[0], TypeError, "returns MultivariateNormal"),
        (lambda x: jf.Masked(jf.Normal(x, 1.0), x > 0), X[0], TypeError, "returns Masked"),
        (lambda x: {"a": jf.Normal(x[0], 1.0), "b": jf.Poisson(x[1])}, {"a": 1.0, "b": 2}, TypeError, "returns Joint"),
        (lambda x: jf.Normal(x[0], 1.0), X[0, :1], ValueError, r"dispersion: one target has shape \(1,\)"),
    ],
)
def test_a_prediction_without_a_dispersion_is_named(predicted, target, error, message):
    targets = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (5, *np.shape(leaf))), target)
    with pytest.raises(error, match=message):
        jax.eval_shape(statistics.dispersion(lambda b, x: predicted(x * b)), jnp.zeros(3), X[:5], targets)


def test_clusters_inside_jit_have_any_numbers_for_labels():
    meat = functools.partial(statistics.meat(jf.log_likelihood(linear)), jnp.zeros(3), X[:6], HEAVY[:6])
    labels = np.array([7, 7, 10, 10, -5, -5])
    expected = meat(groups=labels).as_matrix()
    found = jax.jit(lambda groups: meat(groups=groups).as_matrix())
    np.testing.assert_allclose(found(labels), expected, rtol=1e-12)
    np.testing.assert_allclose(found(labels / 3), expected, rtol=1e-12)


def test_the_factor_of_clusters_inside_jit_is_that_outside():
    labels = np.array([7, 7, 10, 10, -5, -5])
    inside = jax.jit(lambda groups, weights: statistics.cluster_factor(groups, 2, weights))
    for weights in (None, np.array([1, 2, 0, 0, 3, 1])):
        np.testing.assert_allclose(inside(labels, weights), statistics.cluster_factor(labels, 2, weights), rtol=1e-14)
    assert np.isnan(inside(np.zeros(6), None)), "one group, which is known too late to be refused"


MISSING = {
    "NaN": np.array([0, 0, 1, np.nan, 2, np.nan]),
    "None": np.array(["a", "b", None, "a", "b", "c"], object),
    "NaN among words": np.array(["a", "b", "a", float("nan"), "b", "c"], object),
    "no time": np.array(["2026-01-01", "2026-01-02", "NaT", "2026-01-01", "2026-01-02", "2026-01-02"], "datetime64[D]"),
    "masked": np.ma.masked_array([0, 0, 1, 1, 2, 2], mask=[0, 0, 0, 1, 0, 0]),
    "of pandas": pd.Series(["a", "b", None, "a", "b", "c"]),
    "a number of pandas": pd.Series([0, 0, 1, None, 2, 2], dtype="Int64"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_label_is_no_group(name):
    """NaN is not equal to itself, and NumPy makes one group of all that are."""
    for asked in (
        lambda groups: statistics.cluster_factor(groups, 1),
        lambda groups: statistics.meat(jf.log_likelihood(linear))(jnp.zeros(3), X[:6], HEAVY[:6], groups=groups),
    ):
        with pytest.raises(ValueError, match=r"`groups` has no label at entry [23]; expected one for each example"):
            asked(MISSING[name])


def test_least_squares_with_hc0_to_hc3():
    """The four corrections for a linear model against statsmodels; they do not depend on the model's scale."""
    (found, bread), log_prob, y = fitted(linear)
    theirs = sm.OLS(y, X).fit()
    assert relative(found.params, theirs.params) < 1e-8
    h = statistics.leverages(linear)(found.params, X)
    assert relative(h, theirs.get_influence().hat_matrix_diag) < 1e-12
    meat = functools.partial(statistics.meat(log_prob), found.params, X, y)
    for factors, expected in (
        (statistics.hc1, theirs.cov_HC1),
        (statistics.hc2, theirs.cov_HC2),
        (statistics.hc3, theirs.cov_HC3),
    ):
        assert relative(jf.sandwich(bread, meat(factors=factors(h))).as_matrix(), expected) < 1e-8
    assert relative(jf.sandwich(bread, meat()).as_matrix(), theirs.cov_HC0) < 1e-8
    scale = statistics.dispersion(linear)(found.params, X, y)
    assert relative((scale * jf.covariance(found.fisher)).as_matrix(), theirs.cov_params()) < 1e-8
    # The trace in Takeuchi's criterion, by its definition.
    inverse, scores = np.linalg.inv(X.T @ X), X * (y - X @ np.asarray(found.params))[:, None]
    both = [criterion(log_prob)(found.params, X, y) for criterion in (statistics.tic, statistics.aic)]
    assert abs(float(both[0] - both[1]) - 2 * (np.trace(inverse @ scores.T @ scores) - 3)) < 1e-9


def test_a_discrete_model_by_its_observed_information():
    """Probit in statsmodels uses minus the Hessian, which differs from the exact Fisher for this link."""
    y = (HEAVY > 0.3).astype(float)

    def probit(beta, x):
        z = x @ beta
        return jf.Bernoulli(jax.scipy.stats.norm.logcdf(z) - jax.scipy.stats.norm.logcdf(-z))

    def make(x, y):
        found = jf.fit(probit)(jnp.zeros(3), x, y)
        return found, jf.standard_errors(jf.observed_information(jf.log_likelihood(probit))(found.params, x, y))

    found, errors = compiled(make)(X, y)
    theirs = sm.Probit(y, X).fit(method="newton", tol=1e-14, maxiter=100, disp=0)
    assert bool(found.converged)
    assert relative(found.params, theirs.params) < 1e-8 and relative(errors, theirs.bse) < 1e-8


def test_what_the_data_do_not_determine_has_no_standard_error():
    """A shift of all logits changes no softmax: each coefficient has an infinite error, and their differences have not."""
    labels = RNG.integers(0, 3, N)

    def softmax(p, x):
        return jf.Categorical(x[1] * p["slope"] + p["level"])

    start = {"level": jnp.zeros(3), "slope": jnp.zeros(3)}

    def make(x, y):
        found = jf.fit(softmax)(start, x, y)
        covariance = jf.covariance(found.fisher)
        contrast = statistics.delta_method(lambda p: p["slope"][1:] - p["slope"][0])(found.params, covariance)
        return found, jf.standard_errors(found.fisher), contrast, covariance.mv(start | {"level": jnp.array([1.0, 0.0, -1.0])})

    found, errors, (slopes, matrix), product = compiled(make)(X, labels)
    assert bool(found.converged) and int(found.rank) == 4
    assert np.all(np.isinf(np.concatenate(list(errors.values()))))
    theirs = sm.MNLogit(labels, X[:, :2]).fit(method="newton", tol=1e-14, maxiter=100, disp=0)
    assert relative(slopes, theirs.params[1]) < 1e-8
    assert relative(matrix, np.asarray(theirs.cov_params())[1::2, 1::2]) < 1e-8
    assert np.all(np.isfinite(np.concatenate(list(product.values()))))


def test_an_indefinite_information_determines_what_it_determines():
    """An observed information away from a maximum: its null direction is infinite, and not that of its negative eigenvalue."""
    values, axes = np.array([-3.0, 0.0, 0.5, 2.0]), np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    bread = jf.from_matrix(jnp.asarray(axes * values @ axes.T), jnp.zeros(4))
    covariance = jf.covariance(bread, n=2)
    for k, axis in enumerate(axes.T):
        expected = np.inf if values[k] == 0 else 0.5 / values[k]
        np.testing.assert_allclose(covariance.quadratic(jnp.asarray(axis)), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_small_share_in_what_is_not_determined_is_not_determined(dtype):
    """A total beside its two parts, of which one is small, and one more column: three errors are infinite, however small it is.

    Combinations are infinite if and only if they change along the null vector. Units do not matter.
    """
    rng = np.random.default_rng(29)
    small = 10.0 ** np.array([-1, -2, -3] if dtype == np.float32 else [-1, -3, -5, -7])

    def make(x, slopes):
        covariance = jf.covariance(jf.exact_fisher(linear)(jnp.zeros(4, dtype), x))
        return jf.standard_errors(covariance), statistics.delta_method(lambda b: slopes @ b)(jnp.zeros(4, dtype), covariance)[1]

    errors = compiled(make)
    for part, unit in [(part, unit) for part in small for unit in (1e-6, 1.0, 1e6)]:
        x = rng.normal(size=(40, 4))
        x[:, 2] = x[:, 0] + part * x[:, 1]
        scale = np.array([1.0, unit, unit, 1.0])
        along = np.array([1.0, part, -1.0, 0.0])  # a change of the slopes along this changes no prediction
        determined = np.array([[1.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0], [part, -1.0, 0.0, 0.0]])
        others = np.array([[1.0, 0.0, 1.0 + 3 * part, 0.5], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
        slopes = np.concatenate([determined, others])
        found, matrix = errors((x * scale).astype(dtype), (slopes * scale).astype(dtype))
        assert np.array_equal(np.isinf(found), [True, True, True, False]), (part, unit, found)
        variances = np.einsum("ki,ij,kj->k", determined, np.linalg.pinv(x.T @ x, rcond=1e-13), determined)
        assert np.max(np.abs(determined @ along)) < 1e-12
        assert np.array_equal(np.isinf(np.diag(matrix)), [False] * 3 + [True] * 3), (part, unit, np.diag(matrix))
        assert relative(np.diag(matrix)[:3], variances) < 1e4 * np.finfo(dtype).eps
        assert relative(found[3], np.sqrt(variances[1])) < 1e4 * np.finfo(dtype).eps


def designs(rng):
    """Design matrices with as many rows as columns, with more, with fewer, and with nearly parallel columns."""
    for count, columns, parallel in [(2, 2, 0.0), (6, 6, 0.0), (12, 3, 0.0), (20, 3, 0.999), (20, 3, 0.9999), (3, 5, 0.0)]:
        z = rng.normal(size=(count, columns))
        z[:, -1] = parallel * z[:, 0] + np.sqrt(1 - parallel**2) * z[:, -1]
        yield z


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_fit_that_has_a_maximum_says_so(noise, dtype):
    """The fit converges, even if the model fits exactly, so that scores are rounding, and for nearly parallel columns.

    Least squares and exponential rates are compared with NumPy. Without noise the predictions equal the data.
    """
    rng = np.random.default_rng(23)
    fits = {
        "normal": compiled(lambda x, y: jf.fit(linear)(jnp.zeros(x.shape[1], dtype), x, y)),
        "rate": compiled(lambda x, y: jf.fit(lambda b, x: jf.Exponential(-(x @ b)))(jnp.zeros(x.shape[1], dtype), x, y)),
    }
    for x in [x for _ in range(2) for x in designs(rng)]:
        linked = x @ (0.4 * rng.normal(size=x.shape[1])) + noise * rng.normal(size=len(x))
        for name, fit in fits.items():
            met = noise == 0 or len(x) <= x.shape[1]
            if name == "rate" and not met:
                continue  # no closed form
            y = (linked if name == "normal" else np.exp(linked)).astype(dtype)
            found = fit(x.astype(dtype), y)
            assert bool(found.converged) and not np.any(found.separated), (name, x.shape, noise, found)
            predicted = x @ np.linalg.lstsq(x, np.float64(y))[0] if name == "normal" else np.log(np.float64(y))
            error = np.abs(x @ np.float64(found.params) - predicted)
            # The bound is in standard errors of a prediction with noise, and in rounding errors for an exact fit.
            assert np.max(error) < (1e3 * np.finfo(dtype).eps if met else np.finfo(dtype).eps ** 0.5 * 32), (
                name,
                x.shape,
                error,
            )


def test_separation_is_found_and_named_and_firth_mends_it():
    """The report names a separated parameter. With Firth's penalty the fit solves the modified score equations, as in SciPy."""
    x = np.linspace(-1, 1, 20)
    y = (x > 0).astype(float)

    def logistic(p, x):
        return jf.Bernoulli(p["level"] + p["slope"] * x[0] + p["other"] * x[1])

    other = np.cos(7 * x)
    inputs, start = np.column_stack([x, other]), {"level": 0.0, "slope": 0.0, "other": 0.0}
    found, mended = compiled(
        lambda x, y: (jf.fit(logistic)(start, x, y), jf.fit(logistic, penalty=statistics.firth(logistic))(start, x, y))
    )(inputs, y)
    assert not bool(found.converged) and bool(found.separated["slope"])
    assert "separated: ['" in repr(found) and "['slope']" in repr(found)
    assert bool(mended.converged) and not any(map(bool, mended.separated.values()))

    design = np.column_stack([np.ones(20), other, x])

    def score(beta):
        p = scipy.special.expit(design @ beta)
        root = np.sqrt(p * (1 - p))[:, None] * design
        h = np.sum(root * np.linalg.solve(root.T @ root, root.T).T, axis=1)
        return design.T @ (y - p + h * (0.5 - p))

    expected = scipy.optimize.root(score, np.zeros(3), tol=1e-13).x
    assert relative(jax.tree.leaves({k: mended.params[k] for k in ("level", "other", "slope")}), expected) < 1e-7


def test_intervals_of_one_parameter_in_closed_form():
    """Wald, Wilson and likelihood intervals of a proportion in a model of its logit, against closed forms and SciPy."""
    ones, n = 4, 17
    y = np.r_[np.ones(ones), np.zeros(n - ones)]
    bernoulli = lambda logit: jf.Bernoulli(logit)  # noqa: E731
    z = scipy.stats.norm.ppf(0.95)

    def make(y):
        found = jf.fit(bernoulli)(0.0, y)
        asked = [
            ask(bernoulli, jax.nn.sigmoid, 0.9)(found.params, y)
            for ask in (statistics.score_interval, statistics.likelihood_interval)
        ]
        return [*asked, statistics.wald_interval(jax.nn.sigmoid, 0.9)(found.params, jf.covariance(found.fisher))]

    score, likelihood, wald = compiled(make)(y)
    p = ones / n
    centre, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert relative([score.lower, score.upper], np.array([centre - half, centre + half])) < 1e-8
    assert relative([wald.lower, wald.upper], p + z * np.array([-1, 1]) * np.sqrt(p * (1 - p) / n)) < 1e-8
    log_l = lambda q: ones * np.log(q) + (n - ones) * np.log1p(-q)  # noqa: E731
    ends = [
        scipy.optimize.brentq(lambda q: 2 * (log_l(p) - log_l(q)) - z**2, *span, xtol=1e-14)
        for span in ((1e-9, p), (p, 1 - 1e-9))
    ]
    assert relative([likelihood.lower, likelihood.upper], np.array(ends)) < 1e-8
    assert all(bool(interval.converged) for interval in (score, likelihood, wald))


@pytest.mark.compiled
def test_a_profile_with_the_others_fitted_again():
    """A profile interval for a slope: at each end the best fit with that slope has the likelihood ratio of the level."""
    (found, _), _, y = fitted(poisson)

    def make(params, x, y):
        slope = lambda beta: beta[1]  # noqa: E731
        return [ask(poisson, slope)(params, x, y) for ask in (statistics.likelihood_interval, statistics.score_interval)]

    profile, score = compiled(make)(found.params, X, y)
    drop = scipy.stats.chi2.ppf(0.95, 1)
    free = sm.GLM(y, X, sm.families.Poisson()).fit()
    for end in profile[:2]:
        held = sm.GLM(y, X[:, [0, 2]], sm.families.Poisson(), offset=float(end) * X[:, 1]).fit(tol=1e-13, maxiter=100)
        assert abs(2 * (free.llf - held.llf) - drop) < 1e-8
    for end in score[:2]:
        held = sm.GLM(y, X[:, [0, 2]], sm.families.Poisson(), offset=float(end) * X[:, 1]).fit(tol=1e-13, maxiter=100)
        mean = held.fittedvalues
        slope = X.T @ (y - mean)
        assert abs(slope @ np.linalg.solve(X.T @ (mean[:, None] * X), slope) - drop) < 1e-7
    assert bool(profile.converged) and bool(score.converged)


def test_an_interval_far_from_a_parabola():
    """The input with even odds in a logistic regression: its lower end is twice as far as Wald's, by constrained SciPy fits."""
    x = np.array([53, 57, 58, 63, 66, 67, 67, 67, 68, 69, 70, 70, 70, 70, 72, 73, 75, 75, 76, 76, 78, 79, 81.0]) - 70
    y = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0.0])
    logistic = lambda p, x: jf.Bernoulli(p[0] + p[1] * x)  # noqa: E731

    def make(x, y):
        found = jf.fit(logistic)(jnp.zeros(2), x, y)
        return found, statistics.likelihood_interval(logistic, lambda p: -p[0] / p[1])(found.params, x, y)

    found, profile = compiled(make)(x, y)

    def held(place):
        def minus(slope):
            return np.sum(np.logaddexp(0, slope * (x - place))) - slope * np.sum(y * (x - place))

        return 2 * (scipy.optimize.minimize_scalar(minus, bracket=(-0.3, -0.1), tol=1e-12).fun + float(found.log_likelihood))

    drop = scipy.stats.chi2.ppf(0.95, 1)
    assert bool(profile.converged)
    assert abs(held(float(profile.lower)) - drop) < 1e-8 and abs(held(float(profile.upper)) - drop) < 1e-8
    assert profile.lower < -17 < -11 < -found.params[0] / found.params[1] - 5


def test_an_interval_whose_one_end_is_a_limit():
    """No successes or only successes, where the likelihood has no maximum: closed forms, from where fits in any units stop."""
    z, n = scipy.stats.norm.ppf(0.975), 20
    wilson, ratio = z**2 / (n + z**2), -np.expm1(-(z**2) / (2 * n))
    starts, y = np.array([-39.2, -20.0, -9.0, 39.2]), np.repeat([[0.0], [0.0], [0.0], [1.0]], n, 1)
    one = lambda logit: jf.Bernoulli(logit)  # noqa: E731
    two = lambda p, x: jf.Bernoulli(p[0] * x + p[1] * (1 - x))  # noqa: E731
    x, known = np.repeat([1.0, 0.0], n), np.where(np.arange(n) % 3 == 0, 1.0, 0.0)

    @compiled
    def found(starts, y):
        score = jax.vmap(statistics.score_interval(one, jax.nn.sigmoid))(starts, y)
        likelihood = jax.vmap(statistics.likelihood_interval(one, lambda logit: logit))(starts, y)
        pair = jnp.stack([starts[2], scipy.special.logit(np.mean(known))])
        beside = statistics.likelihood_interval(two, lambda p: jax.nn.sigmoid(p[0]))(pair, x, jnp.append(y[0], known))
        return score, likelihood, beside

    score, likelihood, beside = found(starts, y)
    np.testing.assert_allclose(score.lower, [0, 0, 0, 1 - wilson], rtol=1e-7)
    np.testing.assert_allclose(score.upper, [wilson] * 3 + [1], rtol=1e-7)
    ends = scipy.special.logit(ratio)
    np.testing.assert_allclose(likelihood.lower, [-np.inf] * 3 + [-ends], rtol=2e-3)
    np.testing.assert_allclose(likelihood.upper, [ends] * 3 + [np.inf], rtol=2e-3)
    np.testing.assert_allclose(beside[:2], [0, ratio], rtol=2e-3)
    assert all(np.all(interval.converged) for interval in (score, likelihood, beside))


def test_intervals_beside_a_group_without_successes():
    """The fit stops at a logit of -39: the interval of a contrast is open, and the chance has that of 0 out of 10."""
    group = np.repeat([0.0, 1.0], 10)
    x, y = np.column_stack([np.ones(20), group]), np.where(group == 0, np.arange(20) % 2, 0)
    model, params, z = lambda p, x: jf.Bernoulli(logits=x @ p), jnp.array([0.0, -39.2]), scipy.stats.norm.ppf(0.975)

    @compiled
    def found(params):
        asked = lambda p: p[1], lambda p: jax.nn.sigmoid(p[0] + p[1])
        return [statistics.likelihood_interval(model, function)(params, x, y) for function in asked]

    contrast, chance = found(params)
    assert bool(contrast.converged) and bool(chance.converged), (contrast, chance)

    def fall(base, contrast):
        """The fall of the log-likelihood: 5 of 10 in the first group, none in the second."""
        return 5 * (np.logaddexp(0, base) + np.logaddexp(0, -base) - 2 * np.log(2)) + 10 * np.logaddexp(0, base + contrast)

    best = lambda c: scipy.optimize.minimize_scalar(lambda b: fall(b, c), bounds=(-9, 9), options={"xatol": 1e-10}).fun  # noqa: E731
    upper = scipy.optimize.brentq(lambda c: best(c) - z**2 / 2, -9, 3)
    assert contrast.lower == -np.inf and abs(contrast.upper - upper) < 1e-6
    np.testing.assert_allclose([chance.lower, chance.upper], [0, -np.expm1(-(z**2) / 20)], atol=1e-10)


def test_an_interval_without_an_end_says_so():
    """Without any failures the likelihood has no maximum, and the result says that it is no interval."""
    found = jf.fit(lambda logit: jf.Bernoulli(logit))(0.0, np.ones(5))
    assert not bool(found.converged) and bool(found.separated)
    wald = statistics.wald_interval(lambda p: p["idle"])
    F = jf.exact_fisher(lambda p, x: jf.Normal(p["level"] * x, 1.0))({"level": 0.0, "idle": 0.0}, np.ones(3))
    assert not bool(wald({"level": 0.0, "idle": 0.0}, jf.covariance(F)).converged)


def test_a_target_that_the_model_cannot_draw_has_no_fit_and_no_interval():
    """Its log-likelihood is minus infinity, with a gradient of zero, so that the start looks like a maximum."""
    y = np.array([-1.0, -2.0, -3.0])
    found = jf.fit(lambda rate: jf.Poisson(rate))(0.5, y)
    assert np.isneginf(found.log_likelihood) and not bool(found.converged)
    for interval in (statistics.score_interval, statistics.likelihood_interval):
        assert not bool(interval(lambda rate: jf.Poisson(rate), lambda rate: rate)(0.5, np.r_[y, 1.0, 2.0]).converged)


@pytest.mark.parametrize("level", [1e-6, 0.5, 1 - 5.733031437583878e-07])
def test_an_interval_of_any_level_keeps_its_digits_in_float32(level):
    """One of five standard deviations, and a very narrow one, with a level that is known and one that is not."""
    with jax.enable_x64(False):
        F = jf.exact_fisher(lambda mean: jf.Normal(mean, 1.0))(0.0)
        ask = lambda level: statistics.wald_interval(lambda mean: mean, level)(0.0, jf.covariance(F, n=1)).upper  # noqa: E731
        known, late = ask(level), ask(jnp.asarray(level))
    np.testing.assert_allclose(known, np.sqrt(2) * scipy.special.erfinv(level), rtol=1e-6)
    single = np.float64(np.float32(level))  # what is left of the level in float32
    np.testing.assert_allclose(late, np.sqrt(2) * scipy.special.erfinv(single), rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_interval_of_narrow_parameters_has_the_digits_of_the_statistics(dtype):
    """The interval of a mean is 1 +- z s / sqrt(n), with the accuracy of float32 for parameters of narrower dtypes."""
    mean = jnp.asarray(1.0, dtype)
    F = jf.exact_fisher(lambda mean: jf.Normal(mean, jnp.asarray(2.0, dtype)))(mean)
    found = statistics.wald_interval(lambda mean: mean)(mean, jf.covariance(F, n=4))
    assert found.lower.dtype == found.upper.dtype == jnp.float32
    np.testing.assert_allclose([found.lower, found.upper], 1 + scipy.stats.norm.ppf(0.975) * np.array([-1, 1]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_scale_that_falls_to_zero_is_no_maximum(dtype):
    """The likelihood of data that a model with a free scale fits exactly has no bound, whatever rounding stops the scale at."""
    x = np.linspace(0, 1, 20).astype(dtype)
    constant = compiled(lambda y: jf.fit(lambda p: jf.Normal(p[0], jnp.exp(p[1])))(jnp.zeros(2, dtype), y))
    line = compiled(lambda y: jf.fit(lambda p, x: jf.Normal(p[0] + p[1] * x, jnp.exp(p[2])))(jnp.zeros(3, dtype), x, y))
    for fits, y in ((constant, np.full(20, 3.0)), (constant, np.full(20, 3.1)), (line, 1 + 2 * x)):
        found = fits(y.astype(dtype))
        assert not found.converged, (y, found.params)
        assert found.log_likelihood > 100, (y, found.params)
    noise = np.random.default_rng(3).normal(size=20)
    assert constant((3 + noise).astype(dtype)).converged, "with noise there is a maximum"


def test_the_bound_of_cramer_and_rao():
    """The bound for the mean and for the ratio of standard deviation and mean, from n draws of a normal."""
    model = lambda p: jf.Normal(p["loc"], jnp.exp(p["log_scale"]))  # noqa: E731
    params = {"loc": 2.0, "log_scale": np.log(0.5)}
    bound = statistics.cramer_rao_bound(lambda p: (p["loc"], jnp.exp(p["log_scale"]) / p["loc"]))
    cv = 0.25
    expected = [[0.25, -0.25 * cv / 2], [-0.25 * cv / 2, cv**2 / 2 + cv**4]]
    assert relative(bound(params, jf.exact_fisher(model)(params), n=10), np.array(expected) / 10) < 1e-12


def test_a_covariance_is_an_operator():
    (found, bread), log_prob, y = fitted(poisson)
    made = jf.sandwich(bread, jf.empirical_fisher(log_prob)(found.params, X, y))
    matrix = np.asarray(made)
    assert repr(made) == "Fisher(sandwich, params 3, dense)"
    np.testing.assert_allclose(jf.standard_errors(made), np.sqrt(np.diag(matrix)), rtol=1e-14)
    np.testing.assert_allclose(made.mv(jnp.ones(3)), matrix @ np.ones(3), rtol=1e-13)
    np.testing.assert_allclose(made.quadratic(jnp.ones(3)), matrix.sum(), rtol=1e-12)
    np.testing.assert_allclose(made.solve(made.mv(jnp.ones(3)), 0.0), np.ones(3), rtol=1e-9)
    n = jnp.asarray(100.0)
    np.testing.assert_allclose(jf.covariance(found.fisher, n).as_matrix() * 100 / N, jf.covariance(found.fisher), rtol=1e-12)


def test_a_dispersion_of_zero_is_no_maximum_and_is_named():
    """Counts that scatter less than Poisson's: the likelihood rises until the dispersion is zero, and leaves a Poisson fit."""
    y = np.random.default_rng(0).binomial(10, 0.3, 50)
    assert np.var(y) < np.mean(y)
    model = lambda p: jf.NegativeBinomial(p["level"], p["dispersion"])  # noqa: E731
    found = compiled(lambda y: jf.fit(model)({"level": 0.0, "dispersion": 0.0}, y))(y)
    assert not bool(found.converged) and bool(found.separated["dispersion"]) and not bool(found.separated["level"])
    errors = jf.standard_errors(found.fisher)
    np.testing.assert_allclose(found.params["level"], np.log(np.mean(y)), rtol=1e-8)
    np.testing.assert_allclose(errors["level"], np.sum(y) ** -0.5, rtol=1e-8)
    assert np.isinf(errors["dispersion"])


def test_what_separates_a_complex_parameter_is_said_in_its_structure():
    """Of two complex weights only the second has a part that separates the classes."""

    def model(w, x):
        return jf.Bernoulli(w[0].real + jnp.imag(w[1]) * x + 0 * jnp.real(w[1]) - 0.5 * w[0].imag)

    found = jf.fit(model)(jnp.zeros(2, complex), jnp.array([-1.0, -1.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1]))
    assert found.separated.tolist() == [False, True]
    assert "separated: params[1]" in repr(found)


def test_a_complex_parameter_has_an_error_for_each_part():
    model = lambda z, x: jf.Normal(z.real * x[0] + z.imag * x[1], 1.0)  # noqa: E731
    fisher = jf.exact_fisher(model)(1.0 + 2.0j, jnp.array([[1.0, 0.5], [2.0, -1.0], [0.0, 3.0]]))
    matrix = np.array([[5.0, -1.5], [-1.5, 10.25]])
    expected = np.sqrt(np.diag(np.linalg.inv(matrix)))
    np.testing.assert_allclose(jf.standard_errors(fisher), expected[0] + 1j * expected[1], rtol=1e-12)
    np.testing.assert_allclose(jf.standard_errors(jf.covariance(fisher)), expected[0] + 1j * expected[1], rtol=1e-12)
    alone = forecasts.conditional_errors(fisher)
    np.testing.assert_allclose(alone, 5.0**-0.5 + 10.25**-0.5 * 1j, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda F: jf.covariance(3.0), TypeError, "covariance: `fisher`: expected a Fisher operator"),
        (lambda F: jf.covariance(jf.scaled_identity(jnp.zeros(3), 1.0)), ValueError, "no mean over examples.*Give `n`"),
        (lambda F: jf.standard_errors(F + F), ValueError, "a sum of several means.*Give `n`"),
        (lambda F: jf.standard_errors(100.0 * F), ValueError, "a multiple of a mean.*Give `n`"),
        (lambda F: jf.covariance(F.n * F + jf.scaled_identity(F, 1.0)), ValueError, "a multiple of a mean.*Give `n`"),
        (lambda F: jf.covariance(F, "many"), TypeError, "n` is 'many'; expected a number of observations"),
        (lambda F: jf.sandwich(F, 2.0), TypeError, "sandwich: `meat`"),
        (lambda F: jf.standard_errors(jf.fit(poisson)(jnp.zeros(3), X, COUNTS)), TypeError, "got a Fit. Pass its `fisher`"),
        (lambda F: jf.standard_errors(jf.covariance(F), 3), ValueError, "`n` is given with a covariance"),
        *[
            (lambda F, f=f: f(jf.covariance(F), F), TypeError, "is Fisher.*, a covariance; expected the Fisher, whose inverse")
            for f in (
                lambda C, F: jf.covariance(C, 1),
                lambda C, F: jf.sandwich(C, F, 1),
                lambda C, F: jf.sandwich(F, C),
                lambda C, F: forecasts.conditional_errors(C, 1),
                lambda C, F: statistics.cramer_rao_bound(jnp.sum)(jnp.zeros(3), C, 1),
            )
        ],
        *[
            (lambda F, f=f, g=g: f(jnp.sum)(jnp.zeros(3), g(F)), TypeError, "`covariance` is Fisher.*Pass jf.covariance")
            for f in (statistics.delta_method, statistics.wald_interval)
            for g in (lambda F: F, lambda F: F.n * F + jf.scaled_identity(F, 1.0), jf.dense)
        ],
        (lambda F: statistics.wald_interval(jnp.sum, level=95), ValueError, "`level` is 95; expected a coverage between"),
        (lambda F: statistics.wald_interval(lambda p: p)(jnp.zeros(3), jf.covariance(F)), ValueError, r"returned shape \(3,\)"),
        (
            lambda F: statistics.wald_interval(lambda p: jax.lax.complex(p[0], p[0]))(jnp.zeros(3), jf.covariance(F)),
            TypeError,
            "dtype complex.*expected real floating numbers",
        ),
        (lambda F: statistics.delta_method(lambda p: p > 0)(jnp.zeros(3), jf.covariance(F)), TypeError, "returned dtype bool"),
        (
            lambda F: statistics.likelihood_interval(poisson, lambda p: jax.lax.complex(p[0], p[0]))(jnp.zeros(3), X, COUNTS),
            TypeError,
            "complex",
        ),
        (lambda F: statistics.score_interval(poisson, lambda p: p)(jnp.zeros(3), X, COUNTS), ValueError, "expected one number"),
        (
            lambda F: statistics.meat(jf.log_likelihood(poisson))(jnp.zeros(3), X, COUNTS, groups=[1, 2]),
            ValueError,
            "`groups` has",
        ),
        (
            lambda F: statistics.meat(jf.log_likelihood(poisson))(jnp.zeros(3), X, COUNTS, factors=X),
            ValueError,
            "`factors` has",
        ),
        (
            lambda F: statistics.meat(jf.log_likelihood(poisson))(jnp.zeros(3), X, COUNTS, factors=np.ones(len(X), complex)),
            TypeError,
            "meat: `factors` is .*complex.*; expected real numbers",
        ),
        *[
            (lambda F, f=f: f("high"), TypeError, f"{f.__name__}: `leverages` is 'high'; expected real numbers")
            for f in (statistics.hc1, statistics.hc2, statistics.hc3)
        ],
        (lambda F: statistics.cluster_factor(np.ones(5), 1), ValueError, "with 1 labels; expected a vector of two or more"),
        (lambda F: statistics.cluster_factor(np.arange(5), 5), ValueError, "below the 5 observations"),
        (lambda F: statistics.hc1(jnp.zeros(3), weights=[1.0, 2.0]), ValueError, "`weights` has shape"),
        (
            lambda F: statistics.leverages(lambda b, x: jf.Normal(x @ b, jnp.exp(b[0])))(jnp.zeros(3), X),
            ValueError,
            "expected one, such as a linear",
        ),
        (lambda F: jf.fit(poisson, max_steps=0), ValueError, "`max_steps` is 0; expected a whole number of steps"),
        (lambda F: jf.fit(poisson, penalty=0.1), TypeError, "`penalty` is 0.1; expected a function"),
        (lambda F: jf.fit(lambda b, x: x @ b)(jnp.zeros(3), X, COUNTS), TypeError, "Expected a distribution, got an array"),
        (lambda F: jf.fit(poisson)(jnp.zeros(3, int), X, COUNTS), TypeError, "has dtype int"),
        (
            lambda F: jf.from_matrix(jnp.eye(2), F),
            ValueError,
            r"`matrix` has shape \(2, 2\); expected real numbers of shape \(3, 3\)",
        ),
        (lambda F: jf.from_matrix("eye", F), TypeError, "`matrix` is 'eye'"),
    ],
)
def test_bad_input_is_named(call, error, message):
    F = jf.exact_fisher(poisson)(jnp.zeros(3), X)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: jax.tree.leaves(call(F)))
