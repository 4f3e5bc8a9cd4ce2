"""What a step of `jf.kfac` is made of, in forward passes and in steps of Adam: see README.md beside this file.

python benchmarks/price.py [--check] [--repeats N] [width ...]
"""

from __future__ import annotations

import os

# Read when NumPy and JAX load it: its threads fight XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from task import dense, network

import jaxfisher as jf

Problem = tuple[Any, Callable[..., jf.Distribution], jax.Array, jax.Array]
STEPS = 60
"""Steps in one call: their average has every period in it, and the first steps are made before the clock."""


def problem(width: int, examples: int) -> Problem:
    """Parameters, model and a batch for 64-width-width-10."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[1], (examples, 64)), jax.random.randint(keys[2], (examples,), 0, 10)
    return dense(keys[0], 64, width, width, 10), lambda params, x: jf.Categorical(network(params, x)), x, y


def parts(given: Problem) -> dict[str, Callable[[], Any]]:
    """Each part of a step as a compiled program of its own."""
    params, model, x, y = given
    log_prob = jf.log_likelihood(model)
    loss = lambda p: -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(p, x, y))  # noqa: E731
    key = jax.random.key(1)
    view = jax.jit(lambda p: jf.kronecker(jf.sampled_fisher(model)(p, key, x)))
    K, doubled = view(params), jax.tree.map(lambda leaf: 1.5 * leaf, params)
    solve = jax.jit(lambda K, v: jf.solve(K, v, 1e-3, solver=jf.factored_solve)[0])
    half = jax.jit(lambda p, u, v: (jf.implicit_fisher(model)(p, x).quadratic(u), jf.implicit_fisher(model)(p, x).quadratic(v)))
    made = {
        "forward pass": (jax.jit(loss), (params,)),
        "gradient": (jax.jit(jax.grad(loss)), (params,)),
        "factors of one drawn target": (view, (params,)),
        "a solve with its Cholesky factors": (solve, (K, params)),
        "two numbers of the quadratic model": (half, (params, params, doubled)),
    }
    return {name: (lambda f=f, args=args: f(*args)) for name, (f, args) in made.items()}


def steps(given: Problem, optimiser: optax.GradientTransformation) -> tuple[Callable[[], Any], float]:
    """Many steps as one program, started after the first ones; and the seconds of the first call of a step."""
    params, model, x, y = given
    step = jf.training_step(model, optimiser)
    begun = time.perf_counter()
    state, one = step.init(params, x, y), jax.jit(step)
    params, state, _ = jax.block_until_ready(one(params, state, x, y))
    first = time.perf_counter() - begun
    for _ in range(5):
        params, state, _ = one(params, state, x, y)
    many = jax.jit(lambda carry: jax.lax.scan(lambda carry, _: (step(*carry, x, y)[:2], None), carry, length=STEPS)[0])
    return lambda: many((params, state)), first


def least(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of each, run in turn, so that a slow spell meets all of them."""
    for run in programs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begun)
    return {name: min(seconds) for name, seconds in times.items()}


def table(width: int, examples: int, repeats: int) -> None:
    """Measure and print."""
    given = problem(width, examples)
    optimisers = {"Adam": optax.adam(1e-3), "jf.kfac": jf.kfac(), "jf.kfac, all at every step": jf.kfac(update_every=1)}
    made = {name: steps(given, optimiser) for name, optimiser in optimisers.items()}
    seconds = least(parts(given) | {name: run for name, (run, _) in made.items()}, repeats)
    seconds = {name: value / STEPS if name in made else value for name, value in seconds.items()}
    print(f"\n### 64-{width}-{width}-10, {examples} examples, {jax.devices()[0].platform}, load {os.getloadavg()[0]:.1f}\n")
    print("| part | ms | forward passes | Adam steps | first call, s |\n| --- | --- | --- | --- | --- |")
    for name, value in seconds.items():
        title, first = (f"average step of {name}", f"{made[name][1]:.2g}") if name in made else (name, "")
        ratios = value / seconds["forward pass"], value / seconds["Adam"]
        print(f"| {title} | {1e3 * value:.3g} | {ratios[0]:.2f} | {ratios[1]:.2f} | {first} |", flush=True)


def main() -> None:
    """A table for each width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("widths", nargs="*", type=int, default=[128, 512, 1024])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--check", action="store_true", help="a tiny network, once: that the lines run")
    given = parser.parse_args()
    for width in [8] if given.check else given.widths:
        table(width, 16 if given.check else given.examples, 1 if given.check else given.repeats)


if __name__ == "__main__":
    main()
