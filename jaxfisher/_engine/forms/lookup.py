"""Rows looked up in a table: embeddings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxfisher._engine.forms.arrays import Seal, weighted
from jaxfisher._engine.forms.form import InPositions
from jaxfisher._engine.forms.layout import Layout
from jaxfisher._linalg import matmul
from jaxfisher._pytree import array_fields


@array_fields("indices", "right")
class Lookup(InPositions):
    """Gradients of a table whose rows are looked up: ``right_t`` in the table's row ``indices[n, row, t]``. There is one group.

    The rows of the table are the layout's inputs. If an index occurs twice in one row of scores, its first occurrence has the
    sum, and the others have a ``right`` of zero.
    """

    indices: Int[Array, "n rows T"]
    right: Float[Array, "n rows 1 T outputs"]
    layout: Layout

    name = "embedding"
    unfactored = "a table"
    making = 0

    def made(self) -> Lookup:
        """Itself."""
        return self

    def mv(self, v: Float[Array, "*shape"], seal: Seal) -> Float[Array, "n rows"]:
        """``sum_t V[indices_t] . right_t`` for every row."""
        return jnp.sum(self.layout.matrix(v)[0][self.indices] * self.right[:, :, 0], (-2, -1))

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "*shape"]:
        """``sum_rows w D``: a table of zeros to whose rows ``w right_t`` is added."""
        updates = weighted(w, self.right, self.indices.shape)[:, :, 0]
        updates = jnp.broadcast_to(updates, (*self.indices.shape, updates.shape[-1]))
        table = jnp.zeros((self.layout.inputs, self.layout.outputs), updates.dtype)
        return self.layout.leaf(table.at[self.indices].add(updates)[None])

    def gradient(self) -> Float[Array, "n rows *shape"]:
        """The gradients themselves."""
        return self.layout.leaf(self.matrices(self.layout))

    def matrices(self, layout: Layout) -> Float[Array, "n rows 1 inputs outputs"]:
        """The gradients as matrices of the form's layout."""
        return _tables(self.indices, self.right, self.layout.inputs)

    def columns(self, layout: Layout, start: Array, size: int) -> Float[Array, "n rows 1 size outputs"]:
        """Only some rows of the table."""
        local = self.indices - start.astype(self.indices.dtype)
        inside = (local >= 0) & (local < size)
        right = jnp.where(inside[:, :, None, :, None], self.right, 0)
        return _tables(jnp.where(inside, local, 0), right, size)

    def left_size(self, *, bias: bool) -> Float[Array, "1 1 1 1 1"]:
        """One, since left factors are ones and zeros."""
        return jnp.ones((1,) * 5, self.right.dtype)

    def squared(self) -> Float[Array, "n rows 1"]:
        """``|D|^2`` of every row, which needs no cross terms: no row of the table has two terms."""
        return jnp.sum(jnp.square(self.right), (-2, -1))

    def squares(self) -> Lookup:
        """The lookup whose gradients are the entrywise squares."""
        return dataclasses.replace(self, right=jnp.square(self.right))

    def same(self, other: Lookup) -> Bool[Array, "1 n rows T m rows2 T2"]:
        """Whether the indices of two blocks of rows are equal: the inner products of their left factors."""
        return (self.indices[:, :, :, None, None, None] == other.indices[None, None, None])[None]

    def picked(self, left: Float[Array, "m rows2 1 T2 inputs"]) -> Float[Array, "1 m rows2 T2 n rows T"]:
        """The entries of other left factors at the indices: their inner products with the left factors here."""
        return left[:, :, 0][..., self.indices][None]

    def sizes(self, *, bias: bool) -> Float[Array, "n rows"]:
        """The largest entries of right factors in absolute value, summed over positions."""
        return jnp.sum(jnp.max(jnp.abs(self.right), (2, 4), initial=0.0), 2)

    def means(self, w: Float[Array, "n rows"], by_row: bool) -> tuple[Array, ...]:
        """No means: indices have none."""
        return ()

    def shifted(self, means: tuple[Array, ...]) -> tuple[Lookup, ...]:
        """The lookup itself: its gradients are sparse, and their mean does not dominate."""
        return (self,)


def _tables(indices: Array, right: Array, size: int) -> Float[Array, "n rows 1 size outputs"]:
    """Tables of ``size`` rows, with the right factors in the rows of their indices."""
    hot = jax.nn.one_hot(indices, size, dtype=right.dtype, axis=-1)
    return matmul(hot[:, :, None].swapaxes(-1, -2), right)
