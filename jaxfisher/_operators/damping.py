"""What a damping may be: one number, or one for each parameter leaf."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._tree import ParamSpec
from jaxfisher._values import described

Damping: TypeAlias = Any
"""One number, or a pytree like the parameters with one number for each leaf."""
Dampings = Scalar | tuple[Scalar, ...]
"""The same, checked and cast: one number, or those of the leaves in order."""


def is_one_damping(damping: Damping, spec: ParamSpec) -> bool:
    """Whether it is one number; if not, it must have one for each parameter leaf."""
    leaves, treedef = jax.tree.flatten(damping)
    if jax.tree_util.treedef_is_leaf(treedef) or damping is None:
        return True
    if treedef != spec.treedef or any(jnp.shape(leaf) != () for leaf in leaves):
        raise TypeError(
            f"`damping` is {described(damping)} with leaves of shapes {[jnp.shape(leaf) for leaf in leaves]}; expected one "
            f"number of at least zero, or a pytree like the parameters, {spec.treedef}, with one number for each leaf."
        )
    return False


def entries_of(dampings: Dampings, spec: ParamSpec) -> Float[Array, " p"]:
    """The damping of each parameter."""
    by_leaf = dampings if isinstance(dampings, tuple) else (dampings,) * len(spec.sizes)
    return jnp.concatenate([jnp.broadcast_to(d, size) for d, size in zip(by_leaf, spec.sizes, strict=True)])
