"""The direction of `jaxfisher.kfac`: a running mean of a view, and what it is solved with, each made anew in its turn."""

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

from jaxfisher._once import once, renewed
from jaxfisher._operators.averaging import arrays_of, with_arrays
from jaxfisher._operators.factored import InvertedBlocks, factored_solve, has_factors, is_invertible
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import relative_damping
from jaxfisher._operators.operator import Operator, Solver, View, as_operator
from jaxfisher._operators.turns import EIGENVECTORS, INVERSES, NOTHING, Holding
from jaxfisher._solve import solve
from jaxfisher._system import SolveInfo
from jaxfisher._transform.like import Like, shape_of_view
from jaxfisher._transform.places import zeros_like
from jaxfisher._transform.scale_by_fisher import ScaleByFisherState, averaged, empty_info
from jaxfisher._transform.turns import CHECK, Turns, counted_period, phases
from jaxfisher._transform.update_arguments import Shared, check_state, check_vector_of_state, fisher_for
from jaxfisher._tree import cast_like, dot
from jaxfisher._values import fraction

ByDamping = Callable[[Any], tuple[Any, Scalar]]
"""From a direction to ``(K + gamma I)^-1 d``, and what its derivative by the logarithm of its damping is of that: -gamma."""


class Direction(NamedTuple):
    """A direction, with what would change it.

    Attributes:
        d: ``(K + gamma I)^-1 g``.
        by_damping: how it changes with gamma.
        state: for the next one.
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

    @property
    def holds(self) -> bool:
        """Whether the view is held from one step to the next; what has no running mean is made at every step, unless asked."""
        return self.decay is not None or self.update_every is not None

    @property
    def asked(self) -> chex.Numeric | None:
        """The period that was asked for, if any; an array under `optax.inject_hyperparams`, where every number is one."""
        if self.update_every is None or isinstance(self.update_every, int):
            return self.update_every
        return jnp.asarray(self.update_every).astype(jnp.int32)

    @property
    def check_every(self) -> chex.Numeric:
        """Every how many steps the length and the damping are found anew."""
        if self.asked is None:
            return CHECK if self.holds else 1
        return min(self.asked, CHECK) if isinstance(self.asked, int) else jnp.minimum(self.asked, CHECK)


def init_direction(settings: Settings, params: chex.ArrayTree) -> ScaleByFisherState:
    """The state before the first direction."""
    view, solver, decay, _, like = settings
    mean: Any = ()
    held: Any = ()
    if settings.holds:
        shape = shape_of_view(params, like, partial(_viewed, view))
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
    """``(K + gamma I)^-1 g``, K a running mean of views, gamma a share of its mean eigenvalue.

    ``factors`` makes what views are taken of, where that is not ``fisher``; ``forward`` is the cost of the model, and
    ``damping`` that of the length.
    """
    check_state(state, ScaleByFisherState, "kfac")
    # In the branch where it is due, and not before: what is computed outside is computed at every step.
    source = factors or (fisher.anew if isinstance(fisher, Shared) and settings.holds else fisher)

    def fresh() -> Operator:
        return _viewed(settings.view, fisher_for(updates, source, "kfac"))

    def gamma_of(operator: Operator) -> Scalar:
        # Where K is zero, a share of the other damping that is of no account elsewhere.
        least = jnp.finfo(operator.spec.dtype).eps * jnp.asarray(damping, operator.spec.dtype)
        return jnp.maximum(relative_damping(operator, share), least)

    if settings.holds:
        operator, gamma, mean, held = _in_turn(settings, fresh, state, forward, gamma_of)
    else:
        operator, mean, held = fresh(), (), ()
        gamma = gamma_of(operator)
    d, info = _lightly(settings.solver, operator, operator.spec.vector(updates), gamma)
    info = jax.tree.map(lambda a, b: jnp.asarray(a).astype(b.dtype), info, state.info)
    after = ScaleByFisherState(optax.safe_increment(state.count), mean, held, (), info)

    def by_damping(d: Any) -> tuple[Any, Scalar]:
        # Of inverses that are held a product, without the report.
        inverted = isinstance(operator.form, InvertedBlocks)
        return operator.mv(d) if inverted else _lightly(settings.solver, operator, d, gamma)[0], -gamma

    return Direction(cast_like(d, updates), by_damping, after)


def _viewed(view: View | None, fisher: Operator) -> Operator:
    return fisher if view is None else as_operator(view(fisher), "kfac: `view`")


def _in_turn(
    settings: Settings,
    fresh: Callable[[], Operator],
    state: ScaleByFisherState,
    forward: float | None,
    gamma_of: Callable[[Operator], Scalar],
) -> tuple[Operator, Scalar, Any, Any]:
    """What is solved with, its damping, the running mean, and what is held: of each what is due made anew."""
    # The structure is found without running anything, so that steps at which nothing is due do not pay for it. Inside `jit`
    # what was traced for it is what runs where it is due.
    fresh = jax.jit(fresh, inline=True) if isinstance(state.count, jax.core.Tracer) else fresh
    shape = jax.eval_shape(fresh)
    template = shape.form if settings.decay is None else averaged(shape, "kfac")
    check_vector_of_state(state.mean, arrays_of(template), "kfac")
    every = counted_period(forward, shape.form) if settings.asked is None else settings.asked
    turns = Turns(state.count, every)

    def averages(mean: Any) -> Any:
        operator = fresh()
        new = arrays_of(operator.form)
        if settings.decay is None:
            return new
        beta = fraction("decay", settings.decay, shape.spec.dtype)
        # The newest has the weight that it has in a debiased mean of all so far, so the mean stays debiased.
        share = (1 - beta) / (1 - beta ** (turns.before() + 1).astype(beta.dtype))
        moved: Any = _moved(mean, new, operator.trace(), share)
        return moved

    mean = renewed(turns.due(), averages, state.mean)
    form = with_arrays(shape.form, mean)
    holding = _holding(settings.solver, form)
    operator = Operator(form, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape.provenance))
    gamma = gamma_of(operator)
    own = phases(holding.layers(form), every)
    # Layers of one turn have one flag, by which what is made apart is made together.
    known = {phase: turns.due(phase) for phase in own} if isinstance(every, int) else {}
    flags = [known[phase] if known else turns.due(phase) for phase in own]
    held = tuple(holding.refreshed(form, gamma, flags, state.in_use))
    return dataclasses.replace(operator, form=holding.form(form, held, gamma)), gamma, mean, held


@once
def _moved(mean: Any, new: Any, trace: Scalar, share: Scalar) -> Any:
    """The running mean, with this share of the newest.

    Array by array: in one vector, those that devices share would be whole on each of them.
    """
    # A batch with a NaN in it is no reason to lose all that came before.
    finite = jnp.isfinite(trace)
    return jax.tree.map(lambda a, b: a + share * (jax.lax.select(finite, b, a) - a), mean, new)


def _holding(solver: Solver | None, form: Form) -> Holding:
    """What is held for a solver: a solver of the user's is given the view itself."""
    if solver is not None and solver is not factored_solve:
        return NOTHING
    return INVERSES if solver is factored_solve and is_invertible(form) else EIGENVECTORS


def _lightly(solver: Solver | None, fisher: Operator, v: Any, gamma: Scalar) -> tuple[Any, SolveInfo]:
    """The direction, and a report whose residual is left out: to compute it takes as long, and the loss judges the step."""
    if isinstance(fisher.form, InvertedBlocks):
        x = fisher.mv(v)
        # A number that is not finite makes the sum so.
        finite = jnp.isfinite(dot(x, x))
        nothing, size = jnp.zeros((), fisher.spec.dtype), jnp.asarray(fisher.size, jnp.int32)
        no = jnp.zeros_like(finite)
        return x, SolveInfo(nothing, jnp.zeros((), jnp.int32), finite, finite, size, no, no)
    usual = solver is None or solver is factored_solve
    # Not every view has factors to damp, and what is solved for exactly needs none.
    by = None if solver is factored_solve and not has_factors(fisher.form) else solver
    x, info = solve(fisher, v, gamma, by)
    if usual:
        info = info._replace(
            residual=jnp.zeros_like(info.residual), converged=info.finite, measured=jnp.zeros_like(info.finite)
        )
    return x, info
