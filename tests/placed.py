"""A step whose parameters are spread over two devices, against one device; run by `test_sharding`.

Prints a line of JSON: the largest difference relative to its array, and for each array of the step's results its path, shape
and that of a device's part.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxfisher as jf

PLACES = {"a": (None, "model"), "b": ("model",), "c": ("model", None)}
"""Both layers are split where the hidden units are."""


def model(params, x):
    return jf.Categorical(logits=jnp.tanh(x @ params["a"] + params["b"]) @ params["c"])


def main():
    jax.config.update("jax_enable_x64", True)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": 0.3 * jax.random.normal(keys[0], (6, 8)),
        "b": jnp.zeros(8),
        "c": 0.3 * jax.random.normal(keys[1], (8, 4)),
    }
    data = jax.random.normal(keys[2], (32, 6)), jax.random.randint(keys[3], (32,), 0, 4)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    place = lambda array, *axes: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    run = jf.training_step(model, jf.kfac())
    step = jax.jit(run)
    one = step(params, run.init(params, *data), *data)
    spread = {name: place(params[name], *PLACES[name]) for name in params}
    many = step(spread, run.init(spread, *data), *map(place, data))
    pairs = [[np.asarray(leaf, np.float64) for leaf in pair] for pair in zip(*map(jax.tree.leaves, (one, many)), strict=True)]
    off = max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-300)) for a, b in pairs)
    parts = [
        (jax.tree_util.keystr(path), array.shape, array.addressable_shards[0].data.shape)
        for path, array in jax.tree_util.tree_leaves_with_path(many)
        if array.ndim
    ]
    print(json.dumps({"off": off, "parts": parts}))


if __name__ == "__main__":
    main()
