"""The optimiser that needs no tuning: Kronecker factors, with rates and damping chosen from a quadratic model of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._once import either
from jaxfisher._operators.factored import factored_solve
from jaxfisher._operators.layered import kronecker
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, viewed
from jaxfisher._solve import check_solver
from jaxfisher._transform.adapt_damping import AdaptDampingState, Rule, adapting, by_steps
from jaxfisher._transform.cheap import Offered
from jaxfisher._transform.direction import Settings, direction, init_direction
from jaxfisher._transform.like import Like
from jaxfisher._transform.places import transformation
from jaxfisher._transform.quadratic_model import QuadraticModelState, quadratic_model
from jaxfisher._transform.scale_by_fisher import ScaleByFisherState, check_kept
from jaxfisher._transform.turns import Turns
from jaxfisher._transform.update_arguments import check_state, fisher_for
from jaxfisher._tree import check_function, param_spec

RULE = Rule(factor=2.0**0.5, lower_ratio=0.25, upper_ratio=0.75, lower_damping=1e-8, upper_damping=1e8)
"""How lambda adapts. The factor is smaller than the default of `adapt_damping`, so that lambda averages over minibatches."""
START, FACTOR = 0.5, 1.5
"""The first kappa, and the factor by which kappa changes at a time.

Kappa falls by the square of the factor if it also fell the last time: two requests for less in a row are seldom noise, and
where K is near the Fisher kappa has far to fall. On small batches kappa is asked to rise time after time, and must not fall
back fast.
"""
LEAST, MOST = 1e-6, 10.0
"""Bounds of gamma, in units of the mean eigenvalue of K.

Below the lower bound K + gamma I is singular in float32; above the upper bound the direction is nearly the gradient. On noisy
batches a large lambda would drive gamma up to there.
"""


def kfac(
    like: Like | None = None,
    *,
    damping: chex.Numeric = 1e-2,
    view: View | None = kronecker,
    solver: Solver | None = factored_solve,
    decay: chex.Numeric | None = 0.95,
    update_every: chex.Numeric | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradients with Kronecker factors and nothing to tune: each step chooses its rate, momentum and damping.

    .. math:: d = (K + \gamma I)^{-1} g, \quad \gamma = \frac{\kappa}{n} \frac{\mathrm{tr} K}{p}, \qquad
        u = -\alpha d + \mu u_{-1}, \quad \alpha, \mu = \arg\min\; g^T u + \tfrac12 u^T (F + \lambda I) u.

    It is ``chain(scale_by_fisher(view=view, decay=decay, like=like), quadratic_model(damping))`` inside an `adapt_damping`. The
    direction comes from K, a running mean of the factors; the length from the Fisher F of the batch itself; the damping lambda
    from the ratio of the loss's actual decrease to the predicted one. A step that raises the batch's loss is not taken.

    **Two dampings.** The ratio judges the quadratic model that gives the length, not K, so lambda damps the length only. Errors
    of K and noise of the batch show in the decrease D that the model promises along ``d``, and gamma moves to raise D:

    .. math:: D(\gamma) = \frac{(g^T d)^2}{2\, d^T (F + \lambda I) d}, \qquad
        \kappa \leftarrow \begin{cases} 1.5\, \kappa & D'(\gamma) > 0 \\ \kappa / 1.5 & D'(\gamma) < 0 \end{cases}, \qquad
        \frac{\partial d}{\partial \gamma} = -(K + \gamma I)^{-1} d,

    with ``kappa / n`` within ``[1e-6, 10]``. Kappa falls by ``1.5^2`` if it also fell the last time. Gamma acts as a prior that
    is worth kappa examples of mean curvature beside the n of the batch, and the first kappa is half an example: the fewer
    examples, the less their gradient says. At a step where the model is due, the derivative takes one more product with the
    inverse and half a product with F. With `jaxfisher.factored_solve`, ``K + gamma I`` is the matrix that this solver inverts.

    **In turns.** The first four steps compute everything. After them the factors, and the inverses of each layer, are
    recomputed twice in each doubling of the step count, and in the end at every e-th step. The layers are inverted at different
    steps, so that no step is long. Alpha, mu and the ratio are recomputed at every second step, and from step 8 on at every
    third. A step in between uses the last alpha and mu, is no longer than the last step for which the model was due, and is
    taken unless it is not finite. Work that is not due is not run. The period e is 4, 8 or 16. In a `jaxfisher.training_step`
    it is the least at which the average step costs three steps of Adam, or up to four and a half where the batch is narrower
    than the widest layer, by counted operations, with inverses at the cost that was timed; in a loop of your own it is 8.
    On the digits this schedule takes 16 to 19 steps to a loss that takes 14 to 16 with everything at every step, and less time.
    With a fixed batch only ``update_every=1`` makes sure that the loss never rises.

    In a `jaxfisher.training_step` that is given no Fisher, the products are those of the exact Fisher, and the factors are
    cheap: those of the exact Fisher where an example has one or two rows in it, else those of one target drawn from the model
    for each example, by a key made of ``seed``, the count in the state and the example's place. The exact route is an option:
    ``training_step(model, jf.kfac(solver=None, update_every=1), jf.exact_fisher(model))``. In a loop of your own, give the
    exact Fisher, or `jaxfisher.implicit_fisher` with ``views_of`` a sampled one. An empirical Fisher is refused: the length of
    the step comes from the Fisher's size, and the size of the empirical Fisher falls with the loss, whatever the curvature::

        step = jf.training_step(model, jf.kfac())
        state = step.init(params, x, y)
        params, state, loss = jax.jit(step)(params, state, x, y)

    Args:
        like: as in `scale_by_fisher`; not needed for a state that `jaxfisher.training_step` makes.
        damping: the first lambda, in the units of F. The first gamma depends on K alone.
        view: the view that is averaged and inverted. Alternatives are `jaxfisher.kronecker_reduce` and, with ``decay=None``,
            `jaxfisher.eigen_kronecker`.
        solver: the solver for the direction, with gamma as its damping. `jaxfisher.factored_solve` takes two Cholesky factors a
            layer, and is exact for views without Kronecker factors. None solves with ``K + gamma I`` itself, by eigenvectors.
        decay: the decay of the running mean; None uses the view of the current batch.
        update_every: the period e. 1 computes everything at every step; 2 computes the model and the ratio at every second.
            None chooses e by counting operations, or 1 without a ``decay``.
        seed: the seed of the drawn targets.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``fisher``, ``value_fn`` and, if known,
        ``value``. `jaxfisher.training_step` passes them. Inside `optax.partition` it sees a part of the parameters, and judges
        the loss as a function of that part. Its updates are negated. `optax.tree.get` reads from its state ``learning_rate``,
        ``momentum``, ``ratio``, ``accepted``, ``direction_damping`` (kappa) and ``info``, the report on the direction. The
        report has no residual, and ``measured`` is false, unless a ``solver`` of your own measures one.

    Raises:
        ValueError: as in `adapt_damping` and `scale_by_fisher`; (at init or update) an empirical Fisher.
        TypeError: ``solver`` is no solver, or ``view`` no view.

    Reference: Martens and Grosse (ICML 2015), sections 6 and 7; their section 6.6 chooses gamma among three values by the same
    model.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(x @ w, jnp.ones(2))
    >>> x, y = jnp.eye(3), jnp.arange(6.0).reshape(3, 2)
    >>> w = jnp.zeros((3, 2))
    >>> step = jf.training_step(model, jf.kfac())
    >>> w, state, loss = step(w, step.init(w, x, y), x, y)
    >>> print(jnp.max(jnp.abs(w - y)) < 0.2, state.accepted)  # the first of a few steps
    True True
    """
    check_solver(solver)
    check_kept(decay, update_every)
    if view is not None:
        check_function("view", view, VIEW)

    def checked(fisher: Operator) -> Operator:
        _refuse_empirical(fisher)
        return fisher if view is None else view(fisher)

    def first(offered: Offered) -> Operator:
        return offered() if offered.cheap is None else offered.cheap.factors(seed, jnp.zeros((), jnp.int32))

    settings = Settings(checked, solver, decay, update_every, like, first)
    inner = adapting(_steps(settings, damping), damping, by_steps(damping, RULE), _promised, _kept)

    def update(
        updates: Any, state: AdaptDampingState, params: Any = None, *, fisher: Any = None, **extra_args: Any
    ) -> tuple[Any, AdaptDampingState]:
        if not jax.tree.leaves(updates) or not isinstance(state, AdaptDampingState):
            # There is nothing to update, or the inner transformation raises the error about the state.
            return inner.update(updates, state, params, fisher=fisher, **extra_args)
        count, given = state.inner.direction.count, dict[str, Any]()
        if isinstance(fisher, Offered) and fisher.cheap is not None:
            cheap = fisher.cheap
            given = {"factors": partial(cheap.factors, seed, count), "forward": cheap.forward_cost()}
            fisher = cheap.products
        judged = Turns(count, settings.check_every).due()
        given["due"] = judged if judged is True else judged | (state.rejected > 0)
        return inner.update(updates, state, params, fisher=fisher, **extra_args | given)

    return transformation(inner.init, update)


class KfacState(NamedTuple):
    """The inner state of `kfac`, held in its `AdaptDampingState`.

    Attributes:
        direction: the running mean of the view, and the inverses or eigenvectors held to solve with it.
        model: the state of the quadratic model that gave the step its length.
        direction_damping: kappa of the next direction, whose gamma is ``kappa / n`` times the mean eigenvalue of K.
        fell: whether kappa fell when it last changed.
    """

    direction: ScaleByFisherState
    model: QuadraticModelState
    direction_damping: Float[Array, ""]
    fell: Bool[Array, ""]


def _steps(settings: Settings, damping: chex.Numeric) -> optax.GradientTransformationExtraArgs:
    """The transformation inside `kfac`: the direction, its length by the quadratic model, and the next direction's damping."""
    model = quadratic_model(damping)

    def init(params: chex.ArrayTree) -> KfacState:
        begin = jnp.asarray(START, param_spec(params).dtype), jnp.asarray(False)
        return KfacState(init_direction(settings, params), model.init(params), *begin)

    def update(
        updates: Any,
        state: KfacState,
        params: Any = None,
        *,
        damping: chex.Numeric,
        fisher: Operator | Callable[[], Operator],
        factors: Callable[[], Operator] | None = None,
        forward: float | None = None,
        **extra_args: Any,
    ) -> tuple[Any, KfacState]:
        check_state(state, KfacState, "kfac")
        # An operator that is no mean over examples has n = 0, and counts as one example.
        n = jnp.maximum(fisher_for(updates, fisher, "kfac").n, 1).astype(state.direction_damping.dtype)
        kappa = jnp.clip(state.direction_damping, LEAST * n, MOST * n)
        d, by_damping, after = direction(
            settings,
            updates,
            state.direction,
            share=kappa / n,
            damping=damping,
            fisher=fisher,
            factors=factors,
            forward=forward,
        )
        given = {"fisher": fisher, "damping": damping, "by_damping": by_damping}
        step, modelled = model.update(d, state.model, params, **extra_args | given)
        kappa, fell = _next_kappa(kappa, state.fell, modelled.gain)
        return step, KfacState(after, modelled, kappa, fell)

    return optax.GradientTransformationExtraArgs(init, update)


def _next_kappa(kappa: Scalar, fell: Bool[Array, ""], gain: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
    """Kappa moved up if a larger one would have promised more, down if a smaller one would; kept if ``gain`` is zero."""
    down = jnp.where(fell, FACTOR**2, FACTOR)
    change = jnp.where(gain > 0, FACTOR, jnp.where(gain < 0, 1 / down, 1.0))
    return (kappa * change).astype(kappa.dtype), jnp.where(gain == 0, fell, gain < 0)


def _promised(operator: Operator, g: Any, u: Any, after: Any) -> Scalar:
    """The decrease that the inner quadratic model already predicted, which saves one product with the Fisher."""
    del operator, g, u
    change: Scalar = -after.model.change
    return change


def _kept(accepted: Bool[Array, ""], after: Any, before: Any) -> Any:
    """The inner state after a step that may not be taken: a rejected step resets the model and keeps the direction.

    The factors and inverses belong to the parameters before the step, so they stay valid; to restore them would copy them.
    """
    return after._replace(model=either(accepted, lambda: after.model, lambda: before.model))


def _refuse_empirical(fisher: Operator) -> None:
    """Raise `ValueError` if the curvature, or the Fisher that its views are taken of, is empirical."""
    for operator in (fisher, viewed(fisher, "kfac")):
        kinds = [part.kind for part in operator.provenance.parts or (operator.provenance,)]
        if "empirical" in kinds:
            raise ValueError(
                f"kfac: the curvature is {fisher}; expected no empirical Fisher, since its size is that of the scores at the "
                "data, whatever the loss's curvature. Give jf.exact_fisher(model)(params, x), or for many outputs "
                "jf.sampled_fisher(model)(params, key, x) or jf.implicit_fisher(model)(params, x, views_of=a sampled one)."
            )
