"""The costs of the parts of a step of `jf.kfac`, in forward passes and in steps of Adam: see README.md beside this file.

python benchmarks/price.py [--check] [--repeats N] [width or task ...]
"""

from __future__ import annotations

import os

# NumPy and JAX read this when they load BLAS, whose threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from task import dense, network
from tasks import TASKS

import jaxfisher as jf

Problem = tuple[Any, Callable[..., jf.Distribution], jax.Array, jax.Array]
FIRST, STEPS = 6, 60
"""Steps made before timing, and timed steps in one call after them; their average includes every period of `jf.kfac`."""
SHORT = 30
"""Steps in one call from the first step on: about the length of a short training."""


def problem(width: int, examples: int) -> Problem:
    """Parameters, model and a batch of an MLP 64-width-width-10."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[1], (examples, 64)), jax.random.randint(keys[2], (examples,), 0, 10)
    return dense(keys[0], 64, width, width, 10), lambda params, x: jf.Categorical(network(params, x)), x, y


def of_task(name: str) -> Problem:
    """The first parameters and the first batch of a task of `training.py`."""
    task = TASKS[name]()
    if task.statistics is not None or task.log_likelihood is not None:
        raise ValueError(
            f"price: the loss of {name} is not the mean of its model's log-likelihood; expected a task where it is."
        )
    x, y = (jnp.asarray(leaf[task.batches(0)[0]]) for leaf in task.train)
    return task.init(jax.random.key(0)), task.model, x, y


def parts(given: Problem) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Each part of a step, repeated many times in one program, since calling a program takes as long as a small part."""
    params, model, x, y = given
    log_prob = jf.log_likelihood(model)
    loss = lambda x: lambda p: -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(p, x, y))  # noqa: E731
    key = jax.random.key(1)
    view = lambda x: jf.kronecker(jf.sampled_fisher(model)(params, key, x))  # noqa: E731
    K, doubled = jax.jit(view)(x), jax.tree.map(lambda leaf: 1.5 * leaf, params)
    fisher = jf.implicit_fisher(model)
    made = {
        "forward pass": (lambda x: loss(x)(params), x),
        "gradient": (lambda x: jax.grad(loss(x))(params), x),
        "factors of one drawn target": (view, x),
        "a solve with its Cholesky factors": (lambda K: jf.solve(K, params, 1e-3, solver=jf.factored_solve)[0], K),
        "two numbers of the quadratic model": (lambda x: [fisher(params, x).quadratic(v) for v in (params, doubled)], x),
    }
    return {name: (STEPS, again_and_again(*each)) for name, each in made.items()}


def again_and_again(part: Callable[[Any], Any], argument: Any) -> Callable[[], Any]:
    """A program of many calls of a function. Each call depends on all results of the one before, so XLA removes none."""

    def call(zero: jax.Array, _: None) -> tuple[jax.Array, None]:
        leaves, treedef = jax.tree.flatten(argument)
        given = [leaf + zero.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf for leaf in leaves]
        # The barrier hides from XLA that only one number of each result is used.
        found = jax.lax.optimization_barrier(jax.tree.leaves(part(jax.tree.unflatten(treedef, given))))
        return sum((0 * leaf.reshape(-1)[0].astype(zero.dtype) for leaf in found), start=zero), None

    run = jax.jit(lambda zero: jax.lax.scan(call, zero, length=STEPS)[0])
    return lambda: run(jnp.zeros(()))


def steps(given: Problem, optimiser: optax.GradientTransformation) -> tuple[dict[str, tuple[int, Callable[[], Any]]], float]:
    """Two numbers of steps with a program of each: many steps after the first ones, and a few from the first one on.

    Also the seconds of the first call of a step.
    """
    params, model, x, y = given
    step = jf.training_step(model, optimiser)
    begun = time.perf_counter()
    begin, one = (params, step.init(params, x, y)), jax.jit(step)
    after = jax.block_until_ready(one(*begin, x, y))[:2]
    first = time.perf_counter() - begun
    for _ in range(FIRST - 1):
        after = one(*after, x, y)[:2]
    many = jax.jit(
        lambda carry, length: jax.lax.scan(lambda carry, _: (step(*carry, x, y)[:2], None), carry, length=length)[0],
        static_argnums=1,
    )
    made = {"average step": (STEPS, lambda: many(after, STEPS)), f"of the first {SHORT}": (SHORT, lambda: many(begin, SHORT))}
    return made, first


def least(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of each program, run in turn so that a slow spell of the machine affects all."""
    for run in programs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begun)
    return {name: min(seconds) for name, seconds in times.items()}


def table(title: str, given: Problem, repeats: int) -> None:
    """Measure a problem, and print the table."""
    optimisers = {"Adam": optax.adam(1e-3), "jf.kfac": jf.kfac(), "jf.kfac, all at every step": jf.kfac(update_every=1)}
    made = {name: steps(given, optimiser) for name, optimiser in optimisers.items()}
    counted = parts(given) | {f"{what} of {name}": each for name, (found, _) in made.items() for what, each in found.items()}
    first = {f"average step of {name}": f"{seconds:.2g}" for name, (_, seconds) in made.items()}
    seconds = least({name: run for name, (_, run) in counted.items()}, repeats)
    print(f"\n### {title}, {len(given[2])} examples, {jax.devices()[0].platform}, load {os.getloadavg()[0]:.1f}\n")
    print("| part | ms | forward passes | Adam steps | first call, s |\n| --- | --- | --- | --- | --- |")
    each = {name: value / counted[name][0] for name, value in seconds.items()}
    for name, value in each.items():
        ratios = value / each["forward pass"], value / each["average step of Adam"]
        print(f"| {name} | {1e3 * value:.3g} | {ratios[0]:.2f} | {ratios[1]:.2f} | {first.get(name, '')} |", flush=True)


def main() -> None:
    """Print a table for each network given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["128", "512", "1024"], help="a width, or a task of training.py")
    parser.add_argument("--examples", type=int, default=512, help="in the batch of a network that is given by its width")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--check", action="store_true", help="a tiny network, once: that the lines run")
    given = parser.parse_args()
    for name in ["8"] if given.check else given.networks:
        examples = 16 if given.check else given.examples
        of_width = name.isdigit()
        title = f"64-{name}-{name}-10" if of_width else name
        table(title, problem(int(name), examples) if of_width else of_task(name), 1 if given.check else given.repeats)


if __name__ == "__main__":
    main()
