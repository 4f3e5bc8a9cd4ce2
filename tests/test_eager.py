"""Calls outside ``jit``, as in a notebook: a second call compiles nothing and leaves nothing in memory.

With finite data no call computes a NaN (as a mark for "not computed") or an infinity (for "more than any other"), since
`jax_debug_nans` and `jax_debug_infs` would stop there.

JAX compiles a program when it is about to run one that is not in its cache. Most tests run in NumPy, where such events are
counted without compiling. The methods of one form of operator, and jobs with long loops, are compiled.
"""

import contextlib
import functools
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import (
    DISTRIBUTIONS,
    FISHERS,
    METHODS,
    NUMBERS,
    OPTIMISERS,
    OTHERS,
    SCORES,
    asked,
    fisher,
    key,
    model,
    problem,
    scores,
    stepped,
    vector,
)
from conftest import OPTIMISED
from flax import nnx
from programs import evaluate
from rooms import ROOMS

import jaxfisher as jf
from jaxfisher._examples import make_batch
from jaxfisher._readings import readings

COMPILED = []
"""One entry for each program that XLA has compiled since this module was read, or would have compiled."""


@jax.monitoring.register_event_duration_secs_listener
def listen(event, duration, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


KNOWN = weakref.WeakKeyDictionary()
"""The results of programs that run in NumPy, by their arguments, for as long as JAX would keep a compiled program."""


def watched(jaxpr, *arguments):
    """Do for a program that runs in NumPy what JAX does for one that it compiles: count it, and stop if the flags say so.

    The tests repeat calls, so the results of a program are cached by its numbers.
    """
    if jaxpr not in KNOWN:
        KNOWN[jaxpr] = {}
        COMPILED.append(0.0)
    given = tuple(map(digits, arguments))
    made = KNOWN[jaxpr].get(given) or evaluate.evaluate(jaxpr, *arguments)
    if not any(isinstance(value, jax.Array) for value in made):  # random keys, which would be kept alive
        KNOWN[jaxpr][given] = made
    numbers = [value for value in made if jnp.issubdtype(value.dtype, jnp.inexact)]
    for flag, is_bad in ((jax.config.jax_debug_nans, np.isnan), (jax.config.jax_debug_infs, np.isinf)):
        if flag and any(np.any(is_bad(value)) for value in numbers):
            raise FloatingPointError("in NumPy")
    return made


def digits(value):
    """The bytes of an argument of a program, or of the data of a random key."""
    value = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return np.asarray(value).tobytes()


@pytest.fixture
def in_numpy(request):
    """The fixture of `conftest` with `watched` in the place of `evaluate`."""
    compiled = OPTIMISED or request.node.get_closest_marker("compiled")
    with contextlib.nullcontext() if compiled else evaluate.in_numpy(watched):
        yield


pytestmark = pytest.mark.usefixtures("in_numpy")


CALLS = 2
"""How often a call is repeated after it was made twice."""


def found_in(calls):
    """The names of calls that `jax_debug_nans` or `jax_debug_infs` stops, the names of those that compile something after their
    second time, and how many more arrays are alive after all calls.

    The flags are on during the first call only. They do not change programs, so nothing is compiled twice for them.
    """
    stopped, guilty = [], []
    gc.freeze()  # the garbage collector need only look at objects that the calls make
    for name, call in calls.items():
        try:
            with jax.debug_nans(True), jax.debug_infs(True):
                jax.block_until_ready(call())
        except FloatingPointError:
            stopped.append(name)
        jax.block_until_ready(call())
    gc.collect()
    gc.freeze()
    alive = len(jax.live_arrays())
    for name, call in calls.items():
        compiled = len(COMPILED)
        for _ in range(CALLS):
            jax.block_until_ready(call())
            if len(COMPILED) > compiled:
                guilty.append(name)
                break
    gc.collect()
    return stopped, guilty, len(jax.live_arrays()) - alive


NOTHING = [], [], 0


@pytest.fixture(autouse=True, scope="module")
def apart():
    """Unfreeze the objects for the garbage collector after this module."""
    yield
    gc.unfreeze()


WAYS = [pytest.param(None, id="compiled", marks=pytest.mark.compiled), pytest.param(None, id="in NumPy")]


@pytest.mark.parametrize("_", WAYS)
def test_the_law_sees_what_is_compiled_what_is_kept_and_what_is_not_finite(_):
    kept = []
    calls = {
        "compiles": lambda: jax.lax.map(lambda x: x + 1, jnp.ones(2)),
        "keeps": lambda: kept.append(jnp.ones(2) + 1),
        "NaN": lambda: jnp.log(-jnp.ones(2)),
        "infinite": lambda: jnp.log(jnp.zeros(2)),
        "neither": lambda: jnp.ones(2) + 1,
    }
    assert found_in(calls) == (["NaN", "infinite"], ["compiles"], CALLS)


FORMS = [pytest.param("scores", marks=pytest.mark.compiled), "streamed", "sum", "Kronecker", "low rank"]


@pytest.mark.parametrize("form", FORMS)
def test_methods_of_operators_are_compiled_once(form):
    made = fisher(form)
    assert found_in({name: lambda call=call: call(made) for name, call in METHODS.items()}) == NOTHING


def test_scores_are_compiled_once():
    calls = {f"{name} of {size}": lambda c=c, s=size: c(scores(s)) for name, c in SCORES.items() for size in (None, 2)}
    assert found_in(calls) == NOTHING


MAPPED = {"spread_solves"}
"""Calls that use `jax.shard_map`, which NumPy cannot run."""


def test_fishers_and_views_are_compiled_once():
    calls = {name: lambda make=make: jax.tree.leaves(make()) for name, make in FISHERS.items() if name not in MAPPED}
    assert found_in(calls) == NOTHING


@pytest.mark.compiled
def test_what_is_mapped_over_devices_is_compiled_once():
    assert found_in({name: lambda name=name: jax.tree.leaves(FISHERS[name]()) for name in MAPPED}) == NOTHING


def test_functions_and_solvers_are_compiled_once():
    assert found_in({name: lambda call=call: jax.tree.leaves(call()) for name, call in NUMBERS.items()}) == NOTHING


def test_optimisers_are_compiled_once():
    assert found_in({name: lambda make=make: stepped(make()) for name, make in OPTIMISERS.items()}) == NOTHING


def test_distributions_are_compiled_once():
    assert found_in({name: lambda make=make: asked(make) for name, make in DISTRIBUTIONS.items()}) == NOTHING


def test_all_else_is_compiled_once():
    assert found_in({name: lambda call=call: jax.tree.leaves(call()) for name, call in OTHERS.items()}) == NOTHING


def test_jobs_are_compiled_once():
    assert found_in({name: lambda call=call: jax.tree.leaves(call()) for name, call in ROOMS.items()}) == NOTHING


@pytest.mark.compiled
def test_nothing_is_compiled_for_a_test_in_numpy():
    """Neither jitted nor eager nor mapped functions compile, and their results are JAX arrays."""
    x = jnp.array([0.5, -1.0, 2.0])
    compiled = len(COMPILED)
    with evaluate.in_numpy():
        found = jnp.sin(x) @ x, jax.jit(jnp.cumsum)(x), jax.vmap(jax.grad(jnp.square))(x)
    assert len(COMPILED) == compiled and all(isinstance(value, jax.Array) for value in found)
    for value, expected in zip(
        found, (0.5 * jnp.sin(0.5) + jnp.sin(1.0) + 2 * jnp.sin(2.0), [0.5, -0.5, 1.5], 2 * x), strict=True
    ):
        assert jnp.allclose(value, jnp.asarray(expected), rtol=1e-15)


@pytest.mark.compiled
def test_examples_are_weighted_in_one_program_and_counted_in_another():
    """Run eagerly, this would be thirty programs for each shape of the data, and ten more with counts."""
    params, x, y = problem()
    weights, counts = jnp.array([2.0, 0.0, 1.0]), jnp.array([4.0, 5.0, 1.0])
    compiled = len(COMPILED)
    made = make_batch(params, (x, y), weights, counts=counts)
    assert len(COMPILED) - compiled <= 2
    # 2/9 * 4 + 1/9 * 1 is one, and padding is replaced by the example with the largest weight.
    assert jnp.allclose(made.weights, jnp.array([2.0, 0.0, 1.0]) / 9) and made.mass == 9
    assert jnp.array_equal(made.data[0], x[jnp.array([0, 0, 2])])


class Net:
    """A model that is a method."""

    def predict(self, params, x):
        return model(params, x)


NET = Net()


class Unhashable:
    """A model that cannot be a key of a cache."""

    __hash__ = None

    def __call__(self, params, x):
        return model(params, x)


def test_a_program_is_found_by_the_users_function_whatever_is_around_it():
    params, *data = problem()
    calls = {
        "equal log-likelihoods": lambda: jf.natural_grad(jf.log_likelihood(model), damping=0.1)(params, *data),
        "a method": lambda: jax.tree.leaves(jf.exact_fisher(NET.predict)(params, data[0])),
    }
    assert found_in(calls) == NOTHING
    found, expected = (jf.exact_fisher(m)(params, data[0]).as_matrix() for m in (Unhashable(), model))
    assert jnp.array_equal(found, expected)


@pytest.mark.compiled
def test_programs_go_with_the_users_function():
    params, *data = problem()
    constant = jnp.ones(1000)

    def use():
        def fresh(params, x):
            return jf.Categorical(logits=model(params, x).logits * constant[0])

        log_prob = jf.log_likelihood(fresh)
        jf.natural_grad(log_prob, damping=0.1)(params, *data)
        jf.exact_fisher(fresh)(params, data[0]).solve(vector(), 0.1)
        jf.kl(fresh)(params, vector(), data[0])
        return weakref.ref(fresh)

    left = use()
    gc.collect()
    assert left() is None


SPREAD = 1.0


def spread():
    """A function that other functions read by name."""
    return SPREAD


def test_an_attribute_with_the_name_of_a_global_is_not_looked_up(monkeypatch):
    """Otherwise a program would be recompiled whenever that global is bound, as `loss` is at each step of a loop."""
    model = lambda mu, x: jf.Normal(mu * x.ndim, 1.0)  # noqa: E731
    call = lambda: jf.implicit_fisher(model)(0.0, INPUTS).quadratic(1.0)  # noqa: E731
    assert call() == call() == 1
    compiled = len(COMPILED)
    for value in (1.0, 2.0):
        monkeypatch.setitem(globals(), "ndim", value)
        call()
    assert len(COMPILED) == compiled


def of_scores(batch_size):
    """A number computed from scores, as a function of a model of a normal's mean."""
    return lambda model: jf.scores(jf.log_likelihood(model), batch_size=batch_size)(0.0, INPUTS, TARGETS).squared_norms()[0]


@jf.array_fields("mu")
class Predicting:
    mu: jax.Array
    model: jf.Model


information = jax.jit(lambda held: held.model(held.mu, INPUTS[0]).scale ** -2)
MADE, STREAMS = {}, {}
INPUTS, TARGETS = jnp.ones((2, 1)), jnp.array([1.0, 2.0])
WHAT_READS = {
    "exact": lambda model: jf.exact_fisher(model)(0.0, INPUTS).trace(),
    "exact, in pieces": lambda model: jf.exact_fisher(model, batch_size=1)(0.0, INPUTS).trace(),
    "exact, in pieces, solved": lambda model: jf.exact_fisher(model, batch_size=1)(0.0, INPUTS).solve(1.0, 0.1),
    "a view in pieces": lambda model: jf.diagonal(jf.exact_fisher(model, batch_size=1)(0.0, INPUTS)).trace(),
    "sampled, in pieces": lambda model: jf.sampled_fisher(model, batch_size=1)(0.0, key(), INPUTS).trace(),
    "implicit": lambda model: jf.implicit_fisher(model)(0.0, INPUTS).quadratic(1.0),
    "implicit, a product": lambda model: jf.implicit_fisher(model, batch_size=1)(0.0, INPUTS).mv(1.0),
    "scores": of_scores(None),
    "scores, in pieces": of_scores(1),
    "clipped": lambda model: jf.clipped_grad(jf.log_likelihood(model), 10.0, batch_size=1)(0.0, INPUTS, TARGETS)[0],
    "Gauss-Newton": lambda model: jf.gauss_newton(lambda mu, x: mu * x[0], lambda f, y: -model(f, jnp.ones(1)).log_prob(y))(
        0.0, INPUTS, TARGETS
    ).trace(),
    "of the KL": lambda model: jf.kl_hessian(model)(0.0, INPUTS).trace(),
    "observed": lambda model: jf.observed_information(jf.log_likelihood(model))(0.0, INPUTS, TARGETS).trace(),
    "a posterior": lambda model: jf.laplace(model, 0.0, INPUTS, TARGETS, prior=1.0).log_evidence(),
    "held by a class of the user's": lambda model: information(Predicting(jnp.ones(()), model)),
    "implicit, made before": lambda model: MADE.setdefault(model, jf.implicit_fisher(model)(0.0, INPUTS)).quadratic(1.0),
    "streamed": lambda model: STREAMS.setdefault(model, jf.accumulate(jf.exact_fisher(model), jf.diagonal))(
        0.0, [INPUTS[:1], INPUTS[1:]]
    ).trace(),
    "predicted": lambda model: jf.laplace(model, 0.0, INPUTS, TARGETS, prior=1.0).predictive(INPUTS).scale[0],
}


@pytest.mark.parametrize("name", WHAT_READS)
def test_a_name_bound_anew_is_seen(name, monkeypatch):
    """A global, a function that the model calls, and a closed-over variable, as when a cell of a notebook is run again.

    The results must be those of a new model with the changed value.
    """
    factor = 1.0
    models = {
        "global": lambda mu, x: jf.Normal(mu * x[0], SPREAD),
        "function": lambda mu, x: jf.Normal(mu * x[0], spread()),
        "closure": lambda mu, x: jf.Normal(mu * x[0], factor),
        "inner function": lambda mu, x: jax.checkpoint(lambda mu: jf.Normal(mu * x[0], SPREAD))(mu),
    }

    def held_to(**scales):
        for what, own in models.items():
            scale = scales.get(what, scales["others"])
            expected = WHAT_READS[name](lambda mu, x, scale=scale: jf.Normal(mu * x[0], scale))
            assert float(WHAT_READS[name](own)) == float(expected), (what, scale)

    held_to(others=1.0)
    monkeypatch.setitem(globals(), "SPREAD", 0.5)
    held_to(others=0.5, closure=1.0)
    factor = 0.5
    held_to(others=0.5)
    monkeypatch.setitem(globals(), "spread", lambda: 2.0)
    held_to(others=0.5, function=2.0)


class Scaled:
    """An object from which a model reads its scale, in every way that an object offers."""

    shared = 1.0

    def __init__(self):
        self.scale, self.inner = 1.0, Slotted()

    @property
    def asked(self):
        return self.scale

    def given(self):
        return self.scale

    @classmethod
    def of_class(cls):
        return cls.shared

    def predict(self, mu, x):
        return jf.Normal(mu * x[0], self.given())

    def __call__(self, mu, x):
        return jf.Normal(mu * x[0], self.scale)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class Layer(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))


def normal(scale):
    """A model with a scale that it looks up at each call."""
    return lambda mu, x: jf.Normal(mu * x[0], scale())


def function_of(value):
    return lambda: value


def of_an_object():
    """Ways to read a scale from an object that stays the same: for each a model, and a function that sets the scale."""
    thing, settings, others = Scaled(), types.ModuleType("settings"), types.SimpleNamespace(inner=Scaled())
    settings.scale = 1.0
    setting = lambda of, name="scale": lambda value: setattr(of, name, value)  # noqa: E731
    return {
        "attribute": (normal(lambda: thing.scale), setting(thing)),
        "attribute of an attribute": (normal(lambda: others.inner.inner.scale), setting(others.inner.inner)),
        "property": (normal(lambda: thing.asked), setting(thing)),
        "method": (thing.predict, setting(thing)),
        "callable object": (thing, setting(thing)),
        "attribute of a class": (normal(Scaled.of_class), setting(Scaled, "shared")),
        "attribute of a module": (normal(lambda: settings.scale), setting(settings)),
    }


def of_what_is_made():
    """Ways to read a scale from an object that is replaced, so that nothing keeps the old one alive."""
    cell, one, row, table = function_of(1.0), [1.0], [1.0], {"scale": function_of(1.0)}
    layer, notes = Layer(), []

    def bind(value):
        nonlocal cell
        cell = function_of(value)

    def bind_list(value):
        nonlocal one
        one = [value]

    def noting(mu, x):
        """A model that records in a list that it was traced; the growing list must not count as a change."""
        notes.append(x.shape)
        return jf.Normal(mu * x[0], cell())

    def decorated():
        scale = jax.custom_jvp(lambda mu: jnp.full_like(mu, cell()))
        scale.defjvp(lambda mu, tangent: (scale(*mu), jnp.zeros_like(*tangent)))
        return lambda mu, x: jf.Normal(mu * x[0], scale(mu))

    return {
        "function": (normal(lambda: cell()), bind),
        "list": (normal(lambda: one[0]), bind_list),
        "entry of a list": (normal(lambda: row[0]), lambda value: row.__setitem__(0, value)),
        "noting": (noting, bind),
        "default": (lambda mu, x, scale=lambda: cell(): jf.Normal(mu * x[0], scale()), bind),
        "partial": (normal(functools.partial(lambda scale: scale(), lambda: cell())), bind),
        "decorated": (decorated(), bind),
        "entry of a dictionary": (normal(lambda: table["scale"]()), lambda value: table.update(scale=function_of(value))),
        "leaf of a module of Flax": (normal(lambda: layer.scale[...]), lambda value: layer.scale.set_value(jnp.asarray(value))),
    }


@pytest.mark.parametrize("way", [*of_an_object(), *of_what_is_made()])
def test_what_a_model_reads_is_seen_when_it_changes(way, monkeypatch):
    """A change is noticed, whatever way leads to the value. If nothing has changed, a second call compiles nothing.

    The value is bound twice, since a new object may get the `id` of one that is gone.
    """
    monkeypatch.setattr(Scaled, "shared", 1.0)
    own, bind = (of_an_object() | of_what_is_made())[way]
    for scale in (1.0, 0.5, 4.0):
        bind(3.0)
        bind(scale)
        for name in ("exact", "exact, in pieces", "implicit", "scores", "predicted"):
            expected = WHAT_READS[name](lambda mu, x, scale=scale: jf.Normal(mu * x[0], scale))
            np.testing.assert_allclose(WHAT_READS[name](own), expected, rtol=1e-5, err_msg=name)
        compiled = len(COMPILED)
        WHAT_READS["exact"](own), WHAT_READS["implicit"](own)
        assert len(COMPILED) == compiled


TRACES = 0


def counting():
    """Models that count how often they were traced: in an attribute, in a variable of an outer function, in a global."""
    count = 0

    class Counted:
        calls, scale = 0, 1.0

        def __call__(self, mu, x):
            self.calls += 1
            scale = 0.0
            scale += self.scale  # a variable of the same name as the attribute is no count
            return jf.Normal(mu * x[0], scale)

    def in_a_closure(mu, x):
        nonlocal count
        count += 1
        return jf.Normal(mu * x[0], 1.0)

    def in_a_global(mu, x):
        global TRACES
        TRACES += 1
        return jf.Normal(mu * x[0], 1.0)

    return Counted(), in_a_closure, in_a_global


@pytest.mark.parametrize("which", range(3))
def test_a_model_that_counts_its_traces_is_compiled_once(which):
    model = counting()[which]
    run = lambda: [WHAT_READS[name](model) for name in ("exact", "scores")]  # noqa: E731
    expected = run()
    compiled = len(COMPILED)
    np.testing.assert_array_equal(run(), expected)
    assert len(COMPILED) == compiled
    if which == 0:
        model.scale = 0.5
        assert WHAT_READS["exact"](model) == 4 * expected[0]


@pytest.mark.parametrize(
    "kind", [list, tuple, set, lambda words: dict.fromkeys(words, 0)], ids=["list", "tuple", "set", "dict"]
)
def test_what_is_read_of_a_large_container_is_the_container(kind):
    """Comparing each word of a vocabulary would take a fifth of a second at each call."""
    words = kind(map(str, range(100_000)))

    def model(mu, x):
        return jf.Normal(mu * x[0], len(words) / 1e5)

    assert len(readings(model)) < 5
    ours = lambda: jf.exact_fisher(model)(2.0, jnp.ones((1, 1))).trace()  # noqa: E731
    np.testing.assert_allclose(ours(), 1.0, rtol=1e-6)
    words = kind(map(str, range(50_000)))
    np.testing.assert_allclose(ours(), 4.0, rtol=1e-6)
