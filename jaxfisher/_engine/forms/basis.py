"""A basis of one layer, and the squares of all rows along it.

A layer is a weight, seen as matrices ``[groups, inputs, outputs]``, and perhaps a bias, the weight of a last input that is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import times
from jaxfisher._engine.forms.form import Form
from jaxfisher._engine.forms.formed import Formed
from jaxfisher._engine.forms.layout import Layout, matrix_layout
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.moments import has_moments, products
from jaxfisher._engine.forms.product import Product
from jaxfisher._engine.forms.squares import diagonal
from jaxfisher._linalg import matmul
from jaxfisher._pieces import sum_batches
from jaxfisher._pytree import array_fields
from jaxfisher._tree import HIGHEST


@array_fields("inputs", "outputs")
class Basis:
    """Vectors ``q_a (x) q_g`` of a layer: of its weight, its bias, or both, which are the leaves at these indices.

    Vectors over only one of the two count as zero at the other, whose index is then None.
    """

    inputs: Float[Array, "groups inputs inputs"]
    outputs: Float[Array, "groups outputs outputs"]
    layout: Layout
    weight: int | None
    bias: int | None

    @property
    def by_weight(self) -> Float[Array, "groups rows inputs"]:
        """The entries of the input vectors that meet the weight."""
        return self.inputs[:, : self.layout.inputs]

    @property
    def by_bias(self) -> Float[Array, "groups 1 inputs"]:
        """The entry that meets the bias."""
        return self.inputs[:, self.layout.inputs :]

    @property
    def by_all(self) -> Float[Array, "groups rows inputs"]:
        """The entries that meet the leaves that there are: the weight, the bias or both."""
        parts = [self.by_weight] * (self.weight is not None) + [self.by_bias] * (self.bias is not None)
        return jnp.concatenate(parts, 1)

    @property
    def turned_layout(self) -> Layout:
        """The layout of vectors in the basis."""
        return matrix_layout(self.layout.groups, self.inputs.shape[2], self.layout.outputs)

    def turned(self, v: Any) -> Float[Array, "groups inputs outputs"]:
        """``q^T v`` for each vector q of the basis."""
        leaves = jax.tree.leaves(v)
        parts = []
        if self.weight is not None:
            parts.append(self.layout.matrix(leaves[self.weight]))
        if self.bias is not None:
            parts.append(leaves[self.bias].reshape(self.layout.groups, 1, -1))
        return matmul(matmul(self.by_all.swapaxes(1, 2), jnp.concatenate(parts, 1)), self.outputs)

    def of_diagonal(self, entries: Any) -> Float[Array, "groups inputs outputs"]:
        """``q^T D q`` for each vector q, of a diagonal matrix with these entries."""
        squared = dataclasses.replace(self, inputs=jnp.square(self.inputs), outputs=jnp.square(self.outputs))
        return squared.turned(entries)


def squares_along(
    basis: Basis, leaves: Sequence[Leaf], w: Float[Array, "examples rows"]
) -> Float[Array, "groups inputs outputs"]:
    """``sum_rows w (q^T D)^2`` for each vector q of a basis, with D the gradient of the leaves: the eigenvalues of EKFAC.

    Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018).
    """
    bias = None if basis.bias is None else leaves[basis.bias]
    if basis.weight is None:
        assert bias is not None, "a layer's part is its weight, its bias or both"
        along = times(_by_group(bias.gradient(), basis), basis.outputs)
        squares = jnp.einsum("nr,nrbto->bto", w, jnp.square(along), precision=HIGHEST)
        return jnp.square(basis.by_bias).swapaxes(1, 2) * squares
    weight = leaves[basis.weight]
    # If the bias is joined to this weight and the layouts agree, the bias's input of one is appended to the left factors.
    joined = bias is not None and bias.layer == basis.weight and has_moments(weight) and weight.layout == basis.layout
    given = () if bias is None or joined else (bias.gradient(),)

    def of(leaf: Leaf, w: Array, *biases: Array) -> Array:
        made = [_with_one(product) for product in products(leaf)] if joined else leaf.made
        forms = [_turned(form, basis, basis.by_all if joined else basis.by_weight) for form in made]
        forms += [_turned_bias(gradients, basis) for gradients in biases]
        return diagonal(
            dataclasses.replace(leaf, forms=tuple(forms), shape=basis.turned_layout.shape, layer=None, bias=False), w
        )

    return weight.in_pieces(of, sum_batches, w, *given)


def _with_one(product: Product) -> Product:
    """The product with a last input of one, whose weight is the bias."""
    one = jnp.ones((*product.left.shape[:-1], 1), product.left.dtype)
    return dataclasses.replace(product, left=jnp.concatenate([product.left, one], -1))


def _turned(form: Form, basis: Basis, inputs: Float[Array, "groups rows inputs"]) -> Form:
    if isinstance(form, Product) and form.layout == basis.layout:
        # An input that would overflow in the product with the basis may have a cotangent of zero: it must not become a NaN.
        missing = tuple(axis for axis in (0, 1) if form.left.shape[axis] == 1)
        left = jnp.where(jnp.any(form.right != 0, (*missing, 4), keepdims=True), form.left, 0)
        return Product(times(left, inputs), times(form.right, basis.outputs), basis.turned_layout)
    matrices = basis.layout.matrix(form.made().gradient())
    return Formed(matmul(matmul(inputs.swapaxes(1, 2), matrices), basis.outputs))


def _turned_bias(gradients: Float[Array, "n rows *shape"], basis: Basis) -> Product:
    right = times(_by_group(gradients, basis), basis.outputs)
    return Product(basis.by_bias[None, None], right, basis.turned_layout)


def _by_group(gradients: Float[Array, "n rows *shape"], basis: Basis) -> Float[Array, "n rows groups 1 outputs"]:
    return gradients.reshape(*gradients.shape[:2], basis.layout.groups, 1, -1)
