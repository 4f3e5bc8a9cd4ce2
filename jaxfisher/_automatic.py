"""Arrays spread over explicit axes of a mesh, as arguments of programs that leave shardings to the compiler.

The axes of ``jax.make_mesh`` are explicit by default: the sharding of every value is then a part of its type, and JAX refuses
an operation whose result could have two shardings. Our programs run with such axes made automatic. Their results are replicated
on all devices, except those with a row for each example, which are spread as the examples are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

R = TypeVar("R")


def automatic(function: Callable[..., R], examples: Callable[..., Any] | None = None) -> Callable[..., R]:
    """The same function, run with automatic axes if an argument is spread over explicit ones.

    If the results have a row for each example, ``examples`` maps the arguments to those that have such rows.
    """

    @functools.wraps(function)
    def call(*args: Any) -> R:
        spread = _spread(args)
        if not spread:
            return function(*args)
        mesh = spread[0].sharding.mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        run = partial(jax.sharding.auto_axes, function, axes=mesh.explicit_axes)
        spread = [] if examples is None else _spread(examples(*args))
        if not spread:
            return run(out_sharding=everywhere)(*args)
        rows = min(spread, key=lambda kind: kind.shape[0])
        apart = NamedSharding(mesh, PartitionSpec(rows.sharding.spec[0]))
        shapes = jax.eval_shape(run(out_sharding=everywhere), *args)
        whole = lambda leaf: leaf.ndim == 0 or leaf.shape[0] % rows.shape[0] or not leaf.shape[0]  # noqa: E731
        return run(out_sharding=jax.tree.map(lambda leaf: everywhere if whole(leaf) else apart, shapes))(*args)

    return call


def _spread(tree: Any) -> list[Any]:
    """The types of the arrays of a tree that are spread over explicit axes of a mesh."""
    kinds = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return [kind for kind in kinds if kind.sharding.mesh.explicit_axes and any(axis is not None for axis in kind.sharding.spec)]
