"""The Dirichlet distribution, and the functions it shares with the beta distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family
from jaxfisher._distributions.special import (
    aligned,
    gamma_entropy,
    gammaln_bregman_rest,
    gammaln_bregman_rest_drop,
    rate_divergence,
    rate_gap,
    stirling,
    trigamma_excess,
    trigamma_excess_drop,
)
from jaxfisher._distributions.stable import ratio

_HALF_LOG_TWO_PI = 0.9189385332046727
_SMALL = 1 / 64
"""Classes count as small if their concentrations together are below this share of the largest one."""


@family
class Dirichlet(Distribution):
    r"""Dirichlet distribution over the probabilities of ``K`` classes, with concentrations ``alpha_i > 0``.

    .. math:: \log p(x) = \sum_i (\alpha_i - 1)\log x_i + \log\Gamma(\alpha_0) - \sum_i\log\Gamma(\alpha_i), \quad
        \alpha_0 = \sum_i\alpha_i, \qquad F(\alpha) = \mathrm{diag}(\psi'(\alpha_i)) - \psi'(\alpha_0)\, 1 1^T.

    The density is with respect to ``dx_1 ... dx_{K-1}``. ``log_prob`` is ``-inf`` if an ``x_i`` is negative, or if the sum
    differs from one by more than the square root of the eps of the dtype it is computed in (float32 at least); a smaller
    difference is ignored. On the boundary it is ``-inf`` if a class with ``alpha_i > 1`` is at zero, else ``inf`` if one with
    ``alpha_i < 1`` is.

    Args:
        concentration: the concentrations, shape ``[*batch, K]``, no unit, above zero.

    Raises:
        ValueError: ``concentration`` has no class axis, or an empty one; it is known not to be above zero (if unknown, it gives
            NaN).
        TypeError: a complex field.

    Reference: Minka, Estimating a Dirichlet distribution (2000), equations 1, 13 and 14.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> p = jf.Dirichlet(jnp.array([1.0, 1.0, 1.0]))
    >>> print(round(float(p.log_prob(jnp.array([0.2, 0.3, 0.5]))), 4))
    0.6931
    """

    concentration: Float[Array, "*batch classes"]

    field_ndims = (1,)
    event_ndim = 1
    positive = ("concentration",)

    def _check_fields(self) -> None:
        if self.concentration.shape[-1] == 0:
            raise ValueError(
                f"Dirichlet: `concentration` has shape {self.concentration.shape}: no classes. "
                "Give one concentration per class."
            )

    @property
    def mean(self) -> Float[Array, "*batch classes"]:
        (a,) = aligned(self.concentration)
        return ratio(a, jnp.broadcast_to(jnp.sum(a, -1, keepdims=True), a.shape)).astype(self.concentration.dtype)

    @property
    def variance(self) -> Float[Array, "*batch classes"]:
        (a,) = aligned(self.concentration)
        total = jnp.broadcast_to(jnp.sum(a, -1, keepdims=True), a.shape)
        return (ratio(a, total) * ratio(_sum_of_others(a), total) / (total + 1)).astype(self.concentration.dtype)

    @property
    def mode(self) -> Float[Array, "*batch classes"]:
        """``(alpha_i - 1)/(alpha_0 - K)`` if every concentration is above one, else NaN."""
        (a,) = aligned(self.concentration)
        inside = jnp.all(a > 1, -1, keepdims=True)
        peak = jnp.where(inside, a - 1, 1)
        peak = ratio(peak, jnp.broadcast_to(jnp.sum(peak, -1, keepdims=True), a.shape))
        return jnp.where(inside, peak, jnp.nan).astype(self.concentration.dtype)

    def entropy(self) -> Float[Array, "*batch"]:
        """``log B(alpha) + (alpha_0 - K) digamma(alpha_0) - sum_i (alpha_i - 1) digamma(alpha_i)``."""
        (a,) = aligned(self.concentration)
        return dirichlet_entropy(a).astype(self.concentration.dtype)

    def log_prob(self, x: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
        a, x = aligned(self.concentration, jnp.asarray(x))
        return log_density(a, x).astype(self.concentration.dtype)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_batch_classes"]:
        (a,) = aligned(self.concentration)
        draws = jax.random.dirichlet(key, a, shape=shape + self.batch_shape, dtype=a.dtype)
        return draws.astype(self.concentration.dtype)

    def kl(self, other: Dirichlet) -> Float[Array, "*batch"]:
        """The Bregman divergence of ``sum_i lgamma(alpha_i) - lgamma(alpha_0)`` to ``other``; see `divergence`."""
        other = self._same_family(other)
        a, b = aligned(self.concentration, other.concentration)
        return divergence(a, b).astype(self.concentration.dtype)

    def fisher_sqrt_mv(self, u: Dirichlet) -> Dirichlet:
        a, v = aligned(self.concentration, u.concentration)
        return self._make(fisher_root(a, v).astype(self.concentration.dtype))


def log_density(a: Float[Array, "*batch classes"], x: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """The Dirichlet log-density of concentrations ``a`` at ``x``."""
    total = jnp.broadcast_to(jnp.sum(a, -1, keepdims=True), a.shape)
    tolerance = jnp.finfo(x.dtype).eps ** 0.5
    # Written so that NaN is not outside: it must come out as NaN.
    outside = jnp.any(x < 0, -1) | (jnp.abs(jnp.sum(x, -1) - 1) > tolerance)
    edge = x == 0
    inside = jnp.where(edge | outside[..., None], 1, x)
    # With y = x/mean: the sum of a (log y - y + 1), since that of a (y - 1) is zero on the simplex, plus the remainder of
    # Stirling's formula. No term is much larger than the result.
    interior = -rate_gap(inside * total, a, ratio(inside * total - a, a)) - jnp.log(inside)
    # At x = 0 the class matters only if a = 1: then the term is 1 - log(mean), because the logarithms of x cancel.
    terms = jnp.where(edge, 1 + jnp.log(total), interior)
    whole = total[..., 0]
    rest = jnp.sum(0.5 * jnp.log(a) - stirling(a) - _HALF_LOG_TWO_PI, -1)
    bulk = jnp.sum(terms, -1) + rest - 0.5 * jnp.log(whole) + stirling(whole) + _HALF_LOG_TWO_PI
    bulk = jnp.where(jnp.any(edge & (a < 1), -1), jnp.inf, bulk)
    return jnp.where(outside | jnp.any(edge & (a > 1), -1), -jnp.inf, bulk)


def dirichlet_entropy(a: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """The entropy from those of gamma variables, each without large terms that cancel."""
    total = jnp.sum(a, -1)
    rest = (a.shape[-1] - 1) * jax.scipy.special.digamma(total)
    return jnp.sum(gamma_entropy(a), -1) - gamma_entropy(total) - rest


def divergence(a: Float[Array, "*batch classes"], b: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    r"""KL from the Dirichlet of concentrations ``a`` to that of ``b``.

    .. math:: \sum_i b_i\,\phi(m_i/m'_i) + \sum_i R(b_i, a_i) - R(b_0, a_0), \qquad \phi(y) = y - 1 - \log y,

    with the means ``m = a/a_0`` and ``m' = b/b_0``, and ``R`` the Bregman divergence of ``lgamma(a) - a log a + a``.
    """
    change = b - a
    a_total, b_total, change_total = (jnp.sum(v, -1, keepdims=True) for v in (a, b, change))
    # b m/m' is a b_0/a_0.
    rise, factor = (jnp.broadcast_to(ratio(v, a_total), a.shape) for v in (change_total, b_total))
    means = jnp.sum(rate_divergence(b, a, factor, rise), -1)
    parts = gammaln_bregman_rest(jnp.concatenate([b, b_total], -1), jnp.concatenate([a, a_total], -1))
    # If the other classes are small, the part of the largest class and that of the totals are nearly equal.
    axis = a.ndim - 1
    largest = jax.lax.broadcasted_iota(jnp.int32, a.shape, axis) == jax.lax.argmax(a, axis, jnp.int32)[..., None]
    tops = [jnp.sum(jnp.where(largest, v, 0), -1) for v in (b, a)]
    others = [jnp.sum(jnp.where(largest, 0, v), -1) for v in (b, a)]
    small = (others[0] < _SMALL * tops[0]) & (others[1] < _SMALL * tops[1])
    held = [jnp.where(small, v, 1) for v in tops], [jnp.where(small, v, 0) for v in others]
    drop = gammaln_bregman_rest_drop(*held[0], *held[1])
    apart = jnp.where(largest & small[..., None], 0, parts[..., :-1])
    rest = jnp.sum(apart, -1) + jnp.where(small, drop, -parts[..., -1])
    # The rest is never negative but for rounding, by superadditivity.
    return means + rest


def fisher_root(a: Float[Array, "*batch classes"], u: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    r"""``B u`` for ``B B^T = diag(d) - s 1 1^T``, ``d = trigamma(a)``, ``s = trigamma(a_0)``.

    .. math:: B = D^{1/2} - \frac{s}{1 + \sqrt\Delta}\, 1\, (d^{-1/2})^T, \qquad
        \Delta = 1 - s \sum_i 1/d_i = \sum_i \frac{a_i}{a_0}\, \frac{c(a_i) - c(a_0)}{1 + c(a_i)}, \quad c(a) = a\psi'(a) - 1.

    The second form of ``Delta`` has no negative term, and computes the difference of ``c`` from the sum of the other classes.
    The diagonal of ``B`` does the same for ``d_i - s``, so that every entry has all its digits.
    """
    total = jnp.broadcast_to(jnp.sum(a, -1, keepdims=True), a.shape)
    others = _sum_of_others(a)
    drop = trigamma_excess_drop(a, others)
    trigamma = trigamma_excess(a) + 1 / a
    trigamma_total = trigamma_excess(total) + 1 / total
    delta = jnp.sum(drop / trigamma / total, -1, keepdims=True)
    root, root_delta = jnp.sqrt(trigamma), jnp.broadcast_to(jnp.sqrt(delta), a.shape)
    # a_i d_i - a_0 s is the drop of c, so d_i - s is this over a_i.
    fall = (drop + others * trigamma_total) / a
    diagonal = (fall + trigamma * root_delta) / (root * (1 + root_delta))
    return diagonal * u - trigamma_total / (1 + root_delta) * _sum_of_others(u / root)


def _sum_of_others(a: Array) -> Array:
    """``sum_{j != i} a_j``; the total minus ``a_i`` would lose small classes beside a large one."""
    none = jnp.zeros_like(a[..., :1])
    axis = a.ndim - 1
    before = jax.lax.cumsum(jnp.concatenate([none, a[..., :-1]], -1), axis)
    after = jax.lax.cumsum(jnp.concatenate([a[..., 1:], none], -1), axis, reverse=True)
    return before + after
