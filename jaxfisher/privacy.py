"""Private gradients: sums of per-example gradients, each clipped to a bound.

Noise and privacy accounting are left to other libraries: this module returns a sum and its sensitivity.
"""

from __future__ import annotations

from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfisher._examples import BATCH_SIZE, check_numbers, refusing
from jaxfisher._model import LogProb
from jaxfisher._scores import ClippedSum, scores
from jaxfisher._values import check_nonnegative


class ClippedGradFunction(Protocol):
    """``(params, *data, weights=None) -> ClippedSum``."""

    def __call__(self, params: chex.ArrayTree, /, *data: Any, weights: Float[Array, " n"] | None = None) -> ClippedSum:
        """The clipped sum over the data."""


def clipped_grad(log_prob: LogProb, max_norm: chex.Numeric, *, batch_size: int | None = None) -> ClippedGradFunction:
    r"""The sum of the per-example gradients of the loss, each clipped to ``max_norm``, with its sensitivity.

    .. math:: G = \sum_i g_i \min\left(1, \frac{c}{|g_i|}\right), \qquad g_i = -\nabla_\theta \log p_\theta(x_i).

    Adding or removing one example changes the sum by at most c, the ``max_norm``. With Gaussian noise of standard deviation
    ``noise_multiplier * c`` on every entry, divided by the expected size of the batch, it is the gradient of DP-SGD, which
    replaces ``jax.grad`` of the mean loss. The sum equals that of the clipping in
    ``optax.contrib.differentially_private_aggregate``, but needs no per-example gradients: the norms come from their factors,
    and the sum from one more product with these.

    **When it is the wrong one.** It adds no noise, so by itself it is not private. A model whose output for one example depends
    on others, as with batch normalisation, has no per-example gradients.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats; or minus any loss of one example.
        max_norm: c, ``>= 0``, in the units of the gradient. It may be an array, as in a schedule.
        batch_size: work on chunks of at most this many examples, which bounds memory.

    Returns:
        A function ``(params, *data, weights=None)`` that returns a `ClippedSum`. ``weights``, shape ``[n]``, are one for
        examples and zero for padding, as when a batch was sampled and its size varies. For a batch without any example the sum
        is zero.

    Raises:
        ValueError: a negative ``max_norm``; (when called) arrays of different lengths, a ``log_prob`` that returns no scalar or
            is a batch mean, weights known to be other than zeros and ones (if only known at run time, they give NaN).
        TypeError: (when called) a parameter that is not a real floating array.

    Reference: Abadi et al., Deep learning with differential privacy (CCS 2016), algorithm 1; Goodfellow, Efficient per-example
    gradient computations (2015), for norms from factors.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu, x: jf.Normal(mu * x, 1.0))
    >>> clipped = jf.clipped_grad(log_prob, max_norm=1.0)(0.0, jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0]))
    >>> print(clipped.sum, clipped.sensitivity, clipped.num_clipped)  # of -0.5 and -6, which became -1
    -1.5 1.0 1
    """
    check_nonnegative("max_norm", max_norm)
    scores_of = scores(log_prob, batch_size=batch_size)

    @refusing(
        "clipped_grad",
        counts="none: a sum is not divided by a number of terms. Divide the returned sum by it.",
        batch_size=BATCH_SIZE.format("jaxfisher.clipped_grad(log_prob, max_norm, batch_size=...)"),
    )
    def clipped(params: chex.ArrayTree, /, *data: Any, weights: Float[Array, " n"] | None = None) -> ClippedSum:
        if weights is None:
            return _of_loss(scores_of(params, *data).clipped_sum(max_norm))
        _check_presence(weights)
        weights = jnp.asarray(weights)
        # Without any example the mean would be NaN, but the sum is zero.
        there = jnp.any(weights != 0)
        found = _of_loss(scores_of(params, *data, weights=jnp.where(there, weights, 1)).clipped_sum(max_norm))
        valid = jnp.all((weights == 0) | (weights == 1))
        whole = jax.tree.map(lambda leaf: jnp.where(valid, jnp.where(there, leaf, 0), jnp.nan), found.sum)
        return ClippedSum(whole, found.sensitivity, jnp.where(there, found.num_clipped, 0))

    return clipped


def _of_loss(clipped: ClippedSum) -> ClippedSum:
    """The sum for the loss, whose gradients are minus those of the log-likelihood."""
    return clipped._replace(sum=jax.tree.map(jnp.negative, clipped.sum))


def _check_presence(weights: Any) -> None:
    """Raise `ValueError` if weights are known to be other than zeros and ones."""
    for i, entry in enumerate(weights if isinstance(weights, list | tuple) else [weights]):
        check_numbers(f"`weights` at entry {i}" if isinstance(weights, list | tuple) else "`weights`", entry)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(weights)):
        return
    values = np.asarray(weights)
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise ValueError(
            f"clipped_grad: `weights` is {values.reshape(-1)[wrong[0]]} at entry {wrong[0]}; expected ones, and zeros for "
            "padding. With another weight an example could change the sum by more than its sensitivity: multiply the "
            "log-density by a weight in your own function, before its gradient is clipped."
        )
