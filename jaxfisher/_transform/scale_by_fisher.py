"""Preconditioning by the Fisher, from the full natural gradient to the diagonal family of AdaGrad, RMSprop and Adam."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxfisher._cholesky import training_solve
from jaxfisher._once import either
from jaxfisher._operators.apart import factorised
from jaxfisher._operators.averaging import arrays_of, with_arrays
from jaxfisher._operators.form import Form
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, as_operator
from jaxfisher._provenance import check_terms
from jaxfisher._solve import check_solver
from jaxfisher._system import SolveInfo
from jaxfisher._transform.like import Like, shape_of_view
from jaxfisher._transform.places import transformation, zeros_like
from jaxfisher._transform.update_arguments import (
    ScalarOrSchedule,
    Shared,
    check_state,
    check_vector_of_state,
    damping_for,
    fisher_for,
)
from jaxfisher._tree import all_finite, cast_like, check_function, param_spec, scaled, split
from jaxfisher._values import check_fraction, check_nonnegative, check_number, fraction, is_known


class ScaleByFisherState(NamedTuple):
    """State of `scale_by_fisher`: arrays only.

    Attributes:
        count: updates made so far, int32.
        mean: with ``decay``, the arrays of the running mean of the view, debiased; else empty.
        in_use: with ``update_every``, the arrays of the operator in use between refreshes; else empty.
        previous: with ``momentum``, the last result; else empty.
        info: the report on the last solve.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # Optax's name; it hides tuple.count
    mean: Any
    in_use: tuple[Array, ...]
    previous: Any
    info: SolveInfo


def scale_by_fisher(
    damping: ScalarOrSchedule | None = None,
    *,
    view: View | None = None,
    power: chex.Numeric = 1.0,
    solver: Solver | None = None,
    decay: chex.Numeric | None = None,
    update_every: chex.Numeric | None = None,
    momentum: chex.Numeric | None = None,
    like: Like | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply updates by ``(F + damping I)^-power``, with ``F`` given at each update as ``fisher=``.

    .. math:: u_t = (F_t + \lambda I)^{-q}\, g_t, \qquad
        F_t = \frac{1}{1 - \beta^t} \sum_{k \le t} (1 - \beta)\, \beta^{t - k}\, \mathrm{view}(F_k) \text{ with decay } \beta,
        \text{ else } \mathrm{view}(F_t).

    The curvature comes in as a value, so the optimiser never runs the model::

        opt = optax.chain(jf.scale_by_fisher(damping=1e-3), optax.scale_by_learning_rate(1.0))
        updates, state = opt.update(grads, state, params, fisher=jf.exact_fisher(model)(params, x))

    With ``momentum`` :math:`\mu` it is SPRING, whose solution is the one nearest to :math:`\mu` times the last one,

    .. math:: u_t = \arg\min_u \tfrac12 u^T F_t u - g_t^T u + \tfrac\lambda2 |u - \mu u_{t-1}|^2
        = \mu u_{t-1} + (F_t + \lambda I)^{-1} (g_t - \mu F_t u_{t-1}).

    For F held as scores this is ``mu u + S^T (S S^T + damping I)^-1 (e - mu S u)`` where ``g = S^T e``: the same in the space
    of examples, which the solve chooses where that space is the smaller one.

    With ``view=jf.diagonal, power=0.5, decay=beta`` and the empirical Fisher of batches of one it is
    ``optax.scale_by_rms(beta, eps=damping, eps_in_sqrt=True, bias_correction=True)``: the running mean is debiased and the
    damping is added before the power. With larger batches the two differ, since the square of a mean gradient is not the mean
    of squared gradients.

    Args:
        damping: ``>= 0``, absolute, in the units of F, or a schedule (a function of the update count). A ``damping=`` given to
            an update, as by `jaxfisher.adapt_damping`, takes precedence; None if every update is given one.
        view: a function applied to the operator, such as `jaxfisher.kronecker`; None for the operator as it comes.
        power: ``q``. 1 is the natural gradient. Other powers need an eigendecomposition, except on the diagonal, where 0.5
            gives the family of RMSprop and Adam.
        solver: as in `jaxfisher.solve`, such as ``jf.CG(rtol=1e-2, preconditioner=jf.kronecker)``; None for the exact route.
            With None a Fisher held as scores is solved as accurately as training needs, by ``jf.Cholesky(rtol=1e-3)``, unless
            the damping is known to be zero. Give a ``jf.Cholesky`` of smaller ``rtol`` for more accuracy.
        decay: ``beta`` in ``[0, 1)`` of a running mean of the view, whose shape must not depend on n.
        update_every: make the operator (and add it to the mean) only once in this many updates; None for every update. Give
            ``fisher`` as a function of no arguments, which is not run in between.
        momentum: ``mu`` in ``[0, 1)``; amplifies a constant gradient by at most ``1 / (1 - mu)``. With ``power=1`` only. A
            decay or momentum that is only known at run time to be outside ``[0, 1)`` makes the updates NaN.
        like: an operator like the later ``fisher=``, its `jax.eval_shape`, or a function that makes one and is never run. It
            gives the state its shapes. Needed with ``update_every`` or ``decay``, except for the views `jaxfisher.diagonal`
            and `jaxfisher.dense`, and for a state that `jaxfisher.training_step` makes.

    Returns:
        A gradient transformation whose ``update`` takes ``fisher=``, an operator or a function of no arguments that returns
        one. The updates are not negated. `optax.tree.get(state, "info")` is the report on the solve. Under
        `optax.inject_hyperparams` name ``view``, ``solver`` and ``like`` in ``static_args``.

    Raises:
        ValueError: a negative damping, a decay or momentum outside ``[0, 1)``, a decay without a view, a missing ``like``; (at
            update) ``fisher=`` is missing, not over the parameters of the updates, or not of the shapes of ``like``.
        TypeError: (at update) ``fisher=`` is no operator; with ``decay``, it is a covariance of the score or a marginal, of
            which no running mean is right, as `jaxfisher.merge` explains.

    Reference: Martens (JMLR 2020), section 6 (damping) and 11 (Adam as a diagonal empirical Fisher); Kingma and Ba (2015),
        section 3; Goldshlager, Abrahamsen and Lin (J. Comput. Phys. 2024), equation 17 (SPRING).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> opt = jf.scale_by_fisher(damping=0.0)
    >>> fisher = jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(0.0)  # 1/4
    >>> updates, _ = opt.update(1.0, opt.init(0.0), fisher=fisher)
    >>> print(updates)
    4.0
    """
    _check_arguments(damping, view, power, solver, decay, update_every, momentum)
    usual = damping

    def viewed(fisher: Operator) -> Operator:
        return fisher if view is None else as_operator(view(fisher), "scale_by_fisher: `view`")

    def init(params: chex.ArrayTree) -> ScaleByFisherState:
        dtype = param_spec(params).dtype
        mean = zeros_like(_means(shape_of_view(params, like, viewed)), params) if decay is not None else ()
        held = zeros_like(_held_arrays(shape_of_view(params, like, viewed)), params) if update_every is not None else ()
        previous = () if momentum is None else jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), split(params))
        return ScaleByFisherState(jnp.zeros((), jnp.int32), mean, held, previous, empty_info(params))

    def update(
        updates: Any,
        state: ScaleByFisherState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        damping: chex.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByFisherState]:
        del params, extra_args
        if not jax.tree.leaves(updates):
            return updates, state
        check_state(state, ScaleByFisherState, "scale_by_fisher")
        if momentum is not None:
            check_vector_of_state(state.previous, split(updates), "scale_by_fisher")

        # Make the curvature inside the branch of a due refresh: a shared one made outside it would run at every update.
        given = fisher.anew if update_every is not None and isinstance(fisher, Shared) else fisher

        def fresh(refresh: Int[Array, ""]) -> tuple[Operator, Any]:
            return _running_mean(viewed(fisher_for(updates, given, "scale_by_fisher")), state.mean, refresh, decay)

        strength = damping_for(damping, usual, state.count, "scale_by_fisher")
        if update_every is not None:
            operator, mean, held = _refreshed(fresh, state, update_every)
        else:
            (operator, mean), held = fresh(state.count), ()
        previous = None if momentum is None else (momentum, state.previous)
        result, info = _precondition(operator, updates, power, strength, solver, previous)
        kept = () if momentum is None else result
        info = jax.tree.map(lambda a, b: jnp.asarray(a).astype(b.dtype), info, state.info)
        count = optax.safe_increment(state.count)
        return cast_like(result, updates), ScaleByFisherState(count, mean, held, kept, info)

    return transformation(init, update)


def _precondition(
    operator: Operator,
    updates: Any,
    power: chex.Numeric,
    damping: chex.Numeric,
    solver: Solver | None,
    previous: tuple[chex.Numeric, Any] | None,
) -> tuple[Any, SolveInfo]:
    """``(F + damping I)^-power`` times the updates in the statistics dtype, with a report."""
    updates = operator.spec.vector(updates)

    def by_solve() -> tuple[Any, SolveInfo]:
        if previous is None:
            return training_solve(operator, updates, damping, solver)
        mu, last = previous
        kept = scaled(last, fraction("momentum", mu, operator.spec.dtype))
        # Solve for the rest, not for g + damping mu u: the latter has a part outside the span of the rows to invert.
        rest, info = training_solve(operator, jax.tree.map(jnp.subtract, updates, operator.mv(kept)), damping, solver)
        return jax.tree.map(jnp.add, kept, rest), info

    def by_spectrum() -> tuple[Any, SolveInfo]:
        result = operator.power_mv(updates, -jnp.asarray(power), damping)
        finite = all_finite(result)
        size = jnp.asarray(operator.size, jnp.int32)
        nothing = jnp.zeros((), operator.spec.dtype)
        info = SolveInfo(nothing, jnp.zeros((), jnp.int32), finite, finite, size, jnp.asarray(False))
        return result, info

    if isinstance(power, numbers.Real):
        return by_solve() if power == 1 else by_spectrum()
    # Under `optax.inject_hyperparams` every number is an array, so the power is one too, although its value is mostly 1.
    if previous is not None or solver is not None:
        result, info = by_solve()
        return jax.tree.map(lambda leaf: jnp.where(jnp.asarray(power) == 1, leaf, jnp.nan), result), info
    return either(jnp.asarray(power) == 1, by_solve, by_spectrum)


def _refreshed(
    fresh: Callable[[Int[Array, ""]], tuple[Operator, Any]],
    state: ScaleByFisherState,
    every: chex.Numeric,
) -> tuple[Operator, Any, tuple[Array, ...]]:
    """The operator in use, refreshed if this update is due for it; the running mean; the operator's arrays."""
    every = jnp.asarray(every, jnp.int32)

    def made() -> tuple[tuple[Array, ...], Any]:
        operator, mean = fresh(state.count // every)
        return tuple(jax.tree.leaves(_held(operator))), mean

    # Find the structure by abstract evaluation, so that updates in between do not pay for it.
    shape = jax.eval_shape(lambda: _held(fresh(state.count)[0]))
    leaves, treedef = jax.tree.flatten(shape)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in state.in_use]:
        seen, expected = ([leaf.shape for leaf in arrays] for arrays in (leaves, state.in_use))
        raise ValueError(
            f"scale_by_fisher: `fisher`, {shape}, holds arrays of shapes {seen}; the state has {expected}, from `like`. Make "
            "the state for the same parameters, and give as `like` an operator of the same model and number of examples."
        )
    held, mean = either(state.count % every == 0, made, lambda: (state.in_use, state.mean))
    return jax.tree.unflatten(treedef, held), mean, held


def _running_mean(operator: Operator, mean: Any, before: Int[Array, ""], decay: chex.Numeric | None) -> tuple[Operator, Any]:
    """The debiased running mean, as an operator and as arrays; ``before`` is the number of operators already in it."""
    if decay is None:
        return operator, mean
    new = _means(operator)
    check_vector_of_state(mean, new, "scale_by_fisher")
    beta = fraction("decay", decay, operator.spec.dtype)
    # The newest operator gets its weight in a debiased mean of ``before + 1`` operators, so the mean stays debiased.
    share = (1 - beta) / (1 - beta ** (before + 1).astype(beta.dtype))
    mean = jax.tree.map(lambda a, b: a + share * (b - a), mean, new)
    return dataclasses.replace(operator, form=with_arrays(operator.form, mean)), mean


def _means(operator: Operator) -> tuple[Any, ...]:
    """The arrays of an operator that a running mean is taken of."""
    return arrays_of(averaged(operator, "scale_by_fisher"))


def averaged(operator: Operator, caller: str) -> Form:
    """The form of an operator, or an error if a running mean would change its shape or is no mean over examples."""
    check_terms(operator.provenance, operator, caller, "Leave out `decay`, or give a Fisher without `center` or `marginal`.")
    if not operator.form.averages:
        raise ValueError(_NO_MEAN.format(caller=caller, form=operator.form.name))
    return operator.form


def _held(operator: Operator) -> Operator:
    """The operator with its form factorised, so that solves between refreshes are products only, at any damping."""
    return dataclasses.replace(operator, form=factorised(operator.form))


def _held_arrays(operator: Operator) -> tuple[Array, ...]:
    """The arrays of the operator that solves between refreshes."""
    return tuple(jax.tree.leaves(jax.eval_shape(_held, operator)))


def empty_info(params: chex.ArrayTree) -> SolveInfo:
    """The report before the first solve."""
    # Each field is its own array, since an array that occurs twice cannot be donated.
    return SolveInfo(
        residual=jnp.zeros((), param_spec(params).dtype),
        iterations=jnp.zeros((), jnp.int32),
        converged=jnp.array(True),
        finite=jnp.array(True),
        rank=jnp.zeros((), jnp.int32),
        indefinite=jnp.array(False),
        measured=jnp.array(True),
    )


_NO_MEAN = (
    "{caller}: `decay` averages a view whose shape does not depend on the number of examples; one held {form} is not. "
    "Pass view=jf.diagonal, view=jf.kronecker or view=jf.dense."
)


def _check_arguments(damping: Any, view: Any, power: Any, solver: Any, decay: Any, update_every: Any, momentum: Any) -> None:
    if damping is not None and not callable(damping):
        check_nonnegative("damping", damping)
    if view is not None:
        check_function("view", view, VIEW)
    check_number("power", power)
    check_solver(solver)
    if momentum is not None:
        check_fraction("momentum", momentum)
    if decay is not None and view is None:
        raise ValueError(_NO_MEAN.format(caller="scale_by_fisher", form="as it comes (view=None)"))
    _check_together(power, solver, momentum)
    check_kept(decay, update_every)


def check_kept(decay: chex.Numeric | None, update_every: chex.Numeric | None) -> None:
    """Raise unless ``decay`` and ``update_every``, which say what is kept between updates, are in range."""
    if decay is not None:
        check_fraction("decay", decay)
    if update_every is None:
        return
    check_number("update_every", update_every, "a whole number of at least one")
    if is_known(update_every) and not (float(update_every) >= 1 and float(update_every).is_integer()):
        raise ValueError(f"`update_every` is {update_every}; expected a whole number of at least one.")


def _check_together(power: chex.Numeric, solver: Solver | None, momentum: chex.Numeric | None) -> None:
    if isinstance(power, numbers.Real) and power != 1:
        for name, value in (("solver", solver), ("momentum", momentum)):
            if value is not None:
                raise ValueError(
                    f"scale_by_fisher: `{name}` is given with power={power}; expected power=1, the only one that is a solve. "
                    f"Leave out `{name}`, or the power."
                )
