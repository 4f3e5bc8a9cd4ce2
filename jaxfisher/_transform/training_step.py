"""Value, gradient, curvature and update in one call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import optax
from jaxtyping import Array, Float, Scalar

from jaxfisher._divergence import kl
from jaxfisher._examples import make_batch, needs_data
from jaxfisher._fisher import FisherFunction, exact_fisher
from jaxfisher._model import MODEL, Model, log_likelihood, mean_loss, of_one_example
from jaxfisher._operators.operator import Operator
from jaxfisher._targets import taken_by
from jaxfisher._transform.cheap import Offered, cheap_fisher
from jaxfisher._transform.like import fishers_like
from jaxfisher._tree import check_function, described


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """``(params, state, *inputs, target, weights=None) -> (params, state, loss)``, and what makes the first state.

    Attributes:
        step: what is called.
        init: ``(params, *inputs, target, weights=None) -> state``, the optimiser's state for batches like this one. Only the
            shapes of the data count: give the first batch, or what `jax.eval_shape` gives of it.
    """

    step: Callable[..., tuple[Any, Any, Scalar]]
    init: Callable[..., Any]

    def __call__(
        self, params: chex.ArrayTree, state: Any, /, *data: Any, weights: Float[Array, " n"] | None = None
    ) -> tuple[Any, Any, Scalar]:
        return self.step(params, state, *data, weights=weights)


def training_step(model: Model, optimiser: optax.GradientTransformation, fisher: FisherFunction | None = None) -> TrainingStep:
    r"""One step of maximum likelihood with any optimiser of this library, or of Optax, given everything it may ask for.

    .. math:: L = -\frac1n \sum_i \log p_\theta(y_i \mid x_i), \qquad \theta \leftarrow \theta + u(\nabla L, F, L, KL).

    It is what one would write by hand::

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params, value=value, grad=grads, fisher=lambda: F(params, x),
            value_fn=lambda new: loss(new), kl_fn=lambda new: jf.kl(model)(params, new, x))
        params = optax.apply_updates(params, updates)

    so one step takes `natural_gradient`, `adapt_damping`, `backtrack_kl`, a chain of them, and every optimiser of `optax` and
    `optax.contrib` whose updates are of one mean gradient: line searches such as `optax.lbfgs` have ``value_fn``,
    `optax.contrib.sophia` has ``obj_fn``, `optax.contrib.sam` has ``grad_fn``, both of the same loss. (`optax.contrib.dpsgd`
    clips a gradient for each example, and there is none here.) What the optimiser does not call is not computed. Jit it, or
    scan it.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        optimiser: a gradient transformation.
        fisher: such as ``jf.empirical_fisher(log_prob)`` or ``jf.exact_fisher(model)``, or a function of your own,
            ``(params, *inputs) -> operator`` of the batch; None for `jaxfisher.exact_fisher` of the model, or, where the
            optimiser is `jaxfisher.kfac`, for the cheapest that it can do with.

    Returns:
        A function ``(params, state, *inputs, target, weights=None)`` to ``(params, state, loss)``, the loss in nats, a mean
        over the batch, at the parameters given. Its ``init(params, *inputs, target, weights=None)`` makes the first state, for
        batches of these shapes: ``optimiser.init(params)``, which finds the shapes of Fishers to come by itself, where a
        ``decay`` or ``update_every`` would ask for ``like``.

    Raises:
        TypeError: an argument is not what it should be; (when called) as in `jaxfisher.log_likelihood`.
        ValueError: (when called) arrays of different lengths.

    Reference: Amari (Neural Computation 1998), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> opt = jf.natural_gradient(learning_rate=1.0, damping=0.0)
    >>> step = jf.training_step(lambda mu, x: jf.Normal(mu * x, 2.0), opt)
    >>> mu, state, loss = step(0.0, opt.init(0.0), jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0]))
    >>> print(mu.round(5))  # least squares in one step
    3.0
    """
    check_function("model", model, MODEL)
    _check_optimiser(optimiser)
    if fisher is not None:
        check_function("fisher", fisher, "(params, *inputs) -> operator")
    log_prob = log_likelihood(model)
    curvature = exact_fisher(model) if fisher is None else fisher
    divergence = kl(model)
    update = optax.with_extra_args_support(optimiser).update

    def step(
        params: chex.ArrayTree, state: Any, /, *data: Any, weights: Float[Array, " n"] | None = None
    ) -> tuple[Any, Any, Scalar]:
        needs_data(data, "training_step")
        batch, inputs = make_batch(params, data, weights), data[:-1]
        given = {} if weights is None else {"weights": weights}

        # Optax's line searches refuse a keyword that the signature of `value_fn` does not name, whoever it is for.
        def loss(
            params: chex.ArrayTree,
            *,
            fisher: Any = None,
            kl_fn: Any = None,
            obj_fn: Any = None,
            grad_fn: Any = None,
            damping: Any = None,
        ) -> Scalar:
            del fisher, kl_fn, obj_fn, grad_fn, damping
            return mean_loss(log_prob, params, batch.data, batch.weights)

        with of_one_example(log_prob, "model", params, batch.data):
            value, grads = jax.value_and_grad(loss)(params)
        known = {
            "value": value,
            "grad": grads,
            "value_fn": loss,
            "obj_fn": loss,
            "grad_fn": lambda new, _: jax.grad(loss)(new),
            "kl_fn": lambda new: divergence(params, new, *inputs, **given),
            "fisher": Offered(
                lambda: curvature(params, *taken_by(curvature, data, inputs), **given),
                None if fisher is not None else lambda key: cheap_fisher(model, params, key, *inputs, **given),
            ),
        }
        updates, state = update(grads, state, params, **_taken(update, known))
        return optax.apply_updates(params, updates), state, value

    def init(params: chex.ArrayTree, /, *data: Any, weights: Float[Array, " n"] | None = None) -> Any:
        needs_data(data, "training_step(...).init")

        def made(params: chex.ArrayTree, data: tuple[Any, ...], weights: Any) -> Operator:
            given = {} if weights is None else {"weights": weights}
            return curvature(params, *taken_by(curvature, data, data[:-1]), **given)

        with fishers_like(lambda: jax.eval_shape(made, params, data, weights)):
            return optimiser.init(params)

    return TrainingStep(step, init)


def _taken(update: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """What of the keywords an update names; all, where it takes any: `optax.contrib.sam` takes one and no other."""
    parameters = inspect.signature(update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return known
    return {name: value for name, value in known.items() if name in parameters}


def _check_optimiser(optimiser: Any) -> None:
    if isinstance(optimiser, optax.GradientTransformation):
        return
    remedy = "Pass such as jf.natural_gradient(1.0, 0.1), or one of Optax."
    if hasattr(optimiser, "gradient_transformation"):
        remedy = "Pass what its method gives: optimiser.gradient_transformation()."
    elif callable(optimiser):
        remedy = "Call the function that makes it first."
    raise TypeError(f"training_step: `optimiser` is {described(optimiser)}; expected a gradient transformation. {remedy}")
