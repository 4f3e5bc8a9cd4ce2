"""Steps and seconds to a training loss on real data, for natural gradients and their peers: see README.md beside this file.

python benchmarks/training.py [--check] [--seeds N] [task ...]
"""

from __future__ import annotations

import os

# Read when NumPy and JAX load it: its threads fight XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import jaxfisher as jf
from jaxfisher._demo import text_table

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Six learning rates for every optimiser that has one to tune; the best run is shown."""
CHUNK = 5
"""Steps in one compiled scan, which is what is timed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data, and the training loss to reach; ``batch=None`` trains on all of the data."""

    name: str
    model: Callable[..., Any]
    init: Callable[[jax.Array], Any]
    data: tuple[jax.Array, ...]
    test: tuple[jax.Array, ...]
    batch: int | None
    target: float
    max_steps: int

    @property
    def loss(self) -> Callable[..., jax.Array]:
        """The mean negative log-likelihood, in nats."""
        log_prob = jf.log_likelihood(self.model)
        return lambda params, *data: -jnp.mean(jax.vmap(log_prob, (None, *(0 for _ in data)))(params, *data))


# --- tasks -------------------------------------------------------------------------------------------------------------------


def dense(key: jax.Array, *widths: int) -> list[dict[str, jax.Array]]:
    """Layers with weights of variance one over the inputs, biases zero."""
    pairs = list(itertools.pairwise(widths))
    return [
        {"w": jax.random.normal(k, (i, o)) * i**-0.5, "b": jnp.zeros(o)}
        for k, (i, o) in zip(jax.random.split(key, len(widths) - 1), pairs, strict=True)
    ]


def network(layers: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Tanh between the layers."""
    *hidden, last = layers
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def _split(x: np.ndarray, y: np.ndarray, test: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order]), jnp.asarray(y[order])
    return (x[:-test], y[:-test]), (x[-test:], y[-test:])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = datasets.load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def digits_mlp() -> Task:
    """Handwritten digits, two hidden layers of 256."""
    train, test = _split(*_digits(), 360)
    model = lambda p, x: jf.Categorical(network(p, x))  # noqa: E731
    return Task("digits MLP", model, lambda k: dense(k, 64, 256, 256, 10), train, test, 256, 0.01, 300)


def digits_autoencoder() -> Task:
    """Black and white digits through six numbers and back, Bernoulli pixels."""
    (x, _), (held, _) = _split(*_digits(), 360)
    x, held = ((image > 0.5).astype(jnp.float32) for image in (x, held))
    model = lambda p, x: jf.Bernoulli(network(p, x))  # noqa: E731
    init = lambda k: dense(k, 64, 64, 32, 6, 32, 64, 64)  # noqa: E731
    return Task("digits autoencoder", model, init, (x, x), (held, held), 256, 12.0, 300)


def diabetes() -> Task:
    """Heteroscedastic regression: mean and log-scale of disease progression, from ten numbers."""
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    train, test = _split(x.astype(np.float32), y.astype(np.float32), 90)

    def model(p: Any, x: jax.Array) -> jf.Normal:
        loc, log_scale = network(p, x)
        return jf.Normal(loc, jnp.exp(log_scale))

    return Task("diabetes, heteroscedastic", model, lambda k: dense(k, 10, 32, 2), train, test, None, 0.6, 300)


TASKS = {"mlp": digits_mlp, "autoencoder": digits_autoencoder, "diabetes": diabetes}


# --- optimisers --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimiser under a name; several may compete under one, and the best of them is shown."""

    name: str
    make: Callable[[Task, Any], optax.GradientTransformation]


def peers() -> list[Entry]:
    """First-order optimisers at every rate."""
    first = {"Adam": optax.adam, "AdamW": optax.adamw, "Muon": optax.contrib.muon}
    return [Entry(name, lambda t, p, m=make, r=rate: m(r)) for name, make in first.items() for rate in RATES]


def like(task: Task, params: Any) -> Callable[[], jf.Operator]:
    """An operator such as the steps will have."""
    return lambda: jf.exact_fisher(task.model)(params, *(leaf[: task.batch] for leaf in task.data[:-1]))


def ours() -> list[Entry]:
    """One setting each, the same for every task."""
    return [
        Entry("jf.kfac", lambda t, p: jf.kfac(like(t, p))),
        Entry("jf.kfac, every 3rd", lambda t, p: jf.kfac(like(t, p), update_every=3)),
        Entry("jf.kfac, EKFAC", lambda t, p: jf.kfac(like(t, p), view=jf.eigen_kronecker, decay=None)),
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """How a training went: steps and seconds of stepping to the target, the seconds of the first call, the last losses."""

    name: str
    steps: int | None
    seconds: float
    first: float
    loss: float
    test: float
    step_ms: float


def batches(task: Task, seed: int) -> jax.Array:
    """Indices of each step's examples: one permutation after another, cut into batches."""
    n = len(task.data[0])
    if task.batch is None:
        return jnp.broadcast_to(jnp.arange(n), (task.max_steps, n))
    rng = np.random.default_rng(seed)
    epochs = -(-task.max_steps * task.batch // n)
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
    return jnp.asarray(order[: task.max_steps * task.batch].reshape(task.max_steps, task.batch))


def train(task: Task, entry: Entry, seed: int) -> Run:
    """Train to the target loss on all training data, looked at after every step; only stepping is timed."""
    params = task.init(jax.random.key(seed))
    opt = entry.make(task, params)
    step = jf.training_step(task.model, opt)
    order = batches(task, seed)

    def one(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], Any]:
        params, state, _ = step(*carry, *(leaf[index] for leaf in task.data))
        return (params, state), params

    carry = (params, opt.init(params))
    start = time.perf_counter()
    chunk = jax.jit(lambda carry, order: jax.lax.scan(one, carry, order)).lower(carry, order[:CHUNK]).compile()
    first = time.perf_counter() - start
    evaluate = jax.jit(jax.vmap(task.loss, (0, *(None for _ in task.data))))
    seconds, made, losses = 0.0, 0, np.array([np.inf])
    for k in range(0, task.max_steps, CHUNK):
        start = time.perf_counter()
        carry, path = jax.block_until_ready(chunk(carry, order[k : k + CHUNK]))
        seconds += time.perf_counter() - start
        made += CHUNK
        losses = np.asarray(evaluate(path, *task.data))
        if np.any(losses <= task.target) or not np.all(np.isfinite(losses)):
            break
    hits = np.flatnonzero(losses <= task.target)
    steps = made - CHUNK + int(hits[0]) + 1 if len(hits) else None
    test = float(task.loss(carry[0], *task.test))
    per_step = seconds / made
    return Run(entry.name, steps, per_step * (steps or made), first, float(losses[-1]), test, 1e3 * per_step)


def best(runs: Sequence[Run]) -> Run:
    """The one of fewest steps; where none arrives, that of the lowest loss."""
    return min(runs, key=lambda run: (run.steps is None, run.steps or 0, np.nan_to_num(run.loss, nan=np.inf)))


def row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """Steps of each seed; medians of the rest."""
    median = lambda field: f"{np.median([getattr(run, field) for run in runs]):.3g}"  # noqa: E731
    steps = ", ".join("-" if run.steps is None else str(run.steps) for run in runs)
    return name, steps, median("seconds"), median("step_ms"), median("first"), median("test")


HEADER = ("optimiser", "steps, by seed", "seconds", "a step, ms", "first call, s", "test loss")


def main() -> None:
    """Every optimiser on every task asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="two chunks of one seed: that the lines run")
    given = parser.parse_args()
    for name in given.tasks or TASKS:
        task = TASKS[name]()
        if given.check:
            task = dataclasses.replace(task, max_steps=2 * CHUNK)
        table: dict[str, list[Run]] = {}
        for seed in range(1 if given.check else given.seeds):
            tried: dict[str, list[Run]] = {}
            for entry in [*ours(), *peers()[:: len(RATES) if given.check else 1]]:
                tried.setdefault(entry.name, []).append(train(task, entry, seed))
            for label, runs in tried.items():
                table.setdefault(label, []).append(best(runs))
        print(f"\n{task.name}: to a training loss of {task.target} nats, at most {task.max_steps} steps")
        print(text_table(HEADER, [row(label, runs) for label, runs in table.items()]), flush=True)


if __name__ == "__main__":
    main()
