"""The gamma distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family
from jaxfisher._distributions.special import (
    aligned,
    gamma_entropy,
    gammaln_bregman_rest,
    rate_divergence,
    rate_gap,
    stirling,
    trigamma_excess,
)
from jaxfisher._distributions.stable import ratio

_HALF_LOG_TWO_PI = 0.9189385332046727


@family
class Gamma(Distribution):
    r"""Gamma distribution with shape ``concentration = a > 0`` and inverse scale ``rate = b > 0``, on ``x > 0``.

    .. math:: \log p(x) = a\log b + (a - 1)\log x - b x - \log\Gamma(a), \qquad
        F(a, b) = \begin{pmatrix} \psi'(a) & -1/b \\ -1/b & a/b^2 \end{pmatrix}.

    ``log_prob`` is ``-inf`` for ``x < 0`` and at infinity; at ``x = 0`` it is the limit from above.

    Numbers from 1e-15 to 1e15 have the digits of their dtype. In float32 the slope of `kl` may be infinite or NaN if two
    numbers of the distributions are more than a factor of 1e20 apart, and so may be all results beyond 1e18.

    Args:
        concentration: the shape, shape ``[*batch]``, no unit, above zero.
        rate: one over the scale, shape ``[*batch]``, in one over the units of the target, above zero.

    Raises:
        ValueError: the shapes do not broadcast together; a field is known not to be above zero (if unknown, it gives NaN).
        TypeError: a complex field.

    Reference: Lehmann and Casella, Theory of Point Estimation (1998), table 1.5.1 and example 2.5.2.

    >>> import jaxfisher as jf
    >>> p = jf.Gamma(2.0, 1.0)
    >>> print(round(float(p.mean), 4), round(float(p.kl(jf.Gamma(2.0, 2.0))), 4))
    2.0 0.6137
    """

    concentration: Float[Array, "*batch"]
    rate: Float[Array, "*batch"]

    field_ndims = (0, 0)
    event_ndim = 0
    positive = ("concentration", "rate")

    @property
    def mean(self) -> Float[Array, "*batch"]:
        return ratio(self.concentration, self.rate)

    @property
    def variance(self) -> Float[Array, "*batch"]:
        return ratio(ratio(self.concentration, self.rate), self.rate)

    @property
    def mode(self) -> Float[Array, "*batch"]:
        return ratio(jnp.maximum(self.concentration - 1, 0), self.rate)

    def entropy(self) -> Float[Array, "*batch"]:
        """``a - log b + lgamma(a) + (1 - a) digamma(a)``."""
        a, b = aligned(self.concentration, self.rate)
        return (gamma_entropy(a) - jnp.log(b)).astype(self.concentration.dtype)

    def log_prob(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        a, b, x = aligned(self.concentration, self.rate, jnp.asarray(x))
        # Written so that NaN is not outside: it must come out as NaN.
        outside = (x < 0) | (x == jnp.inf)
        edge = x == 0
        inside = jnp.where(outside | edge, 1, x)
        # With y = x/mean: a (log y - y + 1) - log x + log(a / 2 pi)/2 - J(a). No term is larger than the result needs it to be.
        bulk = -rate_gap(b * inside, a, ratio(b * inside - a, a)) - jnp.log(inside)
        bulk = bulk + 0.5 * jnp.log(a) - _HALF_LOG_TWO_PI - stirling(a)
        at_zero = jnp.where(a > 1, -jnp.inf, jnp.where(a < 1, jnp.inf, jnp.log(b)))
        log_prob = jnp.where(outside, -jnp.inf, jnp.where(edge, at_zero, bulk))
        return log_prob.astype(self.concentration.dtype)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_and_batch"]:
        a, b = aligned(self.concentration, self.rate)
        size = shape + self.batch_shape
        draws = jax.random.gamma(key, jnp.broadcast_to(a, size), dtype=a.dtype)
        return ratio(draws, jnp.broadcast_to(b, size)).astype(self.concentration.dtype)

    def kl(self, other: Gamma) -> Float[Array, "*batch"]:
        r"""``a' (m/m' - 1 - log(m/m'))`` with the means ``m = a/b``, plus a divergence between concentrations.

        The latter is the Bregman divergence of ``lgamma(a) - a log a + a`` from ``a`` to ``a'``. No term is negative.
        """
        other = self._same_family(other)
        a, b, c, d = aligned(self.concentration, self.rate, other.concentration, other.rate)
        # c m/m' is a d/b.
        means = rate_divergence(c, a, ratio(d, b), ratio(d - b, b))
        return (means + gammaln_bregman_rest(c, a)).astype(self.concentration.dtype)

    def fisher_sqrt_mv(self, u: Gamma) -> Gamma:
        # Cholesky, the rate first: trigamma(a) - 1/a is left for the concentration.
        a, b, u_a, u_b = aligned(self.concentration, self.rate, u.concentration, u.rate)
        root = jnp.sqrt(a)
        fields = jnp.sqrt(trigamma_excess(a)) * u_a - ratio(root * u_b, a), ratio(root * u_b, b)
        return self._make(*(field.astype(self.concentration.dtype) for field in fields))
