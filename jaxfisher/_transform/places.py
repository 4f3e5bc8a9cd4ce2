"""Where the arrays of a state belong: what is as large as a layer is shared by the devices that share the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Place: TypeAlias = Callable[[tuple[int, ...]], NamedSharding | None]
"""From the shape of an array to its sharding; None for what is left to the compiler."""


def rows_shared(params: chex.ArrayTree) -> Place:
    """Rows, the second axis, shared by all devices that share a parameter, or where they do not divide by those of one axis.

    The compiler keeps what a state has where it is, and chooses for itself where nothing is: with examples and parameters
    spread along one axis it was seen to have factors whole on every device. Nothing is known of parameters inside ``jit``.
    """
    meshes = [found for leaf in jax.tree.leaves(params) if (found := _axes(leaf)) is not None]
    if not meshes:
        return lambda shape: None
    mesh = meshes[0][0]
    axes = [name for name in mesh.axis_names if any(name in names for other, names in meshes if other == mesh)]
    ways = [tuple(axes), *((name,) for name in sorted(axes, key=lambda name: -mesh.shape[name]))]

    def place(shape: tuple[int, ...]) -> NamedSharding | None:
        for names in ways if len(shape) > 2 else []:
            if shape[1] % math.prod(mesh.shape[name] for name in names) == 0:
                return NamedSharding(mesh, PartitionSpec(None, names))
        return None

    return place


def _axes(leaf: Any) -> tuple[Mesh, set[str]] | None:
    """The mesh of an array and the automatic axes over which it is spread; None where there are none, or nothing is known."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
        return None
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    if not isinstance(mesh, Mesh):
        return None
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    names = {name for axis in spec if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,))}
    return (mesh, names) if names and names <= automatic else None
