"""The excess of convex functions over their tangents, of which divergences between two rates or two scales are made."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._distributions.special import exp_gap_ratio, log_gap_ratio
from jaxfisher._distributions.stable import ratio


def excess_over_log(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x/y - 1 - log(x/y)`` for positive ``x`` and ``y``: the divergence between two scales, zero to second order at equality.

    Near equality the difference is taken before the quotient; far from it ``log x - log y`` stays finite even if ``x/y``
    underflows.
    """
    excess = ratio(x - y, y)
    near = jnp.abs(excess) < 0.5
    # The inner `where` keeps the gradient of the unused branch finite.
    small = jnp.where(near, excess, 0)
    return jnp.where(near, small * log_gap_ratio(small), excess - (jnp.log(x) - jnp.log(y)))


def exp_excess(d: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``e^d - 1 - d`` with all its digits: never negative, zero to second order at 0, infinite at either end."""
    near = jnp.abs(d) < 1
    small, far = jnp.where(near, d, 0), jnp.where(near, 1, d)
    # Far from zero as it stands, for the sake of its second derivative, e^d. From 700 on the exponential alone counts.
    return jnp.where(near, -small * exp_gap_ratio(-small), jnp.exp(far) - 1 - jnp.minimum(far, 700))
