r"""The machine: runs a gradient's program, stopped one operation short of the gradients of the weights.

The gradient of a weight that enters a ``dot_general`` ends, in the gradient's own jaxpr, in an outer product ``a (x) g`` (a sum
of T of them if the weight is shared over T positions). `run` runs the program up to that operation: it marks the values from
which operations with rules lead to some parameter's gradient, leaves those that are products unformed, and applies the rules to
them. A value that no rule covers is formed as usual, and the machine records why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from jaxfisher._engine.loops import run_loop, spread
from jaxfisher._engine.program import Atom, Equation, Program, dtype_of
from jaxfisher._engine.reasons import as_large, why_formed
from jaxfisher._engine.rule import Operand, Value
from jaxfisher._engine.rules import RULES, arranges, rearranged
from jaxfisher._engine.terms import Term, Unformed, whole


class Output(NamedTuple):
    """One output of a program: its value, its flags, and, if it is a gradient that had to be formed, the reason."""

    value: Value
    flags: int
    reason: str | None


def run(program: Program, values: Sequence[Any], flags: Sequence[int], wanted: Sequence[bool] | None = None) -> list[Output]:
    """Run a program on inputs with these flags, leaving its outputs unformed where rules allow.

    Outputs that are not ``wanted`` unformed may be formed on the way.
    """
    return _Machine(program, values, flags, wanted or [True] * len(program.outputs)).outputs


class _Machine:
    """One run of a program: the value of each variable, its flags, and the reason if it had to be formed."""

    def __init__(self, program: Program, values: Sequence[Any], flags: Sequence[int], wanted: Sequence[bool]) -> None:
        self.flags = spread(program, flags)
        self.environment: dict[int, Value] = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
        self.reasons: dict[int, str] = {}
        self.arranged: dict[int, Term] = {}
        self.wanted = self._wanted(program, wanted)
        self.shown, self.opened = _ends(program)
        self.formed = self._formed(program)
        for equation in program.equations:
            self._step(equation)
        self.outputs = [self._output(atom) for atom in program.outputs]

    def _wanted(self, program: Program, wanted: Sequence[bool]) -> set[int]:
        """The variables worth leaving unformed: operations with rules lead from them to a wanted output."""
        found = {atom for atom, flag in zip(program.outputs, wanted, strict=True) if flag and isinstance(atom, int)}
        for equation in reversed(program.equations):
            if not found.isdisjoint(equation.outs):
                found.update(atom for atom in self._taken(equation) if isinstance(atom, int))
        return found

    def _taken(self, equation: Equation) -> Sequence[Atom]:
        """The operands that the equation takes unformed."""
        if equation.body is not None:
            consts, carries = equation.loop
            return equation.ins[consts : consts + carries]
        if equation.primitive.name in RULES:
            rule = RULES[equation.primitive.name]
            return [equation.ins[k] for k in rule.takes(equation, [self._flag(atom) for atom in equation.ins])]
        # Without a rule the operands are left unformed nevertheless, so that forming them here is noticed and reported.
        return as_large(equation)

    def _formed(self, program: Program) -> set[int]:
        """The variables that some equation takes as arrays, so that they are formed in any case."""
        found: set[int] = set()
        for equation in program.equations:
            ruled = equation.body is not None or equation.primitive.name in RULES
            taken = self._taken(equation) if ruled and not self.wanted.isdisjoint(equation.outs) else ()
            found.update(atom for atom in equation.variables if atom not in taken)
        return found

    def _flag(self, atom: Atom) -> int:
        return 0 if isinstance(atom, Literal) else self.flags[atom]

    def _operand(self, atom: Atom) -> Operand:
        if isinstance(atom, Literal):
            number: Any = np.asarray(atom.val, dtype_of(atom))
            return Operand(number, 0, is_zero=number.ndim == 0 and bool(number == 0))
        return Operand(self.environment[atom], self.flags[atom], self.reasons.get(atom), arranged=self.arranged.get(atom))

    def _output(self, atom: Atom) -> Output:
        operand = self._operand(atom)
        value = operand.value if isinstance(operand.value, Unformed) else operand.array()
        return Output(value, operand.flags, operand.reason)

    def _step(self, equation: Equation) -> None:
        operands = [self._operand(atom) for atom in equation.ins]
        wanted = [out in self.wanted for out in equation.outs]
        results = self._unformed(equation, operands, wanted) if any(wanted) else None
        if results is None:
            results = equation.bind([operand.array() for operand in operands])
            if any(wanted) and (why := why_formed(equation, operands)) is not None:
                self.reasons.update((out, why) for out in equation.outs)
        self.environment.update((out, self._settled(out, value)) for out, value in zip(equation.outs, results, strict=True))
        given = equation.ins[0] if equation.ins else None
        if isinstance(given, int) and (given in self.shown or given in self.arranged):
            made = rearranged(equation, operands[0])
            if made is not None:
                self.arranged[equation.outs[0]] = made

    def _settled(self, out: int, value: Value) -> Value:
        """The value, formed if it is a cotangent that is needed as an array, such as that of a head of an attention.

        The gradient of a bias is then recognised as a sum of that array. A cotangent that is the same at all positions, as
        before a mean over them, is a sum over repeated entries.
        """
        if not isinstance(value, Unformed) or not (out in self.shown and out in self.formed) or value.is_large:
            return value
        return value.formed() if value.is_product or value.repeats else value

    def _unformed(self, equation: Equation, operands: list[Operand], wanted: Sequence[bool]) -> Sequence[Value] | None:
        """The results of an equation by the rules; None if the equation has to be run."""
        if equation.body is not None:
            results, why = run_loop(equation, operands, wanted, run)
            self.reasons.update((out, said) for out, said in zip(equation.outs, why, strict=False) if said is not None)
            return results
        rule = RULES.get(equation.primitive.name)
        if rule is None:
            return None
        if equation.outs[0] in self.opened:
            operands = [_laid_open(operand) for operand in operands]
        made = rule(equation, operands)
        if made is None:
            return None
        formed = _Once(equation, operands)
        return [Unformed(terms, partial(formed.result, k)) for k, terms in enumerate(made)]


class _Once:
    """An equation that runs on formed operands once, when one of its results is first needed."""

    def __init__(self, equation: Equation, operands: Sequence[Operand]) -> None:
        self._equation, self._operands, self._results = equation, operands, list[Any]()

    def result(self, k: int) -> Any:
        """One of the equation's results."""
        if not self._results:
            self._results = self._equation.bind([operand.array() for operand in self._operands])
        return self._results[k]


def _laid_open(operand: Operand) -> Operand:
    """An ordinary array as a term of one factor, which remembers the array as its source when it is rearranged."""
    if operand.unformed is not None:
        return operand
    array = operand.array()
    value = Unformed((whole(array, operand.flags, operand.reason),), lambda: array)
    return dataclasses.replace(operand, value=value)


class _Ends(NamedTuple):
    """The variables that become an output by rearrangements and sums alone, and those of them to lay open on the way."""

    shown: set[int]
    opened: set[int]


def _ends(program: Program) -> _Ends:
    shown = {atom for atom in program.outputs if isinstance(atom, int)}
    opened: set[int] = set()
    needed: set[int] = set()
    for equation in reversed(program.equations):
        # A sum that is needed elsewhere is a value of its own, as a cotangent is that comes from two places.
        sums = equation.primitive.name == "add_any"
        opens = arranges(equation) and not shown.isdisjoint(equation.outs) and not (sums and equation.outs[0] in needed)
        if opens:
            shown.update(equation.variables)
            opened.update(equation.outs)
        if not opens or not needed.isdisjoint(equation.outs):
            needed.update(equation.variables)
    return _Ends(shown, opened)
