"""Running means of forms: the mean of what is held, array by array."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from jaxfisher._operators.form import Form

F = TypeVar("F", bound=Form)


def arrays_of(form: Form) -> tuple[Any, ...]:
    """The arrays that are held, without the static fields: the trees of the fields keep the structures that they have."""
    return tuple(_without_forms(child) for child in jax.tree_util.default_registry.flatten_one_level(form)[0])


def with_arrays(form: F, arrays: tuple[Any, ...]) -> F:
    """The same kind of form holding other arrays."""
    made: F = jax.tree.unflatten(jax.tree.structure(form), jax.tree.leaves(arrays))
    return made


def _without_forms(tree: Any) -> Any:
    is_form = lambda part: isinstance(part, Form)  # noqa: E731
    return jax.tree.map(lambda part: arrays_of(part) if is_form(part) else part, tree, is_leaf=is_form)
