"""The optimiser that needs no tuning: Kronecker factors, rates from the quadratic model, damping by how well it predicts."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Scalar

from jaxfisher._operators.factored import InvertedBlocks, factored_inverse, factored_solve, has_factors
from jaxfisher._operators.identity import relative_damping
from jaxfisher._operators.layered import kronecker
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, viewed
from jaxfisher._solve import check_solver, solve
from jaxfisher._system import SolveInfo
from jaxfisher._transform.adapt_damping import AdaptDampingState, Rule, adapting, by_steps
from jaxfisher._transform.cheap import Offered
from jaxfisher._transform.like import Like
from jaxfisher._transform.quadratic_model import quadratic_model
from jaxfisher._transform.scale_by_fisher import Settings, factorised_operator, preconditioner
from jaxfisher._tree import all_finite, check_function

SHARE = 1e-2
"""The damping of the direction, as a share of that of the length: the best of a few powers of ten on four tasks."""
LEAST = 1e-4
"""The least damping of the direction, in mean eigenvalues of the operator that is inverted."""
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

    In `jaxfisher.training_step`, unless that is given a Fisher, the products are exact and the factors cheap: of the exact
    Fisher where an example has one or two rows in it, else of one target drawn from the model for each example, by a key that
    is folded from ``seed`` and the count in the state. The exact route is an option:
    ``training_step(model, jf.kfac(solver=None), jf.exact_fisher(model))``. In a loop of your own, give that Fisher, or
    `jaxfisher.implicit_fisher` with ``views_of`` a sampled one. The empirical one is refused: the length of the step comes from
    the Fisher's size, and that of the empirical Fisher falls with the loss, whatever the curvature::

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
        update_every: as in `scale_by_fisher`. Between refreshes the damped inverses are held, and neither factors nor inverses
            are computed; the damping of the length still follows every step.
        seed: of the targets that are drawn.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``fisher``, ``value_fn`` and, if known,
        ``value``: what `jaxfisher.training_step` gives. Its updates are negated. Read `optax.tree.get` of its state:
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
    if view is not None:
        check_function("view", view, VIEW)

    def checked(fisher: Operator) -> Operator:
        _refuse_empirical(fisher)
        assert view is not None
        return view(fisher)

    def hold(operator: Operator, damping: chex.Numeric) -> Operator:
        return _held(operator, damping) if solver is factored_solve else factorised_operator(operator, damping)

    settings = Settings(
        damping,
        None if view is None else checked,
        1.0,
        partial(_lightly, solver),
        decay,
        update_every,
        momentum=None,
        like=like,
    )
    direction = preconditioner(settings, hold)
    # That model knows what it promised: one product with the Fisher less.
    inner = adapting(optax.chain(direction, quadratic_model(damping)), damping, by_steps(damping, RULE), _promised)

    def update(
        updates: Any, state: AdaptDampingState, params: Any = None, *, fisher: Any = None, **extra_args: Any
    ) -> tuple[Any, AdaptDampingState]:
        if isinstance(fisher, Offered) and fisher.cheap is not None and isinstance(state, AdaptDampingState):
            fisher = partial(fisher.cheap, jax.random.fold_in(jax.random.key(seed), state.inner[0].count))
        return inner.update(updates, state, params, fisher=fisher, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _gamma(fisher: Operator, damping: chex.Numeric) -> Scalar:
    """The damping of a direction whose length will be damped by ``damping``."""
    least = relative_damping(fisher, LEAST)
    return jnp.maximum(SHARE * jnp.asarray(damping).astype(least.dtype), least)


def _held(operator: Operator, damping: chex.Numeric) -> Operator:
    """The damped inverses of its blocks, where they have Kronecker factors; else what is solved with at any damping."""
    inverse = factored_inverse(operator.form, _gamma(operator, damping))
    if inverse is None:
        return factorised_operator(operator, damping)
    return Operator(inverse, operator.provenance)


def _lightly(solver: Solver | None, fisher: Operator, v: Any, damping: Scalar) -> tuple[Any, SolveInfo]:
    """The direction, and a report whose residual is left out: to compute it takes as long, and the loss judges the step."""
    _refuse_empirical(fisher)
    if isinstance(fisher.form, InvertedBlocks):
        x = fisher.mv(v)
        finite = all_finite(x)
        nothing, size = jnp.zeros((), fisher.spec.dtype), jnp.asarray(fisher.size, jnp.int32)
        no = jnp.zeros_like(finite)
        return x, SolveInfo(nothing, jnp.zeros((), jnp.int32), finite, finite, size, no, no)
    usual = solver is None or solver is factored_solve
    # Not every view has factors to damp, and what is solved for exactly needs none.
    by = None if solver is factored_solve and not has_factors(fisher.form) else solver
    x, info = solve(fisher, v, _gamma(fisher, damping), by)
    if usual:
        info = info._replace(
            residual=jnp.zeros_like(info.residual), converged=info.finite, measured=jnp.zeros_like(info.finite)
        )
    return x, info


def _promised(operator: Operator, g: Any, u: Any, after: Any) -> Scalar:
    """The decrease by the quadratic model inside, which gave the step its length."""
    del operator, g, u
    return -after[1].change


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
