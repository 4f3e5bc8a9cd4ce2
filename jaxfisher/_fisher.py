"""The Fisher functions: empirical, exact, sampled, implicit. Each returns an operator that is a mean over examples."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import chex
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxfisher._examples import check_centred, example_keys, make_batch, needs_data
from jaxfisher._model import LOG_PROB, MODEL, LogProb, Model, of_one_example
from jaxfisher._operators.from_scores import FromScores
from jaxfisher._operators.implicit import Implicit
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._provenance import mean_over
from jaxfisher._row_functions import DrawnRow, ExactRows, Prediction, SampledRows, ScoreRows, prediction
from jaxfisher._scores import Scores, centred, make_scores
from jaxfisher._targets import OfData
from jaxfisher._tree import as_key, check_function, split
from jaxfisher._values import check_flag, count_of, described
from jaxfisher._varying import varying_like


class FisherFunction(Protocol):
    """``fisher(params, *data, weights=None, counts=None) -> Operator``: a Fisher as a function of the parameters and the data.

    `exact_fisher`, `empirical_fisher` and the like return such functions. A function of your own is called with all of the
    data, the targets last.
    """

    def __call__(
        self,
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator: ...


def empirical_fisher(
    log_prob: LogProb, center: bool = False, *, batch_size: int | None = None, max_bytes: int | None = None
) -> FisherFunction:
    r"""The empirical Fisher: the mean outer product of the scores *at the data*.

    .. math:: \hat F = \frac1n \sum_i s_i s_i^T, \qquad s_i = \nabla_\theta \log p_\theta(x_i).

    With ``center=True`` it is the covariance of the score, ``1/n sum (s_i - mean) (s_i - mean)^T``. If ``log_prob`` is a wave
    function's log-amplitude, of any normalisation, and the data are draws from its square, this covariance is the real part of
    the quantum geometric tensor, the matrix of stochastic reconfiguration. A log-amplitude may be complex, and so may
    parameters, each of which counts as two real numbers:

    .. math:: \mathrm{Re}\, \frac1n \sum_i (O_i - \bar O)^* (O_i - \bar O)^T, \qquad
        O_i = \partial_\theta \log\psi_\theta(x_i).

    For a holomorphic amplitude a solve with it is the solve with the complex tensor.

    **When it is the wrong one.** It is not an expectation under the model. Away from the data's own distribution, or near a
    good fit (where scores vanish), it can be far from the exact Fisher in size and direction: Kunstner et al. show a
    one-dimensional regression where following it is useless. Use `exact_fisher` or `sampled_fisher` to train.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        center: subtract the (weighted) mean score from every score.
        batch_size: recompute the scores in chunks of at most this many examples at each use, instead of holding their factors.
        max_bytes: as in `jaxfisher.scores`, instead of a ``batch_size``.

    Returns:
        A function ``(params, *data, weights=None, counts=None)``: every array of the data has a leading axis of n examples;
        with ``weights`` the mean is ``sum w_i s_i s_i^T / sum w_i``, with ``counts`` (see `exact_fisher`)
        ``sum w_i s_i s_i^T / sum w_i c_i``. It returns an operator, exact as scores. The covariance has no view
        `jaxfisher.kronecker`, since it is no sum of Kronecker products; it has all others.

    Raises:
        ValueError: (when called) arrays of different lengths, a ``log_prob`` that returns no scalar or is a batch mean.
        TypeError: ``center`` is neither True nor False; (when called) a parameter that is not a floating array.

    Reference: Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation (NeurIPS 2019), equation 3;
    Stokes, Izaac, Killoran and Carleo, Quantum natural gradient (Quantum 2020), section 3, for the geometric tensor.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> F = jf.empirical_fisher(log_prob)(0.0, jnp.array([1.0, -2.0]))
    >>> F
    Fisher(empirical, mean over 2, params 1, exact as scores)
    >>> print(F.as_matrix())  # the mean of (x - mu)^2, where the exact Fisher is 1
    [[2.5]]
    >>> print(jf.empirical_fisher(log_prob, center=True)(0.0, jnp.array([1.0, -2.0])).as_matrix())  # the variance of x
    [[2.25]]
    """
    check_function("log_prob", log_prob, LOG_PROB)
    check_flag("empirical_fisher: `center`", center)

    def fisher_of(
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator:
        needs_data(data, "empirical_fisher")
        batch = make_batch(params, data, weights, batch_size, max_bytes, counts)
        check_centred(center, batch, "empirical_fisher")
        made = make_scores(ScoreRows(log_prob), params, batch)
        return fisher_of_kind("empirical, centred", centred(made)) if center else fisher_of_kind("empirical", made)

    return OfData(fisher_of, takes_target=True)


def fisher_from_scores(scores: Scores) -> Operator:
    r"""The operator ``F = S^T diag(omega) S`` of scores S, with the weights ``omega`` that the scores carry.

    .. math:: F = \sum_i \omega_i\, s_i s_i^T, \qquad \omega_i = \tfrac1n \text{ unless weights were given}.

    For ``jf.scores(log_prob)(params, *data)`` it is the empirical Fisher of this data; for centred scores it is the covariance
    of the score. It is a mean over the observations of the scores, weighted if `jaxfisher.scores` was given weights. Nothing is
    computed here: use this function if you need the scores themselves too, as for a gradient with coordinates in them,
    ``scores.rmv(e)``.

    Args:
        scores: the scores that `jaxfisher.scores` returns, held or in chunks, centred or not.

    Returns:
        An operator, exact as scores: solves, views and transformations take it as they take any Fisher.

    Raises:
        TypeError: ``scores`` is not a `jaxfisher.Scores`.

    Reference: Becca and Sorella, Quantum Monte Carlo approaches for correlated systems (2017), section 6.4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> S = jf.scores(jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0)), center=True)(0.0, jnp.array([1.0, -2.0]))
    >>> F = jf.fisher_from_scores(S)
    >>> F
    Fisher(scores, centred, mean over 2, params 1, exact as scores)
    >>> print(F.solve(4.5, damping=0.0).round(5))  # the variance is 2.25
    2.0
    """
    if not isinstance(scores, Scores):
        hint = " This is a function: call it with the parameters and the data first." if callable(scores) else ""
        raise TypeError(
            f"fisher_from_scores: `scores` is {described(scores)}; expected what jf.scores(log_prob)(params, *data) "
            f"returns.{hint}"
        )
    return Operator(FromScores(scores), scores.provenance)


def exact_fisher(model: Model, *, batch_size: int | None = None, max_bytes: int | None = None) -> FisherFunction:
    r"""The Fisher information: the expectation over the model's own predictions, in closed form in output space.

    .. math:: F = \frac1n \sum_i E_{y \sim p_\theta(\cdot \mid x_i)} [s(y) s(y)^T] = \frac1n \sum_i J_i^T M_i J_i,

    with ``J_i`` the Jacobian of the predicted distribution's fields and ``M_i`` the distribution's Fisher in those fields. It
    is the Hessian of ``q -> KL(params, q)`` at ``q = params`` and, for natural parameters, the generalised Gauss-Newton matrix.

    **When it is the wrong one.** It takes as many rows per example as the distribution has fields (the classes of a softmax).
    If there are too many, use `sampled_fisher`; if no array of the scores' size fits in memory, use `implicit_fisher`. It does
    not say how wrong the model is: for standard errors under misspecification, see the empirical Fisher's sandwich.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        batch_size: recompute the rows in chunks of at most this many examples at each use, instead of holding their factors.
        max_bytes: as in `jaxfisher.scores`, instead of a ``batch_size``.

    Returns:
        A function ``(params, *inputs, weights=None, counts=None)`` that returns an operator, exact as scores. For a foreign
        distribution without a closed form, the operator's kind says where its metric comes from. ``weights``, shape ``[n]``,
        weigh the examples in the mean. ``counts``, shape ``[n]``, say how many terms an example consists of, such as the valid
        tokens of a sequence, and the mean is over terms: ``sum w_i F_i / sum w_i c_i``, as language models report their loss.
        `accumulate` then weighs batches by their terms.

    Raises:
        ValueError: (when called) arrays of different lengths, weights of another shape.
        TypeError: (when called) a model that returns no distribution, a parameter that is not a floating array.

    Reference: Martens, New insights and perspectives on the natural gradient method (JMLR 2020), section 5.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> print(F.as_matrix())  # mean of x^2 p (1 - p)
    [[1.25]]
    """
    check_function("model", model, MODEL)

    def fisher_of(
        params: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator:
        batch = make_batch(params, inputs, weights, batch_size, max_bytes, counts)
        with of_one_example(model, "model", params, batch.data):
            known = prediction(model, params, batch.data)
        return fisher_of_kind(_exact_kind(known), make_scores(ExactRows(model, known.moving), params, batch))

    return OfData(fisher_of, takes_target=False)


def sampled_fisher(
    model: Model, num_samples: int = 1, *, batch_size: int | None = None, max_bytes: int | None = None
) -> SampledFisher:
    r"""The Fisher estimated with targets drawn from the model: an unbiased estimate, with one row for each draw.

    .. math:: F \approx \frac1{nm} \sum_i \sum_{k=1}^m s(y_{ik}) s(y_{ik})^T, \qquad y_{ik} \sim p_\theta(\cdot \mid x_i).

    The noise of example i depends on the key and on i alone: chunks, their order and the number of devices do not change a
    draw. This holds for keys of any implementation: an rbg key, whose draws change under `jax.vmap`, only seeds a threefry key
    here.

    **When it is the wrong one.** Its relative error falls as ``1/sqrt(n m)``; with few rows it is of low rank and needs
    damping.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        num_samples: draws for each example, m.
        batch_size: recompute the rows in chunks of at most this many examples at each use, instead of holding their factors.
        max_bytes: as in `jaxfisher.scores`, instead of a ``batch_size``.

    Returns:
        A function ``(params, key, *inputs, weights=None, counts=None)`` that returns an operator, held exactly as the scores of
        the draws.

    Raises:
        ValueError: ``num_samples`` below one; (when called) arrays of different lengths.
        TypeError: (when called) a ``key`` that is no random key, a model that returns no distribution.

    Reference: Kunstner, Balles and Hennig (NeurIPS 2019), section 2; Martens (JMLR 2020), section 5.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> fisher = jf.sampled_fisher(lambda w, x: jf.Bernoulli(logits=w * x), num_samples=2)
    >>> fisher(0.0, jax.random.key(0), jnp.array([1.0, 3.0]))
    Fisher(sampled, 2 draws, mean over 2, params 1, exact as scores)
    """
    check_function("model", model, MODEL)
    draws = count_of("`num_samples`", num_samples, "a whole number of draws,")
    kind = f"sampled, {draws} draw{'s' if draws > 1 else ''}"

    def fisher_of(
        params: chex.ArrayTree, key: PRNGKeyArray, /, *inputs: Any, weights: Any = None, counts: Any = None
    ) -> Operator:
        key = as_key(key, "sampled_fisher(model)(params, key, *inputs)")
        batch = make_batch(params, inputs, weights, batch_size, max_bytes, counts)
        batch = dataclasses.replace(batch, data=(example_keys(key, batch.size), *batch.data))
        return fisher_of_kind(kind, make_scores(SampledRows(model, draws), params, batch))

    return fisher_of


def drawn_fisher(
    model: Model, params: chex.ArrayTree, keys: PRNGKeyArray, inputs: tuple[Any, ...], weights: Any = None, counts: Any = None
) -> Operator:
    """A sampled Fisher of one draw for each example, from one key for each."""
    batch = make_batch(params, inputs, weights, None, None, counts)
    batch = dataclasses.replace(batch, data=(keys, *batch.data))
    return fisher_of_kind("sampled, 1 draw", make_scores(DrawnRow(model), params, batch))


class SampledFisher(Protocol):
    """``fisher(params, key, *inputs, weights=None, counts=None) -> Operator``."""

    def __call__(
        self,
        params: chex.ArrayTree,
        key: PRNGKeyArray,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator: ...


class ImplicitFisher(Protocol):
    """``fisher(params, *inputs, weights=None, counts=None, views_of=None) -> Operator``."""

    def __call__(
        self,
        params: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
        views_of: Operator | None = None,
    ) -> Operator: ...


def implicit_fisher(model: Model, *, batch_size: int | None = None) -> ImplicitFisher:
    r"""The exact Fisher as products only: one jvp, the output metric, one vjp. Nothing of size n x p or p x p is held.

    .. math:: F v = \frac1n \sum_i J_i^T M_i (J_i v).

    The operator holds the parameters, the inputs and (as a static field) the model. Give the same model object each time, since
    a new object means a new trace. ``diagonal`` and ``trace`` are exact, from the rows of ``batch_size`` examples at a time;
    ``solve`` without ``solver=jf.CG()`` makes the matrix, up to p = 4096. Its views (`jaxfisher.kronecker` and the others) are
    those of the exact rows, one row for each field of the distribution. If there are many, as in a language model, take the
    views from a cheaper operator and keep the exact products:
    ``fisher(params, x, views_of=jf.sampled_fisher(model)(params, key, x))``.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        batch_size: run the model on chunks of at most this many examples, which bounds the activations held.

    Returns:
        A function ``(params, *inputs, weights=None, counts=None, views_of=None)`` that returns an operator. ``views_of`` is an
        operator over the same parameters, of which views are taken instead.

    Raises:
        ValueError: (when called) arrays of different lengths, weights of another shape, ``views_of`` over other parameters.
        TypeError: (when called) a model that returns no distribution, a parameter that is not a floating array,
            ``views_of`` that is no operator.

    Reference: Schraudolph, Fast curvature matrix-vector products (Neural Computation 2002), section 4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.implicit_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> print(F.mv(2.0))
    2.5
    """
    check_function("model", model, MODEL)

    def fisher_of(
        params: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
        views_of: Operator | None = None,
    ) -> Operator:
        batch = make_batch(params, inputs, weights, batch_size, counts=counts)
        with of_one_example(model, "model", params, batch.data):
            kind = _exact_kind(prediction(model, params, batch.data))
        if views_of is not None:
            views_of = as_operator(views_of, "implicit_fisher: `views_of`")
            batch.spec.check_same(views_of.spec, f"implicit_fisher: cannot take views of `views_of`, {views_of}")
        keep = (True,) * len(batch.spec.paths)
        provenance = mean_over(kind, batch)
        params = varying_like(split(params), batch.data)
        form = Implicit(model, params, batch.data, batch.weights, batch.batch_size, keep, batch.spec)
        return Operator(form, provenance, views_of)

    return OfData(fisher_of, takes_target=False)


def fisher_of_kind(kind: str, scores: Scores) -> Operator:
    """`fisher_from_scores` of rows that make a Fisher of this kind."""
    return Operator(FromScores(scores), dataclasses.replace(scores.provenance, kind=kind))


def _exact_kind(known: Prediction) -> str:
    """``exact``, with the source of the output metric where that is not a closed form."""
    return "exact" if known.source == "closed form" else f"exact, output metric from {known.source}"
