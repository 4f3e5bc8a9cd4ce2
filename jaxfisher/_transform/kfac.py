"""The optimiser that needs no tuning: Kronecker factors, rates from the quadratic model, damping by how well it predicts."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
import optax
from jaxtyping import Scalar

from jaxfisher._operators.factored import factored_solve
from jaxfisher._operators.identity import relative_damping
from jaxfisher._operators.layered import kronecker
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, viewed
from jaxfisher._solve import check_solver, solve
from jaxfisher._system import SolveInfo
from jaxfisher._transform.adapt_damping import Rule, adapting
from jaxfisher._transform.like import Like
from jaxfisher._transform.quadratic_model import quadratic_model
from jaxfisher._transform.scale_by_fisher import scale_by_fisher
from jaxfisher._tree import check_function

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
    solver: Solver | None = None,
    decay: chex.Numeric | None = 0.95,
    update_every: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradients with Kronecker factors and nothing to tune: each step chooses its rate, momentum and damping.

    .. math:: d = (K + \gamma I)^{-1} g, \quad \gamma = \max\Big(\frac{\lambda}{100}, \frac{\mathrm{tr} K}{10^4 p}\Big), \qquad
        u = -\alpha d + \mu u_{-1}, \quad \alpha, \mu = \arg\min\; g^T u + \tfrac12 u^T (F + \lambda I) u.

    It is ``chain(scale_by_fisher(view=view, decay=decay, like=like), quadratic_model(damping))`` inside an `adapt_damping`: the
    direction from K, a running mean of the factors, the length from the Fisher F of the batch itself, the damping from the
    ratio of the loss's actual decrease to the predicted one; a step that raises the batch's loss is not taken. The ratio judges
    the model that gives the length, not K: so lambda damps the length, and the direction is damped by a share of it, and by no
    less than a share of the mean eigenvalue, where lambda goes to zero. Give it the exact Fisher, or, where outputs are many,
    `jaxfisher.implicit_fisher` with ``views_of`` a sampled one. The empirical one is refused: the length of the step comes from
    the Fisher's size, and that of the empirical Fisher falls with the loss, whatever the curvature::

        step = jf.training_step(model, jf.kfac())
        state = step.init(params, x, y)
        params, state, loss = jax.jit(step)(params, state, x, y)

    Args:
        like: as in `scale_by_fisher`; not needed for a state that `jaxfisher.training_step` makes.
        damping: the first lambda, in the units of F.
        view: what is averaged and inverted; `jaxfisher.kronecker_reduce`, or with ``decay=None`` `jaxfisher.eigen_kronecker`.
        solver: of the direction, with gamma its damping; None for the exact one. `jaxfisher.factored_solve` needs Cholesky
            factors in place of eigenvectors: cheaper steps, and somewhat more of them.
        decay: of the running mean, None for the batch's own view.
        update_every: as in `scale_by_fisher`.

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

    def lightly(fisher: Operator, v: Any, damping: Scalar) -> tuple[Any, SolveInfo]:
        _refuse_empirical(fisher)
        # Of a direction whose length will be damped by ``damping``.
        least = relative_damping(fisher, LEAST)
        x, info = solve(fisher, v, jnp.maximum(SHARE * damping.astype(least.dtype), least), solver)
        if solver is None or solver is factored_solve:
            # The residual takes as long to compute as x does, and the loss judges the step: it is left out.
            info = info._replace(
                residual=jnp.zeros_like(info.residual), converged=info.finite, measured=jnp.zeros_like(info.finite)
            )
        return x, info

    direction = scale_by_fisher(
        damping, view=None if view is None else checked, solver=lightly, decay=decay, update_every=update_every, like=like
    )
    # That model knows what it promised: one product with the Fisher less.
    return adapting(optax.chain(direction, quadratic_model(damping)), damping, RULE, _promised)


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
