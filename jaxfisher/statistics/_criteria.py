"""Information criteria, which weigh a fit against its number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
from jaxtyping import Scalar

from jaxfisher._divergence import observed_information
from jaxfisher._examples import Batch, checked_batch_size, make_batch
from jaxfisher._fisher import empirical_fisher
from jaxfisher._linalg import matmul
from jaxfisher._model import LOG_PROB, LogProb, batch_loss, of_one_example
from jaxfisher._once import once_for
from jaxfisher._tree import check_function
from jaxfisher.statistics._covariance import inverse_and_null
from jaxfisher.statistics._observations import of_observations


def aic(log_prob: LogProb, *, batch_size: int | None = None) -> Callable[..., Scalar]:
    r"""Akaike's information criterion, ``2 p - 2 log-likelihood``: the fit with the smaller one is expected to predict better.

    **When it is the wrong tool.** It is right for a model that is correct and has full rank; for one that may be wrong see
    `jaxfisher.statistics.tic`. For a network, whose Fisher is singular, neither is right.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        batch_size: work on chunks of at most this many observations, which bounds memory.

    Returns:
        A function ``(params, *data, weights=None)``, to be called at the maximum of the likelihood, that returns a scalar in
        nats. Weights say how often an observation occurs.

    Raises:
        ValueError: (when called) arrays of different lengths.

    Reference: Akaike, A new look at the statistical model identification (1974), section 4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> log_prob = jf.log_likelihood(lambda logit: jf.Bernoulli(logit))
    >>> print(round(float(statistics.aic(log_prob)(0.0, jnp.array([0, 1]))), 3))  # 2 + 4 log 2
    4.773
    """
    check_function("log_prob", log_prob, LOG_PROB)
    batch_size = checked_batch_size(batch_size)

    @of_observations("aic")
    def criterion(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Scalar:
        spec, likelihood = _likelihood(log_prob, params, data, weights, batch_size)
        return 2 * spec.size - 2 * likelihood

    return criterion


def tic(log_prob: LogProb, *, batch_size: int | None = None) -> Callable[..., Scalar]:
    r"""Takeuchi's information criterion: Akaike's, with the effective number of parameters of a model that may be wrong.

    .. math:: -2 \log L + 2\, \mathrm{tr}(B^{-1} M),

    with B the observed information and M the empirical Fisher, as in `jaxfisher.sandwich`. If the model is right the trace is
    about p.

    **When it is the wrong tool.** With few observations the trace is noisy.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        batch_size: work on chunks of at most this many observations, which bounds memory.

    Returns:
        A function ``(params, *data, weights=None)``, to be called at the maximum of the likelihood, that returns a scalar in
        nats.

    Raises:
        ValueError: (when called) arrays of different lengths.

    Reference: Takeuchi (1976); Burnham and Anderson, Model Selection and Multimodel Inference (2002), section 7.2.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> y = jnp.array([2.0, -2.0])
    >>> print(round(float(statistics.tic(log_prob)(0.0, y) - statistics.aic(log_prob)(0.0, y)), 3))  # 2 (4 - 1)
    6.0
    """
    check_function("log_prob", log_prob, LOG_PROB)
    batch_size = checked_batch_size(batch_size)

    @of_observations("tic")
    def criterion(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Scalar:
        _, likelihood = _likelihood(log_prob, params, data, weights, batch_size)
        bread = observed_information(log_prob, batch_size=batch_size)(params, *data, weights=weights)
        meat = empirical_fisher(log_prob, batch_size=batch_size)(params, *data, weights=weights).as_matrix()
        return 2 * jnp.trace(matmul(inverse_and_null(bread)[0], meat)) - 2 * likelihood

    return criterion


def _likelihood(log_prob: LogProb, params: Any, data: Any, weights: Any, batch_size: int | None) -> tuple[Any, Scalar]:
    batch = make_batch(params, data, weights, batch_size)
    return batch.spec, -_mean_loss(log_prob, params, batch) * batch.total


@once_for
def _mean_loss(log_prob: LogProb, params: Any, batch: Batch) -> Scalar:
    with of_one_example(log_prob, "log_prob", params, batch.data):
        return batch_loss(log_prob, params, batch)
