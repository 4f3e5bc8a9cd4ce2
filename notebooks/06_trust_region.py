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
# # A policy inside a KL ball
#
# At the end you will know how to move a policy by a chosen number of nats, how far you can trust the Fisher's prediction of
# that number, and what to do where you cannot.
#
# A policy is trained on data that it generated itself. After a step that changes it too much, the data say nothing about the
# new policy, and a policy that has become bad generates bad data. So the question at every update is not how far the parameters
# move, but how far the *behaviour* does, and a KL divergence measures that.

# %%
import functools
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxfisher as jf
from jaxfisher import plot

plt.rcParams["figure.dpi"] = 90

TICKS, EPISODES, UPDATES, SEEDS = 200, 16, 30, 6
RADIUS, DAMPING = 0.01, 1e-3  # nats per visited state; in the units of F

# %% [markdown]
# ## The task
#
# A pole stands on a cart, and at every tick of 0.02 s the cart is pushed to the left or to the right (Barto, Sutton and
# Anderson, 1983). An episode ends when the pole leans by more than 12 degrees, when the cart is more than 2.4 m from the
# middle, or after 200 ticks. The policy sees only the cart's position and speed, the pole's angle, and how fast the angle
# changes. It is a small network that returns the probability of a push to the right: a model of ONE example, as everywhere in
# this library.


# %%
def policy(params, seen):
    hidden = jnp.tanh(seen @ params["w1"] + params["b1"])
    return jf.Bernoulli(logits=hidden @ params["w2"] + params["b2"])


def first_policy(key):
    keys = jax.random.split(key)
    w1, w2 = jax.random.normal(keys[0], (4, 8)), 0.1 * jax.random.normal(keys[1], (8,))
    return {"w1": w1, "b1": jnp.zeros(8), "w2": w2, "b2": jnp.zeros(())}


def pushed(state, right):
    """The state one tick later, by Euler's rule."""
    _, speed, angle, spin = state
    force = jnp.where(right, 10.0, -10.0)
    swing = (force + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
    turning = (9.8 * jnp.sin(angle) - jnp.cos(angle) * swing) / (0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1))
    pull = swing - 0.05 * turning * jnp.cos(angle) / 1.1
    return state + 0.02 * jnp.stack([speed, pull, spin, turning])


def episode(params, key):
    """What was seen, how the cart was pushed, and whether the episode still ran, at every tick."""

    def tick(carry, key):
        state, running = carry
        right = policy(params, state).sample(key)
        new = pushed(state, right)
        upright = running & (jnp.abs(new[0]) < 2.4) & (jnp.abs(new[2]) < jnp.pi / 15)
        return (jnp.where(upright, new, state), upright), (state, right, running)

    keys = jax.random.split(key, TICKS + 1)
    start = jax.random.uniform(keys[0], (4,), minval=-0.05, maxval=0.05)
    return jax.lax.scan(tick, (start, jnp.asarray(True)), keys[1:])[1]


# %% [markdown]
# A batch is 16 episodes. Ticks after an episode's end are padding, with weight zero. The advantage of a push is the number of
# ticks for which the pole stayed up afterwards, with later ticks counting less, minus the mean of the batch.


# %%
class Batch(NamedTuple):
    seen: jax.Array
    right: jax.Array
    advantage: jax.Array
    weight: jax.Array


@jax.jit
def collect(params, key):
    seen, right, running = jax.vmap(episode, (None, 0))(params, jax.random.split(key, EPISODES))
    weight = running.astype(seen.dtype).T  # [ticks, episodes]

    def one_more(after, now):
        return now * (1 + 0.99 * after), now * (1 + 0.99 * after)

    _, gain = jax.lax.scan(one_more, jnp.zeros(EPISODES), weight, reverse=True)
    mean = jnp.sum(weight * gain) / jnp.sum(weight)
    spread = jnp.sqrt(jnp.sum(weight * (gain - mean) ** 2) / jnp.sum(weight))
    advantage = (gain - mean) / spread
    return Batch(seen.reshape(-1, 4), right.reshape(-1), advantage.T.reshape(-1), weight.T.reshape(-1))


def ticks_up(batch):
    return float(jnp.sum(batch.weight)) / EPISODES


params = first_policy(jax.random.key(0))
batch = collect(params, jax.random.key(1))
print(f"The first policy keeps the pole up for {ticks_up(batch):.0f} ticks of {TICKS}.")

# %% [markdown]
# ## What a step does to the policy
#
# With samples of the old policy, an update minimises the surrogate
#
# $$L(\theta) = -\frac{\sum_i w_i A_i r_i(\theta)}{\sum_i w_i}, \qquad
# r_i(\theta) = \frac{p_\theta(a_i | s_i)}{p_{\mathrm{old}}(a_i | s_i)},$$
#
# with the pushes $a_i$, the states $s_i$ and the advantages $A_i$ of the batch. Its gradient at the old policy is the policy
# gradient. The surrogate is only valid for policies that are near, and near means a small
#
# $$\mathrm{KL}(\theta_{\mathrm{old}} \,\|\, \theta) \approx \frac{1}{2} u^\top F u, \qquad
# u = \theta - \theta_{\mathrm{old}},$$
#
# a mean over the visited states, with $F$ the exact Fisher of the policy at those states. Two steps of the same Euclidean
# length, one along the gradient and one along the natural gradient, change the policy by different amounts. What counts is
# how much the surrogate falls for the nats that are spent.


# %%
def surrogate(new, old, batch):
    log_prob = jf.log_likelihood(policy)

    def log_probs(params):
        return jax.vmap(log_prob, (None, 0, 0))(params, batch.seen, batch.right)

    ratio = jnp.exp(log_probs(new) - log_probs(old))
    return -jnp.sum(batch.weight * batch.advantage * ratio) / jnp.sum(batch.weight)


def fisher_of(params, batch):
    return jf.exact_fisher(policy)(params, batch.seen, weights=batch.weight)


def divergence(old, new, batch):
    return jf.kl(policy)(old, new, batch.seen, weights=batch.weight)


@jax.jit
def looked_at(params, batch, dampings):
    """The Fisher, the gradient, and the natural gradients at several dampings, from one factorisation."""
    fisher, gradient = fisher_of(params, batch), jax.grad(surrogate)(params, params, batch)
    return fisher, gradient, jf.solve_path(fisher, gradient, dampings)[0]


DAMPINGS = np.array([1e-5, 1e-4, DAMPING, 1e-2, 1e-1, 1.0])
F, gradient, naturals = looked_at(params, batch, DAMPINGS)
natural = jax.tree.map(lambda leaf: leaf[2], naturals)  # at DAMPING
print(F)
print("\nstep of length 0.1 along    KL (nats)    fall of the surrogate, to first order    fall per root nat")
falls = {}
for name, direction in {"gradient": gradient, "natural gradient": natural}.items():
    step = optax.tree.scale(-0.1 / optax.tree.norm(direction), direction)
    moved = divergence(params, optax.apply_updates(params, step), batch)
    fall = -optax.tree.vdot(gradient, step)
    falls[name] = float(fall / jnp.sqrt(moved))
    print(f"{name:24s}    {moved:9.1e}    {fall:39.4f}    {falls[name]:17.2f}")
assert falls["natural gradient"] > falls["gradient"] > 0

# %% [markdown]
# ## The longest step that a radius allows
#
# Among all steps that move the policy by at most a radius $\delta$, to second order, the one along which the surrogate falls
# most is
#
# $$u = -\sqrt{\frac{2 \delta}{g^\top F^{-1} g}}\, F^{-1} g.$$
#
# `jf.natural_gradient(learning_rate, damping, radius=...)` ends in `jf.scale_to_kl`, which shortens a step until
# $\frac{1}{2} u^\top F u \le \delta$. With a large enough learning rate the step is always too long, so the radius alone sets
# its length. The small damping is for directions that the visited states do not determine.
#
# One function makes an update with any optimiser, and reports two numbers: the KL divergence that the Fisher predicted for the
# step, and the actual one. (`jf.training_step(policy, opt, loss=surrogate)` would do the update without the report.)


# %%
class Moved(NamedTuple):
    predicted: jax.Array
    actual: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def update(make, setting, params, state, batch):
    """One update by the optimiser ``make(setting)``, which is given everything that it may ask for."""
    optimiser = optax.with_extra_args_support(make(setting))
    fisher = fisher_of(params, batch)
    value, gradient = jax.value_and_grad(surrogate)(params, params, batch)
    step, state = optimiser.update(
        gradient,
        state,
        params,
        fisher=fisher,
        value=value,
        value_fn=lambda new: surrogate(new, params, batch),
        kl_fn=lambda new: divergence(params, new, batch),
    )
    new = optax.apply_updates(params, step)
    return new, state, Moved(0.5 * fisher.quadratic(step), divergence(params, new, batch))


def predicted_ball(radius):
    return jf.natural_gradient(learning_rate=1e3, damping=DAMPING, radius=radius)


new, _, moved = update(predicted_ball, RADIUS, params, predicted_ball(RADIUS).init(params), batch)
step = optax.tree.sub(new, params)
print(f"radius {RADIUS}: predicted {moved.predicted:.6f} nats, actual {moved.actual:.6f} nats")


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], float)


matrix, g = np.asarray(F.as_matrix(), float), flat(gradient)
direction = np.linalg.solve(matrix + DAMPING * np.eye(F.size), g)
by_hand = -np.sqrt(2 * RADIUS / (direction @ matrix @ direction)) * direction
np.testing.assert_allclose(flat(step), by_hand, rtol=0, atol=1e-3 * np.abs(by_hand).max())
np.testing.assert_allclose(moved.predicted, RADIUS, rtol=1e-4)

# %% [markdown]
# The step agrees with one from dense matrices in NumPy, and its predicted divergence is the radius. The actual divergence is
# not.
#
# ## Predicted against actual
#
# The prediction is the first term of a series. Along the step the two curves have the same value, slope and curvature at zero,
# and differ beyond.

# %%
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
plot.kl_along(policy, params, step, jnp.linspace(-2.5, 2.5, 41), batch.seen, weights=batch.weight, ax=ax)
ax.axhline(RADIUS, color="0.4", linewidth=1, linestyle=":", label="radius")
ax.plot(1.0, moved.actual, "o", color="black", label="the step")
ax.legend()
ax.set_xlabel("t, in multiples of the step (1 is the step taken)")
plt.show()

# %%
multiples = jnp.array([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0])
reached = jax.vmap(lambda t: optax.tree.add_scale(params, t, step))(multiples)
actual = jax.jit(jax.vmap(divergence, (None, 0, None)))(params, reached, batch)
predicted = multiples**2 * moved.predicted
error = actual / predicted - 1
print("multiple    predicted       actual    relative error    error / multiple")
for row in zip(multiples, predicted, actual, error, error / multiples, strict=True):
    print("{:8.3g}    {:9.2e}    {:9.2e}    {:14.1%}    {:16.3f}".format(*map(float, row)))


def right_probability(params):
    hidden = np.tanh(np.asarray(batch.seen, float) @ np.asarray(params["w1"]) + np.asarray(params["b1"]))
    return 1 / (1 + np.exp(-hidden @ np.asarray(params["w2"]) - np.asarray(params["b2"])))


weight = np.asarray(batch.weight, float)
for k in range(4, len(multiples)):
    p, q = right_probability(params), right_probability(jax.tree.map(lambda leaf, k=k: leaf[k], reached))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(actual[k], weight @ each / weight.sum(), rtol=1e-3)
# Third order over second: for short steps the relative error is proportional to the length.
np.testing.assert_allclose(error[1] / error[2], 0.5, rtol=0.1)

# %% [markdown]
# The relative error is proportional to the length of the step, and so to the root of the radius: a hundredth of the radius
# gives a tenth of the error. At small radii the prediction is accurate; at large ones the Fisher at the start of a step says
# little about the policy at its end.
#
# ## What damping has to do with it
#
# The natural gradient is long where the Fisher is small: along directions that hardly change the policy at first. Far along
# these directions the Fisher has changed. Damping shortens exactly those parts of the step. Here are steps of the same
# predicted divergence at several dampings.


# %%
@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, None, 0))
def inside_radius(fisher, params, batch, direction):
    """Length, actual divergence and fall of the surrogate, of the step of that predicted divergence."""
    step = optax.tree.scale(-jnp.sqrt(2 * RADIUS / fisher.quadratic(direction)), direction)
    new = optax.tree.add(params, step)
    fall = surrogate(params, params, batch) - surrogate(new, params, batch)
    return optax.tree.norm(step), divergence(params, new, batch), fall


lengths, actual, falls = map(np.asarray, inside_radius(F, params, batch, naturals))
print("damping    length of the step    actual / predicted KL    fall of the surrogate    fall per root nat")
for row in zip(DAMPINGS, lengths, actual / RADIUS, falls, falls / np.sqrt(actual), strict=True):
    print("{:7.0e}    {:18.2f}    {:21.2f}    {:21.4f}    {:17.2f}".format(*map(float, row)))
assert np.all(np.diff(lengths) < 0)
assert abs(actual[-1] / RADIUS - 1) < 0.1 < actual[0] / RADIUS - 1
assert 0 < np.argmax(falls / np.sqrt(actual)) < len(DAMPINGS) - 1

# %% [markdown]
# With much damping the step is short and the prediction good, but the step is nearly that of the plain gradient. With little
# damping the step is long and moves the policy further than predicted. The surrogate falls most per nat actually spent in
# between.
#
# ## The actual divergence has the last word
#
# `jf.backtrack_kl(radius)` at the end of a chain halves the step until the *actual* divergence is inside the radius and the
# surrogate is lower than before. If no length satisfies both, the policy does not change. This is the line search of trust
# region policy optimisation (Schulman et al., 2015).


# %%
def actual_ball(radius):
    return optax.chain(predicted_ball(radius), jf.backtrack_kl(radius))


print("radius    predicted    actual   halvings")
for radius in (0.001, 0.01, 0.1, 1.0):
    _, state, moved = update(actual_ball, radius, params, actual_ball(radius).init(params), batch)
    print(f"{radius:6.3f}    {moved.predicted:9.6f} {moved.actual:9.6f}   {state[-1].halvings:8d}")
    assert moved.actual <= radius

# %% [markdown]
# A step that is only slightly too long is halved, and then moves the policy by about a quarter of the radius. That is the price
# of a search by halving; to pay it less often, give the search a slightly larger radius than the prediction.
#
# ## Training
#
# Now we train the policy, each update on new episodes, from several initial policies, and compare four ways of choosing the
# length of a step:
#
# - the predicted ball: `jf.scale_to_kl` alone trusts the quadratic form;
# - the actual ball: `jf.backtrack_kl` after it, with the same radius;
# - a rate: plain gradient descent on the surrogate, at three rates;
# - adaptive damping: `jf.adapt_damping` has no radius but a damping, which rises where the surrogate fell by less than the
#   quadratic model predicted, and falls where the prediction was right.


# %%
def plain(rate):
    return optax.sgd(rate)


def adaptive(damping):
    return jf.adapt_damping(jf.natural_gradient(learning_rate=1.0), damping=damping)


def train(make, setting, seed):
    """Ticks that the pole stayed up, and how far each update moved the policy."""
    first, rest = jax.random.split(jax.random.key(seed))
    params = first_policy(first)
    state, ticks, moves = make(setting).init(params), [], []
    for key in jax.random.split(rest, UPDATES):
        batch = collect(params, key)
        params, state, moved = update(make, setting, params, state, batch)
        ticks.append(ticks_up(batch))
        moves.append(moved)
    return np.array(ticks), Moved(*np.array(moves, float).T)


RUNS = {
    "predicted ball": (predicted_ball, RADIUS),
    "actual ball": (actual_ball, RADIUS),
    "rate 1": (plain, 1.0),
    "rate 10": (plain, 10.0),
    "rate 30": (plain, 30.0),
    "adaptive damping": (adaptive, 1.0),
}
ticks, moves = {}, {}
for name, (make, setting) in RUNS.items():
    runs = [train(make, setting, seed) for seed in range(SEEDS)]
    ticks[name] = np.mean([run[0] for run in runs], axis=0)
    moves[name] = Moved(*np.concatenate([run[1] for run in runs], axis=1))

print(f"radius {RADIUS} nats; means over {SEEDS} first policies")
print("                    ticks up, at updates       actual KL of an update (nats)    actual / predicted")
print("                    1-5   11-15   26-30       least    median   largest          median   largest")
for name, (predicted, actual) in moves.items():
    means = [np.mean(ticks[name][a:b]) for a, b in ((0, 5), (10, 15), (25, 30))]
    ratio = actual[predicted > 0] / predicted[predicted > 0]
    columns = [*means, np.min(actual), np.median(actual), np.max(actual), np.median(ratio), np.max(ratio)]
    print("{:17s} {:5.0f}   {:5.0f}   {:5.0f}     {:7.1e}   {:7.1e}   {:7.1e}        {:8.2f}  {:8.1f}".format(name, *columns))

# %%
SHOWN = {"predicted ball": ("#D55E00", "s", "--"), "actual ball": ("#0072B2", "o", "-")}
SHOWN |= {"rate 10": ("#56B4E9", "^", "-."), "adaptive damping": ("#000000", "x", ":")}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for name, (color, marker, dash) in SHOWN.items():
    left.plot(np.arange(1, UPDATES + 1), ticks[name], color=color, marker=marker, markevery=4, linestyle=dash, label=name)
    right.plot(*moves[name], marker, color=color, markersize=4, alpha=0.7, markerfacecolor="none", label=name)
left.set(xlabel="update", ylabel=f"ticks that the pole stays up (of {TICKS})", ylim=(0, TICKS))
ends = np.array([1e-4, 2 * max(np.max(moves[name]) for name in SHOWN)])
right.plot(ends, ends, color="0.5", linewidth=1)
right.plot([0.0022, 0.009], [0.002, 0.0017], color="0.5", linewidth=0.8)
right.axhline(RADIUS, color="0.5", linewidth=1, linestyle=":")
right.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
right.set(xlabel="predicted KL of an update (nats)", ylabel="actual KL of an update (nats)")
right.annotate("actual = predicted", (0.01, 0.0015), color="0.35")
right.annotate("radius", (1.3e-4, RADIUS), xytext=(0, 4), textcoords="offset points", color="0.35")
left.legend()
plt.show()

# %%
assert np.max(moves["actual ball"].actual) <= RADIUS
np.testing.assert_allclose(moves["predicted ball"].predicted, RADIUS, rtol=1e-3)
assert np.median(moves["predicted ball"].actual) > RADIUS
for name in ("rate 1", "rate 10", "rate 30"):
    assert np.max(moves[name].actual) > 30 * np.min(moves[name].actual)
assert np.max(moves["adaptive damping"].actual) > 3 * RADIUS
at_end = {name: np.mean(curve[-5:]) for name, curve in ticks.items()}
assert at_end["actual ball"] > 3 * ticks["actual ball"][0]
assert at_end["rate 10"] > 0.8 * at_end["actual ball"]
assert at_end["actual ball"] > max(at_end["rate 1"], at_end["rate 30"])

# %% [markdown]
# What the table and the picture show:
#
# - **The predicted ball** makes a step of the same predicted divergence every time (the vertical line of squares). Most steps
#   go further than predicted, some by far. The policy still learns here, but the method does not guarantee that.
# - **The actual ball** never leaves the radius, at any update of any run. That is not a tendency but a property: the method
#   takes no step outside. The circles at a quarter of the radius are steps that were halved once.
# - **A rate** has no unit that means anything to a policy. The same rate moves the policy by amounts that differ by orders of
#   magnitude from one update to the next. One of the three rates learns as well as the ball, but you know which one only after
#   you have tried the others. Its predictions are good: plain steps stay where the Fisher is large.
# - **Adaptive damping** asks another question: whether the loss changed as predicted. On fixed data that is the right
#   question, and no step raises the loss. Here the loss is a surrogate on a few episodes of the old policy. It may fall as
#   predicted while the policy moves further than those episodes can tell: most steps are short, and a few go several times as
#   far as the radius. To have both, wrap a chain that ends in `jf.backtrack_kl`.
#
# These few runs are enough to see how far steps go, which differs by orders of magnitude. They are not enough to rank
# optimisers that are close: a change in the last digit of any number leads to other episodes.
