"""Jobs of different sizes, each done by one device of a mesh, whose results all devices have.

A job goes to the device that has the least to do so far, the costliest first. Every device runs a branch of its own and sends
what that gave: where the jobs are as many as the devices, or more, the results travel once.

Reference: Graham, Bounds on multiprocessing timing anomalies (SIAM J. Appl. Math. 1969), section 4: no device has more than
4/3 of what the best assignment gives the busiest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float


class Devices(NamedTuple):
    """The devices along an axis of a mesh; what its other axes are there for is done alike on all of them."""

    mesh: Mesh
    axis: str

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.mesh.shape[self.axis])


def shared_out(
    make: Callable[[Sequence[Any]], Sequence[Any]], given: Sequence[Any], costs: Sequence[float], devices: Devices
) -> list[Any]:
    """``make(given)``, one result of arrays for each entry, the same on every device, where each device makes some of them.

    ``make`` is called with some of the entries. What it closes over must be constants.
    """
    if devices.size == 1 or not given:
        return list(make(given))
    shapes = jax.eval_shape(make, given)
    parts = assigned(costs, devices.size)
    most = max(sum(leaf.size for i in part for leaf in jax.tree.leaves(shapes[i])) for part in parts)
    dtype = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(shapes)))

    def branch(part: Sequence[int]) -> Callable[[Sequence[Any]], Float[Array, " most"]]:
        def run(given: Sequence[Any]) -> Float[Array, " most"]:
            made = make([given[i] for i in part])
            numbers = jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(made)])
            return jnp.pad(numbers, (0, most - numbers.size))

        return run

    def own(given: Sequence[Any]) -> Float[Array, "busy most"]:
        place, branches = jax.lax.axis_index(devices.axis), [branch(part) for part in parts]
        if len(parts) == devices.size:
            return jax.lax.all_gather(jax.lax.switch(place, branches, given), devices.axis)
        # A gathered array would have a row for every device that has nothing to do.
        branches.append(lambda given: jnp.zeros(most, dtype))
        mine = jax.lax.switch(jnp.minimum(place, len(parts)), branches, given)
        return jax.lax.psum(jnp.zeros((len(parts), most), dtype).at[place].set(mine, mode="drop"), devices.axis)

    everywhere = PartitionSpec()
    rows = jax.shard_map(own, mesh=devices.mesh, in_specs=(everywhere,), out_specs=everywhere, check_vma=False)(list(given))
    found: dict[int, Any] = {}
    for row, part in zip(rows, parts, strict=True):
        leaves, treedef = jax.tree.flatten([shapes[i] for i in part])
        ends = [sum(leaf.size for leaf in leaves[: k + 1]) for k in range(len(leaves))]
        cut = [
            row[end - leaf.size : end].reshape(leaf.shape).astype(leaf.dtype) for end, leaf in zip(ends, leaves, strict=True)
        ]
        found |= dict(zip(part, jax.tree.unflatten(treedef, cut), strict=True))
    return [found[i] for i in range(len(given))]


def assigned(costs: Sequence[float], count: int) -> list[list[int]]:
    """The places of the jobs of each device that has some, in order."""
    parts: list[list[int]] = [[] for _ in range(min(count, len(costs)))]
    loads = [0.0] * len(parts)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += costs[i]
    return [sorted(part) for part in parts]
