"""Programs compiled once: a call outside ``jit`` costs a compilation the first time only, and keeps nothing afterwards.

JAX compiles control flow anew for every new function object, and a closure is a new one at each call. So what a public
function computes goes through a function that is jitted once for all: `once` for functions of arrays and operators, `once_for`
for what also takes a function of the user's. Inside ``jit`` nothing changes: such programs are traced inline.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxfisher._automatic import automatic
from jaxfisher._readings import Around, hashable, readings
from jaxfisher._varying import cond, while_loop

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static(Generic[T]):
    """An argument of a program that it is compiled for, such as a number of rows: one program for each value."""

    value: T


def once(function: Callable[P, R], examples: Callable[..., Any] | None = None) -> Callable[P, R]:
    """A function of pytrees as one program for each structure and shape of its arguments, given by position.

    Arguments that JAX cannot take are left to the function itself, which knows what to say of them. ``examples`` takes the
    arguments and gives those with rows for each example, where the results have such rows too.
    """
    program = jax.jit(automatic(function, examples), inline=True)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = program(*args) if not kwargs and _can_cross(args) else function(*args, **kwargs)
        return result

    return call


def _can_cross(args: Sequence[Any]) -> bool:
    """Whether arguments can go into a program: numbers for leaves, and structures that can be compared."""
    leaves, structure = jax.tree.flatten(args)
    return all(map(_is_number, leaves)) and hashable(structure)


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind in "biufc" and leaf.dtype.isnative and leaf.dtype.char not in _LONG_DOUBLES
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


_LONG_DOUBLES = np.dtype(np.longdouble).char + np.dtype(np.clongdouble).char
"""NumPy's codes of what is wider than JAX has."""


def once_for(function: Callable[P, R], examples: Callable[..., Any] | None = None) -> Callable[P, R]:
    """`once` for a function whose first argument is the user's, or is `Around` it: one program for each such function.

    ``examples`` is given the other arguments.

    A program is found again by the user's function, and forgotten with it: neither it nor what it closes over is kept alive.
    Where something that the function reads by name is bound to something else, as happens in notebooks and by setting an
    attribute, the program is made again. Numbers that are changed inside an array of NumPy are not seen.
    """
    programs: dict[Hashable, _Program] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        of, *rest = args
        owners: list[Any] = []
        key = _reference(of, owners)
        if key is None or kwargs or not _can_cross(rest):
            return function(*args, **kwargs)
        reads = readings(of)
        program = programs.get(key)
        if program is None:
            for owner in owners:
                weakref.finalize(owner, programs.pop, key, None).atexit = False
        if program is None or program.reads != reads:
            program = programs[key] = _Program(function, examples, reads)
        result: R = program(of, rest)
        return result

    return call


class _Program:
    """A jitted function of which the first argument is there only during calls: tracing happens in them."""

    def __init__(self, function: Callable[..., Any], examples: Callable[..., Any] | None, reads: tuple[Hashable, ...]) -> None:
        self.reads = reads
        self._given = threading.local()

        def run(*rest: Any) -> Any:
            return function(self._given.of, *rest)

        self._jitted = jax.jit(automatic(run, examples), inline=True)

    def __call__(self, of: Any, rest: Sequence[Any]) -> Any:
        outer = getattr(self._given, "of", None)
        self._given.of = of
        try:
            return self._jitted(*rest)
        finally:
            self._given.of = outer


def _reference(of: Any, owners: list[Any]) -> Hashable:
    """What a function is found again by, without keeping it alive; None if that cannot be. Adds what must live for it."""
    if isinstance(of, Around):
        parts = tuple(_reference(part, owners) for part in vars(of).values())
        return None if None in parts else (type(of), *parts)
    if isinstance(of, (int, tuple)):
        return of
    try:
        reference = weakref.WeakMethod(of) if isinstance(of, types.MethodType) else weakref.ref(of)
        hash(reference)
    except TypeError:
        return None
    owners.append(of.__self__ if isinstance(of, types.MethodType) else of)
    return reference


def either(flag: bool | Bool[Array, ""], yes: Callable[[], R], no: Callable[[], R]) -> R:
    """`cond`. Outside ``jit`` the flag is known: one branch runs, and nothing is compiled."""
    if isinstance(flag, jax.core.Tracer):
        return cond(flag, yes, no)
    return yes() if flag else no()


def renewed(flag: bool | Bool[Array, ""], make: Callable[[T], T], held: T) -> T:
    """``make(held)`` where the flag is true, else what is held, which is passed on as it is.

    It is a loop of one turn at most, since a conditional copies what one of its branches passes on.
    """
    if not isinstance(flag, jax.core.Tracer):
        return make(held) if flag else held
    start: tuple[Bool[Array, ""], T] = flag, held
    return while_loop(lambda state: state[0], lambda state: (jnp.zeros_like(flag), make(state[1])), start)[1]


def repeat(going: Callable[[T], Bool[Array, ""]], step: Callable[[T], T], start: T) -> T:
    """`while_loop`. Outside ``jit`` it is known when to stop: steps are taken one by one, and nothing is compiled."""
    state = start
    while True:
        flag = going(state)
        if isinstance(flag, jax.core.Tracer):
            return while_loop(going, step, start)
        if not flag:
            return state
        state = step(state)
