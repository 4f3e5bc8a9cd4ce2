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
# # Which examples a prediction rests on
#
# At the end you will know which training digits help a model to read a test digit, and which ones mislead it. You will know how
# well that agrees with leaving examples out and training again, and how to find wrong labels.
#
# Let the parameters be at a minimum of $-\frac1n \sum_i \log p_\theta(x_i) + \frac\lambda2 |\theta|^2$. Counting example $i$
# once more moves them, to first order, by $\frac1n (F + \lambda I)^{-1} s_i$, with $s_i$ its score. So the log-density of a
# test example $t$ moves by
#
# $$I_{ti} = \frac1n\, s_t^\top (F + \lambda I)^{-1} s_i,$$
#
# and by $-I_{ti}$ when $i$ is left out. `jf.influence` computes this matrix for any form of $F$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from sklearn.datasets import load_digits

import jaxfisher as jf

jax.config.update("jax_enable_x64", True)  # the changes by one example of many are small
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## The data
#
# The data are the handwritten digits of scikit-learn, 8 x 8 pixels each, in a random order.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = jnp.asarray(images[order] / 16), jnp.asarray(labels[order])


# %% [markdown]
# ## Against leaving one out
#
# We start with a model that we can retrain without each of its examples in turn: softmax regression on twelve principal
# components of 150 digits, with a prior as weight decay. The loss is convex, so Newton's method finds its only minimum.

# %%
SMALL, TESTS, DECAY = 150, 10, 0.01
components = jnp.linalg.svd(images - jnp.mean(images, axis=0), full_matrices=False)[2][:12]
features = (images - jnp.mean(images, axis=0)) @ components.T
x, y = features[:SMALL], labels[:SMALL]
x_test, y_test = features[SMALL : SMALL + TESTS], labels[SMALL : SMALL + TESTS]


def regression(params, x):
    """Softmax regression, of ONE image."""
    return jf.Categorical(logits=x @ params["w"] + params["b"])


log_prob = jf.log_likelihood(regression)


def log_densities(params, x, y):
    return jax.vmap(log_prob, (None, 0, 0))(params, x, y)


def gradient(params, weights):
    """That of minus the sum of weighted log-densities over n, with the decay."""
    fit = jax.grad(lambda params: -jnp.sum(weights * log_densities(params, x, y)) / SMALL)(params)
    return jax.tree.map(lambda g, theta: g + DECAY * theta, fit, params)


def trained(params, weights, steps):
    """Newton's method: for softmax regression the Hessian is the exact Fisher."""
    share = jnp.sum(weights) / SMALL

    def step(params, _):
        hessian = share * jf.dense(jf.exact_fisher(regression)(params, x, weights=weights))
        return jax.tree.map(jnp.subtract, params, hessian.solve(gradient(params, weights), DECAY)), None

    return jax.lax.scan(step, params, length=steps)[0]


@jax.jit
def all_trainings(params):
    """The minimum, the length of the gradient there, and what leaving each example out does to the test log-densities."""
    everything = jnp.ones(SMALL)
    params = trained(params, everything, 12)
    before = log_densities(params, x_test, y_test)
    without = lambda k: log_densities(trained(params, everything.at[k].set(0.0), 4), x_test, y_test) - before
    slope = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient(params, everything))))
    return params, slope, jax.lax.map(without, jnp.arange(SMALL)).T


params, slope, actual = all_trainings({"w": jnp.zeros((12, 10)), "b": jnp.zeros(10)})
print(f"gradient at the minimum: {slope:.1e}")
assert slope < 1e-12

# %% [markdown]
# The predicted change is minus the influence. The exact Fisher is the Hessian here; its views are cheaper and less accurate.
# TracIn at the last checkpoint uses no curvature.

# %%
F = jf.exact_fisher(regression)(params, x)
curvatures = {"exact": F, "EKFAC": jf.eigen_kronecker(F), "KFAC": jf.kronecker(F), "diagonal": jf.diagonal(F)}
predicted = {
    name: -jf.influence(log_prob, curvature)(params, (x, y), (x_test, y_test), DECAY)[0]
    for name, curvature in curvatures.items()
}
predicted["TracIn"] = -jf.tracin(log_prob)([params], (x, y), (x_test, y_test), 1 / SMALL)


def agreement(found):
    """The rank correlation with retraining over training examples, a mean over test examples."""
    return np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(found, actual, strict=True)])


ranks = {name: agreement(found) for name, found in predicted.items()}
print("curvature    rank correlation with leaving one out    slope of actual on predicted")
for name, found in predicted.items():
    found, seen = np.ravel(found), np.ravel(actual)
    print(f"{name:9s}    {ranks[name]:36.3f}    {found @ seen / (found @ found):28.2f}")

# %% [markdown]
# ## By hand
#
# We compute the same matrix from per-example gradients by `jax.vmap(jax.grad(...))` and a dense solve in NumPy:

# %%
flat_scores = lambda x, y: np.asarray(jf.scores(log_prob)(params, x, y).as_matrix())
gradients = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, x, y)
by_jax = np.concatenate([np.asarray(leaf).reshape(SMALL, -1) for leaf in jax.tree.leaves(gradients)], axis=1)
np.testing.assert_allclose(by_jax, flat_scores(x, y), atol=1e-12)
damped = np.asarray(F.as_matrix()) + DECAY * np.eye(F.size)
by_hand = flat_scores(x_test, y_test) @ np.linalg.solve(damped, by_jax.T) / SMALL
np.testing.assert_allclose(-predicted["exact"], by_hand, atol=1e-9 * np.abs(by_hand).max())
assert ranks["exact"] > 0.99 and all(0.9 > ranks[name] > ranks["TracIn"] for name in ("EKFAC", "KFAC", "diagonal"))

# %% [markdown]
# ## Helpful and misleading digits
#
# The picture shows the test digit about which the model is least sure, and the training digits with the largest influence on
# it, of either sign.

# %%
doubtful = int(np.argmin(log_densities(params, x_test, y_test)))
row = -np.asarray(predicted["exact"])[doubtful]
ranked = np.argsort(-row)
fig, axes = plt.subplots(2, 6, figsize=(8, 3.3), layout="constrained")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])


def draw(axis, index, title):
    axis.imshow(1 - np.asarray(images[index]).reshape(8, 8), cmap="gray")
    axis.set_title(title, fontsize=9)


for line, chosen, word in ((0, ranked[:5], "helps"), (1, ranked[::-1][:5], "misleads")):
    draw(axes[line, 0], SMALL + doubtful, f"the test digit,\na {int(y_test[doubtful])}")
    for axis, index in zip(axes[line, 1:], chosen, strict=True):
        draw(axis, index, f"a {int(labels[index])} {word}\n{row[index]:+.2f}")
plt.show()

# %% [markdown]
# ## Wrong labels
#
# Now we train a network on 1000 digits, of which a tenth have a wrong label at random. An example has a large self-influence if
# the network can learn its label only from the example itself. We compare `jf.self_influence`, with EKFAC, with the loss of
# each example and with the squared length of its score, which is TracIn's self-influence.

# %%
N, WRONG, DAMPING = 1000, 100, 1e-3


def network(params, x):
    """One hidden layer, of ONE image."""
    return jf.Categorical(logits=jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])


def first(key):
    w1, w2 = (jax.random.normal(k, shape) / 8 for k, shape in zip(jax.random.split(key), ((64, 32), (32, 10)), strict=True))
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}


def spoiled(key):
    """Labels of which a tenth are wrong, and which those are."""
    keys = jax.random.split(key)
    chosen = jax.random.permutation(keys[0], N) < WRONG
    others = (labels[:N] + jax.random.randint(keys[1], (N,), 1, 10)) % 10
    return jnp.where(chosen, others, labels[:N]), chosen


step = jf.training_step(network, jf.kfac())


def fitted(key, targets, steps):
    params = first(key)
    state = step.init(params, images[:N], targets)
    go_on = lambda carry, _: (step(*carry, images[:N], targets)[:2], None)
    return jax.lax.scan(go_on, (params, state), length=steps)[0][0]


@jax.jit
def suspicions(key):
    """Four scores of suspicion for every example, and which examples are wrong."""
    keys = jax.random.split(key, 3)
    targets, wrong = spoiled(keys[0])
    params = fitted(keys[1], targets, 8)
    data, log_prob = (images[:N], targets), jf.log_likelihood(network)
    ekfac = jf.eigen_kronecker(jf.exact_fisher(network)(params, data[0]))
    scores = jf.scores(log_prob)(params, *data)
    found = {
        "self-influence, EKFAC": jf.self_influence(log_prob, ekfac)(params, data, DAMPING)[0],
        "self-influence, TracIn": scores.squared_norms(),
        "loss": -jax.vmap(log_prob, (None, 0, 0))(params, *data),
        "at random": jax.random.uniform(keys[2], (N,)),
    }
    return found, wrong


SEEDS = 3
runs = [suspicions(jax.random.key(seed)) for seed in range(SEEDS)]


def found_by(suspicion, wrong):
    """The share of wrong labels among the first k of the list, for every k."""
    return np.cumsum(np.asarray(wrong)[np.argsort(-np.asarray(suspicion))]) / WRONG


curves = {name: np.mean([found_by(found[name], wrong) for found, wrong in runs], axis=0) for name in runs[0][0]}
print(f"share of wrong labels found in the first 10 % and 20 % of the list, means over {SEEDS} seeds")
for name, curve in curves.items():
    print(f"{name:24s} {curve[N // 10 - 1]:6.1%} {curve[N // 5 - 1]:6.1%}")
assert curves["self-influence, EKFAC"][N // 10 - 1] > 0.75
assert curves["self-influence, EKFAC"][N // 5 - 1] > 0.9

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for name, color, marker in (("diagonal", "#D55E00", "^"), ("exact", "#0072B2", "o")):
    left.plot(np.ravel(predicted[name]), np.ravel(actual), marker, color=color, markersize=3, alpha=0.6, label=name)
ends = np.array([np.min(actual), np.max(actual)])
left.plot(ends, ends, color="0.5", linewidth=1, zorder=0)
left.set(xlabel="predicted change of a test log-density (nats)", ylabel="change after leaving one out (nats)")
left.legend(title="curvature")
styles = {"self-influence, EKFAC": ("#0072B2", "-"), "self-influence, TracIn": ("#D55E00", "-."), "loss": ("#009E73", "--")}
for name, curve in curves.items():
    color, dash = styles.get(name, ("0.6", ":"))
    right.plot(np.arange(1, N + 1) / N, curve, color=color, linestyle=dash, label=name)
right.set(xlabel="share of the list that was read", ylabel="share of wrong labels found", xlim=(0, 0.4), ylim=(0, 1))
right.legend(loc="lower right")
plt.show()

# %% [markdown]
# What the table and the pictures show:
#
# - **The exact Fisher** gives the same order as retraining. The actual changes are larger than predicted, the large ones most
#   of all: leaving out an example of high leverage also removes its contribution to the curvature.
# - **The views** give the order less well. For one layer of softmax regression Kronecker factors are no better than a diagonal.
# - **Wrong labels** are found by every list. The loss, which is free, comes within a few per cent of the self-influence: if
#   most labels are right, a model that has not yet fitted the wrong labels gives them a low probability.
