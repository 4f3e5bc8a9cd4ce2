"""The exponential distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family, of_plain_bits
from jaxfisher._distributions.excess import exp_excess


@family
class Exponential(Distribution):
    r"""Distribution of waiting times ``x >= 0`` with rate ``r = exp(log_rate)``.

    .. math:: \log p(x) = \log r - r x, \qquad F(\log r) = 1, \qquad
        \mathrm{KL} = e^d - 1 - d, \quad d = \log r' - \log r.

    ``log_prob`` is ``-inf`` at negative values.

    Args:
        log_rate: logarithm of the rate, shape ``[*batch]``; the rate is in one over the units of the target.

    Raises:
        TypeError: a complex field.

    Reference: Lehmann and Casella, Theory of Point Estimation (1998), table 2.5.1.

    >>> import jaxfisher as jf
    >>> p = jf.Exponential(0.0)
    >>> float(p.log_prob(2.0)), float(p.log_prob(-1.0))
    (-2.0, -inf)
    """

    log_rate: Float[Array, "*batch"]

    field_ndims = (0,)
    event_ndim = 0

    @property
    def mean(self) -> Float[Array, "*batch"]:
        return jnp.exp(-self.log_rate)

    @property
    def variance(self) -> Float[Array, "*batch"]:
        return jnp.exp(-2 * self.log_rate)

    @property
    def mode(self) -> Float[Array, "*batch"]:
        return jnp.zeros_like(self.log_rate)

    def entropy(self) -> Float[Array, "*batch"]:
        """``1 - log r``."""
        return 1 - self.log_rate

    def log_prob(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        time = jnp.asarray(x)
        outside = time < 0  # NaN is not outside: it comes out as NaN
        log_prob = self.log_rate - jnp.where(outside, 0, time) * jnp.exp(self.log_rate)
        return jnp.where(outside, -jnp.inf, log_prob)

    @of_plain_bits
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_and_batch"]:
        size = shape + self.batch_shape
        noise = jax.random.exponential(key, size, self.log_rate.dtype)
        return noise * jnp.broadcast_to(jnp.exp(-self.log_rate), size)

    def kl(self, other: Exponential) -> Float[Array, "*batch"]:
        """``log(r/r') + r'/r - 1``, arranged so that equal rates leave no rounding."""
        other = self._same_family(other)
        return exp_excess(other.log_rate - self.log_rate)

    def fisher_sqrt_mv(self, u: Exponential) -> Exponential:
        return self._make(u.log_rate)
