"""Frozen dataclasses that are pytrees: some fields hold arrays, the others are static."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

from jaxfisher._readings import Around, readings

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def array_fields(*names: str, repr: bool = True, eq: bool = True) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass and a pytree: the named fields hold arrays or pytrees of arrays, the others are static.

    Static fields must be hashable and comparable: ``jit`` then traces a function of such an object once for all values of its
    arrays. If a static field is a function, ``jit`` traces again when a name that the function reads is bound to another value.

    Args:
        *names: the fields that hold arrays.
        repr: as in `dataclasses.dataclass`.
        eq: as in `dataclasses.dataclass`.

    Raises:
        TypeError: a name that is no field of the class.

    Reference: the JAX documentation, "Custom pytree nodes".

    >>> import jax, jaxfisher as jf
    >>> @jf.array_fields("entries")
    ... class Scaled:
    ...     entries: jax.Array
    ...     unit: str
    >>> jax.tree.map(lambda x: 2 * x, Scaled(1.5, "nats"))
    Scaled(entries=3.0, unit='nats')
    """

    def register(cls: type[T]) -> type[T]:
        made = dataclasses.dataclass(frozen=True, repr=repr, eq=eq)(cls)
        fields = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
        unknown = [name for name in names if name not in fields]
        if unknown:
            raise TypeError(f"array_fields: {cls.__name__} has no field `{unknown[0]}`; expected some of {fields}.")
        static = [name for name in fields if name not in names]

        def flatten(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            others = tuple(getattr(value, name) for name in static)
            functions = tuple(filter(_is_function, others))
            return tuple(getattr(value, name) for name in names), (*others, readings(functions) if functions else ())

        def flatten_with_keys(value: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
            arrays, others = flatten(value)
            return tuple(zip(map(jax.tree_util.GetAttrKey, names), arrays, strict=True)), others

        def unflatten(others: tuple[Any, ...], arrays: Iterable[Any]) -> T:
            # `__init__` is not called, since JAX may pass anything in the place of the arrays, such as None.
            value = object.__new__(made)
            for name, held in zip((*names, *static), (*arrays, *others[:-1]), strict=True):
                object.__setattr__(value, name, held)
            return value

        # Not `jax.tree_util.register_dataclass`: it confuses two classes with equal static fields, and so their programs.
        jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
        return made

    return register


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, Around)
