r"""Loops: a ``scan`` whose body forms products is rewritten to return their factors, stacked over the steps.

A gradient that the loop sums in its carry, ``carry + product``, is taken out of the carry and summed after the loop: each step
is then one position of the product. A gradient that is one of the loop's stacked outputs has the steps as an axis of its own.
``while`` and ``cond`` are run as they are: gradients made in them are formed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array

from jaxfisher._engine.axes import Axis, Origin, dim
from jaxfisher._engine.program import Atom, Equation, Program
from jaxfisher._engine.rule import EXAMPLE, ROW, Operand, Terms, Value
from jaxfisher._engine.terms import Factor, Term, Unformed
from jaxfisher._engine.windows import Windows

Run = Callable[[Program, Sequence[Any], Sequence[int], Sequence[bool]], Sequence[Any]]
"""The type of `machine.run`, which comes as an argument because `machine` imports this file to run loops."""


def spread(program: Program, flags: Sequence[int]) -> dict[int, int]:
    """The flags of every variable, from those of the inputs."""
    found = {**dict.fromkeys(program.constants, 0), **dict(zip(program.inputs, flags, strict=True))}
    for equation in program.equations:
        given = [found[atom] if isinstance(atom, int) else 0 for atom in equation.ins]
        if equation.has_references:
            # What an operation writes to a reference is not among its results.
            found.update(dict.fromkeys(equation.outs, EXAMPLE | ROW))
        elif equation.body is not None:
            found.update(zip(equation.outs, _flags_around(equation, given).outs, strict=True))
        else:
            found.update(dict.fromkeys(equation.outs, reduce(or_, given, 0)))
    return found


class _Flags(NamedTuple):
    """The flags of the inputs and outputs of a loop's body, at the fixed point: another step would not change them."""

    ins: list[int]
    outs: list[int]


def _flags_around(equation: Equation, given: Sequence[int]) -> _Flags:
    body, (consts, carries) = equation.body, equation.loop
    assert body is not None
    inner = list(given)
    while True:
        found = spread(body, inner)
        outs = [found[atom] if isinstance(atom, int) else 0 for atom in body.outputs]
        grown = [a | b for a, b in zip(inner[consts : consts + carries], outs[:carries], strict=True)]
        if grown == inner[consts : consts + carries]:
            # A loop of no steps returns the first carry, so the flags of a carry include those that it starts with.
            return _Flags(inner, [*grown, *outs[carries:]])
        inner[consts : consts + carries] = grown


def run_loop(
    equation: Equation, operands: Sequence[Operand], wanted: Sequence[bool], run: Run
) -> tuple[Sequence[Value] | None, Sequence[str | None]]:
    """The results of a scan, unformed where its body makes products, or None if it makes none.

    Also returned: for each result, the reason if it had to be formed inside the body.
    """
    body, (consts, carries) = equation.body, equation.loop
    assert body is not None
    sums = {k for k in range(carries) if wanted[k] and _only_added_to(body, body.inputs[consts + k], body.outputs[k])}
    asked = [want and (k >= carries or k in sums) for k, want in enumerate(wanted)]
    if not any(asked) or not equation.params["length"] or equation.has_references:
        return None, ()
    loop = _Loop(equation, body, operands, sums, asked, run)
    found = loop.shapes()
    lazy = [ask and isinstance(value, Unformed) and value.is_product for ask, (value, *_) in zip(asked, found, strict=True)]
    return (loop.run_all(lazy) if any(lazy) else None), [why for _, _, why in found]


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """A scan being run. ``sums`` are the carries that are only added to; ``asked`` are the results worth leaving unformed."""

    equation: Equation
    body: Program
    operands: Sequence[Operand]
    sums: set[int]
    asked: list[bool]
    run: Run

    def _given(self) -> tuple[list[Array], list[Array], list[Array]]:
        """The constants, the first carry and the arrays that are scanned over."""
        given = [operand.array() for operand in self.operands]
        consts, carries = self.equation.loop
        return given[:consts], given[consts : consts + carries], given[consts + carries :]

    def _once(self, carry: Sequence[Array], xs: Sequence[Array]) -> Sequence[Any]:
        """One step, with its products unformed. A sum starts at zero in each step, so the step returns only what it adds."""
        flags = _flags_around(self.equation, [operand.flags for operand in self.operands]).ins
        own = [_nothing(x) if k in self.sums else x for k, x in enumerate(carry)]
        return self.run(self.body, [*self._given()[0], *own, *xs], flags, self.asked)

    def shapes(self) -> Sequence[Any]:
        """The results of a step, traced without computing numbers."""
        found: list[Any] = []

        def step(carry: Any, xs: Any) -> tuple[()]:
            found[:] = self._once(carry, xs)
            return ()

        _, carry, xs = self._given()
        jax.eval_shape(lambda carry, xs: step(carry, [x[0] for x in xs]), carry, xs)
        return found

    def run_all(self, lazy: Sequence[bool]) -> list[Value]:
        """The results of all steps; those that are ``lazy`` stay factors."""
        skeletons: dict[int, Terms] = {}
        shown: dict[int, Term] = {}

        def step(carry: Sequence[Array], xs: Sequence[Array]) -> tuple[list[Array], list[Any]]:
            new, stacked = list(carry), list[Any]()
            for k, (value, flags, why) in enumerate(self._once(carry, xs)):
                if lazy[k] and isinstance(value, Unformed):
                    skeletons[k] = value.terms
                    stacked.append([[_array_of(factor) for factor in term.factors] for term in value.terms])
                    continue
                array = value.formed() if isinstance(value, Unformed) else value
                if self.asked[k] and (term := Operand(value, flags, why).one_factor) is not None:
                    shown[k] = term
                if k >= len(new):
                    stacked.append(array)
                else:
                    new[k] = new[k] + array if k in self.sums else array
            return new, stacked

        params = self.equation.params
        _, carry, xs = self._given()
        last, ys = jax.lax.scan(step, carry, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"])
        stacks, sources = iter(ys), _Sources(params["length"])
        results: list[Value] = []
        for k in range(len(self.equation.outs)):
            start = self.operands[self.equation.loop[0] + k].terms() if k in self.sums else ()
            if lazy[k]:
                made = _stacked(skeletons[k], next(stacks), sources, summed=k in self.sums)
                results.append(Unformed((*start, *made), partial(self._formed, k)))
                continue
            array = last[k] if k < len(carry) else next(stacks)
            results.append(array if k not in shown or start else sources.shown(array, shown[k], summed=k in self.sums))
        return results

    def _formed(self, k: int) -> Array:
        """One result of the scan, run as it is written in the program."""
        formed: Array = self.equation.bind([operand.array() for operand in self.operands])[k]
        return formed


class _Sources:
    """Values of a loop's body, stacked over all steps, for factors of results to be rearrangements of.

    No program has such an array unless something needs it: an object stands for it.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._stacks: dict[int, tuple[Any, Any]] = {}

    def origin(self, factor: Factor, array: Array, steps: Axis) -> Origin | None:
        """The origin of a factor that is stacked over the steps of the loop."""
        _, value, own, start = factor.source
        if value is None:
            return None
        # The reference to the value keeps Python from giving its `id` to another object.
        stack = jax.ShapeDtypeStruct((self.length, *value.shape), value.dtype)
        _, stack = self._stacks.setdefault(id(value), (value, stack))
        return Origin(array, stack, {**own, steps: ((self.length, math.prod(value.shape)),)}, start)

    def shown(self, array: Array, term: Term, *, summed: bool) -> Value:
        """A formed result, made of the values of one term in all steps, as a term that knows what it was made of."""
        (factor,), steps = term.factors, Axis(self.length)
        origin = self.origin(factor, array, steps)
        dims = term.dims if summed else ((steps,), *term.dims)
        if origin is None or any(axis not in origin.steps for axes in dims for axis in axes):
            return array
        names = tuple(Axis(size) for size in array.shape)
        own = {name: tuple(s for axis in axes for s in origin.steps[axis]) for name, axes in zip(names, dims, strict=True)}
        made = dataclasses.replace(factor, array=array, axes=names, origin=origin._replace(steps=own))
        return Unformed((Term((made,), tuple(map(dim, names))),), lambda: array)


def _nothing(like: Array) -> Unformed:
    """Zero, as a sum of no terms."""
    return Unformed((), lambda: jnp.zeros_like(like))


def _only_added_to(body: Program, carry: int, out: Atom) -> bool:
    """Whether a body only adds to a carry, any number of times, and reads neither the carry nor the sum otherwise."""
    while carry != out:
        uses = [equation for equation in body.equations if carry in equation.ins]
        if len(uses) != 1 or uses[0].primitive.name not in ("add", "add_any") or uses[0].ins[0] == uses[0].ins[1]:
            return False
        if carry in body.outputs or any(isinstance(atom, Literal) for atom in uses[0].ins):
            return False
        carry = uses[0].outs[0]
    return body.outputs.count(carry) == 1 and not any(carry in equation.ins for equation in body.equations)


def _array_of(factor: Factor) -> Array:
    return factor.array.image if isinstance(factor.array, Windows) else factor.array


def _stacked(found: Terms, stacks: Any, sources: _Sources, *, summed: bool) -> Terms:
    """The terms of all steps. The steps are an axis of every factor, and of the value too unless it is ``summed`` over them."""
    made = []
    for term, arrays in zip(found, stacks, strict=True):
        steps = Axis(sources.length)
        factors = []
        for factor, array in zip(term.factors, arrays, strict=True):
            if isinstance(factor.array, Windows):
                array = jax.vmap(lambda image, w=factor.array: dataclasses.replace(w, image=image).array())(array)
            origin = sources.origin(factor, array, steps)
            factors.append(dataclasses.replace(factor, array=array, axes=(steps, *factor.axes), origin=origin))
        made.append(Term(tuple(factors), term.dims if summed else (dim(steps), *term.dims)))
    return tuple(made)
