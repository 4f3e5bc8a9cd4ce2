"""Special functions and the families that use them at extreme arguments, against mpmath, in float64 and float32.

Reference values are computed with 40 digits or more, at exactly the numbers that the library gets, so all errors are ours.
"""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mpf
from programs.evaluate import traced

from jaxfisher._distributions import special
from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.beta import Beta
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.dirichlet import Dirichlet
from jaxfisher._distributions.exponential import Exponential
from jaxfisher._distributions.gamma import Gamma
from jaxfisher._distributions.negative_binomial import NegativeBinomial
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._distributions.student_t import StudentT

DTYPES = [jnp.float64, jnp.float32]
POINTS = (1e-6, 1e-3, 0.1, 0.5, 0.9999, 1.0, 1.5, 2.0, 5.0, 9.999, 10.0, 20.0, 31.9, 32.0, 100.0, 1e4, 1e7, 1e10)


def computed(function, dtype):
    """The function as it is tested: run by NumPy in float64, compiled by XLA in float32."""
    return traced(function) if dtype == jnp.float64 else jax.jit(function)


@pytest.fixture(autouse=True)
def digits():
    """Set mpmath's precision for differences of 1e-10 between terms of 1e11."""
    with mpmath.workdps(60):
        yield


def remainder(a):
    return mpmath.loggamma(a) - (a - mpf("0.5")) * mpmath.log(a) + a - mpmath.log(2 * mpmath.pi) / 2


def remainder_slope(a):
    return mpmath.digamma(a) - mpmath.log(a) + 1 / (2 * a)


def gamma_excess(a):
    return mpmath.polygamma(1, a) - 1 / a


def student_excess(v):
    return v**4 * ((mpmath.polygamma(1, v / 2) - mpmath.polygamma(1, (v + 1) / 2)) / 4 - (v + 3) / (2 * v * (v + 1) ** 2))


def half_step(x):
    return mpmath.loggamma(x + mpf("0.5")) - mpmath.loggamma(x) - mpmath.log(x) / 2


ONE_ARGUMENT = {
    "stirling": (special.stirling, remainder),
    "stirling, first derivative": (jax.vmap(jax.grad(special.stirling)), remainder_slope),
    "stirling, second derivative": (
        jax.vmap(jax.grad(jax.grad(special.stirling))),
        lambda a: gamma_excess(a) - 1 / (2 * a * a),
    ),
    "trigamma_excess": (special.trigamma_excess, gamma_excess),
    "half_step_gammaln": (special.half_step_gammaln, half_step),
    "student_excess": (special.student_excess, student_excess),
    "exp_gap_ratio": (special.exp_gap_ratio, lambda x: 1 + mpmath.expm1(-x) / x),
    "exp_gap_ratio, negative": (lambda x: special.exp_gap_ratio(-x / (1 + x)), lambda x: _exp_gap(-x / (1 + x))),
    "exp_ratio": (special.exp_ratio, lambda x: -mpmath.expm1(-x) / x),
    "log_gap_ratio": (special.log_gap_ratio, lambda y: 1 - mpmath.log1p(y) / y),
    "log_ratio": (special.log_ratio, lambda y: mpmath.log1p(y) / y),
}


def _exp_gap(x):
    return 1 + mpmath.expm1(-x) / x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_one_argument(name, dtype):
    function, reference = ONE_ARGUMENT[name]
    x = np.asarray(POINTS, dtype)
    # 20 eps: sums of ten terms of one sign, and powers up to the fourth.
    relative(computed(function, dtype)(x), [reference(mpf(float(v))) for v in x], 20, dtype)


FACTORS = (1 + 1e-5, 1.1, 0.9, 2.0, 0.5001, 0.4999, 0.3, 1e-3, 1e-8, 1e3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bregman_rest(dtype):
    """Within 100 eps, from differences of one part in 1e5 to differences of eight orders of magnitude."""
    a, factor = (v.ravel().astype(dtype) for v in np.meshgrid(POINTS[:-1], FACTORS))
    b = a * factor

    def g(a):
        return mpmath.loggamma(a) - a * mpmath.log(a) + a

    pairs = [(mpf(float(v)), mpf(float(w))) for v, w in zip(b, a, strict=True)]
    expected = [g(v) - g(w) - (v - w) * (mpmath.digamma(w) - mpmath.log(w)) for v, w in pairs]
    relative(computed(special.gammaln_bregman_rest, dtype)(b, a), expected, 100, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excess_drop(dtype):
    a, part = (v.ravel().astype(dtype) for v in np.meshgrid(POINTS[:-1], (1e-12, 1e-3, 0.2, 0.3, 2.0, 1e4)))
    rise = a * part

    def scaled(a):
        return a * mpmath.polygamma(1, a)

    pairs = [(mpf(float(v)), mpf(float(r))) for v, r in zip(a, rise, strict=True)]
    expected = [scaled(v) - scaled(v + r) for v, r in pairs]
    relative(computed(special.trigamma_excess_drop, dtype)(a, rise), expected, 20, dtype)


# --- families at the extremes ---------------------------------------------------------------------------------------------

GAMMA = [
    ((2.5, 1.7), (4.0, 0.9), 1.3),
    ((1e10, 1.0), (2e10, 2.0), 1.00001e10),
    ((1e10, 1e10), (1.00001e10, 1e10), 1.00001),
    ((1e-6, 1.0), (3e-6, 2.0), 1e-3),
    ((1e10, 3.0), (0.5, 1e-6), 3e9),
    ((1e-3, 3.0), (1e3, 1e6), 1.0),
]


@traced
def gamma_views(p, q, x):
    return p.kl(q), p.log_prob(x)


@pytest.mark.parametrize(("p", "q", "x"), GAMMA)
def test_gamma(p, q, x):
    (a, b), (c, d), y = map(mpf, p), map(mpf, q), mpf(x)
    divergence = (a - c) * mpmath.digamma(a) - mpmath.loggamma(a) + mpmath.loggamma(c) + c * mpmath.log(b / d) + a * (d - b) / b
    density = a * mpmath.log(b) + (a - 1) * mpmath.log(y) - b * y - mpmath.loggamma(a)
    kl, log_prob = gamma_views(Gamma(*p), Gamma(*q), x)
    relative(kl, divergence, 100, jnp.float64)
    # The deviance at x is of size a e^2 with e = x/mean - 1, which x itself gives to eps: an error of 2 a e eps.
    conditioning = 2 * p[0] * abs(p[1] * x / p[0] - 1)
    absolute(log_prob, density, 20 * (1 + abs(float(density)) + conditioning))


DIRICHLET = [
    ((2.5, 0.8, 1.7), (1.2, 3.3, 0.9)),
    ((1e10, 2e10, 1e10), (1.00001e10, 2e10, 1e10)),
    ((1e-6, 2e-6, 1e-6), (2e-6, 1e-6, 3e-6)),
    ((1e8, 1e-6, 1.0), (1.0, 1.0, 1.0)),
    ((1.0, 1.0, 1.0), (1e6, 1e-6, 1.0)),
]


def kl_and_fisher(p, q):
    return p.kl(q), p.fisher_matrix()


wide_kl_and_fisher, narrow_kl_and_fisher = (computed(kl_and_fisher, dtype) for dtype in DTYPES)


@pytest.mark.parametrize(("p", "q"), DIRICHLET)
def test_dirichlet(p, q):
    a, b = [mpf(v) for v in p], [mpf(v) for v in q]
    slopes = [mpmath.digamma(v) - mpmath.digamma(sum(a)) for v in a]
    divergence = log_beta(b) - log_beta(a) + sum((v - w) * s for v, w, s in zip(a, b, slopes, strict=True))
    kl, fisher = wide_kl_and_fisher(Dirichlet(jnp.array(p)), Dirichlet(jnp.array(q)))
    relative(kl, divergence, 100, jnp.float64)
    total = mpmath.polygamma(1, sum(a))
    expected = [[(mpmath.polygamma(1, v) if i == j else 0) - total for j in range(3)] for i, v in enumerate(a)]
    root = [float(mpmath.sqrt(expected[i][i])) for i in range(3)]
    scaled = np.asarray(fisher) / np.outer(root, root)
    correlation = [[float(expected[i][j]) / root[i] / root[j] for j in range(3)] for i in range(3)]
    # The rows of the root cancel, down to the square root of the remaining share (see test_beta_determinant).
    share = 1 - total * sum(1 / mpmath.polygamma(1, v) for v in a)
    absolute(scaled, correlation, 20 / float(mpmath.sqrt(share)))


def log_beta(a):
    return sum(mpmath.loggamma(v) for v in a) - mpmath.loggamma(sum(a))


@traced
def beta_root(p):
    return jax.vmap(p.fisher_sqrt_mv)(Beta(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])))


@pytest.mark.parametrize("p", [(2.5, 1.7), (1e10, 1e10), (1e10, 1e-6), (1e-6, 2e-6), (1.0, 1e-12), (1.0, 1.0)])
def test_beta_determinant(p):
    """The determinant of the Fisher: the difference of two terms that is smaller than them by the concentration."""
    t = [mpmath.polygamma(1, mpf(v)) for v in p]
    s = mpmath.polygamma(1, mpf(p[0]) + mpf(p[1]))
    share = 1 - s / t[0] - s / t[1]
    beta = Beta(*p)
    root = beta_root(beta)
    determinant = (root.a[0] * root.b[1] - root.a[1] * root.b[0]) / float(mpmath.sqrt(t[0] * t[1]))
    # The entries of the root cancel to errors of eps in its determinant, whose value is sqrt(share).
    absolute(determinant, mpmath.sqrt(share), 10)


# --- divergences in float32, with their derivatives ------------------------------------------------------------------------


def of_gamma(p, q):
    (a, b), (c, d) = p, q
    value = (a - c) * mpmath.digamma(a) - mpmath.loggamma(a) + mpmath.loggamma(c) + c * mpmath.log(b / d) + a * (d - b) / b
    slope = [mpmath.digamma(c) - mpmath.digamma(a) + mpmath.log(b / d), a / b - c / d]
    return value, slope, [[mpmath.polygamma(1, c), -1 / d], [-1 / d, c / d**2]]


def of_logits(p, q):
    """The categorical distribution."""
    ps, qs = ([mpmath.exp(v) / mpmath.fsum(map(mpmath.exp, z)) for v in z] for z in (p, q))
    value = mpmath.fsum(v * mpmath.log(v / w) for v, w in zip(ps, qs, strict=True))
    hessian = [[(v if i == j else 0) - v * w for j, w in enumerate(qs)] for i, v in enumerate(qs)]
    return value, [w - v for v, w in zip(ps, qs, strict=True)], hessian


def of_logit(p, q):
    value, slope, hessian = of_logits((*p, mpf(0)), (*q, mpf(0)))
    return value, slope[:1], [hessian[0][:1]]


def of_log_rate(p, q):
    """The Poisson distribution."""
    (a,), (b,) = (map(mpmath.exp, z) for z in (p, q))
    return a * (p[0] - q[0]) - a + b, [b - a], [[b]]


def of_log_time(p, q):
    """The exponential distribution."""
    rise = mpmath.exp(q[0] - p[0])
    return rise - 1 - q[0] + p[0], [rise - 1], [[rise]]


IN_FLOAT32 = {
    "Gamma": (lambda z: Gamma(z[0], z[1]), of_gamma, 2, True),
    "Categorical": (Categorical, of_logits, 4, False),
    "Bernoulli": (lambda z: Bernoulli(z[0]), of_logit, 1, False),
    "Poisson": (lambda z: Poisson(z[0]), of_log_rate, 1, False),
    "Exponential": (lambda z: Exponential(z[0]), of_log_time, 1, False),
}


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_divergence_and_its_derivatives_in_float32(name):
    """From 1e-12 to 1e12, or logarithms and logits of 40: near equality, at equality, far from it, and opposite."""
    make, reference, size, positive = IN_FLOAT32[name]
    rng, count = np.random.default_rng(3), 40
    p = rng.uniform(-12, 12, (count, size)) if positive else rng.uniform(-40, 40, (count, size))
    size = rng.uniform(-5, 1 if positive else 1.6, p.shape) + np.where(rng.random((count, 1)) < 0.2, -np.inf, 0)
    change = 10.0**size * rng.choice([-1, 1], p.shape)
    other = np.where((not positive) & (rng.random((count, 1)) < 0.3), -0.8 * p, p + change)
    p, q = (np.asarray(10.0**v if positive else v, np.float32) for v in (p, other))

    def views(p, q):
        kl = lambda q: make(p).kl(make(q))  # noqa: E731
        return kl(q), jax.grad(kl)(q), jax.hessian(kl)(q), make(q).fisher_matrix()

    for at, *found in zip(p, q, *traced(jax.vmap(views))(p, q), strict=True):
        kl, slope, hessian, fisher = (np.asarray(v, float) for v in found[1:])
        exact = reference(*([mpf(float(v)) for v in z] for z in (at, found[0])))
        expected = [np.vectorize(float)(np.asarray(v)) for v in exact]
        unit = np.sqrt(np.diag(expected[2]))
        where = f"{at} {found[0]}"
        assert kl >= 0 and (kl == 0 or np.any(at != found[0])), where
        if np.any(unit < 1e-15) or np.any(unit > 1e15):
            continue  # the squares do not fit
        np.testing.assert_allclose(kl, expected[0], rtol=1e-3, atol=1e-30, err_msg=where)
        scaled = np.max(np.abs(expected[1] / unit))
        np.testing.assert_allclose(slope / unit, expected[1] / unit, rtol=0, atol=1e-3 * scaled, err_msg=where)
        for matrix in (hessian, fisher)[: 2 if kl == 0 else 1]:
            scaled = matrix / np.outer(unit, unit), expected[2] / np.outer(unit, unit)
            # JAX's derivative of a softmax rounds one minus the probability of the likely class.
            rounding = 4 * 2**-23 / np.max(unit) ** 2 if name == "Categorical" else 0
            np.testing.assert_allclose(*scaled, rtol=0, atol=1e-3 + rounding, err_msg=where)


STUDENT = [
    # Integrals of mpmath.quad, 30 digits, broken at the location, the cusp and the tails.
    ((5.0, 0.7, 1.6), (3.0, -0.4, 0.9)),
    ((0.1, 0.0, 1.0), (0.2, 1.0, 2.0)),
    ((1e8, 0.0, 1.0), (2.0, 4.0, 1e-6)),
    ((2.0, 0.0, 1.0), (1.0, 50.0, 0.01)),
    ((4.0, 0.0, 1.0), (1e6, 2.0, 1.0)),
    ((3.0, 0.0, 1.0), (3.0, 1e-4, 1.0)),
    ((3.0, 0.0, 1.0), (3.32, 0.09, 1.09)),
]


wide_student_kl, narrow_student_kl = (computed(lambda p, q: p.kl(q), dtype) for dtype in DTYPES)


def student_divergence(p, q):
    (v, m, s), (w, n, u) = map(mpf, p), map(mpf, q)

    def log_constant(v):
        return mpmath.loggamma((v + 1) / 2) - mpmath.loggamma(v / 2) - mpmath.log(mpmath.pi * v) / 2

    constants = log_constant(v), log_constant(w) + mpmath.log(s / u)

    def integrand(z):
        log_p = constants[0] - (v + 1) / 2 * mpmath.log1p(z * z / v)
        y = (s * z + m - n) / u
        return mpmath.exp(log_p) * (log_p - constants[1] + (w + 1) / 2 * mpmath.log1p(y * y / w))

    cusp, width = (n - m) / s, mpmath.sqrt(w) * u / s
    breaks = {mpf(k) for k in (-3, -1, 0, 1, 3)} | {cusp + k * width for k in (-100, -10, -1, 0, 1, 10, 100)}
    end = max(map(abs, breaks)) + 5
    # Beyond the last break in log z, where every tail is exponential.
    start, length = mpmath.log(end), min(max(90 / min(v, 10), 30), 900)
    far = [start + length * mpf(k) / 12 for k in (0, 0.2, 0.5, 1, 2, 3, 5, 8, 12)]
    tails = mpmath.quad(lambda e: mpmath.exp(e) * (integrand(mpmath.exp(e)) + integrand(-mpmath.exp(e))), far)
    return mpmath.quad(integrand, sorted(breaks | {end, -end})) + tails


@pytest.mark.parametrize(("p", "q"), STUDENT)
def test_student_divergence(p, q):
    with mpmath.workdps(22):
        expected = float(student_divergence(p, q))
    assert abs(float(wide_student_kl(StudentT(*p), StudentT(*q))) / expected - 1) < 1e-12
    narrow = [StudentT(*map(jnp.float32, fields)) for fields in (p, q)]
    rtol = 1e-5 if expected > 1e-8 else 5e-4  # the stated accuracy
    assert abs(float(narrow_student_kl(*narrow)) / expected - 1) < rtol


@pytest.mark.parametrize("df", [0.1, 1.0, 5.0, 1e8])
def test_student_density(df):
    """The density at the location, on both sides of ``z^2 = df``, where its formula changes, and far out; and its df slope."""
    z = np.array([0.0, 1e-30, 0.9, 1.1, -40.0, 1e9, 1e150])

    def log_density(v, z):
        constant = mpmath.loggamma((v + 1) / 2) - mpmath.loggamma(v / 2) - mpmath.log(mpmath.pi * v) / 2
        return constant - (v + 1) / 2 * mpmath.log1p(z * z / v)

    def its_slope(v, z):
        of_constant = (mpmath.digamma((v + 1) / 2) - mpmath.digamma(v / 2) - 1 / v) / 2
        return of_constant - mpmath.log1p(z * z / v) / 2 + (v + 1) / 2 * z * z / (v * (v + z * z))

    value, slope = student_density(z, df)
    relative(value, [log_density(mpf(df), mpf(x)) for x in z], 20, jnp.float64)
    relative(slope, [its_slope(mpf(df), mpf(x)) for x in z], 100, jnp.float64)


@traced
def student_density(z, df):
    return jax.vmap(jax.value_and_grad(lambda df, z: StudentT(df, 0.0, 1.0).log_prob(z)), (None, 0))(df, z)


def test_student_information():
    """The information on the degrees of freedom, which falls with their fourth power, and the Hessian of the KL."""
    df = np.array([0.1, 1.0, 5.0, 100.0, 1e4, 1e8])

    @traced
    @jax.vmap
    def views(df):
        p = StudentT(df, 0.3, 1.6)
        return p.fisher_matrix()[0, 0], jax.hessian(lambda df: p.kl(StudentT(df, p.loc, p.scale)))(df)

    expected = []
    for v in map(mpf, df):
        trigammas = (mpmath.polygamma(1, v / 2) - mpmath.polygamma(1, (v + 1) / 2)) / 4
        expected.append(trigammas - (v + 5) / (2 * v * (v + 1) * (v + 3)))
    fisher, hessian = views(df)
    relative(fisher, expected, 20, jnp.float64)
    relative(hessian, expected, 100, jnp.float64)


NEGATIVE_BINOMIAL = [
    ((3.0, 1.0), (5.0, 0.5)),
    ((3.0, 1.0), (3.0, 1.0001)),
    ((0.01, 0.1), (0.02, 3.0)),
    ((3.0, 1e-8), (3.0, 1e-6)),
    ((3.0, 50.0), (3.1, 0.01)),
    ((200.0, 0.02), (300.0, 2.0)),
    ((20.0, 1.0), (20.0, 1e-10)),
    ((1e-6, 1.0), (1e-6, 2.7)),
]


def negative_binomial_sums(p, q):
    """KL and the information on the dispersion as sums over the counts, with probabilities by their recurrence."""
    (m, r), (n, s) = ((mpmath.exp(log_mean), mpmath.exp(-log_alpha)) for log_mean, log_alpha in (p, q))
    log_p, log_q = r * mpmath.log(r / (r + m)), s * mpmath.log(s / (s + n))
    divergence, information, slope = mpf(0), mpf(0), mpmath.mpf(0)
    for k in range(int(m + 15 * mpmath.sqrt(m + m * m / r) + 45 * (m + r) / r + 60) if r < 1e3 else 100):
        weight = mpmath.exp(log_p)
        divergence += weight * (log_p - log_q)
        information += weight * slope
        slope += 1 / (r + k) ** 2
        log_p += mpmath.log((k + r) / (k + 1) * m / (r + m))
        log_q += mpmath.log((k + s) / (k + 1) * n / (s + n))
    return divergence, r * r * (information - m / (r * (r + m)))


def test_a_negative_binomial_has_no_information_on_a_dispersion_that_counts_as_zero():
    """For small ``alpha`` the information on its logarithm is ``(alpha m)^2 / 2``. Below exp(-80) the density is constant."""
    for log_alpha, expected in ((-79.5, 4.5 * np.exp(-159.0)), (-81.0, 0.0), (-1e30, 0.0)):
        p = NegativeBinomial(np.log(3.0), np.float64(log_alpha))
        _, fisher = wide_kl_and_fisher(p, p)
        np.testing.assert_allclose(np.diag(fisher), [3.0, expected], rtol=1e-12)


@pytest.mark.parametrize(("p", "q"), NEGATIVE_BINOMIAL)
def test_negative_binomial(p, q):
    p, q = np.log(p), np.log(q)
    divergence, information = negative_binomial_sums([mpf(v) for v in p], [mpf(v) for v in q])
    wide = wide_kl_and_fisher(NegativeBinomial(*p), NegativeBinomial(*q))
    narrow = narrow_kl_and_fisher(*(NegativeBinomial(*fields.astype(np.float32)) for fields in (p, q)))
    # The fields are logarithms up to 25 in float32. If two are nearly equal, their rounding is large relative to the distance.
    wide, narrow = ((kl, fisher[1, 1]) for kl, fisher in (wide, narrow))
    for value, value32, expected in zip(wide, narrow, (divergence, information), strict=True):
        assert abs(float(value) / float(expected) - 1) < 1e-14
        if np.max(np.abs(p - q)) > 1e-3:
            assert abs(float(value32) / float(expected) - 1) < 5e-6


def absolute(actual, expected, factor):
    """Within ``factor`` eps of float64."""
    expected = np.vectorize(float)(np.asarray(expected))
    np.testing.assert_allclose(np.asarray(actual, float), expected, rtol=0, atol=factor * np.finfo(float).eps)


def relative(actual, expected, factor, dtype):
    """Within ``factor`` eps, relative, everywhere."""
    expected = np.vectorize(float)(np.asarray(expected))
    np.testing.assert_allclose(np.asarray(actual, float), expected, rtol=factor * float(jnp.finfo(dtype).eps))
