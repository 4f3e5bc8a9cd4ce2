"""The Fisher of a step whose user asked for none in particular: exact products, and views as cheap as they come."""

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
"""The most rows of an example at which the exact Fisher's factors cost about what drawn ones do.

In forward passes, a row of the exact Fisher takes two for its factors and two for their moments. One drawn target takes these
and the pass that gives the distribution it is drawn from, so that it is never the cheaper of the two where there is one row.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Cheap:
    """The curvature of a batch in parts, each made when it is asked for.

    Attributes:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        params: where the curvature is taken.
        inputs: of the batch.
        keywords: the weights, where there are some.
    """

    model: Model
    params: chex.ArrayTree
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]

    def products(self) -> Operator:
        """Products with the exact Fisher."""
        return implicit_fisher(self.model)(self.params, *self.inputs, **self.keywords)

    def factors(self, seed: Any, count: Int[Array, ""]) -> Operator:
        """What views are taken of: the exact Fisher where outputs are few, else one target drawn for each example."""
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
        usual: the Fisher that was asked for, or else the exact one.
        cheap: a cheaper one, for an optimiser that takes it; None where one was asked for.
    """

    usual: Callable[[], Operator]
    cheap: Cheap | None

    def __call__(self) -> Operator:
        return self.usual()


def _rows(model: Model, moving: tuple[bool, ...], params: chex.ArrayTree, inputs: tuple[Any, ...]) -> int:
    """How many rows one example has in the exact Fisher."""
    rows = ExactRows(model, moving)
    return jax.eval_shape(rows.seeds, params, *shape_of_one(inputs)).shape[0]
