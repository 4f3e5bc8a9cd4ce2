"""The curvature of a training step that was given no Fisher: products with the exact one, and the cheapest factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
from jaxtyping import Array, Int

from jaxfisher._draws import draw_keys
from jaxfisher._examples import map_examples, num_examples, shape_of_one
from jaxfisher._fisher import drawn_fisher, exact_fisher, implicit_fisher
from jaxfisher._model import Model, predict
from jaxfisher._operators.operator import Operator
from jaxfisher._row_functions import ExactRows, prediction
from jaxfisher._transform.turns import forward_cost

FEW_ROWS = 2
"""The most rows an example may have for the exact Fisher's factors to cost about as much as those of a drawn target.

A row of the exact Fisher takes two forward passes for its factors and two for their moments. A drawn target takes the same and
one more pass for the distribution that it is drawn from. So with one row the exact factors are never dearer.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Cheap:
    """The curvature of a batch in parts, each made only when the optimiser asks for it.

    Attributes:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        params: the parameters at which the curvature is taken.
        inputs: the inputs of the batch.
        keywords: the weights, if there are any.
    """

    model: Model
    params: chex.ArrayTree
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]

    def products(self) -> Operator:
        """Products with the exact Fisher."""
        return implicit_fisher(self.model)(self.params, *self.inputs, **self.keywords)

    def factors(self, seed: Any, count: Int[Array, ""]) -> Operator:
        """The Fisher that views are taken of: the exact one for few outputs, else that of one drawn target per example."""
        known = prediction(self.model, self.params, self.inputs)
        if _rows(self.model, known.moving, self.params, self.inputs) <= FEW_ROWS:
            return exact_fisher(self.model)(self.params, *self.inputs, **self.keywords)
        keys = draw_keys(seed, count, num_examples(self.inputs, "data"), hashed=known.takes_any_key)
        return drawn_fisher(self.model, self.params, keys, self.inputs, **self.keywords)

    def forward_cost(self) -> float:
        """The operations of a forward pass over the batch."""
        predicted = lambda params, inputs: map_examples(partial(predict, self.model), params, inputs)  # noqa: E731
        return forward_cost(predicted, self.params, self.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Offered:
    """The curvature that a training step offers, as a function of no arguments.

    Attributes:
        usual: makes the Fisher that the user gave, or else the exact one.
        cheap: a cheaper curvature for optimisers that can use it; None if the user gave a Fisher.
    """

    usual: Callable[[], Operator]
    cheap: Cheap | None

    def __call__(self) -> Operator:
        return self.usual()


def _rows(model: Model, moving: tuple[bool, ...], params: chex.ArrayTree, inputs: tuple[Any, ...]) -> int:
    """The number of rows of one example in the exact Fisher."""
    rows = ExactRows(model, moving)
    return jax.eval_shape(rows.seeds, params, *shape_of_one(inputs)).shape[0]
