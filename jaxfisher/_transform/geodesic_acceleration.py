"""Geodesic acceleration: the second-order term of a path of which the damped step is the first-order term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxfisher._cholesky import training_solve
from jaxfisher._operators.operator import Operator, Solver
from jaxfisher._solve import check_solver
from jaxfisher._transform.places import transformation
from jaxfisher._transform.update_arguments import (
    ScalarOrSchedule,
    check_state,
    check_vector_of_state,
    completing,
    damping_for,
    fisher_for,
    part_of,
)
from jaxfisher._tree import cast_like, check_function, dot, param_spec, split
from jaxfisher._values import check_nonnegative, nonnegative


class GeodesicAccelerationState(NamedTuple):
    """State of `geodesic_acceleration`.

    Attributes:
        straight: the last step before it was bent, in the statistics dtype. The quadratic model of the loss describes this one.
    """

    straight: Any


ACCELERATION = "direction -> pytree like it, such as lambda d: jf.acceleration(model)(params, d, x)"
"""The expected ``acceleration_fn``, as messages show it."""


def geodesic_acceleration(
    damping: chex.Numeric | None = None, *, max_ratio: chex.Numeric = 0.75, solver: Solver | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Bend a step along the path on which the model's outputs move straight.

    .. math:: u \leftarrow u - \tfrac12 (F + \lambda I)^{-1} J^T M\, \frac{d^2 z(\theta + t u)}{dt^2}\Big|_{t = 0},

    where z are the outputs of the model, J their Jacobian and M the loss's Hessian in them, so that ``F = J^T M J``. A damped
    step moves the outputs to where they should go only to first order. In a long curved valley, as in fits of physics-informed
    residuals and of sums of exponentials, that keeps steps short; with the second-order term they can be longer by orders of
    magnitude. The term takes one more solve and about three evaluations of the model. Place the transformation behind a
    learning rate of one::

        optax.chain(jf.scale_by_fisher(), optax.scale_by_learning_rate(1.0), jf.geodesic_acceleration())

    The subtracted term a is left out if it is not small, ``2 |a| > max_ratio |u|``: there the expansion says nothing.

    Args:
        damping: the damping of the step, ``>= 0``, in the units of F. None if every update is given one, as by
            `jaxfisher.levenberg_marquardt` and `jaxfisher.adapt_damping`.
        max_ratio: the largest ratio, above zero.
        solver: as in `jaxfisher.solve`; None for the exact route.

    Returns:
        A gradient transformation whose ``update`` takes ``fisher=`` and ``acceleration_fn=``, a function from a step
        to :math:`J^T M z''` along it, such as ``lambda d: jf.acceleration(model)(params, d, x)``, or a sum of such functions
        where F is a sum; inside `optax.masked` or `optax.partition` also ``all_params``. `levenberg_marquardt` and
        `adapt_damping` predict the decrease from the step before it was bent, which the state holds.

    Raises:
        ValueError: a negative damping or ratio; (at update) ``fisher`` or ``acceleration_fn`` is missing.
        TypeError: (at update) ``acceleration_fn`` is no function, or does not return a pytree like the updates.

    Reference: Transtrum and Sethna, Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization
    (arXiv 1201.5885), equations 9 to 15.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda theta: jf.Normal(jnp.exp(theta), 1.0)  # wants to be at 2
    >>> F, bend = jf.exact_fisher(model)(0.0), lambda d: jf.acceleration(model)(0.0, d)
    >>> opt = jf.geodesic_acceleration(damping=0.0)
    >>> updates, _ = opt.update(0.5, opt.init(0.0), fisher=F, acceleration_fn=bend)
    >>> print(updates)  # log(1.5) = 0.405: the output moves by 0.5
    0.375
    """
    if damping is not None:
        check_nonnegative("damping", damping)
    check_nonnegative("max_ratio", max_ratio)
    check_solver(solver)
    usual: ScalarOrSchedule | None = damping

    def update(
        updates: Any,
        state: GeodesicAccelerationState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        acceleration_fn: Callable[[Any], Any] | None = None,
        damping: chex.Numeric | None = None,
        all_params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, GeodesicAccelerationState]:
        del params, extra_args
        if not jax.tree.leaves(updates):
            return updates, state
        check_state(state, GeodesicAccelerationState, "geodesic_acceleration")
        check_vector_of_state(state.straight, split(updates), "geodesic_acceleration")
        if acceleration_fn is None:
            raise ValueError(
                "geodesic_acceleration: `update` needs `acceleration_fn`, a function from a step to the acceleration of the "
                f"outputs along it. Pass it by keyword, {ACCELERATION}."
            )
        check_function("acceleration_fn", acceleration_fn, ACCELERATION)
        operator = fisher_for(updates, fisher, "geodesic_acceleration")
        strength = damping_for(damping, usual, jnp.zeros((), jnp.int32), "geodesic_acceleration")
        # Parameters outside the updates do not move, so the direction is zero there.
        direction = completing(updates, jax.tree.map(jnp.zeros_like, all_params), "geodesic_acceleration")(updates)
        pulled = operator.spec.vector(part_of(acceleration_fn(direction), updates), "acceleration_fn(updates)")
        bend, _ = training_solve(operator, pulled, strength, solver)
        step = operator.spec.vector(updates)
        # `bend` is 2a, since half of it is subtracted. A NaN compares false, so it is not small.
        small = dot(bend, bend) <= nonnegative("max_ratio", max_ratio, operator.spec.dtype) ** 2 * dot(step, step)
        bent = jax.tree.map(lambda u, a: jnp.where(small, u - 0.5 * a, u), step, bend)
        return cast_like(bent, updates), GeodesicAccelerationState(step)

    def init(params: chex.ArrayTree) -> GeodesicAccelerationState:
        dtype = param_spec(params).dtype
        return GeodesicAccelerationState(jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), split(params)))

    return transformation(init, update)
