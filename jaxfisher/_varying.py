"""Values that vary over the devices inside ``shard_map``, and replicated ones, which control flow must not mix.

With its default ``check_vma=True``, ``shard_map`` knows of every value over which axes of the mesh it varies. A gradient with
respect to parameters that do not vary is summed over the devices, and the two branches of a conditional, or the carry of a loop
before and after a step, must vary over the same axes. Outside ``shard_map`` nothing varies and nothing here does anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Bool

T = TypeVar("T")


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes over which any array of a tree is known to vary: none under ``shard_map(..., check_vma=False)``."""
    kinds = [jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in jax.tree.leaves(tree)]
    known = [getattr(kind, "manual_axis_type", None) for kind in kinds]
    return frozenset[str]().union(*(kind.varying for kind in known if kind is not None))


def vary(tree: T, axes: frozenset[str]) -> T:
    """The same values, varying over these axes too."""

    def spread(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(spread, tree) if axes else tree


def varying_like(tree: T, like: Any) -> T:
    """The same values, varying over the axes over which ``like`` varies.

    This is for parameters beside data: the gradient with respect to parameters that do not vary would be summed over the
    devices, but a row of scores belongs to one example on one device.
    """
    return vary(tree, varying_axes(like))


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same values, all varying over the axes over which any of them does."""
    axes = varying_axes(trees)
    return tuple(vary(tree, axes) for tree in trees)


def cond(flag: Bool[Array, ""], yes: Callable[[], T], no: Callable[[], T]) -> T:
    """`jax.lax.cond` of branches that may vary over different axes."""
    if not _inside_shard_map():
        return jax.lax.cond(flag, yes, no)
    axes = varying_axes(jax.eval_shape(lambda: (flag, yes(), no())))
    return jax.lax.cond(flag, lambda: vary(yes(), axes), lambda: vary(no(), axes))


def while_loop(going: Callable[[T], Bool[Array, ""]], step: Callable[[T], T], start: T) -> T:
    """`jax.lax.while_loop` of a carry that a step may make vary over more axes."""
    if not _inside_shard_map():
        return jax.lax.while_loop(going, step, start)
    axes = varying_axes(jax.eval_shape(lambda: (start, step(start))))
    return jax.lax.while_loop(going, lambda state: vary(step(state), axes), vary(start, axes))


def varying_through(product: Callable[[T], T], b: T) -> T:
    """The same vector, also varying over the axes over which its product varies."""
    return varying_like(b, jax.eval_shape(product, b)) if _inside_shard_map() else b


def linear_solve(product: Callable[[T], T], b: T, iterate: Callable[[Callable[[T], T], T], tuple[T, Any]]) -> tuple[T, Any]:
    """`jax.lax.custom_linear_solve` of a symmetric product that may vary where the vector does not.

    The arrays that the product and the iteration close over must be `alike`: JAX 0.10 to 0.12 cannot compile a solve otherwise.
    """
    b = varying_through(product, b)
    # JAX traces the solve twice, once for the transpose. Jitted, it is found in the cache the second time.
    found = jax.jit(functools.partial(iterate, product), inline=True)
    solved: tuple[T, Any] = jax.lax.custom_linear_solve(product, b, lambda _, b: found(b), symmetric=True, has_aux=True)
    return solved


def _inside_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
