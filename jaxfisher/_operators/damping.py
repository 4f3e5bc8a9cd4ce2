"""Dampings of one number, of one for each parameter leaf or of one for each parameter: their checks, and damped inverses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._operators.dense import by_entry
from jaxfisher._operators.form import Form
from jaxfisher._operators.inverted import Inverted
from jaxfisher._system import Factorise, Solved
from jaxfisher._tree import ParamSpec, for_both_parts, joined_structure
from jaxfisher._values import described, nonnegative, nonnegative_entries

Damping: TypeAlias = Any
"""One number, or a pytree like the parameters with one number for each leaf, or with an array of the leaf's shape."""
Dampings = Scalar | tuple[Array, ...]
"""A damping, checked and cast: one number, or those of the leaves in order."""


def is_one_damping(damping: Damping, spec: ParamSpec, name: str = "damping") -> bool:
    """Whether a damping is one number. If not, raise unless it has one number for each parameter leaf, or each parameter."""
    leaves, treedef = jax.tree.flatten(damping)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if jax.tree_util.treedef_is_leaf(treedef) or damping is None:
        # If the parameters are a single array, the damping may be an array of its shape.
        return treedef != spec.treedef or shapes[0] != spec.shapes[0] or shapes[0] == ()
    fits = treedef in (spec.treedef, joined_structure(spec))
    if fits:
        shapes = [jnp.shape(leaf) for leaf in _of_leaves(damping, spec)]
    if not fits or any(seen not in ((), own) for seen, own in zip(shapes, spec.shapes, strict=True)):
        raise TypeError(
            f"`{name}` is {described(damping)} with leaves of shapes {shapes}; expected one number of at least zero, or a "
            f"pytree like the parameters, {joined_structure(spec)}, with one number per leaf, or an array of the leaf's shape; "
            f"the shapes are {list(spec.shapes)}."
        )
    return False


def check_one_damping(damping: Damping, spec: ParamSpec, caller: str) -> None:
    """Raise `TypeError` unless a damping is one number, for solvers that support only that."""
    if not is_one_damping(damping, spec):
        raise TypeError(
            f"{caller}: `damping` is {described(damping)} with numbers for each leaf; expected one number. Leave the solver "
            "out, or give jf.CG(): they take a damping by leaf."
        )


def _of_leaves(damping: Damping, spec: ParamSpec) -> list[Any]:
    """The damping of each leaf; a complex leaf has the same for both of its parts."""
    return jax.tree.leaves(damping) if jax.tree.structure(damping) == spec.treedef else for_both_parts(damping, spec)


def restricted_damping(damping: Damping, spec: ParamSpec, keep: tuple[bool, ...], name: str = "damping") -> Damping:
    """A damping by leaf, with None for the leaves that are not kept; a damping of one number stays as it is."""
    if jax.tree.structure(damping) not in (spec.treedef, joined_structure(spec)) or is_one_damping(damping, spec, name):
        return damping
    leaves = zip(_of_leaves(damping, spec), keep, strict=True)
    return jax.tree.unflatten(spec.treedef, [leaf if flag else None for leaf, flag in leaves])


def checked_damping(damping: Damping, spec: ParamSpec, name: str = "damping") -> Dampings:
    """The argument checked and cast: one number, or those of the leaves."""
    if is_one_damping(damping, spec, name):
        return nonnegative(name, damping, spec.dtype)
    leaves = zip(spec.paths, _of_leaves(damping, spec), strict=True)
    return tuple(
        nonnegative(name, leaf, spec.dtype)
        if jnp.shape(leaf) == ()
        else nonnegative_entries(f"`{name}` at {path}", leaf, spec.dtype)
        for path, leaf in leaves
    )


def entries_of(dampings: Dampings, spec: ParamSpec) -> Float[Array, " p"]:
    """The damping of each parameter."""
    by_leaf = dampings if isinstance(dampings, tuple) else (dampings,) * len(spec.sizes)
    return jnp.concatenate([jnp.broadcast_to(d.reshape(-1), size) for d, size in zip(by_leaf, spec.sizes, strict=True)])


def _with_unit_damping(form: Form, dampings: tuple[Array, ...]) -> tuple[Form, tuple[Array, ...]]:
    """`Form.with_unit_damping`, in a form that can be rescaled by these dampings, which may be arrays."""
    return (by_entry(form) if any(damping.ndim for damping in dampings) else form).with_unit_damping(dampings)


def _by_leaf(spec: ParamSpec, v: Any, factors: Sequence[Array]) -> Any:
    return spec.tree([f * leaf for f, leaf in zip(factors, jax.tree.leaves(v), strict=True)])


def _inverse(form: Form, damping: Scalar, factorise: Factorise | None) -> Inverted:
    return form.inverse(damping) if factorise is None else form.inverses(damping, factorise)(damping)


def damped_inverse(form: Form, dampings: Dampings, factorise: Factorise | None = None) -> Inverted:
    """``v -> (F + D)^-1 v`` with a damping ``D`` of any kind, by ``factorise`` or the form's default.

    With one number per leaf, ``F + D = R^-1 (G + I) R^-1``, so ``(F + D)^-1 = R (G + I)^-1 R``, and G has the form of F. With
    one number per parameter the same holds for forms that hold a matrix, its blocks or its diagonal; other forms make the
    matrix.
    """
    if not isinstance(dampings, tuple):
        return _inverse(form, dampings, factorise)
    spec, product = form.spec, form.product()
    inside, roots = _with_unit_damping(form, dampings)
    inverse = _inverse(inside, jnp.ones((), spec.dtype), factorise)

    def apply(v: Any) -> Solved:
        found = inverse(_by_leaf(spec, v, roots))
        x = _by_leaf(spec, found.x, roots)
        rest = jax.tree.map(lambda b, f, d: b - f - d, v, product(x), _by_leaf(spec, x, dampings))
        return found._replace(x=x, rest=rest)

    return apply


def damped_logdet(form: Form, dampings: Dampings) -> Scalar:
    """``log det (F + D)`` with a damping ``D`` of any kind."""
    if not isinstance(dampings, tuple):
        return form.logdet(dampings)
    inside, roots = _with_unit_damping(form, dampings)
    units = jnp.sum(jnp.log(entries_of(roots, form.spec)))
    return inside.logdet(jnp.ones((), form.spec.dtype)) - 2 * units


def damped_inverse_root(form: Form, v: Any, dampings: Dampings, transposed: bool = False) -> Any:
    """``B v`` with ``B B^T = (F + D)^-1``: ``R (G + I)^-1/2``, as in `damped_inverse`; the symmetric root for one number.

    If ``transposed``, it is ``B^T v``, whose squared length is ``v^T (F + D)^-1 v``.
    """
    if not isinstance(dampings, tuple):
        return form.power_mv(v, jnp.asarray(-0.5, form.spec.dtype), dampings)
    inside, roots = _with_unit_damping(form, dampings)
    one = jnp.ones((), form.spec.dtype)
    v = inside.power_mv(_by_leaf(form.spec, v, roots) if transposed else v, -0.5 * one, one)
    return v if transposed else _by_leaf(form.spec, v, roots)
