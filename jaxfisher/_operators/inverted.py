"""Inverses as functions of a damping and a vector, with the matrix factored once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._inverse import Map
from jaxfisher._linalg import twice
from jaxfisher._null_space import is_unseen
from jaxfisher._system import Factorise, Solved, SolveInfo, System, direct_info
from jaxfisher._tree import ParamSpec

Inverted = Callable[[Any], Solved]
"""``(F + damping I)^-1`` as a function of vectors in the statistics dtype."""
FlatInverted = Callable[[Float[Array, " p"]], Solved]
"""The same as a function of flat vectors."""


def solve_matrix(matrix: Float[Array, "p p"], exact: Map, factorise: Factorise) -> Callable[[Scalar], FlatInverted]:
    """``v -> (F + damping I)^-1 v`` from the matrix of F, refined against ``exact``, the product with F, without overflow."""
    # Derivatives go through the products that solutions satisfy.
    inverses = factorise.factor(jax.lax.stop_gradient(matrix))
    roots = jnp.sqrt(jnp.abs(jnp.diagonal(jax.lax.stop_gradient(matrix))))

    def at(damping: Scalar) -> FlatInverted:
        inverse = inverses(jax.lax.stop_gradient(damping))
        unit, shares = inverse.unit, twice(damping, inverse.unit)

        def product(y: Array) -> Array:
            return unit * exact(unit * y) + shares * y

        factored = inverse.projected(lambda y: jax.lax.stop_gradient(product(y)))

        def left_out(b: Array, y: Array) -> tuple[Bool[Array, ""], Scalar]:
            return is_unseen(product(factored.left_out), factored.left_out, roots * unit), factored.astray(b, y)

        return partial(factorise.solved, System(product, factored.in_units, damping, unit, factored, factored.rank, left_out))

    return at


def flat_inverse(spec: ParamSpec, inverse: FlatInverted) -> Inverted:
    """An inverse on flat vectors, as an inverse on vectors shaped like the parameters."""

    def apply(v: Any) -> Solved:
        found = inverse(spec.ravel(v, "v"))
        return found._replace(x=spec.unravel(found.x), rest=spec.unravel(found.rest))

    return apply


def reported(spec: ParamSpec, inverse: Inverted, v: Any) -> tuple[Any, SolveInfo]:
    """The solution that an inverse gives for ``v``, and the report on it."""
    found = inverse(v)
    flat = found._replace(x=spec.ravel(found.x, "x"), rest=spec.ravel(found.rest, "v"))
    return found.x, direct_info(flat, spec.ravel(v, "v"))
