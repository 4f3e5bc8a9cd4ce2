"""The base of forms over one layer: vectors of its weight and bias as matrices of inputs by outputs, group by group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._bordered import Bordered, bordered
from jaxfisher._engine import Layout
from jaxfisher._operators.form import Form


class Layer(Form):
    """The block of one layer; its vectors are lists of a weight and perhaps a bias, in the parameters' order."""

    layout: Layout
    weight: int
    """The place of the weight in the lists."""

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias, as the weight of a last input that is always one."""
        return len(self.spec.shapes) > 1

    def _rows(self, v: Any) -> tuple[Float[Array, "groups inputs outputs"], Float[Array, "groups 1 outputs"] | None]:
        """The weight's rows of a vector's matrix, and the bias's."""
        leaves = jax.tree.leaves(v)
        last = leaves[1 - self.weight].reshape(self.layout.groups, 1, -1) if self.has_bias else None
        return self.layout.matrix(leaves[self.weight]), last

    def _from_rows(self, rows: Float[Array, "groups inputs outputs"], last: Float[Array, "groups 1 outputs"] | None) -> Any:
        leaves = [self.layout.leaf(rows)]
        if last is not None:
            leaves.insert(1 - self.weight, last.reshape(self.spec.shapes[1 - self.weight]))
        return self.spec.tree(leaves)

    def _matrix(self, v: Any) -> Float[Array, "groups inputs outputs"]:
        rows, last = self._rows(v)
        return rows if last is None else jnp.concatenate([rows, last], axis=1)

    def _leaves(self, matrix: Float[Array, "groups inputs outputs"]) -> Any:
        return self._from_rows(matrix[:, : self.layout.inputs], matrix[:, -1:] if self.has_bias else None)

    @property
    def _bias_layout(self) -> Layout:
        """The bias alone as the weight of one input."""
        sizes = self.layout.groups, self.layout.outputs
        return Layout(self.spec.shapes[1 - self.weight], sizes, (0, 1), sizes[0], 1, sizes[1])

    def _side(self, inputs: Float[Array, "groups inputs inputs"]) -> Bordered:
        """A matrix over the inputs in its stored form, with the row and column of a bias separate."""
        return bordered(inputs) if self.has_bias else Bordered(inputs)

    def _as_matrix(self, blocks: Float[Array, "groups size size"]) -> Float[Array, "p p"]:
        """Dense blocks in the order of the parameters."""
        groups, size, _ = blocks.shape
        full = (jnp.eye(groups, dtype=blocks.dtype)[:, None, :, None] * blocks[:, :, None, :]).reshape(groups * size, -1)
        shape = (groups, -1, self.layout.outputs)
        order = self.spec.ravel(self._leaves(jnp.arange(groups * size).reshape(shape).astype(self.spec.dtype)), "v").astype(int)
        return full[order][:, order]
