"""The keywords of an update where a wrapper of Optax does not pass them on."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_around: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("around", default=None)


@contextlib.contextmanager
def passing(given: Mapping[str, Any]) -> Iterator[None]:
    """A context in which the updates of this library that are called without keywords take these.

    The loss is left out: a wrapper may call for other parameters than those whose loss is known.
    """
    token = _around.set({name: value for name, value in given.items() if name != "value"})
    try:
        yield
    finally:
        _around.reset(token)


def with_keywords(update: Callable[..., Any]) -> Callable[..., Any]:
    """The update; called without keywords, it takes those of the training step or of the transformation around it.

    `optax.lookahead`, `optax.contrib.sam` and all that have the type of a transformation without keywords pass none on.
    """

    @functools.wraps(update)
    def call(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        return update(updates, state, params, **(given or _around.get() or {}))

    return call
