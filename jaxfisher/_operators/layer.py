"""What is over one layer: vectors of its weight and bias as matrices of inputs by outputs, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine import Basis, Layout
from jaxfisher._operators.form import Form


class Layer(Form):
    """The block of one layer; its vectors are lists of a weight and perhaps a bias, in the parameters' order."""

    layout: Layout
    weight: int
    """The place of the weight in the lists."""

    inputs: Float[Array, "groups inputs inputs"]
    outputs: Float[Array, "groups outputs outputs"]

    def basis_over(self, places: Sequence[int]) -> Basis:
        """The vectors of its factors as a basis, for forms over the leaves at these places among its own."""
        here = {place: i for i, place in enumerate(places)}
        bias = here.get(1 - self.weight) if self.has_bias else None
        return Basis(self.inputs, self.outputs, self.layout, here.get(self.weight), bias)

    @property
    def has_bias(self) -> bool:
        """Whether the bias is there, as the weight of a last input that is always one."""
        return len(self.spec.shapes) > 1

    def _matrix(self, v: Any) -> Float[Array, "groups inputs outputs"]:
        leaves = jax.tree.leaves(v)
        matrix = self.layout.matrix(leaves[self.weight])
        if not self.has_bias:
            return matrix
        return jnp.concatenate([matrix, leaves[1 - self.weight].reshape(1, 1, -1)], axis=1)

    def _leaves(self, matrix: Float[Array, "groups inputs outputs"]) -> Any:
        leaves = [self.layout.leaf(matrix[:, : self.layout.inputs])]
        if self.has_bias:
            bias = matrix[:, -1].reshape(self.spec.shapes[1 - self.weight])
            leaves.insert(1 - self.weight, bias)
        return self.spec.tree(leaves)

    def _per_input(self, factors: Sequence[Scalar]) -> Float[Array, " inputs"]:
        """A factor for each leaf, as a factor for each input."""
        parts = [jnp.full(self.layout.inputs, 1, self.spec.dtype) * factors[self.weight]]
        if self.has_bias:
            parts.append(jnp.ones(1, self.spec.dtype) * factors[1 - self.weight])
        return jnp.concatenate(parts)

    def _as_matrix(self, blocks: Float[Array, "groups size size"]) -> Float[Array, "p p"]:
        """Dense blocks in the order of the parameters."""
        groups, size, _ = blocks.shape
        full = (jnp.eye(groups, dtype=blocks.dtype)[:, None, :, None] * blocks[:, :, None, :]).reshape(groups * size, -1)
        shape = (groups, -1, self.layout.outputs)
        order = self.spec.ravel(self._leaves(jnp.arange(groups * size).reshape(shape).astype(self.spec.dtype)), "v").astype(int)
        return full[order][:, order]
