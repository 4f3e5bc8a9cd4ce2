"""The Levi-Civita connection of the Fisher information and its geodesics, natural-gradient flow, Jeffreys' prior."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._examples import Batch, Refusing, make_batch, refusing
from jaxfisher._fisher import exact_fisher
from jaxfisher._linalg import matmul
from jaxfisher._model import MODEL, Model, log_likelihood, of_one_example
from jaxfisher._natural import natural_grad
from jaxfisher._once import Static, once_for
from jaxfisher._readings import Around
from jaxfisher._tree import HIGHEST, cast_like, check_function
from jaxfisher._values import check_nonnegative, count_of, nonnegative

STAGES, NEWTON = 8, 12
"""The number of parts of the path to the other end, and the most Newton steps for each part."""
COARSER, NEAR = 4, 0.1
"""Intermediate points are hit only roughly: with this factor fewer integration steps, and up to this share of the velocity."""

Field = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class _Manifold(Around):
    """A model as a metric on its flat parameters."""

    model: Model

    def metric(self, params: Any, batch: Batch) -> Callable[[Float[Array, " p"]], Float[Array, "p p"]]:
        """``theta -> F(theta)``, the mean over the inputs of a batch."""

        def at(flat: Float[Array, " p"]) -> Float[Array, "p p"]:
            here = cast_like(batch.spec.unravel(flat), params)
            return exact_fisher(self.model)(here, *batch.data, weights=batch.uneven).as_matrix()

        return at


def _of_inputs(function: str) -> Refusing:
    """A decorator for functions whose metric is a mean over all inputs at once: ``counts`` and ``batch_size`` raise."""
    counts = "none: the metric is a mean over inputs. One over their terms is this, divided by the mean of the counts."
    batch_size = "none: all inputs are taken at once. Take fewer of them, with weights= where they stand for others."
    return refusing(function, counts=counts, batch_size=batch_size)


def christoffel(model: Model) -> Callable[..., Float[Array, "p p p"]]:
    r"""The Christoffel symbols of the Levi-Civita connection, with the exact Fisher as the metric.

    .. math:: \Gamma^k_{ij} = \tfrac12 \sum_l (F^{-1})_{kl}
        (\partial_i F_{lj} + \partial_j F_{li} - \partial_l F_{ij}).

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.

    Returns:
        A function ``(params, *inputs, weights=None)`` that returns an array of shape ``[p, p, p]``, with the upper index k
        first, in the order of `jax.flatten_util.ravel_pytree`.

    Raises:
        ValueError: (when called) arrays of different lengths.
        TypeError: (when called) a model that returns no distribution.

    Reference: Amari and Nagaoka, Methods of Information Geometry (2000), equation 1.67.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> symbols = geometry.christoffel(lambda p: jf.Normal(p[0], p[1]))(jnp.array([0.0, 2.0]))
    >>> print(abs(symbols[1]).round(3))  # of the scale: 1 / (2 s), -1 / s
    [[0.25 0.  ]
     [0.   0.5 ]]
    """
    check_function("model", model, MODEL)

    @_of_inputs("christoffel")
    def symbols(params: chex.ArrayTree, /, *inputs: Any, weights: Any = None) -> Float[Array, "p p p"]:
        batch = make_batch(params, inputs, weights)
        with of_one_example(model, "model", params, batch.data):
            found: Array = _symbols(_Manifold(model), params, batch)
        return found

    return symbols


@once_for
def _symbols(manifold: _Manifold, params: Any, batch: Batch) -> Array:
    metric, flat = manifold.metric(params, batch), batch.spec.ravel(params, "params")
    slopes = jax.jacfwd(metric)(flat)  # [l, j, i]
    lowered = 0.5 * (slopes + jnp.swapaxes(slopes, 1, 2) - jnp.moveaxis(slopes, 2, 0))
    return jnp.einsum("kl,lij->kij", jnp.linalg.inv(metric(flat)), lowered, precision=HIGHEST)


def _moved(metric: Callable[[Array], Array], start: Array, velocity: Array, steps: int) -> Array:
    """The point on a geodesic after a unit of time, by fourth-order Runge-Kutta steps.

    It integrates Hamilton's equations with the momentum ``m = F v``: ``theta' = F^-1 m`` and ``m' = 1/2 grad v^T F v`` at fixed
    v. They take the metric and one reverse-mode derivative of it.
    """

    def rate(state: tuple[Array, Array]) -> tuple[Array, Array]:
        place, momentum = state
        matrix, pull_back = jax.vjp(metric, place)
        speed = jnp.linalg.solve(matrix, momentum)
        return speed, pull_back(0.5 * jnp.outer(speed, speed))[0]

    state = start, matmul(metric(start), velocity)
    (place, _), _ = jax.lax.scan(lambda state, _: (_runge_kutta(rate, state, 1 / steps), None), state, length=steps)
    return place


def _runge_kutta(rate: Callable[[Any], Any], state: Any, time: chex.Numeric) -> Any:
    """One step: each slope is taken at the point that the one before leads to, and the step follows a mean of the four."""

    def after(slope: Any, share: chex.Numeric) -> Any:
        return jax.tree.map(lambda x, dx: x + share * time * dx, state, slope)

    def stage(carry: tuple[Any, Any], shares: Float[Array, "2"]) -> tuple[tuple[Any, Any], None]:
        slope, mean = carry
        slope = rate(after(slope, shares[0]))
        return (slope, jax.tree.map(lambda total, dx: total + shares[1] * dx, mean, slope)), None

    nothing = jax.tree.map(jnp.zeros_like, state)
    dtype = jnp.result_type(*jax.tree.leaves(state))
    shares = jnp.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]], dtype)
    (_, mean), _ = jax.lax.scan(stage, (nothing, nothing), shares)
    return after(mean, 1.0)


def exponential_map(model: Model, steps: int = 64) -> Callable[..., Any]:
    r"""The exponential map of the Fisher metric: the end, after a unit of time, of the geodesic with a start velocity.

    .. math:: \ddot\theta^k + \sum_{ij} \Gamma^k_{ij}\, \dot\theta^i \dot\theta^j = 0.

    For points along the geodesic use shorter velocities: ``jax.vmap(lambda t: exp(params, t * v))(times)``.

    **When it is the wrong tool.** F must not be singular along the path. The steps take equal times: if the metric changes by
    orders of magnitude along the path, take more of them.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        steps: the number of Runge-Kutta steps; the error falls with its fourth power.

    Returns:
        A function ``(params, velocity, *inputs, weights=None)`` that returns parameters.

    Raises:
        ValueError: a number of steps below one; (when called) a velocity of another structure.
        TypeError: (when called) a model that returns no distribution.

    Reference: Amari and Nagaoka, Methods of Information Geometry (2000), section 1.7; do Carmo, Riemannian Geometry (1992),
    section 3.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> exp = geometry.exponential_map(lambda log_rate: jf.Poisson(log_rate))  # 2 sqrt(rate) goes straight on
    >>> print(round(float(jnp.exp(exp(0.0, 2.0))), 3))
    4.0
    """
    check_function("model", model, MODEL)
    count = count_of("`steps`", steps, "a whole number of steps,")

    @_of_inputs("exponential_map")
    def moved(params: chex.ArrayTree, velocity: chex.ArrayTree, /, *inputs: Any, weights: Any = None) -> Any:
        batch = make_batch(params, inputs, weights)
        batch.spec.check(velocity, "velocity")
        with of_one_example(model, "model", params, batch.data):
            return _exponential(_Manifold(model), params, velocity, batch, Static(count))

    return moved


@once_for
def _exponential(manifold: _Manifold, params: Any, velocity: Any, batch: Batch, steps: Static[int]) -> Any:
    spec, metric = batch.spec, manifold.metric(params, batch)
    place = _moved(metric, spec.ravel(params, "params"), spec.ravel(velocity, "velocity"), steps.value)
    return cast_like(spec.unravel(place), params)


class Geodesic(NamedTuple):
    """A geodesic from one point to another.

    Attributes:
        velocity: its start velocity, a pytree like the parameters: the logarithmic map.
        distance: its length, ``sqrt(v^T F v)``.
        converged: whether it ends at the other point; if not, there is no such geodesic, or it was not found.
    """

    velocity: Any
    distance: Scalar
    converged: Bool[Array, ""]


def geodesic(model: Model, steps: int = 64) -> Callable[..., Geodesic]:
    r"""The geodesic from one point to another by shooting, with its length: the Fisher-Rao distance if none is shorter.

    .. math:: \mathrm{Exp}_\theta(v) = \theta', \qquad d = \sqrt{v^T F(\theta)\, v}.

    **When it is the wrong tool.** If a closed form is known, use `jaxfisher.geometry.distance`. Geodesics of a curved family
    may leave it, or there may be several; this one is found part by part, starting from the straight line. It takes some ten to
    twenty Newton steps. Each costs p geodesics, most of them with a quarter of the integration steps, so it is for few
    parameters.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        steps: as in `jaxfisher.geometry.exponential_map`.

    Returns:
        A function ``(params, other, *inputs, weights=None)`` that returns a `jaxfisher.geometry.Geodesic`.

    Raises:
        ValueError: a number of steps below one; (when called) parameters of different structure.
        TypeError: (when called) a model that returns no distribution.

    Reference: do Carmo, Riemannian Geometry (1992), section 3.3; Atkinson and Mitchell (1981), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> found = geometry.geodesic(lambda rate: jf.Poisson(jnp.log(rate)))(1.0, 4.0)
    >>> print(round(float(found.distance), 4), found.converged)  # 2 (sqrt 4 - sqrt 1)
    2.0 True
    """
    check_function("model", model, MODEL)
    count = count_of("`steps`", steps, "a whole number of steps,")

    @_of_inputs("geodesic")
    def between(params: chex.ArrayTree, other: chex.ArrayTree, /, *inputs: Any, weights: Any = None) -> Geodesic:
        batch = make_batch(params, inputs, weights)
        batch.spec.check(other, "other")
        with of_one_example(model, "model", params, batch.data):
            found: Geodesic = _shot(_Manifold(model), params, other, batch, Static(count))
        return found

    return between


@once_for
def _shot(manifold: _Manifold, params: Any, other: Any, batch: Batch, steps: Static[int]) -> Geodesic:
    spec, metric = batch.spec, manifold.metric(params, batch)
    start, end = spec.ravel(params, "params"), spec.ravel(other, "other")
    matrix, root = metric(start), jnp.finfo(spec.dtype).eps ** 0.5

    def length(vector: Array) -> Scalar:
        return jnp.sqrt(jnp.vdot(vector, matmul(matrix, vector)))

    def miss(velocity: Array, target: Array = end, count: int = steps.value) -> Array:
        return _moved(metric, start, velocity, count) - target

    def aim(velocity: Array, stage: Array) -> tuple[Array, None]:
        share = (stage + 1) / STAGES
        nearly = functools.partial(miss, target=start + share * (end - start), count=max(steps.value // COARSER, 1))
        # Start from the velocity that hit the last target, scaled by the ratio of the distances.
        return _newton(nearly, velocity * share * STAGES / jnp.maximum(stage, 1), length, NEAR), None

    def search(miss: Field, velocity: Array) -> Array:
        velocity, _ = jax.lax.scan(aim, velocity, jnp.arange(STAGES, dtype=spec.dtype))
        return _newton(miss, velocity, length, root)

    # The search is a while loop, which has no reverse-mode derivative: `custom_root` gets that of the result from the equation.
    velocity = jax.lax.custom_root(miss, (end - start) / STAGES, search, _solved)
    distance = length(velocity)
    arrived = length(miss(velocity)) <= root * distance + root**2
    return Geodesic(cast_like(spec.unravel(velocity), params), distance, arrived)


def _newton(function: Field, start: Array, length: Callable[[Array], Scalar], enough: chex.Numeric) -> Array:
    """A root by Newton's method, up to the first step that is no longer than a share of the point it leads to."""

    def short(state: tuple[Array, Array, Array]) -> Array:
        place, step, count = state
        return (count < NEWTON) & (length(step) > enough * length(place))

    def correct(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        place, _, count = state
        along = jax.vmap(lambda axis: jax.jvp(function, (place,), (axis,)), out_axes=(None, 1))
        value, slopes = along(jnp.eye(len(place), dtype=place.dtype))
        step = jnp.linalg.solve(slopes, value)
        return place - step, step, count + 1

    place, _, _ = jax.lax.while_loop(short, correct, correct((start, start, jnp.zeros((), int))))
    return place


def _solved(function: Field, value: Array) -> Array:
    """The argument that a linear function maps to ``value``."""
    return jnp.linalg.solve(jax.jacfwd(function)(value), value)


def natural_gradient_flow(model: Model, time: chex.Numeric, steps: int = 100) -> Callable[..., Any]:
    r"""The flow of the natural gradient, its limit of small steps: ``d theta / dt = -F^-1 grad L``, from a start.

    It does not depend on the coordinates. In an exponential family the means go straight to those of the data,
    ``E_t = E_data + (E_0 - E_data) exp(-t)``.

    **When it is the wrong tool.** It is for pictures and tests: to train, use `jaxfisher.natural_gradient`.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        time: the duration of the flow; in a unit of time the distance to a minimum falls by a factor of about e.
        steps: the number of Runge-Kutta steps.

    Returns:
        A function ``(params, *inputs, target, weights=None)`` that returns parameters with a leading axis of ``steps + 1``, the
        start first.

    Raises:
        ValueError: a number of steps below one, a negative time.
        TypeError: (when called) a model that returns no distribution.

    Reference: Amari, Information Geometry and Its Applications (2016), section 12.1.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> flow = geometry.natural_gradient_flow(lambda log_rate: jf.Poisson(log_rate), time=jnp.log(2.0), steps=10)
    >>> print(jnp.exp(flow(0.0, jnp.array([2.0, 4.0]))[-1]).round(4))  # half of the way from 1 to 3
    2.0
    """
    check_function("model", model, MODEL)
    check_nonnegative("time", time)
    count = count_of("`steps`", steps, "a whole number of steps,")

    @_of_inputs("natural_gradient_flow")
    def path(params: chex.ArrayTree, /, *data: Any, weights: Any = None) -> Any:
        spec = make_batch(params, data, weights).spec
        return _flowed(_Manifold(model), params, data, weights, nonnegative("time", time, spec.dtype), Static(count))

    return path


@once_for
def _flowed(manifold: _Manifold, params: Any, data: Any, weights: Any, time: Scalar, steps: Static[int]) -> Any:
    descent = natural_grad(log_likelihood(manifold.model), exact_fisher(manifold.model), damping=0.0)
    spec = make_batch(params, data, weights).spec
    given = {"weights": weights} if weights is not None else {}

    def rate(flat: Array) -> Array:
        return -spec.ravel(descent(cast_like(spec.unravel(flat), params), *data, **given), "gradient")

    def step(flat: Array, _: None) -> tuple[Array, Array]:
        moved = _runge_kutta(rate, flat, time / steps.value)
        return moved, moved

    start = spec.ravel(params, "params")
    _, later = jax.lax.scan(step, start, length=steps.value)
    every = jnp.concatenate([start[None], later])
    return jax.vmap(lambda flat: cast_like(spec.unravel(flat), params))(every)


def log_jeffreys(model: Model) -> Callable[..., Scalar]:
    r"""The logarithm of Jeffreys' prior density, not normalised: ``1/2 log det F``.

    It is the same prior in any coordinates: the volume element of the Fisher metric. F is a mean over inputs; the information
    of n inputs instead would change the logarithm only by a constant.

    **When it is the wrong tool.** The prior may not be integrable. If F is singular it is minus infinity.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.

    Returns:
        A function ``(params, *inputs, weights=None)`` that returns a scalar.

    Raises:
        ValueError: (when called) arrays of different lengths.
        TypeError: (when called) a model that returns no distribution.

    Reference: Jeffreys, An invariant form for the prior probability in estimation problems (1946).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import geometry
    >>> print(geometry.log_jeffreys(lambda p: jf.Bernoulli(jnp.log(p / (1 - p))))(0.5).round(4))  # -1/2 log p (1 - p)
    0.6931
    """
    check_function("model", model, MODEL)

    @_of_inputs("log_jeffreys")
    def density(params: chex.ArrayTree, /, *inputs: Any, weights: Any = None) -> Scalar:
        return 0.5 * exact_fisher(model)(params, *inputs, weights=weights).logdet(0.0)

    return density
