"""Estimates for large operators: against dense float64 numbers, by z-scores with their own standard errors."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import classifier, data, flat, mlp_params

import jaxfisher as jf
from jaxfisher import _lanczos
from jaxfisher._operators.dense import Dense
from jaxfisher._tree import param_spec

KEYS = 64
BY_LEAF = {"hidden": {"w": 0.1, "b": 0.02}, "out": [0.5, 0.01]}
POINTS = jnp.linspace(-0.2, 0.8, 6)


@functools.cache
def problem():
    """A softmax network's Fisher, of rank 14 for 31 parameters, and its dense matrix by Jacobians of the logits."""
    params, (x, _) = mlp_params(jax.random.key(7)), data(jax.random.key(8))

    def jacobian(params, x):
        leaves = jax.tree.leaves(jax.jacobian(lambda p: classifier(p, x).logits)(params))
        return classifier(params, x).logits, jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)

    logits, rows = (np.asarray(part) for part in jax.jit(jax.vmap(jacobian, (None, 0)))(params, x))
    shares = np.exp(logits) / np.sum(np.exp(logits), 1, keepdims=True)
    metric = [np.diag(share) - np.outer(share, share) for share in shares]
    return jax.jit(jf.exact_fisher(classifier))(params, x), np.mean(np.swapaxes(rows, 1, 2) @ metric @ rows, axis=0)


def holding(matrix, dtype=jnp.float64):
    """An operator with this matrix."""
    form = Dense(jnp.asarray(matrix, dtype), param_spec(np.zeros(len(matrix), dtype)))
    return jf.Operator(form, jf.Provenance("exact", 1))


def rotated(values, key):
    """A matrix with these eigenvalues."""
    q = np.linalg.qr(np.asarray(jax.random.normal(key, (len(values), len(values)))))[0]
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def smoothed(values, points, width):
    """The density of eigenvalues by its definition."""
    z = (np.asarray(points)[:, None] - np.asarray(values)[None, :]) / width
    return np.mean(np.exp(-(z**2) / 2), axis=1) / (width * np.sqrt(2 * np.pi))


def all_logs(matrix, damping):
    return np.linalg.slogdet(matrix + damping * np.eye(len(matrix)))[1]


def all_logs_by_leaf(matrix):
    zeros = problem()[0].spec.zeros()
    return all_logs(matrix, flat(jax.tree.map(lambda d, leaf: np.full(leaf.shape, d), BY_LEAF, zeros)))


# (what it estimates, how, its exact value). No tolerance: all probes are used.
LAWS = {
    "trace": (lambda F, key: jf.estimate_trace(F, key, rtol=0.0, max_samples=40), np.trace),
    "diagonal": (lambda F, key: jf.estimate_diagonal(F, key, rtol=0.0, max_samples=40), np.diag),
    "logdet": (lambda F, key: jf.estimate_logdet(F, key, BY_LEAF, rtol=0.0, max_samples=60), all_logs_by_leaf),
    "density": (
        lambda F, key: jf.spectral_density(F, key, POINTS, width=0.1, num_samples=30, num_matvecs=20),
        lambda matrix: smoothed(np.linalg.eigvalsh(matrix), POINTS, 0.1),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_values_are_right_and_their_errors_are_honest(name, key):
    """Unbiased; every value within five of its own errors; and the spread over keys is what is stated, within 30 %."""
    F, matrix = problem()
    estimate, exact = LAWS[name]
    seen = jax.jit(jax.vmap(estimate, (None, 0)))(F, jax.random.split(key, KEYS))
    values, errors = (np.stack([flat(jax.tree.map(lambda x, i=i: x[i], tree)) for i in range(KEYS)]) for tree in seen[:2])
    off = values - np.atleast_1d(exact(matrix))
    spread = np.sqrt(np.mean(off**2, axis=0))
    told = spread > 1e-12 * np.max(np.abs(values))
    assert np.sum(told) >= 1 and np.all(errors[:, ~told] <= 1e-12 * np.max(np.abs(values)))
    off, errors, spread = off[:, told], errors[:, told], spread[told]
    assert np.max(np.abs(off) / errors) < 5
    assert np.max(np.abs(np.mean(off, axis=0)) / (spread / np.sqrt(KEYS))) < 5
    stated = np.sqrt(np.mean(errors**2))
    np.testing.assert_allclose(np.sqrt(np.mean(spread**2)), stated, rtol=0.3)
    assert np.all(seen.samples == {"logdet": 60, "density": 30}.get(name, 40))
    if name != "density":
        assert not np.any(seen.converged), "no error is at most zero"


# Programs that several tests share, since compiling them takes most of the time.
trace_of = jax.jit(jf.estimate_trace, static_argnames="max_samples")
logdet_of = jax.jit(jf.estimate_logdet, static_argnames=("max_samples", "num_matvecs"))
TRACED = []
ORDINARY = jnp.float32(0.5), POINTS.astype(jnp.float32), jnp.float32(0.3)


@jax.jit
def everything(F, key, damping, points, width):
    TRACED.append(F.spec.dtype)
    return (
        jf.estimate_trace(F, key, rtol=0.1),
        jf.estimate_diagonal(F, key, rtol=0.1),
        jf.estimate_logdet(F, key, damping, rtol=0.1),
        jf.spectral_density(F, key, points, width=width, num_samples=20),
    )


# --- when they stop -------------------------------------------------------------------------------------------------------


def test_the_rule_stops_early_or_says_that_it_did_not(key):
    F, matrix = problem()
    counts = []
    for rtol in (0.3, 0.1, 0.05):
        estimate = trace_of(F, key, rtol=rtol, max_samples=1000)
        assert estimate.converged and estimate.standard_error <= rtol * estimate.value
        assert abs(estimate.value - np.trace(matrix)) < 5 * estimate.standard_error
        count = int(estimate.samples)
        counts.append(count)
        # It takes no more batches than needed, as far as the final error tells that of fewer probes.
        assert count == 10 or estimate.standard_error * np.sqrt(count / (count - 10)) > 0.9 * rtol * estimate.value
    assert counts[0] == 10 < counts[1] < counts[2] < 1000 and all(count % 10 == 0 for count in counts)
    # All probes are used, in tens or all at once.
    for most, used in ((25, 20), (3, 3)):
        short = trace_of(F, key, rtol=0.0, max_samples=most)
        assert not short.converged and short.samples == used


def test_the_diagonal_stops_on_norms(key):
    F, matrix = problem()
    estimate = jax.jit(lambda F, key: jf.estimate_diagonal(F, key, rtol=0.1))(F, key)
    error, value = np.linalg.norm(flat(estimate.standard_error)), np.linalg.norm(flat(estimate.value))
    assert np.linalg.norm(flat(estimate.value) - np.diag(matrix)) < 2 * error
    assert estimate.converged and 10 < estimate.samples < 1000
    assert error <= 0.1 * value < error * np.sqrt(estimate.samples / (estimate.samples - 10)) * 1.1
    assert jax.tree.structure(estimate.value) == F.spec.treedef == jax.tree.structure(estimate.standard_error)


def test_a_diagonal_fisher_has_no_error(key):
    """z_i^2 is one: every probe gives the trace and the diagonal."""
    # Whole numbers whose sum is just below 2^24: exact in any order, unlike that of ten probes.
    exact = 254199 * np.arange(12.0)
    trace, diagonal, _, _ = everything(holding(np.diag(exact), jnp.float32), key, *ORDINARY)
    for estimate, expected in ((trace, np.sum(exact)), (diagonal, exact)):
        np.testing.assert_array_equal(estimate.value, expected)
        assert np.all(estimate.standard_error == 0)
        assert estimate.converged and estimate.samples == 20, "that ten probes agree is not enough to know that all do"


def test_agreement_of_a_few_probes_is_not_taken_for_certainty():
    """One correlated pair: half of all probes give its sum, half its difference, and ten are alike once in 512 keys."""
    pair, among = np.array([[1.0, 0.9], [0.9, 1.0]]), np.zeros((5, 5))
    among[:2, :2], among[2:, 2:] = pair, rotated(np.linspace(1e-4, 1e-3, 3), jax.random.key(3))
    keys = jax.random.split(jax.random.key(2), 2048)
    logdet = functools.partial(jf.estimate_logdet, damping=0.1, num_matvecs=2)
    for estimate, matrix, exact, missed in (
        (jf.estimate_trace, pair, 2.0, 1.8),
        (jf.estimate_trace, among, np.trace(among), 1.8),
        (jf.estimate_diagonal, among, np.diag(among), 0.9 * np.sqrt(2)),
        (logdet, pair, all_logs(pair, 0.1), np.log(2.0 / 0.2)),
    ):
        found = jax.jit(jax.vmap(functools.partial(estimate, max_samples=20), (None, 0)))(holding(matrix), keys)
        off = np.linalg.norm((np.asarray(found.value) - exact).reshape(len(keys), -1), axis=1)
        assert not np.any(found.converged & (off > 0.5 * missed)), estimate


def test_many_equal_eigenvalues_still_need_ten_probes(key):
    estimate = trace_of(holding(rotated(np.linspace(1, 2, 600), key)), key, rtol=0.03)
    assert estimate.converged and estimate.samples == 10


# --- quadrature -----------------------------------------------------------------------------------------------------------

SPECTRA = {
    "decaying": np.geomspace(1e-3, 1, 12),
    "of rank 4": np.array([0.01, 0.2, 0.5, 1.0] + [0.0] * 8),
    "two values": np.array([0.1, 2.0] * 6),
    "one value": np.full(12, 0.7),
    "none": np.zeros(12),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gauss_and_radau_bound_every_probe_and_meet(dtype, key):
    """For each number of steps; they meet when the steps are as many as different eigenvalues, and do so without NaN."""
    z, damping = jnp.asarray(np.where(np.arange(12) % 3 == 0, -1, 1), dtype), 1e-3

    def both(F, steps):
        jacobi = _lanczos.lanczos("here", F, jnp.full(12, damping**-0.5, dtype), steps)(z)
        return _lanczos.log_sums(jacobi)[0], _lanczos.log_sums(jacobi._replace(diagonal=jacobi.radau()))[0], jacobi

    program = jax.jit(both, static_argnums=1)
    for name, values in SPECTRA.items():
        matrix = rotated(values, key)
        w, v = np.linalg.eigh(matrix)
        exact = np.mean(np.square(v.T @ np.asarray(z, float)) * np.log1p(w.clip(0) / damping))
        # The sum is over eigenvalues of 1 and more, each off by the rounding error of the largest.
        slack = 12 * float(jnp.finfo(dtype).eps) * (1 + np.max(values) / damping)
        gaps = []
        for steps in (1, 4, 12):
            upper, lower, jacobi = jax.tree.map(np.asarray, program(holding(matrix, dtype), steps))
            assert jacobi.exhausted == (steps >= len(set(values))), (name, steps)
            # Numbers that follow an exhausted Krylov space may have any size and mean nothing.
            assert max(jacobi.largest, jacobi.image) < 1.001 * np.max(values) / damping + slack, (name, steps)
            if jacobi.exhausted:
                assert abs(upper - exact) < slack, (name, steps, upper, exact)
                continue
            assert lower - slack < exact < upper + slack, (name, steps)
            gaps.append(float(upper - lower))
        assert gaps == sorted(gaps, reverse=True), (name, gaps)
        assert name != "decaying" or gaps[1] < gaps[0] / 2


def test_too_few_steps_are_not_called_converged(key):
    """The standard error is small, and the answer is off by more than five of it: the distance of the bounds shows that."""
    matrix = rotated(np.geomspace(1e-9, 1, 12), key)
    F, exact = holding(matrix), all_logs(matrix, 1e-6)
    few = logdet_of(F, key, 1e-6, rtol=0.01, max_samples=2000, num_matvecs=2)
    assert not few.converged and few.samples < 2000
    assert abs(few.value - exact) > 5 * few.standard_error
    enough = logdet_of(F, key, 1e-6, rtol=0.01, max_samples=2000)
    assert enough.converged and abs(enough.value - exact) < 5 * enough.standard_error <= 0.03 * abs(exact)


def test_a_damping_below_rounding_is_not_called_converged(key):
    matrix = rotated(np.linspace(0, 1, 12), key)
    for dtype, damping in ((jnp.float32, 1e-3), (jnp.float64, 1e-11)):
        F = holding(matrix, dtype)
        seen = [logdet_of(F, key, damping * share, rtol=0.1, max_samples=2000) for share in (1, 1e-7)]
        assert seen[0].converged and not seen[1].converged
        assert seen[1].samples < 2000, "it is not for want of probes"
        assert np.isfinite(seen[1].value), "an eigenvalue of zero may be negative by rounding, by more than the damping"


def test_a_density_is_one_and_says_when_its_kernel_is_too_narrow(key):
    grid = jnp.linspace(-2.0, 3.0, 501)
    density = jax.jit(lambda F, width: jf.spectral_density(F, key, grid, width=width, num_samples=50, num_matvecs=7))
    F = holding(rotated(np.linspace(0, 1, 40), key))
    wide, narrow = density(F, 0.4), density(F, 0.01)
    assert wide.converged and not narrow.converged
    # With few different eigenvalues the steps are enough for every width, though half of them are not.
    values = np.repeat(np.linspace(0, 1, 5), 8)
    few = density(holding(rotated(values, key)), 0.01)
    assert few.converged
    for estimate in (wide, narrow, few):
        np.testing.assert_allclose(np.sum(estimate.value) * 0.01, 1.0, rtol=1e-6)
    for estimate, exact, right in (
        (wide, smoothed(np.linspace(0, 1, 40), grid, 0.4), True),
        (narrow, smoothed(np.linspace(0, 1, 40), grid, 0.01), False),
        (few, smoothed(values, grid, 0.01), True),
    ):
        z = np.linalg.norm(estimate.value - exact) / np.linalg.norm(estimate.standard_error)
        assert (z < 2) == right, z


# --- dtypes, scales, and bad numbers --------------------------------------------------------------------------------------


def test_float32_keeps_its_dtype_and_agrees_at_every_scale(key):
    """Fishers of 1e-20 and 1e20, whose squares leave float32. One trace serves all three."""
    matrix = rotated(np.linspace(0.2, 2, 12), key)
    points = np.linspace(0, 2, 6)
    exact = np.trace(matrix), np.diag(matrix), all_logs(matrix, 0.5), smoothed(np.linalg.eigvalsh(matrix), points, 0.3)
    for scale in (1.0, 1e-20, 1e20):
        F = holding(scale * matrix, jnp.float32)
        arguments = (jnp.asarray(x, jnp.float32) for x in (0.5 * scale, points * scale, 0.3 * scale))
        trace, diagonal, logdet, density = everything(F, key, *arguments)
        logdet = logdet._replace(value=logdet.value - 12 * np.log(np.float32(scale)))
        units = scale, scale, 1.0, 1 / scale
        for estimate, value, unit in zip((trace, diagonal, logdet, density), exact, units, strict=True):
            assert estimate.value.dtype == estimate.standard_error.dtype == jnp.float32
            error = np.asarray(estimate.standard_error, float) / unit + 1e-5 * np.max(np.abs(value))
            assert np.max(np.abs(np.asarray(estimate.value, float) / unit - value) / error) < 5
            assert np.all(error < 0.5 * np.max(np.abs(value)))
            assert estimate.converged.dtype == bool and estimate.samples.dtype == jnp.int32
        assert trace.converged and diagonal.converged
    assert TRACED.count(jnp.float32) == 1


def test_non_finite_products_stop_at_once_and_show(key):
    for estimate in everything(holding(np.full((12, 12), np.nan), jnp.float32), key, *ORDINARY):
        assert np.all(np.isnan(estimate.value)) and not estimate.converged
        assert estimate.samples in (10, 20)


def test_a_negative_direction_is_not_hidden(key):
    """The estimate is NaN, as is the log-determinant of the Hessian behind `observed_information`."""
    _, _, estimate, _ = everything(holding(-np.eye(12), jnp.float32), key, *ORDINARY)
    assert np.isnan(estimate.value) and not estimate.converged


# --- arguments ------------------------------------------------------------------------------------------------------------

KEY = jax.random.key(0)


def small():
    return holding(np.eye(3))


MISTAKES = [
    (lambda: jf.estimate_trace(np.eye(3), KEY), TypeError, ["estimate_trace", "Fisher operator", "(3, 3)"]),
    (lambda: jf.estimate_diagonal(None, KEY), TypeError, ["estimate_diagonal", "Fisher operator", "None"]),
    (lambda: jf.estimate_logdet(3.0, KEY, 1.0), TypeError, ["estimate_logdet", "3.0"]),
    (lambda: jf.spectral_density(abs, KEY, POINTS, width=1.0), TypeError, ["spectral_density", "Call the function"]),
    (lambda: jf.estimate_trace(small(), 0), TypeError, ["`key` is 0", "jax.random.key(seed)"]),
    (lambda: jf.estimate_diagonal(small(), jax.random.split(KEY)), TypeError, ["`key`", "(2,)", "one random key"]),
    (lambda: jf.spectral_density(small(), 0, POINTS, width=1.0), TypeError, ["spectral_density", "`key` is 0"]),
    (lambda: jf.estimate_trace(small(), KEY, rtol=-0.1), ValueError, ["`rtol` is -0.1", "at least zero"]),
    (lambda: jf.estimate_logdet(small(), KEY, 1.0, rtol="x"), TypeError, ["`rtol` is 'x'", "real number"]),
    (lambda: jf.estimate_trace(small(), KEY, max_samples=1), ValueError, ["`max_samples` is 1", "at least 2"]),
    (lambda: jf.estimate_diagonal(small(), KEY, max_samples=1e3), ValueError, ["`max_samples` is 1000.0", "whole number"]),
    (lambda: jf.estimate_logdet(small(), KEY, 0.0), ValueError, ["`damping` is 0.0", "above zero", "small damping"]),
    (lambda: jf.estimate_logdet(small(), KEY, -1.0), ValueError, ["`damping` is -1.0"]),
    (lambda: jf.estimate_logdet(small(), KEY, [1.0]), TypeError, ["`damping` is a list"]),
    (lambda: jf.estimate_logdet(small(), KEY, 1.0, num_matvecs=0), ValueError, ["`num_matvecs` is 0", "at least 1"]),
    (lambda: jf.spectral_density(small(), KEY, 1.0, width=1.0), ValueError, ["`points` is 1.0", "one axis"]),
    (lambda: jf.spectral_density(small(), KEY, jnp.arange(3), width=1.0), ValueError, ["`points`", "real numbers"]),
    (lambda: jf.spectral_density(small(), KEY, POINTS, width=0), ValueError, ["`width` is 0", "above zero", "spikes"]),
    (lambda: jf.spectral_density(small(), KEY, POINTS, width=1.0, num_samples=True), ValueError, ["`num_samples` is True"]),
    (lambda: jf.spectral_density(small(), KEY, POINTS, width=1.0, num_matvecs=2.0), ValueError, ["`num_matvecs` is 2.0"]),
]


@pytest.mark.parametrize(("call", "error", "words"), MISTAKES)
def test_a_mistake_is_named_at_trace_time(call, error, words):
    with pytest.raises(error) as caught:
        jax.eval_shape(call)
    for word in words:
        assert word in str(caught.value), caught.value


def test_without_matfree_the_message_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matfree"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matfree", None)
    for call in (
        lambda: jf.estimate_trace(small(), KEY),
        lambda: jf.estimate_diagonal(small(), KEY),
        lambda: jf.estimate_logdet(small(), KEY, 1.0),
        lambda: jf.spectral_density(small(), KEY, POINTS, width=1.0),
    ):
        with pytest.raises(ImportError, match=r"pip install 'jaxfisher\[estimate\]'"):
            call()
