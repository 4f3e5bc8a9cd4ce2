"""Natural gradients: drop-ins for `jax.grad` and `jax.value_and_grad`."""

from __future__ import annotations

import numbers
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, Shaped

from jaxfisher._cholesky import TRAINING, training_solve
from jaxfisher._examples import Batch, make_batch, needs_data
from jaxfisher._fisher import FisherFunction
from jaxfisher._model import LOG_PROB, LogProb, mean_loss, of_one_example
from jaxfisher._once import Static, once_for
from jaxfisher._operators.damping import Damping, is_one_damping
from jaxfisher._operators.from_scores import FromScores
from jaxfisher._operators.operator import VIEW, Operator, Solver, View, as_operator
from jaxfisher._pieces import sum_batches
from jaxfisher._provenance import mean_over
from jaxfisher._scores import values_and_scores
from jaxfisher._solve import check_solver
from jaxfisher._targets import given_with, taken_by
from jaxfisher._tree import cast_like, check_function, split
from jaxfisher._values import check_nonnegative, described, is_known_zero, nonnegative


class NaturalGradFunction(Protocol):
    """``(params, *data, weights=None, counts=None) -> d``, a pytree like the parameters."""

    def __call__(
        self,
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Any: ...


class ValueAndNaturalGradFunction(Protocol):
    """``(params, *data, weights=None, counts=None) -> (L, d)``."""

    def __call__(
        self,
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> tuple[Scalar, Any]: ...


def natural_grad(
    log_prob: LogProb,
    fisher: FisherFunction | None = None,
    *,
    damping: Damping,
    view: View | None = None,
    solver: Solver | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    rtol: float | None = None,
) -> NaturalGradFunction:
    r"""The natural gradient of the mean negative log-likelihood, as a drop-in for `jax.grad`.

    .. math:: d = (F + \lambda I)^{-1} \nabla L(\theta), \qquad L = -\frac1n \sum_i \log p_\theta(x_i).

    ``-d`` is the direction of steepest descent when distance is the KL divergence between predictions: among steps that move
    the predictions by at most ``c``, the linearised loss is least at ``-sqrt(2c / g^T F^-1 g) F^-1 g``. So ``d`` is what you
    *subtract*: ``theta - lr * d``.

    With ``fisher=None`` F is the *empirical* Fisher of the same data, and one backward pass serves both F and the gradient
    (solved in the space of examples if that is smaller). To train, give an exact or sampled Fisher.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        fisher: a Fisher function such as ``jf.exact_fisher(model)``, which is called with the data without their last entry,
            the target; or a function of your own, ``(params, *data) -> operator``, called with all of the data.
        damping: ``>= 0``, absolute, in the units of F; or a pytree like the parameters with one number above zero a leaf. A
            Python zero asks for the minimum-norm solution. An array should be above zero if F is held as scores. With
            ``fisher=None``, if scores are linearly dependent to rounding, a damping below eps times the largest squared score
            (over n) is raised to that; otherwise see `Cholesky`.
        view: a view applied to the operator before it is inverted, such as `jaxfisher.diagonal`.
        solver: as in `jaxfisher.solve`, such as ``jf.CG(rtol=1e-2, preconditioner=jf.kronecker)``. None takes the exact route;
            a Fisher held as scores is then solved as accurately as training needs, by ``jf.Cholesky(rtol=1e-3)``.
        batch_size: bound memory by running the model on chunks of at most this many examples.
        max_bytes: with ``fisher=None``, as in `jaxfisher.scores`, instead of a ``batch_size``.
        rtol: with ``fisher=None`` and a positive damping, the residual of the solve, relative to the gradient. None stands for
            ``1e-3``, which serves training (a standard error needs 1e-5). The solution is refined only if one factorisation
            leaves more. With ``math.inf`` it is never refined: the program is the smallest, and compiles in half the time.

    Returns:
        A function ``(params, *data, weights=None, counts=None)``; the result is a pytree like the parameters, in their dtypes.
        ``counts`` as in `exact_fisher`: L and F are means over terms.

    Raises:
        ValueError: a negative damping, or an ``rtol`` that is not above zero or has no effect beside a ``fisher``, ``view``,
            ``solver`` or damping by leaf; (when called) arrays of different lengths, a ``log_prob`` that returns no scalar or
            is a batch mean.
        TypeError: (when called) ``fisher`` or ``view`` returns no operator; a parameter that is not a floating array.

    Reference: Amari (Neural Computation 1998), theorem 1; Martens (JMLR 2020), section 6.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda theta: jf.Normal(theta, 2.0)
    >>> step = jf.natural_grad(jf.log_likelihood(model), jf.exact_fisher(model), damping=0.0)
    >>> print(0.0 - step(0.0, jnp.array([1.0, 3.0])))  # one step to the maximum-likelihood mean
    2.0
    """
    both = value_and_natural_grad(
        log_prob, fisher, damping=damping, view=view, solver=solver, batch_size=batch_size, max_bytes=max_bytes, rtol=rtol
    )

    def direction(
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Any:
        return both(params, *data, weights=weights, counts=counts)[1]

    return direction


def value_and_natural_grad(
    log_prob: LogProb,
    fisher: FisherFunction | None = None,
    *,
    damping: Damping,
    view: View | None = None,
    solver: Solver | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    rtol: float | None = None,
) -> ValueAndNaturalGradFunction:
    r"""The loss and its natural gradient, as a drop-in for `jax.value_and_grad`.

    .. math:: (L, d), \qquad L = -\frac1n \sum_i \log p_\theta(x_i), \qquad d = (F + \lambda I)^{-1} \nabla L(\theta).

    Arguments and errors are those of `natural_grad`. ``L`` is in nats, a mean over examples.

    Reference: Amari (Neural Computation 1998), theorem 1.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda theta: jf.Exponential(log_rate=theta))
    >>> loss, d = jf.value_and_natural_grad(log_prob, damping=1.0)(0.0, jnp.array([1.0, 3.0]))
    >>> print(loss, d.round(6))  # scores 0 and -2: F = 2, gradient 1
    2.0 0.333333
    """
    _check_arguments(log_prob, fisher, damping, view, solver, max_bytes)
    if rtol is not None:
        _check_rtol(rtol, {"fisher": fisher, "view": view, "solver": solver})

    def value_and_direction(
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> tuple[Scalar, Any]:
        needs_data(data, "natural_grad")
        batch = make_batch(params, data, weights, batch_size, max_bytes, counts)
        if fisher is None:
            values, scores = values_and_scores(log_prob, params, batch)
            form = FromScores(scores)
            operator: Any = Operator(form, mean_over("empirical", batch))
            loss = -jnp.sum(scores.weights * values)
            one = is_one_damping(damping, scores.spec)
            if rtol is not None and not one:
                raise ValueError("`rtol` is given with a damping by leaf, on which it has no effect: leave it out.")
            if view is None and solver is None and one and not is_known_zero(damping, scores.spec.dtype):
                return loss, cast_like(_direction(form, damping, TRAINING.rtol if rtol is None else float(rtol)), params)
            gradient = scores.rmv(-scores.weights)
        else:
            loss, gradient = _value_and_grad(log_prob, params, batch)
            operator = _called(fisher, params, data, {"weights": weights, "counts": counts})
        operator = as_operator(operator, "natural_grad: `fisher`")
        where = batch.spec.mismatch(operator.spec.treedef, operator.spec.paths, operator.spec.shapes)
        if where is not None:
            raise ValueError(
                f"natural_grad: `fisher` returned {operator}, which is not over `params`: {where}. "
                "Make it at the parameters that `fisher` is called with."
            )
        if view is not None:
            operator = as_operator(view(operator), "natural_grad: `view`")
        return loss, cast_like(training_solve(operator, gradient, damping, solver)[0], params)

    return value_and_direction


def _check_arguments(log_prob: Any, fisher: Any, damping: Any, view: Any, solver: Any, max_bytes: int | None) -> None:
    """Raise for mistakes that can be seen before there are data."""
    for leaf in jax.tree.leaves(damping, is_leaf=lambda leaf: leaf is None):
        check_nonnegative("damping", leaf)
    check_solver(solver)
    check_function("log_prob", log_prob, LOG_PROB)
    if fisher is not None:
        check_function("fisher", fisher, "(params, *data) -> operator; with an operator you already have, use jf.solve")
    if view is not None:
        check_function("view", view, VIEW)
    if fisher is not None and max_bytes is not None:
        raise ValueError(
            "`max_bytes` is given with a `fisher`, which takes its own. Give it to the Fisher, as in "
            "jf.exact_fisher(model, max_bytes=...), and give a `batch_size` here for the gradient."
        )


def _check_rtol(rtol: Any, others: dict[str, Any]) -> None:
    """Raise unless ``rtol`` is a Python number above zero, and the solve is the exact one that it applies to."""
    if isinstance(rtol, bool) or not isinstance(rtol, numbers.Real) or not float(rtol) > 0:
        raise ValueError(
            f"`rtol` is {described(rtol)}; expected a Python number above zero, such as 1e-5, or None for {TRAINING.rtol}."
        )
    given = [name for name, other in others.items() if other is not None]
    if given:
        raise ValueError(
            f"`rtol` is given with `{given[0]}`, on which it has no effect: only the exact solve of the empirical Fisher takes "
            "it. Leave it out, or give a solver that has one, such as jf.Cholesky(rtol=1e-5)."
        )


def _direction(form: FromScores, damping: chex.Numeric, rtol: float) -> Any:
    """The solve for the gradient of the mean loss: minus the mean of the scores, so its coordinates in the rows are all -1."""
    dtype = form.spec.dtype
    ones = jnp.ones(form.scores.num_rows, dtype)
    return form.solve_row_space(-ones, nonnegative("damping", damping, dtype), Static(rtol))


def _called(fisher: FisherFunction, params: chex.ArrayTree, data: tuple[Any, ...], given: dict[str, Any]) -> Operator:
    """The operator that ``fisher`` returns for this data; an error of that call gets a note about its arguments."""
    taken = taken_by(fisher, data, data)
    keywords = given_with(taken, given)
    try:
        return fisher(params, *taken, **keywords)
    except TypeError as error:
        words = "".join(f" and {name}=" for name in keywords)
        error.add_note(
            f"jaxfisher.natural_grad called `fisher` with the parameters, all {len(data)} entries of the data{words}. "
            "An exact Fisher takes no targets: give jf.exact_fisher(model) itself, or lambda params, x, y: "
            "jf.exact_fisher(model)(params, x)."
        )
        raise


@once_for
def _value_and_grad(log_prob: LogProb, params: chex.ArrayTree, batch: Batch) -> tuple[Scalar, Any]:
    """The mean negative log-likelihood and its plain gradient, in the statistics dtype."""

    def piece(omega: Float[Array, " n"], *data: Any) -> tuple[Scalar, Any]:
        value, gradient = jax.value_and_grad(mean_loss, argnums=1)(log_prob, split(params), data, omega)
        return value, batch.spec.tree(batch.spec.leaves(gradient, "gradient"))

    with of_one_example(log_prob, "log_prob", params, batch.data):
        total: tuple[Scalar, Any] = sum_batches(piece, (batch.weights, *batch.data), batch.batch_size)
    return total
