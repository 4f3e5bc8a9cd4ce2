"""Why a gradient was formed: the reasons that `jaxfisher.explain` shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxfisher._engine.program import Atom, Equation
from jaxfisher._engine.rule import Operand
from jaxfisher._engine.rules import RULES
from jaxfisher._engine.terms import Term

_CONTROL = frozenset({"scan", "while", "cond"})
_FILLS = frozenset({"scatter", "scatter-mul"})
"""Operations without a rule that may build a gradient out of less than half as many numbers."""


def as_large(equation: Equation) -> Sequence[Atom]:
    """The operands as large as the result: one of them may be the gradient that passes through."""
    size = math.prod(equation.shape)
    return [atom for atom, shape in zip(equation.ins, equation.shapes, strict=True) if math.prod(shape) == size]


def why_formed(equation: Equation, operands: Sequence[Operand]) -> str | None:
    """Why a gradient was formed here or before; None if forming it takes no more memory than the program does anyway."""
    size = math.prod(equation.shape)
    # A contraction ends an earlier reason, and so does a value of this size that the program has anyway.
    free = equation.primitive.name == "dot_general" or any(
        operand.flags and not operand.reason and operand.unformed is None and math.prod(shape) >= size
        for operand, shape in zip(operands, equation.shapes, strict=True)
    )
    before = None if free else next((operand.reason for operand in operands if operand.reason), None)
    if before is None and _costs(equation, operands):
        return f"no rule takes the outer product through `{equation.primitive.name}`"
    return before


def _costs(equation: Equation, operands: Sequence[Operand]) -> bool:
    """Whether forming a gradient here makes an array larger than any that the program has anyway."""
    name, size = equation.primitive.name, math.prod(equation.shape)
    if not any(operand.flags for operand in operands):
        return False
    if name in _CONTROL:
        return True
    varying = [(operand, math.prod(s)) for operand, s in zip(operands, equation.shapes, strict=True) if operand.flags]
    arrays = [count for operand, count in varying if operand.unformed is None]
    unformed = [operand.unformed for operand, _ in varying if operand.unformed is not None]
    if name in _FILLS or (name in RULES and RULES[name].builds):
        sizes = arrays + [sum(map(_numbers, value.terms)) for value in unformed]
        return size > 2 * (sum(sizes) if name == "concatenate" else max(sizes, default=0))
    return size > max(arrays, default=0) and any(value.is_large for value in unformed)


def _numbers(term: Term) -> int:
    """The size of a term, counting only factors that depend on the example or row.

    It is the size of these factors together, or of the value if that is smaller because a sum has not been taken yet.
    """
    factors = [factor for factor in term.factors if factor.flags]
    own = {axis for axes in term.dims for axis in axes} & {axis for factor in factors for axis in factor.axes}
    return min(sum(factor.size for factor in factors), math.prod(axis.size for axis in own))
