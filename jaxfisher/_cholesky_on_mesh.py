"""The Cholesky factorisation of a matrix whose rows are sharded over the devices of a mesh, and solves with the factor.

Each of the D devices keeps its own strip of rows, n^2 / D numbers, and none ever holds the whole matrix. The factor is computed
one block of columns at a time: every device divides its rows of the block by the block's diagonal, sends them to the others (n
numbers for each column of the block), and subtracts the product of its rows with all rows from its own strip.

Reference: Blackford et al., ScaLAPACK Users' Guide (SIAM 1997), for right-looking factorisation of distributed matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxfisher._linalg import matmul


class Strips(NamedTuple):
    """How the rows of a square matrix are sharded, over an axis of a mesh, and the number of columns in a block."""

    mesh: Mesh
    axis: str
    block: int

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of the matrix."""
        return NamedSharding(self.mesh, PartitionSpec(self.axis, None))


class Lower(NamedTuple):
    """A Cholesky factor ``L`` with its rows sharded.

    Attributes:
        rows: ``L``.
        corners: the diagonal blocks of ``L``, replicated on every device.
    """

    rows: Float[Array, "n n"]
    corners: Float[Array, "blocks b b"]


def block_size(n: int, most: int) -> int:
    """The number of columns in a block: the largest divisor of n that is at most ``most``."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)


def factorised(matrix: Float[Array, "n n"], strips: Strips) -> Lower:
    """The factor ``L`` with ``L L^T`` a symmetric positive definite matrix; NaN if the matrix is not positive definite."""
    run = jax.shard_map(
        partial(_factorised, axis=strips.axis, block=strips.block),
        mesh=strips.mesh,
        in_specs=PartitionSpec(strips.axis, None),
        out_specs=_places(strips),
        check_vma=False,
    )
    lower: Lower = run(matrix)
    return lower


def solved_by(lower: Lower, b: Float[Array, " n"], strips: Strips) -> Float[Array, " n"]:
    """``(L L^T)^-1 b``, with b and the result replicated on every device."""
    run = jax.shard_map(
        partial(_solved, axis=strips.axis, block=strips.block),
        mesh=strips.mesh,
        in_specs=(_places(strips), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    x: Array = run(lower, b)
    return x


def _places(strips: Strips) -> Any:
    """The partition specs of a factor."""
    return Lower(rows=PartitionSpec(strips.axis, None), corners=PartitionSpec())  # type: ignore[arg-type]


def _factorised(rows: Float[Array, "m n"], axis: str, block: int) -> Lower:
    count, size = rows.shape
    own, columns = _own_rows(count, axis), jnp.arange(size, dtype=jnp.int32)

    def step(k: Array, state: Lower) -> Lower:
        rows, corners = state
        start = k * block
        panel = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        corner = jnp.linalg.cholesky(_in_block(panel, own - start, axis), symmetrize_input=False)
        divided = jax.lax.linalg.triangular_solve(corner, panel, left_side=False, lower=True, transpose_a=True)
        divided = jnp.where(own[:, None] >= (start + jnp.arange(block, dtype=jnp.int32))[None, :], divided, 0)
        everyone = jax.lax.all_gather(divided, axis, tiled=True)
        later = jnp.where((columns >= start + block)[:, None], everyone, 0)
        rows = jax.lax.dynamic_update_slice_in_dim(rows - matmul(divided, later.T), divided, start, axis=1)
        return Lower(rows, corners.at[k].set(corner))

    corners = jnp.zeros((size // block, block, block), rows.dtype)
    rows, corners = jax.lax.fori_loop(jnp.int32(0), jnp.int32(size // block), step, Lower(rows, corners))
    return Lower(jnp.where(own[:, None] >= columns[None, :], rows, 0), corners)


def _solved(lower: Lower, b: Float[Array, " n"], axis: str, block: int) -> Float[Array, " n"]:
    rows, corners = lower
    own = _own_rows(rows.shape[0], axis)
    solve = partial(jax.scipy.linalg.solve_triangular, lower=True)

    def panel(k: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, k * block, block, axis=1)

    def forward(k: Array, rest: Array) -> Array:
        y = solve(corners[k], jax.lax.dynamic_slice_in_dim(rest, k * block, block))
        below = jnp.where(own >= (k + 1) * block, matmul(panel(k), y), 0)
        rest = rest - jax.lax.all_gather(below, axis, tiled=True)
        return jax.lax.dynamic_update_slice_in_dim(rest, y, k * block, axis=0)

    def backward(i: Array, x: Array) -> Array:
        k = end - 1 - i
        below = jnp.where(own >= (k + 1) * block, x[own], 0)
        rest = jax.lax.dynamic_slice_in_dim(x, k * block, block) - jax.lax.psum(matmul(below, panel(k)), axis)
        return jax.lax.dynamic_update_slice_in_dim(x, solve(corners[k], rest, trans=1), k * block, axis=0)

    first, end = jnp.int32(0), jnp.int32(corners.shape[0])
    return jax.lax.fori_loop(first, end, backward, jax.lax.fori_loop(first, end, forward, b))


def _own_rows(count: int, axis: str) -> Int[Array, " m"]:
    return jax.lax.axis_index(axis) * count + jnp.arange(count, dtype=jnp.int32)


def _in_block(panel: Float[Array, "m b"], places: Int[Array, " m"], axis: str) -> Float[Array, "b b"]:
    """The rows of a panel whose places are inside the block, gathered from the devices that hold them."""
    block = panel.shape[1]
    inside = (places >= 0) & (places < block)
    mine = jnp.zeros((block, block), panel.dtype).at[jnp.where(inside, places, block)].set(panel, mode="drop")
    whole: Array = jax.lax.psum(mine, axis)
    return whole
