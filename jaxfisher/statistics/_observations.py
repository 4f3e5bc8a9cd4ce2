"""What the files of this room ask of all observations together."""

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
    """A function of this room: sums over observations, which do not depend on what a mean is divided by."""
    counts = (
        "none: estimates and their errors do not depend on what a mean is divided by. How often an observation occurs, pass as "
        "weights=."
    )
    return refusing(function, counts=counts, batch_size=BATCH_SIZE.format(f"statistics.{function}(..., batch_size=...)"))


def occurrences(weights: Any, n: int) -> Float[Array, " n"]:
    """How often each of n observations occurs: once unless weights say otherwise, and NaN where these are no weights."""
    if weights is None:
        return jnp.ones(n)
    often = checked_weights(weights, n)
    return jnp.where(often >= 0, often, jnp.nan)


@dataclasses.dataclass(frozen=True)
class _Repeated(Around):
    """A model without inputs, once for each target."""

    model: Model

    def __call__(self, params: chex.ArrayTree, target: Any, /) -> Distribution:
        return self.model(params)


def fisher_at(model: Model, params: chex.ArrayTree, data: tuple[Any, ...], weights: Any, batch_size: int | None) -> Operator:
    """The exact Fisher over all observations; of a model without inputs too its n is the number of targets."""
    if jax.tree.leaves(data[:-1]):
        return exact_fisher(model, batch_size=batch_size)(params, *data[:-1], weights=weights)
    return exact_fisher(_Repeated(model), batch_size=batch_size)(params, data[-1], weights=weights)
