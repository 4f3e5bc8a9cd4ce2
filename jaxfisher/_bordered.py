"""Symmetric matrices with their last row and column apart.

Devices share the rows of an array evenly or not at all, and a layer's inputs with one more for its bias are one too many. So
such a matrix is held in parts, which are joined only inside a program, and only where they must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._linalg import batched, diagonals, row_times

Matrices = Float[Array, "groups size size"]


class Bordered(NamedTuple):
    """Several symmetric matrices of one size, all with a border or none.

    Attributes:
        core: without the last row and column, if they are apart.
        border: the last column, without its last entry.
        corner: that entry.
    """

    core: Matrices
    border: Float[Array, "groups size 1"] | None = None
    corner: Float[Array, "groups 1 1"] | None = None

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(self.core.shape[-1]) + (self.border is not None)

    def whole(self) -> Matrices:
        """The matrices with all their rows."""
        if self.border is None or self.corner is None:
            return self.core
        last = jnp.concatenate([self.border.swapaxes(1, 2), self.corner], 2)
        return jnp.concatenate([jnp.concatenate([self.core, self.border], 2), last], 1)

    def diagonals(self) -> Float[Array, "groups rows"]:
        """Their diagonals."""
        entries = diagonals(self.core)
        return entries if self.corner is None else jnp.concatenate([entries, self.corner[:, 0]], 1)

    def traces(self) -> Float[Array, " groups"]:
        """Their traces."""
        traces = jnp.sum(diagonals(self.core), 1)
        return traces if self.corner is None else traces + self.corner.reshape(-1)

    def shifted(self, shift: Float[Array, " groups"]) -> Bordered:
        """With a number added to the diagonal of each."""
        corner = None if self.corner is None else self.corner + shift[:, None, None]
        return Bordered(_added(self.core, shift), self.border, corner)

    def widened(self) -> Bordered:
        """With a border of zeros, if there is none."""
        if self.border is not None:
            return self
        groups, size, _ = self.core.shape
        dtype = self.core.dtype
        return Bordered(self.core, jnp.zeros((groups, size, 1), dtype), jnp.zeros((groups, 1, 1), dtype))

    def times(self, rows: Array, last: Array | None) -> tuple[Float[Array, "groups size k"], Float[Array, "groups 1 k"] | None]:
        """Products with matrices whose last row is apart too."""
        product = batched(self.core, rows)
        if self.border is None or self.corner is None or last is None:
            return product, None
        return product + batched(self.border, last), row_times(self.border.swapaxes(1, 2), rows) + self.corner * last

    def inverses(self, inverses: Callable[[Matrices], Matrices]) -> Bordered:
        """Their inverses, of the function that gives those of matrices without a border: the last row is eliminated first."""
        if self.border is None or self.corner is None:
            return Bordered(inverses(self.core))
        alone = 1 / self.corner
        shares = self.border * alone
        core = inverses(self.core - batched(shares, self.border, (2, 2)))
        last = -row_times(shares.swapaxes(1, 2), core)
        return Bordered(core, last.swapaxes(1, 2), alone - row_times(last, shares))


# Not inlined, so that the program has one body for each size.
@jax.jit
def _added(core: Matrices, shift: Float[Array, " groups"]) -> Matrices:
    return core + shift[:, None, None] * jnp.eye(core.shape[1], dtype=core.dtype)[None]


class Rows(NamedTuple):
    """Several matrices of one size, all with their last row apart or none: the eigenvectors of `Bordered` ones.

    Attributes:
        core: without the last row, if it is apart.
        last: that row.
    """

    core: Float[Array, "groups size k"]
    last: Float[Array, "groups 1 k"] | None = None

    def whole(self) -> Float[Array, "groups rows k"]:
        """The matrices with all their rows."""
        return self.core if self.last is None else jnp.concatenate([self.core, self.last], 1)

    def squared(self) -> Rows:
        """The squares of all entries."""
        return Rows(jnp.square(self.core), None if self.last is None else jnp.square(self.last))

    def times(self, x: Float[Array, "groups k o"]) -> tuple[Float[Array, "groups size o"], Float[Array, "groups 1 o"] | None]:
        """Products, whose last row is apart too."""
        return batched(self.core, x), None if self.last is None else row_times(self.last, x)

    def transposed_times(self, rows: Float[Array, "groups size o"], last: Array | None) -> Float[Array, "groups k o"]:
        """Products of the transposed matrices with ones whose last row is apart too."""
        product = batched(self.core, rows, (1, 1))
        return product if self.last is None or last is None else product + batched(self.last, last, (1, 1))


def bordered(matrices: Float[Array, "groups rows rows"]) -> Bordered:
    """Matrices with their last row and column apart."""
    return Bordered(matrices[:, :-1, :-1], matrices[:, :-1, -1:], matrices[:, -1:, -1:])
