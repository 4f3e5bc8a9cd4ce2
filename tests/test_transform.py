"""The transformations for Optax: against dense solves, against Optax's RMSProp, and inside each of Optax's wrappers."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, reference
from problems import mean_loss as loss
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")  # the protocol and whole loops of each optimiser are compiled

LOG_PROB = jf.log_likelihood(classifier)


@pytest.fixture(scope="module")
def problem():
    """``(params, gradient, exact Fisher, the same dense)``."""
    params, x, y, _, _ = reference()
    gradient, fisher = evaluated(lambda *at: (jax.grad(loss)(*at), jf.exact_fisher(classifier)(*at[:2])), params, x, y)
    return params, gradient, fisher, class_sum_fisher(params, x)


def one_update(opt, problem, **given):
    params, gradient, fisher, _ = problem
    return traced(lambda g, s, p, f: opt.update(g, s, p, fisher=f, **given))(gradient, opt.init(params), params, fisher)


def damped(dense, gradient, damping=0.1):
    return np.linalg.solve(dense + damping * np.eye(len(dense)), flat(gradient))


# --- what it computes ------------------------------------------------------------------------------------------------------


def test_the_direction_is_the_dense_solve(problem):
    _, gradient, _, dense = problem
    updates, state = one_update(jf.scale_by_fisher(0.1), problem)
    assert_close(flat(updates), damped(dense, gradient), factor=1e4)
    assert flat(updates) @ flat(gradient) > 0, "not negated"
    assert state.count == 1 and state.info.converged and state.info.rank == 31


def test_a_function_that_makes_the_fisher(problem):
    params, gradient, fisher, dense = problem
    opt = jf.scale_by_fisher(0.1)
    updates, _ = evaluated(lambda s, f: opt.update(gradient, s, params, fisher=lambda: f), opt.init(params), fisher)
    assert_close(flat(updates), damped(dense, gradient), factor=1e4)


def test_a_schedule_of_damping_follows_the_count(problem):
    params, gradient, fisher, dense = problem
    opt = jf.scale_by_fisher(lambda count: 0.1 * (count + 1).astype(float))
    state = opt.init(params)
    step = traced(lambda s: opt.update(gradient, s, params, fisher=fisher))
    for damping in (0.1, 0.2, 0.3):
        updates, state = step(state)
        assert_close(flat(updates), damped(dense, gradient, damping), factor=1e4)
    constant = jf.scale_by_fisher(optax.constant_schedule(0.1))
    assert_close(flat(one_update(constant, problem)[0]), flat(one_update(jf.scale_by_fisher(0.1), problem)[0]), factor=0)


@pytest.mark.parametrize("power", [0.5, 0.25, 2.0])
def test_powers(problem, power):
    _, gradient, _, dense = problem
    values, vectors = np.linalg.eigh(dense)
    g = flat(gradient)
    for view in (None, jf.dense):
        updates, _ = one_update(jf.scale_by_fisher(0.1, view=view, power=power), problem)
        assert_close(flat(updates), vectors @ ((values + 0.1) ** -power * (vectors.T @ g)), factor=1e5)
    updates, _ = one_update(jf.scale_by_fisher(0.1, view=jf.diagonal, power=power), problem)
    assert_close(flat(updates), g * (np.diag(dense) + 0.1) ** -power)


@pytest.mark.relaxed
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_batches_of_one_are_rmsprop(dtype):
    """With one example per batch the diagonal of the empirical Fisher is the squared gradient, as in `optax.scale_by_rms`.

    In both the running mean is debiased, and the damping (Optax's eps, inside the root) is added before the power is taken.
    """
    params, x, y, _, _ = reference()
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    ours = jf.scale_by_fisher(damping=1e-3, view=jf.diagonal, power=0.5, decay=0.9)
    theirs = optax.scale_by_rms(0.9, eps=1e-3, eps_in_sqrt=True, bias_correction=True)

    @traced
    def both(ours_state, theirs_state, x, y):
        gradient = jax.grad(loss)(params, x, y)
        fisher = jf.empirical_fisher(LOG_PROB)(params, x, y)
        a, ours_state = ours.update(gradient, ours_state, params, fisher=fisher)
        b, theirs_state = theirs.update(gradient, theirs_state, params)
        return a, b, ours_state, theirs_state

    ours_state, theirs_state = ours.init(params), theirs.init(params)
    for i in range(6):
        a, b, ours_state, theirs_state = both(ours_state, theirs_state, x[i : i + 1], y[i : i + 1])
        assert_close(flat(a), flat(b), factor=20)


@pytest.mark.relaxed
def test_larger_batches_are_not():
    """With larger batches the two differ, since the square of a mean is not the mean of squares.

    With n independent scores of mean zero, the expected mean of squares is n times the expected square of the mean. At these
    seven examples the ratio of the updates must be the one computed from the scores of the loop.
    """
    params, x, y, _, rows = reference()
    of_squares, of_mean = np.mean(rows**2, axis=0), np.mean(rows, axis=0) ** 2
    ours = jf.scale_by_fisher(damping=0.0, view=jf.diagonal, power=0.5, decay=0.9)
    theirs = optax.scale_by_rms(0.9, eps=0.0, eps_in_sqrt=True, bias_correction=True)

    def both(params, x, y):
        fisher, gradient = jf.empirical_fisher(LOG_PROB)(params, x, y), jax.grad(loss)(params, x, y)
        of_squares, _ = ours.update(gradient, ours.init(params), params, fisher=fisher)
        return of_squares, theirs.update(gradient, theirs.init(params), params)[0]

    a, b = evaluated(both, params, x, y)
    ratio = np.abs(flat(b) / flat(a))
    assert_close(ratio, np.sqrt(of_squares / of_mean), factor=1e4)
    assert np.median(ratio) > 1.5


@pytest.mark.parametrize("share", [1.5, 1.0, -0.5])
@pytest.mark.parametrize("name", ["decay", "momentum"])
def test_a_share_of_the_past_that_turns_out_to_be_none_is_nan(name, share, problem):
    """An array may be on a device, or unknown until the program runs, so its value is not checked: the updates are NaN."""
    params, gradient, fisher, _ = problem
    opt = jf.scale_by_fisher(0.1, view=jf.diagonal, **{name: jnp.asarray(share)})
    updates, _ = traced(lambda: opt.update(gradient, opt.init(params), params, fisher=fisher))()
    assert np.all(np.isnan(flat(updates)))


@pytest.mark.parametrize("view", [jf.dense, jf.diagonal])
def test_the_running_mean_is_a_debiased_average_of_views(problem, view):
    params, gradient, fisher, dense = problem
    opt = jf.scale_by_fisher(0.1, view=view, decay=0.8)
    state = opt.init(params)
    step = traced(lambda s, f: opt.update(gradient, s, params, fisher=f))
    scales = [1.0, 3.0, 0.5]
    for t, scale in enumerate(scales, start=1):
        updates, state = step(state, scale * fisher)
        weights = np.array([0.2 * 0.8 ** (t - k) for k in range(1, t + 1)]) / (1 - 0.8**t)
        mean = np.dot(weights, scales[:t]) * (dense if view is jf.dense else np.diag(np.diag(dense)))
        assert_close(flat(updates), damped(mean, gradient), factor=1e4)


def test_the_running_mean_of_factors_is_the_kronecker_view_of_their_means(problem):
    """The average of KFAC: each factor is averaged, not their product."""
    params, gradient, fisher, _ = problem
    opt = jf.scale_by_fisher(0.1, view=jf.kronecker, decay=0.8, like=like)
    state = opt.init(params)
    step = traced(lambda s, f: opt.update(gradient, s, params, fisher=f))
    blocks = traced(jf.kronecker)(fisher).form.blocks
    for t, scale in enumerate((1.0, 3.0), start=1):
        updates, state = step(state, scale * fisher)
        weights = np.array([0.2 * 0.8 ** (t - k) for k in range(1, t + 1)]) / (1 - 0.8**t)
        # The scale of a multiple of a Fisher is in the outputs' factor.
        mean = np.dot(weights, [1.0, 3.0][:t])
        expected = [np.linalg.inv(mean * np.asarray(block.as_matrix()) + 0.1 * np.eye(block.spec.size)) for block in blocks]
        parts = [flat([gradient["hidden"]["b"], gradient["hidden"]["w"]]), flat(gradient["out"])]
        assert_close(flat(updates), np.concatenate([a @ g for a, g in zip(expected, parts, strict=True)]), factor=1e4)


@pytest.mark.parametrize("view", [None, jf.dense, jf.kronecker])
def test_in_between_refreshes_the_fisher_is_not_made(problem, view):
    params, gradient, _, _ = problem
    _, x, _, _, _ = reference()
    opt = jf.scale_by_fisher(0.1, view=view, update_every=3, like=like)
    state = opt.init(params)

    def step(scale, state):
        return opt.update(gradient, state, params, fisher=lambda: jf.exact_fisher(classifier)(params, scale * x))

    def counted(jaxpr):
        """How often the model's tanh occurs outside branches, and whether it occurs in each branch."""
        outside = str([eqn for eqn in jaxpr.eqns if eqn.primitive.name != "cond"]).count("tanh")
        branches = [eqn.params["branches"] for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
        return outside, [[str(branch).count("tanh") > 0 for branch in some] for some in branches]

    outside, branches = counted(jax.make_jaxpr(step)(1.0, state).jaxpr)
    assert outside == 0
    assert branches[0] == [False, True]
    assert not any(map(any, branches[1:]))

    made = traced(step)
    whole = {
        None: lambda f: f.as_matrix(),
        jf.dense: lambda f: f.as_matrix(),
        jf.kronecker: lambda f: jf.kronecker(f).as_matrix(),
    }
    at = traced(lambda scale: whole[view](jf.exact_fisher(classifier)(params, scale * x)))
    for count, scale in enumerate((1.0, 2.0, 0.3, 1.5, 4.0)):
        updates, state = made(scale, state)
        used = np.asarray(at(1.0 if count < 3 else 1.5))
        assert_close(flat(updates), damped(used, gradient), factor=1e5)


def test_in_between_refreshes_factors_can_be_damped(problem):
    """Between refreshes the factors are held as eigendecompositions, with which factored damping gives the same solution."""
    params, gradient, fisher, _ = problem
    opt = jf.scale_by_fisher(0.1, view=jf.kronecker, solver=jf.factored_solve, update_every=2, like=like)
    step = traced(lambda c, s: opt.update(gradient, s, params, fisher=c * fisher))
    state = opt.init(params)
    for given, used in ((1.0, 1.0), (5.0, 1.0), (3.0, 3.0)):
        updates, state = step(given, state)
        expected = evaluated(lambda used: jf.factored_solve(jf.kronecker(used * fisher), gradient, 0.1)[0], used)
        assert_close(flat(updates), flat(expected), factor=1e4)


def test_momentum_is_spring(problem):
    """Momentum is SPRING: against its formula in the space of examples, in NumPy, from the scores of the loop."""
    params, _, _, _ = problem
    _, x, y, _, rows = reference()
    fisher = jf.empirical_fisher(LOG_PROB)(params, x, y)
    n, mu, damping = len(rows), 0.9, 1e-3
    scores = rows / np.sqrt(n)
    gradient = params_like(-rows.mean(0), params)
    opt = jf.scale_by_fisher(damping, momentum=mu)
    state, previous = opt.init(params), np.zeros(31)
    step = traced(lambda s: opt.update(gradient, s, params, fisher=fisher))
    for _ in range(4):
        updates, state = step(state)
        e = -np.ones(n) / np.sqrt(n)
        inside = np.linalg.solve(scores @ scores.T + damping * np.eye(n), e - mu * scores @ previous)
        previous = scores.T @ inside + mu * previous
        assert_close(flat(updates), previous, factor=1e6)


def params_like(vector, params):
    return jax.flatten_util.ravel_pytree(params)[1](jnp.asarray(vector))


def test_an_iterative_solver_preconditioned_by_a_view(problem):
    _, gradient, _, dense = problem
    solver = jf.CG(rtol=1e-11, preconditioner=jf.kronecker)
    updates, state = one_update(jf.scale_by_fisher(0.1, solver=solver), problem)
    np.testing.assert_allclose(flat(updates), damped(dense, gradient), rtol=1e-8)
    assert 0 < state.info.iterations < 31


def test_a_damping_given_at_the_update_is_the_one(problem):
    _, gradient, _, dense = problem
    updates, _ = one_update(jf.scale_by_fisher(0.1), problem, damping=2.0)
    assert_close(flat(updates), damped(dense, gradient, 2.0), factor=1e4)


def test_a_fisher_unlike_the_one_promised_is_named(problem):
    params, gradient, fisher, _ = problem
    opt = jf.scale_by_fisher(0.1, update_every=2, like=fisher)
    with pytest.raises(ValueError, match=r"holds arrays of shapes .* the state has .* from `like`"):
        opt.update(gradient, opt.init(params), fisher=fisher + fisher)
    with pytest.raises(TypeError, match="kronecker") as caught:
        jf.scale_by_fisher(0.1, view=jf.kronecker, decay=0.9).init(params)
    assert any("`like`" in note for note in caught.value.__notes__)


def test_scale_to_kl_caps_the_quadratic_form(problem):
    params, gradient, fisher, dense = problem
    g = flat(gradient)
    for radius in (1e-6, 1e-2, 1e3):
        updates, _ = one_update(jf.scale_to_kl(radius), problem)
        moved = 0.5 * g @ dense @ g
        assert_close(flat(updates), g * min(1.0, np.sqrt(radius / moved)), factor=1e3)
    zero, _ = jf.scale_to_kl(0.1).update(jax.tree.map(jnp.zeros_like, params), optax.EmptyState(), fisher=fisher)
    assert np.all(flat(zero) == 0)
    none, _ = one_update(jf.scale_to_kl(0.0), problem)
    assert np.all(flat(none) == 0)
    spoiled, _ = jf.scale_to_kl(0.1).update(
        jax.tree.map(lambda leaf: leaf * jnp.nan, gradient), optax.EmptyState(), fisher=fisher
    )
    assert np.all(np.isnan(flat(spoiled)))


def test_the_ready_made_chain(problem):
    _, gradient, _, dense = problem
    updates, _ = one_update(jf.natural_gradient(0.5, 0.1, radius=1e-3), problem)
    d = -0.5 * damped(dense, gradient)
    assert_close(flat(updates), d * min(1.0, np.sqrt(1e-3 / (0.5 * d @ dense @ d))), factor=1e4)
    free, _ = one_update(jf.natural_gradient(optax.constant_schedule(0.5), 0.1), problem)
    assert_close(flat(free), d, factor=1e4)


def test_it_solves_a_linear_regression_in_one_step():
    """For a linear Gaussian model one undamped step of rate one (Fisher scoring) is the least-squares fit of NumPy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    y = x @ np.arange(4.0) + 0.1 * rng.normal(size=30)
    model = lambda w, x: jf.Normal(x @ w, 0.3)  # noqa: E731
    log_prob = jf.log_likelihood(model)
    opt = jf.natural_gradient(1.0, 0.0)

    def step(w):
        gradient = jax.grad(lambda w: -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(w, x, y)))(w)
        return opt.update(gradient, opt.init(w), fisher=jf.exact_fisher(model)(w, x))[0]

    assert_close(evaluated(step, jnp.zeros(4)), np.linalg.lstsq(x, y)[0], factor=1e4)


# --- with Optax's wrappers -------------------------------------------------------------------------------------------------


def like():
    params, x, *_ = reference()
    return jf.exact_fisher(classifier)(params, x)


def backtracking(learning_rate, radius):
    return optax.chain(jf.natural_gradient(learning_rate, 0.1), jf.backtrack_kl(radius))


def adaptive(damping, factor, lower_ratio, upper_ratio, lower_damping, upper_damping):
    bounds = {"lower_damping": lower_damping, "upper_damping": upper_damping}
    ratios = {"lower_ratio": lower_ratio, "upper_ratio": upper_ratio}
    return jf.adapt_damping(jf.natural_gradient(1.0), damping, factor=factor, **ratios, **bounds)


def bent(damping, max_ratio):
    steps = optax.chain(jf.scale_by_fisher(), optax.scale_by_learning_rate(1.0), jf.geodesic_acceleration(max_ratio=max_ratio))
    return jf.levenberg_marquardt(steps, damping)


def modelled(damping):
    return optax.chain(jf.scale_by_fisher(damping, view=jf.diagonal), jf.quadratic_model(damping))


OPTIMISERS = {
    "scale_by_fisher": (jf.scale_by_fisher, {}, {"damping": (0.1, 10.0)}),
    "diagonal with decay": (
        jf.scale_by_fisher,
        {"view": jf.diagonal},
        {"damping": (0.1, 10.0), "power": (0.5, 0.75), "decay": (0.9, 0.5)},
    ),
    "dense with decay": (jf.scale_by_fisher, {"view": jf.dense}, {"damping": (0.1, 10.0), "decay": (0.9, 0.5)}),
    "kronecker at times": (
        jf.scale_by_fisher,
        {"view": jf.kronecker, "like": like},
        {"damping": (0.1, 10.0), "decay": (0.9, 0.5), "update_every": (2, 1)},
    ),
    "spring": (jf.scale_by_fisher, {}, {"damping": (0.1, 10.0), "momentum": (0.9, 0.5)}),
    "scale_to_kl": (jf.scale_to_kl, {}, {"radius": (1e-3, 1e-5)}),
    "natural_gradient": (
        jf.natural_gradient,
        {},
        {"learning_rate": (0.5, 0.1), "damping": (0.1, 10.0), "radius": (1e-2, 1e-5)},
    ),
    "backtrack_kl": (backtracking, {}, {"learning_rate": (4.0, 2.0), "radius": (1e-2, 1e-5)}),
    "adapt_damping": (
        adaptive,
        {},
        {
            "damping": (0.1, 0.2),
            "factor": (2.0, 3.0),
            "lower_ratio": (0.25, 0.9),
            "upper_ratio": (0.75, 0.99),
            "lower_damping": (1e-8, 0.15),
            "upper_damping": (1e8, 2.0),
        },
    ),
    "levenberg_marquardt": (bent, {}, {"damping": (0.1, 0.2), "max_ratio": (10.0, 1e-3)}),
    "quadratic_model": (modelled, {}, {"damping": (0.1, 10.0)}),
    "kfac": (jf.kfac, {"like": like}, {"damping": (0.1, 0.2), "decay": (0.9, 0.5), "update_every": (2, 1)}),
}
"""For each optimiser: its function, the arguments that are not numbers, and two values for each number."""
every = pytest.mark.parametrize("name", OPTIMISERS)


@functools.cache
def built(name, which=0):
    make, kept, numbers = OPTIMISERS[name]
    return make(**kept, **{number: values[which] for number, values in numbers.items()})


def update_of(opt):
    """The update of an optimiser with every keyword that any of `OPTIMISERS` reads; the others must ignore it."""
    _, x, y, _, _ = reference()

    def step(g, s, p, f, mean):
        inputs = x.astype(p["hidden"]["w"].dtype)
        given = {"value_fn": lambda new: loss(new, inputs, y), "kl_fn": lambda new: jf.kl(classifier)(p, new, inputs)}
        given["acceleration_fn"] = lambda d: jf.acceleration(classifier)(p, d, inputs)
        return opt.update(g, s, p, fisher=f, grad=mean, something_else=1, **given)

    return step


@functools.cache
def stepping(opt):
    """`update_of` run in NumPy. `test_scan_equals_a_loop_and_traces_once` compares the compiled update with it."""
    return traced(update_of(opt))


def updated(opt, state, problem, mean=None, by=stepping):
    """One update; ``mean`` is the gradient that is passed as ``grad=`` if it is not the problem's."""
    params, gradient, fisher, *_ = problem
    return by(opt)(gradient, state, params, fisher, gradient if mean is None else mean)


@pytest.mark.compiled
@every
def test_the_protocol(name, problem):
    """Extra arguments are ignored, structures and dtypes stay, inputs are not donated, and equal inputs give equal bits."""
    params, gradient, _, _ = problem
    opt = built(name)
    assert isinstance(opt, optax.GradientTransformationExtraArgs)
    state = opt.init(params)
    compiled = jax.jit(update_of(opt))
    updates, after = updated(opt, state, problem, by=lambda _: compiled)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradient)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal(updated(opt, state, problem, by=lambda _: compiled), (updates, after))
    jax.lax.cond(True, lambda: after, lambda: state)
    assert np.all(np.isfinite(flat(gradient)))
    optax.tree.map_params(opt, lambda leaf: leaf, after)


@pytest.mark.compiled
@every
def test_scan_equals_a_loop_and_traces_once(name, problem):
    params, gradient, fisher, _ = problem
    opt = built(name)
    traces = []

    def step(carry, scale):
        traces.append(1)
        given = jax.tree.map(lambda g: scale * g, gradient)
        updates, state = updated(opt, carry[1], (carry[0], given, fisher), by=update_of)
        return (optax.apply_updates(carry[0], updates), state), optax.tree.norm(updates)

    scales = jnp.array([1.0, -0.5, 2.0])
    start = (params, opt.init(params))
    scanned, _ = evaluated(lambda start: jax.lax.scan(step, start, scales), start)
    traces.clear()
    # No two leaves of the state may share an array, since both are donated.
    given = jax.tree.map(jnp.copy, params)
    jitted, carry = jax.jit(step, donate_argnums=0), (given, opt.init(given))
    for scale in scales:
        carry, _ = jitted(carry, scale)
    assert len(traces) == 1
    chex.assert_trees_all_close(scanned[0], carry[0], rtol=1e-9)


@every
def test_parameters_in_any_dtype(name, problem):
    params, gradient, _, _ = problem
    _, x, _, _, _ = reference()
    opt = built(name)
    expected = flat(updated(opt, opt.init(params), problem)[0])
    for dtype in (jnp.bfloat16, jnp.float32):
        narrow_params, narrow = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), (params, gradient))
        fisher = jf.exact_fisher(classifier)(narrow_params, x.astype(dtype))
        updates, _ = updated(opt, opt.init(narrow_params), (narrow_params, narrow, fisher))
        chex.assert_trees_all_equal_dtypes(updates, narrow_params)
        error = np.linalg.norm(flat(updates).astype(float) - expected) / np.linalg.norm(expected)
        assert error < 200 * float(jnp.finfo(dtype).eps)


@every
def test_inject_hyperparams(name, problem):
    """`optax.inject_hyperparams` makes every number a traced array, which can be changed between steps."""
    params, gradient, fisher, *rest = problem
    other = (params, gradient, 2.0 * fisher, *rest)
    make, kept, numbers = OPTIMISERS[name]
    static = [name for name in ("view", "solver", "like") if name in inspect.signature(make).parameters]
    injected = optax.inject_hyperparams(make, static_args=static)(**kept, **{k: v[0] for k, v in numbers.items()})
    state = injected.init(params)
    assert set(state.hyperparams) >= set(numbers)
    # Hyperparameters have float32 precision, and residuals are rounding errors.
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-15)  # noqa: E731
    updates, state = updated(injected, state, problem)
    first, after = updated(built(name), built(name).init(params), problem)
    close((updates, state.inner_state), (first, after))
    state.hyperparams.update({k: jnp.asarray(v[1], state.hyperparams[k].dtype) for k, v in numbers.items()})
    updates, state = updated(injected, state, other)
    second = updated(built(name, 1), after, other)
    close((updates, state.inner_state), second)
    unlike = jax.tree.map(lambda a, b: jnp.any(a != b), second, updated(built(name), after, other))
    assert any(jax.tree.leaves(unlike)), "the other numbers matter"


@pytest.mark.relaxed
@every
def test_multi_steps(name, problem):
    """Two gradients are accumulated to their mean; a mini-step without an update leaves the inner state unchanged."""
    params, gradient, fisher, _ = problem
    opt = optax.MultiSteps(built(name), every_k_schedule=2)
    start = opt.init(params)
    # Optax does not accumulate `grad=`. Only `quadratic_model` reads it, so it is given the mean.
    mean = gradient if name == "quadratic_model" else None
    updates, state = updated(opt, start, (params, jax.tree.map(lambda g: 2 * g, gradient), fisher), mean)
    assert np.all(flat(updates) == 0)
    chex.assert_trees_all_equal(state.inner_opt_state, start.inner_opt_state)
    updates, state = updated(opt, state, (params, jax.tree.map(jnp.zeros_like, gradient), fisher), mean)
    expected, after = updated(built(name), built(name).init(params), problem)
    # MultiSteps accumulates in float32.
    chex.assert_trees_all_close((updates, state.inner_opt_state), (expected, after), rtol=1e-5, atol=1e-6)


PARTS = {"hidden": True, "out": [False, False]}


@pytest.mark.parametrize("form", ["scores", "streamed", "implicit", "dense", "diagonal", "sum"])
def test_masked_and_partition_solve_with_the_sub_fisher(form, problem):
    params, gradient, fisher, dense = problem
    _, x, _, _, _ = reference()
    fisher = {
        "scores": fisher,
        "streamed": jf.exact_fisher(classifier, batch_size=3)(params, x),
        "implicit": jf.implicit_fisher(classifier)(params, x),
        "dense": jf.dense(fisher),
        "diagonal": jf.diagonal(fisher),
        "sum": fisher + jf.diagonal(fisher),
    }[form]
    whole = {"diagonal": np.diag(np.diag(dense)), "sum": dense + np.diag(np.diag(dense))}.get(form, dense)
    k = 16  # the hidden layer comes first in ravel order
    expected = damped(whole[:k, :k], gradient["hidden"])
    labels = {"hidden": "natural", "out": ["sgd", "sgd"]}
    for opt in (
        optax.masked(jf.scale_by_fisher(0.1), PARTS),
        optax.partition({"natural": jf.scale_by_fisher(0.1), "sgd": optax.sgd(0.1)}, labels),
        optax.partition({"natural": jf.scale_by_fisher(0.1), "sgd": optax.sgd(0.1)}, lambda params: labels),
    ):
        updates, _ = one_update(opt, (params, gradient, fisher, None))
        assert_close(flat(updates["hidden"]), expected, factor=1e4)
    assert_close(flat(updates["out"]), -0.1 * flat(gradient["out"]))


@every
def test_a_part_is_stepped_as_if_the_rest_were_data(name):
    """An optimiser in a partition whose rest is frozen takes the steps that it takes on a model of that part alone."""
    make, kept, numbers = OPTIMISERS[name]
    opt = make(
        **{key: value for key, value in kept.items() if key != "like"}, **{key: pair[0] for key, pair in numbers.items()}
    )
    params, x, y, _, _ = reference()
    parted = optax.partition({"ours": opt, "rest": optax.set_to_zero()}, {"hidden": "ours", "out": "rest"})

    def stepped(model, opt, params, x, y):
        step = jf.training_step(model, opt)
        state = step.init(params, x, y)
        for _ in range(2):
            params, state, value = step(params, state, x, y)
        return params, value

    of_part = lambda part, x: classifier(params | {"hidden": part}, x)  # noqa: E731
    found, value = evaluated(lambda p, x, y: stepped(classifier, parted, p, x, y), params, x, y)
    part, expected = evaluated(lambda p, x, y: stepped(of_part, opt, p, x, y), params["hidden"], x, y)
    chex.assert_trees_all_close((found["hidden"], value), (part, expected), rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_equal(found["out"], params["out"])
    assert np.max(np.abs(flat(part) - flat(params["hidden"]))) > 1e-6


def test_empty_groups_and_none_leaves_pass(problem):
    params, gradient, fisher, _ = problem
    nothing = jax.tree.map(lambda _: False, params)
    for opt in (jf.scale_by_fisher(0.1), jf.scale_by_fisher(0.1, view=jf.diagonal, decay=0.5), jf.scale_to_kl(1.0)):
        updates, _ = one_update(optax.masked(opt, nothing), problem)
        chex.assert_trees_all_equal(updates, gradient)
    with_none = {"w": jnp.ones(2), "absent": None}
    fisher = jf.exact_fisher(lambda p: jf.Normal(p["w"], 2.0))(with_none)
    updates, _ = one_update(jf.scale_by_fisher(0.0), (with_none, with_none, fisher, None))
    assert updates["absent"] is None
    assert_close(updates["w"], [4.0, 4.0])


def test_in_a_chain_with_clipping_decay_and_schedules(problem):
    params, gradient, fisher, dense = problem
    opt = optax.chain(
        optax.clip_by_global_norm(1e-2),
        jf.scale_by_fisher(0.1),
        optax.add_decayed_weights(1e-3),
        optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 4)),
    )
    updates, state = one_update(opt, problem)
    g = flat(gradient) * 1e-2 / np.linalg.norm(flat(gradient))
    assert_close(flat(updates), -(np.linalg.solve(dense + 0.1 * np.eye(31), g) + 1e-3 * flat(params)), factor=1e4)
    updates, _ = traced(lambda s: opt.update(gradient, s, params, fisher=fisher))(state)
    assert_close(flat(updates), -0.75 * (np.linalg.solve(dense + 0.1 * np.eye(31), g) + 1e-3 * flat(params)), factor=1e4)
    named = optax.named_chain(("fisher", jf.scale_by_fisher(0.1)), ("rate", optax.scale_by_learning_rate(1.0)))
    assert optax.tree.get(one_update(named, problem)[1], "info").converged


def test_apply_if_finite_keeps_the_parameters_safe(problem):
    """Around the chain it rejects the gradient of a bad batch; after `scale_by_fisher`, the result of a bad Fisher."""
    params, gradient, fisher, _ = problem
    _, x, y, _, _ = reference()
    bad_x = x.at[0].set(jnp.nan)
    bad_gradient, bad_fisher = evaluated(
        lambda x: (jax.grad(loss)(params, x, y), jf.exact_fisher(classifier)(params, x)), bad_x
    )
    around = optax.apply_if_finite(jf.natural_gradient(1.0, 0.1), max_consecutive_errors=3)
    behind = optax.chain(jf.scale_by_fisher(0.1), optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=3))
    for opt, spoiled in ((around, bad_gradient), (behind, gradient)):
        start = opt.init(params)
        updates, after = one_update(opt, (params, spoiled, bad_fisher, None))
        assert np.all(flat(updates) == 0) and optax.tree.get(after, "total_notfinite") == 1
        if opt is around:
            chex.assert_trees_all_equal(after.inner_state, start.inner_state)
        assert np.any(flat(one_update(opt, (params, gradient, fisher, None))[0]) != 0)


def test_a_line_search_after_it(problem):
    """Optax's zoom search passes all keywords on to its value function, so a wrapper drops those that it does not take."""
    params, gradient, _, dense = problem
    _, x, y, _, _ = reference()
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=10)

    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        del extra
        return search.update(updates, state, params, value=value, grad=grad, value_fn=value_fn)

    opt = optax.chain(jf.scale_by_fisher(0.1), optax.scale(-1.0), optax.GradientTransformationExtraArgs(search.init, update))
    value_fn = lambda params: loss(params, x, y)  # noqa: E731
    updates, _ = one_update(opt, problem, value=value_fn(params), grad=gradient, value_fn=value_fn)
    assert value_fn(optax.apply_updates(params, updates)) < value_fn(params)
    d = damped(dense, gradient)
    assert abs(flat(updates) @ d) / np.linalg.norm(flat(updates)) / np.linalg.norm(d) > 1 - 1e-9


def test_vmap_over_members_equals_each(problem):
    params, gradient, _, _ = problem
    _, x, _, _, _ = reference()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf - 0.2]), params)
    opt = jf.natural_gradient(0.5, 0.1, radius=1e-2)

    def step(params):
        return opt.update(gradient, opt.init(params), params, fisher=jf.exact_fisher(classifier)(params, x))[0]

    together = traced(jax.vmap(step))(stacked)
    for i in range(2):
        alone = traced(step)(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        assert_close(flat(jax.tree.map(lambda leaf, i=i: leaf[i], together)), flat(alone), factor=1e5)


def test_a_meta_gradient_through_steps(problem):
    """The derivative of the loss after two steps by the damping, against central differences."""
    params, *_ = problem
    _, x, y, _, _ = reference()

    def whole(damping):
        opt = jf.natural_gradient(0.5, damping)
        p, state = params, opt.init(params)
        for _ in range(2):
            fisher = jf.exact_fisher(classifier)(p, x)
            updates, state = opt.update(jax.grad(loss)(p, x, y), state, p, fisher=fisher)
            p = optax.apply_updates(p, updates)
        return loss(p, x, y)

    after, h = traced(whole), 1e-5
    np.testing.assert_allclose(traced(jax.grad(whole))(0.3), (after(0.3 + h) - after(0.3 - h)) / (2 * h), rtol=1e-6)


def test_state_round_trips_through_its_leaves(problem):
    params, gradient, fisher, _ = problem
    opt = jf.scale_by_fisher(0.1, view=jf.dense, decay=0.9)
    step = traced(lambda s: opt.update(gradient, s, params, fisher=fisher))
    _, state = step(opt.init(params))
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(opt.init(params)), saved)
    chex.assert_trees_all_equal(step(restored), step(state))
