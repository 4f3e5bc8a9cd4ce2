"""The digits of every family over a wide range, in float32, float64 and bfloat16, against closed forms in mpmath.

The law: a number is wrong by no more than a few roundings of its inputs and of itself are worth. Points are numbers of
bfloat16, so that one reference serves all dtypes. Concentrations, scales and means reach from 1e-15 to 1e15, since their
squares must fit.
"""

import functools

import closed_forms
import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from mpmath import mpf
from programs.evaluate import traced

import jaxfisher as jf

COUNT = 14
POSITIVE = (1e-15, 1e-6, 1e-3, 0.03, 0.7, 1.0, 1.5, 3.0, 12.0, 300.0, 1e6, 1e15)
PLACES = (0.0, 1e-15, -1.0, 7.0, 1e15)
LOGARITHMS = (-34.0, -10.0, -3.0, -0.001, 0.0, 0.5, 2.0, 9.0, 15.0, 34.0)
LOGITS = (-1e4, -80.0, -17.0, -3.0, -0.001, 0.0, 1e-15, 0.5, 4.0, 10.0, 30.0, 80.0)
# The numbers of the fields, the places of draws in units of the spread for reals, and the draws else.
FAMILIES = {
    "Normal": (PLACES, POSITIVE),
    "Laplace": (PLACES, POSITIVE),
    "StudentT": (POSITIVE, PLACES, POSITIVE),
    "MultivariateNormal": (PLACES, PLACES, POSITIVE[2:-2], (7.0,), (0.0, -1.0, 7.0), POSITIVE[2:-2]),
    "Gamma": (POSITIVE, POSITIVE),
    "Beta": (POSITIVE, POSITIVE),
    "Dirichlet": (POSITIVE,) * 3,
    "Bernoulli": (LOGITS,),
    "Categorical": (LOGITS,) * 3,
    "Poisson": (LOGARITHMS,),
    "NegativeBinomial": (LOGARITHMS, LOGARITHMS),
    "Exponential": (LOGARITHMS,),
}
# One concentration that dominates, of which the divergence is independent to first order in the others.
DOMINATED = {
    "Beta": [((1e-12, 3.0), (1e-12, 12.0), (0.5,)), ((12.0, 1e-4), (6.0, 1e-4), (0.25,))],
    "Dirichlet": [((12.0, 1e-4, 1e-4), (6.0, 1e-4, 1e-4), (0.25, 0.5, 0.25))],
}
DISCRETE = ("Bernoulli", "Categorical", "Poisson", "NegativeBinomial")
FACTOR = {jnp.float64: 256, jnp.float32: 256, jnp.bfloat16: 16}
"""The number of roundings; in bfloat16 few, as most families compute in float32."""


def narrow(values):
    return np.asarray(values, float).astype(ml_dtypes.bfloat16).astype(float)


def points(name):
    """Fields, those of another distribution (near, a few times larger, or anywhere), and a draw: a row for each point."""
    rng = np.random.default_rng(sorted(FAMILIES).index(name))
    p, far = (np.stack([rng.choice(kind, COUNT) for kind in FAMILIES[name]], -1) for _ in range(2))
    near = p * rng.choice([1, 1 + 1 / 32, 1 - 1 / 64], p.shape)
    some = p * rng.choice([1, 0.5, 4], p.shape)
    q = np.where(np.arange(COUNT)[:, None] % 3 == 0, near, np.where(np.arange(COUNT)[:, None] % 3 == 1, some, far))
    if FAMILIES[name][0] is LOGARITHMS:
        q = np.clip(q, -34, 34)
    x = [draw(name, row, rng) for row in narrow(p)]
    more = zip(*DOMINATED[name], strict=True) if name in DOMINATED else [()] * 3
    count = COUNT // 2 if name in DOMINATED else COUNT  # since mpmath takes long for these
    return tuple(narrow([*values[:count], *rows]) for values, rows in zip((p, q, x), more, strict=True))


def draw(name, p, rng):
    spread = rng.choice([0.0, 1e-3, 1.0, -2.0, 30.0, 1e4], 2)
    if name in ("Normal", "Laplace", "StudentT"):
        return [p[-2] + p[-1] * spread[0]]
    if name == "MultivariateNormal":
        return [p[0] + p[2] * spread[0], p[1] + p[4] * spread[0] + p[5] * spread[1]]
    if name == "Gamma":
        return [p[0] / p[1] * rng.choice([1, 1.02, 0.5, 1e-10, 10])]
    if name == "Beta":
        return [np.clip(rng.choice([p[0] / sum(p), 1e-15, 0.25, 0.5]), 1e-30, 1 - 2**-8)]
    if name == "Dirichlet":
        return [(0.25, 0.5, 0.25), (2**-7, 2**-8, 1 - 2**-7 - 2**-8)][rng.integers(2)]
    if name == "Exponential":
        return [rng.choice([0, 1e-10, 1, np.exp(-p[0]), 8 * np.exp(-p[0])])]
    if name in ("Bernoulli", "Categorical"):
        return [rng.integers(len(p) if len(p) > 1 else 2)]
    return [np.floor(narrow(rng.choice([0, 1, 5, 300, np.exp(p[0])])))]


def made(name, fields):
    kind = getattr(jf, name)
    if name == "MultivariateNormal":
        return kind(fields[:2], fields[2:].reshape(2, 2))
    return kind(fields) if name in ("Categorical", "Dirichlet") else kind(*fields)


@functools.cache
def program(name):
    """All quantities of one family, at a batch of points."""

    def at(p, q, x):
        event = x if name in ("Dirichlet", "MultivariateNormal") else x[0]
        event = event.astype(jnp.int32) if name == "Categorical" else event
        one, other = made(name, p), made(name, q)
        found = {what: getattr(one, what).astype(p.dtype) for what in ("mean", "variance", "mode")}
        found["log_prob"], found["score"] = jax.value_and_grad(lambda p: made(name, p).log_prob(event))(p)
        found["kl"], found["slope of kl"] = jax.value_and_grad(lambda q: one.kl(made(name, q)))(q)
        found["fisher"] = one.fisher_matrix()
        if name not in ("Poisson", "NegativeBinomial"):
            found["entropy"] = one.entropy()
        return {what: jnp.ravel(value) for what, value in found.items()} | {"other": other.kl(other)[None]}

    return traced(jax.vmap(at))


STEP, SLOPE = mpf(10) ** -20, mpf(10) ** -40


def conditioned(function, at):
    """The values of a function of numbers, and what they change by if every number changes by one part: ``sum |z df/dz|``."""
    values = function(at)
    moves = [function([*at[:i], at[i] * (1 + STEP), *at[i + 1 :]]) for i in range(len(at)) if at[i]]
    return values, [sum((abs(moved[j] - value) / STEP for moved in moves), mpf(0)) for j, value in enumerate(values)]


def slopes(function, at, count):
    """The first ``count`` derivatives of a function of numbers."""
    made = []
    for i in range(count):
        step = (abs(at[i]) or 1) * SLOPE
        up, down = (function([*at[:i], at[i] + way, *at[i + 1 :]])[0] for way in (step, -step))
        made.append((up - down) / (2 * step))
    return made


@functools.cache
def reference(name):
    """For each point, each quantity with its condition."""
    closed, found = getattr(closed_forms, name), []
    for p, q, x in zip(*points(name), strict=True):
        p, q, x = ([mpf(float(v)) for v in values] for values in (p, q, x))
        n, drawn = len(p), [] if name in DISCRETE else x
        log_prob = lambda z, x=x, n=n: closed.log_prob(z[:n], x if name in DISCRETE else z[n:])  # noqa: E731
        own = [what for what in ("mean", "variance", "mode", "entropy", "fisher") if hasattr(closed, what)]
        at = {what: conditioned(getattr(closed, what), p) for what in own}
        at["log_prob"] = conditioned(log_prob, p + drawn)
        at["score"] = conditioned(lambda z, f=log_prob, n=n: slopes(f, z, n), p + drawn)
        if hasattr(closed, "kl"):
            divergence = lambda z, n=n: closed.kl(z[n:], z[:n])  # noqa: E731
            at["kl"] = conditioned(divergence, q + p)
            at["slope of kl"] = conditioned(lambda z, f=divergence, n=n: slopes(f, z, n), q + p)
        found.append(at)
    return found


def allowed(name, what, values, condition, at):
    """What a rounding of the inputs and of the value is worth."""
    if what == "fisher":
        root = np.sqrt(np.abs(np.diag(values.reshape(len(at), -1))))
        return np.abs(values) + condition + np.outer(root, root).ravel()
    if name == "Categorical" and what in ("log_prob", "score"):
        return 1 + np.abs(values) + condition  # as the class says
    if what in ("score", "slope of kl"):
        # Of entries that cancel the error is relative to the largest beside them.
        size = np.where(at == 0, 1, np.abs(at))
        return np.sum((np.abs(values) + condition) * size) / size
    # A logarithm of a density has a unit, and so have counts, of which the mode is one.
    unit = what == "entropy" and name not in DISCRETE
    return np.abs(values) * (1 + 40 * (what == "mode")) + np.nan_to_num(condition) + unit


def apart(p, q):
    """Whether numbers of two distributions are so far apart that their products leave the range of float32."""
    numbers = np.concatenate([p, q])
    return np.max(numbers) > 1e20 * np.min(numbers)


@pytest.mark.parametrize("dtype", list(FACTOR), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_number_has_the_digits_of_its_dtype(name, dtype):
    with mpmath.workdps(140):
        exact = reference(name)
    p, q, x = points(name)
    found = program(name)(*(jnp.asarray(v, dtype) for v in (p, q, x)))
    eps, most, least = (float(getattr(jnp.finfo(dtype), what)) for what in ("eps", "max", "tiny"))
    for i, at in enumerate(exact):
        for what, pair in at.items():
            values, condition = (np.array(list(map(float, numbers))) for numbers in pair)
            if what == "slope of kl" and dtype != jnp.float64 and name in ("Gamma", "Beta", "Dirichlet") and apart(p[i], q[i]):
                continue  # may be infinite or NaN, as the class says
            seen, where = np.asarray(found[what][i], float), f"{what} at {p[i]} {q[i]} {x[i]}"
            fits = np.abs(values) < 0.99 * most
            # Slopes that are zero are differences of 1e-80 in the reference.
            error = (
                1e-60
                + FACTOR[dtype] * eps * allowed(name, what, values, condition, q[i] if "kl" in what else p[i])
                + 100 * least
            )
            np.testing.assert_array_equal(np.isnan(seen), np.isnan(values), err_msg=where)
            assert np.all(np.abs(seen[fits] - values[fits]) <= error[fits]), f"{where}: {seen}, not {values}"
            assert np.all(np.abs(seen[~fits & ~np.isnan(values)]) > 0.9 * most), f"{where}: {seen}, not {values}"
    assert np.all(np.asarray(found["other"]) <= (100 * eps**2 if name == "StudentT" else 0)), "kl to itself is zero"


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_a_negative_binomial_of_a_large_mean_is_a_gamma_distribution_of_rates(dtype):
    """Counts over their mean then have the law of the rates, with its divergence and its information on the dispersion."""
    logarithms = np.array([[34.0, 0.0, 0.5], [40.0, -3.0, 1.0], [33.0, -10.0, -9.0], [34.0, -10.0, -10.5]])

    @traced
    @jax.vmap
    def views(at):
        p, q = jf.NegativeBinomial(at[0], at[1]), jf.NegativeBinomial(at[0], at[2])
        return p.kl(q), p.fisher_matrix()[1, 1], jax.grad(lambda log_mean: jf.NegativeBinomial(log_mean, at[1]).kl(q))(at[0])

    kl, information, slope = views(jnp.asarray(logarithms, dtype))
    with mpmath.workdps(40):
        rates = [[mpmath.exp(-mpf(v)) for v in row[1:]] for row in logarithms]
        divergences = [float(closed_forms.Gamma.kl([r, r], [s, s])[0]) for r, s in rates]
        informations = [float(r**2 * (mpmath.polygamma(1, r) - 1 / r)) for r, _ in rates]
    rtol = 1e-4 if dtype == jnp.float32 else 1e-8
    np.testing.assert_allclose(kl, divergences, rtol=rtol)
    np.testing.assert_allclose(information, informations, rtol=rtol)
    assert np.all(np.isfinite(slope))
