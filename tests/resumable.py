"""A training run that saves a checkpoint after every step and resumes from the last one; run by `test_training`.

Prints the step at which it began, and at the end all numbers of its parameters and state in hexadecimal.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import stack
from programs.evaluate import in_numpy

import jaxfisher as jf

STEPS = 8


def model(params, x):
    return jf.Categorical(jnp.tanh(x @ params["w"] + params["b"]) @ params["out"])


def like():
    return jf.exact_fisher(model)(start(), jnp.zeros((16, 3)))


def start():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"w": jax.random.normal(keys[0], (3, 4)), "b": jnp.zeros(4), "out": 0.3 * jax.random.normal(keys[1], (4, 3))}


def batch(k):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), k), (16, 3))
    return x, jnp.argmax(x, axis=1)


@in_numpy()
def main():
    """Train. NumPy runs everything except the step, which is compiled."""
    folder = pathlib.Path(sys.argv[1]).resolve()
    inner = jf.scale_by_fisher(0.1, view=jf.kronecker, decay=0.9, update_every=2, like=like)
    opt = jf.adapt_damping(optax.chain(inner, optax.scale_by_learning_rate(0.5)), 0.1)
    params = start()
    state = opt.init(params)
    step = jax.jit(jf.training_step(model, opt)).lower(params, state, *batch(0)).compile()
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=None)) as manager:
        first = 0
        if manager.latest_step() is not None:
            first = manager.latest_step() + 1
            template = {"params": params, "state": state}
            restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(template))
            params, state = restored["params"], restored["state"]
        for k in range(first, STEPS):
            params, state, _ = step(params, state, *batch(k))
            manager.save(k, args=ocp.args.StandardSave({"params": params, "state": state}))
            manager.wait_until_finished()
            time.sleep(0.1)
    numbers = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves((params, state))]
    print(first, *(float(number).hex() for number in np.concatenate(numbers)))


if __name__ == "__main__":
    stack.run(main)
