"""Least squares with `residuals`: Nielsen's damping, geodesic acceleration, and residuals of differential equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import compiled
from problems import assert_close, flat

import jaxfisher as jf
from jaxfisher._transform.adapt_damping import Evidence
from jaxfisher._transform.levenberg_marquardt import nielsen

pytestmark = pytest.mark.usefixtures("in_numpy")

GOOD = {"accepted": True, "rejected": 0, "ratio": 0.9, "clear": True, "beyond": False, "overshot": False}


@pytest.mark.parametrize(
    ("seen", "change"),
    [
        ({"ratio": 0.99}, 1 / 3),
        ({"ratio": 5.0}, 1 / 3),
        ({"ratio": 0.75}, 1 - 0.5**3),
        ({"ratio": 0.5}, 1),
        ({"ratio": 0.25}, 1 + 0.5**3),
        ({"ratio": 0.0}, 2),
        ({"accepted": False, "rejected": 1, "ratio": -1.0}, 2),
        ({"accepted": False, "rejected": 3, "ratio": jnp.nan}, 8),
    ],
)
def test_the_damping_is_a_smooth_function_of_the_ratio(seen, change):
    F = jf.scaled_identity(jnp.zeros(2), 3.0)
    known = Evidence(**{name: jnp.asarray(value) for name, value in (GOOD | seen).items()})
    np.testing.assert_allclose(nielsen(jnp.float32(0.5), known, F), 0.5 * change, rtol=1e-6)
    eps = float(jnp.finfo(F.spec.dtype).eps)
    assert nielsen(jnp.float32(1e-30), known, F) == jnp.float32(6 * eps)
    assert nielsen(jnp.float32(1e30), known, F) == jnp.float32(6) / jnp.float32(eps)


# --- geodesic acceleration ---------------------------------------------------------------------------------------------------

TIMES = jnp.linspace(0.0, 2.0, 6)
WEIGHTS = jnp.asarray([1.0, 0.5, 2.0, 0.0, 1.0, 1.5])
RATES = {"amplitude": jnp.asarray([1.0, -0.5]), "rate": jnp.asarray([0.7, 1.9])}
DAMPING = 0.01


def decays(params, t):
    """A model with two logits, of a sum of exponentials and its square: its Fisher in the fields is not constant."""
    value = jnp.sum(params["amplitude"] * jnp.exp(-params["rate"] * t))
    return jf.Bernoulli(logits=jnp.stack([value, jnp.square(value)]))


def dense():
    """A direction, the pulled-back second derivative of the fields along it, and the Fisher, from dense Jacobians."""
    direction = jax.tree.map(lambda leaf: 0.1 + 0.05 * leaf, RATES)

    def along(shift, t):
        moved = jax.tree.map(lambda leaf, d: leaf + shift * d, RATES, direction)
        return decays(moved, t).logits

    jacobian = jax.vmap(jax.jacrev(lambda params, t: decays(params, t).logits), (None, 0))(RATES, TIMES)
    J = np.concatenate([jacobian["amplitude"], jacobian["rate"]], -1)
    second = jax.vmap(jax.jacfwd(jax.jacfwd(along)), (None, 0))(0.0, TIMES)
    p = np.asarray(jax.nn.sigmoid(jax.vmap(decays, (None, 0))(RATES, TIMES).logits))
    omega = np.asarray(WEIGHTS / jnp.sum(WEIGHTS))
    pulled = np.einsum("n,nkp,nk,nk->p", omega, J, p * (1 - p), np.asarray(second))
    return direction, pulled, np.einsum("n,nkp,nk,nkq->pq", omega, J, p * (1 - p), J)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_acceleration_and_the_step_that_it_bends(batch_size):
    direction, pulled, F = dense()

    def found(max_ratio):
        bend = lambda d: jf.acceleration(decays, batch_size=batch_size)(RATES, d, TIMES, weights=WEIGHTS)  # noqa: E731
        fisher = jf.exact_fisher(decays)(RATES, TIMES, weights=WEIGHTS)
        opt = jf.geodesic_acceleration(DAMPING, max_ratio=max_ratio, solver=jf.Cholesky(rtol=1e-12))
        bent, state = opt.update(direction, opt.init(RATES), fisher=fisher, acceleration_fn=bend)
        return bend(direction), bent, state

    made, bent, state = compiled(found)(100.0)
    assert_close(flat(made), pulled)
    second = np.linalg.solve(F + DAMPING * np.eye(4), pulled)
    assert_close(flat(bent), flat(direction) - second / 2, factor=1e5)
    np.testing.assert_array_equal(flat(state.straight), flat(direction))
    ratio = np.linalg.norm(second) / np.linalg.norm(flat(direction))
    for allowed, taken in ((1.01 * ratio, True), (0.99 * ratio, False)):
        assert np.all(flat(compiled(found)(allowed)[1]) == flat(direction)) != taken


def test_a_bent_step_is_judged_by_the_model_of_the_straight_one():
    """Of a curved step the ratio compares the actual decrease with the quadratic model at the straight step."""
    circle = lambda theta: jf.Normal(jnp.stack([jnp.cos(theta), jnp.sin(theta)]), 1.0)  # noqa: E731
    target = jnp.asarray([np.cos(0.5), np.sin(0.5)])
    loss = lambda theta: 0.5 * jnp.sum(jnp.square(circle(theta).loc - target))  # noqa: E731
    inner = optax.chain(jf.scale_by_fisher(), optax.scale_by_learning_rate(1.0), jf.geodesic_acceleration())
    opt, start = jf.levenberg_marquardt(inner, 1e-3), jnp.zeros(())
    gradient = jax.grad(loss)(start)
    given = {"fisher": jf.exact_fisher(circle)(start), "value_fn": loss}
    step, state = opt.update(
        gradient, opt.init(start), start, acceleration_fn=lambda d: jf.acceleration(circle)(start, d), **given
    )
    u = -float(gradient) / 1.001
    np.testing.assert_allclose(step, u, rtol=1e-6)  # the acceleration is across the circle
    np.testing.assert_allclose(state.ratio, float(loss(start) - loss(step)) / -(float(gradient) * u + u**2 / 2), rtol=1e-5)


# --- Poisson's equation -------------------------------------------------------------------------------------------------------

HIDDEN = 12


@functools.cache
def poisson():
    """The parameters of the network, the interior points, and the boundary points."""
    keys = jax.random.split(jax.random.key(1))
    params = {
        "inner": {"b": jnp.zeros(HIDDEN), "w": jax.random.normal(keys[0], (2, HIDDEN)) / 2**0.5},
        "outer": {"b": jnp.zeros(1), "w": jax.random.normal(keys[1], (HIDDEN, 1)) / HIDDEN**0.5},
    }
    side = jnp.linspace(0.0, 1.0, 10)
    grid = jnp.stack(jnp.meshgrid(side[1:-1], side[1:-1]), -1).reshape(-1, 2)
    edges = [jnp.stack(pair, 1) for c in (0.0, 1.0) for pair in ((side, 0 * side + c), (0 * side + c, side))]
    return params, grid, jnp.concatenate(edges)


def network(params, x):
    hidden = jnp.tanh(x @ params["inner"]["w"] + params["inner"]["b"])
    return (hidden @ params["outer"]["w"] + params["outer"]["b"])[0]


def laplacian(params, x):
    """The Laplacian by forward-mode derivatives in the inputs."""
    slope = lambda x, e: jax.jvp(lambda x: network(params, x), (x,), (e,))[1]  # noqa: E731
    return sum(jax.jvp(lambda x, e=e: slope(x, e), (x,), (e,))[1] for e in jnp.eye(2))


def solution(x):
    return jnp.prod(jnp.sin(jnp.pi * x))


def interior(params, x):
    return laplacian(params, x) + 2 * jnp.pi**2 * solution(x)


WEIGHT = 4.0
PROBLEM = jf.residuals({"interior": interior, "boundary": network})
SCALES = {"boundary": WEIGHT}


def points():
    _, grid, edges = poisson()
    return {"interior": grid, "boundary": edges}


def fisher(params):
    return PROBLEM.gauss_newton(params, points(), SCALES)


def residuals(params):
    """The residuals of both kinds in one vector, scaled so that half the sum of squares is the loss."""
    _, grid, edges = poisson()
    kinds = ((interior, grid, 1.0), (network, edges, WEIGHT))
    return jnp.concatenate([(w / len(x)) ** 0.5 * jax.vmap(f, (None, 0))(params, x) for f, x, w in kinds])


def test_residuals_of_two_kinds_are_one_gauss_newton():
    """The scaled sum over kinds and its views, against the dense Jacobian of all residuals."""
    params, grid, _ = poisson()
    assert {"['inner']['w']", "['outer']['w']"} <= set(
        jf.explain(lambda p, x: jf.Normal(interior(p, x), 1.0))(params, grid).factored
    )
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)

    def found(params):
        F = fisher(params)
        layers = jf.eigen_kronecker(F), jf.kronecker(F)
        bent = PROBLEM.acceleration(params, v, points(), SCALES)
        loss = jax.value_and_grad(lambda p: PROBLEM.loss(p, points(), SCALES))(params)
        matrices = F.as_matrix(), F.diagonal(), jf.block_diagonal(F).as_matrix(), *(view.trace() for view in layers)
        return *matrices, F.solve(v, 0.1), loss, bent

    matrix, diagonal, blocks, eigen, kronecker, solved, (loss, gradient), bent = compiled(found)(params)
    r, second = compiled(lambda p: (residuals(p), jax.jvp(lambda p: jax.jvp(residuals, (p,), (v,))[1], (p,), (v,))[1]))(params)
    J = compiled(jax.jacrev(residuals))(params)
    J = np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(J)], 1)
    assert_close(matrix, J.T @ J, factor=1e3)
    assert_close(flat(solved), np.linalg.solve(J.T @ J + 0.1 * np.eye(len(matrix)), flat(v)), factor=1e7)
    assert_close(loss, np.sum(r**2) / 2, factor=1e3)
    assert_close(flat(gradient), J.T @ r, factor=1e3)
    assert_close(flat(bent), J.T @ second, factor=1e3)
    assert_close(flat(diagonal), np.sum(J**2, 0), factor=1e3)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])
    same = np.digitize(np.arange(len(matrix)), ends)
    assert_close(blocks, np.where(same[:, None] == same[None], J.T @ J, 0), factor=1e3)
    # The second moments in an eigenbasis have the exact trace. A product of two means does not, if there are positions.
    assert_close(eigen, np.sum(J**2), factor=1e3)
    assert 0.05 < kronecker / np.sum(J**2) < 20


def error(params):
    """The error of the network at points that it was not trained on."""
    x = jax.random.uniform(jax.random.key(2), (200, 2))
    return jnp.sqrt(jnp.mean(jnp.square(jax.vmap(network, (None, 0))(params, x) - jax.vmap(solution)(x))))


def trained(opt, fisher, steps):
    """The parameters after training, and the losses of all steps."""
    step, (start, *_) = jf.training_step(PROBLEM, opt, fisher), poisson()
    state = step.init(start, points(), SCALES)

    def one(carry, _):
        *carry, loss = step(*carry, points(), SCALES)
        return carry, loss

    (params, _), losses = jax.jit(lambda p, s: jax.lax.scan(one, [p, s], length=steps))(start, state)
    return params, losses


@pytest.mark.compiled
def test_poisson_to_a_small_error_in_few_steps():
    """A hundred steps with acceleration reach an error for which steps without it need several times as many."""
    dense = lambda *given: jf.dense(PROBLEM.gauss_newton(*given))  # noqa: E731
    params, losses = trained(jf.levenberg_marquardt(), dense, 100)
    assert error(params) < 1e-3
    assert losses[-1] < 1e-5 * losses[0]


def second(u, x, axis):
    e = jnp.eye(len(x))[axis]
    return jax.jvp(lambda x: jax.jvp(u, (x,), (e,))[1], (x,), (e,))[1]


EQUATIONS = {
    # u_t = u_xx / 4. Entries: the number of inputs, solution, residual, faces as (axis, end), and the largest relative error.
    "heat": (
        2,
        lambda x: jnp.exp(-(jnp.pi**2) * x[1] / 4) * jnp.sin(jnp.pi * x[0]),
        lambda u, x: jax.jvp(u, (x,), (jnp.array([0.0, 1.0]),))[1] - second(u, x, 0) / 4,
        [(0, 0), (0, 1), (1, 0)],
        1e-3,
    ),
    "Poisson in five dimensions": (
        5,
        lambda x: jnp.sum(jnp.cos(jnp.pi * x)),
        lambda u, x: sum(second(u, x, k) for k in range(5)) + jnp.pi**2 * jnp.sum(jnp.cos(jnp.pi * x)),
        [(k, end) for k in range(5) for end in (0, 1)],
        2e-2,
    ),
}


@pytest.mark.compiled
@pytest.mark.parametrize("name", EQUATIONS)
def test_other_equations_to_a_small_error_by_what_is_there_by_default(name):
    """The heat and the Poisson equation with default settings, against exact solutions at points that were not fitted."""
    axes, exact, residual, faces, bound = EQUATIONS[name]
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "inner": {"b": jnp.zeros(HIDDEN), "w": jax.random.normal(keys[0], (axes, HIDDEN)) / axes**0.5},
        "outer": {"b": jnp.zeros(1), "w": jax.random.normal(keys[1], (HIDDEN, 1)) / HIDDEN**0.5},
    }
    drawn = jax.random.uniform(keys[2], (len(faces), 240 // len(faces), axes))
    given = {
        "interior": jax.random.uniform(keys[3], (300, axes)),
        "boundary": jnp.concatenate([x.at[:, axis].set(end) for x, (axis, end) in zip(drawn, faces, strict=True)]),
    }
    problem = jf.residuals(
        {
            "interior": lambda params, x: residual(lambda x: network(params, x), x),
            "boundary": lambda params, x: network(params, x) - exact(x),
        }
    )
    step = jf.training_step(problem, jf.levenberg_marquardt())

    def one(carry, _):
        *carry, loss = step(*carry, given)
        return carry, loss

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(one, [p, step.init(p, given)], length=100))(params)
    x = jax.random.uniform(jax.random.key(4), (500, axes))
    off = jax.vmap(network, (None, 0))(params, x) - jax.vmap(exact)(x)
    assert jnp.sqrt(jnp.mean(jnp.square(off))) < bound * jnp.std(jax.vmap(exact)(x))


def test_points_that_come_as_a_stream_and_steps_over_several_batches():
    """`accumulate` takes one kind of residual and refuses a sum of kinds; `optax.MultiSteps` averages gradients of both."""
    params, grid, edges = poisson()
    one = jf.residuals({"interior": interior})
    halves = [({"interior": part},) for part in (grid[:40], grid[40:])]
    dense = lambda F: jf.dense(F)  # noqa: E731
    mean = jf.accumulate(one.gauss_newton, dense)(params, halves)
    assert_close(mean.as_matrix(), one.gauss_newton(params, {"interior": grid}).as_matrix(), factor=1e3)
    both = [({"interior": x, "boundary": edges},) for (given,) in halves for x in given.values()]
    with pytest.raises(TypeError, match=r"merge: .* is no mean over examples"):
        jf.accumulate(PROBLEM.gauss_newton, dense)(params, both)

    pieces = [{"interior": x, "boundary": y} for x, y in ((grid[:32], edges[:20]), (grid[32:], edges[20:]))]
    step = jf.training_step(PROBLEM, optax.MultiSteps(optax.sgd(1e-3), 2).gradient_transformation())
    moved, state = params, step.init(params, pieces[0], SCALES)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps accumulates in float32.
        for piece in pieces:
            moved, state, _ = step(moved, state, piece, SCALES)
    slopes = [compiled(jax.grad(lambda p, x: PROBLEM.loss(p, x, SCALES)))(params, piece) for piece in pieces]
    mean = (flat(slopes[0]) + flat(slopes[1])) / 2
    np.testing.assert_allclose(flat(params) - flat(moved), 1e-3 * mean, atol=1e-9 * np.max(np.abs(mean)))


@pytest.mark.compiled
def test_kronecker_factors_train_through_derivatives_of_the_inputs():
    """KFAC for a sum of kinds, with factors of weights inside a Laplacian: the loss never rises and falls to almost zero."""
    params, losses = trained(jf.kfac(decay=None, update_every=1), None, 300)
    assert np.all(np.diff(losses) <= 0)
    assert losses[-1] < 2e-3 * losses[0]
    assert error(params) < 0.12


def test_kinds_with_weights_in_pieces_and_without_points():
    """A kind with two inputs and a weight of zero, and a kind without inputs, against the formula."""
    kinds = {"data": lambda p, t, y: p["a"] * t + p["b"] - y, "prior": lambda p: jnp.stack([p["a"] - 1.0, 2.0 * p["b"]])}
    t, y, w = np.array([0.0, 1.0, 2.0, 5.0]), np.array([1.0, 2.0, 4.0, np.nan]), np.array([1.0, 3.0, 2.0, 0.0])
    params, given = {"a": jnp.asarray(0.5), "b": jnp.asarray(-0.25)}, {"data": (t, y), "prior": ()}
    scales, weights = {"prior": 0.3, "data": 2.0}, {"data": w}
    rows, r = np.stack([t, np.ones(4)], 1)[:3], (0.5 * t - 0.25 - y)[:3]
    expected = 2 * rows.T @ (w[:3, None] * rows) / 6 + 0.3 * np.diag([1.0, 4.0])
    for batch_size in (None, 2):
        problem = jf.residuals(kinds, batch_size=batch_size)
        assert_close(problem.gauss_newton(params, given, scales, weights=weights).as_matrix(), expected)
        assert_close(problem.loss(params, given, scales, weights=weights), w[:3] @ r**2 / 6 + 0.15 * 0.5)
    other = {"a": jnp.asarray(1.5), "b": jnp.asarray(-0.25)}
    moved = problem.kl(params, other, given, scales, weights=weights)
    assert_close(moved, w[:3] @ t[:3] ** 2 / 6 + 0.15)

    def everything(scale, dtype):
        at, to = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, other))
        given = {"data": (jnp.asarray(t, dtype), jnp.asarray(y, dtype)), "prior": ()}, {"prior": scale}
        made = problem.gauss_newton(at, *given, weights=weights).as_matrix()
        others = problem.acceleration(at, to, *given, weights=weights), problem.kl(at, to, *given, weights=weights)
        return problem.loss(at, *given, weights=weights), made, others

    # A scale changes no dtype, and gives NaN if it turns out to be negative at run time.
    made = jax.eval_shape(lambda: everything(np.float64(0.3), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype("float32")}
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(jax.jit(everything, static_argnums=1)(-0.3, float)))


def test_a_fit_does_not_depend_on_units_that_leave_the_range_of_float32():
    """Curvatures of 1e48 and 1e-48 in float64: powers of two change no digit, so every step is the same."""
    t = np.linspace(0.0, 2.0, 8)
    y = 2 * np.exp(-1.3 * t)

    def fitted(unit):
        residual = lambda p, t, y: unit * (unit * p["a"] * jnp.exp(-unit * p["k"] * t) - y)  # noqa: E731
        step = jf.training_step(jf.residuals({"data": residual}), jf.levenberg_marquardt(damping=0.01 * unit**4))
        params, points = {"a": jnp.asarray(1 / unit), "k": jnp.asarray(0.5 / unit)}, {"data": (t, y)}
        state, take = step.init(params, points), jax.jit(step)
        for _ in range(4):
            params, state, _ = take(params, state, points)
        return jax.tree.map(lambda leaf: unit * leaf, params), state.damping / unit**4

    expected = fitted(1.0)
    for unit in (2.0**40, 2.0**-40):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), fitted(unit), expected)


def test_a_residual_may_be_an_array_of_numpy():
    """As one that depends on no parameter is: it adds to the loss, and to nothing else."""
    r = np.array([3.0, -1.0])
    problem = jf.residuals({"fixed": lambda p, x: r, "free": lambda p, x: p * x})
    points = {"fixed": np.ones(4), "free": np.array([1.0, 2.0])}
    np.testing.assert_allclose(problem.loss(2.0, points), 0.5 * 10 + 0.5 * 4 * 2.5, rtol=1e-6)
    np.testing.assert_allclose(problem.gauss_newton(2.0, points).as_matrix(), [[2.5]], rtol=1e-6)
    assert problem.acceleration(2.0, 1.0, points) == 0
    np.testing.assert_allclose(problem.kl(2.0, 3.0, points), 0.5 * 2.5, rtol=1e-6)
    for wrong, seen in ((np.ones(2, int), "dtype int64"), (np.ones(2, complex), "complex128"), ([1.0, 2.0], "a list")):
        with pytest.raises(TypeError, match=f"a residual returned .*{seen}"):
            jf.residuals({"fixed": lambda p, x, wrong=wrong: wrong}).loss(2.0, {"fixed": np.ones(4)})


def test_a_loss_fits_in_float32_where_squares_of_residuals_do_not():
    """Residuals of 1e25 at a scale of 1e-25, and the reverse, against float64; and the slope by the scale, also at zero."""
    problem = jf.residuals({"a": lambda w, x: w * x})
    for unit in (1e25, 1.0, 1e-25):
        found = []
        for dtype in (np.float32, np.float64):
            x = np.asarray([unit, 2 * unit], dtype)
            at = lambda w, c, x=x: problem.loss(w, {"a": x}, {"a": c})  # noqa: E731
            found.append(jax.value_and_grad(at)(dtype(3), dtype(1 / unit)))
        np.testing.assert_allclose(*found, rtol=1e-6)
    slope = jax.grad(lambda c: problem.loss(2.0, {"a": np.ones(3)}, {"a": c}))
    np.testing.assert_allclose([slope(0.0), slope(0.3)], 2.0, rtol=1e-15)


def test_points_that_are_wrong_are_named_with_their_kind():
    problem = jf.residuals({"inside": lambda p, x: p * x, "edge": lambda p, x, y: p * x - y})
    for edge, error, says in (
        ((np.ones((0, 2)), np.ones(0)), ValueError, r"points\['edge'\]\[0\] has no examples"),
        ((np.ones(3), np.ones(2)), ValueError, r"points\['edge'\]\[0\] has 3 examples, but points\['edge'\]\[1\] has 2"),
        ((np.ones(3), None), TypeError, r"points\['edge'\]\[1\] is None"),
        (["a"], TypeError, r"points\['edge'\]\[0\]\[0\] is 'a'"),
    ):
        for call in (problem.loss, problem.gauss_newton):
            with pytest.raises(error, match=says):
                call(2.0, {"inside": np.ones(4), "edge": edge})
    points = {"inside": np.ones(4), "edge": (np.ones(3), np.ones(3))}
    for call in (problem.loss, problem.gauss_newton):
        with pytest.raises(ValueError, match=r"`weights\['edge'\]` has shape \(2,\), but there are 3 examples"):
            call(2.0, points, weights={"edge": np.ones(2)})
