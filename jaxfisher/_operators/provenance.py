"""Where a Fisher comes from, as its `repr` says it, and how much went into its mean."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from jaxfisher._examples import Batch
from jaxfisher._pytree import array_fields


@dataclasses.dataclass(frozen=True, repr=False)
class Mean:
    """How a mean is taken: with weights or without, over examples or what they count, and whether a multiple is taken of it.

    ``together`` is true of what is no mean of one term for each example, but is made of such a mean as a whole, as a covariance
    and what is known where other parameters are unknown: of two of these, the mean is not that of all examples.
    """

    weighted: bool = False
    scaled: bool = False
    counted: bool = False
    together: bool = False

    def __str__(self) -> str:
        words = ["scaled"] * self.scaled + ["weighted"] * self.weighted + ["mean over"] + ["the counts of"] * self.counted
        return " ".join(words)

    def __repr__(self) -> str:
        """What JAX shows in its error where two pytrees do not match, such as those that a loop carries in and out."""
        if not self.scaled:
            return f"<{self}>"
        return (
            f"<{self}; a loop that carries a running mean of Fishers must average their arrays, which keeps the structure: "
            "jax.tree.map(lambda mean, new: 0.9 * mean + 0.1 * new, mean, fisher), or jf.merge(mean, fisher)>"
        )


@array_fields("examples", "mass", "parts", repr=False, eq=False)
class Provenance:
    """Where a Fisher comes from: its kind, and what its mean is over.

    Counts are arrays, so that Fishers of different numbers of examples are pytrees of one structure. They are floating, since a
    mean of Fishers, array by array, averages them too.

    Attributes:
        kind: what it is, in words.
        examples: how many examples its mean is over, without those of weight zero; None of an operator that is no mean.
        mass: the sum of the weights of these examples, by which means are merged; without weights, the number of examples;
            with counts, of the weights times the counts.
        mean: how the mean is taken.
        parts: of a sum, the provenances of the terms.
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
        """The number of examples; of a sum, those of all terms; zero of what is no mean."""
        counts = [part.n for part in self.parts] or [jnp.zeros(()) if self.examples is None else jnp.asarray(self.examples)]
        return functools.reduce(lambda a, b: a + b.astype(a.dtype), counts)

    @property
    def together(self) -> bool:
        """Whether it, or a term of it, is of all its examples together."""
        return self.mean.together or any(part.together for part in self.parts)

    def times(self) -> Provenance:
        """The provenance of a multiple."""
        mean = dataclasses.replace(self.mean, scaled=True)
        return dataclasses.replace(self, mean=mean, parts=tuple(part.times() for part in self.parts))

    def as_a_whole(self) -> Provenance:
        """The provenance of what is made of the whole mean, and not term by term."""
        mean = dataclasses.replace(self.mean, together=True)
        return dataclasses.replace(self, mean=mean, parts=tuple(part.as_a_whole() for part in self.parts))

    def plus(self, other: Provenance) -> Provenance:
        """The provenance of a sum."""
        return Provenance("sum", mean=Mean(scaled=True), parts=(self.parts or (self,)) + (other.parts or (other,)))


def mean_over(kind: str, batch: Batch) -> Provenance:
    """The provenance of a mean over a batch."""
    return Provenance(kind, batch.count, batch.total, Mean(batch.weighted, counted=batch.counted))


def check_terms(provenance: Provenance, fisher: Any, caller: str, fix: str) -> None:
    """Raise `TypeError` where the mean of such a Fisher and another is not that of all examples of both."""
    if provenance.together:
        raise TypeError(
            f"{caller}: {fisher} is of all its examples together: a covariance of the score, or a marginal. Of two of these "
            f"the mean is not that of all examples. {fix}"
        )


def _shown(count: chex.Numeric) -> str:
    """The number as it is printed, or a letter where the number is not known, as inside ``jit``."""
    unknown = isinstance(count, jax.core.Tracer) or not isinstance(count, jax.Array) or count.ndim > 0
    return "n" if unknown else f"{float(count):,.0f}"
