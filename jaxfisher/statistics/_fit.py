"""Maximum likelihood by Fisher scoring, with a report that says what was reached and what runs away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._examples import Batch, make_batch, needs_data
from jaxfisher._fisher import exact_fisher
from jaxfisher._linalg import matmul
from jaxfisher._model import MODEL, Model, log_likelihood, mean_loss, of_one_example
from jaxfisher._once import Around, Static, once_for
from jaxfisher._operators.operator import Operator
from jaxfisher._pytree import array_fields
from jaxfisher._scores import scores
from jaxfisher._targets import given_with
from jaxfisher._tree import cast_like, check_function, either_part, path_names
from jaxfisher._values import check_nonnegative, described, whole
from jaxfisher._varying import while_loop
from jaxfisher.statistics._observations import fisher_at

VISIBLE = 1e-3
"""A step that is so long where the information was largest, in standard deviations of one observation, is not a small one."""
FORGET = 0.9
"""What is left, at the next step, of the information that was met before."""
HALVINGS = 60
"""How often the bracket of a damping is halved, in its logarithm."""
TRIALS = 40
"""The most damped steps that are tried from one point."""
REACH = 100.0
"""How far the first step may go, in the units of `_Equations.length`, or in lengths of the parameters that it starts from."""
FLOOR = 32
"""An offset within so many tolerances is as good as it gets, where rounding does not let it fall any more."""
ENOUGH, WELL = 1e-4, 0.75
"""The share of what the quadratic model says that a step must go down, to be taken; and to be followed by a longer one."""


@array_fields(
    *("params", "fisher", "log_likelihood", "iterations", "offset", "gradient_norm", "rank", "converged", "separated"),
    repr=False,
)
class Fit:
    """What a fit reached.

    Attributes:
        params: the estimates, a pytree like the parameters that were given.
        fisher: the exact Fisher there, an operator: ``jf.covariance(fit.fisher)``, ``jf.standard_errors(fit.fisher)``.
        log_likelihood: the sum over observations, in nats, without the penalty.
        iterations: how many times the Fisher and the gradient were computed.
        offset: how far the next step would go, in standard errors; those are from the scatter of the scores, so that a scale
            which is known only up to a factor does not matter.
        gradient_norm: the norm of the gradient of the mean negative log-likelihood and penalty, in parameter units.
        rank: the rank of the Fisher, at most p.
        converged: whether ``offset`` is at most the tolerance, or as small as rounding lets it be and at most 32 times that,
            and nothing is separated.
        separated: a pytree like the parameters, of booleans: which entries still move by long steps although the likelihood no
            longer changes, or were determined by the data before and are no longer. The likelihood has no maximum along
            these, as where a class is separated from the others. Of a complex entry, whether its real or imaginary part is one.
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
    """The paths of the entries that are set."""
    named = []
    for path, leaf in zip(path_names(flags), jax.tree.leaves(flags), strict=True):
        for index in zip(*np.nonzero(np.atleast_1d(np.asarray(leaf))), strict=True):
            named.append(path + (str(list(map(int, index))) if np.ndim(leaf) else ""))
    return named


Penalty = Callable[..., Scalar]
"""``penalty(params, *inputs, weights) -> nats``, added to the negative log-likelihood of all observations."""


def _nothing(params: Any, *inputs: Any, weights: Any) -> Scalar:
    return jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class _Problem(Around):
    model: Model
    penalty: Penalty


def fit(
    model: Model, *, penalty: Penalty | None = None, rtol: chex.Numeric | None = None, max_steps: int = 100
) -> Callable[..., Fit]:
    r"""Maximum likelihood by Fisher scoring.

    .. math:: \theta \leftarrow \theta - (F + \lambda U)^{-1} g, \qquad
        g = -\frac1n \sum_i s_i.

    The step at ``lambda = 0`` is that of iteratively reweighted least squares for a generalised linear model, and Gauss and
    Newton's for a normal of fixed scale. It is taken as it is where the quadratic model of the negative log-likelihood holds so
    far. Where it does not, lambda keeps the step within a radius that follows how well the model held before; U is the
    information on each parameter that was met lately.

    **When it is the wrong tool.** It makes p x p matrices and decomposes them at each step, and takes all data at once: for a
    network of more than about a thousand parameters see `jaxfisher.kfac`. It finds one maximum, that of its start.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        penalty: ``(params, *inputs, weights) -> scalar`` in nats, added to the negative log-likelihood of all observations,
            such as `jaxfisher.statistics.firth`; inputs are those of all examples, and weights have the sum one.
        rtol: how far the next step may go at the end, in standard errors; None is the root of the dtype's eps.
        max_steps: the most steps.

    Returns:
        A function ``(params, *inputs, target, weights=None)`` that returns a `jaxfisher.statistics.Fit`, from a start. Weights
        say how often an observation occurs. It computes in float64 where a parameter is float64.

    Raises:
        ValueError: a number of steps below one, a negative tolerance; (when called) arrays of different lengths.
        TypeError: (when called) a model that returns no distribution, a parameter that is not a real floating array.

    Reference: McCullagh and Nelder, Generalized Linear Models (1989), section 2.5; More, The Levenberg-Marquardt algorithm
    (1978); Bates and Watts, Nonlinear Regression Analysis (1988), section 2.2.3, for the offset; Albert and Anderson
    (Biometrika 1984), for separation.

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
    steps = whole(max_steps)
    if steps is None or steps < 1:
        raise ValueError(f"`max_steps` is {described(max_steps)}; expected a whole number of steps, at least 1.")
    if rtol is not None:
        check_nonnegative("rtol", rtol)
    problem = _Problem(model, _nothing if penalty is None else penalty)

    def fitted(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Fit:
        needs_data(data, "fit")
        batch = make_batch(params, data, weights)
        with of_one_example(log_likelihood(model), "log_prob", params, batch.data):
            tolerance = jnp.finfo(batch.spec.dtype).eps ** 0.5 if rtol is None else rtol
            state = _scoring(problem, params, batch, jnp.asarray(tolerance, batch.spec.dtype), Static(steps))
        at = cast_like(batch.spec.unravel(state.flat), params)
        likelihood = -batch.total * mean_loss(log_likelihood(model), at, batch.data, batch.weights)
        return Fit(
            at,
            fisher_at(model, at, data, weights),
            likelihood,
            state.steps,
            state.offset,
            jnp.linalg.norm(state.gradient),
            state.rank,
            (state.offset <= FLOOR * tolerance) & ~jnp.any(state.separated),
            either_part(batch.spec.unravel(state.separated)),
        )

    return fitted


class _State(NamedTuple):
    """Where a fit is."""

    flat: Float[Array, " p"]
    value: Scalar
    radius: Scalar
    steps: Int[Array, ""]
    gradient: Float[Array, " p"]
    largest: Float[Array, " p"]
    """The largest information on each parameter that was met."""
    recent: Float[Array, " p"]
    """The same, slowly forgotten."""
    offset: Scalar
    rank: Int[Array, ""]
    most: Int[Array, ""]
    """The largest rank that was met."""
    separated: Bool[Array, " p"]
    moved: Bool[Array, ""]
    """Whether the last step was taken."""


class _Equations(NamedTuple):
    """The equations of one step, ``F d = -g``, and their eigenvectors in the units of `length`."""

    matrix: Float[Array, "p p"]
    gradient: Float[Array, " p"]
    newton: Float[Array, " p"]
    """The step as it is, of the directions that the data determine."""
    rank: Int[Array, ""]
    unseen: Float[Array, " p"]
    """The share of each parameter in the directions that the data do not determine."""
    unit: Float[Array, " p"]
    """The root of the information on each parameter that was met lately: in these units a damping lets none run away."""
    values: Float[Array, " p"]
    vectors: Float[Array, "p p"]

    def length(self, step: Float[Array, " p"]) -> Scalar:
        """The length of a step in standard deviations of one observation, of one that tells as much as any that was met."""
        return jnp.linalg.norm(self.unit * step)

    def fall(self, step: Float[Array, " p"]) -> Scalar:
        """By how much the quadratic model of the loss says that it goes down."""
        return -jnp.vdot(self.gradient, step) - 0.5 * jnp.vdot(step, matmul(self.matrix, step))

    def within(self, radius: Scalar) -> Float[Array, " p"]:
        """The lowest point of the quadratic model within a radius: ``-(F + lambda U^2)^-1 g``, or the step as it is."""
        along = matmul(self.vectors.T, self.gradient / self.unit)
        eps = jnp.finfo(radius.dtype).eps
        largest = jnp.linalg.norm(along) / radius

        def halve(_: int, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            low, high = ends
            middle = jnp.sqrt(low * high)
            outside = jnp.linalg.norm(along / (self.values + middle)) > radius
            return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

        _, damping = jax.lax.fori_loop(0, HALVINGS, halve, (eps * eps * largest, largest))
        damped = -matmul(self.vectors, along / (self.values + damping)) / self.unit
        return jnp.where(self.length(self.newton) <= radius, self.newton, damped)


def _equations(matrix: Float[Array, "p p"], gradient: Float[Array, " p"], recent: Float[Array, " p"]) -> _Equations:
    def scaled(diagonal: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        unit = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
        return unit, *jnp.linalg.eigh(matrix / unit[:, None] / unit[None, :])

    # The step as it is has its own units, so that no information that was once there takes digits from it.
    own, values, vectors = scaled(jnp.diagonal(matrix))
    seen = values > values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(values)
    along = jnp.where(seen, matmul(vectors.T, gradient / own) / jnp.where(seen, values, 1), 0)
    unit, damped, basis = scaled(recent)
    rank = jnp.sum(seen, dtype=jnp.int32)
    unseen = jnp.sum(jnp.where(seen[None, :], 0, vectors**2), axis=1)
    return _Equations(matrix, gradient, -matmul(vectors, along) / own, rank, unseen, unit, jnp.maximum(damped, 0), basis)


@once_for
def _scoring(problem: _Problem, params: Any, batch: Batch, tolerance: Scalar, steps: Static[int]) -> _State:
    """Scoring from ``params`` until the offset is below the tolerance, or nothing goes down any more."""
    spec, log_prob, inputs = batch.spec, log_likelihood(problem.model), batch.data[:-1]
    total = batch.total
    eps = float(jnp.finfo(spec.dtype).eps)
    size = spec.size

    def loss(flat: Float[Array, " p"]) -> Scalar:
        at = cast_like(spec.unravel(flat), params)
        penalty = problem.penalty(at, *inputs, weights=batch.weights)
        return mean_loss(log_prob, at, batch.data, batch.weights) + penalty.astype(spec.dtype) / total

    def tried(state: _State, equations: _Equations) -> tuple[Array, Scalar, Scalar, Bool[Array, ""]]:
        """The first step that goes down, of radii from the state's on, and the radius to go on with."""

        def trial(carry: Any) -> Any:
            count, radius, *_ = carry
            step = equations.within(radius)
            value = loss(state.flat + step)
            fall, length = equations.fall(step), equations.length(step)
            # Rounding of the loss must not stop a step that is too short for it to be seen.
            gain = (state.value - value + 8 * eps * jnp.abs(state.value)) / jnp.where(fall > 0, fall, 1)
            farther = jnp.where(gain >= WELL, jnp.maximum(2 * length, radius), radius)
            onwards = jnp.where(gain >= 0.25, farther, 0.25 * jnp.minimum(length, radius))
            return count + 1, onwards, state.flat + step, value, gain > ENOUGH

        start = jnp.zeros((), jnp.int32), state.radius, state.flat, state.value, jnp.zeros((), bool)
        _, radius, flat, value, good = while_loop(lambda carry: ~carry[4] & (carry[0] < TRIALS), trial, start)
        return jnp.where(good, flat, state.flat), jnp.where(good, value, state.value), radius, good

    def step(state: _State) -> _State:
        at = cast_like(spec.unravel(state.flat), params)
        matrix = fisher_at(problem.model, at, batch.data, batch.weights).as_matrix()
        gradient = jax.grad(loss)(state.flat)
        diagonal = jnp.diagonal(matrix)
        largest = jnp.maximum(state.largest, diagonal)
        recent = jnp.maximum(FORGET * state.recent, diagonal)
        equations = _equations(matrix, gradient, recent)
        # The first step goes no farther than so many lengths of where it starts.
        first = REACH * jnp.maximum(1, equations.length(state.flat))
        state = state._replace(radius=jnp.where(state.steps == 0, first, state.radius))
        decrement = jnp.sqrt(total * jnp.maximum(-jnp.vdot(gradient, equations.newton), 0))
        # How much the scores scatter for what the model says: a scale that is known up to a factor only does not matter.
        scatter = spec.ravel(scores(log_prob)(at, *batch.data, weights=batch.weights).diagonal(), "diagonal")
        told = diagonal > 0
        ratio = jnp.mean(scatter / jnp.where(told, diagonal, 1), where=told)
        offset = decrement / jnp.sqrt(jnp.where(ratio > 0, ratio, 1))
        # Long steps that change nothing any more, and information that was there and has gone.
        running = (jnp.sqrt(largest) * jnp.abs(equations.newton) > VISIBLE) & (decrement < tolerance)
        gone = (equations.unseen > VISIBLE) & (equations.rank < state.most) & (largest > 0)
        still = (offset <= FLOOR * tolerance) & (offset >= state.offset)
        done = (offset <= tolerance) | still | jnp.any(running) | ~jnp.isfinite(offset)
        flat, value, radius, moved = tried(state, equations)
        return _State(
            jnp.where(done, state.flat, flat),
            jnp.where(done, state.value, value),
            radius,
            state.steps + 1,
            gradient,
            largest,
            recent,
            offset,
            equations.rank,
            jnp.maximum(state.most, equations.rank),
            running | gone,
            moved & ~done,
        )

    flat = spec.ravel(params, "params")
    zero = jnp.zeros((), spec.dtype)
    begin = _State(
        flat,
        loss(flat),
        zero,
        jnp.zeros((), jnp.int32),
        jnp.zeros_like(flat),
        jnp.zeros_like(flat),
        jnp.zeros_like(flat),
        zero + jnp.inf,
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(size, bool),
        jnp.ones((), bool),
    )
    # What is reported is of the place where it ends: the last step looks and stays.
    ended: _State = while_loop(lambda state: state.moved & (state.steps <= steps.value), step, begin)
    return ended


@dataclasses.dataclass(frozen=True)
class Firth(Around):
    """The penalty of `firth`."""

    model: Model

    def __call__(self, params: chex.ArrayTree, *inputs: Any, weights: Float[Array, " n"] | None = None) -> Scalar:
        return -0.5 * exact_fisher(self.model)(params, *inputs, **given_with(inputs, {"weights": weights})).logdet(0.0)


def firth(model: Model) -> Firth:
    r"""Firth's penalty, Jeffreys' prior as a penalty of `jaxfisher.fit`: estimates that stay finite where data are separated.

    .. math:: -\tfrac12 \log\det F(\theta).

    It takes away the first-order bias of the maximum of the likelihood of an exponential family in its natural parameters.
    Its gradient goes through the log-determinant.

    **When it is the wrong tool.** F must have full rank. With other links than the canonical one it does not
    take the bias away. Predicted probabilities are drawn to one half.

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
