"""Shardings for the arrays of a new state: those that every step returns, so that the second step does not recompile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxfisher._transform.passing import with_keywords
from jaxfisher._tree import param_spec, split

Place: TypeAlias = Callable[[tuple[int, ...]], Sharding | None]
"""From the shape of an array to its sharding, or None if it is unknown."""


def transformation(init: Callable[[Any], Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """A gradient transformation whose first state is on the devices of the parameters.

    A wrapper of Optax that passes no keywords on does not keep them from the update.
    """
    return optax.GradientTransformationExtraArgs(lambda params: beside(params, init(params)), with_keywords(update))


def beside(params: chex.ArrayTree, state: Any) -> Any:
    """The state, with its uncommitted arrays put on all devices that hold parameters.

    A step returns its whole state there. If counts and the like were elsewhere at first, the step would be compiled twice.
    """
    known = [leaf.sharding for leaf in _arrays(params) if leaf.committed]
    if not known or not isinstance(known[0], NamedSharding | SingleDeviceSharding):
        return state
    there = NamedSharding(known[0].mesh, PartitionSpec()) if isinstance(known[0], NamedSharding) else known[0]
    return jax.tree.map(lambda leaf: jax.device_put(leaf, there) if _arrays(leaf) and not leaf.committed else leaf, state)


def zeros_like(tree: Any, params: chex.ArrayTree) -> Any:
    """Zeros in the shapes of a tree, sharded as `_place` says; floating leaves get the statistics dtype of the parameters."""
    dtype, place = param_spec(params).dtype, _place(params)

    def zeros(leaf: Any) -> Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.zeros(leaf.shape, dtype if floating else leaf.dtype, device=place(leaf.shape))

    return jax.tree.map(zeros, tree)


def _place(params: chex.ArrayTree) -> Place:
    """From the shape of a large array of a state to its sharding, which follows that of the parameters.

    An array of the shape of a parameter is sharded like it. The rows of a square matrix, or of a stack of matrices, are sharded
    over all axes that shard a parameter, or over one of them if the rows do not divide by all. Without this the compiler was
    seen to replicate factors on every device when examples and parameters were sharded along one axis.
    """
    spread = [(leaf, found) for leaf in _arrays(split(params)) if (found := _axes(leaf)) is not None]
    if not spread:
        return lambda shape: None
    mesh = spread[0][1][0]
    axes = [name for name in mesh.axis_names if any(name in names for _, (other, names) in spread if other == mesh)]
    ways = [tuple(axes), *((name,) for name in sorted(axes, key=lambda name: -mesh.shape[name]))]
    like = {leaf.shape: leaf.sharding for leaf, _ in spread}

    def place(shape: tuple[int, ...]) -> Sharding | None:
        if shape in like:
            return like[shape]
        stacked = len(shape) == 3
        matrices = stacked or (len(shape) == 2 and shape[0] == shape[1])
        for names in ways if matrices else []:
            if shape[-2] % math.prod(mesh.shape[name] for name in names) == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * stacked, names))
        return None

    return place


def _arrays(tree: Any) -> list[jax.Array]:
    """The arrays of a tree whose sharding is known; inside ``jit`` there are none."""
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)]


def _axes(leaf: jax.Array) -> tuple[Mesh, set[str]] | None:
    """The mesh of an array and the automatic axes over which it is sharded; None if there are none."""
    if not isinstance(leaf.sharding, NamedSharding) or not isinstance(leaf.sharding.mesh, Mesh):
        return None
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    names = {name for axis in spec if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,))}
    return (mesh, names) if names and names <= automatic else None
