"""Every kind of answer inside ``shard_map`` on two devices against the same on each device's examples; run by `test_sharding`.

Prints a line of JSON for each answer: the largest difference, relative to the largest number.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import stack
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec
from programs.evaluate import traced

import jaxfisher as jf

EXAMPLES, DEVICES = 6, 2


def model(params, x):
    """A model that looks up a row of a table: under `vmap` JAX cannot infer over which devices the rows vary."""
    row = params["table"][(x[0] > 0).astype(int)]
    return jf.Categorical(logits=jnp.tanh(x @ params["a"] + params["b"] + row) @ params["c"])


LOG_PROB = jf.log_likelihood(model)


def flat(tree):
    return ravel_pytree(tree)[0]


def answers(params, keys, x, y):
    """One answer of every kind, with a leading axis."""
    F = jf.exact_fisher(model)(params, x)
    scores = jf.scores(LOG_PROB)(params, x, y)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    made = {
        "scores": scores.gram(),
        "in pieces": jf.scores(LOG_PROB, batch_size=2)(params, x, y).gram(),
        "centred": jf.scores(LOG_PROB, center=True)(params, x, y).gram(),
        "weighted": jf.empirical_fisher(LOG_PROB)(params, x, y, weights=jnp.abs(x[:, 0])).as_matrix(),
        "exact": F.as_matrix(),
        "exact, in pieces": flat(jf.exact_fisher(model, batch_size=2)(params, x).diagonal()),
        "sampled": jf.sampled_fisher(model)(params, keys[0], x).as_matrix(),
        "implicit": flat(jf.implicit_fisher(model)(params, x).mv(params)),
        "Hessian of the KL": jf.kl_hessian(model)(params, x).as_matrix(),
        "observed": jf.observed_information(LOG_PROB)(params, x, y).as_matrix(),
        "diagonal": flat(jf.diagonal(F).diagonal()),
        "Kronecker": jf.kronecker(F).as_matrix(),
        "Kronecker, of pieces": jf.kronecker(jf.exact_fisher(model, max_bytes=8000)(params, x)).as_matrix(),
        "Kronecker, of products": jf.kronecker(jf.implicit_fisher(model)(params, x)).as_matrix(),
        "natural gradient": flat(jf.natural_grad(LOG_PROB, damping=0.1)(params, x, y)),
        "solve": flat(jf.solve(F, params, 0.1)[0]),
        "solve of blocks": flat(jf.block_diagonal(F).solve(params, 0.1)),
        "CG": flat(jf.solve(F, params, 0.1, solver=jf.CG(rtol=1e-12))[0]),
        "log-determinant": F.logdet(0.1)[None],
        "KL": jf.kl(model)(params, moved, x)[None],
    }
    return {name: value.reshape(1, -1) for name, value in made.items()}


def problem(examples):
    """Parameters, data, and a key."""
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "a": jax.random.normal(keys[0], (3, 4)),
        "b": jnp.zeros(4),
        "c": jax.random.normal(keys[1], (4, 3)),
        "table": 0.3 * jnp.arange(-4.0, 4.0).reshape(2, 4),
    }
    x, y = jax.random.normal(keys[2], (examples, 3)), jax.random.randint(keys[3], (examples,), 0, 3)
    return params, x, y, keys[4]


def main():
    jax.config.update("jax_enable_x64", True)
    params, x, y, key = problem(EXAMPLES)
    drawn = jax.random.split(key, DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(AxisType.Auto,))
    apart = PartitionSpec("examples")
    mapped = jax.shard_map(answers, mesh=mesh, in_specs=(PartitionSpec(), apart, apart, apart), out_specs=apart)
    found = jax.jit(mapped)(params, drawn, x, y)
    one, share = traced(answers), EXAMPLES // DEVICES
    parts = [slice(k * share, (k + 1) * share) for k in range(DEVICES)]
    each = [one(params, drawn[k : k + 1], x[part], y[part]) for k, part in enumerate(parts)]
    for name, value in found.items():
        expected = np.concatenate([np.asarray(single[name]) for single in each])
        off = np.abs(np.asarray(value) - expected).max() / np.abs(expected).max()
        print(json.dumps({"name": name, "off": float(off)}))
    # With ``check_vma=False`` JAX does not know that parameters are the same on all devices.
    alone = lambda params, x, y: flat(jf.natural_grad(LOG_PROB, damping=0.1)(params, x, y))[None]  # noqa: E731
    specs = (PartitionSpec(), apart, apart)
    unchecked = jax.shard_map(alone, mesh=mesh, in_specs=specs, out_specs=apart, check_vma=False)
    off = np.abs(np.asarray(jax.jit(unchecked)(params, x, y)) - np.asarray(found["natural gradient"])).max()
    print(json.dumps({"name": "natural gradient, unchecked", "off": float(off / np.abs(found["natural gradient"]).max())}))
    scores = jax.shard_map(
        lambda params, x, y: jf.LSMR().least_squares(jf.scores(LOG_PROB)(params, x, y), jnp.ones(share), 0.1)[0],
        mesh=mesh,
        in_specs=specs,
        out_specs=apart,
    )
    try:
        jax.eval_shape(scores, params, x, y)
    except NotImplementedError as error:
        print(json.dumps({"name": "LSMR", "says": str(error)}))


if __name__ == "__main__":
    stack.run(main)
