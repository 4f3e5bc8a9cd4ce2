"""Searching designs with the largest criterion: weights by moving mass between candidates, runs by exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._once import Static, once_for
from jaxfisher._tree import HIGHEST, check_function
from jaxfisher._values import count_of, described, nonnegative
from jaxfisher._varying import while_loop

Criterion = Callable[[Array], Scalar]
CRITERION = "information [p, p] -> scalar, such as jf.design.d_criterion"
HALVINGS = 50
"""The number of bisections for the part of a weight that moves."""


class Design(NamedTuple):
    """A design as weights of candidates.

    Attributes:
        weights: the weights of the candidates, shape ``[m]``, which sum to one.
        value: the criterion of the design's information.
        gap: the bound of the equivalence theorem: no design has a criterion above ``value + gap``.
        converged: whether the gap is at most the tolerance.
    """

    weights: Float[Array, " m"]
    value: Scalar
    gap: Scalar
    converged: Bool[Array, ""]


class Exchanged(NamedTuple):
    """A design as a list of runs.

    Attributes:
        runs: the candidate of each run, shape ``[k]``.
        value: the criterion of the sum of their informations.
        converged: whether the value is finite, and no exchange of one run makes it larger.
    """

    runs: Int[Array, " k"]
    value: Scalar
    converged: Bool[Array, ""]


def optimal_weights(
    informations: Float[Array, "m p p"], criterion: Criterion, *, atol: chex.Numeric | None = None, max_steps: int = 2000
) -> Design:
    r"""The weights of candidates that maximise a criterion: the approximate optimal design.

    .. math:: \max_w \Phi\Big(\sum_k w_k M_k\Big), \qquad
        \Phi^* - \Phi \le \max_k \frac{\partial \Phi}{\partial w_k} - \sum_k w_k \frac{\partial \Phi}{\partial w_k}.

    Each step moves weight from the candidate in use with the smallest derivative to the one with the largest, as far as the
    criterion rises. The right-hand side is the gap.

    **When it is the wrong tool.** Weights are shares of many runs. For a few runs, use `jaxfisher.design.exchange`.

    Args:
        informations: the information of one measurement at each of m candidates, shape ``[m, p, p]``, as
            `jaxfisher.design.informations` returns it.
        criterion: a concave function of the information that increases with it.
        atol: the gap at which the search stops, in the units of the criterion. None stands for a millionth of
            ``|sum_k w_k dPhi / dw_k|``: of p for `d_criterion`, of the value for `a_criterion` and `e_criterion`.
        max_steps: the most steps.

    Returns:
        A `jaxfisher.design.Design`.

    Raises:
        ValueError: informations of another shape, a negative tolerance, a number of steps below one.
        TypeError: ``criterion`` is not a function.

    Reference: Kiefer and Wolfowitz, The equivalence of two extremum problems (1960); Boehning, A vertex-exchange-method in
    D-optimal design theory (1986).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import design
    >>> x = jnp.linspace(-1, 1, 5)
    >>> M = design.informations(lambda p, x: jf.Normal(p[0] + p[1] * x, 1.0))(jnp.zeros(2), x)
    >>> print(design.optimal_weights(M, design.d_criterion).weights.round(3))  # a line is best measured at its ends
    [0.5 0.  0.  0.  0.5]
    """
    matrices = _checked(informations, criterion, "optimal_weights")
    steps = count_of("optimal_weights: `max_steps`", max_steps, "a whole number,")
    gap = nonnegative("atol", 0.0 if atol is None else atol, matrices.dtype)
    share = jnp.asarray(1e-6 if atol is None else 0.0, matrices.dtype)
    found: Design = _weighted(criterion, matrices, gap, share, Static(steps))
    return found


@once_for
def _weighted(criterion: Criterion, matrices: Array, atol: Scalar, rtol: Scalar, steps: Static[int]) -> Design:
    """The search of `optimal_weights`, to a gap of ``atol`` plus ``rtol`` times the worth of all weights together."""

    def of(weights: Float[Array, " m"]) -> Scalar:
        return criterion(jnp.tensordot(weights, matrices, 1, precision=HIGHEST))

    def look(weights: Float[Array, " m"]) -> tuple[Array, Scalar, Bool[Array, ""]]:
        slopes = jax.grad(of)(weights)
        worth = jnp.vdot(weights, slopes)
        gap = jnp.max(slopes) - worth
        return slopes, gap, gap <= atol + rtol * jnp.abs(worth)

    def step(state: Any) -> Any:
        count, weights, slopes, *_ = state
        gains, loses = jnp.argmax(slopes), jnp.argmin(jnp.where(weights > 0, slopes, jnp.inf))
        places = jnp.arange(weights.size)
        direction = jnp.where(places == gains, 1, 0) - jnp.where(places == loses, 1, 0)
        direction = direction.astype(weights.dtype)

        def halve(_: int, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            low, high = ends
            middle = 0.5 * (low + high)
            rises = jax.jvp(of, (weights + middle * direction,), (direction,))[1] > 0
            return jnp.where(rises, middle, low), jnp.where(rises, high, middle)

        most = weights[loses]
        all_of_it = jax.jvp(of, (weights + most * direction,), (direction,))[1] > 0
        low, _ = jax.lax.fori_loop(0, HALVINGS, halve, (jnp.zeros_like(most), most))
        moved = jnp.where(all_of_it, most, low)
        new = weights + moved * direction
        new = jnp.where((places == loses) & all_of_it, 0, new)
        new = new / jnp.sum(new)
        return count + 1, new, *look(new), moved > 0

    uniform = jnp.full(matrices.shape[0], 1 / matrices.shape[0], matrices.dtype)
    begin = jnp.zeros((), jnp.int32), uniform, *look(uniform), jnp.ones((), bool)
    going = lambda state: state[5] & ~state[4] & (state[0] < steps.value)  # noqa: E731
    _, weights, _, gap, near, _ = while_loop(going, step, begin)
    return Design(weights, of(weights), gap, near)


def exchange(
    informations: Float[Array, "m p p"], criterion: Criterion, start: Int[Array, " k"], *, max_steps: int = 200
) -> Exchanged:
    r"""A design of k runs, found by exchanging one run for one candidate at a time while that makes the criterion larger.

    Each step evaluates all k m exchanges in one call, and makes the best. A candidate may be measured several times.

    **When it is the wrong tool.** It ends when no single exchange helps, and that need not be the best design: start it from
    several designs, under `jax.vmap`. With k m above a hundred thousand it takes long.

    Args:
        informations: the information of one measurement at each of m candidates, shape ``[m, p, p]``.
        criterion: a function of the information of one design. NaN, as of the inverse of a singular matrix, counts as the
            worst of all values.
        start: the candidates of the first design, k whole numbers from 0 to m - 1. Inside ``jit`` any other number makes the
            value NaN. Together the candidates should determine all parameters, or all but those that one exchange adds.
        max_steps: the most exchanges.

    Returns:
        A `jaxfisher.design.Exchanged`.

    Raises:
        ValueError: informations of another shape; a number of steps below one; a start with a number that is no candidate.
        TypeError: ``criterion`` is not a function; a start that is not of whole numbers.

    Reference: Fedorov, Theory of Optimal Experiments (1972), section 3.2; Cook and Nachtsheim (1980).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import design
    >>> x = jnp.linspace(-1, 1, 5)
    >>> M = design.informations(lambda p, x: jf.Normal(p[0] + p[1] * x, 1.0))(jnp.zeros(2), x)
    >>> print(jnp.sort(design.exchange(M, design.d_criterion, jnp.array([1, 2, 2, 3])).runs))
    [0 0 4 4]
    """
    matrices = _checked(informations, criterion, "exchange")
    steps = count_of("exchange: `max_steps`", max_steps, "a whole number,")
    runs = jnp.asarray(start)
    if runs.ndim != 1 or not runs.size or not jnp.issubdtype(runs.dtype, jnp.integer):
        raise TypeError(
            f"exchange: `start` is {described(start)}; expected a vector of whole numbers, the candidate of each run."
        )
    _check_places(start, len(matrices))
    found: Exchanged = _exchanged(criterion, matrices, runs, Static(steps))
    return found


@once_for
def _exchanged(criterion: Criterion, matrices: Array, runs: Array, steps: Static[int]) -> Exchanged:
    """The search of `exchange`."""
    eps = float(jnp.finfo(matrices.dtype).eps)

    def worth(information: Array) -> Scalar:
        value = criterion(information)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def step(state: Any) -> Any:
        count, runs, value, _ = state
        # Sum the other runs instead of subtracting one: the information that only that run has would be left as rounding.
        less = jnp.tensordot(1 - jnp.eye(runs.size, dtype=matrices.dtype), matrices[runs], 1, precision=HIGHEST)
        values = jax.vmap(lambda one: jax.vmap(lambda other: worth(one + other))(matrices))(less)
        out, into = jnp.unravel_index(jnp.argmax(values), values.shape)
        # A run exchanged for itself shows the rounding error, whatever the criterion and its units.
        same = jnp.abs(values[jnp.arange(runs.size), runs] - value)
        least = jnp.where(jnp.isfinite(value), 10 * jnp.max(same) + 10 * eps * jnp.abs(value), 0)
        better = values[out, into] > value + least
        return (
            count + 1,
            jnp.where(better, runs.at[out].set(into.astype(runs.dtype)), runs),
            jnp.where(better, values[out, into], value),
            better,
        )

    # Inside `jit` a run that is no candidate is known too late to raise: make the value NaN, so that no exchange is better.
    there = jnp.all((runs >= 0) & (runs < len(matrices)))
    first = jnp.where(there, worth(jnp.sum(matrices[runs], axis=0)), jnp.nan)
    begin = jnp.zeros((), jnp.int32), runs, first, jnp.ones((), bool)
    _, runs, value, better = while_loop(lambda state: state[3] & (state[0] < steps.value), step, begin)
    return Exchanged(runs, value, ~better & jnp.isfinite(value))


def _check_places(start: Any, candidates: int) -> None:
    """Raise if a run that is known at trace time is none of the candidates."""
    if isinstance(start, jax.core.Tracer):
        return
    known = np.asarray(start)
    wrong = known[(known < 0) | (known >= candidates)]
    if wrong.size:
        raise ValueError(
            f"exchange: `start` holds {wrong[0]}; expected whole numbers from 0 to {candidates - 1}, the places of the "
            f"{candidates} candidates in `informations`."
        )


def _checked(informations: Any, criterion: Any, caller: str) -> Float[Array, "m p p"]:
    check_function("criterion", criterion, CRITERION)
    shape = np.shape(informations) if isinstance(informations, jax.Array | np.ndarray) else ()
    if len(shape) != 3 or shape[1] != shape[2] or not jnp.issubdtype(informations.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: `informations` is {described(informations)}; expected one matrix of real floating numbers for each "
            "candidate, an array of shape (m, p, p), as jf.design.informations(model)(params, *candidates) gives."
        )
    matrices = jnp.asarray(informations)
    value: Any = jax.eval_shape(criterion, jax.ShapeDtypeStruct(matrices.shape[1:], matrices.dtype))
    if not hasattr(value, "dtype") or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{caller}: `criterion` returned {described(value)}; expected one real number, {CRITERION}.")
    return matrices
