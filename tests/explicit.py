"""Answers where examples are spread over explicit axes of a mesh, against those of one device; run by `test_sharding`.

Answers are asked for one by one, training steps inside ``jit``. Prints a line of JSON for each: the largest difference,
relative to the largest number.
"""

import json

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import LOG_PROB, answers, model, problem

import jaxfisher as jf

EXAMPLES, DEVICES = 8, 2


def noisy(params, x, key):
    """With a key of its own for each example."""
    return model(params, x * jax.random.uniform(key, x.shape, x.dtype))


def trained(params, keys, x, y):
    """Steps of what users train with, in the ways they are called."""
    exact, drawn = jf.natural_gradient(0.1, 0.1), jf.kfac(like=jf.exact_fisher(model)(params, x))
    in_pieces = jf.training_step(noisy, exact, jf.exact_fisher(noisy, batch_size=3))
    steps = {
        "step": jf.training_step(model, exact)(params, exact.init(params), x, y)[0],
        "kfac": jf.training_step(model, drawn)(params, drawn.init(params), x, y)[0],
        "noisy": in_pieces(params, exact.init(params), x, y, key=keys[0], counts=y + 1)[0],
        "descent": jax.tree.map(lambda p, d: p - 0.1 * d, params, jf.natural_grad(LOG_PROB, damping=0.1)(params, x, y)),
    }
    return {name: jax.flatten_util.ravel_pytree(found)[0] for name, found in steps.items()}


def main():
    jax.config.update("jax_enable_x64", True)
    params, x, y, key = problem(EXAMPLES)
    mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(AxisType.Explicit,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    for ask, run in ((answers, answers), (trained, jax.jit(trained))):
        expected = jax.jit(ask)(params, key[None], x, y)
        with jax.set_mesh(mesh):
            given = (*jax.device_put((params, key[None]), everywhere), *jax.device_put((x, y), apart))
            for name, value in run(*given).items():
                off = np.abs(np.asarray(value) - np.asarray(expected[name])).max() / np.abs(expected[name]).max()
                print(json.dumps({"name": name, "off": float(off)}))


if __name__ == "__main__":
    main()
