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
# # Learning one task after another
#
# At the end you will know how a Fisher keeps a network from forgetting, why it matters which Fisher that is, and how two
# networks can be merged into one.
#
# After a task the log-likelihood of its $n$ examples is, near the optimum $\theta^*$ and up to a constant,
# $-\frac n2 (\theta - \theta^*)^\top F (\theta - \theta^*)$. So a network that goes on to the next task can keep the old one
# as a quadratic penalty: elastic weight consolidation, `jf.ewc_penalty(F, anchor, strength)`. The published method keeps
# the diagonal of $F$. Here you can use any view.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxfisher as jf

plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## The tasks
#
# There are five tasks in turn: 0 or 1, 2 or 3, 4 or 5, 6 or 7, 8 or 9. A network with one output says whether the digit is odd,
# and is never told which task an image belongs to. A third of the images are for testing, always on all tasks.

# %%
images, digits = load_digits(return_X_y=True)
images = images / 16
rng = np.random.default_rng(0)
TRAIN, TEST, TASKS, SEEDS = 230, 110, 5, 3


def task(k):
    """The training and the test data of one task, of the same sizes for all."""
    found = rng.permutation(np.flatnonzero(digits // 2 == k))[: TRAIN + TEST]
    x, odd = jnp.asarray(images[found], jnp.float32), jnp.asarray(digits[found] % 2)
    return (x[:TRAIN], odd[:TRAIN]), (x[TRAIN:], odd[TRAIN:])


tasks, tests = zip(*(task(k) for k in range(TASKS)), strict=True)


def network(params, x):
    """One hidden layer, of ONE image; whether the digit is odd."""
    return jf.Bernoulli(logits=jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])


log_prob = jf.log_likelihood(network)


def first(key):
    keys = jax.random.split(key)
    w1, w2 = jax.random.normal(keys[0], (64, 8)) / 8, jax.random.normal(keys[1], (8,)) / 5
    return {"w1": w1, "b1": jnp.zeros(8), "w2": w2, "b2": jnp.zeros(())}


def loss(params, x, y):
    return -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))


def accuracy(params, x, y):
    right = jax.vmap(network, (None, 0))(params, x).logits > 0
    return jnp.mean(right == y)


def trained(params, data, penalty=lambda params: 0.0, steps=150):
    """Adam on the mean loss of one task and a penalty."""
    opt = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: loss(params, *data) + penalty(params))(params)
        updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, opt.init(params)), length=steps)[0][0]


# %% [markdown]
# ## Which Fisher
#
# We keep an operator of each task. Four of the choices are Fishers, and one is not:
#
# - the exact Fisher of the model: the whole matrix, its Kronecker factors, and its diagonal;
# - the empirical Fisher's diagonal, the mean of the squared scores at the task's own labels;
# - the squared gradients of *batches* of 32, which some libraries use in its place. These square the mean of 32 scores,
#   and where the scores of a batch cancel, as they do at an optimum, little is left.


# %%
def exact(params, x, y):
    return jf.dense(jf.exact_fisher(network)(params, x))


def kronecker(params, x, y):
    return jf.kronecker(jf.exact_fisher(network)(params, x))


def diagonal(params, x, y):
    return jf.diagonal(jf.exact_fisher(network)(params, x))


def empirical(params, x, y):
    return jf.diagonal(jf.empirical_fisher(log_prob)(params, x, y))


def batch_squares(params, x, y):
    """As a diagonal: the mean over batches of the squared gradient of a batch's mean loss."""
    batches = TRAIN // 32
    cut = [array[: 32 * batches].reshape(batches, 32, *array.shape[1:]) for array in (x, y)]
    mean_score = lambda params, x, y: -loss(params, x, y)
    return jf.diagonal(jf.empirical_fisher(mean_score)(params, *cut))


# %% [markdown]
# The picture shows the three diagonals after the first task. Squared gradients of batches have only a small part of the trace,
# and their proportions differ as well. The empirical Fisher is small too: the network has learned the task and predicts its
# labels.

# %%
params = jax.jit(trained)(first(jax.random.key(0)), tasks[0])
entries = {
    make.__name__: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(make(params, *tasks[0]).diagonal())])
    for make in (diagonal, empirical, batch_squares)
}
print("diagonal          trace    correlation of entries with the exact one's")
for name, values in entries.items():
    print(f"{name:14s} {values.sum():8.1e}    {np.corrcoef(values, entries['diagonal'])[0, 1]:.2f}")
assert entries["batch_squares"].sum() < 0.2 * entries["empirical"].sum()

# %% [markdown]
# ## Five tasks in turn
#
# After each task `jf.merge` adds its Fisher to the earlier ones; the result is the mean over the examples of all tasks so far,
# for Kronecker views too. The penalty is about the last optimum (online EWC). For the exact posterior the strength would be the
# number of tasks so far. The posteriors of networks are not Gaussian, so we multiply it by a factor, chosen for each Fisher
# from a few on other seeds.


# %%
def next_task(make, data, k, params, whole, strength):
    """Learn one more task; the new parameters, the Fisher of all tasks, and the accuracies on all."""
    new = trained(params, data, jf.ewc_penalty(whole, params, strength * k))
    return new, jf.merge(whole, make(new, *data)), jnp.stack([accuracy(new, *test) for test in tests])


@functools.partial(jax.jit, static_argnums=0)
def of_all_runs(make, data, k, params, whole, strengths):
    return jax.vmap(functools.partial(next_task, make, data, k))(params, whole, strengths)


def in_turn(make, strengths, keys):
    """The accuracies on all tasks after each of them, of every strength and seed."""
    grid = jnp.repeat(jnp.asarray(strengths), len(keys))
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(strengths)), after_first)
    whole, seen = jax.jit(jax.vmap(lambda params: make(params, *tasks[0])))(params), []
    seen.append(jax.jit(jax.vmap(lambda params: jnp.stack([accuracy(params, *test) for test in tests])))(params))
    for k, data in enumerate(tasks[1:], start=1):
        params, whole, found = of_all_runs(make, data, float(k), params, whole, grid)
        seen.append(found)
    return np.asarray(jnp.stack(seen, axis=1)).reshape(len(strengths), len(keys), TASKS, TASKS)


WAYS = {
    "exact Fisher": (exact, [30.0, 100.0]),
    "exact, Kronecker": (kronecker, [30.0, 100.0]),
    "exact, diagonal": (diagonal, [100.0, 1000.0, 0.0]),
    "empirical, diagonal": (empirical, [100.0, 1000.0]),
    "batches squared": (batch_squares, [1e4, 1e5, 100.0]),
}
# A third strength is not chosen from: it has a line of its own.
BESIDE = {"exact, diagonal": "no penalty", "batches squared": "batches squared, at 100"}
keys = jax.random.split(jax.random.key(1), 2 * SEEDS)
after_first = jax.jit(jax.vmap(lambda key: trained(first(key), tasks[0])))(keys)
curves, table = {}, {}
for name, (make, strengths) in WAYS.items():
    found = in_turn(make, strengths, keys)  # [strengths, seeds, after, on]
    best = np.argmax(found[:2, SEEDS:, -1].mean(axis=(1, 2)))
    curves[name], table[name] = found[best, :SEEDS], strengths[best]
    if name in BESIDE:
        curves[BESIDE[name]], table[BESIDE[name]] = found[2, :SEEDS], strengths[2]

print(f"after five tasks; means over {SEEDS} seeds and, in brackets, their spread")
print("                          strength    accuracy on all tasks    forgotten")
for name, curve in curves.items():
    end = curve[:, -1].mean(axis=1)
    learned = np.stack([curve[:, k, k] for k in range(TASKS - 1)], axis=1)
    forgotten = np.mean(learned - curve[:, -1, :-1])
    print(f"{name:23s} {table[name]:10g}     {end.mean():10.1%} ({end.std():.1%})    {forgotten:12.1%}")

# %%
at_end = {name: curve[:, -1].mean() for name, curve in curves.items()}
assert at_end["exact Fisher"] > at_end["exact, diagonal"] > at_end["no penalty"]
assert at_end["exact, Kronecker"] > at_end["no penalty"]

# %% [markdown]
# ## Two networks into one
#
# Two networks start from the same parameters, trained a little on everything. One continues with the first four digits, the
# other with the last four. How can we combine them? The plain mean of the parameters treats every direction alike.
# `jf.fisher_average` uses the Fishers as weights: if the data of a network determine a direction, that network's value counts.
# Kronecker views merge by their factors, without an iteration and without a matrix over all parameters.

# %%
halves = [tuple(map(jnp.concatenate, zip(*tasks[k : k + 2], strict=True))) for k in (0, 3)]
tested = [tuple(map(jnp.concatenate, zip(*tests[k : k + 2], strict=True))) for k in (0, 3)]
WAYS_TO_MERGE = {
    "Fisher, diagonal": (diagonal, None),
    "Fisher, Kronecker": (kronecker, jf.kronecker),
    "Fisher, exact": (exact, None),
}
DAMPINGS = [1e-4, 1e-2]


@jax.jit
def both_models(key):
    """A network that was trained on everything, gone on with each half."""
    start = trained(first(key), tuple(map(jnp.concatenate, zip(*tasks, strict=True))), steps=120)
    half = tuple(jnp.stack([half[i] for half in halves]) for i in range(2))
    return jax.vmap(lambda x, y: trained(start, (x, y)))(*half)


@jax.jit
def on_both(params):
    return jnp.stack([accuracy(params, *test) for test in tested])


def merged(key):
    models = [jax.tree.map(lambda leaf, k=k: leaf[k], both_models(key)) for k in range(2)]
    found = {"first model": models[0], "second model": models[1]}
    found["plain mean"] = jax.tree.map(lambda a, b: 0.5 * (a + b), *models)
    for name, (make, view) in WAYS_TO_MERGE.items():
        fishers = [make(params, *half) for params, half in zip(models, halves, strict=True)]
        for damping in DAMPINGS:
            found[f"{name}, {damping:g}"] = jf.fisher_average(models, fishers, damping, view=view)[0]
    return {name: on_both(params) for name, params in found.items()}


rows = [merged(key) for key in keys[:SEEDS]]
results = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
print("accuracy on                  first four    last four    both")
for name, values in results.items():
    one, two = np.mean(values, axis=0)
    print(f"{name:28s} {one:10.1%} {two:12.1%} {(one + two) / 2:8.1%}")
both = {name: float(jnp.mean(values)) for name, values in results.items()}
assert both["Fisher, Kronecker, 0.01"] > both["plain mean"] > max(both["first model"], both["second model"])
assert both["Fisher, exact, 0.01"] > both["Fisher, exact, 0.0001"]

# %%
STYLE = {"exact Fisher": "#0072B2", "exact, Kronecker": "#009E73", "exact, diagonal": "#E69F00"}
STYLE |= {"batches squared": "#D55E00", "no penalty": "0.5"}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
after = np.arange(1, TASKS + 1)
for marker, (name, color) in zip("osD^x", STYLE.items(), strict=True):
    seen = [curves[name][:, k, : k + 1].mean() for k in range(TASKS)]
    left.plot(after, seen, color=color, marker=marker, label=name)
left.set(xlabel="tasks learned", ylabel="accuracy on the tasks so far", xticks=after, ylim=(0.6, 1.01))
left.legend(loc="lower left")
bars = [name for name in both if "0.0001" not in name]
right.barh(
    bars[::-1], [both[name] for name in bars[::-1]], color=["#0072B2" if "Fisher" in name else "0.6" for name in bars[::-1]]
)
right.set(xlabel="accuracy on the digits of both models", xlim=(0.5, 1))
plt.show()

# %% [markdown]
# What the tables and the pictures show:
#
# - **Keeping more of the Fisher keeps more of the tasks.** Kronecker factors and the exact matrix keep the couplings between
#   weights; a diagonal does not.
# - **Squared gradients of batches** have no effect at the strength that suits the diagonal. A hundred times that strength
#   makes up for their size, and still leaves them behind the diagonals.
# - **Merging** two networks gains a little over the plain mean if the damping is large enough. With little damping, the merge
#   trusts the Kronecker and the exact quadratics far beyond the region where they hold, and the merged network
#   is worse than either.
