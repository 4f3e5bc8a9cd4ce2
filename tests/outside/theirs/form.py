"""A form: a way to store a Fisher."""

import dataclasses

import jax
import jax.numpy as jnp

import jaxfisher as jf


@jf.array_fields("level", "direction", repr=False)
class PlusRankOne(jf.Form):
    """``level I + direction direction^T``."""

    level: jax.Array
    direction: jax.Array
    spec: jf.ParamSpec

    name = "identity plus rank one"

    def as_matrix(self):
        return self.level * jnp.eye(self.spec.size, dtype=self.spec.dtype) + jnp.outer(self.direction, self.direction)

    def product(self):
        def product(v):
            flat = self.spec.ravel(v, "v")
            return self.spec.unravel(self.level * flat + (self.direction @ flat) * self.direction)

        return product

    def diagonal(self):
        return self.spec.unravel(self.level + jnp.square(self.direction))

    def scaled(self, factor):
        return dataclasses.replace(self, level=factor * self.level, direction=jnp.sqrt(factor) * self.direction)

    def restrict(self, keep, treedef):
        ends = [sum(self.spec.sizes[: i + 1]) for i in range(len(keep) - 1)]
        parts = [part for part, kept in zip(jnp.split(self.direction, ends), keep, strict=True) if kept]
        return PlusRankOne(self.level, jnp.concatenate(parts), self.spec.restrict(keep, treedef))


def plus_rank_one(like, level, direction):
    """The form as an operator over the parameters of another operator."""
    return jf.Operator(PlusRankOne(level, direction, like.spec), jf.Provenance("invented", like.n))
