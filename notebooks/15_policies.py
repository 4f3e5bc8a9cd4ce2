# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Trust regions on a pendulum
#
# At the end you will have trained policies with trust-region policy optimisation (TRPO): a Gaussian one that chooses a torque,
# and a categorical one that chooses among five. The training has a value baseline, negative advantages and a KL radius that
# every update keeps, and you will have compared it with PPO in Optax.
#
# [Notebook 6](06_trust_region.ipynb) explains a step inside a KL ball. Here we use it for a task of continuous control.

# %%
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxfisher as jf

plt.rcParams["figure.dpi"] = 90

TICKS, EPISODES, UPDATES, SEEDS = 200, 32, 30, 3
DISCOUNT, TRACE = 0.97, 0.95
RADIUS = 0.02  # nats for a visited state: no update moves the policy further

# %% [markdown]
# ## The task
#
# A pendulum of length and mass one hangs on a motor that is too weak to lift it: the torque is between -2 and 2. To get up, the
# pendulum must swing. Each tick of 0.05 s costs the square of the angle from upright, and a little for speed and torque; an
# episode is 200 ticks. A pendulum that hangs still costs about 2,000 per episode; one that swings up and stays up costs about
# 150 to 200.


# %%
def swung(state, torque):
    """The state one tick later, and the reward."""
    angle, speed = state
    torque = jnp.clip(torque, -2.0, 2.0)
    around = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(around**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8.0, 8.0)
    return jnp.stack([angle + 0.05 * speed, speed]), reward


def seen(state):
    angle, speed = state
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed / 8])


# %% [markdown]
# ## Policies
#
# A policy is a model of ONE example: it maps an observation to a distribution over actions. A second function turns an action
# into a torque. The baseline is a model as well, whose mean is the expected return.


# %%
HIDDEN = 32
TORQUES = jnp.linspace(-2.0, 2.0, 5)


def hidden(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"])


def gaussian(params, x):
    return jf.Normal(hidden(params, x) @ params["w2"] + params["b2"], jnp.exp(params["log_scale"]))


def categorical(params, x):
    return jf.Categorical(logits=hidden(params, x) @ params["w2"] + params["b2"])


def value(params, x):
    return jf.Normal(hidden(params, x) @ params["w2"] + params["b2"], 1.0)


def first(key, outputs=()):
    keys = jax.random.split(key)
    w1, w2 = jax.random.normal(keys[0], (3, HIDDEN)), 0.01 * jax.random.normal(keys[1], (HIDDEN, *outputs))
    return {"w1": w1, "b1": jnp.zeros(HIDDEN), "w2": w2, "b2": jnp.zeros(outputs)}


class Policy(NamedTuple):
    """A model, its first parameters, and the torque of an action."""

    model: object
    first: object
    torque: object


GAUSSIAN = Policy(gaussian, lambda key: {**first(key), "log_scale": jnp.zeros(())}, lambda action: action)
CATEGORICAL = Policy(categorical, lambda key: first(key, (5,)), lambda action: TORQUES[action])

# %% [markdown]
# ## A batch, and its advantages
#
# A batch is 32 episodes. The advantage of an action is how much better the episode went than the baseline had expected, with
# later ticks counting less (generalised advantage estimation). It is negative for half of the actions, so do not use it as a
# weight of the examples: the Fisher is a mean over all visited states, and the advantage belongs to the surrogate loss,
#
# $$L(\theta) = -\frac1n \sum_i A_i\, \frac{p_\theta(a_i | s_i)}{p_{\mathrm{old}}(a_i | s_i)}.$$


# %%
class Batch(NamedTuple):
    seen: jax.Array
    action: jax.Array
    advantage: jax.Array
    target: jax.Array


def episode(policy, params, key):
    """What was seen (also at the end), the actions, and the rewards."""

    def tick(state, key):
        action = policy.model(params, seen(state)).sample(key)
        new, reward = swung(state, policy.torque(action))
        return new, (seen(state), action, reward)

    keys = jax.random.split(key, TICKS + 1)
    start = jax.random.uniform(keys[0], (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])
    end, (states, actions, rewards) = jax.lax.scan(tick, start, keys[1:])
    return jnp.concatenate([states, seen(end)[None]]), actions, rewards


def collected(policy, params, baseline, key):
    """A batch and the mean return of its episodes; returns to the baseline are in units of a hundred."""
    states, actions, rewards = jax.vmap(functools.partial(episode, policy, params))(jax.random.split(key, EPISODES))
    expected = jax.vmap(jax.vmap(lambda x: value(baseline, x).loc))(states)
    surprise = rewards / 10 + DISCOUNT * expected[:, 1:] - expected[:, :-1]

    def backwards(later, now):
        total = now + DISCOUNT * TRACE * later
        return total, total

    _, advantage = jax.lax.scan(backwards, jnp.zeros(EPISODES), surprise.T, reverse=True)
    target = (advantage.T + expected[:, :-1]).reshape(-1)
    advantage = advantage.T.reshape(-1)
    advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-6)
    batch = Batch(states[:, :-1].reshape(-1, 3), actions.reshape(-1), advantage, target)
    return batch, jnp.mean(jnp.sum(rewards, axis=1))


def fitted(baseline, batch):
    """Three steps of Fisher scoring on the returns: least squares, which needs no rate."""
    opt = jf.natural_gradient(1.0, damping=1e-2, radius=1.0, solver=jf.CG(rtol=1e-2, max_steps=20))
    step = jf.training_step(value, opt, jf.implicit_fisher(value))

    def go_on(carry, _):
        return step(*carry, batch.seen, batch.target)[:2], None

    return jax.lax.scan(go_on, (baseline, opt.init(baseline)), length=3)[0][0]


# %% [markdown]
# ## TRPO
#
# TRPO takes the natural gradient of the surrogate, with the length that the quadratic form of the Fisher allows. The radius for
# the quadratic form is a little smaller than the actual one, so that the step is seldom halved. `jf.backtrack_kl` then halves
# it until the actual KL divergence is inside the radius and the surrogate is lower.
#
# There are 6,400 states and some 160 parameters. A matrix made from so many rows would be expensive, so ten conjugate gradient
# steps take products with the exact Fisher, each of which costs about as much as a gradient.

# %%
solver = jf.CG(rtol=1e-2, max_steps=10)
trpo = optax.chain(jf.natural_gradient(1e3, damping=1e-3, radius=0.7 * RADIUS, solver=solver), jf.backtrack_kl(RADIUS))


def log_probs(policy, params, seen, action):
    return jax.vmap(jf.log_likelihood(policy.model), (None, 0, 0))(params, seen, action)


def trpo_update(policy, params, batch, key):
    """The new parameters and the KL divergence from the old policy."""
    del key  # nothing is drawn

    def surrogate(params, seen, target):
        action, advantage, old = target
        return -jnp.mean(advantage * jnp.exp(log_probs(policy, params, seen, action) - old))

    step = jf.training_step(policy.model, trpo, jf.implicit_fisher(policy.model), loss=surrogate)
    target = batch.action, batch.advantage, log_probs(policy, params, batch.seen, batch.action)
    new, state, _ = step(params, trpo.init(params), batch.seen, target)
    return new, state[-1].moved


def trained(policy, update, key):
    """Returns, and how far each update moved the policy, over the updates."""
    keys = jax.random.split(key, 3)

    def one(carry, key):
        params, baseline = carry
        batch, gained = collected(policy, params, baseline, key)
        params, moved = update(policy, params, batch, key)
        return (params, fitted(baseline, batch)), (gained, moved)

    start = policy.first(keys[0]), first(keys[1])
    return jax.lax.scan(one, start, jax.random.split(keys[2], UPDATES))[1]


# %% [markdown]
# ## PPO
#
# PPO is the usual alternative. It uses the same batches, and on each batch ten epochs of Adam, in minibatches of 640, on the
# clipped surrogate. We try two rates.


# %%
def ppo_update(rate, policy, params, batch, key):
    opt, old = optax.adam(rate), log_probs(policy, params, batch.seen, batch.action)
    size = batch.action.size

    def clipped(params, part, old):
        ratio = jnp.exp(log_probs(policy, params, part.seen, part.action) - old)
        return -jnp.mean(jnp.minimum(part.advantage * ratio, part.advantage * jnp.clip(ratio, 0.8, 1.2)))

    def step(carry, chosen):
        params, state = carry
        gradient = jax.grad(clipped)(params, jax.tree.map(lambda leaf: leaf[chosen], batch), old[chosen])
        updates, state = opt.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(key, 10))
    (new, _), _ = jax.lax.scan(step, (params, opt.init(params)), orders.reshape(-1, 640))
    return new, jf.kl(policy.model)(params, new, batch.seen)


# %% [markdown]
# ## Training
#
# We train TRPO with both policies first, and then PPO. Every run starts from other parameters and other episodes.

# %%
keys = jax.random.split(jax.random.key(0), SEEDS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def runs(policy, update, *settings):
    """Returns and divergences, [seeds, updates]."""
    return jax.lax.map(functools.partial(trained, policy, functools.partial(update, *settings)), keys)


gains, moves = {}, {}
for name, policy in (("TRPO, Gaussian", GAUSSIAN), ("TRPO, categorical", CATEGORICAL)):
    gains[name], moves[name] = map(np.asarray, runs(policy, trpo_update))

# %%
for rate in (3e-3, 1e-2):
    name = f"PPO, Gaussian, {rate:g}"
    gains[name], moves[name] = map(np.asarray, runs(GAUSSIAN, ppo_update, rate))

# %%
STEPS = TICKS * EPISODES * np.arange(1, UPDATES + 1)
print(f"mean return of an episode, over {SEEDS} seeds (the worst seed in brackets), and the KL divergence of updates in nats")
print(f"environment steps       {STEPS[9]:7d}     {STEPS[19]:7d}     {STEPS[29]:7d}    (worst)    median KL    largest KL")
for name, gain in gains.items():
    columns = [np.mean(gain[:, at - 3 : at]) for at in (10, 20, 30)]
    worst = np.min(np.mean(gain[:, -3:], axis=1))
    print("{:20s} {:11.0f} {:11.0f} {:11.0f}    ({:5.0f})".format(name, *columns, worst), end="")
    print(f"    {np.median(moves[name]):9.4f}    {np.max(moves[name]):10.4f}")

# %%
for name in ("TRPO, Gaussian", "TRPO, categorical"):
    assert np.max(moves[name]) <= RADIUS
    assert np.mean(gains[name][:, -3:]) > -400 > np.mean(gains[name][:, 0])

# %% [markdown]
# Every update of every run kept the radius: that is a property of the method, and not of a tuned rate. PPO's clipping
# gives no such guarantee.

# %%
best = max((name for name in gains if name.startswith("PPO")), key=lambda name: np.mean(gains[name][:, -10:]))
SHOWN = {"TRPO, Gaussian": ("#0072B2", "o"), "TRPO, categorical": ("#009E73", "s"), best: ("#D55E00", "^")}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for name, (color, marker) in SHOWN.items():
    left.plot(STEPS / 1000, gains[name].mean(axis=0), color=color, marker=marker, markevery=5, label=name)
    left.fill_between(STEPS / 1000, gains[name].min(axis=0), gains[name].max(axis=0), color=color, alpha=0.15, linewidth=0)
    right.plot(STEPS / 1000, moves[name].max(axis=0), color=color, marker=marker, markevery=5, label=name)
left.set(xlabel="environment steps (thousands)", ylabel="return of an episode", ylim=(None, 0))
left.legend(loc="lower right")
right.axhline(RADIUS, color="0.5", linewidth=1, linestyle=":")
right.annotate("radius", (0, RADIUS), xytext=(2, 4), textcoords="offset points", color="0.35")
right.set(xlabel="environment steps (thousands)", ylabel="KL of an update, largest of seeds (nats)", yscale="log")
plt.show()

# %% [markdown]
# What the table and the pictures show:
#
# - **Both policies** learn to swing the pendulum up in every run. The one that chooses among five torques, which are the
#   extremes and three between them, learns sooner.
# - **The radius** of 0.02 nats is nearly used up at many updates and never exceeded. It is the only number that was tuned, and
#   it has a meaning before any run.
# - **PPO** at the better of two rates reaches the same return after as many steps; at a third of that rate it is behind. Its
#   largest updates exceed the radius, which PPO does not use.
#
# Three seeds show that a method works. They do not rank methods that are close.
