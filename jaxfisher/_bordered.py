"""Symmetric matrices whose last row and column are stored separately.

Devices share the rows of an array evenly or not at all. A layer's inputs may divide evenly, but with one more for the bias they
do not. So such a matrix is stored in parts, which are joined only inside a program, and only if a computation needs the whole.
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
    """Several symmetric matrices of one size, either all with a border or all without.

    Attributes:
        core: the matrices, without their last row and column if these are stored separately.
        border: the last column without its last entry; None if there is no border.
        corner: the last entry of that column; None if there is no border.
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
        """The diagonals of the matrices."""
        entries = diagonals(self.core)
        return entries if self.corner is None else jnp.concatenate([entries, self.corner[:, 0]], 1)

    def traces(self) -> Float[Array, " groups"]:
        """The traces of the matrices."""
        traces = jnp.sum(diagonals(self.core), 1)
        return traces if self.corner is None else traces + self.corner.reshape(-1)

    def shifted(self, shift: Float[Array, " groups"]) -> Bordered:
        """The matrices with a number per group added to their diagonals."""
        corner = None if self.corner is None else self.corner + shift[:, None, None]
        return Bordered(_added(self.core, shift), self.border, corner)

    def widened(self) -> Bordered:
        """The matrices with a border; one of zeros if they have none."""
        if self.border is not None:
            return self
        groups, size, _ = self.core.shape
        dtype = self.core.dtype
        return Bordered(self.core, jnp.zeros((groups, size, 1), dtype), jnp.zeros((groups, 1, 1), dtype))

    def times(self, rows: Array, last: Array | None) -> tuple[Float[Array, "groups size k"], Float[Array, "groups 1 k"] | None]:
        """Products with matrices whose last row is stored separately too."""
        product = batched(self.core, rows)
        if self.border is None or self.corner is None or last is None:
            return product, None
        return product + batched(self.border, last), row_times(self.border.swapaxes(1, 2), rows) + self.corner * last

    def inverses(self, inverses: Callable[[Matrices], Matrices]) -> Bordered:
        """The inverses, with ``inverses`` for matrices without a border: the last row is eliminated first."""
        if self.border is None or self.corner is None:
            return Bordered(inverses(self.core))
        alone = 1 / self.corner
        shares = self.border * alone
        core = inverses(self.core - batched(shares, self.border, (2, 2)))
        last = -row_times(shares.swapaxes(1, 2), core)
        return Bordered(core, last.swapaxes(1, 2), alone - row_times(last, shares))


# Jitted and not inlined, so that the program has only one copy for each size.
@jax.jit
def _added(core: Matrices, shift: Float[Array, " groups"]) -> Matrices:
    return core + shift[:, None, None] * jnp.eye(core.shape[1], dtype=core.dtype)[None]


class Rows(NamedTuple):
    """Several matrices of one size, such as the eigenvectors of `Bordered` ones, with the last row stored separately or not.

    Attributes:
        core: the matrices, without their last row if it is stored separately.
        last: the last row, or None.
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
        """Products with matrices. Their last row is stored separately too."""
        return batched(self.core, x), None if self.last is None else row_times(self.last, x)

    def transposed_times(self, rows: Float[Array, "groups size o"], last: Array | None) -> Float[Array, "groups k o"]:
        """Products of the transposed matrices with matrices whose last row is stored separately too."""
        product = batched(self.core, rows, (1, 1))
        return product if self.last is None or last is None else product + batched(self.last, last, (1, 1))


def bordered(matrices: Float[Array, "groups rows rows"]) -> Bordered:
    """Matrices with their last row and column stored separately."""
    return Bordered(matrices[:, :-1, :-1], matrices[:, :-1, -1:], matrices[:, -1:, -1:])
