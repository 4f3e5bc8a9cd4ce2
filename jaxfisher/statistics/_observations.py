"""Helpers of this folder that concern all observations together: counts, weights, and the Fisher of all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._distributions.base import Distribution
from jaxfisher._examples import BATCH_SIZE, Refusing, checked_weights, refusing
from jaxfisher._fisher import exact_fisher
from jaxfisher._model import Model
from jaxfisher._operators.operator import Operator
from jaxfisher._readings import Around


def of_observations(function: str) -> Refusing:
    """A decorator for functions of sums over observations: ``counts`` and ``batch_size`` raise errors that say what to do."""
    counts = (
        "none: estimates and their errors do not depend on what a mean is divided by. How often an observation occurs, pass as "
        "weights=."
    )
    return refusing(function, counts=counts, batch_size=BATCH_SIZE.format(f"statistics.{function}(..., batch_size=...)"))


def occurrences(weights: Any, n: int) -> Float[Array, " n"]:
    """How often each of n observations occurs: its weight, or once without weights; NaN for a negative weight."""
    if weights is None:
        return jnp.ones(n)
    often = checked_weights(weights, n)
    return jnp.where(often >= 0, often, jnp.nan)


@dataclasses.dataclass(frozen=True)
class _Repeated(Around):
    """A model without arrays among its inputs, as a model that is evaluated once for each target."""

    model: Model

    def __call__(self, params: chex.ArrayTree, /, *data: Any) -> Distribution:
        return self.model(params, *data[:-1])


def fisher_at(model: Model, params: chex.ArrayTree, data: tuple[Any, ...], weights: Any, batch_size: int | None) -> Operator:
    """The exact Fisher over all observations; its n is the number of targets also for a model without inputs."""
    if jax.tree.leaves(data[:-1]):
        return exact_fisher(model, batch_size=batch_size)(params, *data[:-1], weights=weights)
    return exact_fisher(_Repeated(model), batch_size=batch_size)(params, *data, weights=weights)
