"""Gradients stored as they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import Seal, mean, sum_to
from jaxfisher._engine.forms.layout import Layout
from jaxfisher._linalg import matmul
from jaxfisher._pytree import array_fields


@array_fields("value")
class Formed:
    """Gradients that are no larger than their factors, or that the engine could not factor."""

    value: Float[Array, "n rows *shape"]

    name = "elementwise"
    unfactored = "no factors"
    layout = None
    positions = 0
    making = 0

    def made(self) -> Formed:
        """Itself."""
        return self

    def mv(self, v: Float[Array, "*shape"], seal: Seal) -> Float[Array, "n rows"]:
        """``D . V`` for every row."""
        return matmul(self.value.reshape(*self.value.shape[:2], -1), v.reshape(-1))

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "*shape"]:
        """``sum_rows w D``."""
        lead, shape = self.value.shape[:2], self.value.shape[2:]
        w = sum_to(w, lead).reshape(-1)
        return matmul(w, self.value.reshape(w.size, math.prod(shape))).reshape(shape)

    def gradient(self) -> Float[Array, "n rows *shape"]:
        """The gradients."""
        return self.value

    def matrices(self, layout: Layout) -> Float[Array, "n rows groups inputs outputs"]:
        """The gradients as matrices of any layout."""
        return layout.matrix(self.value)

    def columns(self, layout: Layout, start: Array, size: int) -> Float[Array, "n rows groups size outputs"]:
        """Some inputs of the gradients in a layout."""
        return jax.lax.dynamic_slice_in_dim(layout.matrix(self.value), start, size, 3)

    def sizes(self, *, bias: bool) -> Float[Array, "n rows"]:
        """The largest entries in absolute value."""
        return jnp.max(jnp.abs(self.value), range(2, self.value.ndim), initial=0.0)

    def means(self, w: Float[Array, "n rows"], by_row: bool) -> tuple[Array, ...]:
        """The mean of the gradients."""
        return (mean(self.value, w, by_row),)

    def shifted(self, means: tuple[Array, ...]) -> tuple[Formed, ...]:
        """The gradients less a constant."""
        return (Formed(self.value - means[0]),)

    def changed(self, change: Callable[[Array], Array]) -> Formed:
        """The form with other gradients."""
        return Formed(change(self.value))
