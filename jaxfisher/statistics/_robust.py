"""The meat of a sandwich (scores corrected for leverage, summed over clusters), and the dispersion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.foreign import Foreign
from jaxfisher._distributions.joint import Joint
from jaxfisher._distributions.masked import Masked
from jaxfisher._examples import Batch, checked_batch_size, make_batch, map_examples
from jaxfisher._fisher import exact_fisher
from jaxfisher._linalg import matmul
from jaxfisher._model import LOG_PROB, MODEL, LogProb, Model, of_one_example, predict
from jaxfisher._once import once, once_for
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.operator import Operator, scores_of
from jaxfisher._pieces import map_batches
from jaxfisher._provenance import mean_over
from jaxfisher._scores import check_one_row_each, scores
from jaxfisher._tree import check_function
from jaxfisher._values import described, real_array, whole
from jaxfisher.statistics._covariance import inverse_and_null
from jaxfisher.statistics._observations import occurrences, of_observations


def meat(log_prob: LogProb, *, batch_size: int | None = None) -> Callable[..., Operator]:
    r"""The meat of `jaxfisher.sandwich`: the mean outer product of scores, times factors and summed over clusters first.

    .. math:: M = \frac1n \sum_g t_g t_g^T, \qquad t_g = \sum_{i \in g} f_i s_i.

    Without groups each observation is its own group, and without factors the meat is then `jaxfisher.empirical_fisher`. Factors
    come from `jaxfisher.statistics.hc1`, `hc2` and `hc3`.

    **When it is the wrong tool.** The number of clusters, not of observations, must be large: with fewer than about forty,
    standard errors are too small.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        batch_size: run the model on at most this many observations at a time, which bounds its activations.

    Returns:
        A function ``(params, *data, groups=None, factors=None, weights=None)`` that returns a dense operator, which it makes
        from the n x p scores. ``groups`` has a label for each example, and ``factors`` a number for each. Labels are any
        numbers or, outside ``jit``, strings. ``weights`` say how often an observation occurs.

    Raises:
        ValueError: (when called) arrays of different lengths, groups or factors of another length than the data, a group that
            is missing, such as None or NaN.
        TypeError: (when called) groups inside ``jit`` that are no numbers, factors that are no real numbers.

    Reference: Liang and Zeger, Longitudinal data analysis using generalized linear models (Biometrika 1986), section 3;
    MacKinnon and White (1985), for the factors.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> y = jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> print(statistics.meat(log_prob)(0.0, y).as_matrix(), statistics.meat(log_prob)(0.0, y, groups=[0, 0, 1, 1]).as_matrix())
    [[1.]] [[2.]]
    """
    check_function("log_prob", log_prob, LOG_PROB)
    scores_of_data = scores(log_prob, batch_size=checked_batch_size(batch_size))

    @of_observations("meat")
    def meat_of(
        params: chex.ArrayTree, /, *data: Any, groups: Any = None, factors: Any = None, weights: Any = None
    ) -> Operator:
        batch = make_batch(params, data, weights)
        made = scores_of_data(params, *data, weights=weights)
        check_one_row_each("meat", made)
        rows = made.as_matrix()
        if factors is not None:
            # A row of weight zero is zero, and a factor of NaN beside it must leave it so.
            each = jnp.where(made.weights == 0, 0, _per_example("factors", factors, batch.size))
            rows = rows * each.astype(rows.dtype)[:, None]
        if groups is None:
            matrix = _moment(rows, made.weights)
        else:
            if np.shape(groups) != (batch.size,):
                raise _other_length("groups", np.shape(groups), batch.size)
            places = _places("meat", groups)
            sums = _sums(made.weights[:, None] * rows, places)
            matrix = batch.total * matmul(sums.T, sums)
        return Operator(Dense(matrix, batch.spec), mean_over("meat", batch))

    return meat_of


def _per_example(name: str, values: Any, n: int) -> Array:
    array = real_array(f"meat: `{name}`", values)
    if array.shape != (n,):
        raise _other_length(name, array.shape, n)
    return array


def _other_length(name: str, shape: tuple[int, ...], n: int) -> ValueError:
    return ValueError(f"meat: `{name}` has shape {shape}, but there are {n} examples. Pass one each, shape ({n},).")


def _places(caller: str, groups: Any) -> Array:
    """The number of its group for each example, counted from zero."""
    if isinstance(groups, jax.core.Tracer):
        if not jnp.issubdtype(groups.dtype, jnp.number) and groups.dtype != bool:
            raise TypeError(
                f"{caller}: `groups` has dtype {groups.dtype} inside jit; expected numbers, a label for each example."
            )
        return _numbered(groups)
    labels = np.asarray(groups)
    missing = np.ma.getmaskarray(groups) if isinstance(groups, np.ma.MaskedArray) else _is_missing(labels)
    if np.any(missing):
        raise ValueError(
            f"{caller}: `groups` has no label at entry {np.flatnonzero(missing)[0]}; expected one for each example. Leave such "
            "examples out, or give each a label of its own."
        )
    return jnp.asarray(np.unique(labels, return_inverse=True)[1])


@once
def _numbered(groups: Array) -> Array:
    numbers: Array = jnp.unique(groups, return_inverse=True, size=groups.size)[1]
    return numbers


@once
def _moment(rows: Array, weights: Array) -> Array:
    return matmul(rows.T, weights[:, None] * rows)


@once
def _sums(rows: Array, places: Array) -> Array:
    """The sum of the rows of each group; zeros follow the last one."""
    return jax.ops.segment_sum(rows, places, num_segments=len(rows))


def _is_missing(labels: np.ndarray) -> Any:
    """Which labels are none: None, NaN, and what else is not equal to itself."""
    if labels.dtype != object:
        return labels != labels  # noqa: PLR0124
    return np.array([label is None or bool(label != label) for label in labels.reshape(-1)])  # noqa: PLR0124


def cluster_factor(groups: Any, p: int, weights: Float[Array, " n"] | None = None) -> Scalar:
    r"""The small-sample factor of a covariance from few clusters: ``G / (G - 1) (n - 1) / (n - p)``.

    Stata and statsmodels apply it by default: ``cluster_factor(groups, p) * jf.sandwich(bread, meat)``.

    Args:
        groups: the labels, shape ``[n]``, with G different values.
        p: the number of parameters.
        weights: how often each observation occurs, shape ``[n]``. Then n is their sum, and G the number of groups that occur;
            the factor is NaN if that number is one, or if n is not above p.

    Raises:
        ValueError: only one group; a missing label, such as None or NaN; labels that are no vector; no more observations than
            parameters; weights of another length, or known to be negative or all zero.
        TypeError: weights that are no numbers.

    Reference: Cameron and Miller, A practitioner's guide to cluster-robust inference (2015), equation 12.

    >>> from jaxfisher import statistics
    >>> print(statistics.cluster_factor([0, 0, 1, 1, 2, 2], p=1))
    1.5
    """
    shape, columns = np.shape(groups), whole(p)
    places = _places("cluster_factor", groups)
    number = None if isinstance(groups, jax.core.Tracer) else len(np.unique(np.asarray(groups)))
    if len(shape) != 1 or number in (0, 1):
        seen = f"shape {shape}" + ("" if number is None else f", with {number} labels")
        raise ValueError(f"cluster_factor: `groups` has {seen}; expected a vector of two or more.")
    if columns is None or columns < 0 or (weights is None and columns >= shape[0]):
        raise ValueError(f"cluster_factor: `p` is {described(p)}; expected a whole number below the {shape[0]} observations.")
    often = occurrences(weights, shape[0])
    occur = jnp.sum(_sums(often, places) > 0)
    total = jnp.sum(often)
    factor = occur / (occur - 1) * (total - 1) / (total - columns)
    return jnp.where((occur > 1) & (total > columns), factor, jnp.nan)


def leverages(model: Model, *, batch_size: int | None = None) -> Callable[..., Float[Array, " n"]]:
    r"""The leverage of each observation on its own prediction: the diagonal of a generalised linear model's hat matrix.

    .. math:: h_i = r_i^T (n F)^{-1} r_i, \qquad F = \frac1n \sum_i r_i r_i^T, \qquad \sum_i h_i = \mathrm{rank}\, F.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example, with one field that moves with the parameters.
        batch_size: run the model on at most this many observations at a time, which bounds its activations.

    Returns:
        A function ``(params, *inputs, weights=None)`` that returns numbers between 0 and 1, shape ``[n]``. With weights, which
        say how often an observation occurs, they are the leverages of one occurrence, and ``sum w_i h_i`` is the rank.

    Raises:
        ValueError: (when called) more than one number of a prediction moves, so that there is no single hat matrix.
        TypeError: (when called) a model that returns no distribution.

    Reference: Pregibon, Logistic regression diagnostics (Annals of Statistics 1981), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> model = lambda w, x: jf.Normal(w * x, 1.0)
    >>> print(statistics.leverages(model)(0.0, jnp.array([1.0, 1.0, 2.0, 2.0])))  # x^2 / sum x^2
    [0.1 0.1 0.4 0.4]
    """
    check_function("model", model, MODEL)
    fisher_of = exact_fisher(model, batch_size=checked_batch_size(batch_size))

    @of_observations("leverages")
    def leverages_of(params: chex.ArrayTree, /, *inputs: Any, weights: Any = None) -> Float[Array, " n"]:
        fisher = fisher_of(params, *inputs, weights=weights)
        rows = scores_of(fisher, "leverages").as_matrix()
        batch = make_batch(params, inputs, weights)
        if rows.shape[0] != batch.size:
            raise ValueError(
                f"leverages: {rows.shape[0] // batch.size} numbers of a prediction move with the parameters; expected one, "
                "such as a linear predictor. Hold the others fixed, such as the scale of a normal."
            )
        return jnp.sum(matmul(rows, inverse_and_null(fisher)[0]) * rows, axis=1) / batch.total

    return leverages_of


def hc1(leverages: Float[Array, " n"], weights: Float[Array, " n"] | None = None) -> Float[Array, " n"]:
    r"""The factors of HC1, ``sqrt(n / (n - p))`` for every observation, with ``p`` the sum of the leverages.

    Args:
        leverages: the leverages from `jaxfisher.statistics.leverages`.
        weights: how often each observation occurs, shape ``[n]``; the weights that the leverages were made with. Then n is
            their sum, and ``p = sum w_i h_i``.

    Raises:
        ValueError: weights of another length, or known to be negative or all zero (if only known at run time, the factors are
            NaN).
        TypeError: weights or leverages that are no numbers.

    Reference: MacKinnon and White, Some heteroskedasticity-consistent covariance matrix estimators (1985), equation 9.

    >>> import jax.numpy as jnp
    >>> from jaxfisher import statistics
    >>> print(statistics.hc1(jnp.full(4, 0.75)))
    [2. 2. 2. 2.]
    """
    leverages = real_array("hc1: `leverages`", leverages)
    often = occurrences(weights, leverages.shape[0]).astype(leverages.dtype)
    n, p = jnp.sum(often), jnp.sum(often * jnp.where(often == 0, 0, leverages))
    return jnp.full_like(leverages, 1) * jnp.sqrt(n / (n - p))


def hc2(leverages: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""The factors of HC2, ``1 / sqrt(1 - h_i)``: unbiased for a linear model with equal variances.

    At a leverage of one the factor is infinite, as for `jaxfisher.statistics.hc3`.

    Args:
        leverages: the leverages from `jaxfisher.statistics.leverages`.

    Raises:
        TypeError: leverages that are no real numbers.

    Reference: MacKinnon and White (1985), equation 10.

    >>> import jax.numpy as jnp
    >>> from jaxfisher import statistics
    >>> print(statistics.hc2(jnp.array([0.0, 0.75])))
    [1. 2.]
    """
    return jax.lax.rsqrt(1 - real_array("hc2: `leverages`", leverages))


def hc3(leverages: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""The factors of HC3, ``1 / (1 - h_i)``: close to leaving one observation out.

    An observation of leverage one, such as the only one with its dummy variable, determines a parameter alone: its score is
    zero, its variance cannot be estimated, and its factor is infinite. The product of the two, and the meat, are NaN or, if
    rounding changes one of the two a little, infinite or meaningless, as in statsmodels. Leave such an observation out,
    together with its parameter.

    Args:
        leverages: the leverages from `jaxfisher.statistics.leverages`.

    Raises:
        TypeError: leverages that are no real numbers.

    Reference: MacKinnon and White (1985), equation 12; Long and Ervin (2000), who advise it below 250 observations.

    >>> import jax.numpy as jnp
    >>> from jaxfisher import statistics
    >>> print(statistics.hc3(jnp.array([0.0, 0.75])))
    [1. 4.]
    """
    return 1 / (1 - real_array("hc3: `leverages`", leverages))


def dispersion(model: Model, *, batch_size: int | None = None) -> Callable[..., Scalar]:
    r"""Pearson's estimate of the dispersion: the ratio of the variance to the one that the model states.

    .. math:: \hat\phi = \frac1{n k - p} \sum_i \sum_{j=1}^k \frac{(y_{ij} - \mu_{ij})^2}{v_{ij}},

    with ``mu`` and ``v`` the mean and the variance of the k independent numbers (mostly one) that the model predicts for an
    example. For ``Normal(f, 1)`` it is the residual variance, and ``phi * jf.covariance(F)`` is the covariance of least
    squares.

    **When it is the wrong tool.** For counts that are nearly all zero or one it is biased. A factor cannot correct a variance
    of another form than the model's: see `jaxfisher.sandwich`.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example, with a ``mean`` and a ``variance``.
        batch_size: work on chunks of at most this many observations, which bounds memory.

    Returns:
        A function ``(params, *inputs, target, weights=None)`` that returns a scalar. With weights, n is their sum. It is NaN if
        no more numbers than parameters are there.

    Raises:
        TypeError: (when called) a model that returns no distribution, or one that is not of independent numbers with a
            variance: classes, vectors, a `jaxfisher.Joint` or `jaxfisher.Masked`, a foreign distribution without a counterpart.
        ValueError: (when called) a target of another shape than a draw.

    Reference: McCullagh and Nelder, Generalized Linear Models (1989), section 4.5.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> print(statistics.dispersion(lambda mu: jf.Normal(mu, 1.0))(0.0, jnp.array([3.0, -3.0, 0.0])))  # 18 / 2
    9.0
    """
    check_function("model", model, MODEL)

    @of_observations("dispersion")
    def dispersion_of(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Scalar:
        return _dispersion(model, params, make_batch(params, data, weights, batch_size))

    return dispersion_of


@once_for
def _dispersion(model: Model, params: Any, batch: Batch) -> Scalar:
    def squared(params: chex.ArrayTree, *example: Any) -> Array:
        predicted = predict(model, params, *example[:-1])
        _check_numbers(predicted)
        predicted._check_target(example[-1], "dispersion: one target")
        target = jnp.asarray(example[-1], predicted.mean.dtype)
        return jnp.square(target - predicted.mean) / predicted.variance

    with of_one_example(model, "model", params, batch.data[:-1]):
        found = map_batches(lambda *data: map_examples(squared, params, data), batch.data, batch.batch_size)
    each = found.astype(batch.spec.dtype).reshape(batch.size, -1)
    total = batch.total
    freedom = total * each.shape[1] - batch.spec.size
    found = jnp.sum(batch.weights * jnp.sum(each, axis=1)) * total / jnp.where(freedom > 0, freedom, 1)
    return jnp.where(freedom > 0, found, jnp.nan)


def _check_numbers(predicted: Distribution) -> None:
    """Raise `TypeError` unless a draw consists of independent numbers, each with a meaningful mean and variance."""
    if isinstance(predicted, Categorical | Joint | Masked | Foreign) or predicted.event_ndim:
        raise TypeError(
            f"dispersion: the model returns {predicted}; expected independent numbers whose variance is known, such as "
            "jf.Poisson, jf.Normal or jf.Bernoulli. Classes and vectors have no single dispersion. To leave an example out, "
            "give it the weight zero."
        )
