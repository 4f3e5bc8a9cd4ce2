"""Called outside ``jit``, as a notebook does: a second call compiles nothing and keeps nothing."""

import functools
import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import pytest

import jaxfisher as jf

COMPILED = []
"""One entry for each program that XLA has compiled since this module was read."""


@jax.monitoring.register_event_duration_secs_listener
def listen(event, duration, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


CALLS = 20
"""How often what has been called twice is called again."""


def left_by(calls):
    """The names of calls after the second of which something is compiled; and how many more arrays are alive after all."""
    for call in calls.values():
        for _ in range(2):
            jax.block_until_ready(call())
    gc.collect()
    alive, guilty = len(jax.live_arrays()), []
    for name, call in calls.items():
        compiled = len(COMPILED)
        for _ in range(CALLS):
            jax.block_until_ready(call())
            if len(COMPILED) > compiled:
                guilty.append(name)
                break
    gc.collect()
    return guilty, len(jax.live_arrays()) - alive


def test_the_law_sees_what_is_compiled_and_what_is_kept():
    kept = []
    calls = {
        "compiles": lambda: jax.lax.map(lambda x: x + 1, jnp.ones(2)),
        "keeps": lambda: kept.append(jnp.ones(2) + 1),
        "neither": lambda: jnp.ones(2) + 1,
    }
    assert left_by(calls) == (["compiles"], CALLS)


def model(params, x):
    """A softmax over one layer."""
    return jf.Categorical(logits=x @ params["w"] + params["b"])


LOG_PROB = jf.log_likelihood(model)


@functools.cache
def problem():
    """Parameters, six of them, three examples, and a vector."""
    params = {"w": jnp.array([[0.5, -0.3], [0.2, 0.7]]), "b": jnp.array([0.1, -0.2])}
    return params, jnp.array([[0.3, 1.0], [-0.7, 0.4], [1.2, -0.5]]), jnp.array([0, 1, 1])


def vector():
    return jax.tree.map(lambda leaf: leaf + 1, problem()[0])


def loss(params):
    _, x, y = problem()
    return -jnp.mean(jax.vmap(LOG_PROB, (None, 0, 0))(params, x, y))


def exact(params, x, y=None):
    del y
    return jf.exact_fisher(model)(params, x)


@functools.cache
def fisher(form="scores"):
    params, x, y = problem()
    make = {
        "scores": lambda: jf.empirical_fisher(LOG_PROB)(params, x, y),
        "exact": lambda: jf.exact_fisher(model)(params, x),
        "streamed": lambda: jf.empirical_fisher(LOG_PROB, batch_size=2)(params, x, y),
        "sum": lambda: jf.dense(fisher()) + jf.implicit_fisher(model, batch_size=2)(params, x),
        "Kronecker": lambda: jf.kronecker(fisher()),
        "low rank": lambda: jf.low_rank(fisher(), 2),
    }
    return make[form]()


METHODS = {
    "mv": lambda F: F.mv(vector()),
    "quadratic": lambda F: F.quadratic(vector()),
    "solve": lambda F: F.solve(vector(), 0.1),
    "solve_with_info": lambda F: F.solve_with_info(vector(), 0.1),
    "power_mv": lambda F: F.power_mv(vector(), 0.3, 0.1),
    "sqrt_mv": lambda F: F.sqrt_mv(vector(), 0.1),
    "inv_sqrt_mv": lambda F: F.inv_sqrt_mv(vector(), 0.1),
    "as_matrix": lambda F: F.as_matrix(),
    "diagonal": lambda F: F.diagonal(),
    "trace": lambda F: F.trace(),
    "eigvalsh": lambda F: F.eigvalsh(),
    "logdet": lambda F: F.logdet(0.1),
    "frobenius_norm": lambda F: F.frobenius_norm(),
    "rank": lambda F: F.rank(),
    "null_space": lambda F: F.null_space(),
    "factorised": lambda F: jax.tree.leaves(F.factorised()),
}
PARTS = {
    *(
        "along",
        "dampings",
        "inverse",
        "inverses",
        "linearised",
        "pieces",
        "report",
        "rescaled",
        "restrict",
        "root_size",
        "rows",
        "with_arrays",
    ),
}
"""Methods for use inside a program: they check, choose among what is held, or return functions."""


@pytest.mark.parametrize("form", ["scores", "streamed", "sum", "Kronecker", "low rank"])
def test_methods_of_operators_are_compiled_once(form):
    made = fisher(form)
    assert left_by({name: lambda call=call: call(made) for name, call in METHODS.items()}) == ([], 0)


def test_every_method_of_an_operator_is_called_here():
    public = {name for name, _ in inspect.getmembers(jf.Operator, inspect.isfunction) if not name.startswith("_")}
    assert public == {*METHODS, *PARTS}


def natural(*args, **options):
    params, *data = problem()
    return jf.natural_grad(LOG_PROB, *args, damping=0.1, **options)(params, *data)


def stepped(opt):
    """The second update of an optimiser, as far as it goes."""
    params = problem()[0]
    given = {"value_fn": loss, "kl_fn": lambda new: jf.kl(model)(params, new, problem()[1]), "grad": vector()}
    state = opt.init(params)
    for _ in range(2):
        updates, state = opt.update(vector(), state, params, fisher=fisher("exact"), **given)
    return updates, state


SCORES = {
    "mv": lambda s: s.mv(vector()),
    "rmv": lambda s: s.rmv(s.weights),
    "gram": lambda s: s.gram(),
    "squared_norms": lambda s: s.squared_norms(),
    "diagonal": lambda s: s.diagonal(),
    "second_moment": lambda s: s.second_moment(),
    "as_matrix": lambda s: s.as_matrix(),
}


@functools.cache
def scores(batch_size=None):
    params, *data = problem()
    return jf.scores(LOG_PROB, batch_size=batch_size)(params, *data)


FISHERS = {
    "empirical_fisher": lambda: jf.empirical_fisher(LOG_PROB)(*problem()),
    "exact_fisher": lambda: exact(*problem()),
    "sampled_fisher": lambda: jf.sampled_fisher(model)(problem()[0], key(), problem()[1]),
    "empirical_fisher, centred": lambda: jf.empirical_fisher(LOG_PROB, center=True)(*problem()),
    "fisher_from_scores": lambda: jf.fisher_from_scores(scores(2)),
    "implicit_fisher": lambda: jf.implicit_fisher(model)(problem()[0], problem()[1]),
    "kl_hessian": lambda: jf.kl_hessian(model)(*problem()[:2]),
    "observed_information": lambda: jf.observed_information(LOG_PROB)(*problem()),
    "block_diagonal": lambda: jf.block_diagonal(fisher()),
    "dense": lambda: jf.dense(fisher("streamed")),
    "diagonal": lambda: jf.diagonal(fisher("streamed")),
    "kronecker": lambda: jf.kronecker(fisher("streamed")),
    "kronecker_reduce": lambda: jf.kronecker_reduce(fisher()),
    "eigen_kronecker": lambda: jf.eigen_kronecker(fisher("streamed"), basis=fisher("Kronecker")),
    "kronecker, of a sum": lambda: jf.kronecker(fisher("sum") + jf.scaled_identity(fisher(), 2.0)),
    "eigen_kronecker, of a sum": lambda: jf.eigen_kronecker(fisher("sum") + 2 * fisher("streamed")),
    "low_rank": lambda: jf.low_rank(fisher(), 2),
    "nystrom": lambda: jf.nystrom(fisher(), 2, key()),
    "partial_cholesky": lambda: jf.partial_cholesky(fisher(), 2),
    "marginal": lambda: jf.marginal(fisher(), lambda path: "w" in path),
    "scaled_identity": lambda: jf.scaled_identity(fisher(), 2.0),
}


def key():
    return jax.random.key(4)


NUMBERS = {
    "natural_grad": natural,
    "natural_grad, of a Fisher": lambda: natural(exact),
    "natural_grad, in pieces": lambda: natural(batch_size=2),
    "value_and_natural_grad": lambda: jf.value_and_natural_grad(LOG_PROB, damping=0.1)(*problem()),
    "log_likelihood": lambda: LOG_PROB(problem()[0], problem()[1][0], problem()[2][0]),
    "scores": lambda: jf.scores(LOG_PROB, center=True)(*problem()),
    "kl": lambda: jf.kl(model)(problem()[0], vector(), problem()[1]),
    "kl_divergence": lambda: jf.kl_divergence(jf.Normal(0.0, 1.0), jf.Normal(1.0, 1.0)),
    "monte_carlo_kl": lambda: jf.monte_carlo_kl(LOG_PROB)(problem()[0], vector(), problem()[1:]),
    "effective_dimension": lambda: jf.effective_dimension(fisher(), 0.1),
    "spectrum": lambda: jf.spectrum(fisher()),
    "relative_damping": lambda: jf.relative_damping(fisher(), 0.1),
    "estimate_trace": lambda: jf.estimate_trace(fisher(), key()),
    "estimate_diagonal": lambda: jf.estimate_diagonal(fisher(), key()),
    "estimate_logdet": lambda: jf.estimate_logdet(fisher(), key(), 0.1),
    "spectral_density": lambda: jf.spectral_density(fisher(), key(), jnp.ones(2), width=0.5),
    "solve": lambda: jf.solve(fisher(), vector(), 0.1),
    "solve, many right-hand sides": lambda: jax.vmap(lambda v: fisher().solve(v, 0.1))(stacked()),
    "solve_path": lambda: jf.solve_path(fisher(), vector(), jnp.array([0.1, 1.0])),
    "CG": lambda: jf.solve(fisher(), vector(), 0.1, jf.CG()),
    "CG, by a view": lambda: jf.solve(fisher("sum"), vector(), 0.1, jf.CG(preconditioner=lambda F: jf.diagonal(F))),
    "LSMR": lambda: jf.solve(fisher("streamed"), vector(), 0.1, jf.LSMR()),
    "LSMR, least squares": lambda: jf.LSMR().least_squares(scores(), scores().weights, 0.1),
    "factored_damping": lambda: jf.solve(fisher("Kronecker"), vector(), 0.1, jf.factored_damping),
}
OPTIMISERS = {
    "scale_by_fisher": lambda: jf.scale_by_fisher(0.1, momentum=0.5),
    "scale_by_fisher, a power": lambda: jf.scale_by_fisher(0.1, power=jnp.asarray(0.5), view=jf.diagonal, decay=0.5),
    "scale_to_kl": lambda: jf.scale_to_kl(0.1),
    "natural_gradient": lambda: jf.natural_gradient(0.1, 0.1, view=jf.kronecker, update_every=2, like=fisher("exact")),
    "backtrack_kl": lambda: jf.backtrack_kl(0.1),
    "adapt_damping": lambda: jf.adapt_damping(jf.natural_gradient(0.1, 0.1), 0.1),
    "quadratic_model": lambda: jf.quadratic_model(0.1),
    "kfac": lambda: jf.kfac(fisher("exact")),
}


def stacked():
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), vector())


def trained():
    params, *data = problem()
    opt = jf.natural_gradient(0.1, 0.1)
    return jf.training_step(model, opt)(params, opt.init(params), *data)


def test_scores_are_compiled_once():
    calls = {f"{name} of {size}": lambda c=c, s=size: c(scores(s)) for name, c in SCORES.items() for size in (None, 2)}
    assert left_by(calls) == ([], 0)


def test_fishers_and_views_are_compiled_once():
    assert left_by({name: lambda make=make: jax.tree.leaves(make()) for name, make in FISHERS.items()}) == ([], 0)


def test_functions_and_solvers_are_compiled_once():
    assert left_by({name: lambda call=call: jax.tree.leaves(call()) for name, call in NUMBERS.items()}) == ([], 0)


def test_optimisers_are_compiled_once():
    calls = {name: lambda make=make: stepped(make()) for name, make in OPTIMISERS.items()}
    assert left_by(calls | {"training_step": trained}) == ([], 0)


class Net:
    """A model that is a method."""

    def predict(self, params, x):
        return model(params, x)


NET = Net()


class Unhashable:
    """A model that can be found again by nothing."""

    __hash__ = None

    def __call__(self, params, x):
        return model(params, x)


def test_a_program_is_found_by_the_users_function_whatever_is_around_it():
    params, *data = problem()
    calls = {
        "equal log-likelihoods": lambda: jf.natural_grad(jf.log_likelihood(model), damping=0.1)(params, *data),
        "a method": lambda: jax.tree.leaves(jf.exact_fisher(NET.predict)(params, data[0])),
    }
    assert left_by(calls) == ([], 0)
    found, expected = (jf.exact_fisher(m)(params, data[0]).as_matrix() for m in (Unhashable(), model))
    assert jnp.array_equal(found, expected)


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
    """Read by name from another function."""
    return SPREAD


def test_a_name_bound_anew_is_seen(monkeypatch):
    """As in a notebook, where a cell is run again: a global, a function that the model calls, and a closed-over variable."""
    inputs, factor = jnp.ones((2, 1)), 1.0
    models = {
        "global": lambda mu, x: jf.Normal(mu * x[0], SPREAD),
        "function": lambda mu, x: jf.Normal(mu * x[0], spread()),
        "closure": lambda mu, x: jf.Normal(mu * x[0], factor),
        "inner function": lambda mu, x: jax.checkpoint(lambda mu: jf.Normal(mu * x[0], SPREAD))(mu),
    }
    makers = {name: jf.exact_fisher(model) for name, model in models.items()}

    def traces():
        return {name: float(make(0.0, inputs).trace()) for name, make in makers.items()}

    assert traces() == dict.fromkeys(models, 1.0)
    monkeypatch.setitem(globals(), "SPREAD", 0.5)
    assert traces() == {**dict.fromkeys(models, 4.0), "closure": 1.0}
    factor = 0.5
    assert traces() == dict.fromkeys(models, 4.0)
    monkeypatch.setitem(globals(), "spread", lambda: 2.0)
    assert traces() == {**dict.fromkeys(models, 4.0), "function": 0.25}
