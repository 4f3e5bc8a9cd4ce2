"""The optimisers that `training.py` compares: ours with one setting each, the others with several settings to choose from."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from task import Task

import jaxfisher as jf

DAMPINGS = (1.0, 1e-1, 1e-2)
"""Three initial dampings for other libraries' second-order methods."""
MOST_ROWS = 64
"""The most rows per example, one for each number of the distribution's fields, with which an exact Fisher is tried."""

Step = Callable[[Any, Any, jax.Array, tuple[jax.Array, ...]], tuple[Any, Any]]
"""``(params, state, key, batch) -> (params, state)``."""


class Unsuited(Exception):
    """Why an optimiser is left out of a task."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """An optimiser on a task.

    Attributes:
        init: ``(params, key, batch) -> state``.
        advance: ``(params, state, keys, batches) -> (params, state, path)``, several steps, and the parameters after each.
    """

    init: Callable[..., Any]
    advance: Callable[..., tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimiser with a name and a setting; the table shows the best setting of each name."""

    name: str
    setting: str
    make: Callable[[Task], Trainer]


def scanned(init: Callable[..., Any], step: Step) -> Trainer:
    """The trainer of a step that JAX can trace: several steps are one program."""

    def body(carry: tuple[Any, Any], given: tuple[jax.Array, Any]) -> tuple[tuple[Any, Any], Any]:
        params, state = step(*carry, *given)
        return (params, state), params

    @jax.jit
    def advance(params: Any, state: Any, keys: jax.Array, batches: Any) -> tuple[Any, Any, Any]:
        (params, state), path = jax.lax.scan(body, (params, state), (keys, batches))
        return params, state, path

    return Trainer(init, advance)


def called(init: Callable[..., Any], step: Step) -> Trainer:
    """The trainer of a step that compiles itself: one call after another."""

    def advance(params: Any, state: Any, keys: jax.Array, batches: Any) -> tuple[Any, Any, Any]:
        made = []
        for k, key in enumerate(keys):
            params, state = step(params, state, key, tuple(leaf[k] for leaf in batches))
            made.append(jax.tree.map(jnp.copy, params))  # the next step may reuse their memory
        return params, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

    return Trainer(init, advance)


def rows(task: Task) -> int:
    """How many rows an example has in an exact Fisher: as many as `forward` returns numbers."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    return jax.eval_shape(task.forward, params, task.train[0][:1]).size


# --- Optax: ours, and theirs -------------------------------------------------------------------------------------------------

Fisher = Callable[[Task, jax.Array], Callable[..., jf.Operator]]
"""From a task and a step's key to the ``fisher`` of `jf.training_step`."""


def exact(task: Task, key: jax.Array) -> Callable[..., jf.Operator]:
    """The expectation over the model's own predictions."""
    del key
    if rows(task) > MOST_ROWS:
        raise Unsuited(f"the exact Fisher has {rows(task)} rows an example here")
    return jf.exact_fisher(task.model)


def drawn(task: Task, key: jax.Array) -> Callable[..., jf.Operator]:
    """Exact products, and views made of targets drawn from the model, one per example and new at every step."""
    products, sampled = jf.implicit_fisher(task.model), jf.sampled_fisher(task.model)
    return lambda params, *inputs: products(params, *inputs, views_of=sampled(params, key, *inputs))


def natural(
    make: Callable[[Callable[[], jf.Operator]], optax.GradientTransformation], fisher: Fisher
) -> Callable[[Task], Trainer]:
    """The trainer of an optimiser that must know the form of its Fisher before the first step."""

    def trainer(task: Task) -> Trainer:
        params = task.init(jax.random.key(0))
        *inputs, _ = task.data(params, tuple(leaf[: task.size] for leaf in task.train))
        like = lambda: fisher(task, jax.random.key(0))(params, *inputs)  # noqa: E731
        return with_optax(make(like), fisher)(task)

    return trainer


def with_optax(optimiser: optax.GradientTransformation, fisher: Fisher | None = None) -> Callable[[Task], Trainer]:
    """The trainer of an Optax optimiser, by `jf.training_step`."""

    def trainer(task: Task) -> Trainer:
        if fisher is not None:
            fisher(task, jax.random.key(0))

        def step(params: Any, state: Any, key: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            curvature = None if fisher is None else fisher(task, key)
            params, state, _ = task.training_step(optimiser, curvature)(params, state, *task.data(params, batch))
            return params, state

        return scanned(lambda params, *_: optimiser.init(params), step)

    return trainer


def as_it_comes(optimiser: optax.GradientTransformation) -> Callable[[Task], Trainer]:
    """The trainer of an optimiser with the default Fisher of `jf.training_step`."""

    def trainer(task: Task) -> Trainer:
        made = task.training_step(optimiser)

        def step(params: Any, state: Any, key: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            del key
            params, state, _ = made(params, state, *task.data(params, batch))
            return params, state

        return scanned(lambda params, _, batch: made.init(params, *task.data(params, batch)), step)

    return trainer


def deterministic(trainer: Callable[[Task], Trainer]) -> Callable[[Task], Trainer]:
    """The trainer of a method that needs the same loss function at every step, and so steps on all of the data."""

    def made(task: Task) -> Trainer:
        if task.batch is not None:
            raise Unsuited("it is for steps on all of the data, and these are on batches")
        return trainer(task)

    return made


# --- other libraries ---------------------------------------------------------------------------------------------------------


def library(name: str, package: str) -> Any:
    """A module that may not be installed, or may fail to import on this JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these libraries use functions that JAX has deprecated
        try:
            return importlib.import_module(name)
        except (ImportError, AttributeError) as error:
            raise Unsuited(f"{package} does not import here: {error}") from error


def netket() -> Any:
    """NetKet, kept from switching float64 on for everything that is measured after it."""
    os.environ.setdefault("NETKET_ENABLE_X64", "0")
    return library("netket", "netket")


def mean_loss(task: Task, params: Any, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch in one call, as other libraries expect it, and the outputs."""
    outputs = task.forward(params, batch[0])
    return -jnp.sum(task.distribution(outputs).log_prob(batch[-1])) / len(batch[-1]), outputs


def kfac_jax(damping: float, task: Task) -> Trainer:
    """The adaptive optimiser of kfac-jax: learning rate, momentum and damping come from the quadratic model."""
    library_ = library("kfac_jax", "kfac-jax")
    register = {
        jf.Categorical: library_.register_softmax_cross_entropy_loss,
        jf.Bernoulli: library_.register_multi_bernoulli_predictive_distribution,
    }
    fields = jax.eval_shape(task.forward, jax.eval_shape(task.init, jax.random.key(0)), task.train[0][:1])
    kind = type(jax.eval_shape(task.distribution, fields))
    if kind not in register:
        raise Unsuited(f"it registers no {kind.__name__} with these parameters")

    def loss(params: Any, batch: tuple[jax.Array, ...]) -> jax.Array:
        value, outputs = mean_loss(task, params, batch)
        register[kind](outputs, batch[-1])
        return value

    optimiser = library_.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        num_burnin_steps=0,
    )

    def step(params: Any, state: Any, key: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        try:
            params, state, _ = optimiser.step(params, state, key, batch=batch)
        except ValueError as error:
            if "too many values to unpack" not in str(error):
                raise
            raise Unsuited("kfac-jax 0.0.8 cannot trace a loss on this JAX") from error
        return params, state

    return called(optimiser.init, step)


def somax(damping: float, task: Task) -> Trainer:
    """Somax's `sgn_ce`: conjugate gradients on the Gauss-Newton matrix of a softmax, learning rate one."""
    library_ = library("somax", "python-somax")
    outputs = jax.eval_shape(task.forward, jax.eval_shape(task.init, jax.random.key(0)), task.train[0][:1])
    if task.distribution is not jf.Categorical or outputs.ndim != 2 or task.statistics is not None:
        raise Unsuited("its matrix-free method takes one softmax an example")
    method = library_.sgn_ce(predict_fn=task.forward, lam0=damping)

    def step(params: Any, state: Any, key: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        params, state, _ = method.step(params, {"x": batch[0], "y": batch[1]}, state, key)
        return params, state

    return scanned(lambda params, *_: method.init(params), step)


# --- all of them -------------------------------------------------------------------------------------------------------------


def entries(task: Task) -> Iterator[Entry]:
    """All optimisers and settings for a task, ours first."""
    yield Entry("jf.kfac", "", as_it_comes(jf.kfac()))
    if not task.lean:
        yield from settings()
    for name, make in {"Adam": optax.adam, "AdamW": optax.adamw, "Muon": optax.contrib.muon}.items():
        for rate in task.rates:
            yield Entry(name, f"rate {rate:g}", with_optax(make(rate)))
    yield Entry("L-BFGS", "", deterministic(with_optax(optax.lbfgs())))
    for damping in DAMPINGS:
        yield Entry("kfac-jax", f"damping {damping:g}", functools.partial(kfac_jax, damping))
    if not task.lean:
        for damping in DAMPINGS:
            yield Entry("somax", f"damping {damping:g}", functools.partial(somax, damping))


def settings() -> Iterator[Entry]:
    """Our optimisers with settings other than the defaults."""
    yield Entry("jf.kfac, all at every step", "", as_it_comes(jf.kfac(update_every=1)))
    whole = functools.partial(jf.kfac, solver=None, update_every=1)
    yield Entry("jf.kfac, exact", "", natural(whole, exact))
    yield Entry("jf.kfac, drawn", "", natural(whole, drawn))
    ekfac = functools.partial(jf.kfac, view=jf.eigen_kronecker, decay=None)
    yield Entry("jf.kfac, EKFAC", "", natural(ekfac, exact))
    yield Entry("jf.natural_gradient", "", deterministic(with_optax(newton(), exact)))


def newton() -> optax.GradientTransformation:
    """Fisher scoring with Levenberg and Marquardt's damping, which falls fast when every step sees all of the data."""
    return jf.adapt_damping(jf.natural_gradient(learning_rate=1.0), damping=1e-2, factor=4.0)
