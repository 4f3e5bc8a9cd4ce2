"""The globals and closed-over variables that a user's function reads, so that its programs are recompiled when they change.

A program is traced once. If a name is bound to another value afterwards, as in a notebook or by ``agent.scale = 0.5``, the
program would silently go on with the old value. So a record of what the function reads is stored beside its program, and
compared at each call. The record refers to objects weakly where it can.
"""

from __future__ import annotations

import dis
import functools
import itertools
import types
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np


class Around:
    """The base class of frozen dataclasses that wrap users' functions: two that wrap the same functions are equal."""


def readings(of: Any) -> tuple[Hashable, ...]:
    """A record of the values that a user's function reads: numbers and strings by value, everything else by identity.

    These values are its globals, its closed-over variables, its default arguments, and those attributes of such objects that
    its code names. Functions among them are searched too, and so are lists, tuples, dictionaries and sets. Of a library's
    function only the closed-over variables are searched, among which a user's function may be. `once_for` compares the record
    with the one stored beside a program. Objects made by `array_fields` that hold the function have it in their static part.
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
    """A weak stand-in for an object: equal to another stand-in for the same object, as long as that object lives.

    The object's `id` alone would not do, since Python may give it to a new object once the old one is gone.
    """

    __slots__ = ("_hash", "_of")

    def __init__(self, of: Any) -> None:
        self._hash, self._of = id(of), weakref.ref(of)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Same) and self._of() is not None and self._of() is other._of())

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a stand-in for an object that is gone, since no object of another process is the same."""
        return _Same, (type("Gone", (), {}),)


class _Held:
    """A stand-in for an object that has no weak references: it keeps the object alive."""

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
"""Methods that fill a list. Code that names one is taken to note in the list that it is being traced, and not to read it."""

MANY = 1000
"""A container with more entries, such as a vocabulary, is compared by identity and length: comparing all entries is slow."""

_ARRAYS = (jax.Array, np.ndarray)


def _noted(value: Any) -> Hashable:
    """The record of one value. A wrapper or container is recorded by its type only, since its parts are recorded as well."""
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
    """The parts of a value that code which names these attributes may read, each with the names to read of the part."""
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
    """The parts of a wrapper or container; None for any other value."""
    if isinstance(value, Around):
        return vars(value).values()
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, _CONTAINERS) else None


def _of_function(function: types.FunctionType) -> list[tuple[Any, Names]]:
    code, closure = function.__code__, function.__closure__ or ()
    outer = [cell for name, cell in zip(code.co_freevars, closure, strict=True) if name not in _counted(code, "STORE_DEREF")]
    cells = [cell.cell_contents for cell in outer if cell != types.CellType()]
    if _of_library(function):
        return [(value, ()) for value in cells]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    outside = function.__globals__
    found = [*cells, *defaults, *(outside[name] for name in _globals(code) if name in outside)]
    return [(value, _attributes(function)) for value in found]


def _of_object(value: Any, names: Names) -> list[tuple[Any, Names]]:
    """The leaves of a pytree, the function inside one of JAX's decorators, the attributes of an object of a user's class."""
    found = [(leaf, names) for leaf in _leaves(value)]
    wrapped = getattr(value, "__dict__", {}).get("__wrapped__")
    if isinstance(wrapped, types.FunctionType):
        found.append((wrapped, ()))
    return found if _of_library(type(value)) else [*found, *_of_names(value, type(value), ("__call__", *names))]


def _leaves(value: Any) -> list[Any]:
    """The leaves of a pytree and its structure; nothing for a value that is a leaf itself."""
    if jax.tree_util.all_leaves([value]):
        return []
    try:
        leaves, structure = jax.tree.flatten(value)
    except (TypeError, ValueError):  # such as one with keys that have no order
        return []
    return [*leaves, structure] if hashable(structure) else leaves


def _of_names(value: Any, kind: Any, names: Names) -> list[tuple[Any, Names]]:
    """The attributes of an object, a class or a module with these names. A method may read further attributes of its object."""
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
    """The function behind an attribute of a class, if any: a method, a property, a class method or a static method."""
    inner = getattr(member, "fget", None) or getattr(member, "__func__", None) or getattr(member, "func", None) or member
    return [inner] if isinstance(inner, types.FunctionType) and not _of_library(inner) else []


_LIBRARIES = frozenset(
    "jax jaxlib jaxfisher numpy optax flax equinox haiku distrax numpyro lineax tensorflow_probability jaxtyping chex scipy "
    "builtins math functools itertools operator typing dataclasses collections abc contextlib enum".split()
)
"""Packages whose functions are not searched, since users do not rebind their names."""


def _of_library(value: Any) -> bool:
    home = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return str(home).partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def _named(code: types.CodeType, looks: tuple[str, ...], store: str) -> Names:
    """The names that these bytecode operations look up in code and in the functions inside it, in order and each once."""
    found = [step.argval for step in dis.get_instructions(code) if step.opname in looks]
    own = [name for name in found if name not in _counted(code, store)]
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _named(part, looks, store)]
    return tuple(dict.fromkeys([*own, *inner]))


@functools.lru_cache(maxsize=1024)
def _counted(code: types.CodeType, store: str) -> frozenset[str]:
    """The names that code changes in place, as in ``self.calls += 1``. They are its own notes, and differ after every trace."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "SWAP"]
    return frozenset(new.argval for old, new in itertools.pairwise(steps) if new.opname == store and old.argrepr in _IN_PLACE)


_IN_PLACE = frozenset("+= -= *= /= //= %= **= @= &= |= ^= <<= >>=".split())


def _globals(code: types.CodeType) -> Names:
    """The names of the globals that code reads. Attributes of the same name do not count."""
    return _named(code, ("LOAD_GLOBAL",), "STORE_GLOBAL")


def _attributes(function: Any) -> Names:
    """The names of the attributes that a function reads, of whatever objects."""
    code = getattr(function, "__code__", None)
    return () if code is None or _of_library(function) else _named(code, ("LOAD_ATTR", "LOAD_METHOD"), "STORE_ATTR")
