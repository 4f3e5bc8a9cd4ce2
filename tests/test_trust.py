"""Safeguards of steps: backtracking on the divergence, adaptive damping, and rates from the quadratic model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, reference
from problems import mean_loss as loss

import jaxfisher as jf
from jaxfisher._transform.adapt_damping import Evidence, Rule, next_damping

pytestmark = pytest.mark.usefixtures("in_numpy")


def log_probs(params, x):
    """The classifier by hand, in numpy."""
    hidden = np.tanh(np.asarray(x) @ np.asarray(params["hidden"]["w"]) + np.asarray(params["hidden"]["b"]))
    logits = hidden @ np.asarray(params["out"][0]) + np.asarray(params["out"][1])
    return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))


def divergence(old, new, x):
    p, q = log_probs(old, x), log_probs(new, x)
    return np.mean(np.sum(np.exp(p) * (p - q), axis=1))


@pytest.fixture(scope="module")
def problem():
    """``(params, x, y, gradient, exact Fisher, the same dense)``."""
    params, x, y, _, _ = reference()
    gradient = jax.jit(jax.grad(loss))(params, x, y)
    return params, x, y, gradient, jf.exact_fisher(classifier)(params, x), class_sum_fisher(params, x)


def searched(opt, problem, updates, value_fn=None):
    params, x, y, *_ = problem
    value_fn = value_fn or (lambda new: loss(new, x, y))
    kl_fn = lambda new: jf.kl(classifier)(params, new, x)  # noqa: E731
    step = jax.jit(lambda u: opt.update(u, opt.init(params), params, value_fn=value_fn, kl_fn=kl_fn))
    return step(updates)


# --- backtrack_kl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-4, 1e-2, 1.0])
def test_the_longest_half_inside_the_ball_that_lowers_the_loss_is_taken(problem, radius):
    params, x, y, gradient, _, _ = problem
    long = jax.tree.map(lambda g: -64.0 * g, gradient)
    step, state = searched(jf.backtrack_kl(radius, max_halvings=30), problem, long)

    def allowed(k):
        new = jax.tree.map(lambda p, u: np.asarray(p) + 0.5**k * np.asarray(u), params, long)
        picked = lambda p: -np.mean(log_probs(p, x)[np.arange(len(y)), np.asarray(y)])  # noqa: E731
        return divergence(params, new, x) <= radius and picked(new) < picked(params)

    k = next(k for k in range(31) if allowed(k))
    assert k > 0, "the full step must be too long for this to say anything"
    assert state.halvings == k and state.accepted
    assert_close(flat(step), flat(long) * 0.5**k)
    new = jax.tree.map(lambda p, u: np.asarray(p) + np.asarray(u), params, step)
    np.testing.assert_allclose(state.moved, divergence(params, new, x), rtol=1e-5)


def test_a_step_that_only_climbs_or_is_not_finite_is_not_taken(problem):
    _, x, y, gradient, _, _ = problem
    opt = jf.backtrack_kl(1e3, max_halvings=6)
    for bad in (
        gradient,
        jax.tree.map(lambda g: g * jnp.nan, gradient),
        jax.tree.map(lambda g: -jnp.inf * jnp.sign(g), gradient),
    ):
        step, state = searched(opt, problem, bad)
        assert np.all(flat(step) == 0)
        assert not state.accepted and state.halvings == 6 and state.moved == 0
    down = jax.tree.map(jnp.negative, gradient)
    nowhere = lambda new: loss(new, x, y) * jnp.nan  # noqa: E731
    assert np.all(flat(searched(opt, problem, down, nowhere)[0]) == 0)


# --- adapt_damping -----------------------------------------------------------------------------------------------------------


@functools.cache
def updating(opt):
    return jax.jit(lambda g, s, p, fisher, x, y: opt.update(g, s, p, fisher=fisher, value_fn=lambda new: loss(new, x, y)))


def adapted(opt, problem, state=None, gradient=None, params=None):
    first, x, y, whole, fisher, _ = problem
    params = first if params is None else params
    gradient = whole if gradient is None else gradient
    state = opt.init(first) if state is None else state
    return updating(opt)(gradient, state, params, fisher, x, y)


@pytest.mark.parametrize("damping", [0.03, 0.3, 10.0])
def test_the_ratio_is_the_actual_over_the_predicted_decrease(problem, damping):
    params, x, y, gradient, _, dense = problem
    opt = jf.adapt_damping(jf.natural_gradient(1.0, 0.5), damping, lower_ratio=0.25, upper_ratio=0.75, factor=3.0)
    step, state = adapted(opt, problem)
    g, u = flat(gradient), flat(step)
    assert_close(u, -np.linalg.solve(dense + damping * np.eye(31), g), factor=1e5, eps=1.2e-7 * damping)
    new = jax.tree.map(lambda p, u: np.asarray(p) + np.asarray(u), params, step)
    picked = lambda p: -np.mean(log_probs(p, x)[np.arange(len(y)), np.asarray(y)])  # noqa: E731
    ratio = (picked(params) - picked(new)) / -(g @ u + 0.5 * u @ dense @ u)
    np.testing.assert_allclose(state.ratio, ratio, rtol=1e-4)
    beyond = damping * (u @ u) > 10 * (u @ dense @ u)
    assert beyond == (damping == 10.0), "out of reach, and in reach"
    expected = damping * (3**-4 if beyond else 1 / 3 if ratio > 0.75 else 3 if ratio < 0.25 else 1)
    np.testing.assert_allclose(state.damping, expected, rtol=1e-6)
    assert state.accepted


RULE = Rule(factor=2.0, lower_ratio=0.25, upper_ratio=0.75, lower_damping=1e-8, upper_damping=1e8)
GOOD = {"accepted": True, "rejected": 0, "ratio": 0.9, "clear": True, "beyond": False, "overshot": False}


@pytest.mark.parametrize(
    ("seen", "change"),
    [
        ({}, 1 / 2),
        ({"ratio": 0.5}, 1),
        ({"ratio": 0.1}, 2),
        ({"overshot": True}, 2),
        ({"overshot": True, "beyond": True}, 1),
        ({"beyond": True}, 1 / 16),
        ({"beyond": True, "ratio": 0.5}, 1),
        ({"accepted": False, "rejected": 1, "ratio": -1.0}, 4),
        ({"accepted": False, "rejected": 2, "ratio": -1.0, "beyond": True}, 16),
        ({"accepted": False, "rejected": 3, "ratio": jnp.nan}, 256),
        ({"accepted": False, "rejected": 9, "ratio": -1.0}, 256),
        ({"accepted": False, "rejected": 1, "ratio": -1.0, "clear": False}, 1),
        ({"clear": False}, 1),
    ],
    ids=str,
)
def test_the_damping_follows_the_evidence(seen, change):
    known = Evidence(**{name: jnp.asarray(value) for name, value in (GOOD | seen).items()})
    np.testing.assert_allclose(next_damping(jnp.float32(0.5), known, RULE), 0.5 * change, rtol=1e-6)
    narrow = RULE._replace(lower_damping=0.4, upper_damping=0.6)
    np.testing.assert_allclose(next_damping(jnp.float32(0.5), known, narrow), np.clip(0.5 * change, 0.4, 0.6), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"factor": 0.5}, {"upper_ratio": 0.1}, {"lower_damping": 0.0}, {"upper_damping": 1e-9}])
def test_numbers_that_turn_out_to_be_out_of_order_adapt_nothing(wrong):
    known = Evidence(**{name: jnp.asarray(value) for name, value in GOOD.items()})
    rule = RULE._replace(**{name: jnp.asarray(value) for name, value in wrong.items()})
    assert np.isnan(next_damping(jnp.float32(0.5), known, rule))


def test_the_gradient_of_the_next_batch_judges_the_recent_steps(problem):
    """The recent steps are a sum that decays by a twentieth with each new step; here of three steps, computed by hand.

    If the sum points uphill the damping rises, even if the last step points downhill. If the sum points downhill the damping
    falls, even if the last step points uphill.
    """
    opt = jf.adapt_damping(jf.natural_gradient(0.1, 0.5), 0.3)
    params, state, recent = problem[0], None, 0
    for _ in range(3):
        gradient = jax.jit(jax.grad(loss))(params, *problem[1:3])
        step, state = adapted(opt, problem, state, gradient, params)
        params, recent = optax.apply_updates(params, step), 0.95 * recent + flat(step)
    assert_close(flat(state.recent), recent)
    gradient = jax.jit(jax.grad(loss))(params, *problem[1:3])
    for sign, change in ((1, 1 / 2), (-1, 2)):
        before = state._replace(recent=jax.tree.map(lambda leaf, sign=sign: sign * leaf, state.recent))
        _, after = adapted(opt, problem, before, gradient, params)
        assert after.accepted and after.ratio > 0.75
        np.testing.assert_allclose(after.damping, state.damping * change, rtol=1e-6)


def test_inside_it_a_transformation_needs_no_damping_of_its_own(problem):
    """Each update of the inner transformation uses the damping of the state, so one of its own makes no difference."""
    makers = (
        lambda *own: jf.natural_gradient(1.0, *own),
        lambda *own: optax.chain(jf.scale_by_fisher(*own), jf.quadratic_model(*own)),
    )
    for make in makers:
        one, other = (adapted(jf.adapt_damping(make(*own), 0.3), problem)[0] for own in ((), (7.0,)))
        chex.assert_trees_all_equal(one, other)


def test_after_convergence_the_damping_stays():
    """At convergence the predicted decrease is below the rounding error of the loss, and the damping does not change."""
    opt = jf.adapt_damping(jf.natural_gradient(1.0, 1e-3), 1e-3)
    step = jax.jit(jf.training_step(lambda mu, x: jf.Normal(mu * x, 1.0), opt))
    mu, x = jnp.float32(0.0), jnp.ones(5, jnp.float32)
    state = opt.init(mu)
    for _ in range(60):
        mu, state, _ = step(mu, state, x, 3 * x)
    np.testing.assert_allclose(mu, 3, rtol=1e-5)
    assert state.damping < 1e-3
    for _ in range(3):
        mu, state, _ = step(mu, state, x, 5 * x)
    np.testing.assert_allclose(mu, 5, rtol=1e-5)


def test_a_damping_far_above_its_reach_finds_back_in_a_few_steps():
    opt = jf.adapt_damping(jf.natural_gradient(1.0, 1e-3), 1e8)
    step = jax.jit(jf.training_step(lambda mu, x: jf.Normal(mu * x, 1.0), opt))
    mu, x = jnp.float64(0.0), jnp.ones(5, jnp.float64)
    state = opt.init(mu)
    for _ in range(12):
        mu, state, _ = step(mu, state, x, 3 * x)
    np.testing.assert_allclose(mu, 3, rtol=0.01)


def test_a_bad_step_leaves_everything_but_the_damping(problem):
    """A rate of fifty, or a NaN gradient: the parameters and inner states stay, the damping rises, and steps become shorter."""
    params, x, y, gradient, _, _ = problem
    inner = optax.chain(jf.natural_gradient(50.0, 0.1, view=jf.dense, decay=0.9), optax.trace(0.9))
    opt = jf.adapt_damping(inner, 0.1)
    start = opt.init(params)
    step, state = adapted(opt, problem, start)
    assert not state.accepted and np.all(flat(step) == 0)
    np.testing.assert_allclose(state.damping, 0.4, rtol=1e-6)
    for new, old in zip(jax.tree.leaves(state.inner), jax.tree.leaves(start.inner), strict=True):
        np.testing.assert_array_equal(new, old)
    values = [float(loss(params, x, y))]
    for _ in range(12):
        step, state = adapted(opt, problem, state, jax.grad(loss)(params, x, y), params)
        params = optax.apply_updates(params, step)
        values.append(float(loss(params, x, y)))
    assert np.all(np.diff(values) <= 0) and values[-1] < values[0], values
    _, spoiled = adapted(opt, problem, state, jax.tree.map(lambda g: g * jnp.nan, gradient), params)
    assert not spoiled.accepted
    for new, old in zip(jax.tree.leaves(spoiled.inner), jax.tree.leaves(state.inner), strict=True):
        np.testing.assert_array_equal(new, old)


def test_around_a_partition_the_ratio_is_of_all_that_moved(problem):
    """One part takes a natural step with its own Fisher, the other a gradient step; the ratio is for both together."""
    params, x, y, gradient, fisher, dense = problem
    labels = {"hidden": "natural", "out": "sgd"}
    inner = optax.partition({"natural": jf.natural_gradient(1.0, 0.25), "sgd": optax.sgd(0.1)}, labels)
    opt = jf.adapt_damping(inner, 0.25)
    value_fn = lambda new: loss(new, x, y)  # noqa: E731
    updates, state = jax.jit(lambda s: opt.update(gradient, s, params, fisher=fisher, value_fn=value_fn))(opt.init(params))
    g, k = flat(gradient), 16  # the hidden layer comes first in ravel order
    u = np.concatenate([-np.linalg.solve(dense[:k, :k] + 0.25 * np.eye(k), g[:k]), -0.1 * g[k:]])
    assert_close(flat(updates), u, factor=1e4)
    actual = loss(params, x, y) - loss(optax.apply_updates(params, updates), x, y)
    np.testing.assert_allclose(state.ratio, actual / -(g @ u + 0.5 * u @ dense @ u), rtol=1e-6)


@pytest.mark.parametrize("out", [False, [False, False]])
def test_inside_a_mask_the_loss_is_a_function_of_the_part(problem, out):
    """Ratio and halvings keep the other parameters at their values. A mask may leave out a whole subtree with one flag."""
    params, x, y, gradient, fisher, dense = problem
    mask, k = {"hidden": True, "out": out}, 16  # the hidden layer comes first in ravel order
    whole = lambda hidden: {"hidden": hidden, "out": params["out"]}  # noqa: E731
    given = {
        "fisher": fisher,
        "value_fn": lambda new: loss(new, x, y),
        "kl_fn": lambda new: jf.kl(classifier)(params, new, x),
        "all_params": params,
    }
    opt = optax.masked(jf.adapt_damping(jf.natural_gradient(1.0), 0.25), mask)
    updates, state = jax.jit(lambda s: opt.update(gradient, s, params, **given))(opt.init(params))
    g, F = flat(gradient["hidden"]), dense[:k, :k]
    u = -np.linalg.solve(F + 0.25 * np.eye(k), g)
    assert_close(flat(updates["hidden"]), u, factor=1e4)
    assert_close(flat(updates["out"]), flat(gradient["out"]), factor=0)
    actual = loss(params, x, y) - loss(whole(optax.apply_updates(params["hidden"], updates["hidden"])), x, y)
    np.testing.assert_allclose(state.inner_state.ratio, actual / -(g @ u + 0.5 * u @ F @ u), rtol=1e-6)
    opt = optax.masked(jf.backtrack_kl(1e-2, max_halvings=30), mask)
    long = jax.tree.map(lambda leaf: -64.0 * leaf, gradient)
    updates, state = jax.jit(lambda s: opt.update(long, s, params, **given))(opt.init(params))
    halvings = state.inner_state.halvings
    assert 0 < halvings < 30 and state.inner_state.accepted
    assert_close(flat(updates["hidden"]), flat(long["hidden"]) * 0.5**halvings)
    moved = [
        divergence(params, whole(jax.tree.map(lambda p, u, m=m: p + m * u, params["hidden"], updates["hidden"])), x)
        for m in (1, 2)
    ]
    np.testing.assert_allclose(state.inner_state.moved, moved[0], rtol=1e-5)
    assert moved[0] <= 1e-2 < moved[1]


@pytest.mark.parametrize("name", ["adapt_damping", "backtrack_kl"])
def test_inside_a_mask_what_looks_at_the_loss_says_where_it_belongs(name, problem):
    params, x, y, gradient, fisher, _ = problem
    opt = {"adapt_damping": jf.adapt_damping(optax.sgd(0.1), 0.1), "backtrack_kl": jf.backtrack_kl(0.1)}[name]
    masked = optax.masked(opt, {"hidden": True, "out": False})
    given = {"fisher": fisher, "value_fn": lambda new: loss(new, x, y), "kl_fn": lambda new: jf.kl(classifier)(params, new, x)}
    with pytest.raises(
        ValueError,
        match=f"{name}: inside optax.masked.*a part of.*all_params=params.*adapt_damping around.*backtrack_kl behind",
    ):
        masked.update(gradient, masked.init(params), params, **given)


# --- quadratic_model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("unit", [1e-25, 1e-15, 1.0, 1e15, 1e25])
def test_rates_do_not_depend_on_the_units_of_the_parameters(unit, damping):
    """In float32, with directions whose squares are outside its range, against the minimum in double precision."""
    rng = np.random.default_rng(0)
    x, d, v, g = (rng.standard_normal(shape) for shape in ((6, 4), (4,), (4,), (4,)))
    damping = damping if abs(np.log10(unit)) < 20 else 0.0  # beyond, it would itself leave the range
    fisher = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(4, jnp.float32), jnp.asarray(x / unit, jnp.float32))
    opt = jf.quadratic_model(damping / unit**2)
    state = opt.init(jnp.zeros(4, jnp.float32))._replace(step=jnp.asarray(v * unit, jnp.float32))
    given = {"fisher": fisher, "grad": jnp.asarray(g / unit, jnp.float32)}
    step, after = opt.update(jnp.asarray(d * unit, jnp.float32), state, **given)
    along = np.stack([-d, v], axis=1)
    curvature = along.T @ (x.T @ x / 6 + damping * np.eye(4)) @ along
    rates = -np.linalg.solve(curvature, along.T @ g)
    np.testing.assert_allclose([after.learning_rate, after.momentum], rates, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(step, float) / unit, along @ rates, rtol=1e-4)
    promised = g @ along @ rates + np.square(x @ along @ rates).mean() / 2
    np.testing.assert_allclose(after.change, promised, rtol=1e-4)


def test_rates_minimise_the_quadratic_model(problem):
    params, _, _, gradient, fisher, dense = problem
    opt = optax.chain(jf.scale_by_fisher(0.1, view=jf.diagonal), jf.quadratic_model(0.02))
    step = jax.jit(lambda g, s: opt.update(g, s, params, fisher=fisher, grad=g))
    state, last, matrix = opt.init(params), np.zeros(31), dense + 0.02 * np.eye(31)
    for k in range(3):
        g = jax.tree.map(lambda leaf, k=k: leaf * np.cos(k + np.arange(leaf.size).reshape(leaf.shape)), gradient)
        updates, state = step(g, state)
        d = flat(g) / (np.diag(dense) + 0.1)
        plane = np.stack([-d, last], axis=1)[:, : 1 + (k > 0)]
        rates = np.linalg.solve(plane.T @ matrix @ plane, -plane.T @ flat(g))
        last = plane @ rates
        assert_close(flat(updates), last, factor=1e5)
        assert_close(optax.tree.get(state, "learning_rate"), rates[0], factor=1e5)
        assert_close(optax.tree.get(state, "momentum"), rates[1] if k else 0.0, factor=1e5)
        assert_close(optax.tree.get(state, "change"), flat(g) @ last + 0.5 * last @ dense @ last, factor=1e5)


def test_a_direction_along_the_last_step_is_taken_alone(problem):
    """Rates are not unique for two parallel directions, so only the first is used. A direction of zeros has the rate zero."""
    params, _, _, gradient, fisher, dense = problem
    opt = jf.quadratic_model(0.02)
    step = jax.jit(lambda d, s: opt.update(d, s, params, fisher=fisher, grad=gradient))
    first, state = step(gradient, opt.init(params))
    again, state = step(jax.tree.map(lambda leaf: -3 * leaf, gradient), state)
    g = flat(gradient)
    assert_close(flat(first), -g * (g @ g) / (g @ (dense + 0.02 * np.eye(31)) @ g), factor=1e5)
    assert_close(flat(again), flat(first), factor=1e5)
    assert state.momentum == 0
    last, state = step(jax.tree.map(jnp.zeros_like, gradient), state)
    assert_close(flat(last), flat(first), factor=1e5)
    assert state.learning_rate == 0


def test_after_an_exact_direction_the_rate_is_one(problem):
    """If the view is F itself, the direction leads to the minimum of the model: the rate is one and the momentum zero."""
    params, _, _, gradient, fisher, _ = problem
    opt = optax.chain(jf.scale_by_fisher(0.1), jf.quadratic_model(0.1))
    step = jax.jit(lambda g, s: opt.update(g, s, params, fisher=fisher, grad=g))
    state = opt.init(params)
    for scale in (1.0, 2.0):
        g = jax.tree.map(lambda leaf, scale=scale: leaf + scale * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), gradient)
        _, state = step(g, state)
        np.testing.assert_allclose(optax.tree.get(state, "learning_rate"), 1.0, rtol=1e-9)
        np.testing.assert_allclose(optax.tree.get(state, "momentum"), 0.0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_a_step_whose_model_is_not_due_has_the_length_of_the_last_one(size, apart):
    """A step without a new model has at most the last one's length, at any size in float32 and if its parts nearly cancel."""
    eps, rng = np.finfo(np.float32).eps, np.random.default_rng(0)
    v = {name: np.float32(size * rng.normal(size=shape)) for name, shape in (("w", (5, 4)), ("b", (4,)))}
    d = {name: np.float32(leaf * (1 + apart * rng.normal(size=leaf.shape))) for name, leaf in v.items()}
    opt, rate = jf.quadratic_model(0.0), np.float32(0.7)
    begin = opt.init(jax.tree.map(jnp.asarray, v))._replace(step=v, learning_rate=rate, momentum=rate)
    expected = np.float64(rate) * (flat(v).astype(np.float64) - flat(d).astype(np.float64))
    length, parts = np.linalg.norm(expected), rate * np.linalg.norm(flat(d).astype(np.float64))
    for most in (length / 4, 4 * length):
        state = begin._replace(length=jnp.float32(most))
        step, after = opt.update(d, state, fisher=jf.scaled_identity(d, 1.0), grad=d, due=jnp.asarray(False))
        off = flat(step).astype(np.float64) - expected * min(1, most / length)
        assert np.linalg.norm(off) <= 8 * eps * parts * min(1, most / length)
        assert after.length == state.length


# --- missing and wrong arguments ---------------------------------------------------------------------------------------------


def unit():
    """An operator over two parameters."""
    return jf.scaled_identity(jnp.ones(2), 1.0)


@pytest.mark.parametrize(
    ("make", "given", "match"),
    [
        (lambda: jf.backtrack_kl(1.0), {"value_fn": jnp.sum}, "backtrack_kl: `update` needs `kl_fn`"),
        (lambda: jf.backtrack_kl(1.0), {"kl_fn": jnp.sum}, "backtrack_kl: `update` needs `value_fn`"),
        (lambda: jf.adapt_damping(optax.sgd(1.0), 1.0), {}, "adapt_damping: `update` needs `value_fn`"),
        (lambda: jf.adapt_damping(optax.sgd(1.0), 1.0), {"value_fn": jnp.sum}, "adapt_damping: `update` needs the curvature"),
        (lambda: jf.natural_gradient(1.0), {"fisher": unit}, "scale_by_fisher: .* without a `damping`.*jf.adapt_damping"),
        (lambda: jf.quadratic_model(), {"fisher": unit, "grad": jnp.ones(2)}, "quadratic_model: .* without a `damping`"),
        (lambda: jf.quadratic_model(1.0), {}, "quadratic_model: `update` needs `grad`"),
        (lambda: jf.quadratic_model(1.0), {"grad": jnp.ones(2)}, "quadratic_model: `update` needs the curvature"),
    ],
)
def test_what_an_update_lacks_is_named(make, given, match):
    opt = make()
    with pytest.raises(ValueError, match=match):
        opt.update(jnp.ones(2), opt.init(jnp.ones(2)), jnp.ones(2), **given)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: jf.backtrack_kl(-1.0), ValueError, "`radius` is -1.0"),
        (lambda: jf.backtrack_kl(1.0, max_halvings=-1), ValueError, "`max_halvings` is -1"),
        (lambda: jf.adapt_damping("sgd", 1.0), TypeError, "`inner` is 'sgd'; expected a gradient transformation"),
        (lambda: jf.adapt_damping(optax.sgd(1.0), -1.0), ValueError, "`damping` is -1.0"),
        (lambda: jf.adapt_damping(optax.sgd(1.0), 1.0, factor=0.5), ValueError, "factor 0.5.*expected factor > 1"),
        (lambda: jf.adapt_damping(optax.sgd(1.0), jnp.ones(()), factor=np.float32(0.5)), ValueError, "expected factor > 1"),
        (
            lambda: jf.adapt_damping(optax.sgd(1.0), jnp.ones(()), lower_damping=2.0, upper_damping=0.5),
            ValueError,
            "lower_damping 2.0, upper_damping 0.5; expected",
        ),
        (
            lambda: jf.adapt_damping(optax.sgd(1.0), 1.0, lower_damping=2.0),
            ValueError,
            "lower_damping 2.0.*lower_damping <= damping",
        ),
        (lambda: jf.quadratic_model(-1.0), ValueError, "`damping` is -1.0"),
        (lambda: jf.scale_by_fisher(1.0, momentum=1.0), ValueError, r"`momentum` is 1.0; expected a number in \[0, 1\)"),
        (lambda: jf.scale_by_fisher(1.0, momentum=0.5, power=0.5), ValueError, "`momentum` is given with power=0.5"),
        (lambda: jf.scale_by_fisher(1.0, solver=jf.CG(), power=0.5), ValueError, "`solver` is given with power=0.5"),
        (lambda: jf.scale_by_fisher(1.0, update_every=0), ValueError, "`update_every` is 0"),
        (lambda: jf.scale_by_fisher(1.0, update_every=1.5), ValueError, "`update_every` is 1.5"),
    ],
)
def test_wrong_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_parameters_are_needed():
    for opt, given in ((jf.backtrack_kl(1.0), {}), (jf.adapt_damping(optax.sgd(1.0), 1.0), {"value_fn": jnp.sum})):
        with pytest.raises(ValueError, match="params"):
            opt.update(jnp.ones(2), opt.init(jnp.ones(2)), **given)
