"""Steps and seconds to a training loss on real data, for natural gradients and their peers: see README.md beside this file.

python benchmarks/training.py [--check] [--seeds N] [--only NAME ...] [task ...]
"""

from __future__ import annotations

import os

# Read when NumPy and JAX load it: its threads fight XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from peers import Entry, Trainer, Unsuited, entries
from tasks import TASKS, Task

CHUNK = 5
"""Steps in one call, which is what is timed."""
WARM = 2
"""Chunks before the clock: in them everything is compiled."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: steps and seconds of stepping to the target, the held-out score there (else at the end), the last loss."""

    steps: int | None
    seconds: float
    per_step: float
    score: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Result:
    """An entry on a task: its runs by seed, the seconds of its first call, the bytes of its state."""

    entry: Entry
    runs: list[Run]
    first: float
    bytes: int


@functools.cache
def evaluation(task: Task) -> Callable[[Any], jax.Array]:
    """The watched losses along a path."""
    along = jax.jit(jax.vmap(task.loss, (0, *(None for _ in task.watched))))
    return lambda path: along(path, *task.watched)


def chunks(task: Task, seed: int) -> list[tuple[jax.Array, tuple[jax.Array, ...]]]:
    """Keys and batches of each call: they depend on the seed alone, so they are the same for every optimiser."""
    order, keys = task.batches(seed), jax.random.split(jax.random.key(seed + 1000), task.max_steps)
    pieces = [slice(k, k + CHUNK) for k in range(0, task.max_steps, CHUNK)]
    return [(keys[piece], tuple(leaf[order[piece]] for leaf in task.train)) for piece in pieces]


def start(task: Task, trainer: Trainer, seed: int, keys: jax.Array, batches: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """The first parameters, which depend on the seed alone, and the state for them."""
    params = task.init(jax.random.key(seed))
    return params, trainer.init(params, keys[0], tuple(leaf[0] for leaf in batches))


def warm_up(task: Task, trainer: Trainer) -> tuple[float, int]:
    """The seconds of a first call and of the little it runs; the bytes of the state."""
    pieces = chunks(task, 0)[:WARM]
    begun = time.perf_counter()
    params, state = start(task, trainer, 0, *pieces[0])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for keys, batches in pieces:
        params, state, _ = jax.block_until_ready(trainer.advance(params, state, keys, batches))
    return time.perf_counter() - begun, size


def train(task: Task, trainer: Trainer, seed: int) -> Run:
    """Train to the target, looked at after every step; only stepping is timed."""
    pieces = chunks(task, seed)
    params, state = start(task, trainer, seed, *pieces[0])
    seconds, made, losses, last = 0.0, 0, np.array([np.inf]), 0
    for keys, batches in pieces:
        begun = time.perf_counter()
        params, state, path = jax.block_until_ready(trainer.advance(params, state, keys, batches))
        seconds += time.perf_counter() - begun
        losses = np.asarray(evaluation(task)(path))
        hits = np.flatnonzero(losses <= task.target)
        last = int(hits[0]) if len(hits) else CHUNK - 1
        made += last + 1
        if len(hits) or not np.all(np.isfinite(losses)):
            break
    score = float(task.metric.score(jax.tree.map(lambda leaf: leaf[last], path), *task.test))
    per_step = seconds / (made + CHUNK - 1 - last)
    return Run(made if losses[last] <= task.target else None, per_step * made, per_step, score, float(losses[last]))


def measure(task: Task, entry: Entry, seeds: int) -> Result:
    """All seeds of an entry."""
    trainer = entry.make(task)
    first, size = warm_up(task, trainer)
    return Result(entry, [train(task, trainer, seed) for seed in range(seeds)], first, size)


def best(results: Sequence[Result]) -> Result:
    """The setting that arrives most often, then in the fewest steps; where none arrives, that of the lowest loss."""

    def order(result: Result) -> tuple[int, float, float]:
        steps = [run.steps for run in result.runs if run.steps is not None]
        loss = float(np.median([np.nan_to_num(run.loss, nan=np.inf) for run in result.runs]))
        return len(result.runs) - len(steps), float(np.mean(steps)) if steps else 0.0, loss

    return min(results, key=order)


# --- what is printed ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The median, and the least and the largest."""
    low, middle, high = (f"{value:.3g}" for value in (min(values), float(np.median(values)), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def row(result: Result) -> tuple[str, ...]:
    """A line of the table."""
    entry, runs = result.entry, result.runs
    arrived = [run for run in runs if run.steps is not None]
    return (
        f"{entry.name}, {entry.setting}" if entry.setting else entry.name,
        ", ".join("-" if run.steps is None else str(run.steps) for run in runs),
        spread([run.seconds for run in arrived]) if arrived else "-",
        f"{1e3 * np.median([run.per_step for run in runs]):.3g}",
        spread([run.score for run in runs]),
        f"{result.first:.2g}",
        f"{result.bytes / 1e3:,.1f} kB",
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as README.md has it."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def chosen(only: Sequence[str], check: bool) -> list[Entry]:
    """The entries asked for; to check that lines run, one setting of each is enough."""
    found = [entry for entry in entries() if not only or any(name.lower() in entry.name.lower() for name in only)]
    return list({entry.name: entry for entry in found}.values()) if check else found


def table(task: Task, asked: Sequence[Entry], seeds: int) -> None:
    """Measure and print."""
    tried: dict[str, list[Result]] = {}
    left_out: dict[str, str] = {}
    for entry in asked:
        try:
            tried.setdefault(entry.name, []).append(measure(task, entry, seeds))
        except Unsuited as reason:
            left_out[entry.name] = str(reason)
    print(f"\n### {task.name}: to a training loss of {task.target:g} nats, at most {task.max_steps} steps\n")
    header = ("optimiser", "steps, by seed", "seconds", "a step, ms", task.metric.name, "first call, s", "state")
    print(markdown(header, [row(best(results)) for results in tried.values() if results]))
    if left_out:
        print("\nLeft out: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items()) + ".", flush=True)


def main() -> None:
    """Every optimiser on every task asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="entries whose name has one of these in it")
    parser.add_argument("--check", action="store_true", help="five steps of one seed and setting: that the lines run")
    given = parser.parse_args()
    for name in given.tasks or TASKS:
        task = TASKS[name]()
        if given.check:
            task = dataclasses.replace(task, max_steps=CHUNK)
        table(task, chosen(given.only, given.check), 1 if given.check else given.seeds)


if __name__ == "__main__":
    main()
