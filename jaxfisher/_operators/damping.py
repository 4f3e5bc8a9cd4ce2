"""A damping: one number, or one for each parameter leaf; how it is checked, and how a form is damped by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._operators.form import Form
from jaxfisher._operators.inverted import Inverted
from jaxfisher._system import Factorise, Solved
from jaxfisher._tree import ParamSpec, for_both_parts, joined_structure
from jaxfisher._values import described, nonnegative

Damping: TypeAlias = Any
"""One number, or a pytree like the parameters with one number for each leaf."""
Dampings = Scalar | tuple[Scalar, ...]
"""The damping checked and cast: one number, or the leaves' numbers in order."""


def is_one_damping(damping: Damping, spec: ParamSpec) -> bool:
    """Whether it is one number; if not, it must have one for each parameter leaf."""
    leaves, treedef = jax.tree.flatten(damping)
    if jax.tree_util.treedef_is_leaf(treedef) or damping is None:
        return True
    if treedef not in (spec.treedef, joined_structure(spec)) or any(jnp.shape(leaf) != () for leaf in leaves):
        raise TypeError(
            f"`damping` is {described(damping)} with leaves of shapes {[jnp.shape(leaf) for leaf in leaves]}; expected one "
            f"number of at least zero, or a pytree like the parameters, {joined_structure(spec)}, with one number a leaf."
        )
    return False


def checked_damping(damping: Damping, spec: ParamSpec) -> Dampings:
    """The argument checked and cast: one number, or the numbers of the leaves."""
    if is_one_damping(damping, spec):
        return nonnegative("damping", damping, spec.dtype)
    leaves = jax.tree.leaves(damping) if jax.tree.structure(damping) == spec.treedef else for_both_parts(damping, spec)
    return tuple(nonnegative("damping", leaf, spec.dtype) for leaf in leaves)


def entries_of(dampings: Dampings, spec: ParamSpec) -> Float[Array, " p"]:
    """The damping of each parameter."""
    by_leaf = dampings if isinstance(dampings, tuple) else (dampings,) * len(spec.sizes)
    return jnp.concatenate([jnp.broadcast_to(d, size) for d, size in zip(by_leaf, spec.sizes, strict=True)])


def damped_inverse(form: Form, dampings: Dampings, factorise: Factorise | None = None) -> Inverted:
    """``v -> (F + D)^-1 v`` with a damping ``D`` of either kind; a damping of one number may be given a way to factor.

    With one number a leaf, ``F + D = R^-1 (G + I) R^-1``, so ``(F + D)^-1 = R (G + I)^-1 R``, and G has the form of F.
    """
    if not isinstance(dampings, tuple):
        return form.inverse(dampings) if factorise is None else form.inverses(dampings, factorise)(dampings)
    spec, product = form.spec, form.product()
    inside, roots = form.with_unit_damping(dampings)
    inverse = inside.inverse(jnp.ones((), spec.dtype))

    def by_leaf(v: Any, factors: Sequence[Scalar]) -> Any:
        return spec.tree([f * leaf for f, leaf in zip(factors, jax.tree.leaves(v), strict=True)])

    def apply(v: Any) -> Solved:
        found = inverse(by_leaf(v, roots))
        x = by_leaf(found.x, roots)
        rest = jax.tree.map(lambda b, f, d: b - f - d, v, product(x), by_leaf(x, dampings))
        return found._replace(x=x, rest=rest)

    return apply


def damped_logdet(form: Form, dampings: Dampings) -> Scalar:
    """``log det (F + D)`` with a damping ``D`` of either kind."""
    if not isinstance(dampings, tuple):
        return form.logdet(dampings)
    inside, roots = form.with_unit_damping(dampings)
    units = sum(size * jnp.log(root) for size, root in zip(form.spec.sizes, roots, strict=True))
    return inside.logdet(jnp.ones((), form.spec.dtype)) - 2 * units
