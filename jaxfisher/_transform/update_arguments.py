"""Checks of what an update is given by keyword: the curvature, functions of the parameters, a damping."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxfisher._operators.operator import Operator, as_operator, restricted
from jaxfisher._tree import described, path_names, refuse_sparse, split
from jaxfisher._values import is_number

ScalarOrSchedule: TypeAlias = float | Array | Callable[[Array], Any]
"""A number, or a function from the update count to a number."""


class Shared:
    """A function that makes the curvature, run once for all transformations that ask for it in one update.

    `jax.lax.cond` computes what is made inside a branch only if it takes the branch; it always computes what is made outside.
    So a refresh that is not always due calls ``anew`` inside its branch instead.
    """

    def __init__(self, make: Callable[[], Operator]) -> None:
        self.anew = make
        self._made: Operator | None = None

    def __call__(self) -> Operator:
        if self._made is None:
            self._made = self.anew()
        return self._made


def fisher_for(updates: Any, fisher: Operator | Callable[[], Operator] | None, caller: str) -> Operator:
    """The operator that an update is given as ``fisher=``, checked, over just the leaves of ``updates``.

    Under `optax.masked` and `optax.partition` the updates are a part of the parameters, and the operator's principal
    sub-operator over that part, ``F_AA``, preconditions them. A transformation of your own that calls this first works there
    too.

    Args:
        updates: the pytree of updates.
        fisher: an operator, or a function of no arguments that returns one.
        caller: the name of the transformation, for messages.

    Returns:
        An operator whose vectors are pytrees like ``updates``.

    Raises:
        ValueError: ``fisher`` is None, or is over other parameters.
        TypeError: ``fisher`` is neither an operator nor a function of no arguments that returns one.

    Reference: the documentation of Optax, "Extra arguments"; the masked leaves are those of `optax.MaskedNode`.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda p, x: jf.Normal(p["a"] * x + p["b"], 1.0))({"a": 1.0, "b": 0.0}, jnp.array([1.0, 3.0]))
    >>> jf.fisher_for({"a": 0.5}, F, "my_transformation").as_matrix()
    Array([[5.]], dtype=float32)
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
    refuse_sparse(updates, lambda path: f"{caller}: `updates` at {path}")
    given, updates = updates, split(updates)
    treedef = jax.tree.structure(updates)
    names = path_names(updates)
    known = all(name in operator.spec.paths for name in names)
    if known and treedef != operator.spec.treedef:
        operator = restricted(operator, tuple(path in names for path in operator.spec.paths), treedef)
    where = operator.spec.mismatch(treedef, names, tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(updates)))
    if where is not None:
        raise ValueError(
            f"{caller}: the updates are not over the parameters of `fisher`, {operator}: {where}. "
            "Make the Fisher at the parameters that the updates are for. A wrapper that changes their structure, as "
            "optax.flatten and optax.contrib.split_real_and_imaginary do, cannot go around it: leave it out. Complex "
            "parameters need no wrapper."
        )
    operator.spec.check(given, "updates")
    return operator


def _needs_no_arguments(fisher: Callable[[], Operator], caller: str) -> None:
    try:
        inspect.signature(fisher).bind()
    except TypeError as error:
        raise TypeError(
            f"{caller}: `fisher` is a function that needs arguments ({error}); expected an operator, or a function of no "
            "arguments. Call it with the parameters and the data, fisher=jf.exact_fisher(model)(params, x), or put `lambda:` "
            "before that call."
        ) from error


def damping_for(given: chex.Numeric | None, usual: ScalarOrSchedule | None, count: Int[Array, ""], caller: str) -> Any:
    """The damping of one update: the one given to it, else that of the optimiser, which is a number or a schedule."""
    if given is not None:
        return given
    if usual is None:
        raise ValueError(
            f"{caller}: the transformation was made without a `damping`, and `update` is given none. Give one, as in "
            f"jf.{caller}(damping=1e-3), or put jf.adapt_damping around the chain, which gives one to each update."
        )
    return scheduled("damping", usual, "one real number of at least zero", caller)(count) if callable(usual) else usual


def scheduled(name: str, schedule: Callable[[Array], Any], expected: str, caller: str) -> Callable[[Array], Any]:
    """The schedule, with its values checked."""
    return lambda count: _one_number(f"the schedule `{name}` returned", schedule(count), f"{expected} for each count", caller)


def function_for(
    name: str, function: Callable[[Any], Any] | None, meaning: str, caller: str, whole: Callable[[Any], Any]
) -> Callable[[Any], Array]:
    """``function``, given by keyword, as a function of a part of the parameters, which ``whole`` completes.

    Its values are checked. If it is missing, the error says how to pass it.
    """
    if function is None:
        raise ValueError(f"{caller}: `update` needs `{name}`, a function {meaning}. Pass it by keyword to opt.update.")
    if not callable(function):
        raise TypeError(f"{caller}: `{name}` is {described(function)}; expected a function {meaning}.")
    given = function
    return lambda params: jnp.asarray(
        _one_number(f"`{name}` returned", given(whole(params)), "one real number, the mean over the batch", caller)
    )


def value_for(value: chex.Numeric | None, loss: Callable[[Any], Array], params: Any, caller: str) -> Array:
    """The loss at the parameters: ``value`` if it is given, else computed."""
    return loss(params) if value is None else jnp.asarray(_one_number("`value` is", value, "one real number, the loss", caller))


def _one_number(seen: str, value: Any, expected: str, caller: str) -> Any:
    if not is_number(value):
        raise TypeError(f"{caller}: {seen} {described(value)}; expected {expected}.")
    return value


def check_state(state: Any, kind: type, caller: str) -> None:
    """Raise `TypeError` unless a state belongs to this transformation."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{caller}: the state is {described(state)}; expected the {kind.__name__} that `init` or the last `update` gave. "
            "Call opt.update(grads, state, params, ...) with the state of this same optimiser."
        )


def check_vector_of_state(held: Any, new: Any, caller: str) -> None:
    """Raise `ValueError` unless the vectors held in a state have the structure and shapes that this update needs."""
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (held, new)]
    if str(jax.tree.structure(held)) != str(jax.tree.structure(new)) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{caller}: the state was made for other parameters: it holds arrays of shapes {shapes[0]}, and this update needs "
            f"{shapes[1]}. Make the state from the parameters that the updates are for: state = opt.init(params)."
        )


def completing(params: Any, all_params: Any, caller: str) -> Callable[[Any], Any]:
    """A function from parameters like ``params`` to all parameters, for an update that evaluates the loss.

    Under `optax.masked` and `optax.partition` an update sees a part of the parameters; the others come from ``all_params``.
    """
    if params is None:
        raise ValueError(f"{caller}: `update` needs the parameters. Pass them, opt.update(grads, state, params, ...).")
    if not _has_masked(params):
        return lambda new: new
    if all_params is None or _has_masked(all_params):
        raise ValueError(
            f"{caller}: inside optax.masked or optax.partition it sees only a part of the parameters, and the model needs all. "
            "Pass all, opt.update(grads, state, params, all_params=params, ...), as jf.training_step does; or put "
            "jf.adapt_damping around the masked transformation, or jf.backtrack_kl behind it in optax.chain."
        )
    # One masked node may stand for a whole subtree.
    return lambda new: jax.tree.map(lambda own, rest: rest if _is_masked(own) else own, new, all_params, is_leaf=_is_masked)


def part_of(given: Any, updates: Any) -> Any:
    """The leaves of ``given``, a pytree like all parameters, for those parameters that the updates are for; others masked."""
    if not _has_masked(updates) or _has_masked(given):
        return given
    return jax.tree.map(lambda own, of_all: own if _is_masked(own) else of_all, updates, given, is_leaf=_is_masked)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _has_masked(tree: Any) -> bool:
    return any(map(_is_masked, jax.tree.leaves(tree, is_leaf=_is_masked)))
