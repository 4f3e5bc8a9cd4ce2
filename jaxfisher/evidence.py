"""Tuning the prior by the evidence: the prior under which the data are most probable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._once import Static, once
from jaxfisher._stack import refuse_stack
from jaxfisher._tree import dot
from jaxfisher._values import check_nonnegative, count_of, described, is_number
from jaxfisher.posterior import Posterior, is_one


def tune_prior(posterior: Posterior, *, rtol: float = 1e-3, max_steps: int = 100) -> Posterior:
    r"""The same posterior under the prior of largest evidence, with the mean and the Fisher unchanged.

    The number, or each of the numbers, of the prior is iterated by MacKay's rule until it changes by less than ``rtol``:

    .. math:: \alpha \leftarrow \frac{\gamma}{|\theta|^2}, \qquad
        \gamma = \alpha |\theta|^2 + 2 \alpha \frac{\partial \log Z}{\partial \alpha},

    where theta are the parameters that the number is for, and ``gamma`` is the number of them that the data determine. If the
    mean was fitted under another prior, fit it again under the new one and repeat: both settle after a few rounds.

    Args:
        posterior: a posterior from `laplace`. If its prior is one number, the eigenvalues of F are computed once; otherwise
            each step takes the derivative of a log-determinant.
        rtol: the relative change at which the iteration stops.
        max_steps: the most steps.

    Returns:
        A posterior with another ``prior``, of the same structure. ``jax.grad(posterior.log_evidence)(posterior.prior)``, zero
        at a maximum, shows whether the steps were enough. The rule is slow for a number that the data drive to infinity, as
        happens to many if each parameter has its own. A number keeps its value if the data do not determine its parameters,
        or if these are all exactly zero, as for a mean of zero with one number for all: the rule divides by their squares.

    Raises:
        TypeError: ``posterior`` is no `Posterior`, or ``rtol`` no Python number.
        ValueError: a negative ``rtol``, a number of steps below one.

    Reference: MacKay, Bayesian interpolation (Neural Computation 1992), section 4.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(jnp.dot(w, x), 1.0)
    >>> x = jnp.array([[3.0, 0.0], [0.0, 3.0]])
    >>> posterior = jf.laplace(model, jnp.array([1.0, -1.0]), x, jnp.array([3.5, -3.5]), prior=1.0)
    >>> print(f"{jf.tune_prior(posterior).prior:.2f}")  # where 2 * 9 / (9 + alpha) = 2 alpha
    0.91
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"tune_prior: `posterior` is {described(posterior)}; expected what jf.laplace returns.")
    refuse_stack(posterior.stack, "Posterior", "tune_prior")
    if not is_number(rtol) or isinstance(rtol, jax.Array):
        raise TypeError(f"tune_prior: `rtol` is {described(rtol)}; expected a Python number of at least zero.")
    check_nonnegative("rtol", rtol)
    steps = count_of("tune_prior: `max_steps`", max_steps, "a whole number of steps,")
    return _tuned(posterior, Static((float(rtol), steps)))


@once
def _tuned(posterior: Posterior, how: Static[tuple[float, int]]) -> Posterior:
    rtol, max_steps = how.value
    determined = _determined(posterior)
    squared = _squared(posterior)

    def improved(prior: Any) -> Any:
        def one(alpha: Array, gamma: Array, size: Array) -> Array:
            new = gamma / jnp.where(size > 0, size, 1)
            return jnp.where((size > 0) & (new > 0), new, alpha)

        return jax.tree.map(one, prior, determined(prior), squared)

    def going(state: tuple[Any, Any, Array]) -> Array:
        old, new, step = state
        changes = [
            jnp.max(jnp.abs(jnp.log(b / a)), initial=0.0)
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        ]
        return (step < max_steps) & (jnp.max(jnp.stack(changes)) > rtol)

    start = posterior.prior
    first = (start, improved(start), jnp.ones((), jnp.int32))
    _, prior, _ = jax.lax.while_loop(going, lambda state: (state[1], improved(state[1]), state[2] + 1), first)
    return dataclasses.replace(posterior, prior=prior)


def _squared(posterior: Posterior) -> Any:
    """The sum of squares of the parameters that each number of the prior is for."""
    mean = posterior.fisher.spec.vector(posterior.mean, "params")
    if is_one(posterior.prior):
        return dot(mean, mean)
    sums = lambda alpha, leaf: jnp.square(leaf) if alpha.ndim else jnp.sum(jnp.square(leaf))  # noqa: E731
    return jax.tree.map(sums, posterior.prior, mean)


def _determined(posterior: Posterior) -> Callable[[Any], Any]:
    """The number of parameters that the data determine, for each number of the prior, as a function of the prior."""
    if is_one(posterior.prior):
        values = posterior.fisher.eigvalsh()
        # A maximum with zero would halve the second derivative of an eigenvalue of zero.
        values = posterior.examples * jnp.where(values < 0, 0, values)
        return lambda prior: jnp.sum(values / (values + prior))
    squared, slope = _squared(posterior), jax.grad(posterior.log_evidence)
    return lambda prior: jax.tree.map(lambda a, g, s: a * s + 2 * a * g, prior, slope(prior), squared)
