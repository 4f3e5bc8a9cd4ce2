"""KL divergences between predictions, and the two Hessians that lead to the Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, Shaped

from jaxfisher._distributions.joint import as_prediction
from jaxfisher._examples import Batch, make_batch, map_examples, needs_data
from jaxfisher._model import LOG_PROB, MODEL, LogProb, Model, batch_loss, of_one_example, predict, scalar
from jaxfisher._once import once_for
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.operator import Operator
from jaxfisher._pieces import sum_again
from jaxfisher._provenance import mean_over
from jaxfisher._targets import OfData
from jaxfisher._tree import ParamSpec, cast_like, check_function
from jaxfisher._varying import varying_like


class KLFunction(Protocol):
    """``(params_p, params_q, *inputs, weights=None, counts=None) -> nats``."""

    def __call__(
        self,
        params_p: chex.ArrayTree,
        params_q: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Scalar: ...


class HessianFunction(Protocol):
    """``(params, *data, weights=None, counts=None) -> Dense``."""

    def __call__(
        self,
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator: ...


def kl_divergence(p: Any, q: Any) -> Float[Array, "*batch"]:
    r"""The KL divergence between two distributions.

    .. math:: KL(p \,\|\, q) = E_{x \sim p}[\log p(x) - \log q(x)] \ge 0.

    Args:
        p: a distribution, or a container of them (see `Joint`); the expectation is under this one.
        q: a distribution of the same family.

    Returns:
        Nats, one number for each distribution of the batch, shape ``[*batch]``.

    Raises:
        TypeError: the families differ, or an argument is no distribution.

    Reference: Kullback and Leibler, On information and sufficiency (1951), equation 2.4.

    >>> import jaxfisher as jf
    >>> print(jf.kl_divergence(jf.Normal(0.0, 1.0), jf.Normal(1.0, 1.0)))
    0.5
    """
    return as_prediction(p).kl(as_prediction(q))


def kl(model: Model, *, batch_size: int | None = None) -> KLFunction:
    r"""The mean KL divergence between what a model predicts at two parameter values.

    .. math:: KL(\theta_p \,\|\, \theta_q) = \frac1n \sum_i
        KL(p_{\theta_p}(\cdot \mid x_i) \,\|\, p_{\theta_q}(\cdot \mid x_i)).

    Parts of one target (the batch axes of a predicted distribution) are independent, so their divergences are summed. As a
    function of ``params_q`` the mean has value and gradient zero at ``params_p``, and its Hessian there is the exact Fisher.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        batch_size: work on chunks of at most this many examples, which bounds memory.

    Returns:
        A function ``(params_p, params_q, *inputs, weights=None, counts=None)`` that returns a scalar in nats; with weights,
        ``sum w_i KL_i / sum w_i``; with ``counts`` as in `exact_fisher`, ``sum w_i KL_i / sum w_i c_i``.

    Raises:
        ValueError: (when called) parameters of different structure, arrays of different lengths.
        TypeError: (when called) a model that returns no distribution.

    Reference: Amari, Information Geometry and Its Applications (2016), section 1.3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(w * x, 1.0)
    >>> print(jf.kl(model)(0.0, 1.0, jnp.array([1.0, 3.0])))  # mean of x^2 / 2
    2.5
    """
    check_function("model", model, MODEL)

    def divergence(
        params_p: chex.ArrayTree,
        params_q: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Scalar:
        batch = make_batch(params_p, inputs, weights, batch_size, counts=counts)
        batch.spec.check(params_q, "params_q")
        return _mean_kl(model, params_p, params_q, batch)

    return divergence


@once_for
def _mean_kl(model: Model, params_p: Any, params_q: Any, batch: Batch) -> Scalar:
    """`kl` of a checked batch."""

    def one(pair: tuple[Any, Any], *example: Any) -> Scalar:
        p, q = (predict(model, params, *example) for params in pair)
        return jnp.sum(p.kl(q))

    def piece(omega: Float[Array, " n"], *inputs: Any) -> Scalar:
        return jnp.sum(omega * map_examples(one, (params_p, params_q), inputs).astype(omega.dtype))

    with of_one_example(model, "model", params_p, batch.data):
        total: Scalar = sum_again(piece, (batch.weights, *batch.data), batch.batch_size)
    return total


def monte_carlo_kl(log_prob: LogProb) -> Callable[..., Scalar]:
    r"""The KL divergence of any two densities of a family, from samples or quadrature nodes.

    .. math:: KL(\theta_p \,\|\, \theta_q) \approx \sum_i w_i\,[\log p_{\theta_p}(x_i) - \log p_{\theta_q}(x_i)]
        \Big/ \sum_i w_i.

    With samples from ``p`` the estimate is unbiased, with a standard error of ``std(log p - log q) / sqrt(n)``, and may be
    negative. With nodes and weights of a quadrature rule *for expectations under p* it is that rule's result. Differentiate
    only in ``params_q``: the samples do not move with ``params_p``.

    Args:
        log_prob: ``(params, x) -> scalar`` of ONE example; a tuple of samples is passed as ``(params, *x)``.

    Returns:
        A function ``(params_p, params_q, samples, weights=None)`` that returns a scalar in nats. Arrays in ``samples`` have a
        leading axis of n; ``weights`` has shape ``[n]``.

    Raises:
        ValueError: (when called) arrays of different lengths, a ``log_prob`` that returns no scalar.

    Reference: Kullback and Leibler (1951), equation 2.4; the plain Monte Carlo estimator.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> nodes = jnp.array([-1.0, 1.0])  # two-point Gauss-Hermite rule: exact here
    >>> print(round(float(jf.monte_carlo_kl(log_prob)(0.0, 1.0, nodes)), 6))
    0.5
    """
    check_function("log_prob", log_prob, LOG_PROB)

    def divergence(
        params_p: chex.ArrayTree,
        params_q: chex.ArrayTree,
        samples: Any,
        weights: Float[Array, " n"] | None = None,
    ) -> Scalar:
        data = samples if isinstance(samples, tuple) else (samples,)
        needs_data(data, "monte_carlo_kl", "(params_p, params_q, samples)")
        batch = make_batch(params_p, data, weights, None)
        batch.spec.check(params_q, "params_q")
        return _mean_difference(log_prob, params_p, params_q, batch)

    return divergence


@once_for
def _mean_difference(log_prob: LogProb, params_p: Any, params_q: Any, batch: Batch) -> Scalar:
    """`monte_carlo_kl` of checked samples."""

    def difference(pair: tuple[Any, Any], *example: Any) -> Scalar:
        at_p, at_q = (scalar(log_prob(params, *example), "log_prob") for params in pair)
        return at_p - at_q

    with of_one_example(log_prob, "log_prob", params_p, batch.data):
        each = map_examples(difference, (params_p, params_q), batch.data)
    return jnp.sum(batch.weights * each.astype(batch.spec.dtype))


def kl_hessian(model: Model, *, batch_size: int | None = None) -> HessianFunction:
    r"""The Hessian of the KL divergence at zero displacement, by `jax.hessian`: the Fisher's first definition.

    .. math:: F = \nabla_q^2\, KL(\theta \,\|\, q) \big|_{q = \theta}.

    Only the second argument moves: if both moved, the divergence would be identically zero, and so would its Hessian. It costs
    p gradients and a p x p matrix; `exact_fisher` gives the same matrix from scores. The expectation smooths a kink in the
    log-density (as in the Laplace distribution), so this route is right where minus the expected Hessian of the log-density is
    not. If the support moves with the parameter, neither is right.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        batch_size: work on chunks of at most this many examples, which bounds memory.

    Returns:
        A function ``(params, *inputs, weights=None, counts=None)`` that returns a dense operator.

    Raises:
        ValueError: (when called) arrays of different lengths.
        TypeError: (when called) a model that returns no distribution.

    Reference: Amari (2016), section 1.3; Martens (JMLR 2020), section 5.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.kl_hessian(lambda w, x: jf.Normal(w * x, 1.0))(0.0, jnp.array([1.0, 3.0]))
    >>> print(F.as_matrix())  # mean of x^2
    [[5.]]
    """
    check_function("model", model, MODEL)

    def hessian_of(
        params: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator:
        batch = make_batch(params, inputs, weights, batch_size, counts=counts)
        form = Dense(_hessian_of_kl(model, params, batch), batch.spec)
        return Operator(form, mean_over("KL Hessian", batch))

    return OfData(hessian_of, takes_target=False)


def observed_information(log_prob: LogProb, *, batch_size: int | None = None) -> HessianFunction:
    r"""Minus the mean Hessian of the log-density at the data: the observed information.

    .. math:: -\frac1n \sum_i \nabla^2_\theta \log p_\theta(x_i).

    Its expectation under the model is the Fisher. Newton's method and the OIM standard errors of `statsmodels` use its value at
    the data; away from a maximum it need not be positive semi-definite.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        batch_size: work on chunks of at most this many examples, which bounds memory.

    Returns:
        A function ``(params, *data, weights=None, counts=None)`` that returns a dense operator.

    Raises:
        ValueError: (when called) arrays of different lengths, a ``log_prob`` that returns no scalar or is a batch mean.

    Reference: Efron and Hinkley, Assessing the accuracy of the maximum likelihood estimator (Biometrika 1978), section 1.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda w, x: jf.Poisson(log_rate=w * x))
    >>> print(jf.observed_information(log_prob)(0.0, jnp.array([1.0, 3.0]), jnp.array([0.0, 2.0])).as_matrix())
    [[5.]]
    """
    check_function("log_prob", log_prob, LOG_PROB)

    def information_of(
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator:
        needs_data(data, "observed_information")
        batch = make_batch(params, data, weights, batch_size, counts=counts)
        form = Dense(_hessian_of_loss(log_prob, params, batch), batch.spec)
        return Operator(form, mean_over("observed information", batch))

    return OfData(information_of, takes_target=True)


@once_for
def _hessian_of_kl(model: Model, params: Any, batch: Batch) -> Float[Array, "p p"]:
    params = varying_like(params, batch.data)
    return _hessian(lambda q: _mean_kl(model, params, q, batch), params, batch.spec)


@once_for
def _hessian_of_loss(log_prob: LogProb, params: Any, batch: Batch) -> Float[Array, "p p"]:
    with of_one_example(log_prob, "log_prob", params, batch.data):
        params = varying_like(params, batch.data)
        return _hessian(lambda p: batch_loss(log_prob, p, batch), params, batch.spec)


def _hessian(function: Callable[[Any], Scalar], params: chex.ArrayTree, spec: ParamSpec) -> Float[Array, "p p"]:
    """`jax.hessian` over the flat parameters, in the statistics dtype, symmetric to the last bit."""

    def flat_function(flat: Float[Array, " p"]) -> Scalar:
        return function(cast_like(spec.unravel(flat), params))

    matrix = jax.hessian(flat_function)(spec.ravel(params, "params"))
    return 0.5 * (matrix + matrix.T)
