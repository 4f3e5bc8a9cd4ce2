"""Jobs of different sizes, shared out among the devices of a mesh, with results that all devices receive.

The jobs are assigned in order of their costs, the costliest first, each to the device with the least work so far. Every device
runs its own branch of one program and sends its results to the others. If there are at least as many jobs as devices, that is
one all-gather.

Reference: Graham, Bounds on multiprocessing timing anomalies (SIAM J. Appl. Math. 1969), section 4: no device has more than
4/3 of the work that the best assignment gives to the busiest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float


class Devices(NamedTuple):
    """The devices along one axis of a mesh. Devices that differ only along its other axes do the same work."""

    mesh: Mesh
    axis: str

    @property
    def size(self) -> int:
        """The number of devices along the axis."""
        return int(self.mesh.shape[self.axis])


def shared_out(
    make: Callable[[Sequence[Any]], Sequence[Any]], given: Sequence[Any], costs: Sequence[float], devices: Devices
) -> list[Any]:
    """``make(given)``, replicated on every device, where each device computes the results of some of the entries.

    ``make`` takes a list of entries and returns one pytree of arrays for each. It may close over constants only.
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
        # An all-gather would add a row for every device without a job, so the rows are summed instead.
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
    """For each device that gets any jobs, the places of its jobs in ascending order."""
    parts: list[list[int]] = [[] for _ in range(min(count, len(costs)))]
    loads = [0.0] * len(parts)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += costs[i]
    return [sorted(part) for part in parts]
