"""Geometry: distances, geodesics and divergences, against closed forms that are written here in another way."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
from models import compiled

import jaxfisher as jf
from jaxfisher import geometry

pytestmark = pytest.mark.usefixtures("in_numpy")  # except for loops of hundreds of steps

EPS = float(np.finfo(float).eps)


def close(actual, expected, factor=100):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=factor * EPS, atol=factor * EPS)


def test_distances_in_closed_form():
    """The usual formulas with inverse cosines, for pairs in a batch."""
    loc, other = np.array([0.3, -1.0]), np.array([1.1, 2.0])
    scale, wide = np.array([0.7, 2.0]), np.array([1.3, 0.5])
    cosh = 1 + ((loc - other) ** 2 / 2 + (scale - wide) ** 2) / (2 * scale * wide)
    close(geometry.distance(jf.Normal(loc, scale), jf.Normal(other, wide)), np.sqrt(2) * np.arccosh(cosh))
    cosh = 1 + ((loc - other) ** 2 + (scale - wide) ** 2) / (2 * scale * wide)
    close(geometry.distance(jf.Laplace(loc, scale), jf.Laplace(other, wide)), np.arccosh(cosh))
    p, q = 1 / (1 + np.exp(-loc)), 1 / (1 + np.exp(-other))
    close(geometry.distance(jf.Bernoulli(loc), jf.Bernoulli(other)), 2 * np.abs(np.arcsin(np.sqrt(p)) - np.arcsin(np.sqrt(q))))
    close(geometry.distance(jf.Poisson(loc), jf.Poisson(other)), 2 * np.abs(np.exp(loc / 2) - np.exp(other / 2)))
    close(geometry.distance(jf.Exponential(loc), jf.Exponential(other)), np.abs(loc - other))
    a, b = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    found = geometry.distance(jf.Categorical(np.log(a)), jf.Categorical(np.log(b)))
    close(found, 2 * np.arccos(np.sum(np.sqrt(a * b))))


FAMILIES = {
    "normal": lambda x: jf.Normal(x[..., 0], x[..., 1]),
    "bernoulli": lambda x: jf.Bernoulli(probs=x[..., 0]),
    "categorical": lambda x: jf.Categorical(probs=x),
    "exponential": lambda x: jf.Exponential(np.log(x[..., 0])),
    "poisson": lambda x: jf.Poisson(np.log(x[..., 0])),
}


def test_distances_are_those_of_geomstats():
    """Five pairs of each family; the metric of covariances is twice the Fisher information of normal vectors."""
    with np.load(pathlib.Path(__file__).parent / "references" / "geometry.npz") as stored:
        known = dict(stored)
    for name, family in FAMILIES.items():
        p, q = map(family, known[f"{name}_points"])
        close(geometry.distance(p, q), known[f"{name}_distances"], factor=1e3)
    p, q = (jf.MultivariateNormal(np.zeros((5, 3)), root) for root in np.linalg.cholesky(known["covariance_points"]))
    close(geometry.covariance_distance(p, q), known["covariance_distances"] / np.sqrt(2), factor=1e4)


def test_distances_of_normal_vectors():
    rng = np.random.default_rng(3)
    roots = [np.tril(rng.normal(size=(3, 3))) + 2 * np.eye(3) for _ in range(2)]
    means = rng.normal(size=(2, 3))
    p, q = (jf.MultivariateNormal(mean, root) for mean, root in zip(means, roots, strict=True))
    covariances = [root @ root.T for root in roots]
    values = scipy.linalg.eigh(covariances[1], covariances[0], eigvals_only=True)
    close(geometry.covariance_distance(p, q), np.sqrt(np.sum(np.log(values) ** 2) / 2), factor=1e4)
    apart = means[0] - means[1]
    close(geometry.mahalanobis_distance(p, q), np.sqrt(apart @ np.linalg.solve(covariances[0], apart)), factor=1e3)


def test_distances_of_batches_are_those_of_their_members():
    """A batch as long as the vectors, in locations or in roots, beside a single distribution and beside another batch."""
    rng = np.random.default_rng(6)
    roots, means = np.tril(rng.normal(size=(3, 3, 3))) + 3 * np.eye(3), rng.normal(size=(3, 3))
    kinds = [(means[0], roots[0]), (means, roots[0]), (means[0], roots), (means, roots)]

    def member(kind, i):
        return jf.MultivariateNormal(*(part if part.ndim < n else part[i] for n, part in zip((2, 3), kind, strict=True)))

    for of_two in (geometry.covariance_distance, lambda p, q: geometry.renyi_divergence(p, q, 0.4)):
        for p, q in itertools.product(kinds, repeat=2):
            expected = np.stack([of_two(member(p, i), member(q, i)) for i in range(3)])
            found = of_two(jf.MultivariateNormal(*p), jf.MultivariateNormal(*q))
            close(np.broadcast_to(found, 3), expected, factor=1e3)
    with pytest.raises(ValueError, match=r"distance: `p` has the batch shape \(3,\) and `q` \(2,\)"):
        geometry.distance(jf.Poisson(jnp.zeros(3)), jf.Poisson(jnp.zeros(2)))


ONE_PARAMETER = {
    "Normal": (geometry.distance, lambda t: jf.Normal(t, jnp.exp(t))),
    "Laplace": (geometry.distance, lambda t: jf.Laplace(t, jnp.exp(t))),
    "Bernoulli": (geometry.distance, jf.Bernoulli),
    "Categorical": (geometry.distance, lambda t: jf.Categorical(jnp.stack([t, 0 * t, 2 * t]))),
    "Poisson": (geometry.distance, jf.Poisson),
    "Exponential": (geometry.distance, jf.Exponential),
    "covariances": (geometry.covariance_distance, lambda t: jf.MultivariateNormal(jnp.zeros(2), jnp.exp(t) * jnp.eye(2))),
    "means": (geometry.mahalanobis_distance, lambda t: jf.MultivariateNormal(jnp.stack([t, t]), jnp.eye(2))),
}


@pytest.mark.parametrize("name", ONE_PARAMETER)
def test_a_distance_has_a_derivative_only_apart(name):
    """The square has a second derivative, which no derivative of the distance gives at zero: it must not look like one."""
    distance, make = ONE_PARAMETER[name]
    length = lambda t: distance(make(0.5), make(t))  # noqa: E731
    slope, bend = jax.jacfwd(length), jax.jacfwd(jax.jacrev(lambda t: jnp.square(length(t))))
    at = jnp.array([0.5, 0.5 + 1e-3, 0.5 - 1e-3])
    (same, *beside), (same_bend, *_) = jax.jit(jax.vmap(lambda t: (slope(t), bend(t))))(at)
    assert np.isnan(same)
    assert np.isnan(same_bend)
    np.testing.assert_allclose(beside, [1e3 * length(at[1]), -1e3 * length(at[2])], rtol=2e-3)


def test_entries_above_the_diagonal_of_a_root_do_not_count():
    """As a network predicts a whole matrix for ``scale_tril``, and the distribution reads only its lower triangle."""
    rng = np.random.default_rng(5)
    whole = [rng.normal(size=(3, 3)) + 3 * np.eye(3) for _ in range(2)]
    means = rng.normal(size=(2, 3))
    full, lower = (
        [jf.MultivariateNormal(mean, part(root)) for mean, root in zip(means, whole, strict=True)]
        for part in (np.asarray, np.tril)
    )
    for of_two in (
        geometry.covariance_distance,
        geometry.mahalanobis_distance,
        *(lambda p, q, a=a: geometry.renyi_divergence(p, q, a) for a in (0.4, 1, 1.2)),
        *(lambda p, q, a=a: geometry.alpha_divergence(p, q, a) for a in (-0.5, 0.5)),
    ):
        close(of_two(*full), of_two(*lower), factor=10)
    far = [jf.MultivariateNormal(100 * mean, root) for mean, root in zip(means, whole, strict=True)]  # the other formula
    clean = [jf.MultivariateNormal(p.loc, np.tril(p.scale_tril)) for p in far]
    close(geometry.renyi_divergence(*far, 0.4), geometry.renyi_divergence(*clean, 0.4), factor=10)


def test_distances_that_are_very_small_and_logits_that_are_very_large():
    """No digits cancel between near distributions, for which the distance is that of the metric."""
    step = 1e-9
    close(geometry.distance(jf.Normal(0.5, 2.0), jf.Normal(0.5 + step, 2.0)), step / 2, factor=1e8)
    near = geometry.distance(jf.Categorical(np.zeros(2)), jf.Categorical(np.array([step, 0.0])))
    assert abs(float(near) / (step / 2) - 1) < 1e-6
    assert abs(float(geometry.distance(jf.Bernoulli(0.0), jf.Bernoulli(step))) / (step / 2) - 1) < 1e-9
    bits = 2.0**-30
    close(geometry.distance(jf.Poisson(1.0), jf.Poisson(1.0 + bits)) / bits, np.exp(0.5 + bits / 4))
    rates = geometry.distance(jf.Poisson(np.array([-np.inf, -np.inf])), jf.Poisson(np.array([-np.inf, 0.0])))
    close(rates, [0, 2])
    ends = geometry.distance(jf.Bernoulli(np.array([-1e4, 1e4, 30.0])), jf.Bernoulli(np.array([1e4, 1e4, 31.0])))
    close(ends[:2], [np.pi, 0])
    # Twice the difference of the arc cotangents of e^15 and e^15.5.
    assert abs(float(ends[2]) / (2 * (np.exp(-15) - np.exp(-15.5))) - 1) < 1e-10


CURVES = {
    "normal": (lambda p: jf.Normal(p[0], p[1]), [0.2, 1.0], [1.5, 2.0]),
    "normal, log scale": (lambda p: jf.Normal(p[0], jnp.exp(p[1])), [0.2, 0.0], [1.5, np.log(2.0)]),
    "categorical": (lambda p: jf.Categorical(jnp.append(p, 0.0)), [0.2, -0.4], [1.0, 0.8]),
}


@functools.cache
def curve(name):
    """A geodesic between two points, its end point by shooting along it, and the closed form of its length."""
    model, start, end = CURVES[name]

    def make(start, end):
        found = geometry.geodesic(model, steps=48)(start, end)
        half = geometry.exponential_map(model, steps=24)(start, 0.5 * found.velocity)
        return found, half, *(geometry.distance(model(a), model(b)) for a, b in ((start, end), (start, half), (half, end)))

    return jax.tree.map(np.asarray, compiled(make)(jnp.asarray(start), jnp.asarray(end)))


@pytest.mark.compiled
@pytest.mark.parametrize("name", CURVES)
def test_a_geodesic_has_the_length_of_the_closed_form(name):
    """This holds in any coordinates, and by the closed form the middle of a geodesic is half way from both ends."""
    found, _, whole, before, after = curve(name)
    assert found.converged
    for length, part in ((whole, 1), (before, 0.5), (after, 0.5)):
        assert abs(found.distance * part / length - 1) < 1e-6


@pytest.mark.compiled
def test_a_distance_by_shooting_has_the_derivatives_of_the_closed_form():
    """Reverse-mode and second derivatives, although the search is a loop that ends on arrival."""
    model, start, end = CURVES["normal"]

    def slopes(distance):
        return lambda a, b: (jax.grad(distance, (0, 1))(a, b), jax.hessian(distance, 1)(a, b))

    shot = slopes(lambda a, b: geometry.geodesic(model, steps=48)(a, b).distance)
    closed = slopes(lambda a, b: geometry.distance(model(a), model(b)))
    found, expected = (compiled(f)(jnp.asarray(start), jnp.asarray(end)) for f in (shot, closed))
    for mine, known in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, known, atol=1e-6)


def test_a_geodesic_of_a_regression_and_one_that_is_not_there():
    """With a fixed scale the metric of a linear model is flat: the geodesic is straight, its length Mahalanobis'."""
    x = np.random.default_rng(2).normal(size=(7, 2))
    model = lambda w, x: jf.Normal(x @ w, 2.0)  # noqa: E731
    a, b = np.array([0.1, -0.3]), np.array([1.0, 0.4])
    found = geometry.geodesic(model, steps=2)(a, b, x)
    close(found.velocity, b - a, factor=1e4)
    close(found.distance, np.sqrt(np.mean((x @ (b - a)) ** 2)) / 2, factor=1e4)
    idle = geometry.geodesic(lambda w: jf.Normal(w[0], 1.0), steps=2)(a, b)
    assert not bool(idle.converged), "nothing moves with the second number"


def test_the_connection_is_that_of_the_metric():
    """Christoffel's symbols of the normal in mean and scale, and the covariant derivative of the metric, which is zero."""
    model, at = CURVES["normal"][0], jnp.array([0.2, 1.7])

    def make(at):
        metric = lambda p: jf.exact_fisher(model)(p).as_matrix()  # noqa: E731
        return geometry.christoffel(model)(at), metric(at), jax.jacfwd(metric)(at)

    symbols, matrix, slopes = map(np.asarray, compiled(make)(at))
    s = 1.7
    close(symbols, [[[0, -1 / s], [-1 / s, 0]], [[1 / (2 * s), 0], [0, -1 / s]]], factor=1e3)
    carried = np.einsum("kij,kl->lji", symbols, matrix)  # Gamma_{l, ji}
    np.testing.assert_allclose(slopes, carried.transpose(0, 1, 2) + carried.transpose(1, 0, 2), atol=1e-12)


@pytest.mark.compiled
def test_the_flow_goes_straight_in_the_means():
    """For a normal in any coordinates, the expectations of x and of x^2 approach those of the data as exp(-t)."""
    data = np.array([0.5, 2.0, 3.5, 1.0])
    model = lambda p: jf.Normal(p["loc"], jnp.exp(p["log_scale"]))  # noqa: E731
    flow = geometry.natural_gradient_flow(model, time=1.5, steps=60)
    path = compiled(flow)({"loc": 0.0, "log_scale": 0.0}, data)
    loc, scale = (np.asarray(path["loc"]), np.exp(np.asarray(path["log_scale"])))
    shares = np.exp(-np.linspace(0, 1.5, 61))
    np.testing.assert_allclose(loc, data.mean() * (1 - shares), atol=1e-7)
    np.testing.assert_allclose(loc**2 + scale**2, np.mean(data**2) + shares * (1 - np.mean(data**2)), atol=1e-6)


def test_jeffreys_prior():
    """For a normal in mean and scale it is 1 / s^2; in other coordinates it transforms as a density."""
    for model, at, jacobian in (
        (CURVES["normal"][0], [0.3, 1.7], 0.0),
        (CURVES["normal, log scale"][0], [0.3, np.log(1.7)], np.log(1.7)),
    ):
        close(geometry.log_jeffreys(model)(jnp.asarray(at)), 0.5 * np.log(2) - 2 * np.log(1.7) + jacobian)


PAIRS = {
    "Normal": (jf.Normal(0.2, 1.0), jf.Normal(-0.5, 1.3)),
    "Bernoulli": (jf.Bernoulli(0.3), jf.Bernoulli(-0.8)),
    "Categorical": (jf.Categorical(jnp.array([0.1, 0.4, -0.2])), jf.Categorical(jnp.array([0.5, -0.4, 0.0]))),
    "Poisson": (jf.Poisson(0.4), jf.Poisson(0.9)),
    "Exponential": (jf.Exponential(0.4), jf.Exponential(0.9)),
    "Gamma": (jf.Gamma(1.5, 2.0), jf.Gamma(2.5, 1.2)),
    "Beta": (jf.Beta(1.5, 2.0), jf.Beta(2.5, 1.2)),
}


def total(p, integrand):
    """A sum over outcomes or an integral over the support, by SciPy."""
    if isinstance(p, jf.Bernoulli | jf.Categorical | jf.Poisson):
        return sum(integrand(k) for k in range(60 if isinstance(p, jf.Poisson) else 2 if isinstance(p, jf.Bernoulli) else 3))
    ends = {jf.Normal: (-np.inf, np.inf), jf.Beta: (0, 1)}.get(type(p), (0, np.inf))
    return scipy.integrate.quad(integrand, *ends, epsabs=1e-13, epsrel=1e-12)[0]


SCIPY = {
    "Normal": lambda p: scipy.stats.norm(p.loc, p.scale).logpdf,
    "Bernoulli": lambda p: scipy.stats.bernoulli(1 / (1 + np.exp(-p.logits))).logpmf,
    "Categorical": lambda p: lambda k: (p.logits - np.log(np.sum(np.exp(p.logits))))[k],
    "Poisson": lambda p: scipy.stats.poisson(np.exp(p.log_rate)).logpmf,
    "Exponential": lambda p: scipy.stats.expon(scale=np.exp(-p.log_rate)).logpdf,
    "Gamma": lambda p: scipy.stats.gamma(p.concentration, scale=1 / p.rate).logpdf,
    "Beta": lambda p: scipy.stats.beta(p.a, p.b).logpdf,
}


@pytest.mark.parametrize("name", PAIRS)
def test_divergences_are_their_integrals_and_their_hessian_is_the_fisher(name):
    """Orders below and above one. The Hessian of Renyi's divergence is the order times the metric, of Amari's the metric."""
    p, q = PAIRS[name]
    densities = [SCIPY[name](jax.tree.map(np.asarray, d)) for d in (p, q)]

    def affinity(a):
        return total(p, lambda x: np.exp(a * densities[0](x) + (1 - a) * densities[1](x)))

    def make(p, q):
        values = [
            geometry.renyi_divergence(p, q, 0.3),
            geometry.renyi_divergence(p, q, 1.2),
            geometry.alpha_divergence(p, q, 0.0),
        ]
        flat, unravel = jax.flatten_util.ravel_pytree(p)
        hessians = [
            jax.hessian(lambda flat: geometry.renyi_divergence(p, unravel(flat), 0.3))(flat),
            jax.hessian(lambda flat: geometry.alpha_divergence(p, unravel(flat), 0.4))(flat),
        ]
        return values, hessians, p.fisher_matrix()

    values, hessians, fisher = compiled(make)(p, q)
    expected = [np.log(affinity(0.3)) / -0.7, np.log(affinity(1.2)) / 0.2, 4 * (1 - affinity(0.5))]
    np.testing.assert_allclose(values, expected, rtol=1e-8)
    for scale, hessian in zip((0.3, 1.0), hessians, strict=True):
        np.testing.assert_allclose(hessian, scale * fisher, atol=1e-10 * np.max(np.abs(fisher)))


@pytest.mark.parametrize("name", PAIRS)
def test_divergences_of_near_distributions_have_their_digits(name):
    """Float32 accuracy for near distributions, and near the orders at which the closed forms are zero over zero."""
    p, other = PAIRS[name]
    q = jax.tree.map(lambda x, y: x + 0.01 * (y - x), p, other)
    narrow = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), d) for d in (p, q)]
    wide = [jax.tree.map(lambda x: np.asarray(x, np.float64), d) for d in narrow]
    first, second = (SCIPY[name](d) for d in wide)

    def excess(share):
        """The integral of ``p (e^t - 1 - t)`` with ``t = share log(q / p)``, in which nothing cancels."""

        def integrand(x):
            t = min(share * (second(x) - first(x)), 50.0)
            return np.exp(first(x)) * (np.expm1(t) - t)

        return total(p, integrand)

    def expected(a):
        return np.log1p(excess(1 - a) - (1 - a) * excess(1))  # the integral of p log(p / q) is excess(1)

    orders = (0.02, 0.5, 0.99, 1.2)
    found = compiled(
        lambda p, q: [geometry.renyi_divergence(p, q, a) for a in orders] + [geometry.alpha_divergence(p, q, 0.98)]
    )(*narrow)
    values = [expected(a) / (a - 1) for a in orders] + [-4 * np.expm1(expected(0.01)) / (1 - 0.98**2)]
    np.testing.assert_allclose(found, values, rtol=2e-3)


def test_divergences_of_normal_vectors_add_up_over_independent_entries():
    """A diagonal covariance. The limits are the Kullback-Leibler divergences; a divergence is infinite if its integral is."""
    scales, loc = np.array([[1.0, 0.6], [1.3, 0.9]]), np.array([[0.0, 0.3], [0.5, -0.2]])
    p, q = (jf.MultivariateNormal(loc[k], np.diag(scales[k])) for k in (0, 1))
    entries = [jf.Normal(loc[k], scales[k]) for k in (0, 1)]
    for order in (0.4, 1.3, 1):
        found = geometry.renyi_divergence(p, q, order)
        close(found, np.sum(geometry.renyi_divergence(*entries, order)), factor=1e4)
    dirichlet = [jf.Dirichlet(np.array(c)) for c in ([1.5, 2.0], [2.5, 1.2])]
    close(geometry.renyi_divergence(*dirichlet, 0.4), geometry.renyi_divergence(*PAIRS["Beta"], 0.4), factor=1e4)
    close(geometry.renyi_divergence(p, q, 1 + 1e-6), float(p.kl(q)), factor=1e11)
    wide, narrow = jf.Normal(0.0, 2.0), jf.Normal(0.0, 1.0)
    assert np.isinf(geometry.renyi_divergence(wide, narrow, 1.5)) and np.isfinite(geometry.renyi_divergence(narrow, wide, 1.5))
    assert np.isinf(
        geometry.renyi_divergence(
            jf.MultivariateNormal(np.zeros(1), 2 * np.eye(1)), jf.MultivariateNormal(np.zeros(1), np.eye(1)), 1.5
        )
    )


def test_an_order_that_is_known_late_is_taken_as_one_that_is_known():
    """A run-time order works like a known one, also where the closed form has no value. An invalid order gives NaN."""
    p, q = PAIRS["Bernoulli"]
    for function, orders in ((geometry.renyi_divergence, (0.3, 1, 2.5)), (geometry.alpha_divergence, (-1, 0.2, 1, 3.0))):
        late = jax.vmap(lambda order, function=function: function(p, q, order))(jnp.array(orders, float))
        np.testing.assert_allclose(late, np.stack([function(p, q, order) for order in orders]), rtol=1e-12)
    assert np.all(np.isnan(geometry.renyi_divergence(p, q, jnp.array(-1.0))))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *[
            (lambda f=f: f(jf.Categorical(np.zeros(1)), jf.Categorical(np.zeros(3))), ValueError, "over different spaces")
            for f in (
                geometry.distance,
                lambda p, q: geometry.renyi_divergence(p, q, 0.5),
                lambda p, q: geometry.alpha_divergence(p, q, 0.5),
            )
        ],
        (
            lambda: geometry.covariance_distance(
                *(jf.MultivariateNormal(np.zeros(d), np.eye(d)) for d in (2, 3)),
            ),
            ValueError,
            "covariance_distance: the two are over different spaces",
        ),
        (lambda: geometry.renyi_divergence(*PAIRS["Normal"], np.inf), ValueError, "`order` is inf; expected a finite number"),
        (lambda: geometry.alpha_divergence(*PAIRS["Normal"], np.nan), ValueError, "`alpha` is nan; expected a finite number"),
        (lambda: geometry.distance(jf.Normal(0.0, 1.0), jf.Poisson(0.0)), TypeError, "`p` is a Normal and `q` a Poisson"),
        (lambda: geometry.distance(*PAIRS["Gamma"]), TypeError, "a Gamma has no closed form here.*see jf.geometry.geodesic"),
        (lambda: geometry.mahalanobis_distance(*PAIRS["Normal"]), TypeError, "expected one of MultivariateNormal"),
        (
            lambda: geometry.renyi_divergence(*PAIRS["Normal"], 0),
            ValueError,
            "`order` is 0; expected a finite number above zero",
        ),
        (lambda: geometry.renyi_divergence(*PAIRS["Normal"], "half"), TypeError, "`order` is 'half'"),
        (
            lambda: geometry.alpha_divergence(jf.Laplace(0.0, 1.0), jf.Laplace(0.0, 1.0), 0),
            TypeError,
            "a Laplace has no closed form",
        ),
        (lambda: geometry.exponential_map(CURVES["normal"][0], steps=0), ValueError, "`steps` is 0; expected a whole number"),
        (lambda: geometry.geodesic(CURVES["normal"][0])(jnp.zeros(2), jnp.zeros(3)), ValueError, r"`?other"),
        (lambda: geometry.christoffel(3.0), TypeError, "`model` is 3.0; expected a function"),
        (lambda: geometry.natural_gradient_flow(CURVES["normal"][0], time=-1.0), ValueError, "`time` is -1.0"),
        (lambda: geometry.log_jeffreys(lambda p: p)(jnp.zeros(2)), TypeError, "Expected a distribution"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
