"""The solve by one Cholesky factor: it reaches the requested accuracy or says so, and its program has no eigenvectors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_lean import equations

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")


def log_prob(w, x, y):
    """A linear model with a Gaussian error, whose scores are the inputs times the residual."""
    return -0.5 * jnp.square(jnp.dot(x, w, precision="highest") - y)


SHAPES = {"more rows": (30, 7), "fewer rows": (7, 30)}


def problem(shape, condition):
    """Float32 scores with a given condition number, and right-hand sides inside and outside the span of the rows."""
    rng = np.random.default_rng(0)
    n, p = SHAPES[shape]
    rank = min(n, p)
    u, w = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (n, p))
    x = (np.sqrt(n) * (u * np.geomspace(1, condition**-0.5, rank)) @ w.T).astype(np.float32)
    F = jf.empirical_fisher(log_prob)(jnp.zeros(p, jnp.float32), x, np.ones(n, np.float32))
    wide = x.astype(float)
    vectors = {"gradient": wide.mean(0), "anything": rng.normal(size=p)}
    return F, wide.T @ wide / n, {name: v.astype(np.float32) for name, v in vectors.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_residuals_are_as_small_as_asked_for(shape, condition):
    """Against the matrix in float64. Directions that float32 cannot resolve are left out, and do not count as converged."""
    F, matrix, vectors = problem(shape, condition)
    largest, eps = np.linalg.norm(matrix, 2), np.finfo(np.float32).eps
    for rtol, share, (name, v) in itertools.product((1e-3, 1e-5), (1.0, 1e-3, 1e-5), vectors.items()):
        damping = np.float32(share * largest)
        for d in (float(damping), jnp.asarray(damping)):
            x, info = jf.solve(F, v, d, solver=jf.Cholesky(rtol=rtol))
            found = np.asarray(x, float)
            rest = np.linalg.norm(v - matrix @ found - damping * found) / np.linalg.norm(v)
            floor = 20 * eps * (largest + damping) * np.linalg.norm(found) / np.linalg.norm(v)
            case = (name, rtol, share, rest, floor)
            assert rest <= 2 * rtol + floor, case
            assert abs(float(info.residual) - rest) <= 0.1 * rest + floor, case
            assert bool(info.converged) or floor > 1e-4, case


def spread(F):
    """The Fisher whose rows are spread, over a mesh of one device."""
    return jf.spread_solves(F, jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)), "rows")


@pytest.mark.compiled
@pytest.mark.parametrize(("shape", "view", "share"), [("more rows", lambda F: F, 3e-6), ("fewer rows", spread, 3e-7)])
def test_a_smaller_rtol_is_more_accurate(shape, view, share):
    F, matrix, vectors = problem(shape, 1e6)
    damping, v = float(share * np.linalg.norm(matrix, 2)), vectors["gradient"]
    solved = [jf.solve(view(F), v, damping, solver=jf.Cholesky(rtol=rtol)) for rtol in (0.1, 0)]
    rests = [np.linalg.norm(v - matrix @ (x := np.asarray(found, float)) - damping * x) for found, _ in solved]
    assert rests[1] < rests[0] <= 0.1 * np.linalg.norm(v), rests
    assert all(info.converged for _, info in solved)


@pytest.mark.compiled
def test_rows_that_are_spread_need_a_damping_that_can_be_told():
    F, matrix, vectors = problem("fewer rows", 10.0)
    x, info = jf.solve_path(spread(F), vectors["anything"], jnp.array([0.0, 0.1, 1.0]))
    for one, damping in zip(x[1:], (0.1, 1.0), strict=True):
        expected = np.linalg.solve(matrix + damping * np.eye(30), vectors["anything"].astype(float))
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-5 * np.linalg.norm(expected))
    assert np.array_equal(info.converged, [False, True, True])
    for damping in (1e-12, jnp.zeros(())):
        x, info = jf.solve(spread(F), vectors["anything"], damping)
        assert np.all(np.isfinite(x)) and not info.converged


def with_prior(F):
    """The Fisher and a prior of precision 1/2."""
    return F + jf.scaled_identity(F, 0.5)


KEPT = {  # a function of the Fisher, how many times the result contains it, and the prior
    "a sum": (lambda F: spread(F) + F, 2, 0),
    "a sum, the other way round": (lambda F: F + spread(F), 2, 0),
    "of a sum": (lambda F: spread(F + F), 2, 0),
    "with a prior": (lambda F: with_prior(spread(F)), 1, 0.5),
    "of one with a prior": (lambda F: spread(with_prior(F)), 1, 0.5),
    "a multiple": (lambda F: 2.0 * spread(F), 2, 0),
    "in one block": (lambda F: jf.block_diagonal(spread(F)), 1, 0),
}


@pytest.mark.compiled
@pytest.mark.parametrize(("made", "times", "prior"), KEPT.values(), ids=KEPT)
def test_rows_stay_spread_in_sums_multiples_and_blocks(made, times, prior):
    F, matrix, vectors = problem("fewer rows", 10.0)
    F, v = made(F), vectors["anything"]
    assert "solves spread" in str(F)
    expected = np.linalg.solve(times * matrix + (prior + 0.1) * np.eye(30), v.astype(float))
    np.testing.assert_allclose(F.solve(v, 0.1), expected, rtol=0, atol=1e-5 * np.linalg.norm(expected))


@pytest.mark.parametrize("view", [lambda F: F, jf.dense])
def test_a_damping_that_cannot_be_told_divides_no_rounding(view):
    """In the null space of F, the solution would be rounding errors divided by a tiny damping."""
    F, matrix, vectors = problem("fewer rows", 10.0)
    g = vectors["gradient"]
    x, info = jf.solve(view(F), g, 1e-12)
    found, least = np.asarray(x, float), np.linalg.norm(np.linalg.pinv(matrix, rcond=1e-5) @ g)
    assert np.linalg.norm(found) < 2 * least, "the control: rounding of g over 1e-12 would be ten thousand times that"
    assert np.linalg.norm(matrix @ found - g) < 1e-4 * np.linalg.norm(g)
    assert not info.converged


def test_a_small_damping_of_a_regular_fisher_is_right_and_says_so():
    F, matrix, vectors = problem("more rows", 10.0)
    for name, v in vectors.items():
        x, info = jf.solve(F, v, 1e-12)
        expected = np.linalg.solve(matrix, v.astype(float))
        assert info.converged, name
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-4 * np.max(np.abs(expected)))


def program(function, *args):
    return jax.jit(function).lower(*args).as_text()


def test_no_eigenvectors_are_compiled_where_a_damping_is_known_to_be_positive():
    F, _, vectors = problem("fewer rows", 10.0)
    v = vectors["gradient"]
    exact = lambda F, v, d: jf.solve(F, v, d)[0]  # noqa: E731
    named = lambda F, v, d: jf.solve(F, v, d, solver=jf.Cholesky())[0]  # noqa: E731
    optimiser = jf.scale_by_fisher(0.1)

    def update(F, v, d):
        return optimiser.update(v, optimiser.init(v), fisher=F, damping=d)[0]

    d = jnp.float32(0.1)
    for form in (F, jf.dense(F), jf.block_diagonal(F)):
        assert "syevd" not in program(lambda form, v: exact(form, v, 0.1), form, v)
    for function in (named, update):
        assert "syevd" not in program(function, F, v, d)
    assert "syevd" in program(exact, F, v, d), "the control: an array may be zero"
    # A damping per leaf, and a damping per parameter, over two leaves.
    joined = lambda w, x, y: log_prob(jnp.concatenate(w), x, y)  # noqa: E731
    two = jf.empirical_fisher(joined)([v[:10], v[10:]], np.ones((4, 30), np.float32), np.ones(4, np.float32))
    parts = [jnp.float32(v[:10]), jnp.float32(v[10:])]
    for form, dampings in ((two, [0.1, 1.0]), (jf.dense(two), [np.full(10, 0.1, np.float32), 1.0])):
        assert "syevd" not in program(lambda form, v, dampings=dampings: exact(form, v, dampings), form, parts)
        assert "syevd" in program(exact, form, parts, jax.tree.map(jnp.asarray, dampings)), "the control"
    assert "syevd" in program(lambda F, v: exact(F, v, 0.0), F, v)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_right_hand_sides_take_one_factor(shape):
    F, matrix, _ = problem(shape, 1e3)
    many = np.random.default_rng(1).normal(size=(100, len(matrix))).astype(np.float32)
    solves = lambda F, many: jax.vmap(lambda v: F.solve(v, 0.1))(many)  # noqa: E731
    factors = [eqn for eqn in equations(jax.make_jaxpr(solves)(F, many).jaxpr) if eqn.primitive.name == "cholesky"]
    assert {eqn.outvars[0].aval.shape for eqn in factors} == {2 * (min(SHAPES[shape]),)}
    expected = np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), many.T.astype(float)).T
    np.testing.assert_allclose(solves(F, many), expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_the_optimisers_solve_as_accurately_as_training_needs_or_as_is_asked(momentum):
    """One factor leaves a residual of at most 1e-3; a solver that asks for less gets less."""
    F, matrix, vectors = problem("fewer rows", 1e6)
    g, damping = vectors["gradient"], np.float32(1e-5 * np.linalg.norm(matrix, 2))
    for rtol, options in ((1e-3, {}), (1e-5, {"solver": jf.Cholesky(rtol=1e-5)})):
        optimiser = (
            jf.natural_gradient(1.0, damping, **options)
            if momentum is None
            else jf.scale_by_fisher(damping, momentum=momentum, **options)
        )
        updates, state = optimiser.update(g, optimiser.init(g), fisher=F)
        d = np.asarray(updates, float) * (-1 if momentum is None else 1)
        rest = np.linalg.norm(g - matrix @ d - damping * d) / np.linalg.norm(g)
        info = optax.tree.get(state, "info")
        assert rest <= 2 * rtol and info.converged and info.measured, (rest, info)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda F, v: jf.solve(F, v, 0.0, jf.Cholesky()), ValueError, "Cholesky: `damping` is 0.0"),
        (lambda F, v: jf.solve(jf.diagonal(F), v, 0.1, jf.Cholesky()), TypeError, "Cholesky: .* is not held as scores"),
        (lambda F, v: jf.Cholesky(rtol=jnp.float32(1e-3)), TypeError, "Cholesky: `rtol` is .*; expected a Python number"),
        (lambda F, v: jf.Cholesky(rtol=-1e-3), ValueError, "`rtol` is -0.001"),
        (lambda F, v: jf.Cholesky(rtol=float("inf")), ValueError, "`rtol` is inf"),
    ],
)
def test_mistakes_are_named(call, error, message):
    F, _, vectors = problem("more rows", 10.0)
    with pytest.raises(error, match=message):
        call(F, vectors["gradient"])
