"""Kernels of convolutions: products whose left factors are computed on demand, for a few examples at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import extent, mean
from jaxfisher._engine.forms.form import InPositions
from jaxfisher._engine.forms.layout import Layout
from jaxfisher._engine.forms.product import Product
from jaxfisher._engine.windows import Windows
from jaxfisher._pytree import array_fields


@array_fields("windows", "right")
class Convolution(InPositions):
    """A product whose left factors are an image seen through windows. Only the image is stored, which takes far less memory."""

    windows: Windows
    right: Float[Array, "n rows groups T outputs"]
    layout: Layout

    name = "convolution"
    unfactored = ""

    @property
    def making(self) -> int:
        """The numbers in the windows of one example."""
        return self.windows.size * int(self.right.shape[1])

    def made(self) -> Product:
        """The product, with the windows computed."""
        left = jax.vmap(jax.vmap(Windows.array))(self.windows)
        return Product(left.reshape(*left.shape[:4], -1), self.right, self.layout)

    def sizes(self, *, bias: bool) -> Float[Array, "n rows"]:
        """The products of the largest entries of both factors, summed over positions."""
        left = jax.vmap(jax.vmap(Windows.largest))(self.windows)
        right = jnp.max(jnp.abs(self.right), -1, initial=0.0)
        return jnp.max(jnp.sum((jnp.maximum(left, 1) if bias else left) * right, 3), 2)

    def means(self, w: Float[Array, "n rows"], by_row: bool) -> tuple[Array, ...]:
        """The means of the images and of the right factors."""
        return mean(self.windows.image, w * extent(self.right), by_row), mean(self.right, w, by_row)

    def shifted(self, means: tuple[Array, ...]) -> tuple[Convolution, ...]:
        """Two convolutions: deviations of images with right factors, and a constant image with deviations of right factors."""
        image, right = means
        moving = dataclasses.replace(self.windows, image=self.windows.image - image)
        constant = dataclasses.replace(self.windows, image=image)
        return Convolution(moving, self.right, self.layout), Convolution(constant, self.right - right, self.layout)
