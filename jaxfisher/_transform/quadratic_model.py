"""Learning rate and momentum from the quadratic model of the loss along the new direction and the last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._once import either, once
from jaxfisher._operators.operator import Operator, inner_products
from jaxfisher._transform.places import transformation
from jaxfisher._transform.update_arguments import (
    ScalarOrSchedule,
    check_state,
    check_vector_of_state,
    damping_for,
    fisher_for,
    part_of,
)
from jaxfisher._tree import between, cast_like, dot, param_spec, scaled, split
from jaxfisher._values import check_nonnegative, nonnegative


class QuadraticModelState(NamedTuple):
    """State of `quadratic_model`.

    Attributes:
        count: updates made so far, int32.
        step: the last step, in the statistics dtype.
        learning_rate: alpha of the last step.
        momentum: mu of the last step.
        change: the change of the loss that the undamped model predicted when the model was last minimised, in nats.
        length: the length of the step that was taken then, in the parameters' own units.
        gain: half the derivative of the log of the decrease that the model promises along ``d`` alone, by the log of the
            damping of ``d``. Zero if the update is not told how ``d`` changes with its damping (`kfac` tells it), and where no
            model is due.
    """

    count: Array  # type: ignore[assignment]
    step: Any
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    change: Float[Array, ""]
    length: Float[Array, ""]
    gain: Float[Array, ""]


def quadratic_model(damping: ScalarOrSchedule | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Take the step ``-alpha d + mu v`` that minimises the damped quadratic model, with ``v`` the last step.

    .. math:: \min_{\alpha, \mu}\; g^T s + \tfrac12 s^T (F + \lambda I) s, \qquad s = -\alpha d + \mu v.

    ``d`` are the incoming updates, the direction of a `scale_by_fisher` whose view may be an approximation. F is the Fisher as
    it is given, so the length of the step is right with any view. The model needs three numbers of F, ``d^T F d``, ``d^T F v``
    and ``v^T F v``; with a Fisher ``J^T M J`` they cost half a product for each of ``d`` and ``v``, without the transpose. This
    transformation takes the place of a learning rate, and its updates are negated::

        opt = optax.chain(jf.scale_by_fisher(1e-3, view=jf.kronecker), jf.quadratic_model(1e-3))
        updates, state = opt.update(grads, state, params, fisher=F, grad=grads)

    On mini-batches a small fixed damping trusts the model of one batch too far, and the loss may grow: put `adapt_damping`
    around the chain. Inside `optax.MultiSteps` the incoming updates are a mean over mini-steps, and ``grad`` must be that mean;
    `adapt_damping` around the chain sees to it. An update may be given a flag ``due=``. Where it is false the model is not
    minimised: the step takes the last rates, with the momentum clipped to ``[0, 1]``, and is no longer than the last step that
    was the minimum of a model.

    Args:
        damping: lambda ``>= 0``, as in `scale_by_fisher`. A ``damping=`` given to an update takes precedence; None if every
            update is given one, as inside `adapt_damping`.

    Returns:
        A gradient transformation whose ``update`` takes by keyword ``fisher`` and ``grad``, the gradient before it was
        preconditioned, also that by all parameters where the updates are of a part.

    Raises:
        ValueError: a negative damping; (at update) ``fisher`` or ``grad`` is missing.

    Reference: Martens and Grosse (ICML 2015), section 7.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(0.0)  # 1/4
    >>> opt = jf.quadratic_model(damping=0.0)
    >>> updates, state = opt.update(1.0, opt.init(0.0), fisher=F, grad=1.0)
    >>> print(updates, state.learning_rate)  # the minimum of s + s^2 / 8
    -4.0 4.0
    """
    usual = damping
    if usual is not None and not callable(usual):
        check_nonnegative("damping", usual)

    def init(params: chex.ArrayTree) -> QuadraticModelState:
        dtype = param_spec(params).dtype
        step = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), split(params))
        return QuadraticModelState(jnp.zeros((), jnp.int32), step, *(jnp.zeros((), dtype) for _ in range(5)))

    def update(
        updates: Any,
        state: QuadraticModelState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        grad: Any = None,
        damping: chex.Numeric | None = None,
        due: bool | Bool[Array, ""] = True,
        by_damping: Callable[[Any], tuple[Any, Scalar]] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, QuadraticModelState]:
        del params, extra_args
        if not jax.tree.leaves(updates):
            return updates, state
        if grad is None:
            raise ValueError("quadratic_model: `update` needs `grad`, the gradient itself. Pass it by keyword to opt.update.")
        check_state(state, QuadraticModelState, "quadratic_model")
        check_vector_of_state(state.step, split(updates), "quadratic_model")
        operator = fisher_for(updates, fisher, "quadratic_model")
        strength = nonnegative("damping", damping_for(damping, usual, state.count, "quadratic_model"), operator.spec.dtype)
        g, d = operator.spec.tree(operator.spec.leaves(part_of(grad, updates), "grad")), operator.spec.vector(updates)

        def minimised() -> tuple[Scalar, ...]:
            if by_damping is None:
                return _minimum(operator, g, [d, state.step], strength)
            change, factor = by_damping(d)
            *found, gain = _minimum(operator, g, [d, state.step, change], strength)
            return *found, factor * gain

        last = state.learning_rate, state.momentum, state.change, jnp.zeros_like(state.gain)
        alpha, mu, change, gain = either(due, minimised, lambda: last)
        # A step whose model is not due is no longer than the last step whose model was due.
        weight = mu if due is True else jnp.where(due, mu, jnp.clip(mu, 0, 1))
        step, length = _combined(d, state.step, alpha, weight, state.length, jnp.asarray(due))
        length = length if due is True else jnp.where(due, length, state.length)
        count = optax.safe_increment(state.count)
        return cast_like(step, updates), QuadraticModelState(count, step, alpha, mu, change, length, gain)

    return transformation(init, update)


@once
def _combined(d: Any, v: Any, alpha: Scalar, mu: Scalar, most: Scalar, free: Bool[Array, ""]) -> tuple[Any, Scalar]:
    """The step ``mu v - alpha d``, shortened to ``most`` unless it is ``free``, and its length before that."""
    # Compute in units of the last length, so that squares neither overflow nor vanish. Square the step itself: d and v may
    # cancel, and from their squares the length would be accurate only to the root of eps times their lengths.
    unit = jnp.where((most > 0) & (most < jnp.inf), most, 1)
    step = jax.tree.map(lambda d, v: mu / unit * v - alpha / unit * d, d, v)
    length = jnp.sqrt(dot(step, step))
    share = jnp.where(~free & (length > most / unit), most / unit / length, 1)
    return scaled(step, share * unit), length * unit


def _minimum(operator: Operator, g: Any, along: list[Any], damping: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The minimum of the damped model along the directions: ``(alpha, mu, change, gain)``.

    The step is ``-alpha`` times the first direction plus ``mu`` times the second. ``change`` is what the undamped model changes
    by there. ``gain`` is half the derivative of the log of the decrease that the first direction alone promises, as that
    direction moves along the third; zero without a third.
    """
    curvature = inner_products(operator, jax.tree.map(lambda *v: jnp.stack(v), *along))
    found: tuple[Scalar, Scalar, Scalar, Scalar] = _lowest(curvature, g, along, damping)
    return found


@once
def _lowest(curvature: Float[Array, "k k"], g: Any, along: list[Any], damping: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """`_minimum`, from the matrix of curvatures along and between the directions.

    Only the part of the second direction that is not parallel to the first counts, and that part may be zero.
    """
    product, count = between(*along, g), len(along)
    slopes = [product(count, k) for k in range(count)]
    # Without damping the products do not count, and may be infinite: zero times infinity would be NaN.
    damp = lambda product: jnp.where(damping == 0, 0, damping * product)  # noqa: E731
    damped = [curvature[0, k] + damp(product(0, k)) for k in range(count)]
    last = curvature[1, 1] + damp(product(1, 1))
    share = _over(damped[1], damped[0])
    own = last - share * damped[1]
    # For parallel directions the rest is rounding error.
    own = jnp.where(own <= 100 * jnp.finfo(own.dtype).eps * last, 0, own)
    second = -_over(slopes[1] - share * slopes[0], own)
    first = _over(slopes[0], damped[0]) + share * second
    bent = first * first * curvature[0, 0] - 2 * first * second * curvature[0, 1] + second * second * curvature[1, 1]
    change = second * slopes[1] - first * slopes[0] + 0.5 * bent
    # Along s alone the decrease is (s^T g)^2 / (2 s^T F s); its log derivative, halved, is this difference.
    gain = _over(slopes[2], slopes[0]) - _over(damped[2], damped[0]) if len(along) > 2 else jnp.zeros_like(first)
    return first, second, change, gain


def _over(a: Scalar, b: Scalar) -> Scalar:
    """``a / b``, zero where ``b`` is not positive; a NaN stays NaN."""
    return jnp.where(b <= 0, 0, a / jnp.where(b <= 0, 1, b))
