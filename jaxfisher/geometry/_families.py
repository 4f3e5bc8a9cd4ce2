"""Matching two distributions of one family with the family's entry in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.foreign import as_distribution

T = TypeVar("T")


def matched(p: Any, q: Any, table: Mapping[type, T], caller: str, remedy: str) -> tuple[Any, Any, T]:
    """Both arguments as distributions of the library, of one batch shape, and the entry of their family in ``table``."""
    first, second = as_distribution(p), as_distribution(q)
    kinds = [type(made).__name__ for made in (first, second)]
    if type(first) is not type(second):
        raise TypeError(f"{caller}: `p` is a {kinds[0]} and `q` a {kinds[1]}; expected two distributions of one family.")
    if type(first) not in table:
        known = ", ".join(sorted(family.__name__ for family in table))
        raise TypeError(f"{caller}: a {kinds[0]} has no closed form here; expected one of {known}. {remedy}")
    if first._own_shapes() != second._own_shapes():
        raise ValueError(
            f"{caller}: the two are over different spaces: {first} and {second}. Give both the same number of classes or "
            "dimensions."
        )
    return *_of_one_batch(first, second, caller), table[type(first)]


def _of_one_batch(p: Distribution, q: Distribution, caller: str) -> tuple[Distribution, Distribution]:
    """Both with the same batch axes: JAX's solves take a matrix beside a batch of matrices for a batch of vectors."""
    shapes = p.batch_shape, q.batch_shape
    try:
        batch = np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ValueError(
            f"{caller}: `p` has the batch shape {shapes[0]} and `q` {shapes[1]}, which do not broadcast. Give both as many "
            "distributions, or one of them a single one."
        ) from error

    def spread(d: Distribution) -> Distribution:
        leaves = zip(jax.tree.leaves(d), d.field_ndims, strict=True)
        return d._make(*(jnp.broadcast_to(leaf, batch + leaf.shape[leaf.ndim - k :]) for leaf, k in leaves))

    return spread(p), spread(q)
