"""Forecasts and designs, against closed forms and matrices written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from models import compiled

import jaxfisher as jf
from jaxfisher import design, forecasts

pytestmark = pytest.mark.usefixtures("in_numpy")

RNG = np.random.default_rng(8)
TIMES = np.linspace(0.1, 2.0, 9)
PARAMS = {"amplitude": jnp.asarray(1.3), "decay": jnp.asarray(0.7), "noise": jnp.asarray(-1.0)}
MIXING = np.eye(9) + 0.2 * RNG.normal(size=(9, 9))


def mean(p):
    return p["amplitude"] * jnp.exp(-p["decay"] * TIMES)


def covariance(p):
    return jnp.exp(p["noise"]) * (MIXING @ MIXING.T) + jnp.diag(0.1 * p["amplitude"] ** 2 * TIMES)


def derivatives():
    """The derivatives of the mean and of the covariance, by hand."""
    a, k, s = (float(PARAMS[name]) for name in ("amplitude", "decay", "noise"))
    falling = np.exp(-k * TIMES)
    of_mean = np.stack([falling, -a * TIMES * falling, np.zeros(9)])
    of_covariance = np.stack([np.diag(0.2 * a * TIMES), np.zeros((9, 9)), np.exp(s) * MIXING @ MIXING.T])
    return of_mean, of_covariance, np.asarray(covariance(PARAMS))


def written_out():
    of_mean, of_covariance, spread = derivatives()
    inverse = np.linalg.inv(spread)
    turned = np.einsum("ij,kjl->kil", inverse, of_covariance)
    return of_mean @ inverse @ of_mean.T + 0.5 * np.einsum("kij,lji->kl", turned, turned)


def relative(actual, expected):
    return np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))


@functools.cache
def forecast():
    """The Fisher, with a prior, and the bias of an effect that the simulator leaves out; as one program."""

    def make(params):
        F = forecasts.gaussian_fisher(mean, covariance)(params)
        prior = forecasts.gaussian_prior(F, {"amplitude": 0.2, "decay": jnp.inf, "noise": 0.5})
        moved = forecasts.bias(mean, covariance)(params, F + prior, 0.01 * TIMES**2, 0.02 * MIXING @ MIXING.T)
        return F, F + prior, moved

    return compiled(make)(PARAMS)


def test_the_fisher_of_a_simulator_is_the_formula_and_that_of_the_normal_vector():
    F, _, _ = forecast()
    assert relative(F, written_out()) < 1e-12
    model = lambda p: jf.MultivariateNormal(mean(p), covariance=covariance(p))  # noqa: E731
    assert relative(compiled(lambda p: jf.exact_fisher(model)(p).as_matrix())(PARAMS), written_out()) < 1e-11
    held = forecasts.gaussian_fisher(mean, np.asarray(covariance(PARAMS)))(PARAMS)
    of_mean, _, spread = derivatives()
    assert relative(held, of_mean @ np.linalg.solve(spread, of_mean.T)) < 1e-12


def test_errors_with_the_others_known_and_fitted_and_a_nuisance_parameter():
    F, both, _ = forecast()
    matrix = written_out()
    order = list(PARAMS)
    assert relative([forecasts.conditional_errors(F)[name] for name in order], np.diag(matrix) ** -0.5) < 1e-12
    assert relative([jf.standard_errors(F)[name] for name in order], np.diag(np.linalg.inv(matrix)) ** 0.5) < 1e-11
    four = jf.standard_errors(F, n=4)
    assert relative([four[name] for name in order], 0.5 * np.diag(np.linalg.inv(matrix)) ** 0.5) < 1e-11
    model = lambda w, x: jf.Normal(w * x, 1.0)  # noqa: E731
    alone = jf.exact_fisher(model)(0.0, jnp.array([1.0, 2.0, 2.0]))
    assert relative(forecasts.conditional_errors(alone), jf.standard_errors(alone)) < 1e-12
    twice = jf.standard_errors(F + F, n=1)
    assert relative([twice[name] for name in order], 0.5**0.5 * np.diag(np.linalg.inv(matrix)) ** 0.5) < 1e-11
    prior = np.diag([25.0, 0, 4.0])
    assert relative([jf.standard_errors(both)[name] for name in order], np.diag(np.linalg.inv(matrix + prior)) ** 0.5) < 1e-11
    kept = jf.marginal(both, lambda path: "noise" not in path)
    assert relative(np.linalg.inv(kept), np.linalg.inv(matrix + prior)[:2, :2]) < 1e-11


def test_the_bias_is_what_a_fit_of_data_with_the_effect_finds():
    """The bias follows the first-order formula; for a linear mean of known covariance it is that of weighted least squares."""
    _, _, moved = forecast()
    of_mean, of_covariance, spread = derivatives()
    inverse = np.linalg.inv(spread)
    effect, wider = 0.01 * TIMES**2, 0.02 * MIXING @ MIXING.T
    pulled = of_mean @ inverse @ effect + 0.5 * np.einsum("ij,kjl,lm,mi->k", inverse, of_covariance, inverse, wider)
    expected = np.linalg.solve(written_out() + np.diag([25.0, 0, 4.0]), pulled)
    assert relative([moved[name] for name in PARAMS], expected) < 1e-11

    columns = RNG.normal(size=(9, 2))
    line = lambda w: columns @ w  # noqa: E731
    F = forecasts.gaussian_fisher(line, spread)(jnp.zeros(2))
    whitened = np.linalg.solve(np.linalg.cholesky(spread), np.column_stack([columns, effect]))
    assert (
        relative(forecasts.bias(line, spread)(jnp.zeros(2), F, effect), np.linalg.lstsq(whitened[:, :2], whitened[:, 2])[0])
        < 1e-11
    )


# --- designs -----------------------------------------------------------------------------------------------------------------

PLACES = np.linspace(-1, 1, 21)


def quadratic(p, x):
    return jf.Normal(p[0] + p[1] * x + p[2] * x**2, 1.0)


@functools.cache
def candidates():
    return compiled(design.informations(quadratic))(jnp.zeros(3), PLACES)


def test_the_information_of_each_candidate():
    columns = np.stack([PLACES**0, PLACES, PLACES**2], 1)
    assert relative(candidates(), columns[:, :, None] * columns[:, None, :]) < 1e-14


def test_criteria_of_many_designs_in_one_call():
    """Against NumPy, one design after the other; a design that does not determine the parameters has minus infinity."""
    weights = RNG.dirichlet(np.ones(21), size=40)
    matrices = np.einsum("dm,mij->dij", weights, candidates())
    found = compiled(lambda m: [c(m) for c in (design.d_criterion, design.a_criterion, design.e_criterion)])(matrices)
    assert relative(found[0], [np.linalg.slogdet(m)[1] for m in matrices]) < 1e-12
    assert relative(found[1], [-np.trace(np.linalg.inv(m)) for m in matrices]) < 1e-11
    assert relative(found[2], [np.linalg.eigvalsh(m)[0] for m in matrices]) < 1e-11
    assert design.d_criterion(candidates()[3]) == -np.inf and design.a_criterion(candidates()[3]) == -np.inf


OPTIMAL = {
    "D": (design.d_criterion, [1 / 3, 1 / 3, 1 / 3]),
    "A": (design.a_criterion, [1 / 4, 1 / 2, 1 / 4]),
    "E": (design.e_criterion, [1 / 5, 3 / 5, 1 / 5]),
}


@pytest.mark.parametrize("name", OPTIMAL)
def test_the_best_designs_for_a_quadratic(name):
    """Known since Kiefer and Wolfowitz: at both ends and in the middle, with these weights."""
    criterion, expected = OPTIMAL[name]
    found = compiled(lambda m: design.optimal_weights(m, criterion, atol=1e-9))(candidates())
    assert bool(found.converged) and 0 <= found.gap <= 1e-9
    np.testing.assert_allclose(found.weights[np.array([0, 10, 20])], expected, atol=1e-4)
    best = np.zeros(21)
    best[[0, 10, 20]] = expected
    assert abs(found.value - criterion(np.tensordot(best, candidates(), 1))) < 2e-9


def test_an_exchange_leaves_a_start_that_determines_too_little_or_does_not_converge():
    """Three candidates that inform one parameter each: a single exchange suffices from two of them, but not from one."""
    M = jnp.eye(3)[:, :, None] * jnp.eye(3)[:, None, :]
    exchanged = compiled(lambda start: design.exchange(M, design.d_criterion, start))
    found = exchanged(jnp.array([0, 0, 1]))
    assert bool(found.converged) and float(found.value) == 0.0 and sorted(found.runs.tolist()) == [0, 1, 2]
    stuck = exchanged(jnp.array([2, 2, 2]))
    assert not bool(stuck.converged) and float(stuck.value) == -np.inf
    for outside in (-1, 3):
        wrong = exchanged(jnp.array([0, 1, outside]))
        assert not bool(wrong.converged) and np.isnan(wrong.value)


def test_a_criterion_that_is_nan_for_some_exchanges_does_not_stop_the_others():
    """A line is best measured at its ends; measured twice at one place it is singular, and ``log(-0.0 or less)`` may be NaN."""
    M = jnp.stack([jnp.outer(row, row) for row in jnp.stack([jnp.ones(5), jnp.linspace(-1, 1, 5)], 1)])
    nan_if_singular = lambda m: jnp.where(jnp.linalg.det(m) > 0.1, -jnp.trace(m) / jnp.linalg.det(m), jnp.nan)  # noqa: E731
    for start in ([1, 2], [2, 2]):
        found = compiled(lambda start: design.exchange(M, nan_if_singular, start))(jnp.array(start))
        assert bool(found.converged) and sorted(found.runs.tolist()) == [0, 4] and float(found.value) == -1.0


def test_an_exchange_finds_the_runs_and_the_gradient_the_places():
    """Six runs, two at each of three points. From other points, the derivative by the points climbs to the same information."""
    start = jnp.array([3, 5, 8, 12, 15, 16], jnp.int32)
    found = compiled(lambda m: design.exchange(m, design.d_criterion, start))(candidates())
    assert bool(found.converged)
    np.testing.assert_array_equal(np.sort(found.runs), [0, 0, 10, 10, 20, 20])

    def value(raw):
        return jf.exact_fisher(quadratic)(jnp.zeros(3), jnp.tanh(raw)).logdet(0.0)

    climb = compiled(lambda raw: jax.lax.fori_loop(0, 300, lambda _, raw: raw + 0.3 * jax.grad(value)(raw), raw))
    places = np.tanh(climb(jnp.array([-0.9, 0.2, 1.1])))
    np.testing.assert_allclose(places, [-1, 0, 1], atol=0.06)


IN_NUMPY = {
    "D": lambda m: np.linalg.slogdet(m)[1] if np.linalg.eigvalsh(m)[0] > 1e-9 else -np.inf,
    "A": lambda m: -np.trace(np.linalg.inv(m)) if np.linalg.eigvalsh(m)[0] > 1e-9 else -np.inf,
    "E": lambda m: np.linalg.eigvalsh(m)[0],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_design_that_determines_too_little_has_no_finite_criterion(dtype):
    """Designs of known rank: fewer measurements than parameters, polynomials, columns far from zero, in any units."""
    rng, kinds = np.random.default_rng(4), ("normal", "polynomial", "far from zero")
    criteria = compiled(lambda m: (design.d_criterion(m), design.a_criterion(m)))
    wrong, seen = [], []
    for p in (2, 3, 5):
        for kind in kinds:
            for turn in range(20):
                count = p if turn % 4 == 0 else int(rng.integers(1, p))
                rows = rng.normal(size=(count, p))
                if kind == "polynomial":
                    rows = np.vander(np.linspace(-1, 1, p)[:count] if count == p else rng.uniform(-1, 1, size=count), p)
                if kind == "far from zero" and count < p:
                    rows[:, 0], rows[:, 1:] = 1, rows[:, 1:] + 5 * rng.normal()
                units = 10.0 ** rng.integers(-6, 7, size=p)
                matrix = np.zeros((p, p), dtype)
                for row in (rows * units).astype(dtype):
                    matrix += np.outer(row, row)
                found = [bool(np.isfinite(value)) for value in criteria(jnp.asarray(matrix))]
                seen.append(count)
                if found != [count == p] * 2 and not (count == p and np.linalg.cond(rows) ** 2 * p * np.finfo(dtype).eps > 0.1):
                    wrong.append((kind, p, count, found))
    assert len(set(seen)) == 5 and not wrong, wrong


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIMAL)
def test_designs_do_not_depend_on_the_unit_of_the_information(name, dtype):
    """A common unit of all parameters multiplies the information, which changes no criterion's best design."""
    criterion, M = OPTIMAL[name][0], jnp.asarray(candidates(), dtype)
    start = jnp.array([3, 5, 12, 15], jnp.int32)
    weights = compiled(lambda m: design.optimal_weights(m, criterion, max_steps=300).weights)
    runs = compiled(lambda m: design.exchange(m, criterion, start))
    of = IN_NUMPY[name]
    for unit in (1e-8, 1e8):
        found, expected = weights(M * dtype(unit)), np.zeros(21)
        expected[[0, 10, 20]] = OPTIMAL[name][1]
        assert np.max(np.abs(np.asarray(found) - expected)) < (2e-2 if dtype == np.float32 else 1e-3), (unit, found)
        exchanged = runs(M * dtype(unit))
        held = candidates()[np.asarray(exchanged.runs)]
        best = max(of(held.sum(0) - out + into) for out in held for into in candidates())
        assert bool(exchanged.converged) and of(held.sum(0)) > best - 1e-4 * abs(best), (unit, exchanged, best)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: forecasts.gaussian_fisher(3.0, covariance), TypeError, "`mean` is 3.0; expected a function"),
        (
            lambda: forecasts.gaussian_fisher(mean, jnp.eye(4))(PARAMS),
            ValueError,
            r"`mean` gives shape \(9,\) and `covariance` \(4, 4\)",
        ),
        (lambda: forecasts.gaussian_fisher(mean, covariance)({**PARAMS, "decay": 1}), TypeError, r"\['decay'\] has dtype int"),
        (
            lambda: forecasts.gaussian_fisher(lambda p: [p, p], np.eye(2))(0.5),
            TypeError,
            "`mean` gives a list; expected one array",
        ),
        (
            lambda: forecasts.gaussian_fisher(lambda p: jnp.stack([p, p]), [[1.0, 0.0], [0.0, 1.0]])(0.5),
            TypeError,
            "`covariance` gives a list; expected one array",
        ),
        (lambda: forecasts.gaussian_prior(PARAMS, {"amplitude": 1.0}), ValueError, "errors"),
        *[
            (
                lambda bad=bad: forecasts.gaussian_prior(np.zeros(2, bad.dtype), bad),
                ValueError,
                "holds .*; expected standard dev",
            )
            for bad in (np.array([1.0, -2.0]), np.array([1.0, 0.0]), np.array([1.0 + 1.0j, 1.0]))
        ],
        (
            lambda: forecasts.bias(mean, covariance)(PARAMS, forecast()[0], 1j * np.ones(9)),
            TypeError,
            "`effect` is .*complex.*expected real numbers",
        ),
        (
            lambda: forecasts.bias(mean, covariance)(PARAMS, jf.covariance(forecast()[0]), np.ones(9)),
            TypeError,
            r"bias: `fisher` is Fisher\(covariance.*expected the Fisher",
        ),
        (
            lambda: forecasts.gaussian_fisher(lambda p: jnp.stack([p, p]), pd.DataFrame(np.eye(2)))(0.5),
            TypeError,
            "gaussian_fisher: `covariance` is a pandas DataFrame.*expected an array",
        ),
        *[
            (lambda of=of, bad=bad: of(bad), ValueError, f"{of.__name__}: `information` is .*expected an array of matrices")
            for of in (design.d_criterion, design.a_criterion, design.e_criterion)
            for bad in ([[1.0, 0.0], [0.0, 1.0]], np.ones((3, 2)), np.ones(2))
        ],
        (lambda: design.d_criterion(jf.scaled_identity(np.ones(2), 1.0)), ValueError, r"an Operator.*pass F.as_matrix\(\)"),
        (lambda: design.exchange(list(candidates()), design.d_criterion, np.arange(3)), ValueError, "`informations` is a list"),
        (
            lambda: forecasts.gaussian_prior(np.zeros(2), np.array([1, 2])),
            TypeError,
            "int64; expected real .* floating, 2.0 for 2",
        ),
        (
            lambda: forecasts.gaussian_fisher(lambda p: p, np.ones((2, 2)))(np.zeros(2)),
            ValueError,
            "gaussian_fisher: `covariance` has the eigenvalue .*positive definite.*the variance of their noise",
        ),
        (
            lambda: forecasts.gaussian_fisher(lambda p: jax.lax.complex(p, p), np.eye(2))(np.zeros(2)),
            TypeError,
            "`mean` gives numbers of dtype co",
        ),
        (
            lambda: design.exchange(candidates(), lambda m: m[0], np.arange(3)),
            TypeError,
            "`criterion` returned an array of shape",
        ),
        (lambda: design.optimal_weights(candidates(), lambda m: 1), TypeError, "`criterion` returned .*; expected one real"),
        (lambda: forecasts.conditional_errors(np.eye(3)), TypeError, "conditional_errors: `fisher`: expected a Fisher"),
        (
            lambda: forecasts.bias(mean, covariance)(PARAMS, forecast()[0], np.ones(4)),
            ValueError,
            r"`effect`.*expected shape \(9,\)",
        ),
        (lambda: design.informations(quadratic)(jnp.zeros(3), 1.0), ValueError, "leading axis of examples"),
        (lambda: design.optimal_weights(np.eye(3), design.d_criterion), ValueError, r"expected one matrix of.*candidate"),
        (lambda: design.optimal_weights(candidates(), "D"), TypeError, "`criterion` is 'D'; expected a function"),
        (lambda: design.optimal_weights(candidates(), design.d_criterion, atol=-1.0), ValueError, "`atol` is -1.0"),
        *[
            (
                lambda bad=bad: design.exchange(candidates(), design.d_criterion, np.array([0, bad, 2])),
                ValueError,
                f"holds {bad}; .* to 20",
            )
            for bad in (-1, 21)
        ],
        (lambda: design.exchange(candidates(), design.d_criterion, np.ones(3)), TypeError, "a vector of whole numbers"),
        (lambda: design.exchange(candidates(), design.d_criterion, np.arange(3), max_steps=0), ValueError, "`max_steps` is 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
