"""`training_step` works with every optimiser of Optax and passes each the keywords that it needs."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from problems import classifier, reference
from problems import mean_loss as loss

import jaxfisher as jf

pytestmark = pytest.mark.relaxed  # Optax adds integers to floats

OTHERS = {
    "optax.lbfgs": lambda: optax.lbfgs(),
    "optax.chain with a backtracking line search": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    ),
    "optax.polyak_sgd": lambda: optax.polyak_sgd(1.0),
    "optax.contrib.dog": lambda: optax.contrib.dog(1.0),
    "optax.contrib.sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "optax.contrib.sam, opaque": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
    "optax.contrib.schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "optax.contrib.schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(0.1),
    "optax.contrib.mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "optax.contrib.momo": lambda: optax.contrib.momo(0.1),
    "optax.chain with reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "adapt_damping of a line search": lambda: jf.adapt_damping(
        optax.chain(jf.natural_gradient(1.0, 0.1), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)), 0.1
    ),
    "jf.natural_gradient and a line search": lambda: optax.chain(
        jf.natural_gradient(1.0, 0.1), optax.scale_by_zoom_linesearch(max_linesearch_steps=5)
    ),
}
"""How to make the optimisers whose first argument is not a learning rate."""
NEEDED = {"noisy_sgd": {"eta": 0.01, "gamma": 0.55, "key": 0}, "optimistic_adam": {"optimism": 0.1}}
"""Further arguments that some optimisers require."""
OF_EXAMPLES = {"dpsgd"}
"""The optimisers that take one gradient per example."""


def with_a_rate():
    """The names of all functions of Optax that make an optimiser from a learning rate."""
    found = {}
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            if name.startswith(("_", "scale_by")) or name in OF_EXAMPLES:
                continue
            parameters = inspect.signature(make).parameters
            if next(iter(parameters), None) != "learning_rate":
                continue
            found[f"{module.__name__}.{name}"] = lambda make=make, name=name: make(learning_rate=0.05, **NEEDED.get(name, {}))
    return found


OPTIMISERS = with_a_rate() | OTHERS


def test_the_optimisers_are_found():
    assert {"optax.adam", "optax.lamb", "optax.contrib.muon", "optax.contrib.sophia"} <= set(OPTIMISERS)
    assert len(OPTIMISERS) > 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Explicitly requested dtype")
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_of_optax_runs(name):
    """An abstract evaluation, which finds missing and unknown keywords; the shapes of the state must not change."""
    params, x, y, _, _ = reference()
    opt = OPTIMISERS[name]()
    state = jax.eval_shape(opt.init, params)
    new, after, value = jax.eval_shape(jf.training_step(classifier, opt), params, state, x, y)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert value.shape == ()


@pytest.mark.usefixtures("in_numpy")
@pytest.mark.parametrize(
    "name", ["optax.lbfgs", "optax.contrib.sam, opaque", "optax.contrib.sophia", "jf.natural_gradient and a line search"]
)
def test_those_that_evaluate_the_loss_lower_it(name):
    params, x, y, _, _ = reference()
    opt = OPTIMISERS[name]()
    step, state, start = jax.jit(jf.training_step(classifier, opt)), opt.init(params), loss(params, x, y)
    for _ in range(5):
        params, state, _ = step(params, state, x, y)
    assert loss(params, x, y) < start


@pytest.mark.usefixtures("in_numpy")
def test_lbfgs_is_the_one_written_by_hand():
    params, x, y, _, _ = reference()
    opt = optax.lbfgs()
    new, _, value = jax.jit(jf.training_step(classifier, opt))(params, opt.init(params), x, y)

    @jax.jit
    def by_hand(params):
        of = lambda p: loss(p, x, y)  # noqa: E731
        value, grads = jax.value_and_grad(of)(params)
        updates, _ = opt.update(grads, opt.init(params), params, value=value, grad=grads, value_fn=of)
        return optax.apply_updates(params, updates), value

    expected, first = by_hand(params)
    np.testing.assert_allclose(value, first, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), new, expected)


# --- ours inside wrappers that pass no keywords on ---------------------------------------------------------------------------

OURS = {
    "kfac": lambda: jf.kfac(),
    "natural_gradient": lambda: jf.natural_gradient(1.0, 0.1, view=jf.kronecker, decay=0.9, update_every=2, radius=0.1),
    "quadratic_model": lambda: optax.chain(jf.scale_by_fisher(0.1), jf.quadratic_model(0.1)),
    "adapt_damping": lambda: jf.adapt_damping(jf.natural_gradient(1.0), 0.1),
    "backtrack_kl": lambda: optax.chain(jf.natural_gradient(1.0, 0.1), jf.backtrack_kl(0.1)),
    "levenberg_marquardt": lambda: jf.levenberg_marquardt(
        optax.chain(jf.scale_by_fisher(), optax.scale(-1.0), jf.geodesic_acceleration()), 0.1
    ),
}


def deaf(opt):
    """The optimiser with the type of a transformation without keywords, as wrappers call it."""
    return optax.GradientTransformation(opt.init, lambda updates, state, params=None: opt.update(updates, state, params))


DEAF = {
    "alone": deaf,
    "in a chain": lambda opt: optax.chain(optax.identity(), deaf(opt)),
    "in a partition": lambda opt: optax.partition({"all": deaf(opt)}, lambda params: jax.tree.map(lambda _: "all", params)),
    "MultiSteps in a chain": lambda opt: optax.chain(optax.MultiSteps(opt, 1).gradient_transformation(), optax.identity()),
    "of a split": lambda opt: optax.contrib.split_real_and_imaginary(opt),
    "of an opaque sam": lambda opt: optax.contrib.sam(opt, optax.set_to_zero(), opaque_mode=True),
    "inside adapt_damping": lambda opt: jf.adapt_damping(deaf(opt), 0.1),
}


def trained(opt, params, steps=3):
    """The parameters after some steps in NumPy."""
    _, x, y, _, _ = reference()
    step = jf.training_step(classifier, opt)
    state, step = step.init(params, x, y), jax.jit(step)
    for _ in range(steps):
        params, state, _ = step(params, state, x, y)
    return params


@pytest.mark.usefixtures("in_numpy")
@pytest.mark.parametrize(("wrapper", "name"), list(zip(DEAF, itertools.cycle(OURS))))
def test_a_wrapper_that_drops_keywords_changes_nothing(wrapper, name):
    params, *_ = reference()
    inside = wrapper.startswith("inside")
    expected = trained(jf.adapt_damping(OURS[name](), 0.1) if inside else OURS[name](), params)
    found = trained(DEAF[wrapper](OURS[name]()), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


@pytest.mark.usefixtures("in_numpy")
def test_lookahead_is_the_one_written_by_hand():
    """Two fast steps, and then the slow parameters go half the way to the fast ones, which begin again there."""
    params, x, y, _, _ = reference()
    found = trained(optax.lookahead(jf.kfac(), sync_period=2, slow_step_size=0.5), optax.LookaheadParams.init_synced(params), 4)
    step = jf.training_step(classifier, jf.kfac())
    state, step, slow = step.init(params, x, y), jax.jit(step), params
    for _ in range(2):
        for _ in range(2):
            params, state, _ = step(params, state, x, y)
        slow = params = jax.tree.map(lambda slow, fast: slow + 0.5 * (fast - slow), slow, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, optax.LookaheadParams(slow, slow))


@pytest.mark.parametrize(
    ("opt", "error", "words"),
    [
        (optax.lookahead(jf.kfac(), 2, 0.5), TypeError, "optax.lookahead.*LookaheadParams.init_synced"),
        (optax.flatten(jf.natural_gradient(1.0, 0.1)), ValueError, "structure.*optax.flatten"),
    ],
    ids=["lookahead of plain parameters", "flatten"],
)
def test_a_wrapper_that_cannot_be_is_named(opt, error, words):
    params, x, y, _, _ = reference()
    step = jf.training_step(classifier, opt)
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda: step(params, step.init(params, x, y), x, y))
