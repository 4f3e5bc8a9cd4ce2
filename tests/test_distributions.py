"""Distributions: every law for every family, and further promises of single families."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from families import CASES
from jax.flatten_util import ravel_pytree
from laws import (
    check_extremes,
    check_family,
    check_information,
    check_narrow_dtype,
    check_samples,
    close,
    expected_hessian,
    log_prob_and_gradient,
    scores,
)
from others import library
from problems import assert_close
from programs.evaluate import evaluated, traced

import jaxfisher as jf
from jaxfisher._distributions.base import Distribution, family


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_family(case, key):
    check_family(case, key)


# --- the laws themselves --------------------------------------------------------------------------------------------------


@family
class FisherWithoutTheTwo(jf.Normal):
    def fisher_sqrt_mv(self, u):
        return self._make(u.loc / self.scale, u.scale / self.scale)


@family
class RootWithAnOffset(jf.Normal):
    def fisher_sqrt_mv(self, u):
        return self._make(u.loc / self.scale + 1, 2**0.5 * u.scale / self.scale)


@family
class UnnormalisedDensity(jf.Normal):
    def log_prob(self, x):
        return -0.5 * jnp.square((x - self.loc) / self.scale) - jnp.log(self.scale)


@family
class ReversedDivergence(jf.Normal):
    def kl(self, other):
        return jf.Normal.kl(other, self)


@family
class DivergenceThatCancels(jf.Normal):
    def kl(self, other):
        square = jnp.square(self.scale) + jnp.square(self.loc - other.loc)
        return jnp.log(other.scale) - jnp.log(self.scale) + square / (2 * jnp.square(other.scale)) - 0.5


@family
class MeanOfAnother(jf.Laplace):
    @property
    def mean(self):
        return self.loc + 1e-6 * self.scale


@family
class ScaleForVariance(jf.Normal):
    @property
    def variance(self):
        return self.scale


@family
class MedianForMode(jf.Exponential):
    @property
    def mode(self):
        return math.log(2.0) * jnp.exp(-self.log_rate)


@family
class EntropyInBits(jf.Normal):
    def entropy(self):
        return jf.Normal.entropy(self) / math.log(2.0)


@family
class PlainQuotient(jf.Normal):
    def log_prob(self, x):
        return -0.5 * jnp.square((x - self.loc) / self.scale) - jnp.log(self.scale) - 0.9189385332046727


@family
class LosesItsDtype(jf.Normal):
    def log_prob(self, x):
        return jf.Normal.log_prob(self, x).astype(jnp.float32)


@family
class VarianceForScale(jf.Normal):
    def sample(self, key, shape=()):
        wrong = jnp.sqrt(self.scale)
        return jf.Normal(self.loc, wrong).sample(key, shape)


@family
class OneDrawForTheBatch(jf.Normal):
    def sample(self, key, shape=()):
        noise = jax.random.normal(key, (*shape, 1), self.loc.dtype)
        return jnp.broadcast_to(self.loc, shape + self.loc.shape) + self.scale[None] * noise


BROKEN = [
    (FisherWithoutTheTwo, check_information, "is the Fisher"),
    (RootWithAnOffset, check_information, "fisher_mv is the Fisher's product|the root in the fields"),
    (UnnormalisedDensity, check_information, "the density sums to one"),
    (ReversedDivergence, check_information, "kl is E"),
    (MeanOfAnother, check_information, "mean is the expectation"),
    (ScaleForVariance, check_information, "variance is the expected square"),
    (MedianForMode, check_information, "more probable than the mode"),
    (EntropyInBits, check_information, "entropy is -E"),
    (DivergenceThatCancels, check_narrow_dtype, "keeps its digits"),
    (LosesItsDtype, check_narrow_dtype, "float64 is kept|bfloat16 is kept"),
    (PlainQuotient, check_extremes, "NaN from finite input"),
    (VarianceForScale, check_samples, "the second moment of draws"),
    (OneDrawForTheBatch, check_samples, "independent"),
]


@pytest.mark.parametrize(("broken", "law", "message"), BROKEN, ids=[broken.__name__ for broken, _, _ in BROKEN])
def test_the_laws_see_a_broken_family(broken, law, message, key):
    sound = next(case for case in CASES if issubclass(broken, case.family))
    with pytest.raises(AssertionError, match=message):
        law(dataclasses.replace(sound, family=broken), *([key] if law is check_samples else []))


# --- where the identities of the Fisher end ---------------------------------------------------------------------------------


def test_laplace_has_the_score_route_but_not_the_hessian_route():
    case = next(case for case in CASES if case.family is jf.Laplace)
    p, rule = case.make(), case.rule()
    nodes, weights = rule.nodes, rule.weights
    closed = np.eye(2) / float(p.scale) ** 2
    mass = weights * np.exp(evaluated(jax.vmap(p.log_prob), nodes))
    rows = np.where(mass[:, None] > 0, evaluated(scores, p, nodes), 0)
    close(rows.T @ (mass[:, None] * rows), closed, "score route")
    close(p.fisher_matrix(), closed, "closed form", factor=10)
    hessian = -evaluated(expected_hessian, p, nodes, weights)
    close(hessian, np.diag([0.0, closed[1, 1]]), "the kink's point mass is lost, and loc with it")


@family
class Uniform(Distribution):
    """Uniform on ``[0, width]``: a support that moves with its parameter."""

    width: jax.Array

    field_ndims = (0,)
    event_ndim = 0

    def log_prob(self, x):
        return jnp.where((x >= 0) & (x <= self.width), -jnp.log(self.width), -jnp.inf)

    def kl(self, other):
        return jnp.where(other.width >= self.width, jnp.log(other.width) - jnp.log(self.width), jnp.inf)


def test_a_support_that_moves_has_no_fisher():
    p = Uniform(2.0)
    nodes = np.linspace(0.01, 1.99, 7)  # the score is constant on the support, so any nodes give its expectation
    rows = evaluated(scores, p, nodes)
    close(rows, np.full((7, 1), -0.5), "the score is -1/width: its mean is not zero", factor=4)
    mass = np.full(7, 1 / 7) / np.exp(p.log_prob(nodes))
    close(
        -evaluated(expected_hessian, p, nodes, mass),
        [[-0.25]],
        "minus the Hessian is -1/width^2, the second moment +1/width^2",
        factor=10,
    )
    # No quadratic form fits the divergence: it rises from zero with slope 1/width on one side and is infinite on the other.
    close(p.kl(Uniform(2.0 + 1e-6)) / 1e-6, 0.5, "slope", factor=1e10)
    assert p.kl(Uniform(2.0 - 1e-6)) == jnp.inf


# --- other libraries ------------------------------------------------------------------------------------------------------

NUMPYRO, DISTRAX = "numpyro.distributions", "distrax"

# (our family, the other library, its counterpart from the same fields, whether it has this KL)
ELSEWHERE = [
    (jf.Normal, NUMPYRO, lambda lib, loc, scale: lib.Normal(loc, scale), True),
    (jf.Normal, DISTRAX, lambda lib, loc, scale: lib.Normal(loc, scale), True),
    (jf.Laplace, NUMPYRO, lambda lib, loc, scale: lib.Laplace(loc, scale), False),
    (jf.Laplace, DISTRAX, lambda lib, loc, scale: lib.Laplace(loc, scale), True),
    (jf.Bernoulli, NUMPYRO, lambda lib, logits: lib.Bernoulli(logits=logits), False),
    (jf.Bernoulli, DISTRAX, lambda lib, logits: lib.Bernoulli(logits=logits), True),
    (jf.Categorical, NUMPYRO, lambda lib, logits: lib.Categorical(logits=logits), False),
    (jf.Categorical, DISTRAX, lambda lib, logits: lib.Categorical(logits=logits), True),
    (jf.Poisson, NUMPYRO, lambda lib, log_rate: lib.Poisson(jnp.exp(log_rate)), False),
    (jf.Exponential, NUMPYRO, lambda lib, log_rate: lib.Exponential(jnp.exp(log_rate)), False),
    (jf.MultivariateNormal, NUMPYRO, lambda lib, loc, tril: lib.MultivariateNormal(loc, scale_tril=jnp.tril(tril)), True),
    (jf.MultivariateNormal, DISTRAX, lambda lib, loc, tril: lib.MultivariateNormalTri(loc, jnp.tril(tril)), True),
]


@pytest.mark.usefixtures("in_numpy")
@pytest.mark.relaxed
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorflow_probability|distrax|numpyro)")
@pytest.mark.filterwarnings("ignore::FutureWarning:(tensorflow_probability|distrax|numpyro)")
@pytest.mark.parametrize(
    ("ours", "name", "theirs", "has_kl"), ELSEWHERE, ids=[f"{ours.__name__}, {name}" for ours, name, _, _ in ELSEWHERE]
)
def test_agrees_with_other_libraries(ours, name, theirs, has_kl):
    lib = library(name)
    case = next(case for case in CASES if case.family is ours)
    p, q = case.make(), case.make_other()
    p_theirs, q_theirs = (theirs(lib, *jax.tree.leaves(one)) for one in (p, q))
    nodes = case.rule().nodes
    log_p = evaluated(jax.vmap(p.log_prob), nodes)
    there = log_p > -100
    close(log_p[there], evaluated(jax.vmap(p_theirs.log_prob), nodes)[there], "log_prob", factor=1e3)
    if has_kl:
        divergence = evaluated(
            lambda: (lib.kl_divergence if name == NUMPYRO else type(p_theirs).kl_divergence)(p_theirs, q_theirs)
        )
        close(evaluated(p.kl, q), divergence, "kl", factor=1e3)


# --- promises of single families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [1e4, -1e4])
def test_a_certain_bernoulli_is_exact(logits):
    certain = jf.Bernoulli(jnp.float32(logits))
    likely = int(logits > 0)
    assert certain.log_prob(likely) == 0
    assert certain.log_prob(1 - likely) == -1e4
    assert certain.kl(jf.Bernoulli(jnp.float32(-logits))) == 1e4
    assert certain.kl(certain) == 0
    assert certain.fisher_matrix() == 0
    assert certain.mean == likely


@pytest.mark.parametrize("end", [jnp.inf, -jnp.inf])
def test_infinite_logits_are_probabilities_of_zero_and_one(end):
    certain, fair = jf.Bernoulli(end), jf.Bernoulli(0.0)
    assert certain.kl(certain) == 0
    close(certain.kl(fair), np.log(2), "log 2", factor=4)
    assert fair.kl(certain) == jnp.inf


def test_a_poisson_of_a_million_keeps_its_digits_in_float32():
    rate, counts = 1e6, np.array([998_000, 1_000_000, 1_003_000])
    log_rate = np.float32(np.log(rate))
    ours = jax.jit(lambda p, k: p.log_prob(k))(jf.Poisson(jnp.full(3, log_rate)), jnp.asarray(counts))
    exact = scipy.stats.poisson(np.exp(float(log_rate))).logpmf(counts)
    # log k is rounded to 14 eps/2 in d = log r - log k, and k d^2/2 moves by k |d| of that: 0.002 at three deviations.
    np.testing.assert_allclose(ours, exact, atol=3000 * 14 * 6e-8, rtol=0)


@pytest.mark.parametrize(
    ("kind", "fields", "x"),
    [
        (jf.Gamma, (0.2, 17.7), 1e-25),
        (jf.Gamma, (8e-3, 1.2e-5), 1e-25),
        (jf.Gamma, (2.0, 1e10), 1e20),
        (jf.Beta, (3.6e-4, 0.025), 1e-30),
        (jf.Beta, (1e-2, 2.5), 1e-30),
        (jf.Dirichlet, ((1e-3, 2.0, 0.1),), (1e-30, 0.25, 0.75)),
    ],
)
def test_second_derivatives_far_from_the_mean(kind, fields, x):
    """Small concentrations draw numbers such as 1e-30: in float32 the Hessian of the log-density is that of float64."""
    for dtype in (jnp.float32, jnp.float64):
        point = [jnp.asarray(field, dtype) for field in fields]
        found = traced(jax.hessian(lambda p, x: kind(*p).log_prob(x)))(point, jnp.asarray(x, dtype))
        if dtype == jnp.float32:
            narrow = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])
    wide = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])
    np.testing.assert_allclose(narrow, wide, rtol=1e-4)


@pytest.mark.usefixtures("in_numpy")
@pytest.mark.parametrize("bad", [-1, 3, 0.5, jnp.nan])
def test_a_label_that_is_no_class_is_nan_in_value_and_gradient(bad):
    value, gradient = jax.value_and_grad(lambda z: jf.Categorical(z).log_prob(jnp.asarray(bad)))(jnp.zeros(3))
    assert jnp.isnan(value)
    assert jnp.all(jnp.isnan(gradient))


@pytest.mark.parametrize("case", [c for c in CASES if c.family is not jf.Categorical], ids=lambda case: case.name)
def test_a_nan_target_is_not_hidden(case):
    p = case.make()
    value, gradient = log_prob_and_gradient(p, np.full(p.event_shape, np.nan))
    assert np.isnan(value)
    assert all(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_of_any_implementation_draw(implementation):
    for case in CASES:
        p, key = case.make(batch=(2,)), jax.random.key(0, impl=implementation)
        draws = jax.eval_shape(lambda p, key: p.sample(key, (3,)), p, key)
        assert draws.shape == (3, 2, *p.event_shape), case.name


def test_what_stands_above_the_diagonal_is_ignored(key):
    case = next(case for case in CASES if case.family is jf.MultivariateNormal)
    p, q = case.make(), case.make_other()
    clean_p, clean_q = (jf.MultivariateNormal(one.loc, jnp.tril(one.scale_tril)) for one in (p, q))
    x = jnp.array([0.3, -0.2])
    members = jax.jit(lambda p, q: (p.log_prob(x), p.kl(q), p.sample(key, (4,)), p.fisher_matrix()))
    for junk, clean in zip(members(p, q), members(clean_p, clean_q), strict=True):
        np.testing.assert_array_equal(junk, clean)


# --- errors ---------------------------------------------------------------------------------------------------------------

MISTAKES = [
    (lambda: jf.Normal(jnp.zeros(2), jnp.ones(3)), ValueError, r"Normal: .*loc \(2,\), scale \(3,\).*equal shape"),
    (lambda: jf.Laplace(jnp.zeros((2, 1)), jnp.ones((3, 2))), ValueError, r"Laplace: .*loc \(2, 1\), scale \(3, 2\)"),
    (lambda: jf.Bernoulli(1j), TypeError, "Bernoulli: `logits` is complex.*real"),
    (lambda: jf.Exponential(None), TypeError, "Exponential: `log_rate` is None; expected a number or an array"),
    (lambda: jf.Normal("0", 1.0), TypeError, "Normal: `loc` is '0'; expected a number or an array"),
    (
        lambda: jf.Categorical(jnp.zeros(3)).kl(jf.Categorical(jnp.zeros(4))),
        ValueError,
        r"Categorical.kl: .*different spaces: .*\[3\].*\[4\].*same number",
    ),
    (lambda: jf.Poisson(jnp.zeros(2, complex)), TypeError, "Poisson: `log_rate` is complex"),
    (lambda: jf.Categorical(0.0), ValueError, r"Categorical: `logits` has shape \(\).*at least 1 ax"),
    (lambda: jf.Categorical(jnp.zeros((3, 0))), ValueError, r"Categorical: `logits` .*no classes.*one logit per class"),
    (lambda: jf.Categorical(), TypeError, "neither of `logits` and `probs`; give one"),
    (lambda: jf.Bernoulli(0.0, probs=0.5), TypeError, "both of `logits` and `probs`; give one"),
    (lambda: jf.Poisson(), TypeError, "neither of `log_rate` and `rate`; give one"),
    (lambda: jf.MultivariateNormal(jnp.zeros(2)), TypeError, "neither of `scale_tril` and `covariance`; give one"),
    (lambda: jf.Poisson(0.0).entropy(), NotImplementedError, r"Poisson.entropy.*closed form.*p.sample"),
    (
        lambda: jf.MultivariateNormal(np.zeros(2), covariance=np.ones((2, 2))),
        ValueError,
        "`covariance` has the eigenvalue .*definite",
    ),
    (lambda: jf.MultivariateNormal(np.zeros(2), covariance=np.tri(2)), ValueError, "`covariance` is not symmetric.*L @ L.T"),
    (lambda: jf.MultivariateNormal(0.0, jnp.eye(2)), ValueError, r"`loc` has shape \(\).*at least 1 ax"),
    (lambda: jf.MultivariateNormal(jnp.zeros(2), jnp.ones(2)), ValueError, r"`scale_tril` has shape \(2,\).*at least 2 axes"),
    (lambda: jf.MultivariateNormal(jnp.zeros(2), jnp.ones((2, 3))), ValueError, r"\(2,\).*\(2, 3\).*\[\*batch, 2, 2\]"),
    (lambda: jf.MultivariateNormal(jnp.zeros(3), jnp.eye(2)), ValueError, r"\(3,\).*\(2, 2\).*\[\*batch, 3, 3\]"),
    (lambda: jf.MultivariateNormal(jnp.zeros(2), jnp.eye(2)).log_prob(0.0), ValueError, r"`x` has shape \(\).*length 2"),
    (lambda: jf.Normal(0.0, 1.0).kl(jf.Laplace(0.0, 1.0)), TypeError, "Normal.kl: .*got Laplace.*monte_carlo_kl"),
    (lambda: jf.Exponential(0.0).kl(jf.Poisson(0.0)), TypeError, "Exponential.kl: .*got Poisson"),
]


# (name of the field, the distribution with a value of it, a target)
POSITIVE = [
    ("scale", lambda v: jf.Normal(0.0, v), 0.5),
    ("scale", lambda v: jf.Laplace(0.0, v), 0.5),
    ("df", lambda v: jf.StudentT(v, 0.0, 1.0), 0.5),
    ("scale", lambda v: jf.StudentT(4.0, 0.0, v), 0.5),
    ("concentration", lambda v: jf.Gamma(v, 1.0), 0.5),
    ("rate", lambda v: jf.Gamma(1.0, v), 0.5),
    ("a", lambda v: jf.Beta(v, 1.0), 0.5),
    ("b", lambda v: jf.Beta(1.0, v), 0.5),
    ("concentration", lambda v: jf.Dirichlet(v * np.array([1.0, 2.0])), (0.5, 0.5)),
    ("scale_tril", lambda v: jf.MultivariateNormal(np.zeros(2), v * np.eye(2)), (0.5, 0.5)),
]


@pytest.mark.usefixtures("in_numpy")
@pytest.mark.parametrize(("name", "make", "target"), POSITIVE)
def test_what_must_be_positive_and_is_not(name, make, target):
    """A known value is refused; a run-time value gives NaN in all that is computed from it, such as the Fisher."""
    for bad in (-1.0, 0.0, np.float64(-2.0)):
        with pytest.raises(ValueError, match=rf"`{name}` holds -?\d.*above zero.*jnp.exp"):
            make(bad)

    @traced
    def everything(value):
        p = make(value)
        return p.log_prob(jnp.asarray(target)), p.sample(jax.random.key(0)), p.kl(p), jnp.trace(p.fisher_matrix())

    for value in everything(np.array(-1.0)):
        assert np.any(np.isnan(value)), value
    assert all(np.all(np.isfinite(value)) for value in everything(np.array(1.0)))


@pytest.mark.parametrize(("make", "error", "message"), MISTAKES, ids=[message[:40] for _, _, message in MISTAKES])
def test_a_mistake_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integers_become_the_default_float_and_scalars_broadcast():
    p = jf.Normal(0, jnp.array([1.0, 2.0], jnp.float32))
    assert (p.loc.shape, p.loc.dtype) == ((2,), jnp.float32)
    assert jf.Poisson(3).log_rate.dtype == jnp.result_type(float)
    assert jf.Poisson(jnp.array([3])).log_rate.dtype == jnp.result_type(float)


def test_literals_and_arrays_share_one_trace():
    traces = 0

    @jax.jit
    def kl(p, q):
        nonlocal traces
        traces += 1
        return p.kl(q)

    first = kl(jf.Normal(0.0, 1.0), jf.Normal(1, 1))
    second = kl(jf.Normal(jnp.zeros(()), jnp.ones(())), jf.Normal(jnp.ones(()), jnp.ones(())))
    assert first == second == 0.5
    assert traces == 1


@pytest.mark.usefixtures("in_numpy")
def test_fields_given_in_another_way_are_the_same_distribution(key):
    """The fields are given by probabilities, a rate, or a covariance."""
    covariance = np.array([[2.0, 0.3], [0.3, 0.5]])
    probs = np.array([0.2, 0.5, 0.3])
    for made, expected in (
        (jf.Categorical(probs=probs).probs, probs),
        (jf.Bernoulli(probs=0.3).mean, 0.3),
        (jf.Poisson(rate=2.5).mean, 2.5),
        (jf.MultivariateNormal(jnp.zeros(2), covariance=covariance).scale_tril, np.linalg.cholesky(covariance)),
        (jf.MultivariateNormal(jnp.zeros(2), covariance=covariance).covariance, covariance),
    ):
        np.testing.assert_allclose(made, expected, rtol=1e-15)


def test_a_field_that_does_not_move_has_no_rows():
    """The fields that move are known at trace time, also through calls. One without a derivative by the parameters does not."""

    def rows(model, params):
        return jax.eval_shape(jf.exact_fisher(model), params, jnp.ones((3, 2))).form.scores.num_rows // 3

    mean = jax.jit(lambda w, x: (w @ x, 2.0))
    w, s = jnp.ones(2), jnp.ones(())
    assert rows(lambda w, x: jf.Normal(w @ x, 1.0), w) == 1
    assert rows(lambda w, x: jf.Normal(*mean(w, x)), w) == 1
    assert rows(lambda w, x: jf.Normal(w * x, jax.lax.stop_gradient(jnp.exp(w))), w) == 2
    assert rows(lambda w, x: jf.Normal(w @ x, jnp.exp(w[0])), w) == 2
    assert rows(lambda s, x: jf.Gamma(2.0, jnp.exp(s * x[0])), s) == 1
    assert rows(lambda s, x: jf.Gamma(jnp.exp(s * x[0]), 2.0), s) == 1
    assert rows(lambda s, x: jf.StudentT(3.0, s * x[0], jnp.exp(s)), s) == 2
    assert rows(lambda w, x: jf.MultivariateNormal(w * x, jnp.eye(2)), w) == 2
    assert rows(lambda w, x: jf.MultivariateNormal(x, jnp.diag(jnp.exp(w))), w) == 3
    assert rows(lambda w, x: jf.Normal(x[0], 1.0), w) == 2, "where nothing moves the Fisher is zero, and there to see"


def test_the_fisher_is_the_same_where_a_field_stands_still():
    x = np.linspace(-1.0, 1.0, 6).reshape(3, 2)
    for kind, at in ((jf.Gamma, 0), (jf.Gamma, 1), (jf.Beta, 1), (jf.StudentT, 0), (jf.StudentT, 2)):
        others = [1.5, 2.5, 0.5][: len(kind.field_ndims)]

        def model(w, x, kind=kind, at=at, others=others):
            return kind(*others[:at], jnp.exp(w @ x), *others[at + 1 :])

        def where_all_move(w, x, model=model):
            slopes = jax.jacfwd(lambda w: ravel_pytree(model(w, x))[0])(w)
            return slopes.T @ model(w, x).fisher_matrix() @ slopes

        w = np.array([0.3, -0.4])
        found = evaluated(lambda w, x, model=model: jf.exact_fisher(model)(w, x).as_matrix(), w, x)
        expected = np.mean(evaluated(jax.vmap(where_all_move, (None, 0)), w, x), 0)
        assert_close(found, expected, factor=1e4)


@pytest.mark.usefixtures("in_numpy")
def test_a_covariance_has_a_row_for_each_entry_of_its_triangle():
    model = lambda p: jf.MultivariateNormal(p["loc"], p["tril"])  # noqa: E731
    F = jax.eval_shape(jf.exact_fisher(model), {"loc": jnp.zeros(4), "tril": jnp.eye(4)})
    assert F.form.scores.num_rows == 4 + 10


ROUND = {
    "Normal": (2, lambda a: jf.Normal(a[0], jnp.exp(a[1])), (0.0, 1.0)),
    "Bernoulli": (1, lambda a: jf.Bernoulli(a[0]), (0, 1)),
    "Categorical": (3, jf.Categorical, (0, 1)),
    "Poisson": (1, lambda a: jf.Poisson(a[0]), (0, 1, 2)),
    "Exponential": (1, lambda a: jf.Exponential(a[0]), (0.0, 1.0)),
    "Laplace": (2, lambda a: jf.Laplace(a[0], jnp.exp(a[1])), (0.5, 3.0)),
    "Gamma": (2, lambda a: jf.Gamma(jnp.exp(a[0]), jnp.exp(a[1])), (1.0, 2.0)),
    "Beta": (2, lambda a: jf.Beta(jnp.exp(a[0]), jnp.exp(a[1])), (0.25, 0.5)),
    "Dirichlet": (3, lambda a: jf.Dirichlet(jnp.exp(a)), ((0.25, 0.25, 0.5),)),
    "StudentT": (3, lambda a: jf.StudentT(jnp.exp(a[0]), a[1], jnp.exp(a[2])), (0.0, 1.0)),
    "NegativeBinomial": (2, lambda a: jf.NegativeBinomial(a[0], a[1]), (0, 1, 2)),
}
"""Each family by real numbers, with targets of which the density is differentiated."""


@pytest.mark.parametrize("name", ROUND)
def test_derivatives_at_round_numbers_are_those_beside_them(name):
    """At round numbers two logarithms are equal, or one is zero, and formulas change from one branch to another.

    The first two derivatives along a line are compared with their means over two points beside.
    """
    size, make, targets = ROUND[name]
    along = np.cos(np.arange(2 * size) + 0.5)

    def views(a):
        p, q = make(a[:size]), make(a[size:])
        flat, unravel = ravel_pytree(p)
        root = ravel_pytree(p.fisher_sqrt_mv(unravel(jnp.sin(1 + jnp.arange(flat.size, dtype=float)))))[0]
        return jnp.stack([*(p.log_prob(jnp.asarray(y)) for y in targets), jnp.sum(jnp.square(root)), p.kl(q)])

    def twice(a):
        slopes = lambda t: jax.jvp(lambda t: views(a + t * along), (t,), (1.0,))[1]  # noqa: E731
        return jnp.stack(jax.jvp(slopes, (0.0,), (1.0,)))

    numbers = np.stack(np.meshgrid(*[(0.0, 1.0, 2.0)] * min(2 * size, 4), indexing="ij"), -1).reshape(81 if size > 1 else 9, -1)
    at = np.tile(numbers, 3)[:, : 2 * size]
    beside = 1e-6 * along
    found = traced(jax.vmap(twice))(np.concatenate([at, at + beside, at - beside]))
    here, one, two = np.split(found, 3)
    mean = 0.5 * (one + two)
    wrong = np.argwhere(np.abs(here - mean) > 1e-5 * (1 + np.max(np.abs(mean), 2, keepdims=True)))
    assert not len(wrong), f"at {at[wrong[0][0]]}: {here[tuple(wrong[0])]}, beside it {mean[tuple(wrong[0])]}"
