"""What the Fishers of later updates will look like: the shapes that a state is made for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TypeAlias

import chex
import jax

from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._operators.provenance import Provenance
from jaxfisher._transform.update_arguments import fisher_for
from jaxfisher._tree import param_spec

Like: TypeAlias = Operator | Callable[[], Operator]
"""An operator, one without values such as `jax.eval_shape` gives, or a function that makes one and is never run."""

_known: contextvars.ContextVar[Callable[[], Operator] | None] = contextvars.ContextVar("like", default=None)


@contextlib.contextmanager
def fishers_like(shape: Callable[[], Operator]) -> Iterator[None]:
    """While states are made, transformations that were given no ``like`` take what this gives: an operator without values.

    The combinators of Optax hand the parameters to `init` and nothing else, so this goes beside them.
    """
    token = _known.set(shape)
    try:
        yield
    finally:
        _known.reset(token)


def shape_of_view(params: chex.ArrayTree, like: Like | None, view: Callable[[Operator], Operator]) -> Operator:
    """The view of an operator over these parameters, its arrays without values.

    Where nothing is known of the operator, the view must be one whose shape depends on the parameters only.
    """
    operator = _shape(params, like)

    def viewed(operator: Operator) -> Operator:
        # Optax calls `init` with a pytree without leaves, to find where a state holds parameters.
        return view(fisher_for(params, operator, CALLER) if jax.tree.leaves(params) else operator)

    try:
        return jax.eval_shape(viewed, operator)
    except TypeError as error:
        if like is None and _known.get() is None:
            error.add_note(
                "scale_by_fisher: the view of a Fisher held otherwise has its shape from `like`. Pass it, or make the state by "
                "jf.training_step(model, opt).init(params, *inputs, target), which finds it."
            )
        raise


CALLER = "scale_by_fisher: `like`"


def _shape(params: chex.ArrayTree, like: Like | None) -> Operator:
    """An operator like those to come, without values if it is made here."""
    known = _known.get()
    if isinstance(like, Operator):
        return like
    if callable(like):
        return jax.eval_shape(lambda: as_operator(like(), CALLER))
    if like is not None:
        return as_operator(like, CALLER)
    if known is not None:
        return known()
    spec = param_spec(params)
    return Operator(Diagonal(spec.zeros(), spec), Provenance("zero"))
