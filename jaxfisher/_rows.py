r"""Rows: what one example contributes to a score matrix.

Three Fishers, three kinds of rows, one shape: a function ``(params, *example)`` that returns a parameter-shaped pytree whose
leaves have a leading axis of rows, such that the sum over an example's rows of ``row row^T`` is what that example adds to the
Fisher. The functions are frozen dataclasses, equal whenever the user's functions are, so that values that hold one cross
``jit`` once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray, Scalar

from jaxfisher._model import LogLikelihood, LogProb, Model, float_fields, predict, scalar


class Rows(Protocol):
    """A row function; ``function`` and ``name`` are the user's function in it, for messages."""

    @property
    def function(self) -> Callable[..., Any]: ...

    @property
    def name(self) -> str: ...

    def __call__(self, params: chex.ArrayTree, /, *example: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class ScoreRows:
    """One row: the score ``grad log p`` at the datum."""

    function: LogProb
    name = "log_prob"

    def __call__(self, params: chex.ArrayTree, /, *example: Any) -> Any:
        return self.with_value(params, *example)[1]

    def with_value(self, params: chex.ArrayTree, /, *example: Any) -> tuple[Scalar, Any]:
        """The log-density and the row, from one backward pass."""
        value, score = jax.value_and_grad(lambda p: scalar(self.function(p, *example), self.name))(params)
        return value, jax.tree.map(lambda leaf: leaf[None], score)


@dataclasses.dataclass(frozen=True)
class ExactRows:
    r"""One row for each column of the output metric's square root: ``J^T B e_j``, so that the rows give ``J^T (B B^T) J``.

    ``J`` is the Jacobian of the predicted distribution's fields, ``B B^T`` the distribution's own Fisher.
    """

    function: Model
    name = "model"

    def __call__(self, params: chex.ArrayTree, /, *inputs: Any) -> Any:
        def fields(p: chex.ArrayTree) -> Any:
            predicted = predict(self.function, p, *inputs)
            return float_fields(predicted), predicted

        _, pull_back, predicted = jax.vjp(fields, params, has_aux=True)
        noise, unravel = ravel_pytree(predicted.fisher_noise())

        def row(basis: Any) -> Any:
            return pull_back(float_fields(predicted.fisher_sqrt_mv(unravel(basis))))[0]

        return jax.vmap(row)(jnp.eye(noise.size, dtype=noise.dtype))


@dataclasses.dataclass(frozen=True)
class SampledRows:
    """``num_samples`` rows: scores at targets drawn from the model, each divided by ``sqrt(num_samples)``.

    The first argument after the parameters is the example's own key.
    """

    function: Model
    num_samples: int
    name = "model"

    def __call__(self, params: chex.ArrayTree, key: PRNGKeyArray, /, *inputs: Any) -> Any:
        log_prob = LogLikelihood(self.function)
        predicted = predict(self.function, params, *inputs)

        def row(key: PRNGKeyArray) -> Any:
            target = jax.lax.stop_gradient(predicted.sample(key))
            score = jax.grad(log_prob)(params, *inputs, target)
            return jax.tree.map(lambda leaf: leaf * self.num_samples**-0.5, score)

        return jax.vmap(row)(jax.random.split(key, self.num_samples))
