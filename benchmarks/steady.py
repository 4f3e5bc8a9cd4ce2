"""Many steps of `jf.kfac` on a small GPT: whether memory grows, and whether anything is recompiled. See README.md.

python benchmarks/steady.py [--steps N] [--check]
"""

from __future__ import annotations

import os

# NumPy and JAX read this when they load BLAS, whose threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import pathlib
import time

import gpt
import jax
import numpy as np

import jaxfisher as jf

WIDTH, DEPTH, CONTEXT, BATCH = 16, 2, 16, 8
COMPILED: list[float] = []
"""The seconds of each compilation by XLA."""


def listen(event: str, duration: float, **details: object) -> None:
    """A listener to JAX's own events that records compilations."""
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


def resident() -> float:
    """The resident memory of this process now, in MB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Train, and print a line after each tenth of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--check", action="store_true", help="twenty steps: that the lines run")
    given = parser.parse_args()
    steps = 20 if given.check else given.steps
    jax.monitoring.register_event_duration_secs_listener(listen)
    windows = gpt.source(CONTEXT)
    order = np.random.default_rng(0).integers(0, len(windows), (steps, BATCH))
    params = gpt.init(jax.random.key(0), WIDTH, DEPTH, CONTEXT)
    step = jf.training_step(lambda params, x: jf.Categorical(gpt.gpt(params, x)), jf.kfac())
    state, run = step.init(params, windows[:BATCH, :-1], windows[:BATCH, 1:]), jax.jit(step)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, {BATCH} windows of {CONTEXT} bytes a step\n")
    print(
        "| steps | loss, nats a byte | programs of the step | compiled in all | arrays alive | their MB | resident MB | CPU s |"
    )
    print("| " + " | ".join(["---"] * 8) + " |")
    losses = []
    for t, rows in enumerate(order, 1):
        params, state, loss = run(params, state, windows[rows, :-1], windows[rows, 1:])
        losses.append(float(loss) / CONTEXT)
        if t % (steps // 10) == 0:
            sizes = [array.nbytes for array in jax.live_arrays()]  # no reference to the arrays, which would keep them alive
            line = [f"{t:,}", f"{np.mean(losses):.3f}", run._cache_size(), len(COMPILED), len(sizes), f"{sum(sizes) / 1e6:.2f}"]
            print("| " + " | ".join(map(str, [*line, f"{resident():.0f}", f"{time.process_time():.0f}"])) + " |", flush=True)
            losses.clear()


if __name__ == "__main__":
    main()
