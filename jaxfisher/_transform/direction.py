"""The direction of `jaxfisher.kfac`: a running mean of a view, and inverses of it, each recomputed when it is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Scalar

from jaxfisher._once import Static, once, renewed
from jaxfisher._operators.averaging import arrays_of, with_arrays
from jaxfisher._operators.factored import InvertedBlocks, factored_solve, has_factors, is_invertible
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import relative_damping
from jaxfisher._operators.operator import Operator, Solver, View, as_operator, viewed
from jaxfisher._operators.terms import num_moving
from jaxfisher._operators.turns import EIGENVECTORS, INVERSES, NOTHING, Holding
from jaxfisher._solve import solve
from jaxfisher._system import SolveInfo
from jaxfisher._transform.like import Choice, Like, shape_of_view
from jaxfisher._transform.places import zeros_like
from jaxfisher._transform.scale_by_fisher import ScaleByFisherState, averaged, empty_info
from jaxfisher._transform.turns import CHECK, Turns, counted_period, phases
from jaxfisher._transform.update_arguments import Shared, check_state, check_vector_of_state, fisher_for
from jaxfisher._tree import cast_like, dot
from jaxfisher._values import fraction

ByDamping = Callable[[Any], tuple[Any, Scalar]]
"""From a direction d to ``(K + gamma I)^-1 d`` and to the factor, -gamma, that makes it d's derivative by log gamma."""


class Direction(NamedTuple):
    """A direction, and how it changes with its damping.

    Attributes:
        d: ``(K + gamma I)^-1 g``.
        by_damping: how ``d`` changes with gamma.
        state: the state for the next direction.
    """

    d: Any
    by_damping: ByDamping
    state: ScaleByFisherState


class Settings(NamedTuple):
    """The arguments of `jaxfisher.kfac` that its direction depends on."""

    view: View | None
    solver: Solver | None
    decay: chex.Numeric | None
    update_every: chex.Numeric | None
    like: Like | None
    choice: Choice
    """What views are taken of, of the curvature that a training step offers."""

    @property
    def holds(self) -> bool:
        """Whether the view is kept from one step to the next.

        Without a running mean it is rebuilt at every step, unless the caller sets ``update_every``.
        """
        return self.decay is not None or self.update_every is not None

    @property
    def asked(self) -> chex.Numeric | None:
        """The period that the caller set, if any; under `optax.inject_hyperparams` an array, as every number is there."""
        if self.update_every is None or isinstance(self.update_every, int):
            return self.update_every
        return jnp.asarray(self.update_every).astype(jnp.int32)

    @property
    def check_every(self) -> chex.Numeric:
        """The number of steps after which the length and the damping are recomputed."""
        if self.asked is None:
            return CHECK if self.holds else 1
        return min(self.asked, CHECK) if isinstance(self.asked, int) else jnp.minimum(self.asked, CHECK)


def init_direction(settings: Settings, params: chex.ArrayTree) -> ScaleByFisherState:
    """The state before the first direction."""
    view, solver, decay = settings.view, settings.solver, settings.decay
    mean: Any = ()
    held: Any = ()
    if settings.holds:
        shape = shape_of_view(params, settings.like, partial(_viewed, view), settings.choice)
        form = shape.form if decay is None else averaged(shape, "kfac")
        mean = zeros_like(arrays_of(form), params)
        held = zeros_like(tuple(_holding(solver, form).shapes(form)), params)
    return ScaleByFisherState(jnp.zeros((), jnp.int32), mean, held, (), empty_info(params))


def direction(
    settings: Settings,
    updates: Any,
    state: ScaleByFisherState,
    *,
    share: Scalar,
    damping: chex.Numeric,
    fisher: Operator | Callable[[], Operator] | None = None,
    factors: Callable[[], Operator] | None = None,
    forward: float | None = None,
) -> Direction:
    """``(K + gamma I)^-1 g``, with K a running mean of views and gamma a share of its mean eigenvalue.

    The mean is over the parameters that the scores depend on.

    Args:
        settings: the arguments of `jaxfisher.kfac`.
        updates: the gradient g.
        state: the state that the last direction left.
        share: gamma in units of the mean eigenvalue of K.
        damping: lambda, the damping of the length.
        fisher: the curvature of the batch.
        factors: makes the Fisher that views are taken of, if that is not ``fisher``.
        forward: the operations of a forward pass, where they are known.
    """
    check_state(state, ScaleByFisherState, "kfac")
    # Build the factors inside the branch that needs them: anything computed outside it would run at every step.
    source = factors or (fisher.anew if isinstance(fisher, Shared) and settings.holds else fisher)

    def fresh() -> tuple[Operator, Static[int]]:
        given = fisher_for(updates, source, "kfac")
        return _viewed(settings.view, given), Static(max(num_moving(viewed(given, "kfac").form), 1))

    def gamma_of(operator: Operator, moving: int) -> Scalar:
        # Parameters that the model does not use would lower the mean eigenvalue, and so the damping of all others.
        gamma = relative_damping(operator, share) * (operator.size / moving)
        # A floor for K = 0: a share of lambda so small that it makes no difference otherwise.
        return jnp.maximum(gamma, jnp.finfo(operator.spec.dtype).eps * jnp.asarray(damping, operator.spec.dtype))

    if settings.holds:
        operator, gamma, mean, held = _in_turn(settings, fresh, state, forward, gamma_of)
    else:
        (operator, moving), mean, held = fresh(), (), ()
        gamma = gamma_of(operator, moving.value)
    d, info = _lightly(settings.solver, operator, operator.spec.vector(updates), gamma)
    info = jax.tree.map(lambda a, b: jnp.asarray(a).astype(b.dtype), info, state.info)
    after = ScaleByFisherState(optax.safe_increment(state.count), mean, held, (), info)

    def by_damping(d: Any) -> tuple[Any, Scalar]:
        # With held inverses one product is enough, without a report.
        inverted = isinstance(operator.form, InvertedBlocks)
        return operator.mv(d) if inverted else _lightly(settings.solver, operator, d, gamma)[0], -gamma

    return Direction(cast_like(d, updates), by_damping, after)


def _viewed(view: View | None, fisher: Operator) -> Operator:
    return fisher if view is None else as_operator(view(fisher), "kfac: `view`")


def _in_turn(
    settings: Settings,
    fresh: Callable[[], tuple[Operator, Static[int]]],
    state: ScaleByFisherState,
    forward: float | None,
    gamma_of: Callable[[Operator, int], Scalar],
) -> tuple[Operator, Scalar, Any, Any]:
    """The operator to solve with, its damping, the running mean and the held inverses; only what is due is recomputed."""
    # Find the structure by abstract evaluation, so that steps at which nothing is due do not pay for it. Inside `jit` the
    # program traced here is reused in the branch that runs it.
    fresh = jax.jit(fresh, inline=True) if isinstance(state.count, jax.core.Tracer) else fresh
    shape, moving = jax.eval_shape(fresh)
    template = shape.form if settings.decay is None else averaged(shape, "kfac")
    check_vector_of_state(state.mean, arrays_of(template), "kfac")
    every = counted_period(forward, shape.form) if settings.asked is None else settings.asked
    turns = Turns(state.count, every)

    def averages(mean: Any) -> Any:
        operator, _ = fresh()
        new = arrays_of(operator.form)
        if settings.decay is None:
            return new
        beta = fraction("decay", settings.decay, shape.spec.dtype)
        # The newest view gets its weight in a debiased mean of all views so far, so the mean stays debiased.
        share = (1 - beta) / (1 - beta ** (turns.before() + 1).astype(beta.dtype))
        moved: Any = _moved(mean, new, operator.trace(), share)
        return moved

    mean = renewed(turns.due(), averages, state.mean)
    form = with_arrays(shape.form, mean)
    holding = _holding(settings.solver, form)
    operator = Operator(form, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape.provenance))
    gamma = gamma_of(operator, moving.value)
    factors = holding.factors(form, gamma)
    own = phases(len(factors) // 2, every)
    # Layers of one turn share one flag object: `Holding.refreshed` groups them by it, so that one branch recomputes them all.
    known = {phase: turns.due(phase) for phase in own} if isinstance(every, int) else {}
    flags = [known[phase] if known else turns.due(phase) for phase in own]
    held = tuple(holding.refreshed(form, factors, flags, state.in_use))
    return dataclasses.replace(operator, form=holding.form(form, held, gamma)), gamma, mean, held


@once
def _moved(mean: Any, new: Any, trace: Scalar, share: Scalar) -> Any:
    """The running mean, moved by this share towards the newest view.

    The arrays are averaged one by one: concatenated into one vector, sharded arrays would be replicated on every device.
    """
    # Skip a batch with a NaN in it, which would wipe out the whole mean.
    finite = jnp.isfinite(trace)
    return jax.tree.map(lambda a, b: a + share * (jax.lax.select(finite, b, a) - a), mean, new)


def _holding(solver: Solver | None, form: Form) -> Holding:
    """What is kept between steps for a solver: inverses, eigenvectors, or nothing for a solver of the user's own."""
    if solver is not None and solver is not factored_solve:
        return NOTHING
    return INVERSES if solver is factored_solve and is_invertible(form) else EIGENVECTORS


def _lightly(solver: Solver | None, fisher: Operator, v: Any, gamma: Scalar) -> tuple[Any, SolveInfo]:
    """The direction and a report without a residual, which would cost as much again; the loss judges the step anyway."""
    if isinstance(fisher.form, InvertedBlocks):
        x = fisher.mv(v)
        # One number that is not finite makes the whole sum not finite.
        finite = jnp.isfinite(dot(x, x))
        nothing, size = jnp.zeros((), fisher.spec.dtype), jnp.asarray(fisher.size, jnp.int32)
        no = jnp.zeros_like(finite)
        return x, SolveInfo(nothing, jnp.zeros((), jnp.int32), finite, finite, size, no, no)
    usual = solver is None or solver is factored_solve
    # A view without factors to damp is solved exactly.
    by = None if solver is factored_solve and not has_factors(fisher.form) else solver
    x, info = solve(fisher, v, gamma, by)
    if usual:
        info = info._replace(
            residual=jnp.zeros_like(info.residual), converged=info.finite, measured=jnp.zeros_like(info.finite)
        )
    return x, info
