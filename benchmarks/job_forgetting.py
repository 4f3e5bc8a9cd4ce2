"""Forgetting: accuracy on all tasks after the last one, with different penalties; permuted and split digits, ten seeds."""

from __future__ import annotations

from engine import Row, Sizes

# isort: split

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfisher as jf

CHOOSING, BATCH, STEPS, RATE = 2, 32, 100, 1e-2


@dataclasses.dataclass(frozen=True, eq=False)
class Scenario:
    """A sequence of tasks, and one network for all of them.

    Attributes:
        name: the name in the table.
        outputs: the number of outputs of the network.
        model: from the network's outputs to a distribution.
        train: inputs and labels, with a leading axis of tasks.
        test: inputs and labels of other images.
    """

    name: str
    outputs: int
    model: Callable[[jax.Array], Any]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def scenarios(sizes: Sizes) -> list[Scenario]:
    """Permuted: all ten digits, with another order of the pixels for each task. Split: odd or even, two digits per task."""
    from sklearn.datasets import load_digits  # here, since no other job needs scikit-learn

    images, labels = load_digits(return_X_y=True)
    images, rng = images / 16, np.random.default_rng(0)
    train = sizes.examples(300)
    chosen = rng.permutation(len(images))[: 2 * train]
    orders = [np.arange(64), *(rng.permutation(64) for _ in range(4))]
    x = jnp.asarray(np.stack([images[chosen][:, order] for order in orders]), jnp.float32)
    y = jnp.tile(jnp.asarray(labels[chosen]), (len(orders), 1))
    permuted = Scenario("permuted", 10, jf.Categorical, (x[:, :train], y[:, :train]), (x[:, train:], y[:, train:]))
    pairs = [rng.permutation(np.flatnonzero(labels // 2 == k))[:340] for k in range(5)]
    x = jnp.asarray(np.stack([images[pair] for pair in pairs]), jnp.float32)
    y = jnp.asarray(np.stack([labels[pair] % 2 for pair in pairs]))
    cut = min(train, 230)
    odd = lambda outputs: jf.Bernoulli(logits=outputs[0])  # noqa: E731
    return [permuted, Scenario("split", 1, odd, (x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]))]


def first(scenario: Scenario, key: jax.Array) -> Any:
    """A network of 32 hidden units."""
    keys = jax.random.split(key)
    w1, w2 = jax.random.normal(keys[0], (64, 32)) / 8, jax.random.normal(keys[1], (32, scenario.outputs)) / 6
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(scenario.outputs)}


def predicted(scenario: Scenario, params: Any, x: jax.Array) -> Any:
    """The prediction for ONE image."""
    return scenario.model(jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])


def loss(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean negative log-likelihood of the images of a task."""
    log_prob = jf.log_likelihood(functools.partial(predicted, scenario))
    return -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))


def accuracies(scenario: Scenario, params: Any) -> jax.Array:
    """The accuracy on the test images of every task."""

    def right(x: jax.Array, y: jax.Array) -> jax.Array:
        logits = predicted(scenario, params, x).logits
        return (jnp.argmax(logits) == y) if scenario.outputs > 1 else ((logits > 0) == y)

    return jnp.mean(jax.vmap(jax.vmap(right))(*scenario.test), axis=1)


def exact(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """The diagonal of the exact Fisher."""
    return jf.diagonal(jf.exact_fisher(functools.partial(predicted, scenario))(params, x))


def kronecker(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """The Kronecker factors of the exact Fisher."""
    return jf.kronecker(jf.exact_fisher(functools.partial(predicted, scenario))(params, x))


def empirical(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """The diagonal of the empirical Fisher, at the task's own labels."""
    log_prob = jf.log_likelihood(functools.partial(predicted, scenario))
    return jf.diagonal(jf.empirical_fisher(log_prob)(params, x, y))


def squared_batches(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """Squares of the mean gradients of batches, which two libraries take for the diagonal of a Fisher."""
    count = max(1, len(x) // BATCH)
    cut = [array[: count * (len(x) // count)].reshape(count, -1, *array.shape[1:]) for array in (x, y)]
    mean_score = lambda params, x, y: -loss(scenario, params, x, y)  # noqa: E731
    return jf.diagonal(jf.empirical_fisher(mean_score)(params, *cut))


WAYS: dict[str, tuple[Callable[..., jf.Operator], list[float]]] = {
    "exact, diagonal": (exact, [0.0, 100.0, 1000.0]),
    "exact, Kronecker": (kronecker, [3.0, 30.0, 300.0]),
    "empirical, diagonal": (empirical, [30.0, 100.0, 1000.0]),
    "squared batch gradients": (squared_batches, [100.0, 1e3, 1e4]),
}
"""The curvature that is kept of a task, and the strengths to try: equally many for each, so that they share a program."""


def learned(scenario: Scenario, params: Any, data: Any, whole: jf.Operator, strength: jax.Array) -> Any:
    """Learn one more task by Adam, with the penalty around the last optimum; the parameters and the accuracies after it."""
    opt, penalty = optax.adam(RATE), jf.ewc_penalty(whole, params, strength)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        slope = jax.grad(lambda params: loss(scenario, params, *data) + penalty(params))(params)
        updates, state = opt.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    new = jax.lax.scan(step, (params, opt.init(params)), length=STEPS)[0][0]
    return new, accuracies(scenario, new)


@functools.cache
def program(scenario: Scenario) -> Callable[..., Any]:
    """`learned` for all runs at once, as one program."""
    return jax.jit(jax.vmap(functools.partial(learned, scenario), (0, None, 0, 0)))


def in_turn(scenario: Scenario, make: Callable[..., jf.Operator], strengths: list[float], keys: jax.Array) -> np.ndarray:
    """Learn the tasks one after the other. Accuracies ``[strengths, seeds, after, on]``: after one task, on another."""
    params = jax.vmap(functools.partial(first, scenario))(jnp.tile(keys, len(strengths)))
    grid = jnp.repeat(jnp.asarray(strengths), len(keys))
    view = jax.jit(jax.vmap(functools.partial(make, scenario), (0, None, None)))
    both = jax.jit(jax.vmap(jf.merge))
    whole, seen = None, []
    for k in range(len(scenario.train[0])):
        data = tuple(array[k] for array in scenario.train)
        held = view(params, *data) if whole is None else whole
        params, right = program(scenario)(params, data, held, k * grid)
        made = view(params, *data)
        whole = made if whole is None else both(whole, made)
        seen.append(right)
    return np.asarray(jnp.stack(seen, 1)).reshape(len(strengths), len(keys), len(seen), -1)


def line(case: str, bare: np.ndarray, curve: np.ndarray, strength: float) -> Row:
    """A row: the accuracy on all tasks after the last one, against that without a penalty, and the accuracy that was lost."""
    without, end = bare[:, -1].mean(1), curve[:, -1].mean(1)
    learned_at = np.stack([curve[:, k, k] for k in range(curve.shape[1] - 1)], 1)
    words = [f"{each.mean():.1%} (+- {each.std():.1%})" for each in (without, end)]
    note = f"strength {strength:g}; forgotten {np.mean(learned_at - curve[:, -1, :-1]):.1%}"
    return Row(case, *words, f"{100 * (end.mean() - without.mean()):+.1f} points", "", "", note)


def rows(sizes: Sizes) -> list[Row]:
    """Accuracy on five tasks after the last one, without a penalty and with one; ten seeds."""
    lines, seeds = [], 10 if sizes.shrink == 1 else 2
    keys = jax.random.split(jax.random.key(1), seeds + CHOOSING)
    for scenario in scenarios(sizes):
        found = {name: in_turn(scenario, make, strengths, keys) for name, (make, strengths) in WAYS.items()}
        bare = found["exact, diagonal"][0, :seeds]
        for name, (_, strengths) in WAYS.items():
            # Choose the strength on seeds that are not reported.
            best = int(np.argmax(found[name][:, seeds:, -1].mean((1, 2))))
            lines.append(line(f"{scenario.name} digits, {name}", bare, found[name][best, :seeds], strengths[best]))
        at_100 = found["squared batch gradients"][0, :seeds]
        lines.append(line(f"{scenario.name} digits, squared batch gradients as if they were the diagonal", bare, at_100, 100))
    return lines
