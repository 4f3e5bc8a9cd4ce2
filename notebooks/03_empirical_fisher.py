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
# # The empirical Fisher, and what it is not
#
# At the end you will know three matrices that are all called "the Fisher", how far apart they can be, why the square of a
# batch's mean gradient is none of them, and what Adam and its relatives have to do with it.

# %%
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_iris

import jaxfisher as jf
from jaxfisher import plot

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 80
EPS = float(np.finfo(float).eps)
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"

# %% [markdown]
# ## Exact, sampled, empirical
#
# With the score $s(x, y) = \nabla_\theta \log p_\theta(y \mid x)$, all three are means over the inputs of
# $s\, s^\top$. They differ in where the target $y$ comes from.
#
# - **Exact**: the expectation over all targets, with the model's own probabilities. `jf.exact_fisher`.
# - **Sampled**: targets drawn from the model. An unbiased estimate of the exact one. `jf.sampled_fisher`.
# - **Empirical**: the targets in the data. `jf.empirical_fisher`. It is not an expectation under the model.
#
# The third is popular because it needs only gradients that training computes anyway. We compare the three for a small
# network on the irises, at random parameters and after training.

# %%
iris = load_iris()
inputs = jnp.asarray((iris.data - iris.data.mean(0)) / iris.data.std(0))
targets = jnp.asarray(iris.target)


def network(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jf.Categorical(logits=hidden @ params["w2"] + params["b2"])


log_prob = jf.log_likelihood(network)
keys = jax.random.split(jax.random.key(0), 2)
start = {
    "b1": jnp.zeros(3),
    "b2": jnp.zeros(3),
    "w1": jax.random.normal(keys[0], (4, 3)),
    "w2": jax.random.normal(keys[1], (3, 3)),
}


@jax.jit
def train(params, x, y):
    exact = jf.exact_fisher(network)
    direction = jf.value_and_natural_grad(log_prob, exact, damping=1e-2)

    def step(params, _):
        value, d = direction(params, x, y)
        return jax.tree.map(lambda leaf, change: leaf - 0.5 * change, params, d), value

    return jax.lax.scan(step, params, length=30)


trained, losses = train(start, inputs, targets)
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} after training (nats)")

# %% [markdown]
# The picture shows the relative distance to the exact Fisher in Frobenius norm. For sampled Fishers it falls like one over the
# square root of the number of draws, as the error of an average does.

# %%
DRAWS = 4096


@jax.jit
def three_fishers(params, key):
    once = jf.sampled_fisher(network, num_samples=1)
    return (
        jf.exact_fisher(network)(params, inputs).as_matrix(),
        jax.lax.map(lambda key: once(params, key, inputs).as_matrix(), jax.random.split(key, DRAWS), batch_size=64),
        jf.empirical_fisher(log_prob)(params, inputs, targets).as_matrix(),
    )


counts = 4 ** np.arange(5)
distances = {}
for name, params in (("at the start", start), ("after training", trained)):
    exact, draws, empirical = map(np.asarray, three_fishers(params, jax.random.key(1)))
    size = np.linalg.norm(exact)
    # The root mean square over all groups of so many draws.
    means = [draws.reshape(-1, count, *exact.shape).mean(axis=1) for count in counts]
    sampled = [np.sqrt(np.mean(np.sum((mean - exact) ** 2, axis=(1, 2)))) / size for mean in means]
    distances[name] = (sampled, np.linalg.norm(empirical - exact) / size)
    print(f"{name}: empirical off by {distances[name][1]:.0%} of the exact Fisher's norm", end=", ")
    print(f"sampled by {sampled[0]:.0%} with one draw an input, {sampled[-1]:.1%} with {counts[-1]}")
    np.testing.assert_allclose(np.array(sampled) * np.sqrt(counts), sampled[0], rtol=0.3)
    assert distances[name][1] > 3 * sampled[-1]

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained", sharey=True)
for ax, (name, (sampled, empirical)) in zip(axes, distances.items(), strict=True):
    ax.loglog(counts, sampled, "o", color=BLUE, label="sampled")
    ax.loglog(counts, sampled[0] / np.sqrt(counts), color=BLUE, linewidth=1, label=r"slope $-1/2$")
    ax.axhline(empirical, color=ORANGE, linestyle="--", linewidth=2, label="empirical")
    ax.set(title=name, xlabel="draws for each input")
    ax.grid(color="0.9")
axes[0].set_ylabel("distance to the exact Fisher\n(relative, Frobenius)")
axes[0].legend()
plt.show()

# %% [markdown]
# More data do not move the dashed lines: the distance of the empirical Fisher is not noise. It would be noise if the data had
# been drawn from the model; the sampled Fisher *is* the empirical Fisher of such data.
#
# ## Where it misleads: linear regression
#
# Kunstner, Balles and Hennig
# ([2019](https://arxiv.org/abs/1905.12558)) show it on a problem where everything is known. The model is $y = \theta x$ with
# normal noise of scale one. With the residuals $r_i = y_i - \theta x_i$,
#
# $$\nabla L = -\frac1n \sum_i r_i x_i, \qquad F = \frac1n \sum_i x_i^2, \qquad
# \hat F = \frac1n \sum_i r_i^2 x_i^2 .$$
#
# The exact Fisher is the Hessian: one step solves the problem from anywhere. The empirical Fisher has the residuals in it.
# Far from the solution they are large, and dividing by their squares makes the step tiny. Close to it they are small, and the
# step is far too long. The right behaviour would be the other way round.

# %%
generator = np.random.default_rng(2019)
x = generator.lognormal(0.0, 0.75, 300)
noise = generator.standard_normal(300)
SLOPE, NOISE = 2.0, 0.3
y = SLOPE * x + NOISE * (noise - x * (x @ noise) / (x @ x))  # no noise along x: least squares gives SLOPE itself


def through_origin(theta, x):
    return jf.Normal(theta * x, 1.0)


def steps_of(model):
    """(theta, x, y) -> the plain gradient, and the natural ones with the exact and the empirical Fisher."""
    log_prob = jf.log_likelihood(model)
    exact = jf.natural_grad(log_prob, lambda theta, x, y: jf.exact_fisher(model)(theta, x), damping=0.0)
    empirical = jf.natural_grad(log_prob, damping=0.0)  # without a Fisher of your own it is the empirical one
    plain = jax.grad(lambda theta, x, y: -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(theta, x, y)))
    return lambda *args: {"gradient": plain(*args), "exact": exact(*args), "empirical": empirical(*args)}


away = np.logspace(-3, 2, 26)
found = jax.jit(jax.vmap(steps_of(through_origin), (0, None, None)))(SLOPE + away, x, y)
np.testing.assert_allclose(found["exact"], away, rtol=1e4 * EPS * SLOPE / away[0])
residuals = y - (SLOPE + away[:, None]) * x
factor = np.mean(x**2) / np.mean((residuals * x) ** 2, axis=1)
np.testing.assert_allclose(found["empirical"] / found["exact"], factor, rtol=1e-8)
print("distance to the solution    exact step    empirical step")
for k in (0, 10, 15, 25):
    print(f"{away[k]:24.3f}    {found['exact'][k]:10.3f}    {found['empirical'][k]:14.5f}")

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
ax.loglog(away, found["exact"], color=BLUE, linewidth=2, label="exact: lands on the solution")
ax.loglog(away, found["empirical"], "o", color=ORANGE, markersize=4, label="empirical")
ax.loglog(away, factor * away, color=ORANGE, linewidth=1, label=r"$|\nabla L|\, /\, \hat F$ by the formula")
ax.set(xlabel=r"distance to the solution, $|\theta - \theta^*|$", ylabel="length of the step")
ax.grid(color="0.9")
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# With two parameters, intercept and slope, the direction is wrong too. The arrows, all of one length, show where each method
# goes.


# %%
def line(theta, x):
    return jf.Normal(theta[0] + theta[1] * x, 1.0)


y_line = 2.0 + SLOPE * x + noise
design = np.column_stack([np.ones_like(x), x])
solution = np.linalg.lstsq(design, y_line, rcond=None)[0]


def line_loss(theta):
    return 0.5 * jnp.mean((y_line - theta[0] - theta[1] * x) ** 2)


axis = np.linspace(-3.0, 3.0, 14)  # an even number: not at the solution itself
points = solution + np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
field = jax.jit(jax.vmap(steps_of(line), (0, None, None)))(points, x, y_line)
np.testing.assert_allclose(points - field["exact"], np.broadcast_to(solution, points.shape), atol=1e-10)

fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.6), layout="constrained", sharex=True, sharey=True)
across, up = np.meshgrid(*(centre + np.linspace(-3.2, 3.2, 80) for centre in solution))
surface = jax.vmap(jax.vmap(line_loss))(jnp.stack([across, up], axis=-1))
off = {}
for ax, (name, title) in zip(
    axes,
    {"gradient": "gradient", "exact": "natural, exact Fisher", "empirical": "natural, empirical Fisher"}.items(),
    strict=True,
):
    arrows = -np.asarray(field[name])
    arrows = arrows / np.linalg.norm(arrows, axis=1, keepdims=True)
    to_solution = (solution - points) / np.linalg.norm(solution - points, axis=1, keepdims=True)
    off[name] = np.degrees(np.arccos(np.clip(np.sum(arrows * to_solution, axis=1), -1, 1)))
    ax.contour(across, up, surface, np.min(surface) + np.geomspace(0.05, 60, 9), colors="0.75", linewidths=0.8)
    ax.quiver(*points.T, *arrows.T, color=BLUE if name == "exact" else ORANGE, pivot="mid", width=0.006, scale=22)
    ax.plot(*solution, "*", color=BLACK, markersize=11)
    ax.set(title=title, xlabel="intercept", aspect="equal")
axes[0].set_ylabel("slope")
plt.show()

print("angle to the solution (degrees): median, largest")
for name, degrees in off.items():
    print(f"  {name:10s} {np.median(degrees):6.1f} {np.max(degrees):6.1f}")
assert np.max(off["exact"]) < 1e-3 and np.max(off["empirical"]) > 90 and np.median(off["empirical"]) > 45

# %% [markdown]
# At the solution itself the two may still agree: if the model is right, its expectation equals the average over the data in the
# limit of many data. If the model is wrong, they differ. We fit the same model to three sets of data: one drawn from the model,
# one with more noise than the model allows for, and one whose mean is curved. The Hessian of the loss, which equals the exact
# Fisher here, is the same for all three.

# %%
generator = np.random.default_rng(5)
x_many = generator.lognormal(0.0, 0.5, 4000)
noise_many = generator.standard_normal(4000)
cases = {
    "model right": 2.0 + SLOPE * x_many + noise_many,
    "noise of scale 3": 2.0 + SLOPE * x_many + 3.0 * noise_many,
    "mean curved": 2.0 + SLOPE * x_many + 0.8 * (x_many - 1.0) ** 2 + 0.5 * noise_many,
}
design_many = np.column_stack([np.ones_like(x_many), x_many])


@jax.jit
def both_fishers(theta, y):
    return (
        jf.exact_fisher(line)(theta, x_many).as_matrix(),
        jf.empirical_fisher(jf.log_likelihood(line))(theta, x_many, y).as_matrix(),
    )


def ellipse(matrix, radius=0.02):
    """The boundary of d^T matrix d / 2 <= radius."""
    turn = np.linspace(0, 2 * np.pi, 200)
    return np.linalg.cholesky(2 * radius * np.linalg.inv(matrix)) @ np.stack([np.cos(turn), np.sin(turn)])


fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.4), layout="constrained", sharex=True, sharey=True)
distance = {}
for ax, (name, response) in zip(axes, cases.items(), strict=True):
    best = np.linalg.lstsq(design_many, response, rcond=None)[0]
    exact, empirical = map(np.asarray, both_fishers(best, response))
    np.testing.assert_allclose(exact, design_many.T @ design_many / len(x_many), rtol=len(x_many) * EPS)
    distance[name] = np.linalg.norm(empirical - exact) / np.linalg.norm(exact)
    ax.plot(*ellipse(exact), color=BLUE, linewidth=2, label="exact, and Hessian")
    ax.plot(*ellipse(empirical), color=ORANGE, linewidth=2, linestyle="--", label="empirical")
    ax.set(title=name, xlabel="intercept, from the solution", aspect="equal")
    ax.grid(color="0.9")
    print(f"{name:16s} empirical off by {distance[name]:.0%}")
axes[0].set_ylabel("slope, from the solution")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()
assert distance["model right"] < 0.1 and min(distance["noise of scale 3"], distance["mean curved"]) > 0.5

# %% [markdown]
# ## The square of a batch's mean gradient
#
# Even further from the Fisher is the square of the gradient of a batch's mean loss, which training has at hand. With $B$
# independent scores of mean $m$ and covariance $C$, the mean score $\bar s$ of a batch has
#
# $$\mathbb{E}\left[\bar s\, \bar s^\top\right] = \frac1B\, C + m\, m^\top, \qquad \text{while} \qquad
# \hat F = \mathbb{E}\left[s\, s^\top\right] = C + m\, m^\top .$$
#
# The smallest example has two scores, $+1$ and $-1$.

# %%
unit_normal = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
data = jnp.array([1.0, -1.0])
mean_gradient = jax.grad(lambda mu: jnp.mean(jax.vmap(unit_normal, (None, 0))(mu, data)))(0.0)
empirical = jf.empirical_fisher(unit_normal)(0.0, data).as_matrix()[0, 0]
exact = jf.exact_fisher(lambda mu: jf.Normal(mu, 1.0))(0.0).as_matrix()[0, 0]
print(f"squared mean gradient {mean_gradient**2}, empirical Fisher {empirical}, exact Fisher {exact}")
assert mean_gradient == 0 and empirical == exact == 1

# %% [markdown]
# On the irises we compare the traces: $\mathbb{E} \lVert \bar s \rVert^2$ over random batches with that of the empirical
# Fisher.

# %%
sizes = [1, 4, 16, 64, 256]
REPEATS = 2000


@jax.jit
def per_example(params):
    return jf.scores(log_prob)(params, inputs, targets).as_matrix()


curves = {}
print("                 batch    squared mean gradient    by the formula       z    share of the empirical Fisher")
for name, params in (("at the start", start), ("after training", trained)):
    rows = np.asarray(per_example(params))
    mean, trace = rows.mean(axis=0), np.sum(rows**2) / len(rows)
    shares = []
    for size in sizes:
        batches = np.random.default_rng(size).integers(len(rows), size=(REPEATS, size))
        squares = np.sum(rows[batches].mean(axis=1) ** 2, axis=1)
        expected = (trace - mean @ mean) / size + mean @ mean
        z = (squares.mean() - expected) / (squares.std() / np.sqrt(REPEATS))
        shares.append(squares.mean() / trace)
        print(f"{name:15s} {size:6d}    {squares.mean():21.5f}    {expected:14.5f}    {z:+.1f}    {shares[-1]:.4f}")
        assert abs(z) < 5
    curves[name] = (shares, mean @ mean / trace)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for (name, (shares, floor)), colour, marker in zip(curves.items(), (ORANGE, BLUE), "os", strict=True):
    ax.loglog(sizes, shares, marker, color=colour, label=f"squared mean gradient, {name}")
    smooth = np.geomspace(1, 256, 50)
    ax.loglog(smooth, (1 - floor) / smooth + floor, color=colour, linewidth=1)
ax.axhline(1, color=BLACK, linestyle="--", linewidth=1.2, label="empirical Fisher")
ax.set(xlabel="batch size", ylabel="trace, relative to\nthe empirical Fisher's")
ax.grid(color="0.9")
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# The square depends on the size of the batch. Near a minimum it is the empirical Fisher divided by $B$; far from a minimum it
# is mostly the square of the mean, a matrix of rank one. No factor turns it into a Fisher in both cases. Only for batches of
# one is it the empirical Fisher, in expectation. If the importances of parameters are computed this way, as for elastic weight
# consolidation, they change with the batch size; those of `jf.diagonal(jf.empirical_fisher(log_prob)(params, x, y))` do not.
#
# ## The diagonal, and AdaGrad, RMSprop, Adam, AMSGrad, Yogi
#
# Keep only the diagonal of the empirical Fisher, $v_j \approx \mathbb{E}[s_j^2]$, and give every parameter a KL budget $c$ of
# its own:
#
# $$\min_{d_j}\; g_j d_j \quad \text{with} \quad \frac12 v_j d_j^2 \le c \qquad \text{gives} \qquad
# d_j = -\sqrt{2c}\; \frac{\mathrm{sign}(g_j)}{\sqrt{v_j}} .$$
#
# This is the square root of the popular optimisers: it comes from the multipliers, one for each parameter. The optimisers
# replace the sign by the gradient or its running mean $m$ and add a damping,
#
# $$d = -\eta\; (\mathrm{diag}(v) + \epsilon I)^{-1/2}\; m ,$$
#
# which in the library is `jf.scale_by_fisher(damping, power=0.5)` on a diagonal. With batches of one, $v$ combines the
# diagonals $f_t$ of empirical Fishers, which are the squares of the gradients. The members of the family differ in how they
# combine them, and in whether they average the gradient:
#
# | | second moment $v_t$ | gradient |
# |---|---|---|
# | AdaGrad | $v_{t-1} + f_t$ | as it is |
# | RMSprop | $\beta v_{t-1} + (1 - \beta) f_t$, debiased | as it is |
# | Adam | the same | running mean |
# | AMSGrad | the largest of Adam's so far | running mean |
# | Yogi | $v_{t-1} + (1 - \beta)\, \mathrm{sign}(f_t - v_{t-1})\, f_t$, debiased | running mean |
#
# Operators are pytrees, so `jax.tree.map` computes with them as with arrays, and each rule takes one line. We compare each with
# the transformation of the same name in Optax.

# %%
BETA1, BETA2, DAMPING, RATE = 0.9, 0.99, 1e-5, 0.03
mapped = jax.tree.map


def debiased(v, t):
    return mapped(lambda v: v / (1 - BETA2**t), v)


def adagrad(memory, f, t):
    total = mapped(jnp.add, memory, f)
    return total, total


def running_mean(memory, f, t):
    mean = mapped(lambda v, f: BETA2 * v + (1 - BETA2) * f, memory, f)
    return mean, debiased(mean, t)


def amsgrad(memory, f, t):
    mean, debiased_mean = running_mean(memory[0], f, t)
    largest = mapped(jnp.maximum, memory[1], debiased_mean)
    return (mean, largest), largest


def yogi(memory, f, t):
    v = mapped(lambda v, f: v + (1 - BETA2) * jnp.sign(f - v) * f, memory, f)
    return v, debiased(v, t)


class Recipe(NamedTuple):
    second_moment: Callable[[Any, Any, Any], tuple[Any, Any]]
    gradient: optax.GradientTransformation
    theirs: optax.GradientTransformation


as_it_is, averaged = optax.identity(), optax.ema(BETA1)
recipes = {
    "AdaGrad": Recipe(adagrad, as_it_is, optax.scale_by_rss(0.0, eps=DAMPING)),
    "RMSprop": Recipe(running_mean, as_it_is, optax.scale_by_rms(BETA2, eps=DAMPING, bias_correction=True)),
    "Adam": Recipe(running_mean, averaged, optax.scale_by_adam(BETA1, BETA2, eps=0.0, eps_root=DAMPING)),
    "AMSGrad": Recipe(amsgrad, averaged, optax.scale_by_amsgrad(BETA1, BETA2, eps=0.0, eps_root=DAMPING)),
    "Yogi": Recipe(yogi, averaged, optax.scale_by_yogi(BETA1, BETA2, eps=0.0, eps_root=DAMPING, initial_accumulator_value=0.0)),
}

# %% [markdown]
# Each optimiser trains in both versions, each on its own parameters, for a little more than one epoch of single examples.


# %%
def softmax(params, x):
    return jf.Categorical(logits=x @ params["w"] + params["b"])


softmax_log_prob = jf.log_likelihood(softmax)
zeros = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}


def mean_loss(params, x, y):
    return -jnp.mean(jax.vmap(softmax_log_prob, (None, 0, 0))(params, x, y))


def diagonal_fisher(params, x, y):
    return jf.diagonal(jf.empirical_fisher(softmax_log_prob)(params, x, y))


def compared(recipe):
    """(params, order of the examples) -> the losses of ours, and the parameters of both at the end."""
    ours = optax.chain(recipe.gradient, jf.scale_by_fisher(DAMPING, power=0.5), optax.scale_by_learning_rate(RATE))
    theirs = optax.chain(recipe.theirs, optax.scale_by_learning_rate(RATE))

    def step(carry, item):
        (params, memory, state), (their_params, their_state) = carry
        t, x, y = item
        memory, v = recipe.second_moment(memory, diagonal_fisher(params, x, y), t)
        updates, state = ours.update(jax.grad(mean_loss)(params, x, y), state, params, fisher=v)
        params = optax.apply_updates(params, updates)
        updates, their_state = theirs.update(jax.grad(mean_loss)(their_params, x, y), their_state)
        their_params = optax.apply_updates(their_params, updates)
        return ((params, memory, state), (their_params, their_state)), mean_loss(params, inputs, targets)

    def run(params, order):
        memory = mapped(jnp.zeros_like, diagonal_fisher(params, inputs[:1], targets[:1]))
        memory = (memory, memory) if recipe.second_moment is amsgrad else memory
        carry = ((params, memory, ours.init(params)), (params, theirs.init(params)))
        items = (jnp.arange(1.0, len(order) + 1), inputs[order][:, None], targets[order][:, None])
        ((params, *_), (their_params, _)), losses = jax.lax.scan(step, carry, items)
        return losses, params, their_params

    return jax.jit(run)


order = jax.random.randint(jax.random.key(2), (200,), 0, len(inputs))
curves = {}
print("           largest difference of the parameters after 200 steps, and their size")
for name, recipe in recipes.items():
    curves[name], mine, yours = compared(recipe)(zeros, order)
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (mine, yours)), strict=True))
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(yours))
    print(f"{name:9s}  {difference:.1e}  {size:.2f}")
    assert difference < 1e5 * EPS * size

# %%
ax = plot.training(curves, ylabel="training loss (nats)", ax=plt.subplots(figsize=(7.6, 3.6), layout="constrained")[1])
ax.set_title("five optimisers, one family", fontsize="medium")
plt.show()

# %% [markdown]
# RMSprop's and Adam's running mean is built in: `decay=` keeps it, debiased, so each of the two is a single chain.

# %%
ready = {
    "RMSprop": jf.scale_by_fisher(DAMPING, view=jf.diagonal, power=0.5, decay=BETA2),
    "Adam": optax.chain(optax.ema(BETA1), jf.scale_by_fisher(DAMPING, view=jf.diagonal, power=0.5, decay=BETA2)),
}
for name, ours in ready.items():
    theirs = recipes[name].theirs

    def step(states, item, ours=ours, theirs=theirs):
        x, y = item
        gradient = jax.grad(mean_loss)(zeros, x, y)
        fisher = jf.empirical_fisher(softmax_log_prob)(zeros, x, y)
        mine, first = ours.update(gradient, states[0], zeros, fisher=fisher)
        yours, second = theirs.update(gradient, states[1])
        return (first, second), (mine, yours)

    states = (ours.init(zeros), theirs.init(zeros))
    _, (mine, yours) = jax.jit(lambda states, items, step=step: jax.lax.scan(step, states, items))(
        states, (inputs[order][:, None], targets[order][:, None])
    )
    for a, b in zip(*map(jax.tree.leaves, (mine, yours)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1000 * EPS * np.max(np.abs(b)))
    print(f"{name}: every update as Optax makes it")

# %% [markdown]
# So the family differs from a natural gradient in four ways: it uses the targets of the data, only the diagonal, the power one
# half, and, with larger batches, the square of a mean. It is cheap and it trains well. But it does not use the Fisher. If you
# need the Fisher, for a KL radius, a standard error or a posterior, take the exact one or draw targets from the model.
