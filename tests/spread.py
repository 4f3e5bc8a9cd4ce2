"""Solves by a rows x rows matrix that is spread over eight devices, against a dense one in float64; run by `test_sharding`.

Prints a line of JSON for each dtype and damping, one each for scores in pieces, centred scores and a sum, and for each of these
one with the sizes of the arrays that a compiled solve stores and sends.
"""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import stack
from collectives import collectives, largest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs.evaluate import in_numpy

import jaxfisher as jf

DEVICES, EXAMPLES, WIDTHS, BLOCK = 8, 256, (10, 18, 14, 4), 32


def model(params, x):
    for weight in params[:-1]:
        x = jnp.tanh(x @ weight)
    return jf.Categorical(logits=x @ params[-1])


LOG_PROB = jf.log_likelihood(model)


def problem(dtype):
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) + 1)
    shapes = list(itertools.pairwise(WIDTHS))
    params = [jax.random.normal(key, shape, dtype) / shape[0] ** 0.5 for key, shape in zip(keys, shapes, strict=False)]
    return params, jax.random.normal(keys[-2], (EXAMPLES, 10), dtype), jax.random.randint(keys[-1], (EXAMPLES,), 0, 4)


DAMPING = 0.1
FISHERS = {
    "whole": jf.empirical_fisher(LOG_PROB),
    "pieces": jf.empirical_fisher(LOG_PROB, max_bytes=2**15),
    "centred pieces": jf.empirical_fisher(LOG_PROB, center=True, batch_size=64),
    "sum": lambda params, x, y: jf.empirical_fisher(LOG_PROB)(params, x, y) + jf.empirical_fisher(LOG_PROB)(params, -x, y),
}


def solved(fisher, mesh, params, x, y):
    return jf.spread_solves(fisher(params, x, y), mesh, "examples", block=BLOCK).solve(
        jax.tree.map(jnp.ones_like, params), DAMPING
    )


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))

    def step(params, x, y, damping, weights=None):
        F = jf.spread_solves(jf.empirical_fisher(LOG_PROB)(params, x, y, weights=weights), mesh, "examples", block=BLOCK)
        return jf.solve(F, jax.tree.map(jnp.ones_like, params), damping)

    for dtype in (jnp.float64, jnp.float32):
        params, x, y = problem(dtype)
        w = jnp.where(jnp.arange(EXAMPLES) % 3 == 1, 0, 1).astype(dtype)
        given = (jax.device_put(params, everywhere), *jax.device_put((x, y), apart))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        scores = np.asarray(jf.scores(LOG_PROB)(wide, x.astype(jnp.float64), y).as_matrix())
        for weights in (None, w):
            omega = np.ones(EXAMPLES) / EXAMPLES if weights is None else np.asarray(w, np.float64) / np.sum(np.asarray(w))
            matrix = scores.T @ (omega[:, None] * scores)
            for damping in (1e-5 if dtype == jnp.float64 else 1e-3, 1.0):
                x_of, info = jax.jit(step)(*given, damping, weights)
                found = np.asarray(ravel_pytree(x_of)[0], np.float64)
                damped = matrix + damping * np.eye(len(matrix))
                rest = np.linalg.norm(damped @ found - 1) / np.linalg.norm(np.ones(len(matrix)))
                said = {"residual": float(info.residual), "converged": bool(info.converged)}
                print(json.dumps({"dtype": jnp.dtype(dtype).name, "damping": damping, "rest": rest, **said}))
    params, x, y = problem(jnp.float64)
    given = (jax.device_put(params, everywhere), *jax.device_put((x, y), apart))
    for name, fisher in FISHERS.items():
        program = jax.jit(partial(solved, fisher, mesh)).lower(*given).compile()
        found, matrix = ravel_pytree(program(*given))[0], np.asarray(fisher(params, x, y).as_matrix())
        rest = matrix @ found + DAMPING * found - 1
        text, memory = program.as_text(), program.memory_analysis().temp_size_in_bytes
        off = float(np.linalg.norm(rest) / len(rest) ** 0.5)
        print(json.dumps({"name": name, "off": off, "largest": largest(text), "sent": collectives(text), "memory": memory}))


if __name__ == "__main__":
    stack.run(main)
