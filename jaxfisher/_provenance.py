"""The provenance of a Fisher: its kind, as `repr` shows it, and the examples in its mean."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Scalar

from jaxfisher._examples import Batch
from jaxfisher._pytree import array_fields


@dataclasses.dataclass(frozen=True, repr=False)
class Mean:
    """How a mean is taken: weighted or not, over examples or over the terms that they count, and whether it was multiplied.

    ``together`` is true if the operator is no mean of one term for each example, but is computed from such a mean as a whole,
    like a covariance or a marginal. The mean of two such operators is not the operator of all examples.
    """

    weighted: bool = False
    scaled: bool = False
    counted: bool = False
    together: bool = False

    def __str__(self) -> str:
        words = ["scaled"] * self.scaled + ["weighted"] * self.weighted + ["mean over"] + ["the counts of"] * self.counted
        return " ".join(words)

    def __repr__(self) -> str:
        """The text that JAX shows in its error for pytrees that do not match, such as the input and output of a loop."""
        if not self.scaled:
            return f"<{self}>"
        return (
            f"<{self}; a loop that carries a running mean of Fishers must average their arrays, which keeps the structure: "
            "jax.tree.map(lambda mean, new: 0.9 * mean + 0.1 * new, mean, fisher), or jf.merge(mean, fisher)>"
        )


@array_fields("examples", "mass", "parts", repr=False, eq=False)
class Provenance:
    """The provenance of a Fisher: its kind, and the examples in its mean.

    Counts are arrays, so that Fishers of different numbers of examples are pytrees of one structure. They are floating, since
    an array-by-array mean of Fishers averages them too.

    Attributes:
        kind: the kind of the operator, in words.
        examples: the number of examples in the mean, without those of weight zero; None if the operator is no mean.
        mass: the weight of the mean when it is merged with another: the sum of the examples' weights, or of weights times
            counts; without weights, the number of examples.
        mean: how the mean is taken.
        parts: the provenances of the terms, for a sum.
    """

    kind: str
    examples: chex.Numeric | None = None
    mass: chex.Numeric | None = None
    mean: Mean = Mean()
    parts: tuple[Provenance, ...] = ()

    def __post_init__(self) -> None:
        if self.examples is None:
            return
        for name, value in (("examples", self.examples), ("mass", self.examples if self.mass is None else self.mass)):
            object.__setattr__(self, name, value if isinstance(value, jax.Array) else jnp.asarray(float(value)))

    def __str__(self) -> str:
        if self.parts:
            return " + ".join(f"({part})" for part in self.parts)
        if self.examples is None:
            return self.kind
        return f"{self.kind}, {self.mean} {_shown(self.examples)}"

    @property
    def n(self) -> Scalar:
        """The number of examples, summed over the terms of a sum; zero if the operator is no mean."""
        counts = [part.n for part in self.parts] or [jnp.zeros(()) if self.examples is None else jnp.asarray(self.examples)]
        return functools.reduce(lambda a, b: a + b.astype(a.dtype), counts)

    @property
    def together(self) -> bool:
        """Whether the operator, or a term of it, is computed from all its examples together; see `Mean`."""
        return self.mean.together or any(part.together for part in self.parts)

    def times(self) -> Provenance:
        """The provenance of a multiple."""
        mean = dataclasses.replace(self.mean, scaled=True)
        return dataclasses.replace(self, mean=mean, parts=tuple(part.times() for part in self.parts))

    def as_a_whole(self) -> Provenance:
        """The provenance of an operator made from the whole mean, and not example by example."""
        mean = dataclasses.replace(self.mean, together=True)
        return dataclasses.replace(self, mean=mean, parts=tuple(part.as_a_whole() for part in self.parts))

    def weighted(self) -> Provenance:
        """The provenance of the same mean, described as a weighted one, whose weights may all be one."""
        return dataclasses.replace(self, mean=dataclasses.replace(self.mean, weighted=True))

    def plus(self, other: Provenance) -> Provenance:
        """The provenance of a sum."""
        return Provenance("sum", mean=Mean(scaled=True), parts=(self.parts or (self,)) + (other.parts or (other,)))


def mean_over(kind: str, batch: Batch) -> Provenance:
    """The provenance of a mean over a batch."""
    return Provenance(kind, batch.count, batch.total, Mean(batch.weighted, counted=batch.counted))


def check_terms(provenance: Provenance, fisher: Any, caller: str, fix: str) -> None:
    """Raise `TypeError` if averaging such a Fisher with another does not give the Fisher of all examples of both."""
    if provenance.together:
        raise TypeError(
            f"{caller}: {fisher} is computed from all its examples together, like a covariance of the score or a marginal, so "
            f"the mean of two such operators is not that of all examples. {fix}"
        )


def _shown(count: chex.Numeric) -> str:
    """The number as it is printed, or the letter n if it is unknown, as inside ``jit``."""
    known = (
        isinstance(count, (jax.Array, np.ndarray, np.generic)) and not isinstance(count, jax.core.Tracer) and count.ndim == 0
    )
    return f"{float(count):,.0f}" if known else "n"
