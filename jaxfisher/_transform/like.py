"""The shapes that a state is made for: those of the Fishers that later updates will be given."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TypeAlias

import chex
import jax

from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._provenance import Provenance
from jaxfisher._transform.cheap import Offered
from jaxfisher._transform.update_arguments import fisher_for
from jaxfisher._tree import param_spec

Like: TypeAlias = Operator | Callable[[], Operator]
"""An operator, its `jax.eval_shape`, or a function that makes one and is never run."""

Choice: TypeAlias = Callable[[Offered], Operator]
"""What a transformation takes of the curvature that a training step offers."""

_known: contextvars.ContextVar[Callable[[Choice], Operator] | None] = contextvars.ContextVar("like", default=None)


@contextlib.contextmanager
def fishers_like(shape: Callable[[Choice], Operator]) -> Iterator[None]:
    """A context in which ``init`` takes the shapes of Fishers from ``shape`` if a transformation was given no ``like``.

    ``shape`` returns what is chosen, without values. Optax's combinators pass only the parameters to ``init``, so the shapes
    travel in a context variable.
    """
    token = _known.set(shape)
    try:
        yield
    finally:
        _known.reset(token)


def shape_of_view(
    params: chex.ArrayTree, like: Like | None, view: Callable[[Operator], Operator], choice: Choice = Offered.__call__
) -> Operator:
    """The view of an operator over these parameters, without values.

    If nothing is known of the operator, the shape of the view must depend on the parameters only. In a training step the
    operator is a ``choice`` of what the step offers: the same as in updates, whose program then need not be traced again.
    """
    operator = _shape(params, like, choice)

    def viewed(operator: Operator) -> Operator:
        # Optax calls `init` with an empty pytree to find out where a state holds parameters.
        return view(fisher_for(params, operator, CALLER) if jax.tree.leaves(params) else operator)

    try:
        return jax.eval_shape(viewed, operator)
    except TypeError as error:
        if like is None and _known.get() is None:
            error.add_note(
                "scale_by_fisher: the shape of this view depends on how the Fisher is held. Pass `like`, or make the state by "
                "jf.training_step(model, opt).init(params, *inputs, target), which finds the shape."
            )
        raise


CALLER = "scale_by_fisher: `like`"


def _shape(params: chex.ArrayTree, like: Like | None, choice: Choice) -> Operator:
    """An operator like those of later updates; without values, unless the user gave an operator with values."""
    known = _known.get()
    if isinstance(like, Operator):
        return like
    if callable(like):
        return jax.eval_shape(lambda: as_operator(like(), CALLER))
    if like is not None:
        return as_operator(like, CALLER)
    if known is not None:
        return known(choice)
    spec = param_spec(params)
    return Operator(Diagonal(spec.zeros(), spec), Provenance("zero"))
