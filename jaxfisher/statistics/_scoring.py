"""Fisher scoring within a trust radius, which adapts to how good the quadratic model was, until no step goes down any more.

A step that had to be shortened is bent as predictions bend along it. In a long curved valley, steps along the tangent leave the
valley after a short way; bent steps can be longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._acceleration import acceleration
from jaxfisher._examples import Batch
from jaxfisher._linalg import matmul
from jaxfisher._model import Model, batch_loss, log_likelihood
from jaxfisher._readings import Around
from jaxfisher._scores import scores
from jaxfisher._targets import given_with
from jaxfisher._tree import cast_like
from jaxfisher._varying import cond, while_loop
from jaxfisher.statistics._observations import fisher_at

VISIBLE = 1e-3
"""The length above which a step is not small, in standard deviations of one observation at the largest information so far."""
SLOW = 0.25
"""The share of the last step above which a step counts as not shrinking; near a maximum each is far shorter than the last."""
BLUR = 8
"""The number of roundings of the parameters that count as rounding error."""
EXACT = 1e-2
"""The most that scores can be, in standard deviations of one observation, if they are to count as rounding errors."""
FORGET = 0.9
"""The share of earlier information that is left at the next step."""
HALVINGS = 60
"""The number of times that the bracket of a damping is halved, in its logarithm."""
TRIALS = 40
"""The most damped steps that are tried from one point."""
REACH = 10.0
"""The longest first step, in the units of `_Equations.length`, or in lengths of the start parameters."""
PULL = 100
"""The number of roundings above which a slope counts, along directions in which the information is zero to rounding."""
FLOOR = 32
"""The number of tolerances within which an offset is accepted if rounding keeps it from falling further."""
BENT = 0.75
"""The longest bend of a step, in lengths of the step: with a longer bend the step is too long for a parabola."""
ENOUGH, WELL = 1e-4, 0.75
"""The share of the predicted decrease that a step must reach to be taken, and to be followed by a longer one."""


Penalty = Callable[..., Scalar]
"""``penalty(params, *inputs, weights) -> nats``, added to the negative log-likelihood of all observations."""


def nothing(params: Any, *inputs: Any, weights: Any) -> Scalar:
    return jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class Problem(Around):
    model: Model
    penalty: Penalty


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The problem of a fit, as functions of flat parameters."""

    problem: Problem
    params: Any
    batch: Batch

    def at(self, flat: Float[Array, " p"]) -> Any:
        return cast_like(self.batch.spec.unravel(flat), self.params)

    def loss(self, flat: Float[Array, " p"]) -> Scalar:
        """The mean negative log-likelihood plus the penalty."""
        batch, at = self.batch, self.at(flat)
        penalty = self.problem.penalty(at, *batch.data[:-1], weights=batch.weights)
        loss = batch_loss(log_likelihood(self.problem.model), at, batch)
        return loss + penalty.astype(batch.spec.dtype) / batch.total

    def information(self, flat: Float[Array, " p"]) -> Float[Array, "p p"]:
        batch = self.batch
        return fisher_at(self.problem.model, self.at(flat), batch.data, batch.uneven, batch.batch_size).as_matrix()

    def bending(self, flat: Float[Array, " p"], step: Float[Array, " p"]) -> Float[Array, " p"]:
        """The second derivative of the predictions along a step, pulled back to a gradient; see `jaxfisher.acceleration`."""
        spec, at = self.batch.spec, self.at(flat)
        *inputs, _ = self.batch.data
        given = given_with(tuple(inputs), {"weights": self.batch.uneven})
        bends = acceleration(self.problem.model, batch_size=self.batch.batch_size)
        return spec.ravel(bends(at, spec.unravel(step), *inputs, **given), "acceleration")

    def scatter(self, flat: Float[Array, " p"], told: Float[Array, " p"]) -> Scalar:
        """The mean ratio of squared scores to the information. With it, convergence does not depend on the model's scale."""
        batch = self.batch
        scores_of = scores(log_likelihood(self.problem.model), batch_size=batch.batch_size)
        found = scores_of(self.at(flat), *batch.data, weights=batch.uneven).diagonal()
        ratio = jnp.mean(batch.spec.ravel(found, "diagonal") / jnp.where(told > 0, told, 1), where=told > 0)
        return jnp.where(ratio > 0, ratio, 1)


class State(NamedTuple):
    """The state of a fit."""

    flat: Float[Array, " p"]
    value: Scalar
    radius: Scalar
    steps: Int[Array, ""]
    gradient: Float[Array, " p"]
    largest: Float[Array, " p"]
    """The largest information on each parameter so far."""
    recent: Float[Array, " p"]
    """The same with slow forgetting."""
    offset: Scalar
    rank: Int[Array, ""]
    most: Int[Array, ""]
    """The largest rank so far."""
    strides: Float[Array, " p"]
    """The length of the last step, in standard deviations of one observation at the largest information so far."""
    separated: Bool[Array, " p"]
    pulled: Bool[Array, ""]
    """Whether the loss falls along directions in which the information is zero to rounding."""
    moved: Bool[Array, ""]
    """Whether the last step was taken."""


class _Equations(NamedTuple):
    """The equations of one step, ``F d = -g``, and their eigenvectors in the units of `length`."""

    matrix: Float[Array, "p p"]
    gradient: Float[Array, " p"]
    newton: Float[Array, " p"]
    """The undamped step along the directions that the data determine."""
    rank: Int[Array, ""]
    unseen: Float[Array, " p"]
    """The share of each parameter in the directions that the data do not determine."""
    hidden: Scalar
    """The slope along these directions, in the units of the information."""
    unit: Float[Array, " p"]
    """The root of the recent information on each parameter; in these units a damping keeps all of them from running away."""
    values: Float[Array, " p"]
    vectors: Float[Array, "p p"]

    def length(self, step: Float[Array, " p"]) -> Scalar:
        """The length of a step, in standard deviations of one observation at the recent information."""
        return jnp.linalg.norm(self.unit * step)

    def fall(self, step: Float[Array, " p"]) -> Scalar:
        """The decrease of the loss that the quadratic model predicts for a step."""
        return -jnp.vdot(self.gradient, step) - 0.5 * jnp.vdot(step, matmul(self.matrix, step))

    def damped(self, gradient: Float[Array, " p"], damping: Scalar) -> Float[Array, " p"]:
        """``-(F + lambda U^2)^-1 g``."""
        along = matmul(self.vectors.T, gradient / self.unit)
        return -matmul(self.vectors, along / (self.values + damping)) / self.unit

    def within(self, radius: Scalar, pulled: Bool[Array, ""]) -> tuple[Float[Array, " p"], Scalar]:
        """The minimum of the quadratic model within a radius, and its damping: the undamped step with zero, or a `damped` one.

        If the loss falls along directions that the undamped step leaves out (``pulled``), the step is always damped.
        """
        along = matmul(self.vectors.T, self.gradient / self.unit)
        eps = jnp.finfo(radius.dtype).eps
        largest = jnp.linalg.norm(along) / radius

        def halve(_: int, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            low, high = ends
            middle = jnp.sqrt(low * high)
            outside = jnp.linalg.norm(along / (self.values + middle)) > radius
            return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

        def shortened() -> tuple[Float[Array, " p"], Scalar]:
            _, damping = jax.lax.fori_loop(0, HALVINGS, halve, (eps * eps * largest, largest))
            return self.damped(self.gradient, damping), damping

        whole = (self.length(self.newton) <= radius) & ~pulled
        return cond(whole, lambda: (self.newton, jnp.zeros_like(largest)), shortened)


def _equations(matrix: Float[Array, "p p"], gradient: Float[Array, " p"], recent: Float[Array, " p"]) -> _Equations:
    def scaled(diagonal: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        unit = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
        return unit, *jnp.linalg.eigh(matrix / unit[:, None] / unit[None, :])

    # The undamped step uses the units of the present information, so that larger past information costs it no digits.
    own, values, vectors = scaled(jnp.diagonal(matrix))
    seen = values > values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(values)
    slopes = matmul(vectors.T, gradient / own)
    along = jnp.where(seen, slopes / jnp.where(seen, values, 1), 0)
    unit, damped, basis = scaled(recent)
    return _Equations(
        matrix,
        gradient,
        newton=-matmul(vectors, along) / own,
        rank=jnp.sum(seen, dtype=jnp.int32),
        unseen=jnp.sum(jnp.where(seen[None, :], 0, vectors**2), axis=1),
        hidden=jnp.linalg.norm(jnp.where(seen, 0, slopes)),
        unit=unit,
        values=jnp.maximum(damped, 0),
        vectors=basis,
    )


def scoring(likelihood: Likelihood, tolerance: Scalar, steps: int) -> State:
    """Scoring from a start until the offset is below the tolerance, or nothing goes down any more."""
    spec = likelihood.batch.spec
    flat = spec.ravel(likelihood.params, "params")
    zero, none, no = jnp.zeros((), spec.dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    begin = State(
        flat,
        value=likelihood.loss(flat),
        radius=zero,
        steps=none,
        gradient=jnp.zeros_like(flat),
        largest=jnp.zeros_like(flat),
        recent=jnp.zeros_like(flat),
        offset=zero + jnp.inf,
        rank=none,
        most=none,
        strides=jnp.full_like(flat, jnp.inf),
        separated=jnp.zeros(spec.size, bool),
        pulled=no,
        moved=~no,
    )

    def step(state: State) -> State:
        looked, equations, done = _looked(likelihood, state, tolerance)
        flat, value, radius, good = _tried(likelihood, looked, equations)
        moved = good & ~done
        return looked._replace(
            flat=jnp.where(moved, flat, state.flat), value=jnp.where(moved, value, state.value), radius=radius, moved=moved
        )

    # The report is of the final point: the last pass measures there and does not move.
    ended: State = while_loop(lambda state: state.moved & (state.steps <= steps), step, begin)
    return ended


def _looked(likelihood: Likelihood, state: State, tolerance: Scalar) -> tuple[State, _Equations, Bool[Array, ""]]:
    """The state with the measurements at its point, the equations there, and whether to stay."""
    matrix, gradient = likelihood.information(state.flat), jax.grad(likelihood.loss)(state.flat)
    told = jnp.diagonal(matrix)
    largest, recent = jnp.maximum(state.largest, told), jnp.maximum(FORGET * state.recent, told)
    equations = _equations(matrix, gradient, recent)
    decrement = jnp.sqrt(likelihood.batch.total * jnp.maximum(-jnp.vdot(gradient, equations.newton), 0))
    scatter = likelihood.scatter(state.flat, told)
    # The change of predictions by rounding of the parameters. Scores that small are rounding errors: the fit is exact.
    blur = BLUR * float(jnp.finfo(gradient.dtype).eps) * jnp.linalg.norm(jnp.sqrt(told) * state.flat)
    # Scores that are a part of a standard deviation are none, as of a scale that falls to zero at constant data.
    met = scatter <= jnp.minimum(blur, EXACT) ** 2
    offset = decrement / jnp.where(met, blur / tolerance, jnp.sqrt(scatter))
    # Separated parameters: long steps that no longer change the loss and do not shrink, or information that has vanished.
    strides = jnp.sqrt(largest) * jnp.abs(equations.newton)
    running = (strides > jnp.maximum(VISIBLE, SLOW * state.strides)) & (decrement < tolerance)
    gone = (equations.unseen > VISIBLE) & (equations.rank < state.most) & (largest > 0)
    small = offset <= FLOOR * tolerance
    # A square of scores keeps half of their digits; a slope keeps all of them.
    digits = PULL * float(jnp.finfo(gradient.dtype).eps) * jnp.sqrt(scatter)
    rounding = told.size * jnp.maximum(digits, jnp.where(met, blur, 0))
    pulled = small & (equations.hidden > rounding)
    arrived = (offset <= tolerance) | (small & (offset >= state.offset))
    # Limit the first step to REACH lengths of the start parameters, where a length below one counts as one.
    first = REACH * jnp.maximum(1, equations.length(state.flat))
    looked = state._replace(
        radius=jnp.where(state.steps == 0, first, state.radius),
        steps=state.steps + 1,
        gradient=gradient,
        largest=largest,
        recent=recent,
        offset=offset,
        rank=equations.rank,
        most=jnp.maximum(state.most, equations.rank),
        strides=strides,
        separated=running | gone,
        pulled=pulled,
    )
    return looked, equations, (arrived & ~pulled) | jnp.any(running) | ~jnp.isfinite(offset)


def _tried(likelihood: Likelihood, state: State, equations: _Equations) -> tuple[Array, Scalar, Scalar, Bool[Array, ""]]:
    """The first step that goes down enough, trying radii from the state's on downwards, and the next radius."""
    eps = float(jnp.finfo(state.flat.dtype).eps)

    def trial(carry: Any) -> Any:
        count, radius, *_ = carry
        step, damping = equations.within(radius, state.pulled)
        flat = state.flat + step + _bend(likelihood, state, equations, step, damping)
        value = likelihood.loss(flat)
        fall, length = equations.fall(step), equations.length(step)
        # The rounding error of the loss must not stop a step too short to change the loss visibly.
        gain = (state.value - value + 8 * eps * jnp.abs(state.value)) / jnp.where(fall > 0, fall, 1)
        farther = jnp.where(gain >= WELL, jnp.maximum(2 * length, radius), radius)
        onwards = jnp.where(gain >= 0.25, farther, 0.25 * jnp.minimum(length, radius))
        return count + 1, onwards, flat, value, gain > ENOUGH

    start = jnp.zeros((), jnp.int32), state.radius, state.flat, state.value, jnp.zeros((), bool)
    _, radius, flat, value, good = while_loop(lambda carry: ~carry[4] & (carry[0] < TRIALS), trial, start)
    return flat, value, radius, good


def _bend(
    likelihood: Likelihood, state: State, equations: _Equations, step: Float[Array, " p"], damping: Scalar
) -> Float[Array, " p"]:
    """The bend of a shortened step: half of the acceleration of the geodesic that starts with it, if that is short."""

    def bent() -> Float[Array, " p"]:
        acceleration = equations.damped(likelihood.bending(state.flat, step), damping)
        short = 2 * equations.length(acceleration) <= BENT * equations.length(step)
        return jnp.where(short, 0.5 * acceleration, 0)

    return cond(damping > 0, bent, lambda: jnp.zeros_like(step))
