"""Pieces: a batch is split into chunks, of which one is in memory at a time, and the results are put together."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._varying import varying_like


def map_batches(function: Callable[..., Any], data: tuple[Any, ...], batch_size: int | None) -> Any:
    """``function`` of each piece of ``data``, results joined in the order of the examples along their leading axis.

    ``function`` takes a batch and returns equally many rows for each example; pieces have at most ``batch_size`` examples.
    """
    cut = pieces(data, batch_size)
    if cut is None:
        return function(*data)
    stacked = jax.lax.map(lambda i: function(*cut.piece(i)), jnp.arange(cut.count))
    joined = jax.tree.map(cut.in_order, stacked)
    if cut.rest is None:
        return joined
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), joined, function(*cut.rest))


def sum_batches(function: Callable[..., Any], data: tuple[Any, ...], batch_size: int | None) -> Any:
    """The sum of ``function(*piece)`` over the pieces of ``data``."""
    cut = pieces(data, batch_size)
    if cut is None:
        return function(*data)
    # Jitted, so that one trace serves both for the shapes and for the numbers.
    of_piece = jax.jit(lambda i: function(*cut.piece(i)), inline=True)
    numbers = jnp.arange(cut.count)
    shapes = jax.eval_shape(of_piece, jax.ShapeDtypeStruct((), numbers.dtype))
    zero = varying_like(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), data)

    def step(total: Any, i: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_piece(i)), None

    total, _ = jax.lax.scan(step, zero, numbers)
    return total if cut.rest is None else jax.tree.map(jnp.add, total, function(*cut.rest))


def sum_again(function: Callable[..., Any], data: tuple[Any, ...], batch_size: int | None) -> Any:
    """`sum_batches`, but a derivative recomputes the intermediate values of each piece and holds those of one at a time."""
    return sum_batches(function if batch_size is None else jax.checkpoint(function), data, batch_size)


@dataclasses.dataclass(frozen=True)
class Pieces(abc.ABC):
    """A batch in pieces of one size, and the rest. A piece is sliced from the data only when it is needed.

    Attributes:
        data: the arrays of the batch.
        count: how many pieces there are.
        size: how many examples a piece has.
    """

    data: tuple[Any, ...]
    count: int
    size: int

    @property
    @abc.abstractmethod
    def rest(self) -> tuple[Any, ...] | None:
        """The examples that are in no piece; None if there are none."""

    @abc.abstractmethod
    def piece(self, i: Array) -> tuple[Any, ...]:
        """The examples of piece ``i``."""

    @abc.abstractmethod
    def in_order(self, stacked: Array) -> Array:
        """Rows of all pieces, ``[count, rows, ...]``, in the order of their examples."""


class Interleaved(Pieces):
    """Pieces of every ``count``-th example.

    If examples are spread over devices, each device works on a part of its own share in every piece, and no example is sent to
    another device: the axis of examples is split into (size, count), and the first of the two stays spread.
    """

    @property
    def rest(self) -> None:
        return None

    def piece(self, i: Array) -> tuple[Any, ...]:
        def taken(leaf: Array) -> Array:
            apart = leaf.reshape(self.size, self.count, *leaf.shape[1:])
            return jax.lax.dynamic_index_in_dim(apart, i, axis=1, keepdims=False)

        made: tuple[Any, ...] = jax.tree.map(taken, self.data)
        return made

    def in_order(self, stacked: Array) -> Array:
        rows, *rest = stacked.shape[1:]
        apart = stacked.reshape(self.count, self.size, rows // self.size, *rest)
        return apart.swapaxes(0, 1).reshape(self.count * rows, *rest)


class Consecutive(Pieces):
    """Pieces of neighbouring examples. The number of examples need not be a multiple of the size of a piece."""

    @property
    def rest(self) -> tuple[Any, ...] | None:
        end = self.count * self.size
        left: tuple[Any, ...] = jax.tree.map(lambda leaf: leaf[end:], self.data)
        return left

    def piece(self, i: Array) -> tuple[Any, ...]:
        cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * self.size, self.size)  # noqa: E731
        made: tuple[Any, ...] = jax.tree.map(cut, self.data)
        return made

    def in_order(self, stacked: Array) -> Array:
        return stacked.reshape(stacked.shape[0] * stacked.shape[1], *stacked.shape[2:])


def pieces(data: tuple[Any, ...], batch_size: int | None) -> Pieces | None:
    """``data`` in pieces of at most ``batch_size`` examples; None if one piece holds everything.

    If the number of examples has a divisor above half of ``batch_size`` and up to it, that is the size of all pieces, and there
    is no rest.
    """
    leaves = jax.tree.leaves(data)
    n = leaves[0].shape[0] if leaves else 1
    if batch_size is None or batch_size >= n:
        return None
    size = next((size for size in range(batch_size, batch_size // 2, -1) if n % size == 0), None)
    if size is None:
        return Consecutive(data, n // batch_size, batch_size)
    return Interleaved(data, n // size, size)
