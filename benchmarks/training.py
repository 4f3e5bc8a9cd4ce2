"""Steps and seconds to a training loss on real data, for natural gradients and their peers: see README.md beside this file.

python benchmarks/training.py [--check] [--seeds N] [--only NAME ...] [task ...]
"""

from __future__ import annotations

import os

# NumPy and JAX read this when they load BLAS, whose threads would compete with XLA's.
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
from task import Task
from tasks import TASKS

CHUNK = 5
"""Steps in one call. Whole calls are timed."""
WARM = 2
"""Chunks before the timing starts, in which everything is compiled."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: steps and seconds to the target, the held-out score at the target (else at the end), the last loss.

    ``cpu`` is the processor time of one step, which other programs on the machine do not change.
    """

    steps: int | None
    seconds: float
    per_step: float
    cpu: float
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
    # Map over the parameters one set after the other: convolutions with many kernels at once are slow on a CPU.
    along = jax.jit(lambda path, watched: jax.lax.map(lambda params: task.loss(params, *watched), path))
    return lambda path: along(path, task.watched)


def chunks(task: Task, seed: int) -> list[tuple[jax.Array, tuple[jax.Array, ...]]]:
    """Keys and batches of each call. They depend on the seed only, so they are the same for every optimiser."""
    order, keys = task.batches(seed), jax.random.split(jax.random.key(seed + 1000), task.max_steps)
    pieces = [slice(k, k + CHUNK) for k in range(0, task.max_steps, CHUNK)]
    return [(keys[piece], tuple(leaf[order[piece]] for leaf in task.train)) for piece in pieces]


def start(task: Task, trainer: Trainer, seed: int, keys: jax.Array, batches: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """The first parameters, which depend on the seed only, and the optimiser's state for them."""
    params = task.init(jax.random.key(seed))
    return params, trainer.init(params, keys[0], tuple(leaf[0] for leaf in batches))


def warm_up(task: Task, trainer: Trainer) -> tuple[float, int]:
    """The seconds of the first calls, most of which is compiling, and the bytes of the state."""
    pieces = chunks(task, 0)[:WARM]
    begun = time.perf_counter()
    params, state = start(task, trainer, 0, *pieces[0])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for keys, batches in pieces:
        params, state, _ = jax.block_until_ready(trainer.advance(params, state, keys, batches))
    return time.perf_counter() - begun, size


def train(task: Task, trainer: Trainer, seed: int, most: int | None = None) -> Run:
    """Train until the loss after a step reaches the target, or for ``most`` steps; only stepping is timed."""
    pieces = chunks(task, seed)
    params, state = start(task, trainer, seed, *pieces[0])
    seconds, cpu, made, losses, last = 0.0, 0.0, 0, np.array([np.inf]), 0
    for keys, batches in pieces:
        if most is not None and made >= most:
            break
        begun, used = time.perf_counter(), time.process_time()
        params, state, path = jax.block_until_ready(trainer.advance(params, state, keys, batches))
        seconds, cpu = seconds + time.perf_counter() - begun, cpu + time.process_time() - used
        losses = np.asarray(evaluation(task)(path))
        hits = np.flatnonzero(losses <= task.target)
        last = int(hits[0]) if len(hits) else CHUNK - 1
        made += last + 1
        if len(hits) or not np.all(np.isfinite(losses)):
            break
    score = float(task.metric.score(jax.tree.map(lambda leaf: leaf[last], path), *task.test))
    run = made + CHUNK - 1 - last
    per_step, cpu = seconds / run, cpu / run
    return Run(made if losses[last] <= task.target else None, per_step * made, per_step, cpu, score, float(losses[last]))


def measure(task: Task, entry: Entry, seeds: int) -> Result:
    """The runs of an entry with all seeds."""
    trainer = entry.make(task)
    first, size = warm_up(task, trainer)
    return Result(entry, [train(task, trainer, seed) for seed in range(seeds)], first, size)


def raced(task: Task, settings: Sequence[Entry], seeds: int) -> Result:
    """The setting that arrives in the fewest steps on the first seed, with its runs on all seeds.

    A setting is stopped at the least number of steps with which an earlier one arrived: it can no longer be the best.
    """
    tried: list[Result] = []
    trainers: list[Trainer] = []
    for entry in settings:
        trainer = entry.make(task)
        first, size = warm_up(task, trainer)
        most = min((result.runs[0].steps or task.max_steps for result in tried), default=task.max_steps)
        tried.append(Result(entry, [train(task, trainer, 0, most)], first, size))
        trainers.append(trainer)
    found = best(tried)
    trainer = trainers[tried.index(found)]
    return dataclasses.replace(found, runs=[*found.runs, *(train(task, trainer, seed) for seed in range(1, seeds))])


def best(results: Sequence[Result]) -> Result:
    """The setting that arrives most often, and among equals in the fewest steps; if none arrives, the one of lowest loss."""

    def order(result: Result) -> tuple[int, float, float]:
        steps = [run.steps for run in result.runs if run.steps is not None]
        loss = float(np.median([np.nan_to_num(run.loss, nan=np.inf) for run in result.runs]))
        return len(result.runs) - len(steps), float(np.mean(steps)) if steps else 0.0, loss

    return min(results, key=order)


# --- the output --------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the largest value."""
    low, middle, high = (f"{value:.3g}" for value in (min(values), float(np.median(values)), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def cpu_of(result: Result) -> float:
    """The processor time of a step."""
    return float(np.median([run.cpu for run in result.runs]))


def row(result: Result, adam: Result | None) -> tuple[str, ...]:
    """A line of the table; the processor time of a step is in units of Adam's, if Adam was measured."""
    entry, runs = result.entry, result.runs
    arrived = [run for run in runs if run.steps is not None]
    return (
        f"{entry.name}, {entry.setting}" if entry.setting else entry.name,
        ", ".join("-" if run.steps is None else str(run.steps) for run in runs),
        spread([run.seconds for run in arrived]) if arrived else "-",
        spread([run.cpu * run.steps for run in arrived if run.steps]) if arrived else "-",
        f"{1e3 * np.median([run.per_step for run in runs]):.3g}",
        f"{cpu_of(result) / cpu_of(adam):.2f}" if adam else "",
        spread([run.score for run in runs]),
        f"{result.first:.2g}",
        f"{result.bytes / 1e3:,.1f} kB",
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, as in README.md."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def chosen(task: Task, only: Sequence[str], check: bool) -> dict[str, list[Entry]]:
    """The settings of each entry that was asked for; one of each for a check that every line runs."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(task):
        if not only or any(name.lower() in entry.name.lower() for name in only):
            found.setdefault(entry.name, []).append(entry)
    return {name: settings[-1:] for name, settings in found.items()} if check else found


def table(task: Task, asked: dict[str, list[Entry]], seeds: int) -> None:
    """Measure the optimisers on a task, and print the table."""
    tried: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    for name, settings in asked.items():
        try:
            if task.lean:
                tried[name] = raced(task, settings, seeds)
            else:
                tried[name] = best([measure(task, entry, seeds) for entry in settings])
        except Unsuited as reason:
            left_out[name] = str(reason)
    print(f"\n### {task.name}: to a training loss of {task.target:g} nats, at most {task.max_steps} steps\n")
    header = ("optimiser", "steps, by seed", "seconds", "CPU seconds", "a step, ms", "CPU a step, Adam's")
    header = (*header, task.metric.name, "first call, s", "state")
    print(markdown(header, [row(result, tried.get("Adam")) for result in tried.values()]))
    if left_out:
        print("\nLeft out: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items()) + ".", flush=True)


def main() -> None:
    """Measure the optimisers on the tasks given on the command line, or on all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])
    parser.add_argument("--seeds", type=int, help="runs of each setting; unless given, as many as the task says")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="entries whose name has one of these in it")
    parser.add_argument("--check", action="store_true", help="five steps of one seed and setting: that the lines run")
    given = parser.parse_args()
    for name in given.tasks or TASKS:
        task = TASKS[name]()
        if given.check:
            task = dataclasses.replace(task, max_steps=CHUNK)
        table(task, chosen(task, given.only, given.check), 1 if given.check else given.seeds or task.seeds)


if __name__ == "__main__":
    main()
