"""A jaxpr as a flat list of equations, with calls inlined and dead code removed.

`flatten` inlines ``jit``, ``checkpoint`` and the like, so wrapping a model in them changes nothing for the rest of the engine.
Variables are numbers, since one inner jaxpr may be called many times. Each control flow operation stays one equation; that of a
``scan`` also has the flattened body.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, primitives

from jaxfisher._dataflow import is_reference

Atom = int | Literal
"""A variable's number, or a constant written into the program."""

_CALLS = {
    primitives.jit_p: "jaxpr",
    primitives.remat_p: "jaxpr",
    primitives.closed_call_p: "call_jaxpr",
    primitives.call_p: "call_jaxpr",
}
"""Primitives that only call a jaxpr, and the parameter that holds it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation, the variables it reads and writes, and for a scan its body."""

    source: JaxprEqn
    ins: tuple[Atom, ...]
    outs: tuple[int, ...]
    body: Program | None = None

    @property
    def primitive(self) -> Primitive:
        """The operation."""
        return self.source.primitive

    @property
    def params(self) -> dict[str, Any]:
        """The operation's static arguments."""
        return self.source.params

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the operands."""
        return [_shape(var) for var in self.source.invars]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return _shape(self.source.outvars[0])

    @property
    def result_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        return [_shape(var) for var in self.source.outvars]

    @property
    def dtypes(self) -> list[Any]:
        """The dtypes of the operands."""
        return [dtype_of(var) for var in self.source.invars]

    @property
    def result_dtypes(self) -> list[Any]:
        """The dtypes of all results."""
        return [dtype_of(var) for var in self.source.outvars]

    @property
    def loop(self) -> tuple[int, int]:
        """How many operands of a scan are constants, and how many are carried.

        The counts are read off the ranks, which do not depend on the version of JAX: an array that is scanned over has one axis
        more outside the body than inside.
        """
        assert self.body is not None
        ranks = [len(shape) for shape in self.body.shapes], [len(shape) for shape in self.body.result_shapes]
        operands = sum(len(shape) == rank for shape, rank in zip(self.shapes, ranks[0], strict=True))
        carries = sum(len(_shape(var)) == rank for var, rank in zip(self.source.outvars, ranks[1], strict=True))
        return operands - carries, carries

    @property
    def has_references(self) -> bool:
        """Whether the operation makes, reads or writes a `jax.Ref`, so that its order and the number of its runs matter."""
        return any(map(is_reference, (*self.source.invars, *self.source.outvars)))

    @property
    def variables(self) -> list[int]:
        """The variables that the equation reads."""
        return [atom for atom in self.ins if isinstance(atom, int)]

    def bind(self, values: Sequence[Any]) -> list[Any]:
        """Run the operation on these operands."""
        result = self.primitive.bind(*values, **self.primitive.get_bind_params(self.params))
        return list(result) if self.primitive.multiple_results else [result]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Equations in order, from inputs and constants to outputs."""

    inputs: tuple[int, ...]
    constants: dict[int, Any]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    shapes: tuple[tuple[int, ...], ...]
    result_shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The number of entries in all results of the equations together: an upper bound on the memory of one run."""
        return sum(math.prod(_shape(var)) for equation in self.equations for var in equation.source.outvars)

    def needed(self) -> Program:
        """The program without the equations that its outputs do not need; those with side effects stay."""
        live = {atom for atom in self.outputs if isinstance(atom, int)}
        kept = []
        for equation in reversed(self.equations):
            if equation.source.effects or not live.isdisjoint(equation.outs):
                kept.append(equation)
                live.update(equation.variables)
        return dataclasses.replace(self, equations=tuple(reversed(kept)))


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def dtype_of(var: Any) -> Any:
    """The dtype of a variable, or of a constant written into the program."""
    return getattr(var.aval, "dtype", None)


def flatten(closed: ClosedJaxpr) -> Program:
    """The program of a jaxpr."""
    numbers = itertools.count()
    constants = {next(numbers): value for value in closed.consts}
    inputs = tuple(next(numbers) for _ in closed.jaxpr.invars)
    equations: list[Equation] = []
    outputs = _inline(closed.jaxpr, (*constants, *inputs), equations, constants, numbers)
    shapes = [tuple(_shape(var) for var in given) for given in (closed.jaxpr.invars, closed.jaxpr.outvars)]
    return Program(inputs, constants, tuple(equations), tuple(outputs), *shapes).needed()


def _inline(
    jaxpr: Jaxpr, given: Sequence[Atom], equations: list[Equation], constants: dict[int, Any], numbers: Iterator[int]
) -> list[Atom]:
    """Append the equations of a jaxpr whose constants and inputs are ``given``, and return its outputs."""
    names: dict[Any, Atom] = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))

    def atom(var: Any) -> Atom:
        return var if isinstance(var, Literal) else names[var]

    for eqn in jaxpr.eqns:
        ins = tuple(atom(var) for var in eqn.invars)
        if eqn.primitive in _CALLS:
            called = eqn.params[_CALLS[eqn.primitive]]
            inner, consts = (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else (called, ())
            inside = {next(numbers): value for value in consts}
            constants.update(inside)
            names.update(zip(eqn.outvars, _inline(inner, (*inside, *ins), equations, constants, numbers), strict=True))
            continue
        outs = tuple(next(numbers) for _ in eqn.outvars)
        names.update(zip(eqn.outvars, outs, strict=True))
        body = flatten(eqn.params["jaxpr"]) if eqn.primitive is primitives.scan_p else None
        equations.append(Equation(eqn, ins, outs, body))
    return [atom(var) for var in jaxpr.outvars]
