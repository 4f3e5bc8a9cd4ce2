"""Distributions of distrax, NumPyro and TFP as ours, against sums and integrals of the libraries' own log_prob."""

import dataclasses
import importlib
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import sparse
from jax.flatten_util import ravel_pytree
from programs.evaluate import evaluated, traced

import jaxfisher as jf
from jaxfisher._distributions.beta import Beta
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.foreign import Foreign, as_distribution
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.normal import Normal

pytestmark = [
    pytest.mark.relaxed,
    pytest.mark.usefixtures("in_numpy"),
    # These libraries use functions that JAX has deprecated; no warning of our code is silenced.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorflow_probability|distrax|numpyro)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(tensorflow_probability|distrax|numpyro)"),
]

MISSING = {}


def load(name, module):
    """A library, or why it does not import: TFP uses parts of JAX that the newest one no longer has, and distrax needs TFP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except (ImportError, AttributeError) as error:
            MISSING[name] = f"{module} does not import here: {error}"
            return types.SimpleNamespace()


distrax = load("distrax", "distrax")
nd = load("numpyro", "numpyro.distributions")
tfp = load("tfp", "tensorflow_probability.substrates.jax")
tfd = getattr(tfp, "distributions", None)


def needs(library):
    return pytest.mark.skipif(library in MISSING, reason=MISSING.get(library, "loads"))


@dataclasses.dataclass(frozen=True)
class Row:
    """A constructor of another library at one parameter point, and where the Fisher should come from."""

    name: str
    make: Callable[..., Any]
    params: tuple[Any, ...]
    other: tuple[Any, ...]
    rule: Callable[[], oracle.Rule]
    source: str = "closed form"
    has_kl: bool = True
    rtol: float = 1e-11
    """How close the library's own log_prob is to the truth."""


CLOSED, KL, SAMPLES = "closed form", "Hessian of the KL", "1024 samples"
THREE, FOUR, SIX = (f"sum over {count} outcomes" for count in (3, 4, 6))
COUNTED = "sum over 4096 outcomes, 1024 samples beyond"

LINE = (0.3, 0.8), (-0.2, 1.1)
POSITIVE = (1.7, 0.9), (2.2, 1.3)
LOGITS = (np.array([0.3, -1.0, 0.5]),), (np.array([0.1, 0.4, -0.2]),)
LOGIT = (0.4,), (-0.9,)
RATE = (1.7,), (0.6,)
CUTS = (np.array([-0.7, 0.2, 1.1]), 0.3), (np.array([-1.0, 0.3, 0.9]), -0.2)
SIMPLEX = (np.array([1.4, 2.1, 1.8]),), (np.array([2.0, 1.2, 1.6]),)
COUNTS = (2.5, 0.4), (1.6, 0.1)
LOC, TRIL = np.array([0.3, -0.4]), np.array([[0.9, 0.0], [0.4, 1.2]])
VECTOR = (LOC, TRIL), (LOC + 0.2, TRIL * 1.3)
DIAGONAL = (LOC, np.array([0.9, 1.2])), (LOC + 0.2, np.array([1.1, 0.7]))
COVARIANCE = (LOC, TRIL @ TRIL.T), (LOC + 0.2, 1.3 * TRIL @ TRIL.T)
STUDENT = (4.5, 0.3, 0.8), (6.0, -0.2, 1.1)


def line():
    return oracle.real_line(-0.2, 0.3, scale=1.0)


def positive():
    return oracle.half_line(0.0, 1.0)


def unit():
    return oracle.interval(0.0, 1.0)


def classes():
    return oracle.outcomes(3)


def binary():
    return oracle.outcomes(2)


def counts():
    return oracle.outcomes(60)


def long_counts():
    return oracle.outcomes(300)


def plane():
    return oracle.gaussian_grid(LOC, TRIL)


def one_hots():
    return oracle.Rule(np.eye(3), np.ones(3))


def four():
    return oracle.outcomes(4)


def pairs():
    """Two trials among three classes."""
    nodes = [[2, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 0], [1, 0, 1], [0, 1, 1]]
    return oracle.Rule(np.array(nodes), np.ones(6))


MIXTURE = (
    (np.array([0.3, -0.6, 0.1]), np.array([-1.0, 0.4, 2.0]), np.array([0.7, 0.5, 0.9])),
    (np.zeros(3), np.array([-0.8, 0.6, 1.9]), np.array([0.8, 0.6, 0.7])),
)


def mixture_line():
    return oracle.real_line(0.0, scale=1.0)


DISTRAX = [
    Row("Normal", lambda m, s: distrax.Normal(m, s), *LINE, line),
    Row("LogStddevNormal", lambda m, s: distrax.LogStddevNormal(m, jnp.log(s)), *LINE, line),
    Row("Categorical logits", lambda z: distrax.Categorical(logits=z), *LOGITS, classes),
    Row("Categorical probs", lambda z: distrax.Categorical(probs=jax.nn.softmax(z)), *LOGITS, classes),
    Row("Bernoulli logits", lambda z: distrax.Bernoulli(logits=z), *LOGIT, binary),
    Row("Bernoulli probs", lambda z: distrax.Bernoulli(probs=jax.nn.sigmoid(z)), *LOGIT, binary),
    Row("Gamma", lambda a, b: distrax.Gamma(a, b), *POSITIVE, positive),
    Row("Beta", lambda a, b: distrax.Beta(a, b), *POSITIVE, unit),
    Row("Dirichlet", lambda a: distrax.Dirichlet(a), *SIMPLEX, oracle.simplex3),
    Row("Laplace", lambda m, s: distrax.Laplace(m, s), *LINE, line),
    Row("MultivariateNormalTri", lambda m, t: distrax.MultivariateNormalTri(m, t), *VECTOR, plane),
    Row("MultivariateNormalTri negative", lambda m, t: distrax.MultivariateNormalTri(m, -t), *VECTOR, plane),
    Row("MultivariateNormalTri upper", lambda m, t: distrax.MultivariateNormalTri(m, t.T, is_lower=False), *VECTOR, plane),
    Row("MultivariateNormalDiag", lambda m, s: distrax.MultivariateNormalDiag(m, s), *DIAGONAL, plane),
    Row("MultivariateNormalFullCovariance", lambda m, c: distrax.MultivariateNormalFullCovariance(m, c), *COVARIANCE, plane),
    Row("Gumbel", lambda m, s: distrax.Gumbel(m, s), *LINE, line, KL),
    Row("OneHotCategorical", lambda z: distrax.OneHotCategorical(z), *LOGITS, one_hots, THREE),
    Row("Softmax", lambda z: distrax.Softmax(z, 0.7), *LOGITS, classes, THREE),
    Row("Transformed", lambda m, s: distrax.Transformed(distrax.Normal(m, s), distrax.Lambda(jnp.exp)), *LINE, positive, KL),
    # Two of these get the KL of their equal bases from distrax, which is zero.
    Row(
        "Transformed with parameters",
        lambda m, s: distrax.Transformed(distrax.Normal(0.0, 1.0), distrax.ScalarAffine(m, s)),
        *LINE,
        line,
        SAMPLES,
        has_kl=False,
    ),
    Row("Logistic", lambda m, s: distrax.Logistic(m, s), *LINE, line, SAMPLES, has_kl=False),
    Row(
        "MixtureSameFamily",
        lambda z, m, s: distrax.MixtureSameFamily(distrax.Categorical(z), distrax.Normal(m, s)),
        *MIXTURE,
        mixture_line,
        SAMPLES,
        has_kl=False,
    ),
]

NUMPYRO = [
    Row("Normal", lambda m, s: nd.Normal(m, s), *LINE, line),
    Row("Categorical logits", lambda z: nd.Categorical(logits=z), *LOGITS, classes),
    Row("Categorical probs", lambda z: nd.Categorical(probs=jax.nn.softmax(z)), *LOGITS, classes),
    Row("Bernoulli logits", lambda z: nd.Bernoulli(logits=z), *LOGIT, binary),
    Row("Bernoulli probs", lambda z: nd.Bernoulli(probs=jax.nn.sigmoid(z)), *LOGIT, binary),
    Row("Poisson", lambda r: nd.Poisson(r), *RATE, counts),
    Row("Exponential", lambda r: nd.Exponential(r), *RATE, positive),
    Row("Gamma", lambda a, b: nd.Gamma(a, b), *POSITIVE, positive),
    Row("Beta", lambda a, b: nd.Beta(a, b), *POSITIVE, unit),
    Row("Dirichlet", lambda a: nd.Dirichlet(a), *SIMPLEX, oracle.simplex3),
    Row("Laplace", lambda m, s: nd.Laplace(m, s), *LINE, line),
    Row("StudentT", lambda df, m, s: nd.StudentT(df, m, s), *STUDENT, line),
    Row("MultivariateNormal", lambda m, t: nd.MultivariateNormal(m, scale_tril=t), *VECTOR, plane),
    Row("MultivariateNormal covariance", lambda m, c: nd.MultivariateNormal(m, covariance_matrix=c), *COVARIANCE, plane),
    # NumPyro's log_prob here uses jax.scipy.special.betaln, which is wrong in the eighth digit. The tests of the family compare
    # ours with SciPy's; here it is compared only to that accuracy.
    Row("GammaPoisson", lambda r, m: nd.GammaPoisson(r, r / m), *COUNTS, long_counts, rtol=1e-6),
    Row("NegativeBinomial2", lambda r, m: nd.NegativeBinomial2(m, r), *COUNTS, long_counts, rtol=1e-6),
    Row("NegativeBinomialLogits", lambda r, m: nd.NegativeBinomialLogits(r, m - 1), *COUNTS, long_counts),
    Row("NegativeBinomialProbs", lambda r, m: nd.NegativeBinomialProbs(r, m), *COUNTS, long_counts, rtol=1e-6),
    Row("masked", lambda a, b: nd.Gamma(a, b).mask(jnp.array(True)), *POSITIVE, positive, KL),
    Row("LogNormal", lambda m, s: nd.LogNormal(m, s), *LINE, positive, SAMPLES, has_kl=False),
    Row("Gumbel", lambda m, s: nd.Gumbel(m, s), *LINE, line, SAMPLES, has_kl=False),
    Row(
        "TransformedDistribution",
        lambda m, s: nd.TransformedDistribution(nd.Normal(0.0, 1.0), nd.transforms.AffineTransform(m, s)),
        *LINE,
        line,
        SAMPLES,
        has_kl=False,
    ),
    Row("Binomial", lambda z: nd.Binomial(2, logits=z), *LOGIT, classes, THREE),
    Row("BetaBinomial", lambda a, b: nd.BetaBinomial(a, b, 2), *POSITIVE, classes, THREE, rtol=1e-6),
    # The library's own KL takes the probabilities, which the object stores beside its parameters, for parameters.
    Row("OrderedLogistic", lambda c, f: nd.OrderedLogistic(f, c), *CUTS, four, FOUR),
    Row("Multinomial", lambda z: nd.Multinomial(2, logits=z), *LOGITS, pairs, SIX, rtol=1e-10),
    Row("DirichletMultinomial", lambda a: nd.DirichletMultinomial(a, 2), *SIMPLEX, pairs, SIX, rtol=1e-10),
    Row("Geometric", lambda z: nd.Geometric(logits=z), *LOGIT, long_counts, COUNTED, has_kl=False),
    Row(
        "ZeroInflatedDistribution",
        lambda p, g: nd.ZeroInflatedDistribution(nd.Geometric(p), gate=g),
        (0.2, 0.4),
        (0.3, 0.1),
        long_counts,
        COUNTED,
        has_kl=False,
    ),
    Row("expanded", lambda z: nd.Binomial(2, logits=z).expand(()), *LOGIT, classes, THREE),
    Row(
        "MixtureSameFamily",
        lambda z, m, s: nd.MixtureSameFamily(nd.Categorical(logits=z), nd.Normal(m, s)),
        *MIXTURE,
        mixture_line,
        SAMPLES,
        has_kl=False,
    ),
]

TFP = [
    Row("Normal", lambda m, s: tfd.Normal(m, s), *LINE, line),
    Row("Categorical logits", lambda z: tfd.Categorical(logits=z), *LOGITS, classes),
    Row("Categorical probs", lambda z: tfd.Categorical(probs=jax.nn.softmax(z)), *LOGITS, classes),
    Row("Bernoulli logits", lambda z: tfd.Bernoulli(logits=z), *LOGIT, binary),
    Row("Bernoulli probs", lambda z: tfd.Bernoulli(probs=jax.nn.sigmoid(z)), *LOGIT, binary),
    Row("Poisson rate", lambda r: tfd.Poisson(r), *RATE, counts),
    Row("Poisson log_rate", lambda r: tfd.Poisson(log_rate=r), *LOGIT, counts),
    Row("Exponential", lambda r: tfd.Exponential(r), *RATE, positive),
    Row("Gamma rate", lambda a, b: tfd.Gamma(a, b), *POSITIVE, positive),
    Row("Gamma log_rate", lambda a, b: tfd.Gamma(a, log_rate=b), *POSITIVE, positive),
    Row("Beta", lambda a, b: tfd.Beta(a, b), *POSITIVE, unit),
    Row("Dirichlet", lambda a: tfd.Dirichlet(a), *SIMPLEX, oracle.simplex3),
    Row("Laplace", lambda m, s: tfd.Laplace(m, s), *LINE, line),
    Row("StudentT", lambda df, m, s: tfd.StudentT(df, m, s), *STUDENT, line),
    Row("MultivariateNormalTriL", lambda m, t: tfd.MultivariateNormalTriL(m, t), *VECTOR, plane),
    Row("MultivariateNormalTriL centred", lambda t: tfd.MultivariateNormalTriL(None, t), (TRIL,), (1.2 * TRIL,), plane),
    Row("MultivariateNormalDiag", lambda m, s: tfd.MultivariateNormalDiag(m, s), *DIAGONAL, plane),
    Row("MultivariateNormalFullCovariance", lambda m, c: tfd.MultivariateNormalFullCovariance(m, c), *COVARIANCE, plane),
    Row("NegativeBinomial logits", lambda r, m: tfd.NegativeBinomial(r, m - 1), *COUNTS, long_counts),
    Row("NegativeBinomial probs", lambda r, m: tfd.NegativeBinomial(r, probs=m), *COUNTS, long_counts),
    Row("OneHotCategorical", lambda z: tfd.OneHotCategorical(z), *LOGITS, one_hots, THREE),
    Row("OrderedLogistic", lambda c, f: tfd.OrderedLogistic(c, f), *CUTS, four, FOUR),
    Row("StoppingRatioLogistic", lambda c, f: tfd.StoppingRatioLogistic(c, f), *CUTS, four, FOUR),
    # TFP's KL of two that are equal has no second derivative.
    Row("one of a Sample", lambda c, f: tfd.Sample(tfd.OrderedLogistic(c, f), ()), *CUTS, four, SAMPLES, has_kl=False),
    Row("Binomial", lambda z: tfd.Binomial(np.float64(2), logits=z), *LOGIT, classes, THREE, rtol=1e-10),
    Row("Multinomial", lambda z: tfd.Multinomial(np.float64(2), logits=z), *LOGITS, pairs, SIX, rtol=1e-10),
    Row("ProbitBernoulli", lambda z: tfd.ProbitBernoulli(z), *LOGIT, binary, "sum over 2 outcomes"),
    Row("Weibull", lambda a, b: tfd.Weibull(a, b), *POSITIVE, positive, KL),
    Row("Gumbel", lambda m, s: tfd.Gumbel(m, s), *LINE, line, KL),
    Row("LogNormal", lambda m, s: tfd.LogNormal(m, s), *LINE, positive, KL),
    Row("Logistic", lambda m, s: tfd.Logistic(m, s), *LINE, line, SAMPLES, has_kl=False),
    Row(
        "MixtureSameFamily",
        lambda z, m, s: tfd.MixtureSameFamily(tfd.Categorical(z), tfd.Normal(m, s)),
        *MIXTURE,
        mixture_line,
        SAMPLES,
        has_kl=False,
    ),
]

LIBRARIES = {"distrax": DISTRAX, "numpyro": NUMPYRO, "tfp": TFP}
ROWS = [
    pytest.param(row, library, id=f"{library} {row.name}", marks=needs(library))
    for library, rows in LIBRARIES.items()
    for row in rows
]


def as_arrays(params):
    return tuple(jnp.asarray(value, jnp.float64) for value in params)


def flat_fields(dist):
    return ravel_pytree([leaf for leaf in jax.tree.leaves(dist) if jnp.issubdtype(leaf.dtype, jnp.floating)])[0]


def library_kl(library, p, q):
    return nd.kl_divergence(p, q) if library == "numpyro" else p.kl_divergence(q)


@pytest.mark.parametrize(("row", "library"), ROWS)
def test_density_divergence_and_fisher(row, library):
    rule = row.rule()
    nodes = jnp.asarray(rule.nodes)
    params, other = as_arrays(row.params), as_arrays(row.other)

    def theirs(params, other):
        def log_prob(flat, x):
            return row.make(*unravel(flat)).log_prob(x)

        flat, unravel = ravel_pytree(params)
        values, scores = jax.vmap(jax.value_and_grad(log_prob), (None, 0))(flat, nodes)
        try:
            kl = library_kl(library, row.make(*params), row.make(*other)) if row.has_kl else None
        except NotImplementedError:
            kl = None
        return values, scores, jax.vmap(log_prob, (None, 0))(ravel_pytree(other)[0], nodes), kl

    def ours(params, other):
        flat, unravel = ravel_pytree(params)
        p, q = as_distribution(row.make(*params)), as_distribution(row.make(*other))
        assert p.fisher_source == row.source
        assert isinstance(p, Foreign) == (row.source != CLOSED)
        jacobian = jax.jacfwd(lambda flat: flat_fields(as_distribution(row.make(*unravel(flat)))))(flat)
        fisher = jacobian.T @ p.fisher_matrix() @ jacobian
        kl = p.kl(q) if row.has_kl else None
        return jax.vmap(p.log_prob)(nodes), kl, fisher

    log_p, scores, log_q, their_kl = evaluated(theirs, params, other)
    values, kl, fisher = evaluated(ours, params, other)

    # Far out in the tails the rules have nodes where a density is zero, and its score may be NaN.
    here = log_p > -600
    rule = oracle.Rule(rule.nodes[here], rule.weights[here])
    log_p, log_q, scores, values = log_p[here], log_q[here], scores[here], values[here]
    density = np.exp(log_p)
    np.testing.assert_allclose(rule.total(density), 1, rtol=10 * row.rtol)
    np.testing.assert_allclose(values, log_p, rtol=row.rtol, atol=row.rtol)
    if row.has_kl:
        np.testing.assert_allclose(kl, rule.total(density * (log_p - log_q)), rtol=100 * row.rtol, atol=1e-12)
        assert their_kl is not None or row.source != KL
        if their_kl is not None:
            np.testing.assert_allclose(kl, their_kl, rtol=100 * row.rtol, atol=1e-12)
    products = scores[:, :, None] * scores[:, None, :]
    expected = rule.total(density[:, None, None] * products)
    if row.source != SAMPLES:
        np.testing.assert_allclose(fisher, expected, rtol=1e3 * row.rtol, atol=1e3 * row.rtol * np.max(np.abs(expected)))
        return
    spread = rule.total(density[:, None, None] * np.square(products - expected))
    error = np.sqrt(spread / 1024)
    assert np.max(np.abs(fisher - expected) / error) < 5
    # The band is narrow: scores that are scaled by 2 or by 1/2 are far outside.
    assert np.max(np.abs(0.5 * expected) / error) > 5


def types_of(row):
    """The library's class that a row makes, without computing anything."""
    seen = []
    jax.eval_shape(lambda: seen.append(type(row.make(*as_arrays(row.params)))))
    return seen


def test_every_translated_family_is_tested():
    from jaxfisher._distributions import libraries

    names = {"distrax": libraries._DISTRAX, "numpyro": libraries._NUMPYRO, "tfp": libraries._TFP}
    for library, rows in LIBRARIES.items():
        if library in MISSING:
            continue
        seen = {kind.__name__ for row in rows for kind in types_of(row)}
        assert set(names[library]) - seen <= {"Independent", "ExpandedDistribution"}


M, S = np.array([0.3, -0.4, 1.0]), np.array([0.8, 1.2, 0.5])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda m, s: distrax.Independent(distrax.Normal(m, s), 1), id="distrax", marks=needs("distrax")),
        pytest.param(lambda m, s: nd.Normal(m, s).to_event(1), id="numpyro", marks=needs("numpyro")),
        pytest.param(lambda m, s: nd.Normal(m[None], s).expand((2, 3)).to_event(2), id="expand", marks=needs("numpyro")),
        pytest.param(lambda m, s: nd.Normal(m, s).to_event(1).expand((2,)), id="expand outside", marks=needs("numpyro")),
        pytest.param(lambda m, s: tfd.Independent(tfd.Normal(m, s), 1), id="tfp", marks=needs("tfp")),
    ],
)
def test_independent_is_our_batch(make):
    theirs, other = make(jnp.asarray(M), jnp.asarray(S)), make(jnp.asarray(M + 0.1), jnp.asarray(S))
    dist = as_distribution(theirs)
    shape = tuple(theirs.batch_shape) + tuple(theirs.event_shape)
    x = np.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)
    ours, same, divergence = evaluated(lambda x: (dist.log_prob(x), theirs.log_prob(x), dist.kl(as_distribution(other))), x)
    assert float(ours.sum()) == pytest.approx(float(same.sum()), rel=1e-14)
    expected = np.sum(np.square(0.1 / S) / 2) * np.prod(shape[:-1])
    assert float(divergence.sum()) == pytest.approx(float(expected), rel=1e-12)
    assert isinstance(dist, Normal)
    assert dist.batch_shape == shape
    np.testing.assert_allclose(dist.loc, np.broadcast_to(M, shape))


@needs("numpyro")
def test_expand_keeps_the_event():
    dist = as_distribution(nd.MultivariateNormal(LOC, scale_tril=TRIL).expand((3,)))
    assert isinstance(dist, MultivariateNormal)
    assert (dist.loc.shape, dist.scale_tril.shape) == ((3, 2), (3, 2, 2))
    assert isinstance(as_distribution(nd.LogNormal(0.0, 1.0).expand((3,))), Foreign)


@needs("tfp")
def test_float64_numpy_logits_stay_float64():
    """TFP keeps these as float32, which 1 / 3 is not."""
    logits = np.array([1 / 3])
    assert tfd.Bernoulli(logits).logits.dtype == np.float32  # the library does round
    dist = as_distribution(tfd.Bernoulli(logits))
    assert dist.logits.dtype == np.float64
    np.testing.assert_array_equal(dist.logits, logits)


@pytest.mark.parametrize("library", [pytest.param(name, marks=needs(name)) for name in LIBRARIES])
def test_exact_at_extreme_logits(library):
    """Logits of +-1e4, and probabilities that underflowed: no NaN in the pull-back."""
    make = {
        "distrax": lambda **kwargs: distrax.Categorical(**kwargs),
        "numpyro": lambda **kwargs: nd.Categorical(**kwargs),
        "tfp": lambda **kwargs: tfd.Categorical(**kwargs),
    }[library]
    logits = jnp.array([1e4, -1e4, 0.0])

    def by_logits(z):
        return as_distribution(make(logits=z))

    def by_probs(z):
        return as_distribution(make(probs=jax.nn.softmax(z)))

    np.testing.assert_allclose(by_logits(logits).log_prob(jnp.arange(3)), [0, -2e4, -1e4], rtol=1e-15)
    dist, pullback = jax.vjp(by_probs, logits)
    (gradient,) = pullback(dist.fisher_sqrt_mv(Categorical(jnp.ones(3))))
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.compiled  # thousands of draws, each by a loop
@needs("numpyro")
def test_traced_counts():
    """An integer leaf is data: it is passed on, and has no tangent. Outcomes above it have a probability of zero."""
    counts = np.array([2, 5, 9])
    logits = np.array([0.3, -0.2, 0.9])
    probs = 1 / (1 + np.exp(-logits))

    def one(count, logit):
        def model(z):
            return as_distribution(nd.Binomial(count, logits=z))

        dist, pullback = jax.vjp(model, logit)
        assert dist.fisher_source == COUNTED
        columns = jax.vmap(lambda u: pullback(dist.fisher_sqrt_mv(u))[0])(jnp.eye(dist.fisher_noise().size))
        (fisher,) = pullback(dist.fisher_mv(jax.jvp(model, (logit,), (1.0,))[1]))
        return dist.log_prob(1), jnp.sum(columns**2), fisher

    log_prob, squares, fisher = jax.jit(jax.vmap(one))(counts, logits)
    np.testing.assert_allclose(log_prob, np.log(counts * probs) + (counts - 1) * np.log1p(-probs), rtol=1e-12)
    np.testing.assert_allclose(squares, fisher, rtol=1e-12)
    np.testing.assert_allclose(fisher, counts * probs * (1 - probs), rtol=1e-12)


@needs("numpyro")
def test_counts_beyond_the_sum_come_from_samples():
    """A batch of geometric counts, some far beyond the outcomes that are summed; members of a batch stay independent."""
    probs = jnp.array([0.3, 1e-2, 2e-3, 1e-5])
    dist = as_distribution(nd.Geometric(probs))
    assert dist.fisher_source == "sum over 1024 outcomes, 1024 samples beyond"
    found = evaluated(lambda dist: dist.fisher_matrix(), dist)
    expected = 1 / (probs**2 * (1 - probs))
    assert np.abs(found[0, 0] / expected[0] - 1) < 1e-12
    # The square of the score, of the kurtosis of an exponential variable, has the variance 8.
    assert np.all(np.abs(np.diag(found) / expected - 1) < 5 * np.sqrt(8 / 1024))
    assert np.max(np.abs(found / np.sqrt(np.outer(expected, expected)) - np.eye(4))) < 5 * np.sqrt(8 / 1024)


@needs("numpyro")
@pytest.mark.parametrize("around", [lambda d: d, lambda d: d.expand((3,)), lambda d: d.mask(jnp.array(True))])
def test_a_censored_distribution_has_no_fisher(around):
    model = lambda p: around(nd.RightCensoredDistribution(nd.Exponential(jnp.exp(p)), jnp.array(True)))  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"NumPyro's .* no Fisher: its draws are not censored"):
        jax.eval_shape(jf.exact_fisher(model), jnp.array(0.3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(
            lambda p: nd.EulerMaruyama(jnp.arange(4.0), lambda x, t: (p * x, 1.0 + 0 * x), nd.Normal(0.0, 1.0)),
            *(TypeError, "EulerMaruyama: its log-density reads parameters that are no leaves.* jf.sampled_fisher"),
            marks=needs("numpyro"),
        ),
        pytest.param(
            lambda p: {
                "a": Normal(p, 1.0),
                "b": distrax.MultivariateNormalFromBijector(p[None], distrax.DiagLinear(jnp.ones(1))),
            },
            *(TypeError, "MultivariateNormalFromBijector: its log-density reads parameters that are no leaves"),
            marks=needs("distrax"),
        ),
        pytest.param(lambda p: nd.Delta(p), NotImplementedError, "Delta has no Fisher: .*point mass", marks=needs("numpyro")),
        pytest.param(lambda p: nd.Unit(p), NotImplementedError, "Unit has no Fisher: .*a factor", marks=needs("numpyro")),
        pytest.param(
            *(lambda p: distrax.Deterministic(p), NotImplementedError, "distrax's Deterministic has no Fisher"),
            marks=needs("distrax"),
        ),
        pytest.param(
            *(lambda p: tfd.Deterministic(p), NotImplementedError, "TFP's Deterministic has no Fisher"), marks=needs("tfp")
        ),
        pytest.param(
            *(lambda p: nd.DiscreteUniform(0, 3), TypeError, "a distribution without real parameters"), marks=needs("numpyro")
        ),
    ],
)
def test_what_a_fisher_in_the_fields_cannot_be(make, error, message):
    """The Fisher was zero, or failed inside JAX or the library; log-densities work, and targets can be drawn."""
    for fisher in (jf.exact_fisher, jf.implicit_fisher):
        with pytest.raises(error, match=message):
            jax.eval_shape(fisher(make), jnp.array(0.3))
    if error is TypeError:
        jax.eval_shape(jf.sampled_fisher(make), jnp.array(0.3), jax.random.key(0))


@needs("numpyro")
def test_samples_of_a_moving_support_have_no_fisher():
    """Only the fields by which the support moves are without one."""
    low = as_distribution(nd.TruncatedNormal(0.3, 0.8, low=0.1))
    parts = as_distribution(nd.Pareto(1.5, 2.0)), as_distribution(nd.Uniform(0.0, 2.0)), low
    for dist, moves in zip(parts, (1, 2, 1), strict=True):
        assert dist.fisher_source == SAMPLES
        assert np.sum(np.isnan(np.diag(evaluated(lambda dist: dist.fisher_matrix(), dist)))) == moves
    model = lambda p: nd.TruncatedNormal(p, 0.8, low=0.1)  # noqa: E731
    assert np.all(np.isfinite(evaluated(lambda p: jf.exact_fisher(model)(p).as_matrix(), jnp.array(0.3))))
    edge = lambda p: nd.TruncatedNormal(0.3, 0.8, low=p)  # noqa: E731
    assert np.all(np.isnan(evaluated(lambda p: jf.exact_fisher(edge)(p).as_matrix(), jnp.array(0.1))))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda m, s: distrax.Gumbel(m, s), id="distrax Gumbel", marks=needs("distrax")),
        pytest.param(lambda m, s: distrax.Logistic(m, s), id="distrax Logistic", marks=needs("distrax")),
        pytest.param(lambda m, s: nd.Normal(m, s), id="numpyro Normal", marks=needs("numpyro")),
        pytest.param(lambda m, s: nd.LogNormal(m, s), id="numpyro LogNormal", marks=needs("numpyro")),
        pytest.param(lambda m, s: tfd.Weibull(s, 1 + m**2), id="tfp Weibull", marks=needs("tfp")),
        pytest.param(lambda m, s: tfd.Logistic(m, s), id="tfp Logistic", marks=needs("tfp")),
    ],
)
def test_transformations(make):
    """`vmap` agrees with a loop, jvp and vjp are transposes, B B^T and products agree with F; two objects share a trace."""
    weights = np.array([0.7, -0.3])
    inputs = np.array([[0.2, 1.0], [1.5, -0.4], [-0.6, 0.8]])

    def model(weights, x):
        return as_distribution(make(weights @ x, jnp.exp(0.3 * weights[0] * x[1])))

    def fisher(weights, x):
        dist, pullback = jax.vjp(lambda w: model(w, x), weights)
        _, tangent = jax.jvp(lambda w: model(w, x), (weights,), (jnp.ones(2),))
        noise, unravel = ravel_pytree(dist.fisher_noise())
        columns = jax.vmap(lambda u: pullback(dist.fisher_sqrt_mv(unravel(u)))[0])(jnp.eye(noise.size))
        jacobian = jax.jacfwd(lambda w: flat_fields(model(w, x)))(weights)
        (product,) = pullback(dist.fisher_mv(tangent))
        return columns.T @ columns, jacobian.T @ dist.fisher_matrix() @ jacobian, product

    batched = evaluated(jax.vmap(fisher, (None, 0)), weights, inputs)
    single = traced(fisher)
    looped = [single(weights, x) for x in inputs]
    for many, each in zip(batched, zip(*looped, strict=True), strict=True):
        np.testing.assert_allclose(many, np.stack(each), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(batched[0], batched[1], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(batched[0].sum(axis=-1), batched[2], rtol=1e-11, atol=1e-12)

    traces = []

    @traced
    def density(dist):
        traces.append(dist)
        return dist.log_prob(0.7)

    made, of_weights = traced(model), traced(jax.value_and_grad(lambda w, x: model(w, x).log_prob(0.7)))
    for x in inputs[:2]:
        assert density(made(weights, x)) == pytest.approx(float(of_weights(weights, x)[0]), rel=1e-13)
    assert len(traces) == 1
    assert density(made(weights, inputs[0])) != density(made(weights, inputs[1]))
    _, gradient = of_weights(weights, inputs[0])
    step = 1e-6 * np.array([1.0, 0.0])
    (above, _), (below, _) = of_weights(weights + step, inputs[0]), of_weights(weights - step, inputs[0])
    assert gradient[0] == pytest.approx(float(above - below) / 2e-6, rel=1e-7)


@needs("tfp")
def test_batches_of_wrapped_ones_keep_their_axes(key):
    p = as_distribution(tfd.Gumbel(jnp.asarray(M), jnp.asarray(S)))
    q = as_distribution(tfd.Gumbel(jnp.asarray(M + 0.1), jnp.asarray(S)))
    assert (p.batch_shape, p.event_shape, p.event_ndim) == ((3,), (), 0)
    assert jax.eval_shape(lambda: (p.log_prob(jnp.zeros(3)), p.kl(q), p.sample(key, (4, 2)))) == (
        *[jax.ShapeDtypeStruct((3,), np.float64)] * 2,
        jax.ShapeDtypeStruct((4, 2, 3), np.float64),
    )
    for wrong, seen in ((lambda: p.sample(0), "sample: `key` is 0"), (lambda: p.sample(key, 3), "sample: `shape` is 3")):
        with pytest.raises(TypeError, match=f"Foreign.{seen}"):
            wrong()
    with pytest.raises(TypeError, match=r"Foreign.log_prob: `x` is a sparse BCOO"):
        p.log_prob(sparse.BCOO.fromdense(jnp.zeros(3)))
    mean, joint = evaluated(lambda p: (p.mean, p.fisher_matrix()), p)
    np.testing.assert_allclose(mean, M + np.euler_gamma * S, rtol=1e-12)
    single = evaluated(jax.vmap(lambda m, s: as_distribution(tfd.Gumbel(m, s)).fisher_matrix()), M, S)
    joint = joint.reshape(2, 3, 2, 3)
    for i in range(3):
        for j in range(3):
            expected = single[i] if i == j else np.zeros((2, 2))
            np.testing.assert_allclose(joint[:, i, :, j], expected, atol=1e-12 * np.max(single[0]))
    assert repr(p) == "Foreign(TFP's Gumbel: float64[3], float64[3])"


@needs("tfp")
def test_a_root_of_fields_in_very_different_units():
    """Rounding is judged after scaling: a field of scale 1e-12 beside one of scale 1 is not lost."""
    dist = as_distribution(tfd.Weibull(2.0, 1e12))
    fisher = evaluated(lambda dist: dist.fisher_matrix(), dist)
    assert float(fisher[1, 1]) == pytest.approx(4e-24, rel=1e-12)  # (concentration / scale)^2


@needs("tfp")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_singular_and_saturated(dtype):
    """A one-hot categorical: the constant direction is exactly flat, and a saturated one is zero, not NaN."""
    program = jax.jit if dtype == jnp.float32 else traced
    fisher = program(lambda z: as_distribution(tfd.OneHotCategorical(z)).fisher_matrix())
    for logits in ([0.3, -1.0, 0.5], [1e4, -1e4, 0.0], [40.0, 0.0, -3.0]):
        z = jnp.array(logits, dtype)
        np.testing.assert_allclose(fisher(z), Categorical(z).fisher_matrix(), atol=10 * float(jnp.finfo(dtype).eps))
        assert fisher(z).dtype == dtype
    assert as_distribution(tfd.OneHotCategorical(z)).fisher_source == THREE


@needs("numpyro")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_sum_over_outcomes_at_the_ends_of_the_range(dtype):
    """Predictions far outside the cutpoints: outcomes of probability zero add nothing, and nothing is NaN."""
    cuts = jnp.array([-1.0, 0.5, 2.0], dtype)
    model = lambda theta: nd.OrderedLogistic(theta, cuts)  # noqa: E731
    program = jax.jit if dtype == jnp.float32 else traced
    trace = program(lambda theta: jf.exact_fisher(model)(theta).trace())
    divergence = program(jax.value_and_grad(lambda q, p: jf.kl(model)(p, q)))
    for theta in (0.3, -3.0, 20.0, 1e3, -1e4):
        theta = jnp.asarray(theta, dtype)
        edges = np.concatenate([[1.0], 1 / (1 + np.exp(np.clip(np.asarray(cuts, float) - float(theta), -700, 700))), [0.0]])
        slopes = np.diff(edges * (1 - edges))
        shares = -np.diff(edges)
        expected = np.sum(np.square(slopes)[shares > 0] / shares[shares > 0])
        np.testing.assert_allclose(trace(theta), expected, rtol=1e-4, atol=10 * float(jnp.finfo(dtype).eps))
        value, slope = divergence(theta, theta)
        assert value == 0 and abs(slope) <= 10 * float(jnp.finfo(dtype).eps)
    near = divergence(jnp.asarray(0.3 + 1e-3, dtype), jnp.asarray(0.3, dtype))[0]
    np.testing.assert_allclose(near, 0.5e-6 * trace(jnp.asarray(0.3, dtype)), rtol=2e-3)


@needs("numpyro")
def test_independent_parts_of_a_wrapped_one_are_a_batch():
    """Each part is summed over its own outcomes, three times four of them, and not four to the third."""
    predictions, cuts = jnp.array([0.3, -0.4, 1.0]), jnp.array([-0.7, 0.2, 1.1])
    joint = as_distribution(nd.OrderedLogistic(predictions, cuts).to_event(1))
    assert (joint.batch_shape, joint.fisher_source) == ((3,), FOUR)
    model = lambda p, x: nd.OrderedLogistic(p["w"] * x, p["cuts"]).to_event(1)  # noqa: E731
    params = {"w": jnp.ones(()), "cuts": cuts}
    of_one = lambda p, x: nd.OrderedLogistic(p["w"] * x, p["cuts"])  # noqa: E731
    parts = evaluated(lambda params, x: jf.exact_fisher(of_one)(params, x).as_matrix(), params, predictions)
    whole = evaluated(lambda params, x: jf.exact_fisher(model)(params, x).as_matrix(), params, predictions[None])
    np.testing.assert_allclose(whole, 3 * parts, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tfd.Uniform(0.0, 2.0), id="tfp", marks=needs("tfp")),
        pytest.param(lambda: distrax.Uniform(0.0, 2.0), id="distrax", marks=needs("distrax")),
    ],
)
def test_a_moving_support_has_no_fisher(make):
    dist = as_distribution(make())
    assert dist.fisher_source == KL
    assert np.all(np.isnan(evaluated(lambda dist: dist.fisher_matrix(), dist)))


@needs("tfp")
def test_a_support_that_stands_still_takes_no_part():
    """The support of a Pareto distribution moves with its scale, and here only the shape moves."""
    F = evaluated(lambda shape: jf.exact_fisher(lambda a: tfd.Pareto(a, 1.3))(shape).as_matrix(), jnp.array(2.5))
    np.testing.assert_allclose(F, [[2.5**-2]], rtol=1e-13)
    both = evaluated(lambda p: jf.exact_fisher(lambda p: tfd.Pareto(2.5, p))(p).as_matrix(), jnp.array(1.3))
    assert np.all(np.isnan(both))


@needs("distrax")
def test_a_blind_kl_is_refused():
    """distrax takes two bijectors with different parameters for the same one."""

    def make(shift):
        return distrax.Transformed(distrax.Normal(0.0, 1.0), distrax.ScalarAffine(shift, jnp.ones(2)))

    p, q = make(jnp.zeros(2)), make(jnp.array([5.0, 5.0]))
    assert p.kl_divergence(q) == 0  # 12.5 for each of the two is right
    with pytest.raises(NotImplementedError, match=r"does not read .* fields that its density reads.*monte_carlo_kl"):
        as_distribution(p).kl(as_distribution(q))


@needs("numpyro")
def test_messages_of_what_a_library_lacks():
    p = as_distribution(nd.LogNormal(0.0, 1.0))
    with pytest.raises(NotImplementedError, match=r"No KL from NumPyro's LogNormal to NumPyro's LogNormal: .*no rule"):
        p.kl(p)
    with pytest.raises(TypeError, match=r"Foreign.kl: expected another Foreign, got Normal.*monte_carlo_kl"):
        p.kl(Normal(0.0, 1.0))
    transformed = as_distribution(nd.TransformedDistribution(nd.Normal(0.0, 1.0), nd.transforms.ExpTransform()))
    with pytest.raises(NotImplementedError, match=r"NumPyro's TransformedDistribution has no mean"):
        _ = transformed.mean


class Sure(*([nd.Distribution] if "numpyro" not in MISSING else [object])):
    """A user's class with a leaf that is no array."""

    def tree_flatten(self):
        return ("text",), ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jnp.zeros((3, 2)), r"an array of shape \(3, 2\) and dtype float64"),
        (lambda: np.zeros(2, np.int32), r"an array of shape \(2,\) and dtype int32"),
        (lambda: (jnp.zeros(3), jnp.ones(3)), r"a tuple of \(an array of shape \(3,\)"),
        (lambda: None, r"None \(a missing `return`\?\)"),
        (lambda: Normal, r"the class Normal itself"),
        (lambda: 0.5, r"an object of type builtins.float"),
        pytest.param(lambda: tfp.bijectors.Exp(), r"type tensorflow_probability", marks=needs("tfp")),
        pytest.param(lambda: distrax.Tanh(), r"type distrax", marks=needs("distrax")),
        pytest.param(lambda: nd.transforms.ExpTransform(), r"type numpyro", marks=needs("numpyro")),
        pytest.param(
            lambda: tfd.JointDistributionSequential([tfd.Normal(0.0, 1.0), tfd.Normal(0.0, 1.0)]),
            r"TFP's JointDistributionSequential is over several targets",
            marks=needs("tfp"),
        ),
        pytest.param(
            lambda: distrax.Joint({"a": distrax.Normal(0.0, 1.0), "b": distrax.Normal(0.0, 1.0)}),
            r"distrax's Joint is over several targets",
            marks=needs("distrax"),
        ),
        pytest.param(
            lambda: distrax.Independent(tfd.Normal(jnp.zeros(2), 1.0), 1),
            r"distrax's Independent cannot be used: DistributionFromTFP in it has no leaves.*one library",
            # TFP warns about the way in which distrax derives from its classes.
            marks=[needs("distrax"), pytest.mark.filterwarnings("ignore::UserWarning:tensorflow_probability")],
        ),
        pytest.param(lambda: Sure(), r"NumPyro's Sure cannot be used: .*a leaf of type str", marks=needs("numpyro")),
    ],
)
def test_anything_else_is_refused(make, message):
    with pytest.raises(TypeError, match=message) as caught:
        as_distribution(make())
    assert "A model returns a distribution over one target: one of jaxfisher's (jf.Categorical(logits=...)" in str(caught.value)
    assert "distrax, NumPyro or TFP-on-JAX" in str(caught.value)


def test_ours_comes_back_as_it_is():
    dist = Beta(1.5, 2.0)
    assert as_distribution(dist) is dist
    assert dist.fisher_source == "closed form"


@needs("numpyro")
def test_a_subclass_is_not_taken_for_its_base():
    class Shifted(nd.Normal):
        def log_prob(self, value):
            return super().log_prob(value - 1.0)

    dist = as_distribution(Shifted(0.0, 1.0))
    assert isinstance(dist, Foreign)
    assert dist.log_prob(1.0) == pytest.approx(-0.5 * np.log(2 * np.pi))


def test_nothing_foreign_is_imported():
    """The check runs in a separate process. It notices a later import of a library, so it can fail."""
    names = "('distrax', 'numpyro', 'tensorflow_probability')"
    look = f"print(sorted(name for name in {names} if name in sys.modules))"
    code = (
        f"import sys, jaxfisher, jaxfisher._distributions.foreign as f; f.as_distribution(jaxfisher.Normal(0.0, 1.0)); {look}"
    )
    expected = "[]\n"
    if "numpyro" not in MISSING:
        code, expected = f"{code}; import numpyro; {look}", expected + "['numpyro']\n"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == expected
