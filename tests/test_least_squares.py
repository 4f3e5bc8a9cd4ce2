"""Damped least squares on scores, against `numpy.linalg.lstsq` of the stacked system in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import compiled
from problems import flat

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

RNG = np.random.default_rng(7)


def log_psi(params, spins):
    return jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + params["b"])))


def problem(rows, width, dtype, rng=RNG):
    params = {"b": rng.normal(size=width) / 4, "w": rng.normal(size=(6, width)) / 2}
    spins, e = rng.choice([-1.0, 1.0], (rows, 6)), rng.normal(size=rows)
    cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)  # noqa: E731
    return cast(params), cast(spins), cast(e), cast(rng.uniform(0.5, 2.0, rows))


def by_lstsq(scores, e, damping):
    """The least-squares fit of the rows with ``sqrt(damping) I`` below them, in float64."""
    matrix = np.asarray(compiled(lambda: scores.as_matrix())(), np.float64)
    root = np.sqrt(np.asarray(scores.weights, np.float64))
    below = np.concatenate([root[:, None] * matrix, np.sqrt(damping) * np.eye(matrix.shape[1])])
    return np.linalg.lstsq(below, np.concatenate([root * e, np.zeros(matrix.shape[1])]))[0]


def test_centred_rows_do_not_feel_what_all_numbers_have_in_common():
    """Local energies may be far from zero: rounding errors of their mean, over a small damping, would spoil the fit."""
    params, spins, e, weights = problem(7, 3, jnp.float32, np.random.default_rng(1))
    scores = jf.scores(log_psi, center=True)(params, spins, weights=weights)
    x, _ = compiled(lambda s, e: jf.least_squares(s, e, 1e-3))(scores, e + 100)
    exact = np.asarray(e + 100, np.float64)
    expected = by_lstsq(scores, exact - np.average(exact, weights=weights), 1e-3)
    np.testing.assert_allclose(flat(x), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize(("rows", "width"), [(7, 3), (40, 2)], ids=["fewer rows", "more rows"])
def test_the_fit_is_that_of_the_stacked_system(rows, width, center):
    params, spins, e, weights = problem(rows, width, jnp.float64)
    for size in (None, 5):
        scores = jf.scores(log_psi, center, batch_size=size)(params, spins, weights=weights)
        x, info = compiled(lambda s, e: jf.least_squares(s, e, 0.03, rtol=0.0))(scores, e)
        expected = by_lstsq(scores, np.asarray(e), 0.03)
        np.testing.assert_allclose(flat(x), expected, atol=1e4 * np.finfo(float).eps * np.abs(expected).max())
        assert info.converged and info.residual < 1e-10


def test_a_small_damping_does_not_magnify_the_rounding_of_the_right_hand_side():
    """There are fewer rows than parameters, and solving for the formed right-hand side is off by more than a thousandth."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(key, shape, jnp.float32) / 6 for key, shape in zip(keys, [(40, 30), (30, 30)], strict=False)]
    spins = jax.random.rademacher(keys[2], (32, 40), jnp.float32)
    e = jax.random.normal(keys[3], (32,), jnp.float32)
    deep = lambda params, spin: log_psi({"w": params[1], "b": 0}, jnp.log(jnp.cosh(spin @ params[0])))  # noqa: E731
    scores = jf.scores(deep, center=True)(params, spins)
    damping = 1e-3
    expected = by_lstsq(scores, np.asarray(e, np.float64), damping)
    x, info = compiled(lambda s, e: jf.least_squares(s, e, damping, rtol=0.0))(scores, e)
    v = scores.rmv(scores.weights * (e - e.mean()))
    other, _ = compiled(lambda s, v: jf.solve(jf.fisher_from_scores(s), v, damping))(scores, v)
    error = lambda x: np.linalg.norm(flat(x) - expected) / np.linalg.norm(expected)  # noqa: E731
    assert info.converged
    assert error(x) < 1e-4 < 1e-3 < error(other)


def test_what_rounding_leaves_is_a_number():
    """Refine until the square of the residual underflows to zero: its root must not become a NaN."""
    fit = compiled(lambda p, s, e, damping: jf.least_squares(jf.scores(log_psi)(p, s), e, damping, rtol=0.0))
    for seed in range(4):
        params, spins, e, _ = problem(7, 30, jnp.float32, np.random.default_rng(seed))
        for near in (0.0, 1e-2):
            for damping in (1e-3, 1e-5):
                x, info = fit(params, spins.at[1].set(spins[0] + near * spins[1]), e, damping)
                assert np.isfinite(flat(x)).all() and info.converged, (seed, near, damping)


def test_a_damping_that_is_not_felt_is_not_called_converged():
    params, spins, e, _ = problem(7, 3, jnp.float32)
    scores = jf.scores(log_psi)(params, spins)
    assert not jf.least_squares(scores, e, 1e-9)[1].converged


def test_the_derivative_in_the_numbers_fitted_and_in_the_damping():
    params, spins, e, _ = problem(7, 3, jnp.float64)
    scores = jf.scores(log_psi)(params, spins)
    fit = compiled(lambda e, damping: jf.least_squares(scores, e, damping, rtol=0.0)[0])
    tangent = compiled(lambda e, t, d: jax.jvp(lambda e, d: jf.least_squares(scores, e, d, rtol=0.0)[0], (e, d), (t, 1.0))[1])
    direction = jnp.asarray(RNG.normal(size=7))
    step = 1e-5
    expected = (flat(fit(e + step * direction, 0.1 + step)) - flat(fit(e - step * direction, 0.1 - step))) / (2 * step)
    np.testing.assert_allclose(flat(tangent(e, direction, 0.1)), expected, atol=1e-8 * np.abs(expected).max())


def test_what_is_not_finite_is_not_called_converged():
    params, spins, e, _ = problem(7, 3, jnp.float64)
    _, info = jf.least_squares(jf.scores(log_psi)(params, spins), e.at[2].set(jnp.nan), 0.1)
    assert not info.converged and not info.finite


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": 1.0}, TypeError, "`scores` is 1.0"),
        ({"e": np.zeros(6)}, ValueError, r"`e` is .*expected one real number per row, of shape \(7,\)"),
        ({"e": np.zeros(7, complex)}, ValueError, "expected one real number per row"),
        ({"e": [1.0] * 7}, ValueError, "`e` is a list; expected one real number per row"),
        ({"damping": 0.0}, ValueError, "expected a number above zero"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"rtol": "tight"}, TypeError, "rtol"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    params, spins, e, _ = problem(7, 3, jnp.float64)
    given = {"scores": jf.scores(log_psi)(params, spins), "e": e, "damping": 0.1, "rtol": 1e-5} | change
    with pytest.raises(error, match=message):
        jf.least_squares(given["scores"], given["e"], given["damping"], rtol=given["rtol"])
    if "rtol" not in change and given["damping"] != 0:
        with pytest.raises(error, match=message):
            jf.LSMR().least_squares(given["scores"], given["e"], given["damping"])


def test_padding_may_have_any_number():
    x, weights = jnp.array([1.0, jnp.nan, 2.0]), jnp.array([1.0, 0.0, 1.0])
    scores = jf.scores(lambda w, x: w * x)(0.0, x, weights=weights)
    for solve in (jf.least_squares, jf.LSMR().least_squares):
        fitted, info = solve(scores, jnp.array([2.0, jnp.nan, 4.0]), 0.5)
        np.testing.assert_allclose(fitted, 5.0 / (2.5 + 0.5), rtol=1e-5)  # (1 * 2 + 2 * 4) / 2 over (1 + 4) / 2 + 1/2
        assert bool(info.converged)
