"""Swinging up a pendulum: return against environment steps, by trust regions and by PPO in Optax; five seeds."""

from __future__ import annotations

from engine import Row, Sizes

# isort: split

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfisher as jf

HIDDEN, TICKS, EPISODES, UPDATES = 32, 200, 32, 30
DISCOUNT, TRACE = 0.97, 0.95
DAMPING, EPOCHS, MINIBATCH, CLIP = 1e-3, 10, 640, 0.2
RADII, RATES = (0.02, 0.05, 0.1), (3e-3, 1e-2, 3e-2)
TORQUES = np.linspace(-2.0, 2.0, 5)


class Policy(NamedTuple):
    """A model, the shape of its outputs, the torque of an action, and the KL divergence by its formula."""

    name: str
    model: Callable[[Any, jax.Array], Any]
    outputs: tuple[int, ...]
    torque: Callable[[jax.Array], jax.Array]
    divergence: Callable[[Any, Any], jax.Array]


class Batch(NamedTuple):
    """Observations, actions, their standardised advantages, and the returns to which the baseline is fitted."""

    seen: jax.Array
    action: jax.Array
    advantage: jax.Array
    target: jax.Array


class Method(NamedTuple):
    """The initial state of an optimiser, and a function from parameters, state, a batch and a key to new ones."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Batch, jax.Array], tuple[Any, Any]]


# ----------------------------------------------------------------------------------------------------------- networks


def network(params: Any, x: jax.Array) -> jax.Array:
    """The outputs of one hidden layer, for ONE observation."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def first(key: jax.Array, outputs: tuple[int, ...] = ()) -> Any:
    """Initial parameters, with which outputs are small."""
    keys = jax.random.split(key)
    w1, w2 = jax.random.normal(keys[0], (3, HIDDEN)), 0.01 * jax.random.normal(keys[1], (HIDDEN, *outputs))
    return {"w1": w1, "b1": jnp.zeros(HIDDEN), "w2": w2, "b2": jnp.zeros(outputs), "log_scale": jnp.zeros(())}


def gaussian(params: Any, x: jax.Array) -> jf.Normal:
    """A policy over one torque."""
    return jf.Normal(network(params, x), jnp.exp(params["log_scale"]))


def categorical(params: Any, x: jax.Array) -> jf.Categorical:
    """A policy that chooses one of five torques."""
    return jf.Categorical(logits=network(params, x))


def value(params: Any, x: jax.Array) -> jf.Normal:
    """The baseline: a model of the expected discounted return, in units of ten."""
    return jf.Normal(network(params, x), 1.0)


def gaussian_kl(old: jf.Normal, new: jf.Normal) -> jax.Array:
    """The KL divergence of normal distributions, written out without the library."""
    ratio = (old.scale / new.scale) ** 2
    return 0.5 * (ratio + ((old.loc - new.loc) / new.scale) ** 2 - 1 - jnp.log(ratio))


def categorical_kl(old: jf.Categorical, new: jf.Categorical) -> jax.Array:
    """The KL divergence of categorical distributions, written out without the library."""
    logs = [jax.nn.log_softmax(each.logits) for each in (old, new)]
    return jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)


POLICIES = (
    Policy("Gaussian", gaussian, (), lambda action: action, gaussian_kl),
    Policy("categorical", categorical, (5,), lambda action: jnp.asarray(TORQUES, jnp.float32)[action], categorical_kl),
)

# ----------------------------------------------------------------------------------------------------------- the task


def swung(state: jax.Array, torque: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state one tick of 0.05 s later, and the reward; the motor is too weak to lift the pendulum."""
    angle, speed = state
    torque = jnp.clip(torque, -2.0, 2.0)
    around = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(around**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8.0, 8.0)
    return jnp.stack([angle + 0.05 * speed, speed]), reward


def seen(state: jax.Array) -> jax.Array:
    """The observation of a state."""
    angle, speed = state
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed / 8])


def episode(policy: Policy, params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The observations (with that of the last state), the actions, and the rewards."""

    def tick(state: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        action = policy.model(params, seen(state)).sample(key)
        new, reward = swung(state, policy.torque(action))
        return new, (seen(state), action, reward)

    keys = jax.random.split(key, TICKS + 1)
    start = jax.random.uniform(keys[0], (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])
    end, (states, actions, rewards) = jax.lax.scan(tick, start, keys[1:])
    return jnp.concatenate([states, seen(end)[None]]), actions, rewards


def collected(policy: Policy, params: Any, baseline: Any, keys: jax.Array) -> tuple[Batch, jax.Array]:
    """An episode for each key, with generalised advantages, and the mean return."""
    states, actions, rewards = jax.vmap(functools.partial(episode, policy, params))(keys)
    expected = jax.vmap(jax.vmap(functools.partial(network, baseline)))(states)
    surprise = rewards / 10 + DISCOUNT * expected[:, 1:] - expected[:, :-1]

    def backwards(later: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = now + DISCOUNT * TRACE * later
        return total, total

    advantage = jax.lax.scan(backwards, jnp.zeros(len(keys)), surprise.T, reverse=True)[1].T
    target = (advantage + expected[:, :-1]).reshape(-1)
    flat = advantage.reshape(-1)
    standard = (flat - jnp.mean(flat)) / (jnp.std(flat) + 1e-6)
    return Batch(states[:, :-1].reshape(-1, 3), actions.reshape(-1), standard, target), jnp.mean(jnp.sum(rewards, axis=1))


# -------------------------------------------------------------------------------------------------------- the methods


def log_probs(policy: Policy, params: Any, batch: Batch) -> jax.Array:
    """The log-probabilities of the actions that were taken."""
    return jax.vmap(jf.log_likelihood(policy.model), (None, 0, 0))(params, batch.seen, batch.action)


def fitted(baseline: Any, batch: Batch) -> Any:
    """Three steps of Fisher scoring on the returns."""
    opt = jf.natural_gradient(1.0, damping=1e-2, radius=1.0, solver=jf.CG(rtol=1e-2, max_steps=20))
    step = jf.training_step(value, opt, jf.implicit_fisher(value))
    go_on = lambda carry, _: (step(*carry, batch.seen, batch.target)[:2], None)  # noqa: E731
    return jax.lax.scan(go_on, (baseline, opt.init(baseline)), length=3)[0][0]


def trpo(policy: Policy, radius: jax.Array) -> Method:
    """Ten conjugate gradients on products with the exact Fisher, and one step inside the radius: `docs/policies.md`."""
    solver = jf.CG(rtol=1e-2, max_steps=10)
    opt = optax.chain(jf.natural_gradient(1e3, damping=DAMPING, radius=0.7 * radius, solver=solver), jf.backtrack_kl(radius))

    def surrogate(params: Any, seen: jax.Array, target: tuple[Batch, jax.Array]) -> jax.Array:
        batch, old = target
        return -jnp.mean(batch.advantage * jnp.exp(log_probs(policy, params, batch) - old))

    step = jf.training_step(policy.model, opt, jf.implicit_fisher(policy.model), loss=surrogate)

    def update(params: Any, state: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
        del key  # this method draws no random numbers
        return step(params, state, batch.seen, (batch, log_probs(policy, params, batch)))[:2]

    return Method(opt.init, update)


def ppo(policy: Policy, rate: jax.Array) -> Method:
    """Ten epochs of Adam in minibatches, on the clipped surrogate."""
    opt = optax.adam(rate)

    def clipped(params: Any, part: Batch, old: jax.Array) -> jax.Array:
        ratio = jnp.exp(log_probs(policy, params, part) - old)
        return -jnp.mean(jnp.minimum(part.advantage * ratio, part.advantage * jnp.clip(ratio, 1 - CLIP, 1 + CLIP)))

    def update(params: Any, state: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
        old, size = log_probs(policy, params, batch), batch.action.size

        def step(carry: Any, chosen: jax.Array) -> tuple[Any, None]:
            params, state = carry
            gradient = jax.grad(clipped)(params, jax.tree.map(lambda leaf: leaf[chosen], batch), old[chosen])
            updates, state = opt.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        orders = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(key, EPOCHS))
        return jax.lax.scan(step, (params, state), orders.reshape(-1, min(MINIBATCH, size)))[0]

    return Method(opt.init, update)


def trained(policy: Policy, method: Method, updates: int, episodes: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean return of each batch, and how far each update moved the policy, in nats per visited state."""
    keys = jax.random.split(key, 3)

    def one(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, state, baseline = carry
        keys = jax.random.split(key, episodes + 1)
        batch, gained = collected(policy, params, baseline, keys[1:])
        new, state = method.update(params, state, batch, keys[0])
        old_and_new = (jax.vmap(policy.model, (None, 0))(each, batch.seen) for each in (params, new))
        return (new, state, fitted(baseline, batch)), (gained, jnp.mean(policy.divergence(*old_and_new)))

    params = first(keys[0], policy.outputs)
    return jax.lax.scan(one, (params, method.init(params), first(keys[1])), jax.random.split(keys[2], updates))[1]


# ------------------------------------------------------------------------------------------------------------ a table


class Found(NamedTuple):
    """The best setting of a method: its number, returns and divergences ``[seeds, updates]``, and ``held``, as `best` says."""

    number: float
    gains: np.ndarray
    moves: np.ndarray
    held: bool

    def words(self, before: int) -> str:
        """The mean of `at` over the seeds, and the worst seed."""
        ends = self.at(before)
        return f"{ends.mean():.0f} (worst {ends.min():.0f})"

    def at(self, before: int) -> np.ndarray:
        """The return of each seed at an update, as the mean of the three batches before it."""
        return self.gains[:, max(0, before - 3) : before].mean(1)


def best(run: Callable[[float], tuple[jax.Array, jax.Array]], numbers: tuple[float, ...]) -> Found:
    """The setting with the best final return. ``held``: no update moved a policy by more than the number, with any setting."""
    tried = [(number, *map(np.asarray, run(number))) for number in numbers]
    number, gains, moves = max(tried, key=lambda each: each[1][:, -3:].mean())
    return Found(number, gains, moves, all(np.max(moves) <= number for number, _, moves in tried))


def rows(sizes: Sizes) -> list[Row]:
    """Return of an episode by PPO, the best of three rates, and by TRPO, the best of three radii; five seeds."""
    full = sizes.shrink == 1
    updates, episodes = (UPDATES, EPISODES) if full else (3, 1)
    keys = jax.random.split(jax.random.key(0), 5 if full else 2)
    lines = []
    for policy in POLICIES:

        @functools.partial(jax.jit, static_argnums=0)
        def of_seeds(method: Any, number: float, policy: Policy = policy) -> tuple[jax.Array, jax.Array]:
            return jax.lax.map(functools.partial(trained, policy, method(policy, number), updates, episodes), keys)

        theirs, ours = (
            best(functools.partial(of_seeds, method), numbers[: None if full else 1])
            for method, numbers in ((ppo, RATES), (trpo, RADII))
        )
        notes = f"rate {theirs.number:g}, largest KL {theirs.moves.max():.3f}; radius {ours.number:g}, {ours.moves.max():.4f}"
        for mark in (updates // 3, 2 * updates // 3, updates):
            case = f"{policy.name}, {mark * episodes * TICKS:,} environment steps"
            ahead = f"{ours.at(mark).mean() - theirs.at(mark).mean():+.0f}"
            held = "yes" if ours.held else "NO"
            lines.append(Row(case, theirs.words(mark), ours.words(mark), ahead, "KL at most the radius", held, notes))
    return lines
