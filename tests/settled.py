"""Steps that compile once, however parameters and examples are sharded; run by `test_sharding`.

Prints a line of JSON for each optimiser and placement: how many programs three steps compiled, and which parameters and parts
of the state had another sharding or type after the first step.
"""

import json

import jax
import jax.numpy as jnp
import optax
import stack
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxfisher as jf


def labels(params):
    """Which optimiser has a parameter."""
    return {name: "ours" if name == "w" else "theirs" for name in params}


def partitioned():
    return optax.partition({"ours": jf.kfac(view=jf.diagonal), "theirs": optax.adam(0.1)}, labels)


def every_other():
    own = jf.natural_gradient(0.1, lambda count: 0.1, view=jf.diagonal, decay=0.9, radius=1.0)
    return optax.MultiSteps(own, 2).gradient_transformation()


def spring():
    view = {"view": jf.kronecker, "decay": 0.9, "update_every": 2}
    return optax.chain(jf.scale_by_fisher(0.1, momentum=0.9, **view), optax.scale(-0.1))


def modelled():
    inside = optax.chain(jf.scale_by_fisher(), jf.quadratic_model())
    return optax.chain(jf.adapt_damping(inside, 0.1), jf.backtrack_kl(1.0))


OPTIMISERS = {
    "kfac": (jf.kfac, ("one device", "one device of four", "outputs", "inputs", "examples", "both", "held")),
    "kfac by eigenvectors": (lambda: jf.kfac(solver=None), ("both",)),
    "kfac of a part": (partitioned, ("inputs", "both")),
    "every other": (every_other, ("one device of four", "inputs", "both")),
    "spring": (spring, ("inputs", "both")),
    "dense": (lambda: jf.natural_gradient(0.1, 0.1, view=jf.dense, update_every=2), ("inputs", "both")),
    "quadratic model": (modelled, ("one device of four", "both")),
    "levenberg_marquardt": (jf.levenberg_marquardt, ("both",)),
}
"""The optimisers, and the placements to try for each: all of them for the optimiser with the largest state."""


def model(params, x):
    return jf.Categorical(logits=x @ params["w"] + params.get("b", 0))


def ways():
    """One device; parameters spread along the outputs or the inputs, examples spread, or both; and a bias that is not spread.

    If the weight is spread along its inputs, XLA spreads the bias too, unless results must have the shardings of the arguments.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": 0.3 * jax.random.normal(keys[0], (8, 4)), "b": jnp.zeros(4)}
    data = jax.random.normal(keys[1], (8, 8)), jax.random.randint(keys[2], (8,), 0, 4)
    yield "one device", params, data
    yield "one device of four", *jax.device_put((params, data), jax.devices()[1])
    mesh = jax.make_mesh((4,), ("all",), axis_types=(AxisType.Auto,))
    put = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    outputs, inputs = {"w": put(params["w"], None, "all"), "b": put(params["b"], "all")}, {"w": put(params["w"], "all")}
    yield "outputs", outputs, put(data)
    yield "inputs", inputs, put(data)
    yield "examples", put(params), put(data, "all")
    yield "both", inputs, put(data, "all")
    yield "held", inputs | {"b": put(params["b"])}, put(data)


def places(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def described(tree):
    kind = lambda leaf: (str(leaf.dtype), leaf.weak_type, str(leaf.sharding), leaf.committed)  # noqa: E731
    return {jax.tree_util.keystr(path): kind(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def main():
    for name, (make, tried) in OPTIMISERS.items():
        run = jf.training_step(model, make())
        usual = jax.jit(run)
        for way, params, data in ways():
            if way not in tried:
                continue
            state = run.init(params, *data)
            step = jax.jit(run, out_shardings=(*places((params, state)), None)) if way == "held" else usual
            made, before = step._cache_size(), described((params, state))
            params, state, _ = step(params, state, *data)
            after = described((params, state))
            for _ in range(2):
                params, state, _ = step(params, state, *data)
            moved = [(path, kind, after[path]) for path, kind in before.items() if kind != after[path]]
            print(json.dumps({"name": name, "way": way, "programs": step._cache_size() - made, "moved": moved}))


if __name__ == "__main__":
    stack.run(main)
