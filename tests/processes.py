"""One of several processes that train together on one machine; run by `test_sharding` with its number, their count and a port.

Each process has its own share of the examples. The first prints a line of JSON for each answer: the largest difference from
that of one process, relative to the largest number.
"""

import json
import sys

import jax
import numpy as np
import stack
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs.evaluate import evaluated, in_numpy
from sharded import EXAMPLES, model, off, problem

import jaxfisher as jf

LOG_PROB = jf.log_likelihood(model)


def answers(params, weights, x, y):
    exact, drawn = jf.natural_gradient(0.5, 0.1), jf.sampled_fisher(model)
    return {
        "step": jf.training_step(model, exact)(params, exact.init(params), x, y)[0],
        "natural gradient": jf.natural_grad(LOG_PROB, damping=0.1)(params, x, y, weights=weights),
        "in pieces": jf.exact_fisher(model, batch_size=16)(params, x).diagonal(),
        "Kronecker": jf.kronecker(jf.exact_fisher(model)(params, x, weights=weights)).diagonal(),
        "sampled": drawn(params, jax.random.key(3), x).diagonal(),
    }


@in_numpy()
def main():
    number, count, port = map(int, sys.argv[1:])
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"localhost:{port}", count, number)
    params, x, y = jax.tree.map(np.asarray, problem())
    weights = np.where(np.arange(EXAMPLES) % 5 == 2, 0.0, 1.0)
    mesh = jax.make_mesh((count,), ("examples",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    share = slice(number * EXAMPLES // count, (number + 1) * EXAMPLES // count)
    given = [jax.make_array_from_process_local_data(apart, array[share]) for array in (weights, x, y)]
    kept = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(everywhere, leaf), params)
    found = jax.jit(answers, out_shardings=everywhere)(kept, *given)
    if number == 0:
        alone = evaluated(answers, params, weights, x, y)
        for name, value in found.items():
            print(json.dumps({"name": name, "off": off(alone[name], value)}))


if __name__ == "__main__":
    stack.run(main)
