"""The work of each device when examples are spread over one, two, four or eight of them; run by `test_sharding`.

This script only compiles. It prints a line of JSON for each quantity and way of passing the data: its work for every number of
devices. The body of a loop over pieces is counted once.
"""

import json

import jax
import jax.numpy as jnp
import stack
from collectives import products
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from shares import QUANTITIES, model

import jaxfisher as jf

NAMES = ("Gram", "product", "diagonal", "moments")
EXAMPLES, WIDTHS = 2048, (20, 24, 5)


def abstract(sharding, *sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def programs(way):
    """Functions of parameters, weights, inputs and targets."""
    how = {"batch_size": 1024} if way == "in pieces" else {}

    def step(params, w, x, y):
        opt = jf.kfac()
        run = jf.training_step(model, opt, jf.exact_fisher(model, **how)) if how else jf.training_step(model, opt)
        return run(params, run.init(params, x, y, weights=w), x, y, weights=w)

    named = {name: lambda *args, name=name: jax.tree.leaves(QUANTITIES[name](*args, **how)) for name in NAMES}
    return named | {"kfac step": step}


def work(name, run, devices):
    """The work of a device: flops, or for the Gram matrix the number of results of its matrix products."""
    mesh = jax.make_mesh((devices,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    d, h, k = WIDTHS
    params = {"a": abstract(everywhere, d, h), "b": abstract(everywhere, h), "c": abstract(everywhere, h, k)}
    data = abstract(apart, EXAMPLES), abstract(apart, EXAMPLES, d), abstract(apart, EXAMPLES, dtype=jnp.int32)
    program = jax.jit(run).lower(params, *data).compile()
    return products(program.as_text()) if name == "Gram" else program.cost_analysis()["flops"]


def main():
    # `shares.py` has the work of eight devices in pieces.
    for way, counts in {"whole": (1, 2, 4, 8), "in pieces": (1, 4)}.items():
        for name, run in programs(way).items():
            print(json.dumps({"way": way, "name": name, "work": {D: work(name, run, D) for D in counts}}))


if __name__ == "__main__":
    stack.run(main)
