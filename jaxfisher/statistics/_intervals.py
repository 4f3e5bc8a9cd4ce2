"""Intervals for a function of the parameters: Wald's, by the likelihood ratio, and by the score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._examples import Batch, checked_batch_size, make_batch, needs_data
from jaxfisher._linalg import matmul
from jaxfisher._model import MODEL, Model, batch_loss, log_likelihood, of_one_example
from jaxfisher._once import once_for
from jaxfisher._operators.operator import Operator
from jaxfisher._readings import Around
from jaxfisher._tree import cast_like, check_function
from jaxfisher._values import check_number
from jaxfisher._varying import while_loop
from jaxfisher.statistics._covariance import as_covariance, check_real, delta_method
from jaxfisher.statistics._observations import fisher_at, of_observations

STAGES, STEPS = 12, 30
"""The number of parts of the path from the estimate to an end, and the most Newton steps for each part."""
FAR = 64
"""The number of standard errors at which a likelihood that has not fallen is taken never to fall."""


class Interval(NamedTuple):
    """An interval for a number.

    Attributes:
        lower: the lower end.
        upper: the upper end.
        converged: whether both ends were found. If the likelihood never falls on one side, as for no successes in n trials,
            the end is the limit of the function there: 0 for a probability, minus infinity for its logit. There are no ends if
            the likelihood is not finite at the estimate.
    """

    lower: Scalar
    upper: Scalar
    converged: Bool[Array, ""] | np.bool_


@dataclasses.dataclass(frozen=True)
class _Question(Around):
    """A model, and the function of its parameters that the interval is for."""

    model: Model
    function: Callable[[Any], Scalar]


def wald_interval(function: Callable[[Any], Any], level: chex.Numeric = 0.95) -> Callable[[chex.ArrayTree, Operator], Interval]:
    r"""Wald's interval: the estimate plus and minus a multiple of its standard error.

    .. math:: f(\hat\theta) \pm z\, \sqrt{J C J^T}, \qquad z = \Phi^{-1}((1 + \mathrm{level}) / 2).

    **When it is the wrong tool.** It depends on the coordinates: the interval of a rate does not agree with that of its
    logarithm, and may contain impossible values. With few observations use `jaxfisher.statistics.likelihood_interval`.

    Args:
        function: ``params -> scalar``, such as ``lambda p: p["slope"]``.
        level: the coverage, between zero and one.

    Returns:
        A function ``(params, covariance) -> Interval``, with the covariance of `jaxfisher.covariance` or `jaxfisher.sandwich`.

    Raises:
        ValueError: a level that is not between zero and one; (when called) a function of several numbers.
        TypeError: (when called) ``covariance`` is no operator, or a Fisher; a function whose value is not real.

    Reference: Wald (1943); van der Vaart, Asymptotic Statistics (1998), section 5.5.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> F = jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(1.0)
    >>> found = statistics.wald_interval(lambda mu: mu)(1.0, jf.covariance(F, n=4))
    >>> print(round(float(found.lower), 2), round(float(found.upper), 2))
    -0.96 2.96
    """
    z = _deviations("wald_interval", level)
    inherited = delta_method(function)

    def interval(params: chex.ArrayTree, covariance: Operator, /) -> Interval:
        covariance = as_covariance(covariance, "wald_interval: `covariance`")
        _check_scalar("wald_interval", jax.eval_shape(function, params))
        value, matrix = inherited(params, covariance)
        middle, half = jnp.asarray(value, matrix.dtype), z.astype(matrix.dtype) * jnp.sqrt(matrix[0, 0])
        return Interval(middle - half, middle + half, jnp.isfinite(half))

    return interval


def likelihood_interval(
    model: Model, function: Callable[[Any], Any], level: chex.Numeric = 0.95, *, batch_size: int | None = None
) -> Callable[..., Interval]:
    r"""The profile-likelihood interval of a number: the values that the likelihood-ratio test accepts, with all else fitted.

    .. math:: \{f(\theta) : 2 \log L(\hat\theta) - 2 \log L(\theta) \le z^2\}.

    Its ends are the largest and the smallest value of f on that set, found by Newton's method from those of Wald's interval.
    It is the same interval in any coordinates.

    **When it is the wrong tool.** It is valid if the model is right. If the estimate is at a finite edge of the possible
    parameters, such as a rate of zero, no end is found on that side: ask for a function of its logarithm.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        function: ``params -> scalar``; with one parameter and the identity it is the plain likelihood-ratio interval.
        level: the coverage, between zero and one.
        batch_size: work on chunks of at most this many observations, which bounds memory.

    Returns:
        A function ``(params, *inputs, target, weights=None) -> Interval``, to be called at the maximum of the likelihood. The
        Fisher there must have full rank. If it has not, as with redundant columns of a design, the ends are NaN and
        ``converged`` is false, even for numbers that the data determine. Remove redundant parameters, or use
        `jaxfisher.statistics.wald_interval`.

    Raises:
        ValueError: a level that is not between zero and one; (when called) a function of several numbers, arrays of different
            lengths.
        TypeError: (when called) a model that returns no distribution, a function whose value is not real.

    Reference: Venzon and Moolgavkar, A method for computing profile-likelihood-based confidence intervals (1988).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> model = lambda mu: jf.Normal(mu, 2.0)
    >>> found = statistics.likelihood_interval(model, lambda mu: mu)(1.0, jnp.array([-1.0, 0.0, 2.0, 3.0]))
    >>> print(round(float(found.lower), 2), round(float(found.upper), 2), found.converged)
    -0.96 2.96 True
    """
    return _interval("likelihood_interval", model, function, level, batch_size, _likelihood_ends)


def score_interval(
    model: Model, function: Callable[[Any], Any], level: chex.Numeric = 0.95, *, batch_size: int | None = None
) -> Callable[..., Interval]:
    r"""The score interval of a number: the values that the score test accepts, with all else fitted.

    .. math:: \{f(\theta) : n\, g^T F^{-1} g \le z^2\}, \qquad g = \tfrac1n \nabla \log L \text{ along } \nabla f.

    The information is taken at the value that is tested, not at the estimate. For a proportion it is Wilson's interval.

    **When it is the wrong tool.** It is valid if the model is right.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        function: ``params -> scalar``.
        level: the coverage, between zero and one.
        batch_size: work on chunks of at most this many observations, which bounds memory.

    Returns:
        A function ``(params, *inputs, target, weights=None) -> Interval``, to be called at the maximum of the likelihood. The
        Fisher there must have full rank. If it has not, as with redundant columns of a design, the ends are NaN and
        ``converged`` is false, even for numbers that the data determine. Remove redundant parameters, or use
        `jaxfisher.statistics.wald_interval`.

    Raises:
        ValueError: a level that is not between zero and one; (when called) a function of several numbers, arrays of different
            lengths.
        TypeError: (when called) a model that returns no distribution, a function whose value is not real.

    Reference: Rao (1948); Wilson (1927); Cox and Hinkley, Theoretical Statistics (1974), section 9.3.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> asked = statistics.score_interval(lambda logit: jf.Bernoulli(logit), jax.nn.sigmoid)
    >>> found = asked(0.0, jnp.array([0, 1, 0, 1]))
    >>> print(round(float(found.lower), 2), round(float(found.upper), 2))
    0.15 0.85
    """
    return _interval("score_interval", model, function, level, batch_size, _score_ends)


def _interval(
    name: str, model: Model, function: Any, level: Any, batch_size: int | None, ends: Callable[..., Any]
) -> Callable[..., Interval]:
    check_function("model", model, MODEL)
    check_function("function", function, "params -> scalar")
    z = _deviations(name, level)
    batch_size = checked_batch_size(batch_size)
    question = _Question(model, function)

    @of_observations(name)
    def interval(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Interval:
        needs_data(data, name)
        batch = make_batch(params, data, weights, batch_size)
        _check_scalar(name, jax.eval_shape(function, params))
        with of_one_example(log_likelihood(model), "log_prob", params, batch.data):
            values, good = ends(question, params, batch, jnp.asarray(z, batch.spec.dtype))
        return Interval(jnp.min(values), jnp.max(values), jnp.all(good))

    return interval


def _deviations(name: str, level: Any) -> Scalar:
    """The number of standard deviations whose interval covers this share of a normal distribution."""
    check_number("level", level)
    dtype = jnp.result_type(float)
    if not isinstance(level, jax.Array):
        if not 0 < float(level) < 1:
            raise ValueError(f"{name}: `level` is {level}; expected a coverage between zero and one, such as 0.95.")
        # In float32 the digits of one minus the level would be lost: 5 standard deviations would become 4.992.
        return jnp.asarray(NormalDist().inv_cdf(0.5 * (1 + float(level))), dtype)
    share = level.astype(dtype)
    # A level that turns out at run time to be no coverage gives NaN.
    return 2**0.5 * jax.lax.erf_inv(jnp.where((share > 0) & (share < 1), share, jnp.nan))


def _check_scalar(name: str, value: Any) -> None:
    check_real(name, value)
    if jnp.shape(value) != ():
        raise ValueError(f"{name}: `function` returned shape {jnp.shape(value)}; expected one number. Return one at a time.")


class _Local(NamedTuple):
    """The problem in units of standard errors: ``theta = estimate + root u``."""

    function: Callable[[Array], Scalar]
    """The function itself."""

    loss: Callable[[Array], Scalar]
    """The negative log-likelihood of all observations, minus that at the estimate."""
    ahead: Callable[[Array], Float[Array, " p"]]
    """The direction in which the function rises, of length one. Its slope does not matter: a probability and its logit have the
    same ends, also where one has saturated. With one parameter it is one, and the slope may be zero."""
    rise: Callable[[Array], Scalar]
    """The function minus its value at the estimate; with one parameter u itself."""
    information: Callable[[Array], Float[Array, "p p"]]
    """The exact Fisher of all observations, which is the identity at the estimate."""
    origin: Float[Array, " p"]
    value: Scalar
    rounding: Scalar
    """The rounding error of the loss."""


def _local(question: _Question, params: Any, batch: Batch) -> _Local:
    spec, log_prob = batch.spec, log_likelihood(question.model)
    total = batch.total
    flat = spec.ravel(params, "params")

    def at(flat: Array) -> Any:
        return cast_like(spec.unravel(flat), params)

    def fisher(flat: Array) -> Array:
        return fisher_at(question.model, at(flat), batch.data, batch.uneven, batch.batch_size).as_matrix()

    root = jnp.linalg.inv(jnp.linalg.cholesky(total * fisher(flat))).T
    here = batch_loss(log_prob, at(flat), batch)

    def place(u: Array) -> Array:
        return flat + matmul(root, u)

    def function(u: Array) -> Scalar:
        value: Scalar = question.function(at(place(u))).astype(spec.dtype)
        return value

    def ahead(u: Array) -> Array:
        slope = jax.grad(function)(u)
        scaled = slope / jax.lax.stop_gradient(jnp.max(jnp.abs(slope)))
        return scaled / jnp.linalg.norm(scaled)

    origin = jnp.zeros_like(flat)
    value = function(origin)
    return _Local(
        function,
        lambda u: total * (batch_loss(log_prob, at(place(u)), batch) - here),
        jnp.ones_like if flat.size == 1 else ahead,
        (lambda u: u[0]) if flat.size == 1 else lambda u: function(u) - value,
        lambda u: total * matmul(root.T, matmul(fisher(place(u)), root)),
        origin,
        value,
        4 * jnp.finfo(spec.dtype).eps * total * (1 + jnp.abs(here)),
    )


@once_for
def _likelihood_ends(question: _Question, params: Any, batch: Batch, z: Scalar) -> tuple[Array, Array]:
    """The ends: the points where the function rises along ``grad loss``, and ``loss = z^2 / 2``."""
    local = _local(question, params, batch)

    def residual(unknown: Array, z: Scalar) -> Array:
        u, multiplier = unknown[:-1], unknown[-1]
        value, slope = jax.value_and_grad(local.loss)(u)
        return jnp.append(local.ahead(u) - multiplier * slope, (value - 0.5 * z**2) / z)

    return _ends(local, residual, z)


@once_for
def _score_ends(question: _Question, params: Any, batch: Batch, z: Scalar) -> tuple[Array, Array]:
    """The ends: the points where the function rises along ``grad loss``, and the score statistic is ``z^2``."""
    local = _local(question, params, batch)

    def residual(unknown: Array, z: Scalar) -> Array:
        u, multiplier = unknown[:-1], unknown[-1]
        slope = jax.grad(local.loss)(u)
        # A parameter about which the data say nothing at u has no score there either: 0 by 0 is to count as 0.
        information = local.information(u) + float(jnp.finfo(u.dtype).eps) ** 2 * jnp.eye(u.size, dtype=u.dtype)
        statistic = jnp.vdot(slope, jnp.linalg.solve(information, slope))
        return jnp.append(local.ahead(u) - multiplier * slope, (statistic - z**2) / (2 * z))

    return _ends(local, residual, z)


def _ends(local: _Local, residual: Callable[[Array, Scalar], Array], z: Scalar) -> tuple[Array, Array]:
    """Both ends, and whether they were found. For a low level they are Wald's; each level starts from the one below."""
    direction, there = local.ahead(local.origin), jnp.isfinite(local.loss(local.origin))
    levels = z * jnp.arange(1, STAGES + 1, dtype=z.dtype) / STAGES

    def fitted(distance: Scalar) -> Array:
        """The point at a distance along the direction with all else fitted."""

        def residual(u: Array) -> Array:
            slope = jax.grad(local.loss)(u)
            return slope + (jnp.vdot(direction, u) - distance - jnp.vdot(direction, slope)) * direction

        return _newton(residual, distance * direction)[0]

    def end(sign: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        def part(state: tuple[Array, Scalar, Any], level: Scalar) -> tuple[Any, None]:
            u, last, _ = state
            # For a parabola u is proportional to the level.
            u = _within_reach(lambda u: residual(jnp.append(u, 0), level)[-1] / level, u * level / last)
            slope, ahead = jax.grad(local.loss)(u), local.ahead(u)
            start = jnp.append(u, jnp.vdot(slope, ahead) / jnp.vdot(slope, slope))
            found, good = _newton(lambda unknown: residual(unknown, level), start)
            return (found[:-1], level, good), None

        begin = sign * levels[0] * direction, levels[0], jnp.ones((), bool)
        (found, _, good), _ = jax.lax.scan(part, begin, levels)
        # The equations also have the other end as a solution: check the side.
        good = good & there & (local.rise(found) * sign > 0)
        far, farther = (local.function(sign * length * direction) for length in (FAR, 2 * FAR))
        apart = jnp.abs(farther - far) > 8 * jnp.finfo(z.dtype).eps * jnp.abs(far)
        open_ended = ~good & (local.loss(fitted(sign * FAR)) <= local.rounding)
        limit = jnp.where(apart, jnp.sign(farther - far) * jnp.inf, far)
        return jnp.where(open_ended, limit, local.function(found)), good | (open_ended & ~jnp.isnan(farther))

    values, good = jax.vmap(end)(jnp.asarray([-1.0, 1.0], z.dtype))
    # A function that has the same side of its estimate at both ends turns between them.
    return values, good & (jnp.sign(values[0] - local.value) * jnp.sign(values[1] - local.value) <= 0)


def _within_reach(excess: Callable[[Array], Scalar], u: Array) -> Array:
    """``u``, or a shorter one by bisection if it is far beyond: at more than twice the level that is asked for.

    At a nearly flat likelihood, such as that of no successes, one standard error at the estimate leads out of this world.
    """

    def going(state: Any) -> Array:
        count, _, _, _, found = state
        return (count < 100) & ~found

    def halve(state: Any) -> Any:
        count, short, t, beyond, _ = state
        size = excess(t * u)
        over = ~(size <= 1.5)
        found = ~over & ((size >= -0.375) | (beyond <= t))
        short, beyond = jnp.where(over, short, t), jnp.where(over, t, beyond)
        return count + 1, short, jnp.where(found, t, 0.5 * (short + beyond)), beyond, found

    one = jnp.ones((), u.dtype)
    return u * while_loop(going, halve, (jnp.zeros((), jnp.int32), 0 * one, one, one, jnp.zeros((), bool)))[2]


def _newton(residual: Callable[[Array], Array], start: Array) -> tuple[Array, Bool[Array, ""]]:
    """A root by Newton's method, with steps halved until the residual falls, and whether it is a root."""
    eps = float(jnp.finfo(start.dtype).eps)

    def step(state: Any) -> Any:
        count, x, size, _ = state
        jacobian, here = jax.jacfwd(residual)(x), residual(x)
        # Where no part of a Newton step helps, try one of least squares, which does not move along a flat direction.
        changes = jnp.linalg.solve(jacobian, here), jnp.linalg.lstsq(jacobian, here)[0]
        steps = jnp.concatenate([jnp.outer(0.5 ** jnp.arange(12, dtype=x.dtype), change) for change in changes])
        sizes = jax.vmap(lambda change: jnp.linalg.norm(residual(x - change)))(steps)
        falls = jnp.any(sizes < size)
        first = jnp.argmax(sizes < size)
        return count + 1, jnp.where(falls, x - steps[first], x), jnp.where(falls, sizes[first], size), falls

    begin = jnp.zeros((), jnp.int32), start, jnp.linalg.norm(residual(start)), jnp.ones((), bool)
    _, x, size, _ = while_loop(lambda state: state[3] & (state[0] < STEPS), step, begin)
    return x, size < eps**0.5
