"""Squares of a leaf's gradients: their norms, and the diagonal of a Fisher."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import sum_to
from jaxfisher._engine.forms.cost import by_factors, factors
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.lookup import Lookup
from jaxfisher._engine.forms.tiles import by_columns
from jaxfisher._tree import HIGHEST


def squared_norms(leaf: Leaf) -> Float[Array, "examples rows"]:
    """``|D|^2`` of every row."""
    if not leaf.forms:
        return jnp.zeros((leaf.examples, leaf.rows), leaf.dtype)
    return jnp.broadcast_to(jnp.sum(_norms_of_groups(leaf), 2), (leaf.examples, leaf.rows))


def _norms_of_groups(leaf: Leaf) -> Float[Array, "n rows groups"]:
    (form, *more) = factors(leaf) or (None,)
    if form is not None and not more and (isinstance(form, Lookup) or by_factors(leaf)):
        return form.squared()
    return jnp.sum(by_columns(lambda d: jnp.sum(jnp.square(d), (3, 4)), leaf), 0)


def diagonal(leaf: Leaf, w: Float[Array, "examples rows"]) -> Float[Array, "*shape"]:
    """``sum_rows w D^2``, entry by entry."""
    if not leaf.forms:
        return jnp.zeros(leaf.shape, leaf.dtype)
    (form, *more) = factors(leaf) or (None,)
    if form is not None and not more and (isinstance(form, Lookup) or form.positions == 1):
        return form.squares().rmv(w)
    leaf = leaf.sliceable()
    layout = leaf.layout

    def tile(d: Array) -> Array:
        weight = jnp.broadcast_to(sum_to(w, d.shape[:2]), d.shape[:2])
        return jnp.einsum("nr,nrbio->bio", weight, jnp.square(d), precision=HIGHEST)

    tiles = jnp.moveaxis(by_columns(tile, leaf), 0, 1)
    size, tail = tiles.shape[2], layout.inputs - (tiles.shape[1] - 1) * tiles.shape[2]
    full = tiles[:, :-1].reshape(layout.groups, -1, layout.outputs)
    # The last tile begins with zeros where it overlaps the one before: only its tail is new.
    return layout.leaf(jnp.concatenate([full, tiles[:, -1, size - tail :]], axis=1))
