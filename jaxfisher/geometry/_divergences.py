"""Divergences other than Kullback and Leibler's: Renyi's and Amari's, for families in which they have a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, logsumexp
from jaxtyping import Array, Float

from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.beta import Beta
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.dirichlet import Dirichlet
from jaxfisher._distributions.exponential import Exponential
from jaxfisher._distributions.gamma import Gamma
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.normal import Normal
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._divergence import kl_divergence
from jaxfisher._values import check_number, positive
from jaxfisher.geometry._families import matched
from jaxfisher.geometry._middle import MIDDLES

Affinity = Callable[[Any, Any, Array], Array]
"""``(p, q, a) -> log of the integral of p^a q^(1 - a)``; infinite if the integral diverges."""


def _log_positive(x: Array) -> Array:
    """The logarithm; minus infinity for numbers that are not positive, as when a mixture of precisions is no precision."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def _normal(p: Normal, q: Normal, a: Array) -> Array:
    square = a * jnp.square(q.scale) + (1 - a) * jnp.square(p.scale)
    apart = jnp.square(p.loc - q.loc) / jnp.where(square > 0, square, 1)
    return a * jnp.log(q.scale) + (1 - a) * jnp.log(p.scale) - 0.5 * _log_positive(square) - 0.5 * a * (1 - a) * apart


def _multivariate_normal(p: MultivariateNormal, q: MultivariateNormal, a: Array) -> Array:
    mixed = jnp.linalg.cholesky(a * q.covariance + (1 - a) * p.covariance)
    solved = jax.scipy.linalg.solve_triangular(mixed, (p.loc - q.loc)[..., None], lower=True)[..., 0]
    halves = [jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1) for root in (p.scale_tril, q.scale_tril, mixed)]
    made = (1 - a) * halves[0] + a * halves[1] - halves[2] - 0.5 * a * (1 - a) * jnp.sum(jnp.square(solved), axis=-1)
    return jnp.where(jnp.isnan(halves[2]) & jnp.isfinite(halves[0] + halves[1]), jnp.inf, made)


def _bernoulli(p: Bernoulli, q: Bernoulli, a: Array) -> Array:
    logs = [jnp.stack([jax.nn.log_sigmoid(d.logits), jax.nn.log_sigmoid(-d.logits)]) for d in (p, q)]
    return logsumexp(a * logs[0] + (1 - a) * logs[1], axis=0)


def _categorical(p: Categorical, q: Categorical, a: Array) -> Array:
    logs = [jax.nn.log_softmax(d.logits) for d in (p, q)]
    return logsumexp(a * logs[0] + (1 - a) * logs[1], axis=-1)


def _poisson(p: Poisson, q: Poisson, a: Array) -> Array:
    mixed = jnp.exp(a * p.log_rate + (1 - a) * q.log_rate)
    return mixed - a * jnp.exp(p.log_rate) - (1 - a) * jnp.exp(q.log_rate)


def _exponential(p: Exponential, q: Exponential, a: Array) -> Array:
    mixed = a * jnp.exp(p.log_rate) + (1 - a) * jnp.exp(q.log_rate)
    return a * p.log_rate + (1 - a) * q.log_rate - _log_positive(mixed)


def _gamma(p: Gamma, q: Gamma, a: Array) -> Array:
    shape, rate = (a * at_p + (1 - a) * at_q for at_p, at_q in zip(*((d.concentration, d.rate) for d in (p, q)), strict=True))

    def partition(shape: Array, rate: Array) -> Array:
        inside = jnp.where((shape > 0) & (rate > 0), shape, 1)
        made = gammaln(inside) - inside * _log_positive(jnp.where(rate > 0, rate, 1))
        return jnp.where((shape > 0) & (rate > 0), made, jnp.inf)

    ends = a * partition(p.concentration, p.rate) + (1 - a) * partition(q.concentration, q.rate)
    return partition(shape, rate) - ends


def _log_beta(concentration: Array) -> Array:
    """The log of the multivariate beta function over the last axis; infinite if an entry is not positive."""
    there = jnp.all(concentration > 0, axis=-1)
    inside = jnp.where(there[..., None], concentration, 1)
    return jnp.where(there, jnp.sum(gammaln(inside), axis=-1) - gammaln(jnp.sum(inside, axis=-1)), jnp.inf)


def _of_concentrations(p: Array, q: Array, a: Array) -> Array:
    return _log_beta(a * p + (1 - a) * q) - a * _log_beta(p) - (1 - a) * _log_beta(q)


def _dirichlet(p: Dirichlet, q: Dirichlet, a: Array) -> Array:
    return _of_concentrations(p.concentration, q.concentration, a)


def _beta(p: Beta, q: Beta, a: Array) -> Array:
    both = [jnp.stack([d.a, d.b], axis=-1) for d in (p, q)]
    return _of_concentrations(both[0], both[1], a)


AFFINITIES: dict[type, Affinity] = {
    Bernoulli: _bernoulli,
    Beta: _beta,
    Categorical: _categorical,
    Dirichlet: _dirichlet,
    Exponential: _exponential,
    Gamma: _gamma,
    MultivariateNormal: _multivariate_normal,
    Normal: _normal,
    Poisson: _poisson,
}


def _log_affinity(p: Any, q: Any, a: Array, affinity: Affinity) -> Array:
    """The log of the integral of ``p^a q^(1 - a)``.

    If p and q are near each other, it is much smaller than the terms of the closed form, and is computed as a difference of two
    KL divergences (`_middle.py`). If these are much larger than it, as for distributions with hardly any overlap, the closed
    form is accurate.
    """
    to_middle, between, there = _by_divergences(*jax.lax.stop_gradient((p, q)), a)
    near = there & (jnp.abs(to_middle) + jnp.abs(between) <= 8 * jnp.abs(to_middle - between))
    # Where the difference is not used, it is computed for equal distributions, so that its derivative is finite.
    safe = jax.tree.unflatten(
        jax.tree.structure(q),
        [
            jnp.where(jnp.expand_dims(near, tuple(range(-k, 0))), y, x)
            for x, y, k in zip(jax.tree.leaves(p), jax.tree.leaves(q), q.field_ndims, strict=True)
        ],
    )
    to_middle, between, _ = _by_divergences(p, safe, a)
    return jnp.where(near, to_middle - between, affinity(p, q, a))


def _by_divergences(p: Any, q: Any, a: Array) -> tuple[Array, Array, Array]:
    """Two numbers whose difference is the log of the affinity, and whether they exist.

    They are divergences from p or from q, whichever is nearer to the member in the middle.
    """
    swapped = a < 0.5
    first, other = (jax.tree.map(lambda x, y: jnp.where(swapped, y, x), *pair) for pair in ((p, q), (q, p)))
    b = jnp.where(swapped, a, 1 - a)
    middle, there = MIDDLES[type(p)](first, other, b)
    return first.kl(middle), b * first.kl(other), there


def renyi_divergence(p: Any, q: Any, order: chex.Numeric) -> Float[Array, "*batch"]:
    r"""Renyi's divergence of an order above 0; at order 1 it is the KL divergence.

    .. math:: D_a(p \,\|\, q) = \frac1{a - 1} \log \int p^a q^{1 - a}.

    Its Hessian in q at p is the order times the Fisher information.

    **When it is the wrong tool.** Above order 1 it may be infinite for two normals of different scales.

    Args:
        p: a distribution: Normal, MultivariateNormal, Bernoulli, Categorical, Poisson, Exponential, Gamma, Beta or Dirichlet.
        q: a distribution of the same family.
        order: a positive number; if it is only known at run time not to be positive, the divergence is NaN.

    Returns:
        Nats, one number for each distribution of the batch, shape ``[*batch]``.

    Raises:
        TypeError: the families differ, or the family has no closed form here.
        ValueError: an order that is known not to be positive, or infinite; different numbers of classes or dimensions.

    Reference: van Erven and Harremoes, Renyi divergence and Kullback-Leibler divergence (2014), definition 2; Gil, Alajaji and
    Linder (2013), for the families.

    >>> import jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> print(geometry.renyi_divergence(jf.Normal(0.0, 1.0), jf.Normal(1.0, 1.0), order=0.5))  # a / 2
    0.25
    """
    p, q, affinity = matched(p, q, AFFINITIES, "renyi_divergence", "Estimate it from draws of p.")
    a = positive("order", order, jnp.result_type(*jax.tree.leaves(p)))
    if not isinstance(order, jax.Array):
        return kl_divergence(p, q) if float(order) == 1 else _log_affinity(p, q, a, affinity) / (a - 1)
    # An order that is only known at run time may be 1, where the quotient has no value.
    apart = jnp.where(a == 1, 0.5, a)
    return jnp.where(a == 1, kl_divergence(p, q), _log_affinity(p, q, apart, affinity) / (apart - 1))


def alpha_divergence(p: Any, q: Any, alpha: chex.Numeric) -> Float[Array, "*batch"]:
    r"""Amari's alpha-divergence: ``KL(p || q)`` at -1, ``KL(q || p)`` at 1, four times Hellinger's squared distance at 0.

    .. math:: D^{(\alpha)}(p \,\|\, q) = \frac4{1 - \alpha^2} \Big( 1 - \int p^{(1 - \alpha) / 2} q^{(1 + \alpha) / 2} \Big).

    For every alpha its Hessian in q at p is the Fisher information: the metric is the same, and the connections differ.

    **When it is the wrong tool.** Outside of [-1, 1] it may be infinite.

    Args:
        p: a distribution of a family that `jaxfisher.geometry.renyi_divergence` knows.
        q: a distribution of the same family.
        alpha: a number.

    Returns:
        One number for each distribution of the batch, shape ``[*batch]``.

    Raises:
        TypeError: the families differ, or the family has no closed form here; an ``alpha`` that is no number.
        ValueError: an ``alpha`` that is known not to be finite; different numbers of classes or dimensions.

    Reference: Amari, Information Geometry and Its Applications (2016), section 3.5.

    >>> import jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> p, q = jf.Bernoulli(0.0), jf.Bernoulli(1.0)
    >>> print(geometry.alpha_divergence(p, q, -1) == p.kl(q), geometry.alpha_divergence(p, q, 1) == q.kl(p))
    True True
    """
    check_number("alpha", alpha)
    known = not isinstance(alpha, jax.Array)
    if known and not math.isfinite(alpha):
        raise ValueError(f"alpha_divergence: `alpha` is {alpha}; expected a finite number.")
    p, q, affinity = matched(p, q, AFFINITIES, "alpha_divergence", "Estimate it from draws of p.")
    if known and abs(float(alpha)) == 1:
        return kl_divergence(p, q) if float(alpha) < 0 else kl_divergence(q, p)
    number = jnp.asarray(alpha, jnp.result_type(*jax.tree.leaves(p)))
    # An alpha that is only known at run time may be -1 or 1, where the quotient has no value.
    apart = number if known else jnp.where(jnp.abs(number) == 1, 0, number)
    value = -4 * jnp.expm1(_log_affinity(p, q, 0.5 * (1 - apart), affinity)) / (1 - jnp.square(apart))
    if known:
        return value
    return jnp.where(number == -1, kl_divergence(p, q), jnp.where(number == 1, kl_divergence(q, p), value))
