"""The normal distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family, of_plain_bits
from jaxfisher._distributions.excess import excess_over_log
from jaxfisher._distributions.stable import ratio

_HALF_LOG_TWO_PI = 0.9189385332046727


@family
class Normal(Distribution):
    r"""Normal distribution with mean ``loc`` and standard deviation ``scale > 0``.

    .. math:: \log p(x) = -\tfrac12 ((x - \mu)/\sigma)^2 - \log\sigma - \tfrac12 \log 2\pi, \qquad
        F(\mu, \sigma) = \mathrm{diag}(1/\sigma^2,\; 2/\sigma^2).

    Args:
        loc: the mean, shape ``[*batch]``, in the units of the target.
        scale: the standard deviation, shape ``[*batch]``, in the units of the target, above zero.

    Raises:
        ValueError: the shapes do not broadcast together; ``scale`` is known not to be above zero (if unknown, it gives NaN).
        TypeError: a complex field.

    Reference: Lehmann and Casella, Theory of Point Estimation (1998), example 2.5.2.

    >>> import jaxfisher as jf
    >>> p, q = jf.Normal(0.0, 1.0), jf.Normal(1.0, 1.0)
    >>> float(p.kl(q))
    0.5
    """

    loc: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]

    field_ndims = (0, 0)
    event_ndim = 0
    positive = ("scale",)

    @property
    def mean(self) -> Float[Array, "*batch"]:
        return self.loc

    @property
    def variance(self) -> Float[Array, "*batch"]:
        return jnp.square(self.scale)

    @property
    def mode(self) -> Float[Array, "*batch"]:
        return self.loc

    def entropy(self) -> Float[Array, "*batch"]:
        """``log(s) + log(2 pi e)/2``."""
        return jnp.log(self.scale) + _HALF_LOG_TWO_PI + 0.5

    def log_prob(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return -0.5 * jnp.square(ratio(x - self.loc, self.scale)) - jnp.log(self.scale) - _HALF_LOG_TWO_PI

    @of_plain_bits
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_and_batch"]:
        size = shape + self.batch_shape
        noise = jax.random.normal(key, size, self.loc.dtype)
        return jnp.broadcast_to(self.loc, size) + jnp.broadcast_to(self.scale, size) * noise

    def kl(self, other: Normal) -> Float[Array, "*batch"]:
        """``log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2``, arranged so that equal scales leave no rounding."""
        other = self._same_family(other)
        # (r^2 - 1)/2 - log r with r = 1 + e is e^2/2 + (e - log(1 + e)): two terms that are never negative.
        square = jnp.square(ratio(self.loc - other.loc, other.scale)) + jnp.square(ratio(self.scale - other.scale, other.scale))
        return 0.5 * square + excess_over_log(self.scale, other.scale)

    def fisher_sqrt_mv(self, u: Normal) -> Normal:
        return self._make(ratio(u.loc, self.scale), 2**0.5 * ratio(u.scale, self.scale))
