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
# # A classifier that knows what it does not know
#
# At the end you will know how to turn a trained classifier into a posterior over its weights with `jf.laplace`, how the
# evidence chooses the prior without held-out data, and how the posterior changes the predictions: little near the data, and a
# lot far from them.
#
# Notebook 7 builds Laplace's approximation by hand, from a Fisher and a prior. Here it takes one call, for a network.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_moons

import jaxfisher as jf

plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Two moons
#
# The data are two hundred points to fit and a thousand held out, with so much noise that the moons overlap.

# %%
points, labels = make_moons(1200, noise=0.25, random_state=0)
points, labels = jnp.asarray(points, jnp.float32), jnp.asarray(labels)
x, y, x_new, y_new = points[:200], labels[:200], points[200:], labels[200:]


def network(params, x):
    """The probability of the lower moon, from two hidden layers."""
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    hidden = jnp.tanh(hidden @ params["second"]["w"] + params["second"]["b"])
    return jf.Bernoulli(logits=(hidden @ params["last"]["w"])[0] + params["last"]["b"])


keys = jax.random.split(jax.random.key(1), 3)
start = {
    "first": {"w": jax.random.normal(keys[0], (2, 16)), "b": jnp.zeros(16)},
    "second": {"w": 0.25 * jax.random.normal(keys[1], (16, 16)), "b": jnp.zeros(16)},
    "last": {"w": 0.25 * jax.random.normal(keys[2], (16, 1)), "b": jnp.zeros(())},
}
log_prob = jf.log_likelihood(network)

# %% [markdown]
# The mean of the posterior is the point of largest posterior density. To find it, train with a weight decay of $\alpha / n$,
# which is the prior of precision $\alpha$. We fit one network for each of several priors.


# %%
def fit(alpha):
    """The parameters of the largest posterior density, and the size of its gradient there."""

    def loss(params):
        data = -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))
        return data + 0.5 * alpha / len(x) * optax.tree.norm(params, squared=True)

    opt = optax.adam(optax.cosine_decay_schedule(1e-2, 4000))

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(loss)(params)
        updates, state = opt.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(gradient)

    (params, _), sizes = jax.lax.scan(step, (start, opt.init(start)), length=4000)
    return params, sizes[-1]


ALPHAS = jnp.array([0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
fits, sizes = jax.jit(jax.vmap(fit))(ALPHAS)
print("size of the gradient at the end:", *(f"{size:.0e}" for size in sizes))
assert jnp.all(sizes < 1e-2)

# %% [markdown]
# ## The evidence chooses the prior
#
# `posterior.log_evidence()` is the log of the probability that the model gives to the labels with its weights integrated out.
# The picture compares it with the mean log-likelihood of the held-out points, which the evidence does not use. It shows three
# forms of the Fisher: the whole matrix, a Kronecker product for each layer, and the diagonal.

# %%
VIEWS = {"dense": jf.dense, "Kronecker": jf.kronecker, "diagonal": jf.diagonal}


def looked_at(fitted):
    params, alpha = fitted
    held_out = jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x_new, y_new))
    dense, *others = [jf.laplace(network, params, x, y, prior=alpha, view=view) for view in VIEWS.values()]
    # The same points by the posterior, with the weights integrated out.
    integrated = jnp.mean(dense.predictive(x_new).log_prob(y_new))
    return held_out, integrated, *(posterior.log_evidence() for posterior in (dense, *others))


plug_in, integrated, *evidences = map(np.asarray, jax.jit(lambda each: jax.lax.map(looked_at, each))((fits, ALPHAS)))
print("prior        held out: log-likelihood              log evidence")
print("precision    at the mean    integrated    " + "".join(f"{name:>12s}" for name in VIEWS))
for row in zip(ALPHAS, plug_in, integrated, *evidences, strict=True):
    print("{:9.2f}    {:11.3f}    {:10.3f}    {:12.1f}{:12.1f}{:12.1f}".format(*map(float, row)))
chosen = int(np.argmax(evidences[0]))
assert np.all(integrated > plug_in - 0.02) and plug_in[chosen] > np.max(plug_in) - 0.05

# %% [markdown]
# The evidence of the whole Fisher has its maximum at a prior that predicts the held-out points about as well as any other. The
# diagonal ignores that weights are correlated. Its evidence is a different number; compare it only with that of other priors
# under the same form.
#
# The prior can also be found by its derivative. `jf.tune_prior` iterates MacKay's rule with the mean held fixed; with one
# number for each leaf, it finds different priors for the layers.

# %%
best = jax.tree.map(lambda leaf: leaf[chosen], fits)
posterior = jf.laplace(network, best, x, y, prior=ALPHAS[chosen], view=jf.dense)
tuned = jf.tune_prior(posterior)
by_leaf = jf.laplace(network, best, x, y, prior=jax.tree.map(lambda leaf: ALPHAS[chosen], best), view=jf.dense)
tuned_by_leaf = jf.tune_prior(by_leaf, max_steps=10)
for name, each in {"as fitted": posterior, "one, tuned": tuned, "a leaf, tuned": tuned_by_leaf}.items():
    print(f"{name:14s} log evidence {each.log_evidence():8.1f}")
print("one:", f"{tuned.prior:.3f};", "a leaf:", jax.tree.map(lambda a: round(float(a), 2), tuned_by_leaf.prior))
slope = jax.grad(posterior.log_evidence)(tuned.prior)
assert abs(tuned.prior * slope) < 0.05 and tuned_by_leaf.log_evidence() > tuned.log_evidence() > posterior.log_evidence()

# %% [markdown]
# ## What it says far from the data
#
# At the mean the network is certain wherever its logit is large, even in corners where it has seen no data. The posterior gives
# the logit a variance, which is large where the data say little. The last layer alone, `keep=lambda path: "last" in path`,
# costs almost nothing but has very little of the effect here, since it is the earlier layers that change the function where
# there are no data.

# %%
side = jnp.linspace(-4.0, 5.0, 60)
grid = jnp.stack(jnp.meshgrid(side, side - 0.5), axis=-1).reshape(-1, 2)
last = jf.laplace(network, best, x, y, prior=ALPHAS[chosen], keep=lambda path: "last" in path)
maps = {
    "at the mean": jax.vmap(lambda x: network(best, x).mean)(grid),
    "last layer": last.predictive(grid).mean,
    "all weights": posterior.predictive(grid).mean,
}
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), layout="constrained", sharey=True)
levels = np.linspace(0, 1, 11)
for ax, (title, probabilities) in zip(axes, maps.items(), strict=True):
    image = np.asarray(probabilities).reshape(60, 60)
    shown = ax.contourf(side, side - 0.5, image, levels, cmap="RdBu_r")
    ax.plot(*np.asarray(x[y == 0]).T, "o", color="#053061", markersize=2.5)
    ax.plot(*np.asarray(x[y == 1]).T, "^", color="#67001f", markersize=2.5)
    ax.set(title=title, xlabel="first coordinate")
axes[0].set_ylabel("second coordinate")
fig.colorbar(shown, ax=axes, label="probability of the lower moon")
plt.show()
confident = {title: float(jnp.mean(jnp.abs(p - 0.5) > 0.45)) for title, p in maps.items()}
print("share of the picture with a probability above 0.95 or below 0.05:", {k: round(v, 2) for k, v in confident.items()})
assert confident["all weights"] < confident["last layer"] < confident["at the mean"]

# %% [markdown]
# ## Closed form, and draws
#
# The maps above use the probit approximation, in closed form. Draws of the linearised model need no such approximation:
# `sample_predictive` takes one jvp per draw. You can also put draws of the weights, `posterior.sample`, into the network
# itself. On the right these predict almost nothing, even where there are data: in all directions that the data do not
# determine, the draws are as wide as the prior, and only the tangent is flat there.

# %%
drawn = posterior.sample_predictive(jax.random.key(2), grid, num_samples=1000).mean
inside = jax.jit(jax.vmap(lambda params: jax.vmap(lambda x: network(params, x).mean)(grid)))(
    posterior.sample(jax.random.key(3), (200,))
)
difference = jnp.abs(drawn.mean(0) - maps["all weights"])
print(f"probit against draws of the tangent: at most {difference.max():.3f} apart, {difference.mean():.4f} on average")
assert difference.max() < 0.08

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for (name, values), mark in zip(dict(zip(VIEWS, evidences, strict=True)).items(), "os^", strict=True):
    left.plot(ALPHAS, values - values.max(), f"-{mark}", label=f"evidence, {name}")
left.plot(ALPHAS, len(x) * (plug_in - plug_in.max()), "--", color="0.4", label="held out, per 200 points")
left.set(xscale="log", xlabel="prior precision", ylabel="nats below the best", ylim=(-80, 5))
left.legend(loc="lower center")
line = slice(60 * 30, 60 * 31)
for label, values, style in (
    ("at the mean", maps["at the mean"], "-"),
    ("all weights, probit", maps["all weights"], "-"),
    ("draws of the tangent", drawn.mean(0), ":"),
    ("draws in the network", inside.mean(0), "--"),
):
    right.plot(side, np.asarray(values)[line], style, label=label)
right.set(xlabel="first coordinate, along one line", ylabel="probability of the lower moon", ylim=(-0.02, 1.02))
right.legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
# What to take home:
#
# - `jf.laplace(model, params, x, y, prior=alpha, view=...)` is the posterior; its methods are `predictive`, `sample` and
#   `log_evidence`.
# - The evidence compares priors, and models, on the data that they were fitted to. Compare only evidences with the same form of
#   the Fisher, at means that were fitted until convergence.
# - Far from the data the posterior makes a classifier less certain. Near the data it changes little, and it does not repair a
#   wrong model.
