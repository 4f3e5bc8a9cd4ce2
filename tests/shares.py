"""The work and the traffic of each of eight devices when examples are spread over them; run by `test_sharding`.

Prints a line of JSON for each quantity and way of passing the data: the difference from one device, the share of one device's
work, and the sizes of the arrays that are sent.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import stack
from collectives import collectives, products
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs.evaluate import in_numpy

import jaxfisher as jf

DEVICES, EXAMPLES, WIDTHS = 8, 128, (20, 24, 5)


def model(params, x):
    return jf.Categorical(logits=jnp.tanh(x @ params["a"] + params["b"]) @ params["c"])


LOG_PROB = jf.log_likelihood(model)
QUANTITIES = {
    "Gram": lambda params, w, x, y, **how: scores(params, w, x, y, **how).gram(),
    "product": lambda params, w, x, y, **how: scores(params, w, x, y, **how).mv(params),
    "transposed product": lambda params, w, x, y, **how: scores(params, w, x, y, **how).rmv(x[:, 0]),
    "diagonal": lambda params, w, x, y, **how: scores(params, w, x, y, **how).diagonal(),
    "moments": lambda params, w, x, y, **how: jf.kronecker(exact(params, w, x, **how)),
    "implicit product": lambda params, w, x, y, **how: jf.implicit_fisher(model, **how)(params, x, weights=w).mv(params),
    "loss": lambda params, w, x, y, **how: jf.value_and_natural_grad(
        LOG_PROB, jf.exact_fisher(model, **how), view=jf.diagonal, damping=0.1, **how
    )(params, x, y, weights=w),
}


def scores(params, w, x, y, **how):
    return jf.scores(LOG_PROB, **how)(params, x, y, weights=w)


def exact(params, w, x, **how):
    return jf.exact_fisher(model, **how)(params, x, weights=w)


def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    d, h, k = WIDTHS
    params = {
        "a": jax.random.normal(keys[0], (d, h)) / d**0.5,
        "b": jnp.zeros(h),
        "c": jax.random.normal(keys[1], (h, k)) / h**0.5,
    }
    weights = jnp.where(jnp.arange(EXAMPLES) % 5 == 2, 0, jax.random.uniform(keys[4], (EXAMPLES,)))
    x, y = jax.random.normal(keys[2], (EXAMPLES, d)), jax.random.randint(keys[3], (EXAMPLES,), 0, k)
    return params, weights, x, y


def difference(one, other):
    one, other = (np.asarray(each, np.float64) for each in (one, other))
    return float(np.abs(one - other).max() / np.abs(one).max())


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    params, w, x, y = problem()
    mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    # A batch size of 40 splits 128 examples into pieces of 32.
    ways = {"weights": (w, {}), "in pieces": (w, {"batch_size": 40})}
    for way, (given, how) in ways.items():
        for name, quantity in QUANTITIES.items():
            run = jax.jit(lambda params, w, x, y, quantity=quantity, how=how: jax.tree.leaves(quantity(params, w, x, y, **how)))
            args = (params, given, x, y)
            spread = (jax.device_put(params, everywhere), *jax.device_put((given, x, y), apart))
            one, many = (run.lower(*each).compile() for each in (args, spread))
            pairs = [
                (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(one(*args), many(*spread), strict=True)
            ]
            off = max((np.abs(a - b).max() / np.abs(a).max() for a, b in pairs if a.size), default=0)
            texts = many.as_text(), one.as_text()
            found = {"way": way, "name": name, "off": off, "sent": collectives(texts[0])}
            found["flops"] = many.cost_analysis()["flops"] / one.cost_analysis()["flops"]
            found["products"] = products(texts[0]) / products(texts[1])
            print(json.dumps(found))


if __name__ == "__main__":
    stack.run(main)
