"""Generalised linear models on real data, against `statsmodels`: information, standard errors, and Fisher scoring as IRLS.

The data sets ship with statsmodels. Columns are standardised: some are in units that differ by 1e4, and the condition number
of the raw design would leave few digits to compare.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from models import compiled

import jaxfisher as jf

# These two links do not keep the mean in its domain for every predictor; on these data it stays there.
pytestmark = [
    pytest.mark.usefixtures("in_numpy"),
    pytest.mark.filterwarnings(
        "ignore:The (InversePower|Sqrt) link function does not respect:statsmodels.tools.sm_exceptions.DomainWarning"
    ),
]

STEPS = 5
FAMILIES, LINKS = sm.families, sm.families.links


@dataclasses.dataclass(frozen=True)
class Regression:
    """One regression: the data, the family in both libraries, and where to start."""

    name: str
    load: Callable[[], Any]
    """A function that returns ``(design with a constant, targets, weights or None)``."""
    family: Any
    predict: Callable[[Any, float], Any]
    """``(linear predictor, dispersion) -> distribution``."""
    start: Callable[[Any], float]
    """From the mean of the targets to the initial value of the constant; other coefficients start at zero."""
    dispersion: float = 1.0


def standardised(table):
    """The columns with mean zero and deviation one, after a constant."""
    columns = np.asarray(table, float)
    columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    return np.column_stack([np.ones(len(columns)), columns])


def load(name, columns=slice(None)):
    data = getattr(sm.datasets, name).load_pandas()
    return standardised(data.exog.iloc[:, columns]), np.asarray(data.endog, float), None


def star98():
    """Counts of pupils above and below the median: each county is a success and a failure, weighted by how often they occur."""
    data = sm.datasets.star98.load_pandas()
    counts = np.asarray(data.endog, float)
    design = standardised(data.exog.iloc[:, :6])
    return np.repeat(design, 2, axis=0), np.tile([1.0, 0.0], len(counts)), counts.reshape(-1)


def probit(eta, dispersion):
    return jf.Bernoulli(jax.scipy.stats.norm.logcdf(eta) - jax.scipy.stats.norm.logcdf(-eta))


def cloglog(eta, dispersion):
    """``p = 1 - exp(-e^eta)``: ``log p - log(1 - p) = log(expm1(e^eta))``."""
    return jf.Bernoulli(jnp.log(jnp.expm1(jnp.exp(eta))))


def gamma(mean, dispersion):
    return jf.Gamma(1 / dispersion, 1 / (dispersion * mean))


REGRESSIONS = [
    Regression(
        "logit, spector",
        functools.partial(load, "spector"),
        lambda: FAMILIES.Binomial(),
        lambda eta, dispersion: jf.Bernoulli(eta),
        lambda mean: np.log(mean / (1 - mean)),
    ),
    Regression(
        "probit, spector",
        functools.partial(load, "spector"),
        lambda: FAMILIES.Binomial(LINKS.Probit()),
        probit,
        scipy.stats.norm.ppf,
    ),
    Regression(
        "logit with counts as weights, star98",
        star98,
        lambda: FAMILIES.Binomial(),
        lambda eta, dispersion: jf.Bernoulli(eta),
        lambda mean: np.log(mean / (1 - mean)),
    ),
    Regression(
        "cloglog with counts as weights, star98",
        star98,
        lambda: FAMILIES.Binomial(LINKS.CLogLog()),
        cloglog,
        lambda mean: np.log(-np.log(1 - mean)),
    ),
    Regression(
        "Poisson, log, randhie",
        functools.partial(load, "randhie"),
        lambda: FAMILIES.Poisson(),
        lambda eta, dispersion: jf.Poisson(eta),
        np.log,
    ),
    Regression(
        "Poisson, square root, cpunish",
        functools.partial(load, "cpunish", slice(0, 3)),
        lambda: FAMILIES.Poisson(LINKS.Sqrt()),
        lambda eta, dispersion: jf.Poisson(2 * jnp.log(eta)),
        np.sqrt,
    ),
    Regression(
        "Gamma, inverse, scotland",
        functools.partial(load, "scotland"),
        lambda: FAMILIES.Gamma(LINKS.InversePower()),
        lambda eta, dispersion: gamma(1 / eta, dispersion),
        lambda mean: 1 / mean,
        dispersion=0.3,
    ),
    Regression(
        "Gamma, log, scotland",
        functools.partial(load, "scotland"),
        lambda: FAMILIES.Gamma(LINKS.Log()),
        lambda eta, dispersion: gamma(jnp.exp(eta), dispersion),
        np.log,
        dispersion=0.3,
    ),
]
CANONICAL = ("logit", "Poisson, log", "Gamma, inverse")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A regression in both libraries, with its data loaded."""

    regression: Regression

    def __str__(self):
        return self.regression.name

    @functools.cached_property
    def data(self):
        return self.regression.load()

    @property
    def total(self):
        """The number of observations, by which our means become the sums of statsmodels."""
        design, _, weights = self.data
        return len(design) if weights is None else np.sum(weights)

    @functools.cached_property
    def start(self):
        design, target, weights = self.data
        beta = np.zeros(design.shape[1])
        beta[0] = self.regression.start(np.average(target, weights=weights))
        return beta

    @functools.cached_property
    def theirs(self):
        design, target, weights = self.data
        return sm.GLM(target, design, self.regression.family(), freq_weights=weights)

    @functools.cached_property
    def fitted(self):
        """The fit of statsmodels from our start, iterated until the deviance changes only by rounding."""
        return self.theirs.fit(start_params=self.start, tol=1e-13, maxiter=100)

    @functools.cached_property
    def ours(self):
        """``(beta, dispersion) -> (exact Fisher, observed information, natural-gradient step)``, compiled once."""
        design, target, weights = self.data

        def views(beta, dispersion, design, target, weights):
            model = lambda beta, x: self.regression.predict(x @ beta, dispersion)  # noqa: E731
            log_p = jf.log_likelihood(model)
            fisher = lambda beta, x, y, weights: jf.exact_fisher(model)(beta, x, weights=weights)  # noqa: E731
            return (
                jf.exact_fisher(model)(beta, design, weights=weights).as_matrix(),
                jf.observed_information(log_p)(beta, design, target, weights=weights).as_matrix(),
                jf.natural_grad(log_p, fisher, damping=0.0)(beta, design, target, weights=weights),
            )

        weights = np.ones(len(target)) if weights is None else weights
        run = compiled(views)
        arrays = tuple(map(jnp.asarray, (design, target, weights)))
        return lambda beta, dispersion: tuple(np.asarray(part) for part in run(jnp.asarray(beta), dispersion, *arrays))


@pytest.fixture(scope="module", params=[Fit(regression) for regression in REGRESSIONS], ids=str)
def fit(request):
    return request.param


def relative(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def off_the_optimum(fit):
    """A point between the start and the fit, where expected and observed information differ."""
    return 0.5 * (fit.start + np.asarray(fit.fitted.params))


def test_expected_and_observed_information_are_those_of_statsmodels(fit):
    beta, phi = off_the_optimum(fit), fit.regression.dispersion
    exact, observed, _ = fit.ours(beta, phi)
    # `GLM.information` returns the expected Hessian, minus what its name says; and without `scale` it would estimate one.
    expected_hessian = fit.theirs.hessian(beta, scale=phi, observed=False)
    assert relative(fit.total * exact, -expected_hessian) < 1e-12
    assert relative(fit.total * observed, -fit.theirs.hessian(beta, scale=phi, observed=True)) < 1e-12
    # With the canonical link they are one matrix, with another link they are not.
    if str(fit).startswith(CANONICAL):
        assert relative(observed, exact) < 1e-12
    else:
        assert relative(observed, exact) > 1e-3


def test_the_sign_of_their_information():
    """The behaviour that the test above works around. This test fails when statsmodels changes it."""
    fit = Fit(REGRESSIONS[0])
    their_information = fit.theirs.information(fit.start, scale=1.0)
    assert relative(-their_information, fit.total * fit.ours(fit.start, 1.0)[0]) < 1e-12


def test_natural_gradient_steps_are_the_iterates_of_irls(fit):
    """Our steps with learning rate one, iteratively reweighted least squares written out, and statsmodels' iterates."""
    history = fit.fitted.fit_history["params"]  # an infinity, the start, and the iterates
    count = min(STEPS, len(history) - 2)
    assert count >= 4, "enough iterates to compare"
    beta = textbook = fit.start
    for step in range(count):
        # The step does not depend on the dispersion: it cancels between F and the gradient.
        beta = beta - fit.ours(beta, fit.regression.dispersion)[2]
        textbook = irls(fit, textbook)
        assert relative(beta, textbook) < 1e-10, f"step {step + 1}"
        assert relative(beta, history[step + 2]) < 1e-10, f"step {step + 1}"


def irls(fit, beta):
    """One weighted least-squares fit of the working response ``eta + (y - mu) g'(mu)``."""
    design, target, counts = fit.data
    family = fit.regression.family()
    eta = design @ beta
    mu = family.link.inverse(eta)
    slope = family.link.deriv(mu)
    weights = 1 / (family.variance(mu) * slope**2) * (1 if counts is None else counts)
    root = np.sqrt(weights)
    return np.linalg.lstsq(root[:, None] * design, root * (eta + (target - mu) * slope), rcond=None)[0]


def test_standard_errors_are_those_of_their_fit(fit):
    """``sqrt(diag((n F)^-1))`` at the fit, with statsmodels' estimate of the dispersion."""
    beta, phi = np.asarray(fit.fitted.params), float(fit.fitted.scale)
    exact = fit.ours(beta, phi)[0]
    errors = np.sqrt(np.diag(np.linalg.inv(fit.total * exact)))
    # The weights of statsmodels are those of the last iterate but one.
    assert relative(errors, np.asarray(fit.fitted.bse)) < 1e-7


DISCRETE = [("logit, spector", sm.Logit), ("probit, spector", sm.Probit), ("Poisson, log, randhie", sm.Poisson)]


@pytest.mark.parametrize(("name", "theirs"), DISCRETE, ids=[name for name, _ in DISCRETE])
def test_standard_errors_from_the_observed_information(name, theirs):
    """The other half of statsmodels: its discrete models use Newton's method and minus the Hessian at the fit."""
    fit = next(Fit(regression) for regression in REGRESSIONS if regression.name == name)
    design, target, _ = fit.data
    model = theirs(target, design)
    result = model.fit(start_params=fit.start, method="newton", tol=1e-13, maxiter=100, disp=0)
    observed = fit.total * fit.ours(np.asarray(result.params), 1.0)[1]
    assert relative(observed, -model.hessian(result.params)) < 1e-8
    assert relative(np.sqrt(np.diag(np.linalg.inv(observed))), np.asarray(result.bse)) < 1e-7
