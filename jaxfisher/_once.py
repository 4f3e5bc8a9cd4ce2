"""Programs compiled once: a call outside ``jit`` compiles only the first time, and keeps no user's function or data alive.

JAX recompiles control flow for every new function object, and a closure is a new one at each call. So public functions compute
through functions that are jitted once for the whole process: `once` for functions of arrays and operators, `once_for` for those
that also take a user's function. Inside ``jit`` such a program is traced inline, as if it were not jitted itself.
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
    """A static argument or result of a program, such as a number of rows: each value gets a program of its own."""

    value: T


def once(function: Callable[P, R], examples: Callable[..., Any] | None = None) -> Callable[P, R]:
    """A function of pytrees, compiled once for each structure and shape of its arguments, which are positional.

    A call with keywords, or with arguments that JAX cannot take, runs the function itself, which raises its own error. If the
    results have a row for each example, ``examples`` maps the arguments to those that have such rows.
    """
    program = _program(automatic(function, examples))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        flat = None if kwargs else _flat(args)
        result: R = function(*args, **kwargs) if flat is None else program(*flat)
        return result

    return call


def _program(function: Callable[..., R]) -> Callable[[Any, list[Any]], R]:
    """The jitted function of flattened arguments. JAX would flatten them again, and note again what functions in them read."""

    def run(structure: Any, leaves: list[Any]) -> R:
        return function(*jax.tree.unflatten(structure, leaves))

    run.__name__ = function.__name__
    return jax.jit(run, static_argnums=0, inline=True)


def _flat(args: Sequence[Any]) -> tuple[Any, list[Any]] | None:
    """The structure and the leaves of arguments; None if some leaf is no number or the structure is not hashable."""
    leaves, structure = jax.tree.flatten(args)
    return (structure, leaves) if all(map(_is_number, leaves)) and hashable(structure) else None


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, np.ma.MaskedArray):
        return leaf.dtype.kind in "biufc" and leaf.dtype.isnative and leaf.dtype.char not in _LONG_DOUBLES
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


_LONG_DOUBLES = np.dtype(np.longdouble).char + np.dtype(np.clongdouble).char
"""NumPy's codes of the dtypes that are wider than any of JAX."""


def once_for(function: Callable[P, R], examples: Callable[..., Any] | None = None) -> Callable[P, R]:
    """`once` for a function whose first argument is a user's function, or an `Around` of one: one program for each of them.

    ``examples`` is called with the other arguments.

    The cache is keyed by a weak reference to the user's function, and the entry is dropped with it: neither the function nor
    what it closes over is kept alive. If a name or an attribute that the function reads is bound to another value, as happens
    in notebooks, the program is made again. A change of numbers inside a NumPy array is not noticed.
    """
    programs: dict[Hashable, _Program] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        of, *rest = args
        owners: list[Any] = []
        key = _reference(of, owners)
        flat = None if key is None or kwargs else _flat(rest)
        if flat is None:
            return function(*args, **kwargs)
        reads = readings(of)
        program = programs.get(key)
        if program is None:
            for owner in owners:
                weakref.finalize(owner, programs.pop, key, None).atexit = False
        if program is None or program.reads != reads:
            program = programs[key] = _Program(function, examples, reads)
        result: R = program(of, *flat)
        return result

    return call


class _Program:
    """A jitted function that holds its first argument only during a call, which is when it may be traced."""

    def __init__(self, function: Callable[..., Any], examples: Callable[..., Any] | None, reads: tuple[Hashable, ...]) -> None:
        self.reads = reads
        self._given = threading.local()

        def run(*rest: Any) -> Any:
            return function(self._given.of, *rest)

        self._jitted = _program(automatic(run, examples))

    def __call__(self, of: Any, structure: Any, leaves: list[Any]) -> Any:
        outer = getattr(self._given, "of", None)
        self._given.of = of
        try:
            return self._jitted(structure, leaves)
        finally:
            self._given.of = outer


def _reference(of: Any, owners: list[Any]) -> Hashable:
    """A key for a user's function that does not keep it alive; None if there is none.

    Appends to ``owners`` the objects with which the key becomes invalid.
    """
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
    """``make(held)`` if the flag is true, else ``held`` without a copy.

    Inside ``jit`` this is a loop of at most one iteration, since a conditional copies what a branch returns unchanged.
    """
    if not isinstance(flag, jax.core.Tracer):
        return make(held) if flag else held
    start: tuple[Bool[Array, ""], T] = flag, held
    return while_loop(lambda state: state[0], lambda state: (jnp.zeros_like(flag), make(state[1])), start)[1]


def repeat(going: Callable[[T], Bool[Array, ""]], step: Callable[[T], T], start: T) -> T:
    """`while_loop`. Outside ``jit`` the condition is known: steps are taken one by one, and nothing is compiled."""
    state = start
    while True:
        flag = going(state)
        if isinstance(flag, jax.core.Tracer):
            return while_loop(going, step, start)
        if not flag:
            return state
        state = step(state)
