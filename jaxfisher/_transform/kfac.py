"""The optimiser that needs no tuning: Kronecker factors, rates from the quadratic model, damping by how well it predicts."""

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
from jaxfisher._transform.quadratic_model import QuadraticModelState, quadratic_model
from jaxfisher._transform.scale_by_fisher import ScaleByFisherState, check_kept
from jaxfisher._transform.turns import Turns
from jaxfisher._transform.update_arguments import check_state, fisher_for
from jaxfisher._tree import check_function, param_spec

RULE = Rule(factor=2.0**0.5, lower_ratio=0.25, upper_ratio=0.75, lower_damping=1e-8, upper_damping=1e8)
"""How the damping adapts: in smaller steps than `adapt_damping` by default, since they average over minibatches."""
START, FACTOR = 0.5, 1.5
"""The first kappa, and by how much it changes at a time.

It falls by the square of that where it fell the last time too: what asks for less twice in a row is seldom noise, and
where K is near the Fisher it has far to fall. Where batches are small it is asked to rise, time after time, and must not fall
back fast.
"""
LEAST, MOST = 1e-6, 10.0
"""The bounds of gamma, in mean eigenvalues of K: below, what is inverted is singular in float32; above, the direction is nearly
the gradient.

On noisy batches a large lambda would drive it there.
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

    It is ``chain(scale_by_fisher(view=view, decay=decay, like=like), quadratic_model(damping))`` inside an `adapt_damping`: the
    direction from K, a running mean of the factors, the length from the Fisher F of the batch itself, the damping from the
    ratio of the loss's actual decrease to the predicted one; a step that raises the batch's loss is not taken.

    **Two dampings.** The ratio judges the model that gives the length, not K: so lambda damps the length only. What is wrong
    with K, and how noisy the batch is, shows in the decrease that the model promises along ``d``, and gamma follows that:

    .. math:: D(\gamma) = \frac{(g^T d)^2}{2\, d^T (F + \lambda I) d}, \qquad
        \kappa \leftarrow \begin{cases} 1.5\, \kappa & D'(\gamma) > 0 \\ \kappa / 1.5 & D'(\gamma) < 0 \end{cases}, \qquad
        \frac{\partial d}{\partial \gamma} = -(K + \gamma I)^{-1} d,

    with ``kappa / n`` within ``[1e-6, 10]``; it falls by ``1.5^2`` where it fell the last time too. A gamma is a prior that is
    worth kappa examples of mean curvature beside the n of the batch, and the first is worth half of one: the fewer examples,
    the less their gradient says. The derivative takes one more product with the inverse and half a one with F, where the model
    is made. With a `jaxfisher.factored_solve`, ``K + gamma I`` is there what that inverts.

    **In turns.** Everything is made at each of the first four steps. From then on the factors and the inverses of each layer
    have two turns in each doubling of the count of steps, until they have one at every e-th step, the layers one after the
    other so that no step is long. Alpha, mu and the ratio are made at every second step, and from the eighth on at every third.
    In between a step takes the last alpha and mu, and is no longer than the last that the model gave; it is taken unless it is
    not finite. What is not due is not run. The period e is 4, 8 or 16: the least at which the average step costs three steps of
    Adam by the count of operations in a `jaxfisher.training_step`, inverses as they were timed, or up to four and a half where
    the batch is narrower than the widest layer; 8 in a loop of your own. On the digits this takes 16 to 19 steps to a loss
    where all at every step takes 14 to 16, and less time. With a fixed batch only ``update_every=1`` makes sure that the loss
    never rises.

    In `jaxfisher.training_step`, unless that is given a Fisher, the products are exact and the factors cheap: of the exact
    Fisher where an example has one or two rows in it, else of one target drawn from the model for each example, by a key that
    ``seed``, the count in the state and the example's place make. The exact route is an option:
    ``training_step(model, jf.kfac(solver=None, update_every=1), jf.exact_fisher(model))``. In a loop of your own, give that
    Fisher, or `jaxfisher.implicit_fisher` with ``views_of`` a sampled one. The empirical one is refused: the length of the
    step comes from the Fisher's size, and that of the empirical Fisher falls with the loss, whatever the curvature::

        step = jf.training_step(model, jf.kfac())
        state = step.init(params, x, y)
        params, state, loss = jax.jit(step)(params, state, x, y)

    Args:
        like: as in `scale_by_fisher`; not needed for a state that `jaxfisher.training_step` makes.
        damping: the first lambda, in the units of F; the first gamma depends on K alone.
        view: what is averaged and inverted; `jaxfisher.kronecker_reduce`, or with ``decay=None`` `jaxfisher.eigen_kronecker`.
        solver: of the direction, with gamma its damping. `jaxfisher.factored_solve` takes two Cholesky factors a layer, and
            is exact for views without Kronecker factors; None for ``(K + gamma I)^-1`` itself, by eigenvectors.
        decay: of the running mean, None for the batch's own view.
        update_every: the period e; 1 makes everything at every step, and 2 the model and the ratio at every second. None counts
            it, and without a ``decay`` is 1.
        seed: of the targets that are drawn.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``fisher``, ``value_fn`` and, if known,
        ``value``: what `jaxfisher.training_step` gives, also where `optax.partition` gives it a part of the parameters: then
        the loss is judged as a function of that part. Its updates are negated. Read `optax.tree.get` of its state:
        ``learning_rate``, ``momentum``, ``ratio``, ``accepted``, ``direction_damping``, which is kappa; and ``info`` of the
        direction, whose residual is not computed, and ``measured`` false, unless a ``solver`` has it anyway.

    Raises:
        ValueError: as in `adapt_damping` and `scale_by_fisher`; (at init or update) an empirical Fisher.
        TypeError: ``solver`` or ``view`` is none.

    Reference: Martens and Grosse (ICML 2015), sections 6 and 7; section 6.6 chooses gamma of three values by the same model.

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

    settings = Settings(checked, solver, decay, update_every, like)
    inner = adapting(_steps(settings, damping), damping, by_steps(damping, RULE), _promised, _kept)

    def update(
        updates: Any, state: AdaptDampingState, params: Any = None, *, fisher: Any = None, **extra_args: Any
    ) -> tuple[Any, AdaptDampingState]:
        if not jax.tree.leaves(updates) or not isinstance(state, AdaptDampingState):
            # There is nothing to do, or what it says of another state.
            return inner.update(updates, state, params, fisher=fisher, **extra_args)
        count, given = state.inner.direction.count, dict[str, Any]()
        if isinstance(fisher, Offered) and fisher.cheap is not None:
            cheap = fisher.cheap
            given = {"factors": partial(cheap.factors, seed, count), "forward": cheap.forward_cost()}
            fisher = cheap.products
        judged = Turns(count, settings.check_every).due()
        given["due"] = judged if judged is True else judged | (state.rejected > 0)
        return inner.update(updates, state, params, fisher=fisher, **extra_args | given)

    return optax.GradientTransformationExtraArgs(inner.init, update)


class KfacState(NamedTuple):
    """What is inside the `AdaptDampingState` of `kfac`.

    Attributes:
        direction: the running mean of the view, and what is held to solve with it.
        model: the quadratic model that gave the step its length.
        direction_damping: kappa of the next direction, whose gamma is ``kappa / n`` mean eigenvalues of K.
        fell: whether that fell when it last changed.
    """

    direction: ScaleByFisherState
    model: QuadraticModelState
    direction_damping: Float[Array, ""]
    fell: Bool[Array, ""]


def _steps(settings: Settings, damping: chex.Numeric) -> optax.GradientTransformationExtraArgs:
    """A direction, the length that the quadratic model gives it, and the damping of the next direction."""
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
        # What is no mean over examples weighs as much as one.
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
    """Up where that would have made the model promise more, down where less would; as it is where nothing is known."""
    down = jnp.where(fell, FACTOR**2, FACTOR)
    change = jnp.where(gain > 0, FACTOR, jnp.where(gain < 0, 1 / down, 1.0))
    return (kappa * change).astype(kappa.dtype), jnp.where(gain == 0, fell, gain < 0)


def _promised(operator: Operator, g: Any, u: Any, after: Any) -> Scalar:
    """The decrease by the quadratic model inside, which gave the step its length: one product with the Fisher less."""
    del operator, g, u
    change: Scalar = -after.model.change
    return change


def _kept(accepted: Bool[Array, ""], after: Any, before: Any) -> Any:
    """The factors and inverses stay where a step is not taken: they are of the parameters before it, and copies take long."""
    return after._replace(model=either(accepted, lambda: after.model, lambda: before.model))


def _refuse_empirical(fisher: Operator) -> None:
    """Raise `ValueError` where the curvature, or what its views are taken of, is an empirical Fisher."""
    for operator in (fisher, viewed(fisher, "kfac")):
        kinds = [part.kind for part in operator.provenance.parts or (operator.provenance,)]
        if "empirical" in kinds:
            raise ValueError(
                f"kfac: the curvature is {fisher}; expected no empirical Fisher, whose size is that of the scores at the data, "
                "whatever the loss's curvature. Give jf.exact_fisher(model)(params, x), or where outputs are many "
                "jf.sampled_fisher(model)(params, key, x) or jf.implicit_fisher(model)(params, x, views_of=a sampled one)."
            )
