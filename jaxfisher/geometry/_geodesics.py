"""The Levi-Civita connection of the Fisher information, its geodesics, the flow of the natural gradient, Jeffreys' prior."""

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
from jaxfisher._model import MODEL, Model, log_likelihood, of_one_example
from jaxfisher._natural import natural_grad
from jaxfisher._once import Static, once_for
from jaxfisher._readings import Around
from jaxfisher._tree import cast_like, check_function
from jaxfisher._values import check_nonnegative, described, nonnegative, whole

STAGES, NEWTON = 8, 12
"""Into how many parts the way to the other end is cut, and how many of Newton's steps a part takes at most."""
COARSER, NEAR = 4, 0.1
"""A place on the way only has to be hit nearly: by so many times fewer steps, to such a share of the velocity."""

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
    """A function of this room: its metric is a mean over inputs, all of which it takes at once."""
    counts = "none: the metric is a mean over inputs. One over their terms is this, divided by the mean of the counts."
    batch_size = "none: all inputs are taken at once. Take fewer of them, with weights= where they stand for others."
    return refusing(function, counts=counts, batch_size=batch_size)


def christoffel(model: Model) -> Callable[..., Float[Array, "p p p"]]:
    r"""Christoffel's symbols of the Levi-Civita connection, where the metric is the exact Fisher.

    .. math:: \Gamma^k_{ij} = \tfrac12 \sum_l (F^{-1})_{kl}
        (\partial_i F_{lj} + \partial_j F_{li} - \partial_l F_{ij}).

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.

    Returns:
        A function ``(params, *inputs, weights=None)``: shape ``[p, p, p]``, first the upper index k, in the order of
        `jax.flatten_util.ravel_pytree`.

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
    return jnp.einsum("kl,lij->kij", jnp.linalg.inv(metric(flat)), lowered, precision="highest")


def _moved(metric: Callable[[Array], Array], start: Array, velocity: Array, steps: int) -> Array:
    """Where a geodesic is after a unit of time, by Runge and Kutta's fourth-order steps.

    In Hamilton's form, with the momentum ``m = F v``: ``theta' = F^-1 m`` and ``m' = 1/2 grad v^T F v`` at fixed v, which takes
    the metric and one derivative of it in reverse.
    """

    def rate(state: tuple[Array, Array]) -> tuple[Array, Array]:
        place, momentum = state
        matrix, pull_back = jax.vjp(metric, place)
        speed = jnp.linalg.solve(matrix, momentum)
        return speed, pull_back(0.5 * jnp.outer(speed, speed))[0]

    state = start, jnp.matmul(metric(start), velocity, precision="highest")
    (place, _), _ = jax.lax.scan(lambda state, _: (_runge_kutta(rate, state, 1 / steps), None), state, length=steps)
    return place


def _runge_kutta(rate: Callable[[Any], Any], state: Any, time: chex.Numeric) -> Any:
    """A step: each slope is that where the one before it leads to, and the step goes along a mean of the four."""

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
    r"""Where the geodesic that starts with a velocity is after a unit of time: the exponential map of the Fisher metric.

    .. math:: \ddot\theta^k + \sum_{ij} \Gamma^k_{ij}\, \dot\theta^i \dot\theta^j = 0.

    Of points along the geodesic, ask for shorter velocities: ``jax.vmap(lambda t: exp(params, t * v))(times)``.

    **When it is the wrong tool.** F must not be singular along the way. Its steps are of equal length: where the
    metric changes by orders of magnitude on the way, take more of them.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        steps: how many steps of Runge and Kutta's; the error falls as their fourth power.

    Returns:
        A function ``(params, velocity, *inputs, weights=None)``: parameters.

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
    count = _counted(steps)

    @_of_inputs("exponential_map")
    def moved(params: chex.ArrayTree, velocity: chex.ArrayTree, /, *inputs: Any, weights: Any = None) -> Any:
        batch = make_batch(params, inputs, weights)
        batch.spec.check(velocity, "velocity")
        with of_one_example(model, "model", params, batch.data):
            return _exponential(_Manifold(model), params, velocity, batch, Static(count))

    return moved


def _counted(steps: Any) -> int:
    count = whole(steps)
    if count is None or count < 1:
        raise ValueError(f"`steps` is {described(steps)}; expected a whole number of steps, at least 1.")
    return count


@once_for
def _exponential(manifold: _Manifold, params: Any, velocity: Any, batch: Batch, steps: Static[int]) -> Any:
    spec, metric = batch.spec, manifold.metric(params, batch)
    place = _moved(metric, spec.ravel(params, "params"), spec.ravel(velocity, "velocity"), steps.value)
    return cast_like(spec.unravel(place), params)


class Geodesic(NamedTuple):
    """A geodesic from one place to another.

    Attributes:
        velocity: with which it starts, a pytree like the parameters: the logarithmic map.
        distance: its length, ``sqrt(v^T F v)``.
        converged: whether it ends at the other place; where not, there is no such geodesic, or it was not found.
    """

    velocity: Any
    distance: Scalar
    converged: Bool[Array, ""]


def geodesic(model: Model, steps: int = 64) -> Callable[..., Geodesic]:
    r"""The geodesic from one place to another by shooting, and its length: the Fisher-Rao distance where none is shorter.

    .. math:: \mathrm{Exp}_\theta(v) = \theta', \qquad d = \sqrt{v^T F(\theta)\, v}.

    **When it is the wrong tool.** Where a closed form is known take `jaxfisher.geometry.distance`. Geodesics of a curved family
    may leave it, or there may be several; this one is found from the straight line, part by part. Each of some ten to twenty
    steps of Newton's costs p times a geodesic, most of them one of a quarter of the steps: it is for few parameters.

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
    count = _counted(steps)

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
        return jnp.sqrt(jnp.vdot(vector, jnp.matmul(matrix, vector, precision="highest")))

    def miss(velocity: Array, target: Array = end, count: int = steps.value) -> Array:
        return _moved(metric, start, velocity, count) - target

    def aim(velocity: Array, stage: Array) -> tuple[Array, None]:
        share = (stage + 1) / STAGES
        nearly = functools.partial(miss, target=start + share * (end - start), count=max(steps.value // COARSER, 1))
        # What hit the last target, made longer by as much as this one is farther.
        return _newton(nearly, velocity * share * STAGES / jnp.maximum(stage, 1), length, NEAR), None

    def search(miss: Field, velocity: Array) -> Array:
        velocity, _ = jax.lax.scan(aim, velocity, jnp.arange(STAGES, dtype=spec.dtype))
        return _newton(miss, velocity, length, root)

    # The search ends when it has arrived, which has no derivative in reverse: that of its result follows from the equation.
    velocity = jax.lax.custom_root(miss, (end - start) / STAGES, search, _solved)
    distance = length(velocity)
    arrived = length(miss(velocity)) <= root * distance + root**2
    return Geodesic(cast_like(spec.unravel(velocity), params), distance, arrived)


def _newton(function: Field, start: Array, length: Callable[[Array], Scalar], enough: chex.Numeric) -> Array:
    """Newton's steps to a root, up to the first that is no longer than a share of where it leads."""

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
    """What a linear function maps to a value."""
    return jnp.linalg.solve(jax.jacfwd(function)(value), value)


def natural_gradient_flow(model: Model, time: chex.Numeric, steps: int = 100) -> Callable[..., Any]:
    r"""The path of the natural gradient with steps of no length: ``d theta / dt = -F^-1 grad L``, from a start.

    It does not depend on the coordinates. In an exponential family the means go straight to those of the data,
    ``E_t = E_data + (E_0 - E_data) exp(-t)``.

    **When it is the wrong tool.** It is for looking at and for tests: to train, take `jaxfisher.natural_gradient`.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        time: how long it flows; in a unit of time, a distance to a minimum falls by about e.
        steps: how many steps of Runge and Kutta's.

    Returns:
        A function ``(params, *inputs, target, weights=None)``: parameters with a leading axis of ``steps + 1``, the start
        first.

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
    count = _counted(steps)

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

    It is the same prior in any coordinates, and the volume of the Fisher metric. F is a mean over inputs; more of them
    change it by a constant.

    **When it is the wrong tool.** It may have no integral. Where F is singular it is minus infinity.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.

    Returns:
        A function ``(params, *inputs, weights=None)``: a scalar.

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
