"""The Fisher-Rao distance, for families in which it has a closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.exponential import Exponential
from jaxfisher._distributions.laplace import Laplace
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.normal import Normal
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._linalg import without_derivative
from jaxfisher.geometry._families import matched


def _half_plane(across: Array, up: Array, other: Array) -> Array:
    """The hyperbolic distance of two points at these heights: ``arccosh(1 + (dx^2 + dy^2) / 2yy')``, in a stable form."""
    return 2 * jnp.arcsinh(jnp.hypot(across, up - other) / (2 * jnp.sqrt(up) * jnp.sqrt(other)))


def _normal(p: Normal, q: Normal) -> Array:
    return 2**0.5 * _half_plane((p.loc - q.loc) / 2**0.5, p.scale, q.scale)


def _laplace(p: Laplace, q: Laplace) -> Array:
    return _half_plane(p.loc - q.loc, p.scale, q.scale)


def _bernoulli(p: Bernoulli, q: Bernoulli) -> Array:
    """``2 |arctan e^(a/2) - arctan e^(b/2)|``, as one arc tangent that is right for any logit."""
    low, high = jnp.minimum(p.logits, q.logits), jnp.maximum(p.logits, q.logits)
    flip = low + high > 0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    largest = 0.5 * jnp.maximum(high, 0)
    rise = -jnp.exp(0.5 * high - largest) * jnp.expm1(0.5 * (low - high))
    return 2 * jnp.arctan2(rise, jnp.exp(-largest) + jnp.exp(0.5 * (low + high) - largest))


def _categorical(p: Categorical, q: Categorical) -> Array:
    """The arc between ``sqrt p`` and ``sqrt q`` on a sphere of radius two, by the chord, without cancellation for near ones."""
    roots = [jnp.exp(0.5 * jax.nn.log_softmax(d.logits)) for d in (p, q)]
    return 4 * jnp.arcsin(jnp.minimum(0.5 * jnp.linalg.norm(roots[0] - roots[1], axis=-1), 2**-0.5))


def _poisson(p: Poisson, q: Poisson) -> Array:
    low, high = jnp.minimum(p.log_rate, q.log_rate), jnp.maximum(p.log_rate, q.log_rate)
    fall = jnp.where(low == high, 0, low - high)  # also for two rates of zero, whose logarithms are minus infinity
    return 2 * jnp.exp(0.5 * high) * jnp.abs(jnp.expm1(0.5 * fall))


def _exponential(p: Exponential, q: Exponential) -> Array:
    return jnp.abs(p.log_rate - q.log_rate)


def _without_slope_at_zero(length: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The distance, whose derivative at zero is NaN: it has none there, and the rules of JAX give any of several numbers."""
    return without_derivative(length, length == 0)


DISTANCES: dict[type, Callable[[Any, Any], Array]] = {
    Bernoulli: _bernoulli,
    Categorical: _categorical,
    Exponential: _exponential,
    Laplace: _laplace,
    Normal: _normal,
    Poisson: _poisson,
}


def distance(p: Any, q: Any) -> Float[Array, "*batch"]:
    r"""The Fisher-Rao distance of two distributions of a family: the length of the shortest path in the Fisher metric.

    .. math:: d(p, q) = \min_\gamma \int \sqrt{\dot\gamma^T F(\gamma)\, \dot\gamma}\, dt.

    It is a true distance, with the triangle inequality, and does not depend on coordinates. For nearby distributions it is
    ``sqrt(2 KL)``. The plane of mean and scale of a normal is hyperbolic; categorical distributions lie on a sphere of radius
    two.

    **When it is the wrong tool.** It bounds no errors; use the KL divergence for that. It has no derivative where p equals q:
    JAX gives NaN, also for the Hessian of its square, which is twice the Fisher. Take the Hessian of ``2 KL`` instead.

    Args:
        p: a distribution: Normal, Laplace, Bernoulli, Categorical, Poisson or Exponential.
        q: a distribution of the same family.

    Returns:
        One number for each distribution of the batch, shape ``[*batch]``. The distance of independent distributions together is
        the root of the sum of squares.

    Raises:
        TypeError: the families differ, or the family has no closed form.
        ValueError: the two have different numbers of classes.

    Reference: Atkinson and Mitchell, Rao's distance measure (Sankhya 1981), section 4; Miyamoto et al., On closed-form
    expressions for the Fisher-Rao distance (2024), tables 1 and 2.

    >>> import math, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> far = geometry.distance(jf.Normal(0.0, 1.0), jf.Normal(0.0, math.e))
    >>> print(round(float(far), 4))  # sqrt 2 for each factor e of the scale
    1.4142
    """
    remedy = "For a curve through a family, see jf.geometry.geodesic; for normal vectors of one mean or one covariance, "
    p, q, found = matched(p, q, DISTANCES, "distance", remedy + "jf.geometry.covariance_distance and mahalanobis_distance.")
    return _without_slope_at_zero(found(p, q))


def covariance_distance(p: MultivariateNormal, q: MultivariateNormal) -> Float[Array, "*batch"]:
    r"""The Fisher-Rao distance of two normal vectors of the same mean.

    .. math:: d = \sqrt{\tfrac12 \sum_k \log^2 \lambda_k}, \qquad \lambda_k \text{ the eigenvalues of } \Sigma_p^{-1} \Sigma_q.

    **When it is the wrong tool.** It ignores the means. If both means and covariances differ, there is no closed form.

    Args:
        p: a `jaxfisher.MultivariateNormal`.
        q: another, of the same dimension.

    Returns:
        One number for each of the batch, shape ``[*batch]``.

    Raises:
        TypeError: an argument of another family.
        ValueError: the dimensions differ.

    Reference: Atkinson and Mitchell (1981), section 4; Skovgaard, A Riemannian geometry of the multivariate normal model
    (1984).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> p, q = (jf.MultivariateNormal(jnp.zeros(2), scale * jnp.eye(2)) for scale in (1.0, jnp.e))
    >>> print(round(float(geometry.covariance_distance(p, q)), 4))  # sqrt(2 (1/2) 2^2)
    2.0
    """
    p, q, _ = matched(p, q, {MultivariateNormal: None}, "covariance_distance", "See jf.geometry.distance.")
    ratio = jax.scipy.linalg.solve_triangular(p.scale_tril, jnp.tril(q.scale_tril), lower=True)
    return _without_slope_at_zero((2 * jnp.sum(jnp.square(jnp.log(jnp.linalg.svd(ratio, compute_uv=False))), axis=-1)) ** 0.5)


def mahalanobis_distance(p: MultivariateNormal, q: MultivariateNormal) -> Float[Array, "*batch"]:
    r"""Mahalanobis' distance: the Fisher-Rao distance of two normal vectors within the family with p's covariance.

    .. math:: d = \sqrt{(\mu_p - \mu_q)^T \Sigma_p^{-1} (\mu_p - \mu_q)}.

    **When it is the wrong tool.** It ignores the covariance of q. If the covariance may change along the path, there is a
    shorter one.

    Args:
        p: a `jaxfisher.MultivariateNormal`.
        q: another, of the same dimension.

    Returns:
        One number for each of the batch, shape ``[*batch]``.

    Raises:
        TypeError: an argument of another family.
        ValueError: the dimensions differ.

    Reference: Atkinson and Mitchell (1981), section 4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> p, q = (jf.MultivariateNormal(jnp.array([mean, 0.0]), 2 * jnp.eye(2)) for mean in (0.0, 6.0))
    >>> print(geometry.mahalanobis_distance(p, q))
    3.0
    """
    p, q, _ = matched(p, q, {MultivariateNormal: None}, "mahalanobis_distance", "See jf.geometry.distance.")
    scaled = jax.scipy.linalg.solve_triangular(p.scale_tril, (p.loc - q.loc)[..., None], lower=True)[..., 0]
    return _without_slope_at_zero(jnp.linalg.norm(scaled, axis=-1))
