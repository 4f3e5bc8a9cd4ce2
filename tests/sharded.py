"""Training steps with the data spread over eight devices against the same steps on one; run by `test_sharding`.

Prints a line of JSON for each optimiser and kind of mesh: the largest difference, relative to large entries, and the sizes of
the arrays that all devices gather. Likewise for a mean over a stream of batches and the verdict on the model, without sizes.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import stack
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs.evaluate import evaluated, in_numpy

import jaxfisher as jf

EXAMPLES = 32


def model(params, x):
    return jf.Categorical(logits=jnp.tanh(x @ params["a"] + params["b"]) @ params["c"])


def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": 0.3 * jax.random.normal(keys[0], (6, 8)),
        "b": jnp.zeros(8),
        "c": 0.3 * jax.random.normal(keys[1], (8, 3)),
    }
    return params, jax.random.normal(keys[2], (EXAMPLES, 6)), jax.random.randint(keys[3], (EXAMPLES,), 0, 3)


def kinds():
    """Least squares on the outputs, at points that are spread over devices, and on some parameters, without points."""
    outputs = lambda params, x, y: jnp.tanh(x @ params["a"] + params["b"]) @ params["c"] - jax.nn.one_hot(y, 3)  # noqa: E731
    return jf.residuals({"outputs": outputs, "parameters": lambda params: params["b"]})


def runs(params, x, y):
    """By name: the model, the optimiser, the Fisher, and the data."""
    residuals = (kinds(), jf.levenberg_marquardt(), None, ({"outputs": (x, y), "parameters": ()},))
    return {name: (model, opt, fisher, (x, y)) for name, (opt, fisher) in optimisers(params, x).items()} | {
        "residuals": residuals
    }


def optimisers(params, x):
    # The exact Fisher has more rows than parameters, the empirical one fewer.
    # `training_step` gives a Fisher the inputs only.
    empirical = lambda params, x: jf.empirical_fisher(lambda params, x: model(params, x).log_prob(0))(params, x)  # noqa: E731
    return {
        "exact": (jf.natural_gradient(1.0, 1e-2, radius=0.1), None),
        "empirical": (jf.natural_gradient(1.0, 1e-2), empirical),
        "diagonal": (jf.natural_gradient(1.0, 1e-2, view=jf.diagonal), None),
        "kfac": (jf.kfac(lambda: jf.exact_fisher(model)(params, x)), None),
    }


def looked_at(params, batches):
    """A mean over batches of two sizes, and the verdict on the model, as numbers."""
    mean = jf.accumulate(jf.exact_fisher(model), jf.kronecker)(params, ((x,) for x in batches))
    verdict = jf.check_fisher(model)(params, jax.random.key(1), batches[0])
    return {"accumulate": jax.tree.leaves(mean.diagonal()), "check_fisher": [verdict.quotients]}


def off(one, many):
    """The largest difference between two trees, relative to the largest number of the first."""
    one, many = (np.asarray(ravel_pytree(jax.tree.map(np.asarray, tree))[0]) for tree in (one, many))
    return float(np.abs(many - one).max() / np.abs(one).max())


def gathered(text):
    """The sizes of the arrays that a program gathers on every device."""
    shapes = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", text)
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def difference(a, b):
    """The largest difference, relative to the largest entry if that is above one, as in the inverses of a state."""
    return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(a))))


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    params, x, y = problem()
    for name, (trained, opt, fisher, data) in runs(params, x, y).items():
        step, state = jf.training_step(trained, opt, fisher), opt.init(params)
        one = evaluated(step, params, state, *data)
        for kind in (AxisType.Auto, AxisType.Explicit):
            if kind == AxisType.Explicit and name not in ("exact", "residuals"):
                continue
            mesh = jax.make_mesh((8,), ("examples",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
                given = (*jax.device_put((params, state), everywhere), *jax.device_put(data, apart))
                program = jax.jit(step).lower(*given).compile()
                many = program(*given)
            pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
            off = max(difference(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
            print(json.dumps({"name": name, "kind": kind.name, "off": off, "gathered": gathered(program.as_text())}))
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    one = looked_at(params, [x[:24], x[24:]])
    many = looked_at(jax.device_put(params, everywhere), jax.device_put([x[:24], x[24:]], apart))
    for name, values in one.items():
        off = max(difference(*(np.asarray(leaf, np.float64) for leaf in pair)) for pair in zip(values, many[name], strict=True))
        print(json.dumps({"name": name, "kind": "Auto", "off": off, "gathered": []}))


if __name__ == "__main__":
    stack.run(main)
