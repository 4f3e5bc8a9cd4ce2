"""The Bernoulli distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Shaped

from jaxfisher._distributions.base import Distribution, family, of_plain_bits, one_of
from jaxfisher._distributions.excess import exp_excess
from jaxfisher._distributions.special import log_gap_ratio
from jaxfisher._distributions.stable import log_sigmoid, sigmoid, working_dtype


@family
class Bernoulli(Distribution):
    r"""Distribution over 0 and 1 with ``P(1) = sigmoid(logits)``.

    .. math:: \log p(y) = \log\sigma((2y - 1) z), \qquad F(z) = p (1 - p), \quad p = \sigma(z).

    It is exact at any finite logit: nothing is clipped. If ``p`` rounds to 0 or 1, the Fisher underflows to 0, and the outcome
    of probability zero contributes nothing to `kl`. ``log_prob`` is ``-inf`` at any other value than 0 and 1.

    Args:
        logits: the log-odds ``log(p / (1 - p))``, shape ``[*batch]``, in nats.

    ``Bernoulli(probs=p)`` takes the probability of one instead, of the same shape; outside ``[0, 1]`` it gives NaN.

    Raises:
        TypeError: complex logits; both of ``logits`` and ``probs``, or neither.

    Reference: McCullagh and Nelder, Generalized Linear Models (1989), section 4.3.

    >>> import jaxfisher as jf
    >>> p = jf.Bernoulli(0.0)
    >>> print(p.fisher_matrix())
    [[0.25]]
    """

    logits: Float[Array, "*batch"]

    field_ndims = (0,)
    event_ndim = 0

    def __init__(self, logits: ArrayLike | None = None, *, probs: ArrayLike | None = None) -> None:
        log_odds = lambda p: jnp.log(p) - jnp.log1p(-p)  # noqa: E731
        object.__setattr__(self, "logits", one_of("Bernoulli", {"logits": logits, "probs": probs}, log_odds))
        self.__post_init__()

    @property
    def mean(self) -> Float[Array, "*batch"]:
        return sigmoid(self.logits)

    @property
    def variance(self) -> Float[Array, "*batch"]:
        return sigmoid(self.logits) * sigmoid(-self.logits)

    @property
    def mode(self) -> Int[Array, "*batch"]:
        return (self.logits > 0).astype(jnp.int32)

    def entropy(self) -> Float[Array, "*batch"]:
        """``-p log p - (1 - p) log(1 - p)``."""
        total = jnp.zeros_like(self.logits)
        for logits in (self.logits, -self.logits):
            prob = sigmoid(logits)
            there = prob > 0  # an outcome of probability zero adds nothing
            total -= prob * log_sigmoid(jnp.where(there, logits, 0))
        return total

    def log_prob(self, x: Shaped[Array, "*batch"]) -> Float[Array, "*batch"]:
        given = jnp.asarray(x)
        # NaN is not outside: it must come out as NaN, not as -inf with a zero gradient. A narrower dtype might round to one.
        outside = (given != 0) & (given != 1) & ~jnp.isnan(given)
        outcome = jnp.where(outside, 0, given).astype(self.logits.dtype)
        # Use one log-sigmoid of the signed logit: ``y z - softplus(z)`` would cancel for a likely outcome.
        log_prob = log_sigmoid((2 * outcome - 1) * self.logits)
        return jnp.where(outside, -jnp.inf, log_prob)

    @of_plain_bits
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Int[Array, "*shape_and_batch"]:
        # Uniform noise of a narrow dtype has too few values to resolve a probability.
        probs = sigmoid(self.logits.astype(working_dtype(self.logits.dtype)))
        return jax.random.bernoulli(key, jnp.broadcast_to(probs, shape + self.batch_shape)).astype(jnp.int32)

    def kl(self, other: Bernoulli) -> Float[Array, "*batch"]:
        """``p log(p/p') + (1 - p) log((1 - p)/(1 - p'))``, without cancellation at near logits."""
        other = self._same_family(other)
        difference = other.logits - self.logits
        near = jnp.abs(difference) <= 1
        return jnp.where(
            near,
            _kl_near(self.logits, jnp.where(near, difference, 0)),
            _kl_far(self.logits, other.logits),
        )

    def fisher_sqrt_mv(self, u: Bernoulli) -> Bernoulli:
        log_variance = log_sigmoid(self.logits) + log_sigmoid(-self.logits)
        return self._make(jnp.exp(0.5 * log_variance) * u.logits)


def _kl_near(logits: Float[Array, "*batch"], difference: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The divergence to ``logits + difference``: ``log(1 + y) - p d`` with ``y = p (e^d - 1)``.

    It is computed for the rarer of the two outcomes, with ``p d`` taken out of ``y`` and ``y`` out of the logarithm. Two terms
    of second order in ``d`` are left, and the second is at most about half the first.
    """
    likely = logits > 0
    rare = sigmoid(jnp.where(likely, -logits, logits))
    step = jnp.where(likely, -difference, difference)
    y = rare * jnp.expm1(step)
    return rare * exp_excess(step) - y * log_gap_ratio(y)


def _kl_far(logits: Float[Array, "*batch"], other: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The divergence as the sum over the two outcomes, each with its own log-probabilities."""
    total = jnp.zeros_like(logits)
    for sign in (1, -1):
        prob = sigmoid(sign * logits)
        there = prob > 0  # an infinite logit rules an outcome out, and 0 times its log-probability would be NaN
        log_prob, log_other = (log_sigmoid(jnp.where(there, sign * z, 0)) for z in (logits, other))
        total += prob * (log_prob - log_other)
    return total
