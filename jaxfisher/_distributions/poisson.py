"""The Poisson distribution."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Shaped

from jaxfisher._distributions.base import Distribution, family, one_of
from jaxfisher._distributions.excess import exp_excess
from jaxfisher._distributions.stable import working_dtype
from jaxfisher._tree import threefry_key

_HALF_LOG_TWO_PI = 0.9189385332046727
_LARGE = 16
"""Counts from here on use Stirling's series: its first six terms are exact to 1e-16 there."""
_LOG_FACTORIALS = tuple(math.log(math.factorial(k)) for k in range(_LARGE))


@family
class Poisson(Distribution):
    r"""Distribution of counts ``0, 1, 2, ...`` with mean ``r = exp(log_rate)``.

    .. math:: \log p(k) = k \log r - r - \log k!, \qquad F(\log r) = r, \qquad
        \mathrm{KL} = r\,(e^d - 1 - d), \quad d = \log r' - \log r.

    ``log_prob`` is ``-inf`` at negative and fractional values. Draws are int32 and saturate at ``2^31 - 1``. With a
    ``log_rate`` of ``-inf``, as for an exposure of zero, the count is zero with certainty: log-probability 0 and score 0.

    Args:
        log_rate: logarithm of the expected count, shape ``[*batch]``, in nats.

    ``Poisson(rate=r)`` takes the expected count instead, of the same shape; a negative one gives NaN.

    Raises:
        TypeError: a complex field; both of ``log_rate`` and ``rate``, or neither.

    Reference: McCullagh and Nelder, Generalized Linear Models (1989), section 6.2.

    >>> import jaxfisher as jf
    >>> p = jf.Poisson(0.0)
    >>> float(p.log_prob(1)), float(p.kl(p))
    (-1.0, 0.0)
    """

    log_rate: Float[Array, "*batch"]

    field_ndims = (0,)
    event_ndim = 0

    def __init__(self, log_rate: ArrayLike | None = None, *, rate: ArrayLike | None = None) -> None:
        object.__setattr__(self, "log_rate", one_of("Poisson", {"log_rate": log_rate, "rate": rate}, jnp.log))
        self.__post_init__()

    @property
    def mean(self) -> Float[Array, "*batch"]:
        return jnp.exp(self.log_rate)

    @property
    def variance(self) -> Float[Array, "*batch"]:
        return jnp.exp(self.log_rate)

    @property
    def mode(self) -> Float[Array, "*batch"]:
        """The largest count that is not above the rate."""
        # A narrow dtype rounds a rate just below a whole number up to it.
        wide = self.log_rate.astype(working_dtype(self.log_rate.dtype))
        return jnp.floor(jnp.exp(wide)).astype(self.log_rate.dtype)

    def log_prob(self, x: Shaped[Array, "*batch"]) -> Float[Array, "*batch"]:
        wide = working_dtype(self.log_rate.dtype)
        count = jnp.asarray(x).astype(wide)
        # Comparisons with NaN are false, so a NaN is not outside, and comes out as NaN, not as -inf with a zero gradient.
        outside = (count < 0) | (count - jnp.floor(count) > 0) | (count == jnp.inf)
        log_prob = _log_prob(self.log_rate.astype(wide), jnp.where(outside, 0, count))
        return jnp.where(outside, -jnp.inf, log_prob).astype(self.log_rate.dtype)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Int[Array, "*shape_and_batch"]:
        # JAX draws counts by threefry keys alone.
        return jax.random.poisson(threefry_key(key), jnp.broadcast_to(self.mean, shape + self.batch_shape), dtype=jnp.int32)

    def kl(self, other: Poisson) -> Float[Array, "*batch"]:
        """``r log(r/r') - r + r'``, arranged so that equal rates leave no rounding."""
        other = self._same_family(other)
        rate = jnp.exp(self.log_rate)
        # At a rate of zero the divergence is the other's rate; zero times an infinite difference would make it NaN.
        some = rate > 0
        difference = jnp.where(some, other.log_rate - self.log_rate, 0)
        near = some & (difference <= 1)
        # For large d, ``e^d`` may overflow although the two rates do not.
        return jnp.where(
            near,
            rate * exp_excess(jnp.where(near, difference, 0)),
            jnp.exp(other.log_rate) - rate * (1 + difference),
        )

    def fisher_sqrt_mv(self, u: Poisson) -> Poisson:
        return self._make(jnp.exp(0.5 * self.log_rate) * u.log_rate)


def _log_prob(log_rate: Float[Array, "*batch"], count: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``k log r - r - log k!``; for large counts as ``-k (e^d - 1 - d) - log(k! e^k / k^k)`` with ``d = log r - log k``.

    The three terms of the first form are of size ``k log k`` and cancel: at a million, all digits of float32.
    """
    large = (count >= _LARGE) & (log_rate > -jnp.inf)
    k = jnp.where(large, count, _LARGE)
    d = log_rate - jnp.log(k)
    saddle = -k * exp_excess(d) - _log_factorial_excess(k)
    few = jnp.where(large, 0, count)
    # A count of zero adds nothing at any rate; at a rate of zero every other count is impossible.
    growth = few * jnp.where(few == 0, 0, log_rate)
    # A table, since log-gamma of 1 and 2 is not exactly 0 in float32.
    log_factorial = jnp.asarray(_LOG_FACTORIALS, count.dtype)[few.astype(int)]
    return jnp.where(large, saddle, growth - jnp.exp(log_rate) - log_factorial)


def _log_factorial_excess(k: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``log k! - k log k + k`` for ``k >= 16``, by Stirling's series."""
    inverse = 1 / k
    square = jnp.square(inverse)
    series = jnp.zeros_like(k)
    for coefficient in (-691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = coefficient + square * series
    return _HALF_LOG_TWO_PI + 0.5 * jnp.log(k) + inverse * series
