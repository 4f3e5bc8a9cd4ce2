"""Spectra and effective dimensions against numpy in float64; the verdict against closed forms, and on models that are wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from others import library

import jaxfisher as jf
from jaxfisher._distributions.base import family

pytestmark = pytest.mark.usefixtures("in_numpy")

ZERO, QUOTIENT, HESSIAN, MEAN, SQUARE = range(5)
"""The checks, in the order of the table."""


def linear(w, x):
    """Unit-noise linear regression: the exact Fisher is X^T X / n."""
    return jf.Normal(jnp.dot(x, w, precision="highest"), jnp.ones((), x.dtype))


fisher_of = jax.jit(jf.exact_fisher(linear))


def regression(values, n, p, dtype):
    """The Fisher with these non-zero eigenvalues, X^T X / n, exact as scores."""
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in (n, p))
    x = jnp.asarray(np.sqrt(n) * (u * np.sqrt(values)) @ v.T, dtype)
    return fisher_of(jnp.zeros(p, dtype), x)


# --- effective dimension and spectrum --------------------------------------------------------------------------------------

VALUES = np.array([3.0, 1.0, 0.2, 0.01])


@pytest.mark.parametrize("shape, dtype", [((6, 9), jnp.float32), ((9, 6), jnp.float64)], ids=["n < p", "p < n"])
def test_effective_dimension_along_a_path(shape, dtype):
    """Sums of lambda / (lambda + damping), as scores and dense; rounding errors in the null space do not count.

    The dtype cannot tell the last damping but one from zero: the sum equals the rank up to its smallest digits.
    """
    eps = float(jnp.finfo(dtype).eps)
    dampings = np.array([1e3, 1.0, 0.03, 1e-4, eps / 1e3, 0.0])
    expected = [np.sum(VALUES / (VALUES + d)) for d in dampings]

    @jax.jit
    def path(F, dampings):
        found = [jax.vmap(jf.effective_dimension, in_axes=(None, 0))(operator, dampings) for operator in (F, jf.dense(F))]
        return jnp.stack(found), F.rank()

    found, rank = path(regression(VALUES, *shape, dtype), jnp.asarray(dampings, dtype))
    assert found.dtype == dtype and rank == 4 and np.all(found[:, -1] == 4)
    # Eigenvalues are right to p eps of the largest; the slope of lambda / (lambda + d) is d / (lambda + d)^2.
    slopes = np.sum(dampings / (VALUES[:, None] + dampings) ** 2, axis=0)
    assert np.all(np.abs(np.asarray(found, float) - expected) <= 4 * 9 * eps * 3.0 * slopes + 40 * eps)


def test_effective_dimension_of_a_diagonal_counts_every_entry():
    """Entries are known one by one: 1e-20 beside 1 is half a dimension at a damping of 1e-20."""
    model = lambda w, x: jf.Normal(x * w, jnp.ones(()))  # noqa: E731
    F = jf.diagonal(jf.exact_fisher(model)(jnp.zeros(3), jnp.array([[1.0, 1e-10, 0.0]])))
    found = jax.jit(jax.vmap(lambda d: jf.effective_dimension(F, d)))(jnp.array([1e-20, 0.0]))
    np.testing.assert_allclose(found, [1.5, 2.0], rtol=1e-14)


def test_effective_dimension_of_large_small_and_no_numbers_in_float32():
    F = regression(np.array([2.0, 1.0]), 3, 3, jnp.float32)
    both = jax.jit(jax.vmap(lambda c, d: jf.effective_dimension(c * jf.dense(F), d)))
    found = both(jnp.float32([1e-30, 1e-30, 1e37, 1e37, 0, 0]), jnp.float32([1e-30, 0, 1e37, 0, 0, 1]))
    # Two eigenvalues to 3 eps of the largest, and a slope of at most 1/4 of their relative error.
    np.testing.assert_allclose(found, [2 / 3 + 1 / 2, 2, 2 / 3 + 1 / 2, 2, 0, 0], rtol=20 * 1.2e-7)


def test_effective_dimension_has_the_derivative_of_its_sum():
    F = regression(VALUES, 9, 6, jnp.float64)
    slope = jax.jit(jax.grad(lambda d: jf.effective_dimension(F, d)))(0.1)
    np.testing.assert_allclose(slope, -np.sum(VALUES / (VALUES + 0.1) ** 2), rtol=1e-12)


def test_spectrum():
    F = regression(VALUES, 9, 6, jnp.float64)
    found = jax.jit(jf.spectrum)(F)
    np.testing.assert_allclose(found.eigenvalues, [*VALUES, 0, 0], atol=20 * 2.3e-16 * 3)
    assert found.rank == 4
    np.testing.assert_allclose(found.condition_number, 300, rtol=1e-11)
    np.testing.assert_allclose(found.participation_ratio, VALUES.sum() ** 2 / np.sum(VALUES**2), rtol=1e-13)
    # Shares of 4.21: 3 is 0.7126, 4 is 0.9501, 4.2 is 0.9976.
    assert [int(found.leading(share)) for share in (0.0, 0.5, 0.72, 0.96, 0.999, 1.0)] == [0, 1, 2, 3, 4, 4]
    assert repr(found) == "Spectrum(params 6, rank 4, largest 3, condition number 300, participation ratio 1.77)"
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), found)
    assert repr(stacked) == "Spectrum(eigenvalues of shape (2, 6))"


def test_spectrum_without_a_direction_and_with_one_too_small_to_see():
    looked = jax.jit(jf.spectrum)
    zero = looked(0.0 * regression(VALUES, 9, 6, jnp.float64))
    assert (zero.rank, zero.condition_number, zero.participation_ratio, zero.leading(0.5)) == (0, 1, 0, 0)
    # 1e20 beside 1, not aligned with the axes of either: scaled to a unit diagonal the rank is two, by eigenvalues one.
    x = jnp.array([[1e10, 1.5], [1e10, -0.5]])
    far = looked(fisher_of(jnp.zeros(2), x))
    assert far.rank == 2 and jnp.isinf(far.condition_number)


def test_spectral_errors():
    F = regression(VALUES, 9, 6, jnp.float64)
    with pytest.raises(TypeError, match="effective_dimension: expected a Fisher operator"):
        jf.effective_dimension(jnp.eye(2), 0.1)
    with pytest.raises(TypeError, match="spectrum: expected a Fisher operator"):
        jf.spectrum(jnp.eye(2))
    with pytest.raises(ValueError, match=r"`damping` is -1\.0; expected a finite number of at least zero"):
        jf.effective_dimension(F, -1.0)
    with pytest.raises(TypeError, match="`damping` is an array of shape"):
        jf.effective_dimension(F, jnp.ones(2))
    for share in (-0.1, 2.0, float("nan")):
        with pytest.raises(ValueError, match=f"`share` is {share}; expected a number from 0 to 1"):
            jf.spectrum(F).leading(share)
    with pytest.raises(TypeError, match="`share` is 'half'"):
        jf.Spectrum(jnp.ones(2), jnp.array(2), jnp.ones(()), jnp.ones(())).leading("half")


# --- the verdict on models that are right ---------------------------------------------------------------------------------

X = jnp.array([[0.6, -0.4], [-0.9, 0.3], [0.2, 1.1]])


def mlp(params, x):
    hidden = jnp.tanh(x @ params["in"])
    return jf.Categorical(hidden @ params["out"])


def heteroscedastic(params, x):
    """A normal whose location is in units of a millionth, beside a log-scale in units of one."""
    return jf.Normal(1e-6 * jnp.dot(x, params["loc"]), 1e-6 * jnp.exp(jnp.dot(x, params["log_scale"])))


RIGHT = {
    "Categorical MLP, float32": (
        mlp,
        {"in": jnp.array([[0.5, -1.0, 0.2], [0.3, 0.8, -0.6]], jnp.float32), "out": jnp.eye(3, 4, dtype=jnp.float32)},
        X.astype(jnp.float32),
    ),
    "Normal": (heteroscedastic, {"loc": jnp.array([0.5, 0.3]), "log_scale": jnp.array([1.0, -0.2])}, X),
}


@pytest.mark.parametrize("name", RIGHT)
def test_models_that_are_right_pass(name, key):
    model, params, x = RIGHT[name]
    verdict = jf.check_fisher(model)(params, key, x)
    assert verdict.passed and not verdict.undecided and not verdict.notes, str(verdict)
    assert repr(verdict) == "FisherCheck(passed)"
    assert "passed: Fisher, KL, density and draws agree" in str(verdict)
    # The passing quotients are also accurate: to a few percent for a limit in float32, and to a factor of two for the draws.
    assert verdict.checks[QUOTIENT].tolerance < 5e-2 and verdict.checks[HESSIAN].tolerance < 1e-4
    assert verdict.checks[SQUARE].tolerance < 0.9


@pytest.mark.compiled
def test_the_quotient_is_that_of_the_closed_form(key):
    """One parameter has two unit directions, +-1/sqrt(rate), and KL(log r, log r + h) = r (e^h - 1 - h)."""
    rate = np.exp(0.4)
    verdict = jf.check_fisher(lambda a: jf.Poisson(a), num_directions=8)(0.4, key)
    assert verdict.passed and not verdict.undecided, str(verdict)
    t = verdict.lengths
    rows = [rate * (np.expm1(h) - h) / (0.5 * t**2) for h in (t / np.sqrt(rate), -t / np.sqrt(rate))]
    sign = np.where(verdict.quotients[:, 0] > 1, 0, 1)
    assert set(sign) == {0, 1}, "both directions are among the eight"
    # Steps are rounded to eps |a|, and expm1(h) - h loses eps / h.
    np.testing.assert_allclose(verdict.quotients, np.stack(rows)[sign], rtol=40 * 2.3e-16 / t[-1] ** 2)
    # The departure from one is linear: h / 3.
    departure = (verdict.quotients - 1) / t
    np.testing.assert_allclose(departure[:, -1], np.array([1, -1])[sign] / (3 * np.sqrt(rate)), rtol=t[-1])


def test_the_draws_find_the_exact_moments(key):
    """A Bernoulli with p = 1/2: every score is +-1 along a unit direction, so the second moment is exactly one."""
    verdict = jf.check_fisher(lambda a: jf.Bernoulli(a))(0.0, key)
    assert verdict.passed and abs(verdict.checks[MEAN].value) < 4
    np.testing.assert_allclose(verdict.checks[SQUARE].value, 1, rtol=1e-14)


def test_outcomes_too_rare_to_be_drawn_are_no_failure(key):
    """At a probability of 1e-6 the Fisher comes from an outcome that 16,384 draws do not contain. The verdict says so."""
    verdict = jf.check_fisher(lambda a: jf.Bernoulli(a))(np.log(1e-6), key)
    assert verdict.passed and verdict.checks[SQUARE].name in verdict.undecided
    assert "not told" in str(verdict) and "as far as could be told" in str(verdict)


BREAKS = {
    "rmv": lambda whole: lambda self, w: whole(self, w) | {"b": 1.001 * whole(self, w)["b"]},
    "mv": lambda whole: lambda self, v: whole(self, v | {"b": 1.001 * v["b"]}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_engine_is_named_with_the_leaf(name, key, monkeypatch):
    """One leaf's scores are off by a thousandth, which the checks of the Fisher do not notice."""
    params = {"a": jnp.array([0.5, -0.3]), "b": jnp.array([[0.2, 0.1], [-0.4, 0.6]])}
    model = lambda p, x: jf.Categorical(jnp.tanh(x * p["a"]) @ p["b"])  # noqa: E731
    held = type(jf.scores(jf.log_likelihood(model))(params, X, jnp.zeros(len(X), int)))
    monkeypatch.setattr(held, name, BREAKS[name](getattr(held, name)))
    verdict = jf.check_fisher(model, num_samples=64)(params, key, X)
    assert verdict.leaves == ("['b']",), str(verdict)
    assert "scores by ['b'] are not JAX's own" in verdict.reason
    monkeypatch.undo()
    # Another function object, since programs are cached for the one above.
    again = jf.check_fisher(lambda p, x: model(p, x), num_samples=64)(params, key, X)
    assert again.passed and again.leaves == (), str(again)


# --- and on models that are wrong -----------------------------------------------------------------------------------------


def toy(**methods):
    """A normal distribution with other methods."""
    return family(type("Toy", (jf.Normal,), methods))


def model_of(distribution):
    return lambda a: distribution(a[0], jnp.exp(a[1]))


def half_fisher(self, u):
    return self._make(u.loc / self.scale / 2**0.5, u.scale / self.scale)


def blind_kl(self, other):
    """A distribution with right values and without derivatives."""
    return jax.lax.stop_gradient(jf.Normal.kl(self, other))


NOISE = np.random.default_rng(7)
WRONG = {
    "Fisher": (model_of(toy(fisher_sqrt_mv=half_fisher)), {QUOTIENT, HESSIAN, SQUARE}, "closed-form Fisher.*is wrong"),
    "Fisher, by less than draws can tell": (
        model_of(toy(fisher_sqrt_mv=lambda self, u: jf.Normal.fisher_sqrt_mv(self, jax.tree.map(lambda leaf: 0.98 * leaf, u)))),
        {QUOTIENT, HESSIAN},
        "^`kl` or the closed-form Fisher is wrong",
    ),
    "KL": (model_of(toy(kl=lambda p, q: 2 * jf.Normal.kl(p, q))), {QUOTIENT, HESSIAN}, "`kl` is wrong"),
    "normalisation": (
        model_of(toy(log_prob=lambda self, x: jf.Normal.log_prob(self, x) + jnp.log(self.scale))),
        {MEAN, SQUARE},
        "lacks a normalisation",
    ),
    "draws": (
        model_of(toy(sample=lambda self, key, shape=(): 2 * jf.Normal.sample(self, key, shape))),
        {MEAN, SQUARE},
        "`sample` draws from another law",
    ),
    "no KL at all": (model_of(toy(kl=lambda p, q: 0 * jf.Normal.kl(p, q))), {HESSIAN}, "`kl` is wrong"),
    "derivative": (
        lambda a: jf.Normal(a[0] + jax.lax.stop_gradient(a[0]), jnp.exp(a[1])),
        {QUOTIENT},
        "derivatives do not see",
    ),
    "derivative of the KL": (model_of(toy(kl=blind_kl)), {HESSIAN}, "second derivative of `kl`"),
    "hidden state": (lambda a: jf.Normal(a[0] + NOISE.normal(), jnp.exp(a[1])), {ZERO}, "not a pure function"),
    "constant": (lambda a: jf.Normal(jnp.zeros(()), jnp.ones(())), {QUOTIENT, HESSIAN}, "not finite.*d.T F d is zero"),
}
"""A model, checks that must fail, and the reason that must be given."""


@pytest.mark.parametrize("name", WRONG)
def test_models_that_are_wrong_fail_where_they_are(name, key):
    model, expected, reason = WRONG[name]
    verdict = jf.check_fisher(model)(jnp.array([0.7, 0.3]), key)
    failed = {i for i, check in enumerate(verdict.checks) if check.passed is False}
    # A model that changes from call to call, or has no Fisher, may fail any check.
    exactly = name not in ("hidden state", "constant")
    assert failed == expected if exactly else expected <= failed, str(verdict)
    assert not verdict.passed and len(verdict.failed) == len(failed)
    assert re.search(reason, verdict.reason), verdict.reason
    assert verdict.reason in str(verdict) and "FAILED" in str(verdict) and "failed: " in repr(verdict)
    if name == "KL":
        assert all(abs(verdict.checks[i].value - 2) < 1e-4 for i in (QUOTIENT, HESSIAN))


# --- distributions of other libraries -------------------------------------------------------------------------------------


foreign = [
    pytest.mark.relaxed,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorflow_probability|distrax|numpyro)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(tensorflow_probability|distrax|numpyro)"),
]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_foreign_metric_is_the_hessian_of_a_kl_and_only_draws_can_judge_it(wrong, key):
    distrax = library("distrax")

    class Gumbel(distrax.Gumbel):
        def kl_divergence(self, other, **kwargs):
            return 2 * super().kl_divergence(other, **kwargs)

    kind = Gumbel if wrong else distrax.Gumbel
    verdict = jf.check_fisher(lambda a: kind(a[0], jnp.exp(a[1])))(jnp.array([0.7, 0.3]), key)
    assert [i for i, check in enumerate(verdict.checks) if check.passed is not True] == ([SQUARE] if wrong else []), str(
        verdict
    )
    assert not wrong or "not that of the KL and the Fisher" in verdict.reason


def test_a_foreign_distribution_without_a_kl_is_checked_by_draws_alone(key):
    nd = library("numpyro.distributions")
    verdict = jf.check_fisher(lambda a: nd.LogNormal(a[0], jnp.exp(a[1])))(jnp.array([0.7, 0.3]), key)
    assert verdict.passed and len(verdict.checks) == 5 and verdict.quotients.size == 0
    assert "has no KL divergence" in str(verdict)


for _test in (
    test_a_foreign_metric_is_the_hessian_of_a_kl_and_only_draws_can_judge_it,
    test_a_foreign_distribution_without_a_kl_is_checked_by_draws_alone,
):
    for _mark in foreign:
        _mark(_test)


# --- arguments ------------------------------------------------------------------------------------------------------------


def test_errors_of_check_fisher(key):
    model = lambda a: jf.Poisson(a)  # noqa: E731
    with pytest.raises(TypeError, match="`key` is 3; expected one random key"):
        jf.check_fisher(model)(0.4, 3)
    with pytest.raises(ValueError, match="`num_directions` is 0"):
        jf.check_fisher(model, num_directions=0)(0.4, key)
    with pytest.raises(ValueError, match="`num_samples` is True"):
        jf.check_fisher(model, num_samples=True)(0.4, key)
    with pytest.raises(TypeError, match="none under jit"):
        jax.jit(lambda a: jf.check_fisher(model)(a, key).checks[0].value)(0.4)
    with pytest.raises(TypeError, match="none under jit"):
        jax.jit(lambda key: jf.check_fisher(model)(0.4, key).checks[0].value)(key)
    with pytest.raises(TypeError, match="Expected a distribution"):
        jf.check_fisher(lambda a: a)(0.4, key)
    with pytest.raises(TypeError, match="`model` is 1"):
        jf.check_fisher(1)(0.4, key)
