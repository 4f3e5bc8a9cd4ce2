"""Functions of gradients, which are formed for a few of their inputs at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._engine.forms.arrays import room, total
from jaxfisher._engine.forms.leaf import Leaf


def by_columns(function: Callable[..., Any], *leaves: Leaf) -> Any:
    """``function`` of the gradients of leaves in their shared layout, for a few of the inputs at a time, with results stacked.

    The inputs are split so that a tile takes no more memory than the factors do, or than `TILE` numbers. Zeros fill the last
    tile.
    """
    leaves = tuple(leaf.sliceable() for leaf in leaves)
    layout = leaves[0].layout
    held = sum(array.size for leaf in leaves for array in jax.tree.leaves(leaf))
    whole = sum(leaf.examples * leaf.rows for leaf in leaves) * leaves[0].size
    tiles = max(1, min(layout.inputs, math.ceil(whole / max(held, room()))))
    if tiles == 1:
        full = function(*(total([form.matrices(layout) for form in leaf.made]) for leaf in leaves))
        return jax.tree.map(lambda x: x[None], full)
    size = math.ceil(layout.inputs / tiles)

    def tile(k: Array) -> Any:
        start = k * size
        # The last tile would reach past the end, so it starts earlier, and the inputs that it repeats are masked.
        first = jnp.minimum(start, layout.inputs - size)
        fresh = first + jnp.arange(size) >= start
        parts = [total([form.columns(layout, first, size) for form in leaf.made]) for leaf in leaves]
        return function(*(jnp.where(fresh[:, None], part, 0) for part in parts))

    return jax.lax.map(tile, jnp.arange(math.ceil(layout.inputs / size)))
