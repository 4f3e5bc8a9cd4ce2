"""Fisher functions that know whether they take the targets, so that callers with all of the data can call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import chex
import jax
import jax.numpy as jnp

from jaxfisher._examples import make_batch
from jaxfisher._readings import Around

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class OfData(Around, Generic[R]):
    """``(params, *inputs, target, weights=None) -> operator``, or the same without the target.

    Attributes:
        function: the function that a call runs.
        takes_target: whether the last entry of its data is the target.
    """

    function: Callable[..., R]
    takes_target: bool

    def __call__(self, params: chex.ArrayTree, /, *data: Any, **keywords: Any) -> R:
        return self.function(params, *data, **keywords)


def taken_by(fisher: Any, data: tuple[Any, ...], usual: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of ``data``, whose last entry is the target, that a Fisher takes; ``usual`` for a function of the user's own."""
    if not isinstance(fisher, OfData):
        return usual
    return data if fisher.takes_target else data[:-1]


def given_with(taken: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The weights and counts to pass by keyword along with ``taken``, the part of the data that a function takes.

    If it takes no inputs, as for an unconditional model, there is one prediction for all examples: their weights do not matter,
    and the number of its terms is the mean of the counts.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if jax.tree.leaves(taken):
        return given
    if "counts" not in given:
        return {}
    counts, weights = jnp.asarray(given["counts"]), given.get("weights")
    return {"counts": 1 / jnp.sum(make_batch(0.0, (counts,), weights, counts=counts).weights, keepdims=True)}
