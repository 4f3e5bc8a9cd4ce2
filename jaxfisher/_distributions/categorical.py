"""The categorical distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family, of_plain_bits, one_of
from jaxfisher._distributions.excess import exp_excess
from jaxfisher._distributions.stable import log_softmax
from jaxfisher._tree import at_least_float32


@family
class Categorical(Distribution):
    r"""Distribution over the classes ``0 .. C - 1`` with probabilities ``softmax(logits)``.

    .. math:: \log p(y) = z_y - \log\sum_c e^{z_c}, \qquad F(z) = \mathrm{diag}(\pi) - \pi\pi^T = B B^T, \quad
        B u = \sqrt\pi \odot u - \pi\,(\sqrt\pi \cdot u).

    The Fisher is singular: adding a constant to all logits changes nothing. A class of probability zero (a logit of
    ``-inf``, or one that underflows) contributes nothing to `kl` and to the Fisher.

    Args:
        logits: unnormalised log-probabilities, shape ``[*batch, C]``.

    A log-probability nearer to zero than the eps of its dtype may be zero, as may its slopes; `entropy` keeps its digits.

    ``Categorical(probs=p)`` takes probabilities instead, or numbers proportional to them, of the same shape; a negative one
    gives NaN.

    Raises:
        ValueError: ``logits`` has no class axis, or an empty one.
        TypeError: complex logits; both of ``logits`` and ``probs``, or neither.

    Reference: Martens, New insights and perspectives on the natural gradient method (JMLR 2020), section 9.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> p = jf.Categorical(probs=jnp.array([0.25, 0.75]))
    >>> print(jnp.round(p.fisher_matrix(), 4))
    [[ 0.1875 -0.1875]
     [-0.1875  0.1875]]
    """

    logits: Float[Array, "*batch classes"]

    field_ndims = (1,)
    event_ndim = 0

    def __init__(self, logits: ArrayLike | None = None, *, probs: ArrayLike | None = None) -> None:
        object.__setattr__(self, "logits", one_of("Categorical", {"logits": logits, "probs": probs}, jnp.log))
        self.__post_init__()

    def _check_fields(self) -> None:
        if self.logits.shape[-1] == 0:
            raise ValueError(f"Categorical: `logits` has shape {self.logits.shape}: no classes. Give one logit per class.")

    @property
    def probs(self) -> Float[Array, "*batch classes"]:
        """``softmax(logits)``."""
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def mean(self) -> Float[Array, "*batch"]:
        """The expected class index ``sum_c c p_c``."""
        classes = jnp.arange(self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.sum(self.probs * jnp.broadcast_to(classes, self.logits.shape), axis=-1)

    @property
    def variance(self) -> Float[Array, "*batch"]:
        """The variance of the class index."""
        classes = jnp.arange(self.logits.shape[-1], dtype=self.logits.dtype)
        distance = jnp.broadcast_to(classes, self.logits.shape) - self.mean[..., None]
        return jnp.sum(self.probs * jnp.square(distance), axis=-1)

    @property
    def mode(self) -> Int[Array, "*batch"]:
        """The most probable class; the first of several."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def entropy(self) -> Float[Array, "*batch"]:
        """``-sum_c p_c log p_c``; a class of probability zero adds nothing."""
        log_p = log_softmax(self.logits)
        p = jnp.exp(log_p)
        return -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)

    def log_prob(self, x: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        log_probs = jax.nn.log_softmax(self.logits, axis=-1)
        batch = jnp.broadcast_shapes(jnp.shape(x), self.batch_shape)
        log_probs = jnp.broadcast_to(log_probs, batch + log_probs.shape[-1:])
        label = jnp.broadcast_to(jnp.asarray(x), batch)[..., None]
        index = label.astype(int)
        picked = jnp.take_along_axis(log_probs, index, axis=-1, mode="clip")
        # A class out of range, or a label that is no integer, gives NaN. Multiply by the NaN, so that the gradient is NaN too.
        known = (index >= 0) & (index < log_probs.shape[-1]) & (index.astype(label.dtype) == label)
        return (picked * jnp.where(known, 1, jnp.nan).astype(picked.dtype))[..., 0]

    @of_plain_bits
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Int[Array, "*shape_and_batch"]:
        # Invert the cumulative probabilities: one random number a draw, while `jax.random.categorical` takes one a class.
        logits = self.logits.astype(at_least_float32(self.logits.dtype))
        below = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
        u = jax.random.uniform(key, shape + self.batch_shape, below.dtype)
        # u is below one, so the number looked up is below the last entry, and a class of probability zero is never drawn.
        below = jnp.broadcast_to(below, u.shape + below.shape[-1:])
        return jnp.sum(below <= u[..., None] * below[..., -1:], axis=-1, dtype=jnp.int32)

    def kl(self, other: Categorical) -> Float[Array, "*batch"]:
        """``sum_c p_c (log p_c - log q_c)``; classes with ``p_c = 0`` contribute zero.

        Up to ``log 2`` it is computed as ``log(1 + sum_c p_c (e^d_c - 1 - d_c))``, where ``d`` is the change of the logits
        minus its mean under ``p``: a sum of terms that are never negative, and all zero for equal arguments.
        """
        other = self._same_family(other)
        log_p = jax.nn.log_softmax(self.logits, axis=-1)
        log_q = jax.nn.log_softmax(other.logits, axis=-1)
        p = jnp.exp(log_p)
        happens = p > 0
        # The inner `where`s keep the gradient of the unused branch finite.
        plain = jnp.sum(p * (jnp.where(happens, log_p, 0) - jnp.where(happens, log_q, 0)), axis=-1)
        change = jnp.where(happens, other.logits, 0) - jnp.where(happens, self.logits, 0)
        mean = jnp.sum(p * change, axis=-1, keepdims=True)
        rest = jnp.sum(p * (change - mean), axis=-1, keepdims=True)  # of the rounding of the mean
        change = change - mean - rest
        # p_c e^d_c, which also stands for classes of probability zero.
        log_grown = other.logits - jax.nn.logsumexp(self.logits, axis=-1, keepdims=True) - mean - rest
        below = jnp.all(log_grown < 1, axis=-1, keepdims=True)
        slow = happens & (change < 1)
        d = jnp.where(below & happens, change, 0)
        fast = jnp.exp(jnp.where(below & ~slow, log_grown, -jnp.inf)) - p * (1 + d)
        total = jnp.sum(jnp.where(slow, p * exp_excess(jnp.where(slow, d, 0)), fast), axis=-1)
        return jnp.where(below[..., 0] & (total < 1), jnp.log1p(total), plain)

    def fisher_sqrt_mv(self, u: Categorical) -> Categorical:
        root = jnp.exp(0.5 * jax.nn.log_softmax(self.logits, axis=-1))
        return self._make(root * (u.logits - root * jnp.sum(root * u.logits, axis=-1, keepdims=True)))
