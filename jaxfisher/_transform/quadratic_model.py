"""Learning rate and momentum from the quadratic model along the new direction and the last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._linalg import matmul
from jaxfisher._once import either, once
from jaxfisher._operators.operator import Operator, inner_products
from jaxfisher._transform.update_arguments import ScalarOrSchedule, check_state, check_vector_of_state, damping_for, fisher_for
from jaxfisher._tree import cast_like, dot, param_spec, products, scaled, split
from jaxfisher._values import check_nonnegative, nonnegative


class QuadraticModelState(NamedTuple):
    """State of `quadratic_model`.

    Attributes:
        count: updates made so far, int32.
        step: the last step, in the statistics dtype.
        learning_rate: alpha of the last step.
        momentum: mu of the last step.
        change: the change of the loss that the model without damping predicted when it was last minimised, in nats.
        length: of the step that was taken then, in the parameters' own units.
    """

    count: Array  # type: ignore[assignment]
    step: Any
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    change: Float[Array, ""]
    length: Float[Array, ""]


def quadratic_model(damping: ScalarOrSchedule | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Take the step ``-alpha d + mu v`` that minimises the damped quadratic model, with ``v`` the last step.

    .. math:: \min_{\alpha, \mu}\; g^T s + \tfrac12 s^T (F + \lambda I) s, \qquad s = -\alpha d + \mu v.

    ``d`` is what comes in, the direction of a `scale_by_fisher` whose view may be an approximation; F is the Fisher as it is
    given, so the length of the step is right with any view. The model needs three numbers of F, ``d^T F d``, ``d^T F v`` and
    ``v^T F v``: of a Fisher ``J^T M J`` half a product for each of ``d`` and ``v``, without the transpose. It takes the place
    of a learning rate, and its updates are negated::

        opt = optax.chain(jf.scale_by_fisher(1e-3, view=jf.kronecker), jf.quadratic_model(1e-3))
        updates, state = opt.update(grads, state, params, fisher=F, grad=grads)

    On mini-batches a small damping that does not adapt trusts the model of one batch too far, and the loss may grow: put
    `adapt_damping` around the chain. Inside `optax.MultiSteps` what comes in is a mean over mini-steps, and ``grad`` must be
    that mean; `adapt_damping` around the chain gives it so. An update that is given ``due=``, a flag, minimises the model only
    where that is true. Else it takes the last rates, the momentum between zero and one, and a step no longer than the last one
    that was the minimum of a model.

    Args:
        damping: lambda ``>= 0``, as in `scale_by_fisher`; an update that is given ``damping=`` takes that. None where each is
            given one, as inside `adapt_damping`.

    Returns:
        A gradient transformation whose ``update`` takes by keyword ``fisher`` and ``grad``, the gradient before it was
        preconditioned.

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
        return QuadraticModelState(jnp.zeros((), jnp.int32), step, *(jnp.zeros((), dtype) for _ in range(4)))

    def update(
        updates: Any,
        state: QuadraticModelState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        grad: Any = None,
        damping: chex.Numeric | None = None,
        due: bool | Bool[Array, ""] = True,
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
        g, d = operator.spec.tree(operator.spec.leaves(grad, "grad")), operator.spec.vector(updates)

        def minimised() -> tuple[Scalar, ...]:
            columns = jax.tree.map(lambda d, v: jnp.stack([-d, v]), d, state.step)
            return _minimum(operator, g, columns, strength)

        alpha, mu, change = either(due, minimised, lambda: (state.learning_rate, state.momentum, state.change))
        # A step whose model is not due goes no farther than the last one whose model was.
        weight = mu if due is True else jnp.where(due, mu, jnp.clip(mu, 0, 1))
        step, length = _combined(d, state.step, alpha, weight, state.length, jnp.asarray(due))
        length = length if due is True else jnp.where(due, length, state.length)
        return cast_like(step, updates), QuadraticModelState(optax.safe_increment(state.count), step, alpha, mu, change, length)

    return optax.GradientTransformationExtraArgs(init, update)


@once
def _combined(d: Any, v: Any, alpha: Scalar, mu: Scalar, most: Scalar, free: Bool[Array, ""]) -> tuple[Any, Scalar]:
    """The step ``mu v - alpha d``, made no longer than ``most`` unless it is ``free``, and its length before that."""
    step = jax.tree.map(lambda d, v: mu * v - alpha * d, d, v)
    length = jnp.sqrt(dot(step, step))
    return scaled(step, jnp.where(~free & (length > most), most / length, 1)), length


def _minimum(operator: Operator, g: Any, columns: Any, damping: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """The coefficients of two directions, stacked, at the minimum of the damped model; and the change without damping there."""
    found: tuple[Scalar, Scalar, Scalar] = _lowest(inner_products(operator, columns), g, columns, damping)
    return found


@once
def _lowest(curvature: Float[Array, "2 2"], g: Any, columns: Any, damping: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """`_minimum`, by the curvature along the directions and between them.

    Only the part of the second direction that is not along the first counts, and there may be no such part.
    """
    # With the gradient as a third row there is one product of each leaf in place of two.
    found = products(columns, jax.tree.map(lambda pair, g: jnp.concatenate([pair, g[None]]), columns, g))
    slopes, damped = found[:, 2], curvature + damping * found[:, :2]
    along = _over(damped[0, 1], damped[0, 0])
    own = damped[1, 1] - along * damped[0, 1]
    # What is left of parallel directions is rounding.
    own = jnp.where(own <= 100 * jnp.finfo(own.dtype).eps * damped[1, 1], 0, own)
    second = -_over(slopes[1] - along * slopes[0], own)
    first = -_over(slopes[0], damped[0, 0]) - along * second
    rates = jnp.stack([first, second])
    return first, second, matmul(rates, slopes + 0.5 * matmul(curvature, rates))


def _over(a: Scalar, b: Scalar) -> Scalar:
    """``a / b``, zero where ``b`` is not positive; a NaN stays NaN."""
    return jnp.where(b <= 0, 0, a / jnp.where(b <= 0, 1, b))
