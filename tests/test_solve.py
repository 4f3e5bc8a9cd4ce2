"""Solves: exact routes against dense float64, float32 accuracy, zero damping, extremes, and conjugate gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, classifier, flat, reference

import jaxfisher as jf


def linear(w, x):
    """Unit-noise linear regression: the exact Fisher is X^T X / n."""
    return jf.Normal(jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST), jnp.ones((), x.dtype))


def fisher_with(singular_values, n, p, key, dtype=jnp.float32):
    """``(F, X)``: an exact Fisher from scores X with the given singular values of ``X / sqrt(n)``."""
    keys = jax.random.split(key)
    rank = len(singular_values)
    u = np.linalg.qr(np.asarray(jax.random.normal(keys[0], (n, rank)), np.float64))[0]
    v = np.linalg.qr(np.asarray(jax.random.normal(keys[1], (p, rank)), np.float64))[0]
    x = np.sqrt(n) * (u * singular_values) @ v.T
    x = np.asarray(x, np.dtype(dtype))
    return jf.exact_fisher(linear)(jnp.zeros(p, dtype), jnp.asarray(x)), x.astype(np.float64) / np.sqrt(n)


solve = jax.jit(jf.solve, static_argnames="solver")


@pytest.mark.parametrize("shape", [(30, 80), (80, 30)])
@pytest.mark.parametrize("relative_damping", [1e-1, 1e-3, 1e-6])
def test_float32_residual(shape, relative_damping, key):
    """Relative residual at most 1e-4 at a damping of 1e-6 of the mean eigenvalue, singular values over [1e-2, 1].

    The right-hand side is a gradient: it lies in the span of the scores. The residual is measured in float64, by us.
    """
    n, p = shape
    F, X = fisher_with(np.geomspace(1e-2, 1, min(shape)), n, p, key)
    damping = relative_damping * np.trace(X.T @ X) / p
    v = (X.T @ np.cos(np.arange(n))).astype(np.float32)
    for operator in (F, jf.dense(F)):
        x, info = solve(operator, jnp.asarray(v), damping)
        x = np.asarray(x, np.float64)
        residual = np.linalg.norm(v - X.T @ (X @ x) - damping * x) / np.linalg.norm(v)
        assert residual < 1e-4, (operator, residual)
        assert info.converged and info.finite and info.rank == p
        np.testing.assert_allclose(info.residual, residual, atol=3e-5)


@pytest.mark.parametrize("shape", [(100, 400), (400, 100)])
@pytest.mark.parametrize("epsilons", [3.0, 10.0])
def test_a_damping_at_the_rounding_of_the_matrix(shape, epsilons, key):
    """A damping of a few eps of the largest eigenvalue, and singular values from 1e-4 to 1: no factor in float32 is accurate.

    Its solution is near enough for refinement against the scores, which are not squared.
    """
    n, p = shape
    F, X = fisher_with(np.geomspace(1e-4, 1, min(shape)), n, p, key)
    damping = epsilons * float(jnp.finfo(jnp.float32).eps)
    v = (X.T @ np.cos(np.arange(n))).astype(np.float32)

    def both(F, v, damping):
        path, reports = jf.solve_path(F, v, damping[None])
        return jf.solve(F, v, damping), (path[0], jax.tree.map(lambda leaf: leaf[0], reports))

    for x, info in jax.jit(both)(F, jnp.asarray(v), jnp.float32(damping)):
        x = np.asarray(x, np.float64)
        residual = np.linalg.norm(v - X.T @ (X @ x) - damping * x) / np.linalg.norm(v)
        # At three eps the factors of the newest JAX are too inaccurate for refinement, and the report says so.
        solved = residual < 1e-4
        assert info.converged == solved and info.rank == p, (residual, info)
        assert solved or epsilons < 10, (residual, info)


def test_float32_natural_gradient_keeps_its_digits(key):
    """A solve in the space of examples has no cancellation: 1e-5 at a damping where one in that of parameters has no digits."""
    n, p = 30, 80
    _, X = fisher_with(np.geomspace(1e-2, 1, n), n, p, key)
    damping = 1e-6
    log_prob = lambda w, x, e: e * jnp.dot(x, w, precision="highest")  # noqa: E731
    step = jf.natural_grad(log_prob, damping=damping, rtol=1e-6)
    ones = jnp.ones(n, jnp.float32)
    d = jax.jit(step)(jnp.zeros(p, jnp.float32), jnp.asarray(np.sqrt(n) * X, jnp.float32), ones)
    expected = -X.T @ np.linalg.solve(X @ X.T + damping * np.eye(n), np.full(n, n**-0.5))
    assert np.linalg.norm(np.asarray(d) - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(6, 9), (12, 9)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_zero_damping_gives_the_minimum_norm_solution_and_the_rank(shape, dtype, key):
    n, p = shape
    F, X = fisher_with([1.0, 0.5, 0.3, 0.1], n, p, key, dtype)
    v = np.cos(np.arange(p)).astype(np.dtype(dtype))
    pseudo = np.linalg.pinv(X, rcond=1e-5)
    for operator in (F, jf.dense(F)):
        x, info = solve(operator, jnp.asarray(v), 0.0)
        assert_close(x, pseudo @ pseudo.T @ v, factor=3e4)
        assert info.rank == 4 and info.converged and info.finite
        outside = np.linalg.norm(v - X.T @ pseudo.T @ v) / np.linalg.norm(v)
        np.testing.assert_allclose(info.residual, outside, rtol=1e-3)


def test_diagonal_with_zeros():
    _, x, _, _, _ = reference()
    F = jf.diagonal(
        jf.exact_fisher(lambda p, x: jf.Normal(x @ p["used"], 1.0))({"used": jnp.ones(3), "unused": jnp.ones(2)}, x)
    )
    v = {"used": jnp.ones(3), "unused": jnp.ones(2)}
    solution, info = solve(F, v, 0.0)
    assert info.rank == 3 and info.converged
    assert_close(solution["unused"], np.zeros(2))
    assert_close(solution["used"], 1 / np.mean(np.asarray(x) ** 2, axis=0))
    damped, info = solve(F, v, 0.5)
    assert info.rank == 5
    assert_close(damped["unused"], np.full(2, 2.0))


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_extreme_scales_in_float32(n, scale, damping, key):
    """Scores of 1e-20 and 1e20, whose squares leave float32, give the natural gradient to float32 accuracy, and no NaN."""
    keys = jax.random.split(key)
    X = np.asarray(jax.random.normal(keys[0], (n, 8)), np.float64)
    e = np.asarray(jax.random.normal(keys[1], (n,)), np.float64)
    x32, e32 = (X * scale).astype(np.float32), e.astype(np.float32)
    step = jax.jit(jf.natural_grad(jf.log_likelihood(linear), damping=damping, rtol=1e-6))
    d = np.asarray(step(jnp.zeros(8, jnp.float32), jnp.asarray(x32), jnp.asarray(e32)), np.float64)
    u, s, vt = np.linalg.svd(X * e[:, None] / np.sqrt(n), full_matrices=False)
    s = s * scale
    expected = -vt.T @ (s / (s**2 + damping) * (u.T @ np.full(n, n**-0.5)))
    np.testing.assert_allclose(d, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))
    F = jf.exact_fisher(linear)(jnp.zeros(8, jnp.float32), jnp.asarray(x32))
    solution, info = solve(F, jnp.full(8, min(scale, 1.0), jnp.float32), damping)
    assert not np.any(np.isnan(solution)) and not np.isnan(info.residual)


def test_duplicated_rows_one_row_and_one_parameter():
    model = lambda w, x: jf.Normal(jnp.sum(x * w), 1.0)  # noqa: E731
    twice = jf.exact_fisher(model)(jnp.zeros(4), jnp.ones((3, 4)))
    solution, info = solve(twice, jnp.ones(4), 0.0)
    assert info.rank == 1
    assert_close(solution, np.full(4, 0.25))
    one = jf.exact_fisher(model)(jnp.zeros(1), jnp.full((1, 1), 3.0))
    assert_close(solve(one, jnp.ones(1), 0.0)[0], [1 / 9])


def test_a_class_of_probability_zero():
    """With softmax logits of 1e4 the Fisher underflows to zero, and the solve reports rank 0 instead of NaN."""
    F = jf.exact_fisher(lambda logits: jf.Categorical(logits))(jnp.array([1e4, -1e4, 0.0], jnp.float32))
    x, info = solve(F, jnp.ones(3, jnp.float32), 0.0)
    assert info.rank == 0 and np.all(np.asarray(x) == 0)
    damped, _ = solve(F, jnp.ones(3, jnp.float32), 0.5)
    assert_close(damped, np.full(3, 2.0))


@pytest.mark.parametrize("form", ["scores", "dense", "diagonal", "implicit"])
def test_non_finite_scores_give_a_non_finite_answer(form):
    params, x, _, _, _ = reference()
    spoiled = x.at[0].set(jnp.nan)
    make = {
        "scores": jf.exact_fisher(classifier),
        "dense": lambda p, x: jf.dense(jf.exact_fisher(classifier)(p, x)),
        "diagonal": lambda p, x: jf.diagonal(jf.exact_fisher(classifier)(p, x)),
        "implicit": jf.implicit_fisher(classifier),
    }[form]
    v = jax.tree.map(jnp.ones_like, params)
    x, info = solve(make(params, spoiled), v, 0.1)
    assert not info.finite and not info.converged
    assert not np.all(np.isfinite(flat(x)))


def test_zero_right_hand_side():
    params, x, _, _, _ = reference()
    F = jf.exact_fisher(classifier)(params, x)
    zero = jax.tree.map(jnp.zeros_like, params)
    for solver in (None, jf.CG()):
        solution, info = solve(F, zero, 0.1, solver=solver)
        assert np.all(flat(solution) == 0) and info.residual == 0 and info.converged


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cg_agrees_with_the_exact_route_at_any_scale(dtype, scale):
    params, x, _, _, _ = reference()
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    F = jf.implicit_fisher(classifier)(narrow, x.astype(dtype))
    v = jax.tree.map(lambda leaf: jnp.full(leaf.shape, scale, dtype), params)
    x_cg, info = solve(F, v, 0.05, solver=jf.CG(rtol=1e-6))
    dense = np.asarray(jf.exact_fisher(classifier)(params, x).as_matrix())
    exact = np.linalg.solve(dense + 0.05 * np.eye(31), flat(v).astype(np.float64))
    assert info.converged and info.iterations > 3
    assert np.linalg.norm(flat(x_cg) - exact) < 1e-4 * np.linalg.norm(exact)
    actual = np.linalg.norm(flat(v) - (dense + 0.05 * np.eye(31)) @ flat(x_cg)) / np.linalg.norm(flat(v))
    assert actual < 1e-5 and abs(actual - float(info.residual)) < 1e-5


def test_cg_that_has_not_converged_says_so():
    params, x, _, _, _ = reference()
    F = jf.implicit_fisher(classifier)(params, x)
    v = jax.tree.map(jnp.ones_like, params)
    _, info = solve(F, v, 1e-6, solver=jf.CG(rtol=1e-12, max_steps=2))
    assert not info.converged and info.iterations == 2 and info.residual > 1e-6


def test_cg_runs_the_model_forward_once():
    """The operator is linearised before the loop, so the program has a single tanh of the model, outside the loop."""
    params, x, _, _, _ = reference()
    F = jf.implicit_fisher(classifier)(params, x)
    v = jax.tree.map(jnp.ones_like, params)
    program = jax.jit(lambda F, v: jf.solve(F, v, 0.1, solver=jf.CG())).lower(F, v).as_text()
    assert program.count("stablehlo.tanh") == 1


@pytest.mark.parametrize("view", [jf.dense, jf.diagonal])
def test_a_matrix_beyond_the_dtype_gives_no_number(view):
    """A Fisher of 1e42 has infinite entries in float32. One over infinity would look like a solution, so it must be NaN."""
    F = jf.exact_fisher(linear)(jnp.zeros(2, jnp.float32), jnp.full((3, 2), 1e21, jnp.float32))
    solution, info = jf.solve(view(F), jnp.ones(2, jnp.float32), 0.0)
    assert np.all(np.isnan(solution)) and not info.finite and not info.converged


VIEWS = {
    "scores": lambda F: F,
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "Kronecker": jf.kronecker,
    "eigen-Kronecker": jf.eigen_kronecker,
    "low rank": lambda F: jf.low_rank(F, 3),
}


COMPILED = "scores", "eigen-Kronecker"
"""Two compiled views, one solved by Cholesky factors and one by eigenvectors, to see how XLA's routines pass NaN on."""


@pytest.mark.usefixtures("in_numpy")
@pytest.mark.parametrize("view", [pytest.param(v, marks=[pytest.mark.compiled] if v in COMPILED else []) for v in VIEWS])
def test_what_turns_out_negative_at_run_time_is_nan_and_does_not_converge(view):
    """A damping, a multiple or a penalty that is negative at run time gives NaN, and the report says not converged."""
    params, x, *_ = reference()
    F = VIEWS[view](jf.exact_fisher(classifier)(params, x))

    @jax.jit
    def made(F, bad):
        path, reports = jf.solve_path(F, params, jnp.stack([1.0 + 0 * bad, bad]))
        alone, report = jf.solve(F, params, bad)
        numbers = F.logdet(bad), jf.effective_dimension(F, bad), F.inv_sqrt_mv(params, bad), (bad * F).trace()
        return path, reports.converged, alone, report.converged, numbers, jf.ewc_penalty(F, params, bad)(params)

    path, converged, alone, report, numbers, penalty = made(F, -0.5)
    at_one, _ = solve(F, params, 1.0)
    assert_close(flat(jax.tree.map(lambda leaf: leaf[0], path)), flat(at_one), factor=100)
    assert converged.tolist() == [True, False]
    assert not report
    others = [jax.tree.map(lambda leaf: leaf[1], path), alone, numbers, penalty]
    for leaf in jax.tree.leaves(others):
        assert np.all(np.isnan(leaf)), leaf
