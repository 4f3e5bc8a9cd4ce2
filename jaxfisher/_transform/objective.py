"""The objective of a training step as a function of the parameters: the model's likelihood, or a loss of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, Scalar

from jaxfisher._automatic import automatic
from jaxfisher._examples import example_keys, make_batch, map_examples, needs_data, num_examples
from jaxfisher._model import LogLikelihood, Model, as_prediction, log_prob_of, of_one_example
from jaxfisher._readings import Around
from jaxfisher._residuals import Residuals
from jaxfisher._tree import as_key, param_spec
from jaxfisher._values import described, is_array

Evaluate: TypeAlias = Callable[[chex.ArrayTree], tuple[Scalar, Any]]
"""From parameters to the objective and the auxiliary output, which is empty without ``has_aux``."""

Objective: TypeAlias = Callable[[chex.ArrayTree, "StepData"], Evaluate]
"""From the parameters, and the data of one step, to the objective as a function of the parameters."""


@dataclasses.dataclass(frozen=True)
class StepData:
    """The data of one step.

    Attributes:
        inputs: the inputs of the model; last, if a key was given, the keys of the examples.
        target: the last entry of the data, which only the objective sees.
        given: the weights and counts, if there are any, which every mean over examples takes by keyword.
    """

    inputs: tuple[Any, ...]
    target: Any
    given: dict[str, Any]

    @property
    def all(self) -> tuple[Any, ...]:
        """The inputs and the target."""
        return (*self.inputs, self.target)


def step_data(data: tuple[Any, ...], key: Any, given: dict[str, Any], caller: str, with_target: bool) -> StepData:
    """The data of a step, from its arguments. ``with_target`` says whether the target has the examples' axis, as inputs do."""
    if with_target or not data:
        needs_data(data, caller)
    *inputs, target = data
    if key is not None:
        inputs.append(_keys_of(as_key(key, caller), data if with_target else tuple(inputs)))
    return StepData(tuple(inputs), target, {name: value for name, value in given.items() if value is not None})


def _keys_of(key: PRNGKeyArray, data: tuple[Any, ...]) -> PRNGKeyArray:
    """A key for each example, spread over devices as the examples are."""
    made = lambda key, data: example_keys(key, num_examples(data, "data"))  # noqa: E731
    keys: PRNGKeyArray = automatic(made, lambda key, data: data)(key, data)
    return keys


@dataclasses.dataclass(frozen=True)
class WithoutAux(Around):
    """A model that returns ``(distribution, aux)``, as a model that returns the distribution alone."""

    model: Model

    def __call__(self, params: chex.ArrayTree, /, *inputs: Any) -> Any:
        return _pair(self.model(params, *inputs), "model", "(distribution, aux)")[0]


def likelihood(model: Model, has_aux: bool) -> Objective:
    """The mean negative log-likelihood. With ``has_aux``, the model's auxiliary output is stacked over the examples."""

    def one(params: chex.ArrayTree, /, *example: Any) -> tuple[Scalar, Any]:
        *inputs, target = example
        returned = model(params, *inputs)
        predicted, aux = _pair(returned, "model", "(distribution, aux)") if has_aux else (returned, ())
        return log_prob_of(as_prediction(predicted), target), jax.tree.map(jnp.asarray, aux)

    def objective(params: chex.ArrayTree, data: StepData) -> Evaluate:
        batch = make_batch(params, data.all, **{"weights": None, **data.given})

        def evaluate(params: chex.ArrayTree) -> tuple[Scalar, Any]:
            with of_one_example(LogLikelihood(model), "model", params, batch.data):
                values, aux = map_examples(one, params, batch.data)
            return -jnp.sum(batch.weights * values.astype(batch.weights.dtype)), aux

        return evaluate

    return objective


def own_loss(loss: Callable[..., Any], has_aux: bool) -> Objective:
    """A loss of the user's own, called once with all of the data."""

    def objective(params: chex.ArrayTree, data: StepData) -> Evaluate:
        param_spec(params)  # raises an error that names a leaf that cannot be a parameter

        def evaluate(params: chex.ArrayTree) -> tuple[Scalar, Any]:
            returned = loss(params, *data.all)
            value, aux = _pair(returned, "loss", "(loss, aux)") if has_aux else (returned, ())
            return _checked_loss(value), aux

        return evaluate

    return objective


def of_residuals(problem: Residuals) -> Objective:
    """The sum of squares of residuals."""

    def objective(params: chex.ArrayTree, data: StepData) -> Evaluate:
        return lambda params: (problem.loss(params, *data.inputs, **data.given), ())

    return objective


def points_of_step(data: tuple[Any, ...], key: Any, given: dict[str, Any], caller: str) -> StepData:
    """The data of a step for residuals: their points, and their scales if given."""
    if len(data) not in (1, 2):
        raise TypeError(
            f"{caller}: it was called with {len(data)} entries of data; residuals have their points, a dict by kind, and after "
            "these the scales, if there are any: step(params, state, points, scales)."
        )
    for name, value in (("key", key), ("counts", given["counts"])):
        if value is not None:
            raise ValueError(f"{caller}: `{name}` is given, but residuals take none. Put it into the points of a kind.")
    return StepData(data, None, {name: value for name, value in given.items() if value is not None})


def _pair(returned: Any, name: str, expected: str) -> tuple[Any, Any]:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(
            f"training_step: `{name}` returned {described(returned)} with has_aux=True; expected a pair, {expected}. Leave "
            "has_aux out if there is no auxiliary output."
        )
    return returned


def _checked_loss(value: Any) -> Array:
    if not is_array(value) or jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f"training_step: `loss` returned {described(value)}; expected one real floating number, the loss of all of the "
            "data: (params, *data) -> scalar. If it also returns an auxiliary output, give has_aux=True."
        )
    return jnp.asarray(value)
