"""Which results of a function depend on which of its arguments, read from its jaxpr without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal, primitives

_CALLS = {primitives.jit_p: "jaxpr", primitives.remat_p: "jaxpr", primitives.closed_call_p: "call_jaxpr"}
"""Primitives that only call a jaxpr, and the parameter that holds it."""

Places = frozenset[int]


def moved_by(function: Callable[..., Any], *args: Any) -> tuple[Places, ...]:
    """For each leaf of the result, the indices of those leaves of the arguments by which its derivative may be nonzero.

    By all other leaves the derivative is zero. The arguments may be `jax.ShapeDtypeStruct` objects.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return tuple(_through(jaxpr, [frozenset({place}) for place in range(len(jaxpr.invars))]))


def is_reference(var: Any) -> bool:
    """Whether a variable of a jaxpr is a `jax.Ref`, an array that operations write to."""
    return hasattr(var.aval, "inner_aval")


def _through(jaxpr: Jaxpr, given: Sequence[Places]) -> list[Places]:
    found: dict[Any, Places] = dict(zip(jaxpr.invars, given, strict=True))

    def of(var: Any) -> Places:
        return frozenset() if isinstance(var, Literal) else found.get(var, frozenset())

    for equation in jaxpr.eqns:
        inputs = [of(var) for var in equation.invars]
        references = [var for var in equation.invars if is_reference(var)]
        if references:
            # The operation may write any of its operands to a `jax.Ref`.
            outputs = [frozenset().union(*inputs)] * len(equation.outvars)
            found.update(dict.fromkeys(references, frozenset().union(*inputs)))
        elif equation.primitive in _CALLS:
            inner = equation.params[_CALLS[equation.primitive]]
            outputs = _through(getattr(inner, "jaxpr", inner), inputs)
        elif equation.primitive is primitives.stop_gradient_p:
            outputs = [frozenset()]
        else:
            outputs = [frozenset().union(*inputs)] * len(equation.outvars)
        found.update(zip(equation.outvars, outputs, strict=True))
    return [of(var) for var in jaxpr.outvars]
