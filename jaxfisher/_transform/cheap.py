"""The Fisher of a step whose user asked for none in particular: exact products, and views as cheap as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
from jaxtyping import PRNGKeyArray

from jaxfisher._examples import shape_of_one
from jaxfisher._fisher import exact_fisher, implicit_fisher, sampled_fisher
from jaxfisher._model import Model
from jaxfisher._operators.operator import Operator
from jaxfisher._row_functions import ExactRows, prediction

FEW_ROWS = 2
"""The most rows of an example at which the exact Fisher's factors cost about what drawn ones do.

In forward passes, a row of the exact Fisher takes two for its factors and two for their moments. One drawn target takes these
and the pass that gives the distribution it is drawn from, so that it is never the cheaper of the two where there is one row.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Offered:
    """The curvature that a training step offers, as a function of no arguments.

    Attributes:
        usual: the Fisher that was asked for, or else the exact one.
        cheap: from a key to a cheaper Fisher, for an optimiser that takes one; None where one was asked for.
    """

    usual: Callable[[], Operator]
    cheap: Callable[[PRNGKeyArray], Operator] | None

    def __call__(self) -> Operator:
        return self.usual()


def cheap_fisher(model: Model, params: chex.ArrayTree, key: PRNGKeyArray, *inputs: Any, **weights: Any) -> Operator:
    """Exact products, with views of the exact Fisher where outputs are few, else of one target drawn for each example."""
    if _rows(model, params, inputs) <= FEW_ROWS:
        return exact_fisher(model)(params, *inputs, **weights)
    drawn = sampled_fisher(model)(params, key, *inputs, **weights)
    return implicit_fisher(model)(params, *inputs, views_of=drawn, **weights)


def _rows(model: Model, params: chex.ArrayTree, inputs: tuple[Any, ...]) -> int:
    """How many rows one example has in the exact Fisher."""
    rows = ExactRows(model, prediction(model, params, inputs).moving)
    return jax.eval_shape(rows.seeds, params, *shape_of_one(inputs)).shape[0]
