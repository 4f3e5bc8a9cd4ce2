"""What a function of the user's reads from outside by name, so that what was made of it is made again where that has changed.

A program is traced once. A name that is bound to something else afterwards, as in a notebook or by ``agent.scale = 0.5``, would
leave it with the numbers of the old one, without a word. So what a function reads is noted beside what is made of it, and
compared. What is noted is not kept alive where that can be helped.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np


class Around:
    """A frozen dataclass around functions of the user's: two around the same ones are equal."""


def readings(of: Any) -> tuple[Hashable, ...]:
    """What a function of the user's reads from outside by name: numbers and strings as they are, all else by identity.

    It reads its globals, what it closes over, its default arguments, and of the objects among these the attributes that its
    code names. Functions that it reads are looked into as well, those of the libraries aside, and so are lists, tuples,
    dictionaries and sets. A program is found again by the function and by these, and so is that of an object which holds it, by
    `array_fields`.
    """
    found: list[Hashable] = []
    known: dict[tuple[int, Names], Any] = {}
    todo: list[tuple[Any, Names]] = [(of, ())]
    while todo:
        value, names = todo.pop()
        found.append(_noted(value))
        if not isinstance(value, _ARRAYS) and (id(value), names) not in known:
            known[id(value), names] = value
            todo += _inside(value, names)
    return tuple(found)


Names = tuple[str, ...]
"""The attributes that a piece of code names."""


class _Same:
    """Stands for an object without keeping it alive: equal to what stands for the same one, as long as that lives.

    Its `id` alone would not do: what is made when it is gone may be given the same.
    """

    __slots__ = ("_hash", "_of")

    def __init__(self, of: Any) -> None:
        self._hash, self._of = id(of), weakref.ref(of)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Same) and self._of() is not None and self._of() is other._of())

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process nothing is the same."""
        return _Same, (type("Gone", (), {}),)


class _Held:
    """Stands for an object of a kind that can be referred to in no other way than by keeping it."""

    __slots__ = ("_of",)

    def __init__(self, of: Any) -> None:
        self._of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self._of is other._of

    def __hash__(self) -> int:
        return id(self._of)


_AROUND = (Around, functools.partial, types.MethodType)
_CONTAINERS = (tuple, list, dict, set, frozenset)
_WRITERS = frozenset({"append", "extend", "insert"})
"""What of a list it is for: code that names one of these notes in it that it is traced, and does not read it."""

MANY = 1000
"""A container with more entries, such as a vocabulary, is told by identity and length: comparing all at each call is slow."""

_ARRAYS = (jax.Array, np.ndarray)


def _noted(value: Any) -> Hashable:
    """What stands for a value that is read. Of what is only around others, another one around the same is as good."""
    if value is None or isinstance(value, (int, float, complex, str)):
        return type(value), value
    if _is_large(value):
        return _Held(value), len(value)
    if isinstance(value, dict):
        return type(value), *map(_noted, value)
    if isinstance(value, (*_AROUND, *_CONTAINERS)):
        return type(value), None
    try:
        return _Same(value)
    except TypeError:
        return (type(value), value) if hashable(value) else _Held(value)


def _is_large(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) and len(value) > MANY


def hashable(value: Any) -> bool:
    """Whether a value can be a key of a dictionary."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _inside(value: Any, names: Names) -> Iterable[tuple[Any, Names]]:
    """What is read of a value by code that names these attributes: each part of it with the names that matter there."""
    if isinstance(value, types.MethodType):
        return [(value.__func__, ()), (value.__self__, _attributes(value.__func__))]
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, (types.ModuleType, type)):
        return [] if _of_library(value) else _of_names(value, value, names)
    if _is_large(value) or (isinstance(value, list) and _WRITERS.intersection(names)):
        return []
    parts = _parts(value)
    return _of_object(value, names) if parts is None else [(part, names) for part in parts]


def _parts(value: Any) -> Iterable[Any] | None:
    """The parts of what is only around others; None of anything else."""
    if isinstance(value, Around):
        return vars(value).values()
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, _CONTAINERS) else None


def _of_function(function: types.FunctionType) -> list[tuple[Any, Names]]:
    if _of_library(function):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    outside = function.__globals__
    found = [*cells, *defaults, *(outside[name] for name in _globals(function.__code__) if name in outside)]
    return [(value, _attributes(function)) for value in found]


def _of_object(value: Any, names: Names) -> list[tuple[Any, Names]]:
    """The leaves of a pytree, the function that one of JAX's decorators has wrapped, and what code reads of the user's own."""
    found = [(leaf, names) for leaf in _leaves(value)]
    wrapped = getattr(value, "__dict__", {}).get("__wrapped__")
    if isinstance(wrapped, types.FunctionType):
        found.append((wrapped, ()))
    return found if _of_library(type(value)) else [*found, *_of_names(value, type(value), ("__call__", *names))]


def _leaves(value: Any) -> list[Any]:
    """The leaves of a pytree, and what it is beside them; nothing of a leaf."""
    if jax.tree_util.all_leaves([value]):
        return []
    try:
        leaves, structure = jax.tree.flatten(value)
    except (TypeError, ValueError):  # such as one with keys that have no order
        return []
    return [*leaves, structure] if hashable(structure) else leaves


def _of_names(value: Any, kind: Any, names: Names) -> list[tuple[Any, Names]]:
    """What an object, a class or a module has under these names; a method reads more of the object that it is of."""
    own, found = getattr(value, "__dict__", {}), []
    for name in names:
        if name in own:
            found.append((own[name], names))
            continue
        member = next((vars(base)[name] for base in getattr(kind, "__mro__", ()) if name in vars(base)), None)
        for function in _functions(member):
            found += [(function, ()), (value, _attributes(function))]
        if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):  # one of `__slots__`
            found.append((getattr(value, name), names))
        elif member is not None and not _functions(member):
            found.append((member, names))
    return found


def _functions(member: Any) -> list[types.FunctionType]:
    """The functions behind an attribute of a class: a method, a property, one of the class or of none."""
    inner = getattr(member, "fget", None) or getattr(member, "__func__", None) or getattr(member, "func", None) or member
    return [inner] if isinstance(inner, types.FunctionType) and not _of_library(inner) else []


_LIBRARIES = frozenset(
    "jax jaxlib jaxfisher numpy optax flax equinox haiku distrax numpyro lineax tensorflow_probability jaxtyping chex scipy "
    "builtins math functools itertools operator typing dataclasses collections abc contextlib enum".split()
)
"""Packages that are not looked into: no user binds their names anew."""


def _of_library(value: Any) -> bool:
    home = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return str(home).partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def _named(code: types.CodeType, operations: tuple[str, ...]) -> Names:
    """The names that code and the functions in it look up by these operations, in order."""
    own = [step.argval for step in dis.get_instructions(code) if step.opname in operations]
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _named(part, operations)]
    return tuple(dict.fromkeys([*own, *inner]))


def _globals(code: types.CodeType) -> Names:
    """The globals that code reads; attributes of the same name are not among them."""
    return _named(code, ("LOAD_GLOBAL",))


def _attributes(function: Any) -> Names:
    """The attributes that a function reads of whatever it has."""
    code = getattr(function, "__code__", None)
    return () if code is None or _of_library(function) else _named(code, ("LOAD_ATTR", "LOAD_METHOD"))
