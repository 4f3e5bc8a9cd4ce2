"""Sums of outer products: the gradients of a weight that is multiplied with its inputs as a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import Seal, contracted, divisor, extent, magnitude, mean, sum_to, times, weighted
from jaxfisher._engine.forms.form import InPositions
from jaxfisher._engine.forms.layout import Layout
from jaxfisher._linalg import matmul, squared
from jaxfisher._pytree import array_fields


@array_fields("left", "right")
class Product(InPositions):
    """Gradients ``sum_t left_t (x) right_t``, group by group: inputs and cotangents at the T positions that share a weight."""

    left: Float[Array, "n rows groups T inputs"]
    right: Float[Array, "n rows groups T outputs"]
    layout: Layout

    unfactored = ""
    making = 0

    @property
    def name(self) -> str:
        """The name that `jaxfisher.explain` shows."""
        return "outer product" if self.positions == 1 else f"sum of {self.positions} outer products"

    def made(self) -> Product:
        """Itself."""
        return self

    def mv(
        self, v: Float[Array, "*shape"], seal: Seal, bias: Float[Array, "1 1 groups 1 outputs"] | None = None
    ) -> Float[Array, "n rows"]:
        """``sum_t left_t^T V right_t`` for every row; with a vector for the layer's ``bias``, plus ``sum_t bias . right_t``."""
        matrix, left, right = self.layout.matrix(v), self.left, self.right
        # Multiply the matrix with the factor that has fewer rows; the other one takes only a sum.
        if left.shape[0] * left.shape[1] > right.shape[0] * right.shape[1]:
            found = _met(times(right, matrix.swapaxes(1, 2)), left, seal)
            return found if bias is None else found + jnp.sum(seal(bias * right), (-3, -2, -1))
        along = times(left, matrix)
        return _met(along if bias is None else along + bias, right, seal)

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "*shape"]:
        """``sum_rows w sum_t left_t (x) right_t``."""
        left, right = self.left, self.right
        if left.shape[0] * left.shape[1] > right.shape[0] * right.shape[1]:
            left = weighted(w, left, right.shape)
        else:
            right = weighted(w, right, left.shape)
        return self.layout.leaf(contracted(sum_to(left, right.shape), sum_to(right, left.shape)))

    def gradient(self) -> Float[Array, "n rows *shape"]:
        """The gradients themselves."""
        return self.layout.leaf(self.matrices(self.layout))

    def matrices(self, layout: Layout) -> Float[Array, "n rows groups inputs outputs"]:
        """The gradients as matrices of the form's layout."""
        return matmul(self.left.swapaxes(-1, -2), self.right)

    def columns(self, layout: Layout, start: Array, size: int) -> Float[Array, "n rows groups size outputs"]:
        """Some inputs of the gradients, computed from these inputs' factors only."""
        left = jax.lax.dynamic_slice_in_dim(self.left, start, size, 4)
        return matmul(left.swapaxes(-1, -2), self.right)

    def left_size(self, *, bias: bool) -> Float[Array, "n rows groups T 1"]:
        """The largest entries of left factors; with a ``bias``, of factors that end in one."""
        return magnitude(self.left, -1, least=float(bias))

    def squared(self) -> Float[Array, "n rows groups"]:
        """``|D|^2`` of every row and group, from inner products of the factors of each row."""
        left, right = divisor(magnitude(self.left, -1)), divisor(magnitude(self.right, -1))
        lefts = matmul(self.left / left, self.left.swapaxes(-1, -2))
        rights = matmul(self.right / right, self.right.swapaxes(-1, -2))
        return jnp.sum(lefts * rights * (left * right), (-2, -1))

    def squares(self) -> Product:
        """The product whose gradients are the entrywise squares; exact where T is one."""
        # Left factors are scaled near one. Right factors take over their sizes, which therefore must not vary along an axis
        # where the right factors have length one.
        missing = (axis for axis in (0, 1) if self.right.shape[axis] == 1)
        size = magnitude(self.left, (-1, *missing))
        single = [axis for axis, length in enumerate(size.shape) if length == 1]
        size = divisor(size, magnitude(self.right, single))
        return dataclasses.replace(self, left=squared(self.left / size), right=squared(self.right * size))

    def sizes(self, *, bias: bool) -> Float[Array, "n rows"]:
        """The products of the largest entries of both factors, summed over positions."""
        return jnp.max(jnp.sum(self.left_size(bias=bias) * magnitude(self.right, -1), (3, 4)), 2)

    def means(self, w: Float[Array, "n rows"], by_row: bool) -> tuple[Array, ...]:
        """The means of both factors."""
        return mean(self.left, w * extent(self.right), by_row), mean(self.right, w, by_row)

    def shifted(self, means: tuple[Array, ...]) -> tuple[Product, ...]:
        """Two products: deviations of left factors with right factors, and a constant with deviations of right factors."""
        left, right = means
        moving = dataclasses.replace(self, left=self.left - left)
        return moving, Deviation(left, self.right - right, self.layout, right)


@array_fields("left", "right", "mean")
class Deviation(Product):
    """A product of a constant left factor and the deviations of right factors from their ``mean``.

    The gradients less a constant are the sum of such a product and one with the whole right factors (`Product.shifted`). The
    right factors of both differ by ``mean``, so inner products of the sum take no more products of matrices than those of a
    single product.
    """

    mean: Float[Array, "n rows groups T outputs"]

    def changed(self, change: Callable[[Array], Array]) -> Deviation:
        """The product with other right factors, and so with another mean of them."""
        return dataclasses.replace(self, right=change(self.right), mean=change(self.mean))


def _met(along: Array, other: Float[Array, "n rows groups T m"], seal: Seal) -> Float[Array, "n rows"]:
    """The sum of the products of all entries, for each row."""
    return jnp.sum(_zero_times(seal(along), other), (-3, -2, -1))


@jax.custom_jvp
def _zero_times(along: Array, other: Array) -> Array:
    """``along * other``, which is zero where ``other`` is: an input whose product overflows may have a cotangent of zero."""
    return jnp.where(other == 0, 0, along * other)


@_zero_times.defjvp
def _zero_times_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # The rule for `where` would lose the derivative by ``other`` where that is zero.
    (along, other), (by_along, by_other) = primals, tangents
    known = jnp.where(jnp.isfinite(along) | (other != 0), along, 0)
    return _zero_times(along, other), _zero_times(by_along, other) + known * by_other
