"""The work and traffic of a device by `docs/scale.md`, against programs compiled for eight; run by `test_sharding`.

Prints a line of JSON for each part of a step, on eight devices and on one with as many examples as each of these: its flops and
the numbers that a device receives, by the compiler and by the model. The last line has the memory of each of eight devices.
"""

import json

import jax
import jax.numpy as jnp
import stack
from collectives import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxfisher as jf
from jaxfisher._cholesky_on_mesh import Strips
from jaxfisher._operators.from_scores import Scaled
from jaxfisher._operators.spread import _gram

DEVICES, EXAMPLES, WIDTHS = 8, 1024, (64, 96, 96, 64)
PAIRS = [(64, 96), (96, 96), (96, 64)]
P = sum(i * o for i, o in PAIRS)
SIDES, SQUARES = (sum(i**power + o**power for i, o in PAIRS) for power in (1, 2))


def model(params, x):
    for weight in params[:-1]:
        x = jnp.tanh(x @ weight)
    return jf.Normal(x @ params[-1], 1.0)


LOG_PROB = jf.log_likelihood(model)


def loss(params, x, y):
    return -jnp.mean(jax.vmap(LOG_PROB, (None, 0, 0))(params, x, y))


def spread_gram(params, x, y, strips):
    return _gram(Scaled(jf.scores(LOG_PROB)(params, x, y), jnp.ones(())), strips)


PARTS = {
    "gradient": lambda params, x, y, _: jax.grad(loss)(params, x, y),
    "Gram": spread_gram,
    "moments": lambda params, x, y, _: jf.kronecker(jf.empirical_fisher(LOG_PROB)(params, x, y)),
}
MODEL = {
    "gradient": lambda n: (6 * n * P, P),
    # Factors come from a forward and a backward pass, which forms no gradient.
    "Gram": lambda n: (4 * n * P + 2 * n * n * SIDES, n * SIDES),
    "moments": lambda n: (4 * n * P + 2 * n * SQUARES, SQUARES),
}


def compiled(run, n, count):
    mesh = jax.make_mesh((count,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    abstract = lambda sharding, *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)  # noqa: E731
    params, data = [abstract(everywhere, *pair) for pair in PAIRS], 2 * [abstract(apart, n, WIDTHS[0])]
    program = jax.jit(lambda *args: jax.tree.leaves(run(*args, Strips(mesh, "examples", 8)))).lower(params, *data).compile()
    costs, sent = program.cost_analysis(), collectives(program.as_text())
    return {"flops": costs["flops"], "bytes": costs["bytes accessed"], "received": sum(sum(sizes) for sizes in sent.values())}


def main():
    for name, run in PARTS.items():
        for n, count in ((EXAMPLES, DEVICES), (EXAMPLES // DEVICES, 1)):
            flops, received = MODEL[name](n)
            expected = {"flops": flops / count, "received": received if count > 1 else 0}
            found = {"name": name, "devices": count, "compiled": compiled(run, n, count), "modelled": expected}
            print(json.dumps(found))
    # The memory of each device, as `jf.explain` states it.
    mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(AxisType.Auto,))
    data = jax.device_put(2 * [jnp.ones((EXAMPLES, WIDTHS[0]))], NamedSharding(mesh, PartitionSpec("examples")))
    params = [jnp.ones(pair) for pair in PAIRS]
    held = jax.tree.leaves(jf.scores(LOG_PROB)(params, *data).leaves)
    there, said = sum(leaf.addressable_shards[0].data.nbytes for leaf in held), jf.explain(LOG_PROB)(params, *data)
    print(json.dumps({"held": there, "explained": said.bytes_per_device, "on all": said.bytes}))


if __name__ == "__main__":
    stack.run(main)
