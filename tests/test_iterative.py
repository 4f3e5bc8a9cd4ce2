"""Iterative solvers and paths of dampings: preconditioning, warm starts, negative curvature, least squares, derivatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, classifier, flat, reference

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def linear(w, x):
    """A log-density whose score is its datum: the Fisher is X^T X / n."""
    return jnp.dot(x, w, precision="highest")


def normal(w, x):
    """A model whose exact Fisher is X^T X / n."""
    return jf.Normal(jnp.dot(x, w, precision="highest"), jnp.ones((), x.dtype))


@functools.cache
def stretched(condition=1e3, n=60, p=40, dtype=jnp.float64):
    """A Fisher with eigenvalues from 1 down to ``1 / condition``, its rows ``X`` and a right-hand side."""
    u, v = (np.linalg.qr(numbers(seed, size, p))[0] for seed, size in ((0, n), (1, p)))
    x = np.asarray(np.sqrt(n) * (u * np.geomspace(condition**-0.5, 1, p)) @ v.T, np.dtype(dtype))
    return jf.empirical_fisher(linear)(jnp.zeros(p, dtype), jnp.asarray(x)), x.astype(np.float64) / np.sqrt(n)


def solved(X, v, damping):
    return np.linalg.solve(X.T @ X + damping * np.eye(X.shape[1]), v)


PRECONDITIONERS = {
    "exact": lambda F: F,
    "diagonal": jf.diagonal,
    "nystrom": lambda F: jf.nystrom(F, jax.random.key(0), 15),
    "partial cholesky": lambda F: jf.partial_cholesky(F, 15),
    "low rank": lambda F: jf.low_rank(F, 15),
}


def test_preconditioners_change_the_steps_and_not_the_solution():
    F, X = stretched()
    v = np.cos(np.arange(40))
    expected = solved(X, v, 1e-4)

    @jax.jit
    def run(F, v):
        views = {"none": None, **{name: view(F) for name, view in PRECONDITIONERS.items()}}
        return {name: jf.solve(F, v, 1e-4, solver=jf.CG(rtol=1e-9, preconditioner=P)) for name, P in views.items()}

    found = run(F, jnp.asarray(v))
    steps = {name: int(info.iterations) for name, (_, info) in found.items()}
    for name, (x, info) in found.items():
        assert info.converged and info.residual <= 1e-9, name
        assert np.linalg.norm(x - expected) < 1e-5 * np.linalg.norm(expected), name
    assert steps["exact"] <= 2, steps
    assert max(steps[name] for name in ("nystrom", "partial cholesky", "low rank")) < 0.8 * steps["none"], steps


def test_a_kronecker_preconditioner_and_a_warm_start():
    params, x, _, _, _ = reference()

    @jax.jit
    def run(params, x, v):
        F = jf.exact_fisher(classifier)(params, x)
        cold, first = jf.solve(F, v, 0.05, solver=jf.CG(rtol=1e-10))
        _, kronecker = jf.solve(F, v, 0.05, solver=jf.CG(rtol=1e-10, preconditioner=jf.kronecker(F)))
        _, again = jf.solve(F, v, 0.05, solver=jf.CG(rtol=1e-9, start=cold))
        return first, kronecker, again

    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    first, kronecker, again = run(params, x, v)
    assert first.converged and kronecker.converged and again.converged
    assert again.iterations == 0 and 0 < kronecker.iterations < 2 * first.iterations


def test_a_solver_crosses_jit_as_an_argument():
    F, X = stretched()
    traces = []

    @jax.jit
    def run(F, v, solver):
        traces.append(1)
        return jf.solve(F, v, 1e-2, solver=solver)[0]

    v = jnp.ones(40)
    for scale in (1.0, 2.0):
        solver = jf.CG(rtol=1e-10, preconditioner=jf.diagonal(scale * F), start=scale * v)
        assert_close(run(F, v, solver), solved(X, np.ones(40), 1e-2), factor=1e7)
    assert len(traces) == 1


def test_negative_curvature_is_seen():
    """The observed information of a saddle: one direction is negative."""
    log_prob = lambda w, x: -0.5 * (w[0] ** 2 - w[1] ** 2) * x  # noqa: E731
    H = jf.observed_information(log_prob)(jnp.zeros(2), jnp.ones(3))
    assert_close(H.as_matrix(), np.diag([1.0, -1.0]))
    _, info = jax.jit(lambda H, v: jf.solve(H, v, 0.1, solver=jf.CG()))(H, jnp.array([0.1, 1.0]))
    assert info.indefinite and not info.converged
    _, info = jax.jit(lambda H, v: jf.solve(H, v, 2.0, solver=jf.CG()))(H, jnp.array([0.1, 1.0]))
    assert info.converged and not info.indefinite


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])  # powers of two do not change rounding
def test_the_stopping_rule_knows_no_scale(scale):
    F, _ = stretched()
    v = np.cos(np.arange(40))
    run = jax.jit(lambda F, v, d: jf.solve(F, v, d, solver=jf.CG(rtol=1e-6))[1])
    plain, scaled = run(F, jnp.asarray(v), 1e-3), run(scale * F, jnp.asarray(v / scale), 1e-3 * scale)
    assert plain.iterations == scaled.iterations and plain.converged and scaled.converged


def test_derivatives_are_those_of_the_solution():
    F, X = stretched(100.0)
    v = np.cos(np.arange(40))

    def loss(v, damping):
        return jnp.sum(jnp.sin(jf.solve(F, v, damping, solver=jf.CG(rtol=1e-12))[0]))

    x = solved(X, v, 1e-2)
    back = solved(X, np.cos(x), 1e-2)
    by_v, by_damping = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(v), 1e-2)
    np.testing.assert_allclose(by_v, back, rtol=1e-7)
    np.testing.assert_allclose(by_damping, -back @ x, rtol=1e-7)
    many = jnp.asarray(numbers(5, 3, 40))
    mapped = jax.jit(jax.vmap(lambda v: jf.solve(F, v, 1e-2, solver=jf.CG(rtol=1e-12))[0]))(many)
    assert_close(mapped, np.stack([solved(X, row, 1e-2) for row in np.asarray(many)]), factor=1e7)


def test_cg_takes_a_damping_for_each_leaf():
    params, x, _, _, _ = reference()
    dampings = {"hidden": {"b": 0.3, "w": 0.1}, "out": [0.05, 0.7]}
    v = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def run(params, x, v):
        F = jf.implicit_fisher(classifier)(params, x)
        return jf.solve(F, v, dampings, solver=jf.CG(rtol=1e-11, preconditioner=jf.kronecker(F))), F.as_matrix()

    (found, info), matrix = run(params, x, v)
    each = np.repeat(jax.tree.leaves(dampings), [4, 12, 12, 3])
    assert info.converged
    assert_close(flat(found), np.linalg.solve(np.asarray(matrix) + np.diag(each), np.ones(31)), factor=1e7)


def test_lsmr_steps_grow_with_the_root_of_the_condition_number():
    counts = {}
    for condition in (1e2, 1e4):
        F, X = stretched(condition, 240, 200)
        damping = 1 / condition
        e = np.cos(np.arange(240))
        run = jax.jit(lambda S, e, d: jf.LSMR(rtol=1e-8).least_squares(S, e, d))
        x, info = run(F.form.scores, jnp.asarray(e), damping)
        assert info.converged
        expected = solved(X, X.T @ e / np.sqrt(240), damping)
        assert np.linalg.norm(x - expected) < 1e-4 * np.linalg.norm(expected)
        counts[condition] = int(info.iterations)
    # A hundredfold condition number is tenfold in X; steps of steepest descent would grow a hundredfold.
    assert counts[1e4] < 15 * counts[1e2], counts


def test_lsmr_solves_for_any_vector_and_keeps_digits_in_float32():
    F, X = stretched(1e4, 30, 20, jnp.float32)
    damping = 1e-6 * float(np.mean(np.sum(X**2, 0)))
    v = np.cos(np.arange(20))
    x, info = jax.jit(lambda F, v: jf.solve(F, v, 0.1, solver=jf.LSMR()))(F, jnp.asarray(v, jnp.float32))
    assert info.converged and info.residual < 1e-4
    assert np.linalg.norm(np.asarray(x) - solved(X, v, 0.1)) < 1e-4 * np.linalg.norm(solved(X, v, 0.1))
    e = np.cos(np.arange(30))
    run = jax.jit(lambda S, e: jf.LSMR(rtol=1e-7, max_steps=400).least_squares(S, e, damping))
    x, _ = run(F.form.scores, jnp.asarray(e, jnp.float32))
    x = np.asarray(x, np.float64)
    right = X.T @ e / np.sqrt(30)
    assert np.linalg.norm(right - X.T @ (X @ x) - damping * x) < 1e-4 * np.linalg.norm(right)
    with pytest.raises(ValueError, match="least_squares"):
        jf.solve(F, jnp.asarray(v, jnp.float32), 0.0, solver=jf.LSMR())


@pytest.mark.compiled  # XLA would merge quotients
@pytest.mark.parametrize("n", [3, 8])
def test_lsmr_solves_in_any_units(n):
    """The solution itself is of ordinary size, but neither the right-hand side nor the Fisher is."""
    run = jax.jit(lambda x, v, damping: jf.solve(jf.exact_fisher(normal)(jnp.zeros(8, x.dtype), x), v, damping, jf.LSMR()))
    for unit, size in [(1e-15, 1e-12), (1e-15, 1.0), (1.0, 1e-25), (1.0, 1e25), (1e15, 1.0), (1e15, 1e12)]:
        x, v = np.float32(numbers(n, n, 8) * unit), np.float32(numbers(1, 8) * unit * size)
        matrix = x.astype(float).T @ x / n
        for share in (1e-2, 1.0, 1e4):
            damping = share * np.linalg.norm(matrix, 2)
            found, info = run(x, v, np.float32(damping))
            true = np.linalg.solve(matrix + damping * np.eye(8), v.astype(float))
            assert info.converged and np.linalg.norm(np.asarray(found) - true) < 1e-4 * np.linalg.norm(true), (
                unit,
                size,
                share,
            )
    F = jf.exact_fisher(normal)(jnp.zeros(8, jnp.float32), x)
    for zero in (0.0, 0, np.zeros(()), np.float32(0), 1e-42):
        with pytest.raises(ValueError, match="LSMR: `damping` is"):
            jf.solve(F, v, zero, solver=jf.LSMR())


FORMS = {"scores": lambda F: F, "dense": jf.dense, "prior": lambda F: F + jf.scaled_identity(F, 1e-3), "diagonal": jf.diagonal}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(60, 40), (25, 40)])
def test_a_path_of_dampings(name, shape):
    """Every solution equals that of a single solve, with minimum norm at zero; the others share one eigendecomposition."""
    n, p = shape
    rank = min(shape)
    u, v = (np.linalg.qr(numbers(seed, size, rank))[0] for seed, size in ((0, n), (1, p)))
    x = jnp.asarray(np.sqrt(n) * (u * np.geomspace(1e-2, 1, rank)) @ v.T)
    F = jax.jit(lambda x: FORMS[name](jf.empirical_fisher(linear)(jnp.zeros(p), x)))(x)
    dampings, right = np.array([0.0, 1e-6, 1e-3, 10.0]), np.cos(np.arange(p))
    path = jax.jit(jf.solve_path)
    found, info = path(F, jnp.asarray(right), jnp.asarray(dampings))
    matrix = np.asarray(jax.jit(lambda F: F.as_matrix())(F))
    for x, damping in zip(np.asarray(found), dampings, strict=True):
        expected = np.linalg.pinv(matrix, rcond=1e-10, hermitian=True) @ right if damping == 0 else None
        expected = np.linalg.solve(matrix + damping * np.eye(p), right) if expected is None else expected
        assert np.linalg.norm(x - expected) < 1e-7 * np.linalg.norm(expected), damping
    full = name in ("prior", "diagonal")
    assert np.array_equal(info.rank, [p if full else rank, p, p, p])
    assert np.all(info.converged) and np.all(info.finite)
    program = path.lower(F, jnp.asarray(right), jnp.asarray(dampings)).as_text()
    assert len(re.findall(r"custom_call @lapack_dsyevd", program)) == (name != "diagonal")


@pytest.mark.compiled
@pytest.mark.parametrize("n", [4, 14])
def test_what_underflows_of_a_path_is_no_solution(n):
    """The solution is 7e-39 along a direction that F does not see, which float32 cannot hold."""
    x = np.float32(3e7 * numbers(0, n, 9))
    x[:, 4] = 0
    F = jf.empirical_fisher(linear)(jnp.zeros(9, jnp.float32), x)
    v = np.float32(5e-22 * np.eye(9)[4])
    found, info = jax.jit(jf.solve_path)(F, v, jnp.array([7e16, 1e14], jnp.float32))
    assert np.array_equal(info.converged, [False, True]) and info.residual[0] > 0.5 and not np.any(found[0])


def test_a_solution_of_a_path_takes_three_products_with_the_scores():
    """If no correction is needed, one product gives the solution from its coordinates in the rows, and two its residual."""
    n, shape = 128, (30, 40)
    args = [jax.ShapeDtypeStruct(size, jnp.float32) for size in (shape, (n, shape[0]), (n, shape[1]), shape)]

    def path(w, x, y, v, dampings):
        F = jf.empirical_fisher(lambda w, x, y: y @ jnp.tanh(x @ w))(w, x, y)
        return jf.solve_path(F, v, dampings)

    def flops(k):
        return jax.jit(path).lower(*args, jax.ShapeDtypeStruct((k,), jnp.float32)).compile().cost_analysis()["flops"]

    products = (flops(5) - flops(3)) / 2 / (2 * n * shape[0] * shape[1])
    # Products with the n x n eigenvectors, and elementwise operations on a solution.
    assert 3 <= products < 4, products


@pytest.mark.parametrize(("center", "batch_size"), [(False, None), (True, None), (True, 3)])
def test_lsmr_on_the_scores_of_a_network(center, batch_size):
    """Scores as factors, centred and in pieces: the iteration transposes the product with each."""
    params, x, y, _, rows = reference()
    scores = jf.scores(jf.log_likelihood(classifier), center=center, batch_size=batch_size)(params, x, y)
    e = np.cos(np.arange(len(rows)))
    found, info = jax.jit(lambda S, e: jf.LSMR(rtol=1e-12).least_squares(S, e, 0.1))(scores, jnp.asarray(e))
    rows = (rows - rows.mean(0) if center else rows) / np.sqrt(len(rows))
    assert info.converged
    expected = np.linalg.solve(rows.T @ rows + 0.1 * np.eye(31), rows.T @ e / np.sqrt(len(rows)))
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8, atol=1e-10)


SOLVERS = {
    "cg": jf.CG(rtol=1e-5),
    "cg, by its diagonal": jf.CG(rtol=1e-5, preconditioner=jf.diagonal),
    "lsmr": jf.LSMR(),
}


@functools.cache
def solved_at_scales(name, form, dtype):
    """One program for all scales: ``(X, v, damping) -> (x, info)`` with a leading axis."""

    def one(problem):
        X, v, damping = problem
        if form == "implicit":
            F = jf.implicit_fisher(lambda w, x: jf.Normal(jnp.dot(x, w, precision="highest"), jnp.ones((), dtype)))
        else:
            F = jf.empirical_fisher(linear)
        return jf.solve(F(jnp.zeros(X.shape[1], dtype), X), v, damping, solver=SOLVERS[name])

    return jax.jit(lambda *problems: jax.lax.map(one, problems))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("name", "form"), [("cg", "scores"), ("cg", "implicit"), ("cg, by its diagonal", "scores"), ("lsmr", "scores")]
)
def test_iterations_know_no_scale(name, form, dtype):
    """Scores from 1e-15 to 1e21, whose squares leave float32, and right-hand sides from 1e-30 to 1e30: always the same x."""
    x = numbers(3, 12, 5)
    damping, v = 0.05, x.T @ numbers(4, 12)
    expected = np.linalg.solve(x.T @ x / 12 + damping * np.eye(5), v)
    exponents = [(0, 0), (0, -95), (0, 95), (-15, -60), (15, 60), (60, 60)]
    # Dampings of that size are beyond float32, and so are preconditioners, which contain squares of scores.
    exponents += [(-49, -60), (69, 69)] * (name == "cg")
    scales = np.array([(2.0**s, 2.0**b) for s, b in exponents])
    data = [np.stack([x * s for s, _ in scales]), np.stack([v * b for _, b in scales]), damping * scales[:, 0] ** 2]
    data[2] = np.where(data[2] < np.finfo(dtype).max, data[2], 0)
    found, info = solved_at_scales(name, form, dtype)(*(jnp.asarray(array, dtype) for array in data))
    assert np.all(info.converged) and np.all(info.finite)
    exact = np.linalg.solve(x.T @ x / 12, v)
    for y, (s, b), d in zip(np.asarray(found, np.float64), scales, data[2], strict=True):
        right = (expected if d else exact) * b / s / s
        assert np.linalg.norm(y - right) < 1e-3 * np.linalg.norm(right), (s, b)


def test_a_solution_that_is_too_small_for_the_dtype_is_none():
    x, v = numbers(3, 12, 5) * 1e16, numbers(6, 5) * 1e-28
    found, info = solved_at_scales("cg", "scores", jnp.float32)(
        jnp.asarray(x[None], jnp.float32), jnp.asarray(v[None], jnp.float32), jnp.zeros(1, jnp.float32)
    )
    assert np.all(found == 0) and abs(info.residual - 1) < 1e-6 and not info.converged


@pytest.mark.parametrize("name", SOLVERS)
def test_iterations_over_nan_give_nan(name):
    x = numbers(3, 12, 5)
    x[2, 3] = np.nan
    found, info = solved_at_scales(name, "scores", jnp.float32)(
        jnp.asarray(x[None], jnp.float32), jnp.ones((1, 5), jnp.float32), jnp.full(1, 0.1, jnp.float32)
    )
    assert np.all(np.isnan(found)) and not info.finite and not info.converged


@pytest.mark.parametrize("name", ["nystrom", "partial cholesky", "diagonal"])
def test_cg_stays_where_it_was_best(name):
    """Part of the right-hand side is outside the range, without damping: the iteration would diverge along the null space."""
    x = jnp.asarray(numbers(3, 80, 50) * (np.arange(50) < 7))
    v = numbers(6, 50)
    view = {"nystrom": lambda F: jf.nystrom(F, jax.random.key(0), 1), "partial cholesky": lambda F: jf.partial_cholesky(F, 5)}

    @jax.jit
    def run(x, v):
        F = jf.empirical_fisher(linear)(jnp.zeros(50), x)
        return jf.solve(F, v, 0.0, solver=jf.CG(preconditioner=view.get(name, jf.diagonal)))

    _, info = run(x, jnp.asarray(v))
    assert info.finite and not info.converged
    assert (1 - 1e-13) * np.linalg.norm(v[7:]) / np.linalg.norm(v) <= info.residual <= 1


def test_a_damping_is_a_finite_number():
    F, _ = stretched()
    for solver in (None, jf.CG(), jf.LSMR()):
        with pytest.raises(ValueError, match=r"`damping` is inf; expected a finite number"):
            jf.solve(F, jnp.ones(40), np.inf, solver=solver)
        # An infinite damping at run time is not refused, and its result does not count as converged.
        _, info = jax.jit(lambda F, v, d, solver=solver: jf.solve(F, v, d, solver=solver))(F, jnp.ones(40), jnp.inf)
        assert not info.converged and not info.finite
