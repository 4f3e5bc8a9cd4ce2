"""Operators and scores that came out of `jax.vmap` or `jax.lax.scan`: one object whose arrays hold many of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def of_one(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a method, or a function whose first argument is the object, refuse a stack of objects."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse_stack(args[0].stack, type(args[0]).__name__, name)  # type: ignore[attr-defined]
            return method(*args, **kwargs)

        return call

    return decorate


def refuse_stack(stack: tuple[int, ...], kind: str, name: str) -> None:
    """Raise `ValueError` where an object of this kind is a stack of many, with these axes before those of one."""
    if stack:
        raise ValueError(
            f"{name}: this {kind} came out of jax.vmap or jax.lax.scan and is a stack of shape {stack}; "
            "expected a single one. Call the method inside of that function, or map the method over the stack, for instance "
            "jax.vmap(lambda one: one.trace())(stack)."
        )
