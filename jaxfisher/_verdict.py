"""Verdicts: properties that must hold, each with the number that was found and its tolerance, as a table."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple


class Check(NamedTuple):
    """One property that must hold.

    Attributes:
        name: what is measured.
        value: the number that is furthest off, relative to its tolerance.
        expected: the right number.
        tolerance: how far off the number may be by rounding, by the remainder of a limit, or by chance.
        passed: whether ``value`` is within its tolerance; None if the numbers do not decide.
    """

    name: str
    value: float
    expected: float
    tolerance: float
    passed: bool | None


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Verdict:
    """Checks with a common verdict; ``print`` it for a table.

    Attributes:
        checks: one entry for each property that must hold.
        notes: why a check could not be decided.
    """

    agreement: ClassVar[str] = "every law holds"
    """The finding if no check failed."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.passed is False)

    @property
    def undecided(self) -> tuple[str, ...]:
        """The names of the checks that could not be decided."""
        return tuple(check.name for check in self.checks if check.passed is None)

    def _failure(self) -> str:
        return "; ".join(self.failed)

    def __str__(self) -> str:
        said = {True: "ok", False: "FAILED", None: "not told"}
        lines = [f"{'check':36}{'found':>12}{'expected':>10}{'within':>10}"]
        lines += [f"{c.name:36}{c.value:>12.6g}{c.expected:>10.3g}{c.tolerance:>10.2g}  {said[c.passed]}" for c in self.checks]
        agrees = f"passed: {self.agreement}" + ", as far as could be told" * bool(self.notes)
        verdict = agrees if self.passed else f"FAILED: {self._failure()}"
        return "\n".join([*lines, verdict, *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        said = "passed" if self.passed else f"failed: {'; '.join(self.failed)}"
        return f"{type(self).__name__}({said})"
