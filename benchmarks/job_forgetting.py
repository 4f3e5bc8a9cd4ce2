"""Forgetting: accuracy on all tasks after the last, of permuted and of split digits, by what is kept of a task; ten seeds."""

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
    """Tasks one after the other, and one network for all.

    Attributes:
        name: what it is called.
        outputs: how many the network has.
        model: from its outputs to a distribution.
        train: inputs and labels, with a leading axis of tasks.
        test: the same, of other images.
    """

    name: str
    outputs: int
    model: Callable[[jax.Array], Any]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def scenarios(sizes: Sizes) -> list[Scenario]:
    """All ten digits with the pixels in another order for each task; and odd or even, of two digits for each task."""
    from sklearn.datasets import load_digits  # the only place that needs it

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
    """The mean over the images of a task."""
    log_prob = jf.log_likelihood(functools.partial(predicted, scenario))
    return -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))


def accuracies(scenario: Scenario, params: Any) -> jax.Array:
    """On the test images of every task."""

    def right(x: jax.Array, y: jax.Array) -> jax.Array:
        logits = predicted(scenario, params, x).logits
        return (jnp.argmax(logits) == y) if scenario.outputs > 1 else ((logits > 0) == y)

    return jnp.mean(jax.vmap(jax.vmap(right))(*scenario.test), axis=1)


def exact(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """The diagonal of the exact Fisher."""
    return jf.diagonal(jf.exact_fisher(functools.partial(predicted, scenario))(params, x))


def kronecker(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """Its Kronecker factors."""
    return jf.kronecker(jf.exact_fisher(functools.partial(predicted, scenario))(params, x))


def empirical(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """The diagonal at the task's own labels."""
    log_prob = jf.log_likelihood(functools.partial(predicted, scenario))
    return jf.diagonal(jf.empirical_fisher(log_prob)(params, x, y))


def squared_batches(scenario: Scenario, params: Any, x: jax.Array, y: jax.Array) -> jf.Operator:
    """What two libraries take for it: squares of the mean gradients of batches."""
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
"""What is kept of a task, and the strengths that are tried: as many for each, so that programs are shared."""


def learned(scenario: Scenario, params: Any, data: Any, whole: jf.Operator, strength: jax.Array) -> Any:
    """One more task by Adam, with the penalty about the last optimum, and what is right after that."""
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
    """`learned` for all runs at once."""
    return jax.jit(jax.vmap(functools.partial(learned, scenario), (0, None, 0, 0)))


def in_turn(scenario: Scenario, make: Callable[..., jf.Operator], strengths: list[float], keys: jax.Array) -> np.ndarray:
    """Accuracies ``[strengths, seeds, after, on]``."""
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
    """Accuracy on all tasks after the last, of every seed, against that without a penalty; and what was forgotten."""
    without, end = bare[:, -1].mean(1), curve[:, -1].mean(1)
    learned_at = np.stack([curve[:, k, k] for k in range(curve.shape[1] - 1)], 1)
    words = [f"{each.mean():.1%} (+- {each.std():.1%})" for each in (without, end)]
    note = f"strength {strength:g}; forgotten {np.mean(learned_at - curve[:, -1, :-1]):.1%}"
    return Row(case, *words, f"{100 * (end.mean() - without.mean()):+.1f} points", "", "", note)


def rows(sizes: Sizes) -> list[Row]:
    """What is right on five tasks after the last, without a penalty and with one, of ten seeds."""
    lines, seeds = [], 10 if sizes.shrink == 1 else 2
    keys = jax.random.split(jax.random.key(1), seeds + CHOOSING)
    for scenario in scenarios(sizes):
        found = {name: in_turn(scenario, make, strengths, keys) for name, (make, strengths) in WAYS.items()}
        bare = found["exact, diagonal"][0, :seeds]
        for name, (_, strengths) in WAYS.items():
            # The strength is chosen on seeds that are not reported.
            best = int(np.argmax(found[name][:, seeds:, -1].mean((1, 2))))
            lines.append(line(f"{scenario.name} digits, {name}", bare, found[name][best, :seeds], strengths[best]))
        at_100 = found["squared batch gradients"][0, :seeds]
        lines.append(line(f"{scenario.name} digits, squared batch gradients as if they were the diagonal", bare, at_100, 100))
    return lines
