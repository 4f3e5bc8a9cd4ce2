"""Preconditioning by the Fisher, from the full natural gradient to the diagonal family of AdaGrad, RMSprop and Adam."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxfisher._linalg import SolveInfo
from jaxfisher._operators.base import VIEW, Operator, Provenance, View, as_operator, check_number, nonnegative
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._transform.curvature import fisher_for
from jaxfisher._tree import all_finite, check_function, param_spec

ScalarOrSchedule: TypeAlias = float | Array | Callable[[Array], Any]
"""A number, or a function of the update count that gives one."""


class ScaleByFisherState(NamedTuple):
    """State of `scale_by_fisher`.

    Attributes:
        count: updates made so far, int32.
        mean: with ``decay``, the arrays of the running mean of the view, not yet debiased; else empty.
        info: how the last solve went; to read, not to write.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # Optax's name; it hides tuple.count
    mean: Any
    info: SolveInfo


def scale_by_fisher(
    damping: ScalarOrSchedule,
    *,
    view: View | None = None,
    power: chex.Numeric = 1.0,
    decay: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply updates by ``(F + damping I)^-power``, with ``F`` given at each update as ``fisher=``.

    .. math:: u = (F_t + \lambda I)^{-q}\, g, \qquad
        F_t = \frac{1}{1 - \beta^t} \sum_{k \le t} (1 - \beta)\, \beta^{t - k}\, \mathrm{view}(F_k) \text{ with decay } \beta,
        \text{ else } \mathrm{view}(F_t).

    The curvature comes in as a value, so the optimiser never runs the model::

        opt = optax.chain(jf.scale_by_fisher(damping=1e-3), optax.scale_by_learning_rate(1.0))
        updates, state = opt.update(grads, state, params, fisher=jf.exact_fisher(model)(params, x))

    With ``view=jf.diagonal, power=0.5, decay=beta`` and the empirical Fisher of batches of one it is
    ``optax.scale_by_rms(beta, eps=damping, eps_in_sqrt=True, bias_correction=True)``: the running mean is debiased and the
    damping is added before the power. With larger batches the two differ, since the square of a mean gradient is not the mean
    of squared gradients.

    Args:
        damping: ``>= 0``, absolute, in the units of F, or a schedule of it (a function of the update count).
        view: applied to the operator: `jaxfisher.diagonal`, `jaxfisher.dense`; None for the operator as it comes.
        power: ``q``. 1 is the natural gradient; others need an eigendecomposition, except on the diagonal, where 0.5 gives
            the family of RMSprop and Adam.
        decay: ``beta`` in ``[0, 1)`` of a running mean of the view, which must be one whose shape does not depend on n.

    Returns:
        A gradient transformation whose ``update`` takes ``fisher=``, an operator or a function of no arguments that returns
        one. The updates are not negated. `optax.tree.get(state, "info")` tells how the solve went. Under
        `optax.inject_hyperparams` name ``view`` in ``static_args``.

    Raises:
        ValueError: a negative damping, a decay outside ``[0, 1)``, a decay without a view; (at update) ``fisher=`` is missing,
            or not over the parameters of the updates.
        TypeError: (at update) ``fisher=`` is no operator.

    Reference: Martens (JMLR 2020), section 6 (damping) and 11 (Adam as a diagonal empirical Fisher); Kingma and Ba (2015),
        section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> opt = jf.scale_by_fisher(damping=0.0)
    >>> fisher = jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(0.0)  # 1/4
    >>> updates, _ = opt.update(1.0, opt.init(0.0), fisher=fisher)
    >>> print(updates)
    4.0
    """
    if not callable(damping):
        nonnegative("damping", damping, jnp.float32)
    if view is not None:
        check_function("view", view, VIEW)
    check_number("power", power)
    _check_decay(decay, view)

    def init(params: chex.ArrayTree) -> ScaleByFisherState:
        return ScaleByFisherState(jnp.zeros((), jnp.int32), _zero_mean(params, view, decay), _no_info(params))

    def update(
        updates: Any,
        state: ScaleByFisherState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByFisherState]:
        del params, extra_args
        if not jax.tree.leaves(updates):
            return updates, state
        operator = fisher_for(updates, fisher, "scale_by_fisher")
        if view is not None:
            operator = as_operator(view(operator), "scale_by_fisher: `view`")
        count = optax.safe_increment(state.count)
        operator, mean = _running_mean(operator, state.mean, count, decay)
        strength = damping(state.count) if callable(damping) else damping
        result, info = _precondition(operator, updates, power, strength)
        return result, ScaleByFisherState(count, mean, jax.tree.map(lambda a, b: a.astype(b.dtype), info, state.info))

    return optax.GradientTransformationExtraArgs(init, update)


def _precondition(operator: Operator, updates: Any, power: chex.Numeric, damping: chex.Numeric) -> tuple[Any, SolveInfo]:
    """``(F + damping I)^-power`` times the updates, with a report."""

    def by_solve() -> tuple[Any, SolveInfo]:
        return operator.solve_with_info(updates, damping)

    def by_spectrum() -> tuple[Any, SolveInfo]:
        result = operator.power_mv(updates, -jnp.asarray(power), damping)
        finite = all_finite(result)
        info = SolveInfo(
            jnp.zeros((), operator.spec.dtype), jnp.zeros((), jnp.int32), finite, finite, operator.full_rank, jnp.asarray(False)
        )
        return result, info

    if isinstance(power, numbers.Real):
        return by_solve() if power == 1 else by_spectrum()
    # Under `optax.inject_hyperparams` the power is an array like every number, and one is still its most likely value.
    return jax.lax.cond(jnp.asarray(power) == 1, by_solve, by_spectrum)


def _running_mean(operator: Operator, mean: Any, count: Int[Array, ""], decay: chex.Numeric | None) -> tuple[Operator, Any]:
    """The debiased running mean as an operator, and the mean to keep."""
    if decay is None:
        return operator, mean
    if not operator.averages:
        raise ValueError(_NO_MEAN.format(form=operator.form))
    beta = jnp.asarray(decay, operator.spec.dtype)
    mean = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, mean, operator.arrays)
    debias = 1 - beta ** count.astype(beta.dtype)
    return operator.with_arrays(jax.tree.map(lambda leaf: leaf / debias, mean)), mean


def _zero_mean(params: chex.ArrayTree, view: View | None, decay: chex.Numeric | None) -> Any:
    """Zeros of the arrays that the view of an operator over these parameters holds."""
    if decay is None or view is None:
        return ()
    spec = param_spec(params)
    nothing = as_operator(view(Diagonal(spec.zeros(), spec, Provenance("zero", 0))), "scale_by_fisher: `view`")
    if not nothing.averages:
        raise ValueError(_NO_MEAN.format(form=nothing.form))
    return nothing.arrays


def _no_info(params: chex.ArrayTree) -> SolveInfo:
    dtype = param_spec(params).dtype
    zero, yes, no = jnp.zeros((), jnp.int32), jnp.array(True), jnp.array(False)
    return SolveInfo(jnp.zeros((), dtype), zero, yes, yes, zero, no)


_NO_MEAN = (
    "scale_by_fisher: `decay` averages a view whose shape does not depend on the number of examples; one held {form} is not. "
    "Pass view=jf.diagonal or view=jf.dense."
)


def _check_decay(decay: chex.Numeric | None, view: View | None) -> None:
    if decay is None:
        return
    check_number("decay", decay, "one real number in [0, 1)")
    if isinstance(decay, (numbers.Real, np.ndarray, np.generic)) and not 0 <= float(decay) < 1:
        raise ValueError(f"scale_by_fisher: `decay` is {decay}; expected a number in [0, 1), the weight of the past.")
    if view is None:
        raise ValueError(_NO_MEAN.format(form="as it comes (view=None)"))
