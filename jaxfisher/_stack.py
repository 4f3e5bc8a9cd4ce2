"""Operators and scores that `jax.vmap` or `jax.lax.scan` returned: one object whose arrays hold many of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def of_one(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of a method, or of a function whose first argument is the object, that makes it refuse a stack of objects."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse_stack(args[0].stack, type(args[0]).__name__, name)  # type: ignore[attr-defined]
            return method(*args, **kwargs)

        return call

    return decorate


def refuse_stack(stack: tuple[int, ...], kind: str, name: str) -> None:
    """Raise `ValueError` if an object is a stack of many, whose arrays have these axes before those of a single one."""
    if stack:
        raise ValueError(
            f"{name}: this {kind} came out of jax.vmap or jax.lax.scan and is a stack of shape {stack}; "
            "expected a single one. Call the method inside that function, or map the method over the stack, for instance "
            "jax.vmap(lambda one: one.trace())(stack)."
        )
