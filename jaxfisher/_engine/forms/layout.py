"""How the dimensions of a leaf are grouped into those of matrices."""

from __future__ import annotations

import dataclasses
import math

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf's dimensions are grouped: its entries in the order ``[groups, inputs, outputs]``.

    The leaf of this ``shape`` is reshaped to ``axes``, and these are transposed to this ``order``.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    order: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int

    def matrix(self, leaf: Float[Array, "..."]) -> Float[Array, "... groups inputs outputs"]:
        """A leaf, with any leading axes, as matrices."""
        lead = leaf.shape[: leaf.ndim - len(self.shape)]
        fine = leaf.reshape(*lead, *self.axes)
        fine = fine.transpose(*range(len(lead)), *(len(lead) + i for i in self.order))
        return fine.reshape(*lead, self.groups, self.inputs, self.outputs)

    def leaf(self, matrix: Float[Array, "... groups inputs outputs"]) -> Float[Array, "..."]:
        """The inverse of `matrix`."""
        lead = matrix.shape[:-3]
        fine = matrix.reshape(*lead, *(self.axes[i] for i in self.order))
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        fine = fine.transpose(*range(len(lead)), *(len(lead) + i for i in back))
        return fine.reshape(*lead, *self.shape)

    def turned(self) -> Layout:
        """The layout with inputs and outputs swapped."""
        sizes = [math.prod(self.axes[i] for i in self.order[:k]) for k in range(len(self.order) + 1)]
        first = sizes.index(self.groups)
        split = sizes.index(self.groups * self.inputs, first)
        order = (*self.order[:first], *self.order[split:], *self.order[first:split])
        return Layout(self.shape, self.axes, order, self.groups, self.outputs, self.inputs)


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """The layout of a leaf of unknown structure, as a column."""
    return Layout(shape, shape, tuple(range(len(shape))), 1, math.prod(shape), 1)


def matrix_layout(groups: int, inputs: int, outputs: int) -> Layout:
    """The layout of a leaf that has the axes ``[groups, inputs, outputs]`` already."""
    shape = (groups, inputs, outputs)
    return Layout(shape, shape, (0, 1, 2), *shape)
