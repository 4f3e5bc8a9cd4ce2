"""Where a Fisher comes from, as its `repr` says it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, repr=False)
class Provenance:
    """Where a Fisher comes from: its kind, how many examples its mean is over, and how the mean is taken."""

    kind: str
    examples: int
    weighted: bool = False
    scaled: bool = False
    parts: tuple[Provenance, ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return " + ".join(f"({part})" for part in self.parts)
        if not self.examples:
            return self.kind
        words = ["scaled"] * self.scaled + ["weighted"] * self.weighted + ["mean"]
        return f"{self.kind}, {' '.join(words)} over {self.examples:,}"

    def __repr__(self) -> str:
        """What JAX shows in its error where two pytrees do not match, such as those that a loop carries in and out."""
        if not (self.parts or self.scaled):
            return f"<{self}>"
        return (
            f"<{self}; a loop that carries a running mean of Fishers must average their arrays, which keeps the structure: "
            "jax.tree.map(lambda mean, new: 0.9 * mean + 0.1 * new, mean, fisher)>"
        )

    def times(self) -> Provenance:
        """The provenance of a multiple."""
        return dataclasses.replace(self, scaled=True, parts=tuple(part.times() for part in self.parts))

    def plus(self, other: Provenance) -> Provenance:
        """The provenance of a sum."""
        parts = (self.parts or (self,)) + (other.parts or (other,))
        return Provenance("sum", sum(part.examples for part in parts), parts=parts)
