"""The optimiser that needs no tuning: Kronecker factors, rates from the quadratic model, damping by how well it predicts."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import optax
from jaxtyping import Array, Bool, Scalar

from jaxfisher._once import either
from jaxfisher._operators.factored import factored_solve
from jaxfisher._operators.layered import kronecker
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, viewed
from jaxfisher._solve import check_solver
from jaxfisher._transform.adapt_damping import AdaptDampingState, Rule, adapting, by_steps
from jaxfisher._transform.cheap import Offered
from jaxfisher._transform.direction import Settings, direction
from jaxfisher._transform.like import Like
from jaxfisher._transform.quadratic_model import quadratic_model
from jaxfisher._transform.scale_by_fisher import check_kept
from jaxfisher._transform.turns import Turns
from jaxfisher._tree import check_function

RULE = Rule(factor=2.0**0.5, lower_ratio=0.25, upper_ratio=0.75, lower_damping=1e-8, upper_damping=1e8)
"""How the damping adapts: in smaller steps than `adapt_damping` by default, since they average over minibatches."""


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

    .. math:: d = (K + \gamma I)^{-1} g, \quad \gamma = \max\Big(\frac{\lambda}{100}, \frac{\mathrm{tr} K}{10^4 p}\Big), \qquad
        u = -\alpha d + \mu u_{-1}, \quad \alpha, \mu = \arg\min\; g^T u + \tfrac12 u^T (F + \lambda I) u.

    It is ``chain(scale_by_fisher(view=view, decay=decay, like=like), quadratic_model(damping))`` inside an `adapt_damping`: the
    direction from K, a running mean of the factors, the length from the Fisher F of the batch itself, the damping from the
    ratio of the loss's actual decrease to the predicted one; a step that raises the batch's loss is not taken. The ratio judges
    the model that gives the length, not K: so lambda damps the length, and the direction is damped by a share of it, and by no
    less than a share of the mean eigenvalue, where lambda goes to zero.

    **In turns.** Everything is made at each of the first four steps. From then on the factors and the inverses of each layer
    have two turns in each doubling of the count of steps, until they have one at every e-th step, the layers one after the
    other so that no step is long. Alpha, mu and the ratio are made at every second step, and from the eighth on at every third.
    In between a step takes the last alpha and mu, and is no longer than the last that the model gave; it is taken unless it is
    not finite. What is not due is not run. The period e is 4, 8 or 16: the least at which the average step costs three steps of
    Adam by the count of operations in a `jaxfisher.training_step`, or up to four and a half where the batch is narrower than
    the widest layer; 8 in a loop of your own. On the digits this takes 20 or 21 steps to a loss where all at every step takes
    19 or 20, and less time. With a fixed batch only ``update_every=1`` makes sure that the loss never rises.

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
        damping: the first lambda, in the units of F.
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
        ``learning_rate``, ``momentum``, ``ratio``, ``accepted``; and ``info`` of the direction, whose residual is not
        computed, and ``measured`` false, unless a ``solver`` has it anyway.

    Raises:
        ValueError: as in `adapt_damping` and `scale_by_fisher`; (at init or update) an empirical Fisher.
        TypeError: ``solver`` or ``view`` is none.

    Reference: Martens and Grosse (ICML 2015), sections 6 and 7.

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
    # That model knows what it promised: one product with the Fisher less.
    steps = optax.chain(direction(settings), quadratic_model(damping))
    inner = adapting(steps, damping, by_steps(damping, RULE), _promised, _kept)

    def update(
        updates: Any, state: AdaptDampingState, params: Any = None, *, fisher: Any = None, **extra_args: Any
    ) -> tuple[Any, AdaptDampingState]:
        if not jax.tree.leaves(updates) or not isinstance(state, AdaptDampingState):
            # There is nothing to do, or what it says of another state.
            return inner.update(updates, state, params, fisher=fisher, **extra_args)
        count, given = state.inner[0].count, dict[str, Any]()
        if isinstance(fisher, Offered) and fisher.cheap is not None:
            cheap = fisher.cheap
            given = {"factors": partial(cheap.factors, seed, count), "forward": cheap.forward_cost()}
            fisher = cheap.products
        judged = Turns(count, settings.check_every).due()
        given["due"] = judged if judged is True else judged | (state.rejected > 0)
        return inner.update(updates, state, params, fisher=fisher, **extra_args | given)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _promised(operator: Operator, g: Any, u: Any, after: Any) -> Scalar:
    """The decrease by the quadratic model inside, which gave the step its length."""
    del operator, g, u
    return -after[1].change


def _kept(accepted: Bool[Array, ""], after: Any, before: Any) -> Any:
    """The factors and inverses stay where a step is not taken: they are of the parameters before it, and copies take long."""
    return after[0], either(accepted, lambda: after[1], lambda: before[1])


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
