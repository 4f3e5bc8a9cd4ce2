"""Continual learning and merging: the Fisher at one optimum as a penalty in later training, and as a weight in averages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from jaxfisher._operators.damping import Damping
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, as_operator
from jaxfisher._solve import solve
from jaxfisher._system import SolveInfo
from jaxfisher._tree import cast_like, check_function
from jaxfisher._values import described, nonnegative


def ewc_penalty(fisher: Operator, anchor: chex.ArrayTree, strength: chex.Numeric = 1.0) -> Callable[[Any], Scalar]:
    r"""Elastic weight consolidation: the penalty for moving away from the parameters of an earlier task.

    .. math:: \theta \mapsto \frac{c}{2} (\theta - \theta^*)^T F (\theta - \theta^*).

    To second order it is ``c`` times the KL divergence by which predictions move, in nats per example of the earlier task. For
    n examples whose mean is F, the log-posterior is ``-n/2 (theta - theta*)^T F (theta - theta*)`` (Laplace). So beside the
    *mean* loss of m new examples, that posterior has strength ``n / m``. In practice the strength is tuned.

    F may have any form: `jaxfisher.diagonal` is EWC as published, and `jaxfisher.kronecker` keeps correlations within a layer.
    For a sequence of tasks add the penalties of all tasks. Or keep one Fisher, with the last optimum as its anchor: ``F =
    view(decay * F + F_new)`` (online EWC), or `jaxfisher.merge` of views for the mean over the examples of all tasks. For a
    diagonal or a matrix the sum has the form of its terms; for Kronecker views ``jf.kronecker(F + F_new)`` is one again.

    **When it is the wrong one.** It is a quadratic about an optimum: far from it, or if training had not converged, it holds
    parameters that need not be held. F is a mean of squares over *examples*: the square of a batch's mean gradient is another
    matrix, smaller by about the size of the batch, and near an optimum it is noise.

    Args:
        fisher: the Fisher of the earlier task, at ``anchor``.
        anchor: the parameters theta* at the end of the earlier task.
        strength: c ``>= 0``; if c is only known at run time to be negative, the penalty is NaN.

    Returns:
        A function of parameters that returns a scalar, to be added to a mean loss. Its gradient costs a product with F.

    Raises:
        TypeError: ``fisher`` is no operator.
        ValueError: a negative ``strength``, an ``anchor`` (when called: parameters) of another structure or shape.

    Reference: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks (PNAS 2017), equation 3; Ritter, Botev
    and Barber, Online structured Laplace approximations for overcoming catastrophic forgetting (NeurIPS 2018), equation 8.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x * w, 1.0))(2.0, jnp.array([1.0, 3.0]))  # 5
    >>> penalty = jf.ewc_penalty(F, anchor=2.0, strength=0.5)
    >>> print(penalty(4.0), jax.grad(penalty)(4.0))
    5.0 5.0
    """
    fisher = as_operator(fisher, "ewc_penalty: `fisher`")
    strength = nonnegative("strength", strength, fisher.spec.dtype)
    held = fisher.spec.vector(anchor, "anchor")

    def penalty(params: chex.ArrayTree) -> Scalar:
        moved = jax.tree.map(jnp.subtract, fisher.spec.vector(params, "params"), held)
        return 0.5 * strength * fisher.quadratic(moved)

    return penalty


def fisher_average(
    models: Sequence[chex.ArrayTree],
    fishers: Sequence[Operator],
    damping: Damping = 0.0,
    *,
    view: View | None = None,
    solver: Solver | None = None,
) -> tuple[Any, SolveInfo]:
    r"""Merge models: the parameters nearest to all of them, with each direction weighted by the models' Fishers.

    .. math:: \hat\theta = \arg\min_\theta \sum_k \tfrac12 (\theta - \theta_k)^T F_k (\theta - \theta_k) + \tfrac\lambda2
        |\theta - \bar\theta|^2 = \bar\theta + \Big(\sum_k F_k + \lambda I\Big)^{-1} \sum_k F_k (\theta_k - \bar\theta),

    where :math:`\bar\theta` is the plain mean of the models. At damping zero it is ``(sum F_k)^-1 sum F_k theta_k``; directions
    that no model's data determine stay at the mean. It is the mode of the product of the models' Laplace posteriors; for models
    that are linear in their parameters, with Gaussian noise, it is the fit to all of the data. The Fishers are means: if the
    models saw different numbers of examples, give ``n_k * F_k``.

    Diagonal views merge entry by entry, which is Fisher-weighted averaging as published. Scores, matrices and blocks are merged
    by an exact solve. A sum of Kronecker products is no Kronecker product: ``view=jf.kronecker`` solves with the one product
    nearest to the sum, at the cost of its factors. For two models ``solver=jf.factored_solve`` solves with the sum itself,
    also from the factors: exactly at damping zero, else with KFAC's own damping. For any number of models ``solver=
    jf.CG(preconditioner=jf.kronecker)`` solves exactly. Without any of these the matrix of each layer is made.

    **When it is the wrong one.** It adds up quadratics about each model: models from different initialisations, whose units are
    permuted, have no useful mean. Fine-tune from one start, or align the units first.

    Args:
        models: the parameters theta_k, one pytree a model.
        fishers: F_k, one a model, at its parameters.
        damping: lambda, as in `jaxfisher.solve`; it pulls towards the plain mean.
        view: a view of the sum of the Fishers, for the solve; None for the sum itself.
        solver: as in `jaxfisher.solve`.

    Returns:
        ``(params, info)``, the merged parameters in the dtypes of the first model and the `SolveInfo` of the solve.

    Raises:
        ValueError: no model, another number of Fishers, models or Fishers over other parameters; as in `jaxfisher.solve`.
        TypeError: an entry of ``fishers`` is no operator.

    Reference: Matena and Raffel, Merging models with Fisher-weighted averaging (NeurIPS 2022), equation 4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> fisher = jf.exact_fisher(lambda w, x: jf.Normal(x * w, 1.0))
    >>> F, G = fisher(1.0, jnp.array([1.0])), fisher(2.0, jnp.array([1.0, 2.0, 2.0]))  # 1 and 3
    >>> print(jf.fisher_average([1.0, 2.0], [F, G])[0])  # (1 + 3 * 2) / 4
    1.75
    """
    if not isinstance(models, list | tuple) or not isinstance(fishers, list | tuple) or not models:
        raise ValueError(
            f"fisher_average: `models` is {described(models)} and `fishers` {described(fishers)}; expected a list of "
            "parameters and a list of Fishers, of at least one model."
        )
    if len(models) != len(fishers):
        raise ValueError(f"fisher_average: there are {len(models)} `models` for {len(fishers)} `fishers`; give one for each.")
    if view is not None:
        check_function("view", view, VIEW)
    operators = [as_operator(fisher, f"fisher_average: `fishers[{k}]`") for k, fisher in enumerate(fishers)]
    spec = operators[0].spec
    for k, fisher in enumerate(operators):
        spec.check_same(
            fisher.spec, f"fisher_average: cannot merge `fishers[0]`, {operators[0]}, with `fishers[{k}]`, {fisher}"
        )
    held = [spec.vector(model, f"models[{k}]") for k, model in enumerate(models)]
    mean = _scaled(1 / len(held), functools.reduce(_added, held))
    pulls = [fisher.mv(_added(model, _scaled(-1.0, mean))) for fisher, model in zip(operators, held, strict=True)]
    whole = functools.reduce(Operator.__add__, operators)
    moved, info = solve(whole if view is None else view(whole), functools.reduce(_added, pulls), damping, solver)
    return cast_like(_added(mean, moved), models[0]), info


def _added(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _scaled(factor: float, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: factor * leaf, tree)
