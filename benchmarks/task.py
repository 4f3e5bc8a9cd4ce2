"""The definition of a training task, and the parts that several tasks share: layers, metrics, a split of the data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfisher as jf

Arrays = tuple[jax.Array, ...]
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Six learning rates for every optimiser that has one to tune."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measure of parameters on a held-out set: ``score(params, *test)``."""

    name: str
    score: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, its data, and the training loss to reach in nats per example.

    Attributes:
        name: the name in the table.
        forward: ``(params, x)`` to the distribution's fields; x is one example, or many along leading axes. If there are
            ``statistics``, it takes them as a third argument; without that argument it uses the statistics of x as a batch.
        distribution: from those fields to the distribution.
        init: from a key to parameters.
        train: inputs and targets.
        test: inputs and targets that are held out.
        watched: the training data on which the loss is evaluated: all of them, if that is cheap.
        metric: the measure on the held-out data.
        batch: examples per step; None trains on all of the data.
        target: the loss to reach.
        max_steps: the number of steps after which a run gives up.
        statistics: ``(params, x) -> pytree`` of a whole batch, such as means and variances by which a network normalises.
        log_likelihood: ``(fields, y)`` of many examples, if it is not the distribution's own ``log_prob``.
        rates: the learning rates to try for each optimiser that has one.
        seeds: the number of runs.
        lean: whether a run is long. Then the rates are compared on the first seed only, each run ends at the number of steps
            with which the best rate before it arrived, and our optimisers are measured with their defaults alone.
    """

    name: str
    forward: Callable[[Any, jax.Array], jax.Array]
    distribution: Callable[[jax.Array], jf.Distribution]
    init: Callable[[jax.Array], Any]
    train: Arrays
    test: Arrays
    watched: Arrays
    metric: Metric
    batch: int | None
    target: float
    max_steps: int
    statistics: Callable[[Any, jax.Array], Any] | None = None
    log_likelihood: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    rates: tuple[float, ...] = RATES
    seeds: int = 3
    lean: bool = False

    @property
    def model(self) -> Callable[..., jf.Distribution]:
        """The model of ONE example, and of the statistics of its batch if there are some."""
        return lambda params, *inputs: self.distribution(self.forward(params, *inputs))

    @property
    def loss(self) -> Callable[..., jax.Array]:
        """The mean negative log-likelihood of ``(params, x, y)``, in nats per example."""
        if self.log_likelihood is not None:
            return lambda params, x, y: -jnp.mean(self.log_likelihood(self.forward(params, x), y))
        if self.statistics is not None:
            return lambda params, x, y: -jnp.mean(self.distribution(self.forward(params, x)).log_prob(y))
        log_prob = jf.log_likelihood(self.model)
        return lambda params, *data: -jnp.mean(jax.vmap(log_prob, (None, *(0 for _ in data)))(params, *data))

    def training_step(
        self, optimiser: optax.GradientTransformation, fisher: jf.FisherFunction | None = None
    ) -> jf.TrainingStep:
        """The library's step on what `data` returns; with statistics the loss is that of the batch, as in docs/models.md."""
        own = self.statistics is not None or self.log_likelihood is not None
        loss = lambda params, x, *data: self.loss(params, x, data[-1])  # noqa: E731
        return jf.training_step(self.model, optimiser, fisher, loss=loss if own else None)

    def data(self, params: Any, batch: Arrays) -> tuple[Any, ...]:
        """The arguments of a step for a batch."""
        if self.statistics is None:
            return batch
        x, y = batch
        each = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x), *leaf.shape)), self.statistics(params, x))
        return x, each, y

    @property
    def size(self) -> int:
        """Examples per step."""
        return self.batch or len(self.train[0])

    def batches(self, seed: int) -> jax.Array:
        """Indices of each step's examples: one permutation after another, cut into batches."""
        n = len(self.train[0])
        if self.batch is None:
            return jnp.broadcast_to(jnp.arange(n), (self.max_steps, n))
        rng = np.random.default_rng(seed)
        epochs = -(-self.max_steps * self.batch // n)
        order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
        return jnp.asarray(order[: self.max_steps * self.batch].reshape(self.max_steps, self.batch))


# --- networks ----------------------------------------------------------------------------------------------------------------


def dense(key: jax.Array, *widths: int) -> list[dict[str, jax.Array]]:
    """Layers with weights of variance one over the number of inputs, and biases of zero."""
    pairs = list(itertools.pairwise(widths))
    return [
        {"w": jax.random.normal(k, (i, o)) * i**-0.5, "b": jnp.zeros(o)}
        for k, (i, o) in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    ]


def network(layers: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The outputs of dense layers with tanh in between."""
    *hidden, last = layers
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


# --- metrics -----------------------------------------------------------------------------------------------------------------


def accuracy(forward: Callable[[Any, jax.Array], jax.Array]) -> Metric:
    """The share of examples whose most probable class is the right one."""
    return Metric("test accuracy", lambda params, x, y: jnp.mean((jnp.argmax(forward(params, x), -1) == y).astype(float)))


def of_loss(name: str, scale: float, model: Callable[..., jf.Distribution]) -> Metric:
    """The mean negative log-likelihood of the test set, in some unit."""
    log_prob = jf.log_likelihood(model)
    return Metric(name, lambda params, *data: -scale * jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, *data)))


# --- data ---------------------------------------------------------------------------------------------------------------------


def split(x: np.ndarray, y: np.ndarray, test: int) -> tuple[Arrays, Arrays]:
    """Training data, and ``test`` held-out examples, split in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order]), jnp.asarray(y[order])
    return (x[:-test], y[:-test]), (x[-test:], y[-test:])


def standard(x: np.ndarray) -> np.ndarray:
    """The data with each column scaled to mean zero and variance one."""
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)
