"""Maximum likelihood by Fisher scoring, with a report on convergence and on separated parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._examples import Batch, checked_batch_size, make_batch, needs_data
from jaxfisher._fisher import exact_fisher
from jaxfisher._model import MODEL, Model, batch_loss, log_likelihood, of_one_example
from jaxfisher._once import Static, once_for
from jaxfisher._operators.operator import Operator
from jaxfisher._pytree import array_fields
from jaxfisher._readings import Around
from jaxfisher._targets import given_with
from jaxfisher._tree import cast_like, check_function, either_part, path_names
from jaxfisher._values import check_nonnegative, count_of
from jaxfisher.statistics._observations import fisher_at, of_observations
from jaxfisher.statistics._scoring import FLOOR, Likelihood, Penalty, Problem, nothing, scoring


@array_fields(
    *("params", "fisher", "log_likelihood", "iterations", "offset", "gradient_norm", "rank", "converged", "separated"),
    repr=False,
)
class Fit:
    """The result of a fit.

    Attributes:
        params: the estimates, a pytree like the start.
        fisher: the exact Fisher there, an operator: ``jf.covariance(fit.fisher)``, ``jf.standard_errors(fit.fisher)``.
        log_likelihood: the sum over observations, in nats, without the penalty.
        iterations: the number of times that the Fisher and the gradient were computed.
        offset: the length of the next step in standard errors. These are estimated from the scatter of the scores, so they do
            not depend on a scale of the model that is known only up to a factor. If the model fits every observation exactly,
            so that scores are rounding errors, it is the length relative to that of rounding errors, times the tolerance.
        gradient_norm: the norm of the gradient of the mean negative log-likelihood and penalty, in parameter units.
        rank: the rank of the Fisher, at most p.
        converged: whether ``offset`` is at most the tolerance, or as small as rounding lets it be and at most 32 times that,
            nothing is separated, and the log-likelihood is finite, which it is not for a target that the model cannot draw.
        separated: a pytree of booleans like the parameters. It marks entries that still move by long steps although the
            likelihood no longer changes, or that the data determined before and no longer do. The likelihood has no maximum
            along these, as when a class is separated from the others. A complex entry is marked if either of its parts is.
    """

    params: Any
    fisher: Operator
    log_likelihood: Scalar
    iterations: Int[Array, ""]
    offset: Scalar
    gradient_norm: Scalar
    rank: Int[Array, ""]
    converged: Bool[Array, ""]
    separated: Any

    def __repr__(self) -> str:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self.converged)) or jnp.ndim(self.converged):
            return f"Fit(params {self.fisher.size})"
        state = "converged" if self.converged else "NOT converged"
        names = _named(self.separated)
        apart = f", separated: {', '.join(names)}" if names else ""
        rank = f", rank {int(self.rank)}" if int(self.rank) < self.fisher.size else ""
        return (
            f"Fit({state} after {int(self.iterations)} iterations, log-likelihood {float(self.log_likelihood):.6g}, "
            f"params {self.fisher.size}{rank}, offset {float(self.offset):.1e}{apart})"
        )


def _named(flags: Any) -> list[str]:
    """The paths of the entries that are true."""
    named = []
    for path, leaf in zip(path_names(flags), jax.tree.leaves(flags), strict=True):
        for index in zip(*np.nonzero(np.atleast_1d(np.asarray(leaf))), strict=True):
            named.append(path + (str(list(map(int, index))) if np.ndim(leaf) else ""))
    return named


def fit(
    model: Model,
    *,
    penalty: Penalty | None = None,
    rtol: chex.Numeric | None = None,
    max_steps: int = 100,
    batch_size: int | None = None,
) -> Callable[..., Fit]:
    r"""Maximum likelihood by Fisher scoring.

    .. math:: \theta \leftarrow \theta - (F + \lambda U)^{-1} g, \qquad
        g = -\frac1n \sum_i s_i.

    The step at ``lambda = 0`` is that of iteratively reweighted least squares for a generalised linear model, and the
    Gauss-Newton step for a normal of fixed scale. It is taken unchanged if the quadratic model of the negative log-likelihood
    is good that far. If not, lambda keeps the step within a radius, which adapts to how good the model was before, and the step
    is bent as predictions bend along it (`jaxfisher.acceleration`). U is the recent information on each parameter.

    **When it is the wrong tool.** It makes and decomposes p x p matrices at each step, and goes through all data for each: for
    a network of more than about a thousand parameters see `jaxfisher.kfac`. It finds one maximum, near its start.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        penalty: ``(params, *inputs, weights) -> scalar`` in nats, added to the negative log-likelihood of all observations,
            such as `jaxfisher.statistics.firth`; the inputs are those of all examples, and the weights sum to one.
        rtol: the longest next step at convergence, in standard errors; None for the root of the dtype's eps.
        max_steps: the most steps.
        batch_size: work on chunks of at most this many observations, which bounds memory. A penalty sees all at once.

    Returns:
        A function ``(params, *inputs, target, weights=None)``, where ``params`` is the start, that returns a
        `jaxfisher.statistics.Fit`. Weights say how often an observation occurs. It computes in float64 if a parameter is
        float64.

    Raises:
        ValueError: a number of steps or a ``batch_size`` below one, a negative tolerance; (when called) arrays of different
            lengths.
        TypeError: (when called) a model that returns no distribution, a parameter that is not a real floating array.

    Reference: McCullagh and Nelder, Generalized Linear Models (1989), section 2.5; More, The Levenberg-Marquardt algorithm
    (1978); Transtrum and Sethna (arXiv 1201.5885), section IV, for the bend; Bates and Watts, Nonlinear Regression Analysis
    (1988), section 2.2.3, for the offset; Albert and Anderson (Biometrika 1984), for separation.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> x, y = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([1.0, 3.0, 4.0, 8.0])
    >>> model = lambda p, x: jf.Poisson(p["level"] + p["slope"] * x)
    >>> found = jf.fit(model)({"level": 0.0, "slope": 0.0}, x, y)
    >>> bool(found.converged), {name: round(float(leaf), 2) for name, leaf in found.params.items()}  # log 2, log 6 - log 2
    (True, {'level': 0.69, 'slope': 1.1})
    >>> apart = jf.fit(lambda w, x: jf.Bernoulli(w * (x - 0.5)))(0.0, x, jnp.array([0, 0, 1, 1]))
    >>> bool(apart.converged), bool(apart.separated)  # no weight is large enough
    (False, True)
    """
    check_function("model", model, MODEL)
    if penalty is not None:
        check_function("penalty", penalty, "(params, *inputs, weights) -> scalar")
    steps = count_of("`max_steps`", max_steps, "a whole number of steps,")
    if rtol is not None:
        check_nonnegative("rtol", rtol)
    batch_size = checked_batch_size(batch_size)
    problem = Problem(model, nothing if penalty is None else penalty)

    @of_observations("fit")
    def fitted(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Fit:
        needs_data(data, "fit")
        batch = make_batch(params, data, weights, batch_size)
        with of_one_example(log_likelihood(model), "log_prob", params, batch.data):
            tolerance = jnp.finfo(batch.spec.dtype).eps ** 0.5 if rtol is None else rtol
            found: Fit = _fitted(problem, params, batch, weights, jnp.asarray(tolerance, batch.spec.dtype), Static(steps))
        return found

    return fitted


@once_for
def _fitted(problem: Problem, params: Any, batch: Batch, weights: Any, tolerance: Scalar, steps: Static[int]) -> Fit:
    """All of a fit in one program."""
    state = scoring(Likelihood(problem, params, batch), tolerance, steps.value)
    at = cast_like(batch.spec.unravel(state.flat), params)
    return Fit(
        at,
        fisher_at(problem.model, at, batch.data, weights, batch.batch_size),
        -batch.total * batch_loss(log_likelihood(problem.model), at, batch),
        state.steps,
        state.offset,
        jnp.linalg.norm(state.gradient),
        state.rank,
        (state.offset <= FLOOR * tolerance) & ~state.pulled & ~jnp.any(state.separated) & jnp.isfinite(state.value),
        either_part(batch.spec.unravel(state.separated)),
    )


@dataclasses.dataclass(frozen=True)
class Firth(Around):
    """The penalty of `firth`."""

    model: Model

    def __call__(self, params: chex.ArrayTree, *inputs: Any, weights: Float[Array, " n"] | None = None) -> Scalar:
        return -0.5 * exact_fisher(self.model)(params, *inputs, **given_with(inputs, {"weights": weights})).logdet(0.0)


def firth(model: Model) -> Firth:
    r"""Firth's penalty for `jaxfisher.fit`, which is Jeffreys' prior: estimates stay finite if the data are separated.

    .. math:: -\tfrac12 \log\det F(\theta).

    It removes the first-order bias of the maximum-likelihood estimate for an exponential family in its natural parameters. Its
    gradient goes through the log-determinant.

    **When it is the wrong tool.** F must have full rank. With other links than the canonical one it does not remove the bias.
    Predicted probabilities are pulled towards one half.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.

    Returns:
        A function ``(params, *inputs, weights=None) -> scalar``, in nats, for ``jf.fit(model, penalty=...)``.

    Raises:
        TypeError: (when called) a model that returns no distribution.

    Reference: Firth, Bias reduction of maximum likelihood estimates (Biometrika 1993), section 3; Heinze and Schemper (2002).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> model = lambda logit, x: jf.Bernoulli(logit + 0 * x)
    >>> found = jf.fit(model, penalty=statistics.firth(model))(0.0, jnp.zeros(3), jnp.array([1, 1, 1]))
    >>> print(round(float(found.params), 3))  # log of (3 + 1/2) / (0 + 1/2)
    1.946
    """
    check_function("model", model, MODEL)
    return Firth(model)
