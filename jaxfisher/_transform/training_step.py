"""Value, gradient, curvature and update in one call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, Shaped

from jaxfisher._acceleration import acceleration
from jaxfisher._divergence import kl
from jaxfisher._fisher import FisherFunction, exact_fisher
from jaxfisher._model import MODEL, Model
from jaxfisher._operators.operator import Operator
from jaxfisher._residuals import Residuals
from jaxfisher._targets import given_with, taken_by
from jaxfisher._transform.cheap import Cheap, Offered
from jaxfisher._transform.like import Choice, fishers_like
from jaxfisher._transform.objective import (
    Objective,
    StepData,
    WithoutAux,
    likelihood,
    of_residuals,
    own_loss,
    points_of_step,
    step_data,
)
from jaxfisher._transform.passing import passing
from jaxfisher._transform.places import beside
from jaxfisher._tree import check_function, described, uphill
from jaxfisher._values import check_flag


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """``(params, state, *inputs, target, weights=None, counts=None, key=None) -> (params, state, loss)``.

    Attributes:
        step: the function that a call runs.
        init: makes the first state, ``(params, *inputs, target, weights=None, counts=None, key=None) -> state``, for batches
            like this one. Only the shapes of the data matter: give the first batch, or its `jax.eval_shape`.
    """

    step: Callable[..., tuple[Any, Any, Any]]
    init: Callable[..., Any]

    def __call__(
        self,
        params: chex.ArrayTree,
        state: Any,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Any, Any, Any]:
        return self.step(params, state, *data, weights=weights, counts=counts, key=key)


def training_step(
    model: Model | Residuals,
    optimiser: optax.GradientTransformation,
    fisher: FisherFunction | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    has_aux: bool = False,
) -> TrainingStep:
    r"""Make a training step for any optimiser of this library or of Optax, which gives it everything that it may ask for.

    .. math:: L = -\frac1n \sum_i \log p_\theta(y_i \mid x_i), \qquad \theta \leftarrow \theta + u(\nabla L, F, L, KL).

    By hand the step is::

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params, value=value, grad=grads, fisher=lambda: F(params, x),
            value_fn=lambda new: loss(new), kl_fn=lambda new: jf.kl(model)(params, new, x))
        params = optax.apply_updates(params, updates)

    so one step works with `natural_gradient`, `adapt_damping`, `backtrack_kl`, a chain of them, and every optimiser of `optax`
    and `optax.contrib` that works from one mean gradient. Line searches such as `optax.lbfgs` get ``value_fn``,
    `optax.contrib.sophia` gets ``obj_fn`` and `optax.contrib.sam` gets ``grad_fn``, all of the same loss. (The exception is
    `optax.contrib.dpsgd`, which clips a gradient for each example; the step computes none.) Inside `optax.partition` the
    transformations of this library see a part of the parameters, and ``all_params`` has the others. Under
    ``optax.MultiSteps(optimiser, k).gradient_transformation()`` the gradient is the mean over k batches, and everything else is
    of the last of them. A wrapper that passes no keywords on, such as `optax.lookahead`, does not keep them from the
    transformations of this library; for `optax.lookahead` the parameters are its pair. What the optimiser does not ask for is
    not computed. Jit the step, or scan it.

    **The data.** The last entry is the target, and all entries before it are the inputs. The model, its Fisher and its KL
    divergence see the inputs of one example; the objective sees all entries. With a ``loss`` of your own the target is whatever
    that loss needs beside the inputs, a pytree of any shapes: actions and advantages, the parameters of an earlier task, a
    second data set. The loss is called once, ``loss(params, *inputs, target)``, on the whole batch.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example; with ``has_aux``, and no ``loss`` of your own,
            ``(distribution, aux)``. Or what `jaxfisher.residuals` returns: the data are then its points, and the scales.
        optimiser: a gradient transformation.
        fisher: a Fisher function such as ``jf.empirical_fisher(log_prob)`` or ``jf.exact_fisher(model)``, or a function of your
            own, ``(params, *inputs) -> operator`` of the batch, where priors and penalties can be added as operators. None
            stands for `jaxfisher.exact_fisher` of the model, or for the cheapest curvature that serves if the optimiser is
            `jaxfisher.kfac`.
        loss: ``(params, *inputs, target) -> scalar`` of the whole batch, minimised in place of the negative log-likelihood;
            with ``has_aux`` it returns ``(scalar, aux)``. The curvature is still the model's.
        has_aux: whether the objective returns a second value. With a ``loss`` of your own the loss returns the pair, and the
            model returns the distribution alone, ``lambda params, x: model(params, x)[0]``. Without one the model returns the
            pair, and ``aux`` is stacked over the examples; a Fisher of your own is of the distribution alone.

    Returns:
        A function ``(params, state, *inputs, target, weights=None, counts=None, key=None)`` to ``(params, state, loss)``. The
        loss is a mean over the batch, in nats, at the parameters that the step was given; with ``has_aux`` the function returns
        ``(params, state, (loss, aux))``. Its ``init(params, *inputs, target, weights=None, counts=None, key=None)`` makes the
        first state for batches of these shapes. It is ``optimiser.init(params)``, and finds by itself the shapes of the Fishers
        for which a ``decay`` or ``update_every`` would need ``like``.

        ``weights`` weigh the examples in every mean. ``counts`` say how many terms each example consists of, such as the valid
        tokens of a sequence: loss, gradient, Fisher and KL are then means over terms, ``sum w_i (.) / sum w_i c_i``, as
        language models report them. A ``loss`` of your own is given neither. With a ``key`` each example has its own key,
        ``jax.random.fold_in(key, i)`` for the i-th of the batch, as its last input: ``model(params, x, key)``,
        ``loss(params, x, keys, target)``. The objective, its gradient, the Fisher and the KL divergence of that step use the
        same keys, also in pieces or spread over devices.

    Raises:
        TypeError: an argument is not what it should be; (when called) as in `jaxfisher.log_likelihood`; the loss is no real
            number; with ``has_aux`` the returned value is no pair.
        ValueError: (when called) arrays of different lengths.

    Reference: Amari (Neural Computation 1998), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> opt = jf.natural_gradient(learning_rate=1.0, damping=0.0)
    >>> step = jf.training_step(lambda mu, x: jf.Normal(mu * x, 2.0), opt)
    >>> mu, state, loss = step(0.0, opt.init(0.0), jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0]))
    >>> print(mu.round(5))  # least squares in one step
    3.0
    """
    if not isinstance(model, Residuals):
        check_function("model", model, MODEL)
    _check_optimiser(optimiser)
    if fisher is not None:
        check_function("fisher", fisher, "(params, *inputs) -> operator")
    if loss is not None:
        check_function("loss", loss, "(params, *inputs, target) -> the scalar loss of the whole batch")
    check_flag("training_step: `has_aux`", has_aux)
    task = _task(model, loss, has_aux)
    update = optimiser.update

    def step(
        params: chex.ArrayTree,
        state: Any,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Any, Any, Any]:
        known = task.data(data, key, {"weights": weights, "counts": counts}, "training_step")
        given_params, params = params, _evaluated(params, state)
        evaluate = task.objective(params, known)
        (value, aux), grads = jax.value_and_grad(evaluate, has_aux=True)(params)
        grads = uphill(grads)

        # Optax's line searches refuse keywords that the signature of `value_fn` does not name, even if meant for others.
        def value_fn(  # noqa: PLR0913
            params: chex.ArrayTree,
            *,
            fisher: Any = None,
            kl_fn: Any = None,
            obj_fn: Any = None,
            grad_fn: Any = None,
            acceleration_fn: Any = None,
            damping: Any = None,
            due: Any = None,
            all_params: Any = None,
        ) -> Scalar:
            del fisher, kl_fn, obj_fn, grad_fn, acceleration_fn, damping, due, all_params
            return evaluate(params)[0]

        given = given_with(known.inputs, known.given)
        offered = {
            "value": value,
            "grad": grads,
            "value_fn": value_fn,
            "obj_fn": value_fn,
            "grad_fn": lambda new, _: uphill(jax.grad(value_fn)(new)),
            "kl_fn": lambda new: task.divergence(params, new, *known.inputs, **given),
            "acceleration_fn": lambda d: task.acceleration(params, d, *known.inputs, **given),
            "all_params": params,
            "fisher": _offered(task, fisher, params, known),
        }
        with passing(offered):
            updates, state = update(grads, state, given_params, **_taken(update, offered))
        return optax.apply_updates(given_params, updates), state, (value, aux) if has_aux else value

    def init(
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        def made(choice: Choice) -> Operator:
            def chosen(params: chex.ArrayTree, data: tuple[Any, ...], weights: Any, counts: Any, key: Any) -> Operator:
                given = {"weights": weights, "counts": counts}
                return choice(_offered(task, fisher, params, task.data(data, key, given, "training_step(...).init")))

            return jax.eval_shape(chosen, _evaluated(params, None), data, weights, counts, key)

        with fishers_like(made):
            return beside(params, optimiser.init(params))

    return TrainingStep(step, init)


class _Task(NamedTuple):
    """A training problem: its objective, and the functions that an optimiser may ask for."""

    objective: Objective
    curvature: Callable[..., Operator]
    divergence: Callable[..., Scalar]
    acceleration: Callable[..., Any]
    data: Callable[[tuple[Any, ...], Any, dict[str, Any], str], StepData]
    """From the arguments of a call (data, key, weights and counts, the caller's name) to the data of a step."""
    predicting: Model | None
    """The model that targets can be drawn from; None for residuals."""


def _task(model: Model | Residuals, loss: Callable[..., Any] | None, has_aux: bool) -> _Task:
    if isinstance(model, Residuals):
        if loss is not None or has_aux:
            given = "`loss`" if loss is not None else "`has_aux`"
            raise ValueError(f"training_step: {given} is given beside residuals, whose loss is their own. Leave it out.")
        return _Task(of_residuals(model), model.gauss_newton, model.kl, model.acceleration, points_of_step, None)
    objective = likelihood(model, has_aux) if loss is None else own_loss(loss, has_aux)
    predicting = WithoutAux(model) if has_aux and loss is None else model
    data = partial(step_data, with_target=loss is None)
    return _Task(objective, exact_fisher(predicting), kl(predicting), acceleration(predicting), data, predicting)


def _offered(task: _Task, fisher: FisherFunction | None, params: chex.ArrayTree, data: StepData) -> Offered:
    """The curvature that a step offers: that of the user's own Fisher, or else the exact one and a cheap one."""

    def usual() -> Operator:
        curvature = task.curvature if fisher is None else fisher
        taken = taken_by(curvature, data.all, data.inputs)
        return curvature(params, *taken, **given_with(taken, data.given))

    drawn = task.predicting if fisher is None else None
    cheap = None if drawn is None else Cheap(drawn, params, data.inputs, given_with(data.inputs, data.given))
    return Offered(usual, cheap)


def _evaluated(params: chex.ArrayTree, state: Any) -> chex.ArrayTree:
    """The parameters at which an optimiser wants the gradient: all, or the fast ones of `optax.lookahead`."""
    if isinstance(params, optax.LookaheadParams):
        return params.fast
    if isinstance(state, optax.LookaheadState):
        raise TypeError(
            f"training_step: the optimiser is optax.lookahead, and `params` is {described(params)}; expected its pair of fast "
            "and slow parameters. Begin with params = optax.LookaheadParams.init_synced(params), and evaluate params.slow."
        )
    return params


def _taken(update: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """The keywords that the signature of an update names, or all if it takes any; `optax.contrib.sam` takes a single one.

    The type of the transformation does not tell: `optax.MultiSteps` makes one of the type without keywords, yet passes them on.
    """
    parameters = inspect.signature(update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return known
    return {name: value for name, value in known.items() if name in parameters}


def _check_optimiser(optimiser: Any) -> None:
    if isinstance(optimiser, optax.GradientTransformation):
        return
    remedy = "Pass one such as jf.natural_gradient(1.0, 0.1), or one of Optax."
    if hasattr(optimiser, "gradient_transformation"):
        remedy = "Pass optimiser.gradient_transformation()."
    elif callable(optimiser):
        remedy = "Call the function that makes it first."
    raise TypeError(f"training_step: `optimiser` is {described(optimiser)}; expected a gradient transformation. {remedy}")
