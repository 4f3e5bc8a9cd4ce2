r"""The member of an exponential family on the line through the natural parameters of two others, between or beyond them.

If ``m`` is the member with the natural parameters ``(1 - b) eta_p + b eta_q``, the log of the affinity of p and q is a
difference of two KL divergences, which are accurate even if p and q are near each other:

.. math:: \log \int p^{1 - b} q^b = KL(p \,\|\, m) - b\, KL(p \,\|\, q).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.beta import Beta
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.dirichlet import Dirichlet
from jaxfisher._distributions.exponential import Exponential
from jaxfisher._distributions.gamma import Gamma
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.normal import Normal
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._linalg import matmul

Middle = tuple[Any, Array | Bool[Array, ""]]
"""The member, and whether it exists."""


def _linear(p: Any, q: Any, b: Array) -> Any:
    return jax.tree.map(lambda x, y: x + b * (y - x), p, q)


def _any(p: Any, q: Any, b: Array) -> Middle:
    """The member of a family whose fields are natural parameters that may be any numbers."""
    return _linear(p, q, b), jnp.ones((), bool)


def _positive(p: Any, q: Any, b: Array) -> Middle:
    """The member of a family whose fields are natural parameters, up to constants, and must be positive."""
    made = _linear(p, q, b)
    flags = [jnp.all(x > 0, axis=tuple(range(-k, 0))) for x, k in zip(jax.tree.leaves(made), made.field_ndims, strict=True)]
    return jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, 1), made), functools.reduce(jnp.logical_and, flags)


def _normal(p: Normal, q: Normal, b: Array) -> Middle:
    share = b * jnp.square(p.scale / q.scale)
    precision = (1 - b) + share
    there = precision > 0
    safe = jnp.where(there, precision, 1)
    return Normal(p.loc + share / safe * (q.loc - p.loc), p.scale * jax.lax.rsqrt(safe)), there


def _exponential(p: Exponential, q: Exponential, b: Array) -> Middle:
    change = b * jnp.expm1(q.log_rate - p.log_rate)
    there = change > -1
    return Exponential(p.log_rate + jnp.log1p(jnp.where(there, change, 0))), there


def _multivariate_normal(p: MultivariateNormal, q: MultivariateNormal, b: Array) -> Middle:
    """The member, computed in units in which the covariance of p is the identity."""
    own = jnp.tril(p.scale_tril)
    eye = jnp.broadcast_to(jnp.eye(own.shape[-1], dtype=own.dtype), own.shape)
    other = jax.scipy.linalg.solve_triangular(q.scale_tril, own, lower=True)
    square = matmul(jnp.swapaxes(other, -1, -2), other)
    precision = eye + b * (square - eye)
    there = ~jnp.any(jnp.isnan(jnp.linalg.cholesky(jax.lax.stop_gradient(precision))), axis=(-2, -1))
    safe = jnp.where(there[..., None, None], precision, eye)
    covariance = jnp.linalg.inv(safe)
    root = jnp.linalg.cholesky(0.5 * (covariance + jnp.swapaxes(covariance, -1, -2)))
    apart = jax.scipy.linalg.solve_triangular(own, (q.loc - p.loc)[..., None], lower=True)
    moved = matmul(own, b * jnp.linalg.solve(safe, matmul(square, apart)))
    return MultivariateNormal(p.loc + moved[..., 0], scale_tril=matmul(own, root)), there


MIDDLES: dict[type, Callable[[Any, Any, Array], Middle]] = {
    Bernoulli: _any,
    Beta: _positive,
    Categorical: _any,
    Dirichlet: _positive,
    Exponential: _exponential,
    Gamma: _positive,
    MultivariateNormal: _multivariate_normal,
    Normal: _normal,
    Poisson: _any,
}
