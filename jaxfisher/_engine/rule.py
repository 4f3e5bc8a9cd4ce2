r"""What a rule of the engine is: one record for one primitive.

A rule is linear over the reals in the operands that it takes unformed. `holds_everywhere` excludes the dtypes in which that
fails for every primitive. A rule declines an equation that it does not cover, and the value is formed in the ordinary way,
which is always right. Every rule satisfies one law, which ``tests/test_rules.py`` checks: *forming the terms that a rule
returns gives the same value as applying the primitive to the formed operands.*
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxfisher._engine.program import Equation
from jaxfisher._engine.terms import Term, Unformed, whole

EXAMPLE, ROW = 1, 2
"""Flags: a value depends on the example; a value depends on the row among the example's rows."""

Value = Array | Unformed
Terms = tuple[Term, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """One operand of an equation.

    Attributes:
        value: the array, or a sum of terms that stands for it.
        flags: whether the value depends on the example, and on the row.
        reason: why a gradient in the value had to be formed, if one had to be.
        is_zero: whether the operand is a zero written into the program.
        arranged: the value as a rearrangement, and perhaps a cast, of one whose sums are outputs as well, as those of a layer's
            cotangent are for a bias.
    """

    value: Value
    flags: int
    reason: str | None = None
    is_zero: bool = False
    arranged: Term | None = None

    @property
    def unformed(self) -> Unformed | None:
        """The value if it is not formed, else None."""
        return self.value if isinstance(self.value, Unformed) else None

    @property
    def one_factor(self) -> Term | None:
        """The value as a term of one factor, over what it rearranges if that is known; None for products and sums."""
        found = (self.arranged,) if self.arranged is not None else self.terms()
        return found[0] if len(found) == 1 and len(found[0].factors) == 1 and found[0].factors[0].plain is not None else None

    @property
    def is_whole(self) -> bool:
        """Whether the value is an ordinary array, or terms that hold no fewer numbers than it has."""
        return not any(term.is_smaller for term in self.terms()) and bool(self.terms())

    def array(self) -> Array:
        """The value, formed."""
        array: Array = self.value.formed() if isinstance(self.value, Unformed) else as_array(self.value)
        return array

    def terms(self) -> Terms:
        """The value as a sum of terms; an ordinary array is a term of one factor."""
        return self.value.terms if isinstance(self.value, Unformed) else (whole(self.array(), self.flags, self.reason),)


def as_array(value: Any) -> Any:
    """The value as an array. An array is returned as the same object: the identity shows that a bias has its layer's cotangent.

    On a mesh, `jnp.asarray` of JAX 0.10.0 makes another object.
    """
    return value if isinstance(value, jax.Array | np.ndarray | jax.Ref) else jnp.asarray(value)


Apply = Callable[[Equation, Sequence[Operand]], Sequence[Terms] | None]
"""From an equation and its operands to the terms of each result; None if the results have to be formed."""


def _first(equation: Equation, flags: Sequence[int]) -> Sequence[int]:
    return (0,)


def all_operands(equation: Equation, flags: Sequence[int]) -> Sequence[int]:
    return range(len(equation.ins))


def nothing(equation: Equation, flags: Sequence[int]) -> Sequence[int]:
    return ()


def _always(equation: Equation) -> bool:
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """What the engine knows of one primitive.

    Attributes:
        primitive: the primitive's name.
        apply: what the primitive does to terms.
        takes: from an equation and the flags of its operands to the positions of the operands that are taken unformed.
        holds: whether the rule covers an equation (its dtypes, ranks, axes), beyond what `holds_everywhere` asks of all rules.
        builds: whether the primitive may build a value out of less than half as many numbers, so that forming the value costs
            memory.
        arranges: whether the primitive, unless it repeats them, only rearranges or adds up the entries of its operands. At
            the end of a program such a rule takes ordinary arrays too, so that the gradient of a bias is recognised as the
            cotangent of its layer.
    """

    primitive: str
    apply: Apply
    takes: Callable[[Equation, Sequence[int]], Sequence[int]] = _first
    holds: Callable[[Equation], bool] = _always
    builds: bool = False
    arranges: bool = False

    def __call__(self, equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
        """The terms of each result, or None if the equation has to be run on formed operands."""
        if not (holds_everywhere(equation) and self.holds(equation)):
            return None
        made = self.apply(equation, operands)
        if made is None or not all(map(_fits, made, equation.result_shapes)):
            return None
        return made


NUMBERS = frozenset(
    np.dtype(name) for name in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
)
"""The dtypes between which a cast is linear, up to rounding.

Casts to integers, booleans and the narrow floats are step functions."""


def holds_everywhere(equation: Equation) -> bool:
    """What every rule requires: dtypes with linear arithmetic, and no empty arrays, which have no products to keep unformed."""
    results = all(dtype in NUMBERS for dtype in equation.result_dtypes)
    return results and equation.dtypes[0] in NUMBERS and all(0 not in s for s in (*equation.shapes, *equation.result_shapes))


def _fits(made: Terms, shape: tuple[int, ...]) -> bool:
    return all(tuple(math.prod(axis.size for axis in axes) for axes in term.dims) == shape for term in made)


def every(made: Any) -> Terms | None:
    """The terms, or None if one of them is None."""
    found = tuple(made)
    return None if any(term is None for term in found) else found


def one_result(made: Terms | None) -> Sequence[Terms] | None:
    return None if made is None else (made,)


def each(change: Callable[[Term, Mapping[str, Any]], Term | None]) -> Apply:
    """A rule for a linear map of the first operand alone. It acts on each term if that operand is unformed."""

    def apply(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
        value = operands[0].unformed
        return None if value is None else one_result(every(change(term, equation.params) for term in value.terms))

    return apply
