"""The square root of a Fisher in the fields that move with a model's parameters, without columns for constant fields.

A column of the root is a row of the exact Fisher's score matrix, and costs as much: ``Normal(f(x), 1.0)`` has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._dataflow import moved_by

Root = Callable[[Any], list[Array]]
"""A linear map from noise to the fields."""


def narrowed(
    sqrt_mv: Callable[[Any], Any], noise: Any, moving: tuple[bool, ...], numbers: tuple[bool, ...]
) -> tuple[Any, Root]:
    """Zeros of a space of noise, and the root from there to a list of all fields; fields that do not move are arbitrary.

    Parts of the noise that reach no moving field are left out. The noise has one part for each field. If a field is one number
    for each member of the batch (as ``numbers`` says), it is a linear combination of parts of the noise. If no other moving
    field depends on these parts, a single part replaces them, multiplied by the length of the coefficients.
    """
    zeros, treedef = jax.tree.flatten(noise)
    reached = {field: parts for field, parts in enumerate(moved_by(sqrt_mv, noise)) if moving[field]}
    lengths: dict[int, Array] = {}

    def fields(values: dict[int, Array]) -> list[Array]:
        full = [values.get(part, zero) for part, zero in enumerate(zeros)]
        return jax.tree.leaves(sqrt_mv(jax.tree.unflatten(treedef, full)))

    for field, parts in reached.items():
        others = frozenset().union(*(reached[other] for other in reached if other != field))
        if len(parts) > 1 and parts.isdisjoint(others) and all(numbers[part] for part in (field, *parts)):
            lengths[field] = _length([fields({part: jnp.ones_like(zeros[part])})[field] for part in sorted(parts)])
    kept = sorted(frozenset().union(*(parts for field, parts in reached.items() if field not in lengths)))

    def root(u: tuple[list[Array], list[Array]]) -> list[Array]:
        found = fields(dict(zip(kept, u[0], strict=True)))
        for (field, length), part in zip(lengths.items(), u[1], strict=True):
            found[field] = length * part
        return found

    return ([zeros[part] for part in kept], list(map(jnp.zeros_like, lengths.values()))), root


def _length(numbers: list[Float[Array, "*batch"]]) -> Float[Array, "*batch"]:
    first, *rest = numbers
    for other in rest:
        first = jnp.hypot(first, other)
    return first


def triangle(root: Float[Array, "entries columns"]) -> Float[Array, "entries columns"]:
    """A matrix with the same square and no more columns than rows."""
    return root if root.shape[1] <= root.shape[0] else jnp.linalg.qr(root.T, mode="r").T
