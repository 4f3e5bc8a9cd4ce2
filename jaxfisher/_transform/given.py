"""What an update is given by keyword, checked: the curvature over the parameters the update is for, functions, a damping."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxfisher._operators.base import Operator, as_operator
from jaxfisher._tree import described, path_names

ScalarOrSchedule: TypeAlias = float | Array | Callable[[Array], Any]
"""A number, or a function of the update count that gives one."""


def fisher_for(updates: Any, fisher: Operator | Callable[[], Operator] | None, caller: str) -> Operator:
    """The operator over just the leaves of ``updates``.

    Under `optax.masked` and `optax.partition` the updates are a part of the parameters: the operator's principal sub-operator
    over that part is what preconditions it.
    """
    if fisher is None:
        raise ValueError(
            f"{caller}: `update` needs the curvature. Pass it by keyword, opt.update(grads, state, params, fisher=fisher), "
            "where fisher is an operator such as jf.exact_fisher(model)(params, x), or a function of no arguments giving one."
        )
    if callable(fisher) and not isinstance(fisher, Operator):
        _needs_no_arguments(fisher, caller)
        fisher = fisher()
    operator = as_operator(fisher, f"{caller}: `fisher`")
    treedef = jax.tree.structure(updates)
    names = path_names(updates)
    known = all(name in operator.spec.paths for name in names)
    if known and treedef != operator.spec.treedef:
        operator = operator.restrict(tuple(path in names for path in operator.spec.paths), treedef)
    where = operator.spec.mismatch(treedef, names, tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(updates)))
    if where is not None:
        raise ValueError(
            f"{caller}: the updates are not over the parameters of `fisher`, {operator}: {where}. "
            "Make the Fisher at the parameters that the updates are for."
        )
    operator.spec.check(updates, "updates")
    return operator


def _needs_no_arguments(fisher: Callable[[], Operator], caller: str) -> None:
    try:
        inspect.signature(fisher).bind()
    except TypeError as error:
        raise TypeError(
            f"{caller}: `fisher` is a function that needs arguments ({error}); expected an operator, or a function of none. "
            "Call it with the parameters and the data: fisher=jf.exact_fisher(model)(params, x), or put `lambda:` before that."
        ) from error


def damping_for(given: chex.Numeric | None, usual: ScalarOrSchedule, count: Int[Array, ""]) -> Any:
    """The damping of one update: the one it is given, else the optimiser's own, a number or a schedule."""
    if given is not None:
        return given
    return usual(count) if callable(usual) else usual


def function_for(name: str, function: Callable[[Any], Any] | None, meaning: str, caller: str) -> Callable[[Any], Any]:
    """A function given by keyword, or an error that says how to give it."""
    if function is None:
        raise ValueError(f"{caller}: `update` needs `{name}`, a function {meaning}. Pass it by keyword to opt.update.")
    if not callable(function):
        raise TypeError(f"{caller}: `{name}` is {described(function)}; expected a function {meaning}.")
    return function


def check_params(params: Any, caller: str) -> None:
    """Raise `ValueError` where an update that looks at the loss is given no parameters, or a part of them."""
    if params is None:
        raise ValueError(f"{caller}: `update` needs the parameters. Pass them, opt.update(grads, state, params, ...).")
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    if any(map(masked, jax.tree.leaves(params, is_leaf=masked))):
        raise ValueError(
            f"{caller}: inside optax.masked or optax.partition it sees only a part of the parameters, and the loss is a "
            "function of all. Put jf.adapt_damping around the masked transformation, jf.backtrack_kl behind it in optax.chain."
        )
