"""The dense second moment of leaves that have one left factor per example and one right factor per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine.forms.arrays import divisor, few, magnitude
from jaxfisher._engine.forms.formed import Formed
from jaxfisher._engine.forms.layout import Layout
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.product import Product
from jaxfisher._linalg import matmul
from jaxfisher._pieces import sum_batches
from jaxfisher._tree import HIGHEST


class Outer(NamedTuple):
    """The gradients ``left (x) right`` of one leaf."""

    left: Float[Array, "n inputs"]
    right: Float[Array, "n rows outputs"]
    layout: Layout


def outer(leaf: Leaf) -> Outer | None:
    """The leaf as one left factor per example and one right factor per row; None if it is not of that kind.

    A formed gradient counts as a right factor, with the number one as its left factor.
    """
    (form,) = leaf.forms if len(leaf.forms) == 1 else (None,)
    lead = (leaf.examples, leaf.rows)
    if isinstance(form, Formed):
        right = jnp.broadcast_to(form.value, (*lead, *leaf.shape)).reshape(*lead, -1)
        layout = Layout(leaf.shape, leaf.shape, tuple(range(len(leaf.shape))), 1, 1, math.prod(leaf.shape))
        return Outer(jnp.ones((leaf.examples, 1), leaf.dtype), right, layout)
    if not isinstance(form, Product) or form.positions * form.layout.groups != 1 or form.left.shape[1] != 1:
        return None
    left = jnp.broadcast_to(form.left[:, 0, 0, 0], (leaf.examples, form.layout.inputs))
    return Outer(left, jnp.broadcast_to(form.right[:, :, 0, 0], (*lead, form.layout.outputs)), form.layout)


def outer_moment(leaves: Sequence[Outer], w: Float[Array, "n rows"], factor: Scalar) -> Float[Array, "p p"]:
    """``factor^2 sum_rows w D D^T`` over all leaves.

    The rows of an example are summed first, ``M = sum_rows w g g^T``, so that the cost of ``sum_n (a a^T) (x) M`` does not
    depend on their number.
    """
    leaves = [_balanced(leaf, factor) for leaf in leaves]
    blocks: list[list[Array]] = [[jnp.zeros(())] * len(leaves) for _ in leaves]
    for i, leaf in enumerate(leaves):
        blocks[i][i] = _own_block(leaf, w)
        for j in range(i + 1, len(leaves)):
            blocks[i][j] = _cross_block(leaf, leaves[j], w)
            blocks[j][i] = blocks[i][j].T
    return jnp.block(blocks)


def _balanced(leaf: Outer, factor: Scalar) -> Outer:
    """The gradients times a number, with left factors scaled near one and their sizes moved to the right factors."""
    size = divisor(magnitude(leaf.left, -1), factor * magnitude(leaf.right, (1, 2))[:, 0])
    return Outer(leaf.left / size, leaf.right * size[:, None] * factor, leaf.layout)


def _own_block(leaf: Outer, w: Array) -> Float[Array, "size size"]:
    """One leaf's block: pairs of inputs by pairs of outputs. Each unordered pair is computed once."""
    inputs, outputs = _Pairs(leaf.layout.inputs), _Pairs(leaf.layout.outputs)

    def some(left: Array, right: Array, w: Array) -> Array:
        metric = jnp.einsum("nro,nrq->noq", w[:, :, None] * right, right, precision=HIGHEST)
        a = left[:, inputs.first] * left[:, inputs.second]
        return matmul(a.T, metric[:, outputs.first, outputs.second])

    pairs = sum_batches(some, (leaf.left, leaf.right, w), few(inputs.count + leaf.layout.outputs**2))
    full = pairs[inputs.index][:, :, outputs.index].transpose(0, 2, 1, 3)
    return _in_leaf_order(full, leaf.layout, leaf.layout)


def _cross_block(one: Outer, two: Outer, w: Array) -> Float[Array, "size size2"]:
    """The block of two different leaves."""
    rows, columns = one.layout, two.layout

    def some(a: Array, g: Array, b: Array, h: Array, w: Array) -> Array:
        metric = jnp.einsum("nro,nrq->noq", w[:, :, None] * g, h, precision=HIGHEST)
        inputs = (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)
        return matmul(inputs.T, metric.reshape(metric.shape[0], -1))

    size = rows.inputs * columns.inputs + rows.outputs * columns.outputs
    sums = sum_batches(some, (one.left, one.right, two.left, two.right, w), few(size))
    shape = (rows.inputs, columns.inputs, rows.outputs, columns.outputs)
    return _in_leaf_order(sums.reshape(shape).transpose(0, 2, 1, 3), rows, columns)


def _in_leaf_order(block: Float[Array, "i o j q"], rows: Layout, columns: Layout) -> Float[Array, "size size2"]:
    block = columns.leaf(block[:, :, None]).reshape(*block.shape[:2], -1)
    block = rows.leaf(jnp.moveaxis(block, -1, 0)[:, None]).reshape(block.shape[-1], -1)
    return block.T


class _Pairs:
    """Unordered pairs of indices below ``size``; ``index[i, j]`` is the position of the pair of i and j."""

    def __init__(self, size: int) -> None:
        self.first, self.second = np.triu_indices(size)
        self.count = len(self.first)
        self.index = np.zeros((size, size), int)
        self.index[self.first, self.second] = self.index[self.second, self.first] = np.arange(self.count)
