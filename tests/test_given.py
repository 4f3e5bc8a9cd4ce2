"""Arguments of functions of examples beside the data: each of `ASKED` is accepted, or refused by an error that says what to do.

A grid, by abstract evaluation: every public function that maps a function of one example over data, with every argument that
other such functions accept, in either of the two calls.
"""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from problems import assert_close
from rooms import LOG_PROB, counts, slope
from test_surface import is_ours

import jaxfisher as jf
from jaxfisher import design, geometry, statistics

pytestmark = pytest.mark.usefixtures("in_numpy")

N = 4
PARAMS = {"level": 0.3, "slope": 0.2}
X, Y = np.arange(4.0), np.array([1.0, 0.0, 3.0, 2.0])
DATA = X, Y
FISHER = jf.exact_fisher(counts)(PARAMS, X)

MAPPED = {
    "statistics.aic": (lambda **o: statistics.aic(LOG_PROB, **o), (PARAMS, *DATA)),
    "statistics.dispersion": (lambda **o: statistics.dispersion(counts, **o), (PARAMS, *DATA)),
    "statistics.fit": (lambda **o: jf.fit(counts, max_steps=2, **o), (PARAMS, *DATA)),
    "statistics.leverages": (lambda **o: statistics.leverages(counts, **o), (PARAMS, X)),
    "statistics.likelihood_interval": (lambda **o: statistics.likelihood_interval(counts, slope, **o), (PARAMS, *DATA)),
    "statistics.meat": (lambda **o: statistics.meat(LOG_PROB, **o), (PARAMS, *DATA)),
    "statistics.score_interval": (lambda **o: statistics.score_interval(counts, slope, **o), (PARAMS, *DATA)),
    "statistics.tic": (lambda **o: statistics.tic(LOG_PROB, **o), (PARAMS, *DATA)),
    "geometry.christoffel": (lambda **o: geometry.christoffel(counts, **o), (PARAMS, X)),
    "geometry.exponential_map": (lambda **o: geometry.exponential_map(counts, steps=2, **o), (PARAMS, PARAMS, X)),
    "geometry.geodesic": (lambda **o: geometry.geodesic(counts, steps=2, **o), (PARAMS, PARAMS, X)),
    "geometry.log_jeffreys": (lambda **o: geometry.log_jeffreys(counts, **o), (PARAMS, X)),
    "geometry.natural_gradient_flow": (lambda **o: geometry.natural_gradient_flow(counts, 1.0, 2, **o), (PARAMS, *DATA)),
    "design.informations": (lambda **o: design.informations(counts, **o), (PARAMS, X)),
    "influence.influence": (lambda **o: jf.influence(LOG_PROB, FISHER, **o), (PARAMS, DATA, DATA, 0.1)),
    "influence.self_influence": (lambda **o: jf.self_influence(LOG_PROB, FISHER, **o), (PARAMS, DATA, 0.1)),
    "influence.tracin": (lambda **o: jf.tracin(LOG_PROB, **o), ([PARAMS], DATA, DATA)),
    "privacy.clipped_grad": (lambda **o: jf.clipped_grad(LOG_PROB, 1.0, **o), (PARAMS, *DATA)),
    "energy_gradient": (lambda **o: jf.energy_gradient(lambda p, x: p["level"] * x + p["slope"] * x**2, **o), (PARAMS, *DATA)),
}
"""Functions that make a function of examples, and the arguments of that function."""
OTHERS = {
    # Functions of operators, matrices and distributions, which were weighted when they were made.
    *("statistics.covariance", "statistics.standard_errors", "statistics.sandwich", "statistics.delta_method"),
    *("statistics.cramer_rao_bound", "statistics.wald_interval", "statistics.hc1", "statistics.hc2", "statistics.hc3"),
    *("geometry.distance", "geometry.covariance_distance", "geometry.mahalanobis_distance", "geometry.renyi_divergence"),
    *("geometry.alpha_divergence", "design.d_criterion", "design.a_criterion", "design.e_criterion"),
    *("design.optimal_weights", "design.exchange", "evidence.tune_prior", "continual.ewc_penalty", "continual.fisher_average"),
    *("forecasts.gaussian_fisher", "forecasts.gaussian_prior", "forecasts.conditional_errors", "forecasts.bias"),
    # Has weights of its own; a penalty, to which `fit` passes them; takes weights and a batch size in one call.
    *("statistics.cluster_factor", "statistics.firth", "posterior.laplace"),
}
ROOMS = ("continual", "design", "evidence", "forecasts", "geometry", "influence", "posterior", "privacy", "statistics")
WEIGHTS = np.array([1, 0, 1, 1])
ASKED = {"weights": WEIGHTS, "counts": np.array([2, 1, 1, 3]), "batch_size": 3}

TAKEN = {
    "weights": lambda name: not re.match(r"design|influence", name),
    "counts": lambda name: False,
    "batch_size": lambda name: False,
    "batch_size, of the maker": lambda name: not re.match(r"design|geometry", name),
}
"""The functions that accept each argument; a batch size may be passed in either of the two calls."""


def test_every_function_of_the_rooms_is_in_the_grid():
    """The public functions with an example of their use, in their own files."""
    found = {
        f"{room}.{name}"
        for room in ROOMS
        for name, value in vars(importlib.import_module(f"jaxfisher.{room}")).items()
        if inspect.isfunction(value) and value.__module__.startswith(f"jaxfisher.{room}") and ">>>" in (value.__doc__ or "")
    }
    assert found == {name for name in MAPPED if "." in name} | OTHERS


def evaluated(function, args, keywords):
    """Evaluate a call on shapes only, except for iterables and keywords, whose values are known."""

    def run(params):
        return function([params] if isinstance(args[0], list) else params, *args[1:], **keywords)

    return jax.eval_shape(run, PARAMS)


def test_what_is_taken_is_taken_together():
    for name, (make, args) in MAPPED.items():
        of_maker = {"batch_size": 3} if TAKEN["batch_size, of the maker"](name) else {}
        keywords = {argument: value for argument, value in ASKED.items() if TAKEN[argument](name)}
        evaluated(make(**of_maker), args, keywords)


def test_pieces_of_examples_on_explicit_axes():
    """An axis of a mesh is then a part of the examples' types, and JAX refuses some operations on them outside our programs."""
    mesh = AbstractMesh((N,), ("examples",), axis_types=(AxisType.Explicit,))
    place = NamedSharding(mesh, PartitionSpec("examples"))
    for name in ("aic", "dispersion", "leverages", "meat"):
        make, (params, *data) = MAPPED[f"statistics.{name}"]
        shapes = [jax.ShapeDtypeStruct(array.shape, jnp.result_type(float), sharding=place) for array in (WEIGHTS, *data)]

        def run(weights, *data, name=name, of=make(batch_size=3), params=params):  # noqa: B008
            beside = {"factors": weights} if name == "meat" else {}
            return jax.tree.leaves(of(params, *data, weights=weights, **beside))

        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(run, *shapes)


@pytest.mark.parametrize("given", TAKEN)
def test_what_is_not_taken_is_refused_by_name(given):
    argument, *of_maker = given.split(", ")
    asked = {argument: ASKED[argument]}
    for name, (make, args) in MAPPED.items():
        if TAKEN[given](name):
            continue
        with pytest.raises(TypeError) as raised:
            evaluated(make(**asked), args, {}) if of_maker else evaluated(make(), args, asked)
        maker, said = name.split(".")[-1], str(raised.value)
        if of_maker:  # Python's own error about an option that a function does not have
            assert f"{maker}() got an unexpected keyword argument '{argument}'" in said
        else:
            expected = rf"{maker}: `{argument}` is .*; expected (none: .*\.|it with the function and not with the data: .*\.)"
            assert is_ours(raised.value) and re.fullmatch(expected, said), said


def test_none_is_not_given():
    function = jf.clipped_grad(LOG_PROB, 1.0)
    evaluated(function, (PARAMS, *DATA), dict.fromkeys(ASKED))


def test_pieces_change_no_number():
    """Four observations, three at a time; the intervals use the loss and the Fisher of a fit."""
    weights = np.array([1.0, 0.5, 2.0, 0.0])
    moved = {"level": 0.5, "slope": 0.1}

    @jax.jit
    def numbers(params, x, y):
        def in_pieces(size):
            given = {"batch_size": size}
            return (
                statistics.aic(LOG_PROB, **given)(params, x, y, weights=weights),
                statistics.tic(LOG_PROB, **given)(params, x, y, weights=weights),
                statistics.dispersion(counts, **given)(params, x, y, weights=weights),
                statistics.leverages(counts, **given)(params, x, weights=weights),
                statistics.meat(LOG_PROB, **given)(params, x, y, weights=weights, groups=jnp.array([0, 0, 1, 1])).as_matrix(),
                jf.kl_hessian(counts, **given)(params, x, weights=weights).as_matrix(),
                jax.value_and_grad(jf.kl(counts, **given), argnums=1)(params, moved, x, weights=weights),
            )

        return in_pieces(None), in_pieces(3)

    jax.tree.map(assert_close, *numbers(PARAMS, *DATA))


def unseen(p, x):
    """A model whose derivatives miss the effect of the parameter at negative inputs."""
    return jf.Normal(p * jnp.maximum(x, 0) + jax.lax.stop_gradient(p) * jnp.minimum(x, 0), 1.0)


@pytest.mark.parametrize("given", [{}, {"weights": [1.0, 2.0, 0.0]}, {"weights": np.array([1, 0, 3]), "counts": [2, 1, 4]}])
def test_a_verdict_is_of_the_examples_that_count(given):
    """A fault at one example fails the check if the example has a weight, and does not matter if it is padding."""
    check = jf.check_fisher(unseen, num_directions=1, num_samples=3072)
    places, padding = np.array([1.0, 0.5, 2.0]), np.asarray(given.get("weights", [1, 1, 1])) == 0
    given = {name: jnp.asarray(value) for name, value in given.items()}
    assert check(0.7, jax.random.key(0), jnp.where(padding, jnp.nan, places), **given).passed
    assert check(0.7, jax.random.key(0), jnp.where(padding, -places, places), **given).passed
    assert not check(0.7, jax.random.key(0), jnp.where(padding, places, -places), **given).passed


def test_draws_are_weighted_as_the_fisher_is():
    """With equal weights the Fisher would be twice as large."""
    places, weights = jnp.array([0.1, 3.0]), jnp.array([3.0, 1.0])
    verdict = jf.check_fisher(unseen, num_directions=1)(0.7, jax.random.key(1), places, weights=weights)
    (square,) = (check for check in verdict.checks if "^2]" in check.name)
    assert verdict.passed and square.tolerance < 0.5


def test_a_fit_in_pieces():
    whole, cut = (jf.fit(counts, batch_size=size)(PARAMS, *DATA) for size in (None, 3))
    assert whole.converged and cut.converged and cut.iterations == whole.iterations
    jax.tree.map(assert_close, cut.params, whole.params)
    assert_close(cut.fisher.as_matrix(), whole.fisher.as_matrix())
    assert_close(cut.log_likelihood, whole.log_likelihood)


@pytest.mark.parametrize("name", ["statistics.fit", "geometry.christoffel"])
def test_nothing_is_filled_in_where_no_weights_are(name):
    """An example is looked up to replace padding; if the weights are constants, XLA would do that while compiling."""
    make, args = MAPPED[name]

    def program(**keywords):
        return str(jax.make_jaxpr(lambda params: jax.tree.leaves(make()(params, *args[1:], **keywords)))(PARAMS))

    assert "argmax" in program(weights=WEIGHTS) and "argmax" not in program()
