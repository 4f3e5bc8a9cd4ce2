"""Running means of forms, by default array by array."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
from jaxtyping import Scalar

from jaxfisher._operators.form import Form

F = TypeVar("F", bound=Form)


def arrays_of(form: Form) -> tuple[Any, ...]:
    """The arrays of a form without its static fields; each field keeps its tree structure."""
    return tuple(_without_forms(child) for child in jax.tree_util.default_registry.flatten_one_level(form)[0])


def with_arrays(form: F, arrays: tuple[Any, ...]) -> F:
    """The same kind of form holding other arrays."""
    made: F = jax.tree.unflatten(jax.tree.structure(form), jax.tree.leaves(arrays))
    return made


@functools.singledispatch
def mean_of(form: Any, other: Any, share: Scalar) -> Any:
    """``(1 - share) F + share G`` in the same form, for two forms of one structure: by default the mean of their arrays."""
    held, theirs = (jax.tree_util.default_registry.flatten_one_level(each)[0] for each in (form, other))
    is_form = lambda part: isinstance(part, Form)  # noqa: E731
    if not form.averages and not any(map(is_form, jax.tree.leaves(held, is_leaf=is_form))):
        raise TypeError(
            f"merge: an operator held {form.name} has no mean in the same form. Take a view of every batch, such as "
            "jf.diagonal, jf.kronecker, jf.dense or lambda F: jf.block_diagonal(jf.dense(F))."
        )
    mean = lambda a, b: mean_of(a, b, share) if is_form(a) else a + share.astype(a.dtype) * (b - a)  # noqa: E731
    arrays = jax.tree.map(mean, held, theirs, is_leaf=is_form)
    return jax.tree.unflatten(jax.tree.structure(form), jax.tree.leaves(arrays))


def _without_forms(tree: Any) -> Any:
    is_form = lambda part: isinstance(part, Form)  # noqa: E731
    return jax.tree.map(lambda part: arrays_of(part) if is_form(part) else part, tree, is_leaf=is_form)
