"""The damped solve of a training step reaches the requested accuracy at any damping."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

N, WIDTHS = 24, (5, 8, 3)


def log_prob(params, x, y):
    """A tanh network with Gaussian errors."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return -0.5 * jnp.sum(jnp.square(hidden @ params["w2"] - y))


def problem(kind):
    """Float32 parameters and data with an ill-conditioned Gram matrix, or with a gradient that is small beside the scores."""
    rng = np.random.default_rng(0)
    n = 200 if kind == "more rows than parameters" else N
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {"w1": draw(5, 8), "b1": draw(8), "w2": draw(8, 3)}
    x, y = draw(n, 5), draw(n, 3)
    if kind == "equal examples":
        x, y = jnp.tile(x[:3], (n // 3, 1)), jnp.tile(y[:3], (n // 3, 1))
    if kind == "one large example":
        x, y = x.at[0].multiply(30), y.at[0].multiply(3000)
    if kind == "tiny":
        x, y = 1e-15 * x, 1e-15 * y
    if kind == "near the optimum":
        predict = jax.vmap(lambda x: jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"])
        noise = draw(n, 3)
        # With errors of opposite sign at neighbouring inputs, scores cancel to a thousandth of their size.
        x = jnp.repeat(x[: n // 2], 2, 0) + 1e-3 * draw(n, 5)
        y = predict(x) + jnp.stack([noise[: n // 2], -noise[: n // 2]], 1).reshape(n, 3)
    return params, x, y


KINDS = ("plain", "equal examples", "one large example", "tiny", "near the optimum", "more rows than parameters")


def scores64(params, x, y):
    """The float64 scores at the same float32 numbers, by plain gradients."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, x, y))
        gradients = jax.vmap(jax.grad(log_prob), (None, 0, 0))(*exact)
        return np.concatenate([np.asarray(leaf).reshape(len(x), -1) for leaf in jax.tree.leaves(gradients)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_are_as_small_as_asked_for_at_any_damping(kind):
    """The residual in float64, of a float32 direction, at dampings down to a hundredth of an eps of the largest eigenvalue."""
    params, x, y = problem(kind)
    scores = scores64(params, x, y)
    gradient = -scores.mean(0)
    largest = np.linalg.norm(scores, 2) ** 2 / len(x)

    def step(d, rtol, **options):
        return jf.natural_grad(log_prob, damping=d, rtol=rtol, **options)(params, x, y)

    steps = {
        "plain": (1e-3, jax.jit(lambda d: step(d, 1e-3))),
        "accurate": (1e-5, jax.jit(lambda d: step(d, 1e-5))),
        "in pieces": (1e-5, jax.jit(lambda d: step(d, 1e-5, batch_size=7))),
        "mapped over dampings": (
            1e-5,
            jax.jit(lambda d: jax.tree.map(lambda leaf: leaf[1], jax.vmap(lambda d: step(d, 1e-5))(jnp.stack([10 * d, d])))),
        ),
    }
    eps = np.finfo(np.float32).eps
    for share, (name, (rtol, run)) in itertools.product((1.0, 1e-3, 1e-5, 1e-6, 1e-7, 1e-9), steps.items()):
        damping = np.float32(share * largest)
        d = np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(run(damping))])
        if len(x) < scores.shape[1]:
            # A smaller damping is below the rounding errors of the Gram matrix, and counts as this one.
            damping = max(damping, eps * np.max(np.sum(scores**2, 1)) / len(x))
        rest = gradient - scores.T @ (scores @ d) / len(x) - float(damping) * d
        # The residual that rounding the solution leaves, and rounding the scores of which the gradient is the mean.
        floor = 20 * eps * (largest + damping) * np.linalg.norm(d) + 2 * eps * np.mean(np.linalg.norm(scores, axis=1))
        limit = 2 * rtol * np.linalg.norm(gradient) + floor
        assert np.linalg.norm(rest) <= limit, (kind, share, name, np.linalg.norm(rest) / np.linalg.norm(gradient))


def test_a_gradient_of_zero_has_a_direction_of_zero():
    params, x, y = problem("plain")
    direction = jf.natural_grad(lambda p, x, y: 0.0 * log_prob(p, x, y), damping=1e-3)(params, x, y)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(direction))


@pytest.mark.parametrize("damping", [1e-3, jnp.float32(1e-3)])
def test_derivatives_are_those_of_the_solution(damping):
    """Derivatives of a direction by the parameters, in forward and reverse mode, against a dense solve in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params, x, y = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), problem("plain"))
        shapes = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)
        v = jnp.asarray(rng.standard_normal(sum(leaf.size for leaf in jax.tree.leaves(params))))

        def dense(params):
            gradients = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, x, y)
            rows = jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(gradients)], 1)
            matrix = rows.T @ rows / len(x) + float(damping) * jnp.eye(rows.shape[1])
            return jnp.vdot(v, jnp.linalg.solve(matrix, -rows.mean(0)))

        def step(params):
            leaves = jax.tree.leaves(jf.natural_grad(log_prob, damping=damping)(params, x, y))
            return jnp.vdot(v, jnp.concatenate([leaf.reshape(-1) for leaf in leaves]))

        for function in (jax.grad, lambda f: lambda params: jax.jvp(f, (params,), (shapes,))[1]):
            expected, found = jax.jit(function(dense))(params), jax.jit(function(step))(params)
            expected, found = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (expected, found))
            # The condition of the matrix is about 1e5.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.max(np.abs(expected)))


@pytest.mark.parametrize(
    ("rtol", "options", "message"),
    [
        (0.0, {}, "`rtol` is 0.0; expected a Python number above zero"),
        (jnp.float32(1e-3), {}, "`rtol` is .*; expected a Python number above zero"),
        (True, {}, "`rtol` is True; expected a Python number above zero"),
        (1e-3, {"solver": jf.CG()}, "`rtol` is given with `solver`, on which it has no effect"),
        (1e-3, {"view": jf.diagonal}, "`rtol` is given with `view`, on which it has no effect"),
    ],
)
def test_an_rtol_without_an_effect_is_refused(rtol, options, message):
    with pytest.raises(ValueError, match=message):
        jf.natural_grad(log_prob, damping=1e-3, rtol=rtol, **options)


def test_an_rtol_beside_a_damping_by_leaf_is_refused():
    params, x, y = problem("plain")
    with pytest.raises(ValueError, match="`rtol` is given with a damping by leaf, on which it has no effect"):
        jf.natural_grad(log_prob, damping=jax.tree.map(lambda _: 1e-3, params), rtol=1e-3)(params, x, y)


@pytest.mark.compiled
@pytest.mark.parametrize("shape", [(6, 9), (9, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
def test_rows_of_zeros_change_nothing_at_any_damping(shape, scale):
    """Padded rows, and scores that are all zero, with a damping that is zero or negligible beside scores of 1e20."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(size) * unit, jnp.float32) for size, unit in ((shape, scale), (shape[0], 1.0)))
    weights, w = jnp.ones(shape[0], jnp.float32).at[-2:].set(0), jnp.zeros(shape[1], jnp.float32)
    line = lambda w, x, y: -0.5 * jnp.square(jnp.dot(x, w) - y)  # noqa: E731
    step = jax.jit(lambda x, y, weights, d: jf.natural_grad(line, damping=d)(w, x, y, weights=weights))
    for damping in (1e-3, 1e-30, 0.0):
        padded, plain = (step(x[:n], y[:n], weights[:n], jnp.float32(damping)) for n in (shape[0], shape[0] - 2))
        assert np.all(np.isfinite(plain)) and np.any(plain != 0)
        np.testing.assert_allclose(padded, plain, rtol=0, atol=1e-4 * np.max(np.abs(plain)), err_msg=str(damping))
        assert np.all(step(x, 0 * y, weights, jnp.float32(damping)) == 0), damping
