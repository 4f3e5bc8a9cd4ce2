"""Inverses as functions of the damping and of a vector: what is inverted is factored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._inverse import Factorise, Solved, refined
from jaxfisher._linalg import matmul, to_unit
from jaxfisher._tree import ParamSpec

Inverted = Callable[[Any], Solved]
"""``(F + damping I)^-1`` on vectors of the statistics dtype."""
FlatInverted = Callable[[Float[Array, " p"]], Solved]
"""The same on flat ones."""


def solve_matrix(matrix: Float[Array, "p p"], largest: Scalar, factorise: Factorise) -> Callable[[Scalar], FlatInverted]:
    """``v -> (matrix + damping I)^-1 v`` of a dense symmetric matrix, for dampings up to the largest; nothing overflows."""
    factor = to_unit(jnp.max(jnp.abs(matrix), initial=0.0), largest)
    matrix = matrix * factor
    inverses = factorise(matrix)

    def at(damping: Scalar) -> FlatInverted:
        damping = damping * factor
        inverse = inverses(damping)

        def product(x: Array) -> Array:
            return matmul(matrix, x) + damping * x

        def apply(v: Array) -> Solved:
            x, rest = refined(inverse.apply, product, v)
            return Solved(x * factor, rest, inverse.rank)

        return apply

    return at


def flat_inverse(spec: ParamSpec, inverse: FlatInverted) -> Inverted:
    """An inverse of flat vectors as one of parameter-shaped ones."""

    def apply(v: Any) -> Solved:
        x, rest, rank = inverse(spec.ravel(v, "v"))
        return Solved(spec.unravel(x), spec.unravel(rest), rank)

    return apply


def by_leaf(
    spec: ParamSpec, inside: Inverted, product: Callable[[Any], Any], roots: Sequence[Scalar], dampings: Sequence[Scalar]
) -> Inverted:
    """The inverse with a damping for each leaf, from that of an operator rescaled by their inverse roots.

    With D the dampings, ``(F + D)^-1 = D^-1/2 (D^-1/2 F D^-1/2 + I)^-1 D^-1/2``, and what is inside has the form of F.
    """

    def scaled(v: Any, factors: Sequence[Scalar]) -> Any:
        return spec.tree([f * leaf for f, leaf in zip(factors, jax.tree.leaves(v), strict=True)])

    def apply(v: Any) -> Solved:
        found = inside(scaled(v, roots))
        x = scaled(found.x, roots)
        rest = jax.tree.map(lambda b, f, d: b - f - d, v, product(x), scaled(x, dampings))
        return Solved(x, rest, found.rank)

    return apply
