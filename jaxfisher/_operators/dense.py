"""Fishers held as one p x p matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._linalg import matmul
from jaxfisher._operators.form import Form, small_matrix
from jaxfisher._pytree import array_fields
from jaxfisher._tree import ParamSpec


@array_fields("matrix", repr=False)
class Dense(Form):
    """A symmetric matrix over the parameters, with every entry held."""

    matrix: Float[Array, "p p"]
    spec: ParamSpec

    name = "dense"
    averages = True
    formed = True

    @property
    def stack(self) -> tuple[int, ...]:
        return self.matrix.shape[:-2]

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.matrix

    def diagonal(self) -> Any:
        return self.spec.unravel(jnp.diagonal(self.matrix))

    def product(self) -> Callable[[Any], Any]:
        return lambda v: self.spec.unravel(matmul(self.matrix, self.spec.ravel(v, "v")))

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Dense:
        kept = [jnp.full(size, flag) for size, flag in zip(self.spec.sizes, keep, strict=True)]
        index = jnp.flatnonzero(jnp.concatenate(kept), size=sum(s for s, k in zip(self.spec.sizes, keep, strict=True) if k))
        return Dense(self.matrix[jnp.ix_(index, index)], self.spec.restrict(keep, treedef))

    def rescaled(self, factors: Sequence[Scalar]) -> Dense:
        parts = [jnp.broadcast_to(f.reshape(-1), size) for f, size in zip(factors, self.spec.sizes, strict=True)]
        by_entry = jnp.concatenate(parts).astype(self.matrix.dtype)
        return dataclasses.replace(self, matrix=by_entry[:, None] * self.matrix * by_entry[None, :])

    def scaled(self, factor: Scalar) -> Dense:
        return dataclasses.replace(self, matrix=factor * self.matrix)

    def plus(self, other: Form) -> Dense | None:
        return Dense(self.matrix + other.matrix, self.spec) if isinstance(other, Dense) else None


@functools.singledispatch
def by_entry(form: Form) -> Form:
    """The same matrix in a form whose `Form.rescaled` also takes an array for a leaf; dense unless a form does better."""
    return Dense(small_matrix(form, "a damping for each parameter"), form.spec)


@by_entry.register
def _(form: Dense) -> Dense:
    return form
