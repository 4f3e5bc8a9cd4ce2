"""Steps and views whose parameters are spread over devices, against one device; run by `test_sharding`.

Three layers, two of them with a bias, whose weights are split along their inputs, their outputs or both. Prints a line of JSON
for each way. It has the largest difference relative to its array; for each array that must be spread like a parameter or a side
of one, its shape, the number of entries on a device and the number allowed; the shapes of the arrays that the compiled program
gathers; and the size of the largest array on a device while it runs.
"""

import dataclasses
import itertools
import json
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import stack
from collectives import largest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from programs.evaluate import in_numpy, traced

import jaxfisher as jf
from jaxfisher._operators import factored
from jaxfisher._tree import split

WIDTHS = (8, 16, 32, 28)
BIASED = (True, False, True)
EXAMPLES = 8


class Way(NamedTuple):
    """A mesh, its axes that split the inputs and the outputs of each layer's weight, and its axis that splits the examples."""

    name: str
    mesh: Mesh
    axes: tuple[tuple[str | None, str | None], ...]
    examples: str | None = None


def ways():
    """Spread along the inputs (with the examples along the same axis, or not), the outputs, the hidden units, or along both."""
    two, four = (
        jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]) for count in (2, 4)
    )
    yield Way("inputs", two, (("model", None),) * 3)
    yield Way("outputs", two, ((None, "model"),) * 3)
    yield Way("hidden", two, ((None, "model"), ("model", None), (None, "model")))
    yield Way("inputs", four, (("model", None),) * 3)
    yield Way("inputs and examples", four, (("model", None),) * 3, "model")
    square = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    yield Way("both", square, (("rows", "columns"),) * 3)


def model(params, x):
    for k, layer in enumerate(params):
        x = (jnp.tanh(x) if k else x).astype(layer["w"].dtype) @ layer["w"] + layer.get("b", 0)
    return jf.Categorical(logits=jnp.real(x))


def placed(params, way):
    """The parameters, spread as ``way`` says; a bias is spread as its outputs are."""
    place = lambda array, *axes: jax.device_put(array, NamedSharding(way.mesh, PartitionSpec(*axes)))  # noqa: E731
    made = []
    for layer, axes in zip(params, way.axes, strict=True):
        made.append({name: place(leaf, *(axes if name == "w" else axes[1:])) for name, leaf in layer.items()})
    return made, place


def sides(blocks, way):
    """The factors of layers, with the number of devices over which each should be spread. A bias's corner is one number."""
    for (inputs, outputs), axes in zip(blocks, way.axes, strict=True):
        counts = [1 if axis is None else way.mesh.shape[axis] for axis in axes]
        yield from ((part, counts[0]) for part in inputs[:2] if part is not None)
        yield outputs, counts[1]


def shared(leaf):
    """The number of entries of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def difference(one, many):
    """The difference between the results of several devices and those of one."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    pairs = [[np.float64(1) * np.asarray(leaf) for leaf in pair] for pair in pairs]
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-300)) for a, b in pairs)


def report(what, way, off, pieces, text):
    """Print the line of one program."""
    parts = [(leaf.shape, shared(leaf), math.prod(leaf.shape) // count) for leaf, count in pieces]
    shapes = re.findall(r" = \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    gathered = [[int(size) for size in sizes.split(",")] for sizes in shapes]
    name = f"{what}, {way.name} over {way.mesh.size}"
    print(json.dumps({"name": name, "off": off, "parts": parts, "gathered": gathered, "largest": largest(text)}))


def steps(what, params, data, named, opt=lambda mesh: jf.kfac()):
    """Two steps of kfac, in which it makes everything; its state must be spread as the parameters are from the start.

    One program takes both steps, with the same shardings. The results of one device are computed in NumPy. In half precision
    only the first step is compared: the starts of the second differ by rounding, which the ratios in its rates magnify.
    """

    half = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))

    def trained(step, given, data, again=lambda given: given):
        first = step(*given, *data)
        params, state, value = first if half else step(*again(first[:2]), *data)
        # The sign of an eigenvector is arbitrary, so states with eigenvectors are not compared.
        return first, (params, () if what == "by eigenvectors" else state, value)

    runs = {}  # by mesh, so that ways with the same mesh share a trace
    run = jf.training_step(model, opt(None))
    _, alone = trained(traced(run), (params, run.init(params, *data)), data)
    for way in ways():
        if way.name not in named:
            continue
        if way.mesh not in runs:
            made = jf.training_step(model, opt(way.mesh))
            runs[way.mesh] = made, jax.jit(made)
        run, step = runs[way.mesh]
        spread, place = placed(params, way)
        batch = tuple(place(array, way.examples) for array in data)
        given = spread, run.init(spread, *batch)
        program = step.lower(*given, *batch).compile()
        places = program.input_shardings[0][:2]
        (kept, state, _), last = trained(program, given, batch, lambda found, places=places: jax.device_put(found, places))
        counts = [leaf.size // shared(leaf) for leaf in jax.tree.leaves(split(spread))]
        pieces = [(leaf, leaf.size // shared(own)) for leaf, own in zip(*map(jax.tree.leaves, (kept, spread)), strict=True)]
        # Factors that are inverted by one device each are replicated on all devices.
        if isinstance(state, jf.AdaptDampingState):
            trees = state.inner[1].step, state.recent
            pieces += [pair for tree in trees for pair in zip(jax.tree.leaves(tree), counts, strict=True)]
            # All devices share the rows of every matrix, also for the side of a layer that is not spread.
            arrays = jax.tree.leaves((state.inner[0].mean, state.inner[0].in_use))
            pieces += [(part, way.mesh.size) for part in arrays if part.ndim > 2 and part.shape[1] > 1]
        report(what, way, difference(alone, last), pieces, program.as_text())


def masked_and_apart(mesh):
    """An optimiser that leaves out one bias and one weight, and inverts each factor on one device."""

    def apart(fisher):
        view = jf.kronecker(fisher)
        return view if mesh is None else jf.spread_solves(view, mesh, mesh.axis_names[0])

    return optax.masked(jf.kfac(view=apart), [{"w": True, "b": False}, {"w": False}, {"w": True, "b": True}])


def views(params, data):
    """A running mean of views that a user carries from batch to batch keeps its sharding."""
    merged = jax.jit(lambda mean, params, x: jf.merge(mean, jf.kronecker(jf.exact_fisher(model)(params, x))))
    first = jf.kronecker(jf.exact_fisher(model)(params, data[0]))
    one = traced(merged)(first, params, data[0][::-1])
    for way in ways():
        spread, place = placed(params, way)
        blocks = []
        for block, axes in zip(first.form.blocks, way.axes, strict=True):
            # The corner of a bias has one row, which is on every device.
            put = lambda part, axes=axes, place=place: place(part, None, axes[0] if part.shape[1] > 1 else None)  # noqa: E731
            side = jax.tree.map(put, block.input_side)
            blocks.append(dataclasses.replace(block, input_side=side, outputs=place(block.outputs, None, axes[1])))
        mean = dataclasses.replace(first, form=dataclasses.replace(first.form, blocks=tuple(blocks)))
        args = mean, spread, place(data[0][::-1], way.examples)
        program = merged.lower(*args).compile()
        found = program(*args)
        pieces = sides([(block.input_side, block.outputs) for block in found.form.blocks], way)
        report("view", way, difference(one, found), pieces, program.as_text())


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = [{"w": 0.3 * jax.random.normal(next(keys), shape)} for shape in itertools.pairwise(WIDTHS)]
    for layer, biased in zip(params, BIASED, strict=True):
        if biased:
            layer["b"] = 0.1 * jax.random.normal(next(keys), layer["w"].shape[1:])
    data = jax.random.normal(next(keys), (EXAMPLES, WIDTHS[0])), jax.random.randint(next(keys), (EXAMPLES,), 0, WIDTHS[-1])
    steps("step", params, data, {way.name for way in ways()})
    one = ("inputs and examples",)
    steps("by eigenvectors", params, data, ("inputs and examples", "both"), opt=lambda mesh: jf.kfac(solver=None))
    steps("masked and apart", params, data, one, opt=masked_and_apart)
    # Invert factors of more than 4 rows by halves, instead of more than 256.
    factored.HALVED = 4
    steps("by halves", params, data, one)
    steps("bfloat16 by halves", jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), data, one)
    turned = jax.tree.map(lambda leaf: leaf * (1 + 0.5j), params)
    steps("complex", turned, data, one)
    views(params, data)


if __name__ == "__main__":
    stack.run(main)
