"""The outcomes of another library's distribution, or the first of them if it counts; known at trace time.

A sum over them is exact even if the library's own KL is missing, wrong, or misses some of the parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

MOST = 4096
"""The most outcomes that are summed over."""
FEWEST = 64
"""The fewest first outcomes that are worth a sum; the members of a batch share the most of them."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The possible values of one draw, stacked along a leading axis; hashable, so that they may be static fields."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str
    beyond: bool = False
    """Whether there are further outcomes, above the last."""

    @property
    def values(self) -> np.ndarray:
        """The array."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


def outcomes_of(obj: Any, library: str) -> Outcomes | None:
    """The outcomes of a distribution of distrax, NumPyro or TFP, or the first of them; None if neither is known."""
    listed = _LISTED.get((library, type(obj).__name__), _enumerated)
    values, beyond = listed(obj), False
    if values is None or not 0 < len(values) <= MOST:
        values, beyond = _counted(obj), True
    if values is None:
        return None
    values = np.ascontiguousarray(values)
    return Outcomes(values.tobytes(), values.shape, str(values.dtype), beyond)


def _counted(obj: Any) -> np.ndarray | None:
    """The first whole numbers of a support that has no end, or one that is not known, by NumPyro's own protocol; else None."""
    support, count = getattr(obj, "support", None), MOST // max(math.prod(obj.batch_shape), 1)
    if obj.event_shape or count < FEWEST or not getattr(support, "is_discrete", False):
        return None
    first = _known(getattr(support, "lower_bound", None))
    return None if first is None else np.arange(first, first + count)


def _enumerated(obj: Any) -> np.ndarray | None:
    """The support by NumPyro's own protocol, if draws are single numbers; else None."""
    if not getattr(obj, "has_enumerate_support", False) or obj.event_shape:
        return None
    try:
        # The result must be a constant even while a model is traced.
        with jax.ensure_compile_time_eval():
            values = np.asarray(obj.enumerate_support(expand=False))
    except (NotImplementedError, jax.errors.ConcretizationTypeError):
        # The support differs between members of the batch, or depends on a traced number.
        return None
    return values.reshape(-1)


def _up_to(last: Any) -> np.ndarray | None:
    """``0, 1, ..., last`` if ``last`` is a single number known at trace time; else None."""
    known = _known(last)
    return None if known is None else np.arange(known + 1)


def _known(value: Any) -> int | None:
    """The common value of all entries of an array; None if they differ or are traced."""
    if value is None or isinstance(value, jax.core.Tracer):
        return None
    entries = np.unique(np.asarray(value))
    return int(entries[0]) if entries.size == 1 else None


def _compositions(total: Any, parts: int) -> np.ndarray | None:
    """All ways to write a whole number as a sum of ``parts`` whole numbers; None if there are too many."""
    count = _known(total)
    if count is None or math.comb(count + parts - 1, parts - 1) > MOST:
        return None
    # Stars and bars: the stars between two bars are one part.
    bars = np.array([*itertools.combinations(range(count + parts - 1), parts - 1)], int).reshape(-1, parts - 1)
    ends = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, count + parts - 1)))
    return np.diff(ends, axis=1) - 1


def _given(obj: Any, name: str) -> Any:
    """A parameter as the user gave it to TFP, so that a number is still no JAX array."""
    return obj.parameters[name]


_LISTED: dict[tuple[str, str], Callable[[Any], np.ndarray | None]] = {
    ("distrax", "OneHotCategorical"): lambda d: np.eye(d.event_shape[-1], dtype=int),
    ("distrax", "Softmax"): lambda d: np.arange(d.num_categories),
    ("distrax", "Greedy"): lambda d: np.arange(d.num_categories),
    ("distrax", "EpsilonGreedy"): lambda d: np.arange(d.num_categories),
    ("distrax", "Multinomial"): lambda d: _compositions(d.total_count, d.event_shape[-1]),
    ("NumPyro", "MultinomialLogits"): lambda d: _compositions(d.total_count, d.event_shape[-1]),
    ("NumPyro", "MultinomialProbs"): lambda d: _compositions(d.total_count, d.event_shape[-1]),
    ("NumPyro", "DirichletMultinomial"): lambda d: _compositions(d.total_count, d.event_shape[-1]),
    ("TFP", "OneHotCategorical"): lambda d: np.eye(d.event_shape[-1], dtype=int),
    ("TFP", "OrderedLogistic"): lambda d: np.arange(np.shape(_given(d, "cutpoints"))[-1] + 1),
    ("TFP", "StoppingRatioLogistic"): lambda d: np.arange(np.shape(_given(d, "cutpoints"))[-1] + 1),
    ("TFP", "ProbitBernoulli"): lambda d: np.arange(2),
    ("TFP", "Binomial"): lambda d: _up_to(_given(d, "total_count")),
    ("TFP", "BetaBinomial"): lambda d: _up_to(_given(d, "total_count")),
    ("TFP", "Multinomial"): lambda d: _compositions(_given(d, "total_count"), d.event_shape[-1]),
    ("TFP", "DirichletMultinomial"): lambda d: _compositions(_given(d, "total_count"), d.event_shape[-1]),
}
"""Outcomes of distributions that do not enumerate their support. All members of a batch have the same outcomes."""
