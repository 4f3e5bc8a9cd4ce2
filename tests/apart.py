"""Kronecker factors that are inverted by one device of eight each, against all on one device; run by `test_sharding`.

Prints a line of JSON for each answer, with the largest difference, and one for the work of the busiest of one, two, four and
eight devices: its flops, and the work of its Cholesky factors.
"""

import itertools
import json
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import stack
from collectives import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs.evaluate import in_numpy

import jaxfisher as jf
from jaxfisher._operators.apart import factorised
from jaxfisher._operators.turns import INVERSES

WIDTHS, STEPS = (6, 8, 3), {8: 5, 4: 1, 2: 1}
"""Two layers, whose four factors leave four of eight devices without one; and the number of steps by number of devices."""
LAYERS, SIZE = 8, 256


def model(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jf.Categorical(logits=x @ params[-1]["w"] + params[-1]["b"])


LOG_PROB = jf.log_likelihood(model)


def start(widths):
    pairs = list(itertools.pairwise(widths))
    keys = jax.random.split(jax.random.key(0), len(pairs))
    return [
        {"w": jax.random.normal(key, pair) / pair[0] ** 0.5, "b": jnp.zeros(pair[1])}
        for key, pair in zip(keys, pairs, strict=True)
    ]


def mesh_of(count):
    return jax.make_mesh((count,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def apart_on(mesh):
    return lambda fisher: jf.spread_solves(jf.kronecker(fisher), mesh, "examples")


def resumed(folder, params, data):
    """Parameters and state after steps on fewer and fewer devices, each time restored from a checkpoint."""
    kept = None
    for count, steps in STEPS.items():
        mesh = mesh_of(count)
        everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
        given = (jax.device_put(params, everywhere), *jax.device_put(data, apart))
        step = jf.training_step(model, jf.kfac(view=apart_on(mesh), update_every=3))
        run, state = jax.jit(step), step.init(*given)
        if kept is None:
            kept = given[0], state
        else:
            template = jax.device_put((given[0], state), everywhere)
            with ocp.StandardCheckpointer() as saved:
                kept = saved.restore(folder / "last", template)
        for _ in range(steps):
            *kept, _ = run(*kept, *given[1:])
        with ocp.StandardCheckpointer() as saved:
            saved.save(folder / "last", tuple(kept), force=True)
    return kept


def difference(one, many):
    pairs = [[np.asarray(leaf, np.float64) for leaf in pair] for pair in zip(*map(jax.tree.leaves, (one, many)), strict=True)]
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)) for a, b in pairs)


def factored(text):
    """The work of Cholesky's algorithm in each computation of a program that has some: the cubes of sizes, added up."""
    found = [re.findall(r"\(\w+\[(\d+),(\d+),\d+\]\S* .* custom-call\(.*potrf", part) for part in re.split(r"\n(?=\S)", text)]
    return [sum(int(count) * int(size) ** 3 for count, size in sizes) for sizes in found if sizes]


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    keys = jax.random.split(jax.random.key(1), 2)
    params = start(WIDTHS)
    data = jax.random.normal(keys[0], (32, WIDTHS[0])), jax.random.randint(keys[1], (32,), 0, WIDTHS[-1])
    step = jf.training_step(model, jf.kfac(update_every=3))
    one = params, step.init(params, *data)
    for _ in range(sum(STEPS.values())):
        *one, _ = jax.jit(step)(*one, *data)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"name": "kfac", "off": difference(one, resumed(pathlib.Path(folder), params, data))}))
    spread_data = jax.device_put(data, NamedSharding(mesh_of(8), PartitionSpec("examples")))
    scores = jf.scores(LOG_PROB)(params, *spread_data)
    there = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(scores.leaves))
    said = jf.explain(LOG_PROB)(params, *spread_data)
    print(json.dumps({"name": "memory", "off": abs(there / said.bytes_per_device - 1)}))
    spread, F = apart_on(mesh_of(8)), jf.exact_fisher(model)(params, data[0]) + jf.scaled_identity(params, 0.2)
    everywhere, v = jax.device_put(F, NamedSharding(mesh_of(8), PartitionSpec())), jax.tree.map(jnp.ones_like, params)

    def undamped(K):
        solution, info = jf.solve(K, v, 0.0)
        return solution, info.rank, info.converged

    # Only one of them is called outside ``jit``, where each small operation is a program for eight devices.
    solves = {
        "undamped": jax.jit(undamped),
        "factored": lambda K: jf.solve(K, v, 0.1, jf.factored_solve),
        "by eigenvectors": jax.jit(lambda K: factorised(K.form).diagonal()),
    }
    for name, solve in solves.items():
        print(json.dumps({"name": name, "off": difference(solve(jf.kronecker(F)), solve(spread(everywhere)))}))
    wide = jax.eval_shape(lambda: jf.kronecker(jf.exact_fisher(model)(start((SIZE,) * (LAYERS + 1)), jnp.ones((2, SIZE)))))
    for count in (1, 2, 4, 8):
        view, whole = jf.spread_solves(wide, mesh_of(count), "examples").form, NamedSharding(mesh_of(count), PartitionSpec())
        run = jax.jit(lambda form: INVERSES.refreshed(form, INVERSES.factors(form, jnp.asarray(0.1)), LAYERS * [True], ()))
        place = lambda leaf, whole=whole: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)  # noqa: E731
        program = run.lower(jax.tree.map(place, view)).compile()
        text = program.as_text()
        found = {"flops": program.cost_analysis()["flops"], "factored": factored(text), "sent": collectives(text)}
        print(json.dumps({"devices": count} | found))


if __name__ == "__main__":
    stack.run(main)
