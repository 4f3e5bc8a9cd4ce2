"""The Laplace distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family, of_plain_bits
from jaxfisher._distributions.excess import excess_over_log, exp_excess
from jaxfisher._distributions.stable import ratio

_LOG_TWO = 0.6931471805599453


@family
class Laplace(Distribution):
    r"""Double exponential distribution with median ``loc`` and mean absolute deviation ``scale > 0``.

    .. math:: \log p(x) = -|x - \mu|/s - \log 2s, \qquad F(\mu, s) = \mathrm{diag}(1/s^2,\; 1/s^2).

    The density has a kink at ``loc``, so only two of the three routes to the Fisher are right: the second moment of the score,
    and the Hessian of `kl` at equal arguments. Minus the expected Hessian of ``log_prob`` is not the Fisher: it misses the
    point mass that the kink puts on the second derivative, and is 0 for ``loc``.

    Args:
        loc: the median and mean, shape ``[*batch]``, in the units of the target.
        scale: the mean absolute deviation, shape ``[*batch]``, in the units of the target, above zero.

    Raises:
        ValueError: the shapes do not broadcast together; ``scale`` is known not to be above zero (if unknown, it gives NaN).
        TypeError: a complex field.

    Reference: Kotz, Kozubowski and Podgorski, The Laplace Distribution and Generalizations (2001), section 2.6.

    >>> import jaxfisher as jf
    >>> print(jf.Laplace(0.0, 2.0).fisher_matrix())
    [[0.25 0.  ]
     [0.   0.25]]
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
        return 2 * jnp.square(self.scale)

    @property
    def mode(self) -> Float[Array, "*batch"]:
        return self.loc

    def entropy(self) -> Float[Array, "*batch"]:
        """``log(2 s) + 1``."""
        return jnp.log(self.scale) + _LOG_TWO + 1

    def log_prob(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        residual = x - self.loc
        # Not `abs`, so that the score is 0 at the kink itself, and NaN if the target is.
        return -ratio(jnp.sign(residual) * residual, self.scale) - jnp.log(self.scale) - _LOG_TWO

    @of_plain_bits
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_and_batch"]:
        size = shape + self.batch_shape
        noise = jax.random.laplace(key, size, self.loc.dtype)
        return jnp.broadcast_to(self.loc, size) + jnp.broadcast_to(self.scale, size) * noise

    def kl(self, other: Laplace) -> Float[Array, "*batch"]:
        """``|m - m'|/s' + (s/s') exp(-|m - m'|/s) - 1 - log(s/s')``.

        It is arranged as ``(s/s') (a - 1 + e^-a)`` with ``a = |m - m'|/s``, plus the divergence between the scales; both are
        zero for equal arguments.
        """
        other = self._same_family(other)
        difference = self.loc - other.loc
        # The divergence is even and smooth in the difference, so either one-sided slope gives its Hessian at 0. A slope of
        # zero, which `abs` might have by convention, would not.
        distance = jnp.where(difference >= 0, difference, -difference)
        near = distance <= self.scale
        close = self.scale * exp_excess(-ratio(jnp.where(near, distance, 0), self.scale))
        # Far apart the quotient may overflow; its exponential is then 0.
        apart = distance - self.scale + self.scale * jnp.exp(-ratio(distance, self.scale))
        return ratio(jnp.where(near, close, apart), other.scale) + excess_over_log(self.scale, other.scale)

    def fisher_sqrt_mv(self, u: Laplace) -> Laplace:
        return self._make(ratio(u.loc, self.scale), ratio(u.scale, self.scale))
