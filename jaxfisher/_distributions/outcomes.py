"""What a distribution of another library can draw, where these are finitely many values known when it is traced.

A sum over them is exact where a library's own KL is missing, wrong, or holds a function of the parameters for a parameter.
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
"""More outcomes than these are not summed over."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Values of one draw, stacked along a leading axis; hashable, so that they may be static."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str

    @property
    def values(self) -> np.ndarray:
        """The array."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


def outcomes_of(obj: Any, library: str) -> Outcomes | None:
    """The outcomes of a distribution of distrax, NumPyro or TFP; None where they are not known to be finitely many."""
    listed = _LISTED.get((library, type(obj).__name__), _enumerated)
    values = listed(obj)
    if values is None or not 0 < len(values) <= MOST:
        return None
    values = np.ascontiguousarray(values)
    return Outcomes(values.tobytes(), values.shape, str(values.dtype))


def _enumerated(obj: Any) -> np.ndarray | None:
    """The support by NumPyro's own protocol, where draws are single numbers; None elsewhere."""
    if not getattr(obj, "has_enumerate_support", False) or obj.event_shape:
        return None
    try:
        # JAX makes the result, which must be a constant even while a model is traced.
        with jax.ensure_compile_time_eval():
            values = np.asarray(obj.enumerate_support(expand=False))
    except (NotImplementedError, jax.errors.ConcretizationTypeError):
        # The support differs between members of the batch, or depends on a number that is traced.
        return None
    return values.reshape(-1)


def _up_to(last: Any) -> np.ndarray | None:
    """``0, 1, ..., last`` where ``last`` is one number that is known now; else None."""
    known = _known(last)
    return None if known is None else np.arange(known + 1)


def _known(value: Any) -> int | None:
    """The number that all entries of an array are; None where they differ or are traced."""
    if isinstance(value, jax.core.Tracer):
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
    """A parameter as TFP was given it, which is no array of JAX where it was a number."""
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
    ("TFP", "ProbitBernoulli"): lambda d: np.arange(2),
    ("TFP", "Binomial"): lambda d: _up_to(_given(d, "total_count")),
    ("TFP", "BetaBinomial"): lambda d: _up_to(_given(d, "total_count")),
    ("TFP", "Multinomial"): lambda d: _compositions(_given(d, "total_count"), d.event_shape[-1]),
    ("TFP", "DirichletMultinomial"): lambda d: _compositions(_given(d, "total_count"), d.event_shape[-1]),
}
"""Those that do not tell by themselves. Members of a batch have the same outcomes."""
