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
# # Neural networks: what a view of the Fisher costs, and what it buys
#
# At the end you will know how to train a network with the exact natural gradient, with KFAC, EKFAC and the diagonal, how they
# compare with Adam in steps and in seconds, how to read what the library found in your model, and where the time of a step
# goes.
#
# The network is small on purpose. With fewer than 2000 parameters we can form, invert and plot the exact Fisher, and compare
# every approximation with it.

# %%
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

import jaxfisher as jf
from jaxfisher import plot

# On CPU JAX factorises with SciPy's BLAS, whose threads fight XLA's.
threadpool_limits(1, user_api="blas")
plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The digits, and a model of one image
#
# There are 1797 handwritten digits of 8 by 8 pixels, of which 360 are for testing. The model maps the parameters and **one**
# image to a distribution over its label. That is all the library needs: there are no layers to register.

# %%
TRAIN, BATCH, WIDTHS = 1437, 256, (64, 20, 10)

pixels, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(digits))
x = jnp.asarray(pixels[order] / 16, jnp.float32)
y = jnp.asarray(digits[order], jnp.int32)
x_train, y_train, x_test, y_test = x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def model(params, image):
    *hidden, last = params
    for layer in hidden:
        image = jnp.tanh(image @ layer["w"] + layer["b"])
    return jf.Categorical(logits=image @ last["w"] + last["b"])


def initial(widths):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((i, o), np.float32) * i**-0.5 for i, o in itertools.pairwise(widths)]
    return [{"b": jnp.zeros(w.shape[1]), "w": jnp.asarray(w)} for w in weights]


log_prob = jf.log_likelihood(model)


def loss(params, images, labels):
    """Mean negative log-likelihood, in nats."""
    return -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, images, labels))


start = initial(WIDTHS)
batch = x_train[:BATCH], y_train[:BATCH]
print("parameters:", sum(leaf.size for leaf in jax.tree.leaves(start)))
exact_fisher = jax.jit(jf.exact_fisher(model))
print(exact_fisher(start, batch[0]))

# %% [markdown]
# ## What `explain` says
#
# `explain` reads the model without running it. It shows how the rows of the **model**'s exact Fisher are stored:
# here ten rows per image, one for each class.

# %%
explanation = jf.explain(model)(start, batch[0])
print(explanation)
assert not explanation.plain and explanation.rows == 10

# %% [markdown]
# The gradient of a weight is, for one image, an outer product of what went into the layer and the cotangent of what came out.
# It is stored as these two vectors. No gradient had to be formed (its form would be `plain`), every weight has a Kronecker
# block, and every bias was found to belong to its weight, so a layer is one block. The last two lines compare the memory of the
# factors with that of per-example gradients.
#
# The gap widens with the size of the network. `explain` only reads the next one and does not run it:

# %%
wide = initial((64, 256, 256, 10))
of_model, of_data = jf.explain(model)(wide, batch[0]), jf.explain(log_prob)(wide, *batch)
for name, found in (("exact Fisher", of_model), ("scores at the data", of_data)):
    megabytes = found.bytes / 1e6, found.plain_bytes / 1e6
    print(
        f"{name:18}  {found.examples} x {found.rows:2} rows  {megabytes[0]:6.1f} MB held, {megabytes[1]:7.1f} MB as gradients"
    )
    assert found.bytes * 20 < found.plain_bytes

# %% [markdown]
# ## What a view keeps
#
# A view keeps a part of the Fisher. Let $F$ be the exact Fisher over one batch, and $A$ and $G$ the second moments of a
# layer's inputs and output cotangents:
#
# - `dense` keeps everything;
# - `kronecker` (KFAC) keeps one block per layer, as a product $A \otimes G$;
# - `eigen_kronecker` (EKFAC) keeps KFAC's eigenvectors and puts the exact curvature along each of them;
# - `diagonal` keeps the diagonal.
#
# `plot.blocks` shows the size of every entry. On the left is $F$, on the right KFAC's version of it: the entries between layers
# are gone, and those within a layer look much as before.

# %%
VIEWS = {"exact": jf.dense, "KFAC": jf.kronecker, "EKFAC": jf.eigen_kronecker, "diagonal": jf.diagonal}


@jax.jit
def as_dense(fisher):
    blocks = {"layer by layer": jf.dense(jf.block_diagonal(fisher, jf.layers(fisher)))}
    return blocks | {name: jf.dense(view(fisher)) for name, view in VIEWS.items() if name != "diagonal"}


formed = as_dense(exact_fisher(start, batch[0]))
figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
for ax, name in zip(axes, ("exact", "KFAC"), strict=True):
    plot.blocks(formed[name], ax=ax).set_title(name)

# %%
matrices = {name: np.asarray(view.as_matrix()) for name, view in formed.items()}
matrices["diagonal"] = np.diag(np.diag(matrices["exact"]))
lost = {name: np.linalg.norm(one - matrices["exact"]) / np.linalg.norm(matrices["exact"]) for name, one in matrices.items()}
print("relative distance to the exact Fisher")
for name in ("layer by layer", "EKFAC", "KFAC", "diagonal"):
    print(f"{name:15} {lost[name]:.4f}")

assert lost["layer by layer"] < lost["EKFAC"] < lost["KFAC"] < lost["diagonal"]
assert lost["KFAC"] < 1.1 * lost["layer by layer"]

# %% [markdown]
# In this norm EKFAC is closer than KFAC for any data: among all matrices with KFAC's eigenvectors it is the nearest.
# Here both are about as close as an exact block for each layer would be. They miss the part of $F$ between layers,
# which is large, and which no view by layers has. The diagonal misses nearly everything.
#
# ## One setting, four views
#
# To compare views, we keep everything else the same. All take the natural-gradient step
#
# $$ \theta \leftarrow \theta - \alpha \, (F + \lambda I)^{-1} \nabla L, $$
#
# with the same damping $\lambda$ and rate $\alpha$, and none may move the predictions by more than a `radius` in KL
# divergence. If the view allows it, we use its running mean over batches (`decay`). EKFAC's eigenvectors change from batch to
# batch, so EKFAC uses the current batch alone.
#
# `jf.training_step` makes the step of a model and any optimiser, ours or Optax's.

# %%
DAMPING = 3e-3


def like():
    """An operator such as the steps will have; it is never run."""
    return jf.exact_fisher(model)(start, batch[0])


def natural(name):
    decay = None if name == "EKFAC" else 0.9
    return jf.natural_gradient(0.5, DAMPING, view=VIEWS[name], decay=decay, radius=0.1, like=like)


def shuffled(steps):
    """Indices of the images of each batch: one permutation after another, cut into batches."""
    rng = np.random.default_rng(0)
    epochs = -(-steps * BATCH // TRAIN)
    indices = np.concatenate([rng.permutation(TRAIN) for _ in range(epochs)])
    return jnp.asarray(indices[: steps * BATCH].reshape(steps, BATCH))


def compiled(optimiser, steps):
    """``(carry, batches) -> (carry, parameters after each step)``."""
    step = jf.training_step(model, optimiser)

    def one(carry, indices):
        params, state, _ = step(*carry, x_train[indices], y_train[indices])
        return (params, state), params

    carry = start, optimiser.init(start)
    return jax.jit(lambda carry, batches: jax.lax.scan(one, carry, batches)).lower(carry, shuffled(steps)).compile()


# %% [markdown]
# Adam has one number to tune, so we try three rates, and give it five times as many steps. All optimisers start at the same
# parameters and see the same batches. The programs are compiled first, two at a time.

# %%
ROUNDS = 6
optimisers = {name: (natural(name), 5) for name in VIEWS} | {
    f"Adam, {rate:g}": (optax.adam(rate), 25) for rate in (0.01, 0.03, 0.1)
}

with ThreadPoolExecutor(2) as pool:
    programs = dict(zip(optimisers, pool.map(lambda pair: compiled(*pair), optimisers.values()), strict=True))

# %% [markdown]
# Now they train in turn, a few steps of each in every round, so that a slow spell of the machine affects all of them. The time
# of a step is that of the fastest round. After every step we evaluate the loss on *all* training images, outside the timing.

# %%
evaluate = jax.jit(jax.vmap(loss, (0, None, None)))
carries = {name: (start, optimiser.init(start)) for name, (optimiser, _) in optimisers.items()}
losses, seconds = {name: [] for name in optimisers}, {name: [] for name in optimisers}
for k in range(ROUNDS):
    for name, (_, steps) in optimisers.items():
        batches = shuffled(ROUNDS * steps)[k * steps : (k + 1) * steps]
        began = time.perf_counter()
        carries[name], path = jax.block_until_ready(programs[name](carries[name], batches))
        seconds[name].append((time.perf_counter() - began) / steps)
        losses[name].extend(np.asarray(evaluate(path, x_train, y_train)).tolist())

step_seconds = {name: min(found) for name, found in seconds.items()}

# %% [markdown]
# ## Curves against steps and against seconds

# %%
TARGET = 0.05


def first_below(values):
    """The first step after which the loss is at most the target; None if there is none."""
    return next((k + 1 for k, value in enumerate(values) if value <= TARGET), None)


@jax.jit
def accuracy(params):
    logits = jax.vmap(lambda image: model(params, image).logits)(x_test)
    return jnp.mean(jnp.argmax(logits, -1) == y_test)


print(
    f"{'':16} {'step to ' + format(TARGET, 'g'):>12} {'ms a step':>10} {'ms to it':>9} {'last loss':>10} {'test accuracy':>14}"
)
for name, values in losses.items():
    reached, cost = first_below(values), 1e3 * step_seconds[name]
    when = ("-", "-") if reached is None else (str(reached), f"{reached * cost:.0f}")
    print(f"{name:16} {when[0]:>12} {cost:10.2f} {when[1]:>9} {values[-1]:10.4f} {accuracy(carries[name][0]):14.3f}")

best_adam = min((name for name in optimisers if "Adam" in name), key=lambda name: losses[name][-1])
shown = ["exact", "EKFAC", "KFAC", "diagonal", best_adam]

# %%
figure, (by_steps, by_seconds) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
steps = {name: 1.0 + np.arange(len(losses[name])) for name in shown}
plot.training({name: (steps[name], losses[name]) for name in shown}, ylabel="loss on all training images (nats)", ax=by_steps)
against_time = {name: (steps[name] * step_seconds[name], losses[name]) for name in shown}
plot.training(against_time, xlabel="seconds of stepping", ylabel="", ax=by_seconds)
figure.legend(*by_steps.get_legend_handles_labels(), loc="outside upper center", ncols=5, handlelength=4)
for ax in (by_steps, by_seconds):
    ax.set_xscale("log")
    ax.axhline(TARGET, color="0.5", linewidth=0.8)
    ax.get_legend().remove()

natural_steps = len(losses["exact"])
level = {name: np.median(losses[name][natural_steps - 10 : natural_steps]) for name in shown}
assert level["exact"] < min(level["KFAC"], level["EKFAC"]) and max(level["KFAC"], level["EKFAC"]) < 0.5 * level[best_adam]
assert all(2 * first_below(losses[name]) < first_below(losses[best_adam]) for name in ("exact", "KFAC", "EKFAC"))

# %% [markdown]
# Against **steps** (left), keeping more of the Fisher pays: the exact natural gradient goes furthest in the same number of
# steps, KFAC and EKFAC follow, and Adam, at the best of its rates, takes more than twice as many. The diagonal does not pay at
# this setting: the loss is hard because parameters are coupled, and a diagonal has no couplings.
#
# Against **seconds** (right) the picture is different. A step with the exact Fisher factorises a matrix as wide as the network
# has parameters. The Kronecker views are far cheaper, and Adam is cheaper still: its step costs one gradient. On a
# network this small, its many cheap steps are hard to beat.

# %%
adam = step_seconds[best_adam]
for name in ("exact", "EKFAC", "KFAC", "diagonal"):
    print(f"a step of {name:9} takes {step_seconds[name] / adam:6.1f} of Adam's")

# %% [markdown]
# ## Where the time goes
#
# We compile each part of a step by itself and time the parts in turn, taking the best of a few repeats. The parts are the
# gradient of the batch, the factors of the exact Fisher (ten rows per image), the view made from the factors, the solve with
# the view, and the quadratic form $d^\top F d$ that keeps the step inside the KL radius. The whole step shares work between
# parts, so it may take less than their sum.


# %%
@jax.jit
def gradient(params):
    return jax.grad(loss)(params, *batch)


def solved(view, direction):
    return view.solve(direction, damping=DAMPING)


def divergence(fisher, direction):
    return fisher.quadratic(direction)


def parts(name):
    """The parts of a step with one view, compiled, with what each is given."""
    view, solve = jax.jit(VIEWS[name]), jax.jit(solved)
    held = view(fisher)
    solve(held, grads)  # compiles it
    return {"view": (view, fisher), "solve": (solve, held, grads)}


fisher, grads = exact_fisher(start, batch[0]), gradient(start)
length = jax.jit(divergence)
length(fisher, grads)  # compiles it
common = {"gradient": (gradient, start), "factors": (exact_fisher, start, batch[0]), "KL radius": (length, fisher, grads)}
with ThreadPoolExecutor(2) as pool:
    own = dict(zip(VIEWS, pool.map(parts, VIEWS), strict=True))

calls = {("all", part): call for part, call in common.items()}
calls |= {(name, part): call for name in VIEWS for part, call in own[name].items()}
spent = {key: [] for key in calls}
for k in range(12):
    for key, (function, *given) in calls.items():
        if key[0] == "exact" and k % 4:
            continue  # slow, and large next to the clock's noise
        began = time.perf_counter()
        jax.block_until_ready(function(*given))
        spent[key].append(1e3 * (time.perf_counter() - began))

PARTS = ("gradient", "factors", "view", "solve", "KL radius")
best = {(name, part): min(spent["all" if part in common else name, part]) for name in VIEWS for part in PARTS}
print(" " * 9 + "".join(f"{part:>11}" for part in PARTS) + f"{'whole step':>13}   (ms)")
for name in VIEWS:
    print(f"{name:9}" + "".join(f"{best[name, part]:11.2f}" for part in PARTS) + f"{1e3 * step_seconds[name]:13.2f}")

# %%
figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
looks = (("0.15", ""), ("#0072B2", "//"), ("#56B4E9", ""), ("#E69F00", "xx"), ("0.85", ".."))
left = np.zeros(len(VIEWS))
for part, (colour, hatch) in zip(PARTS, looks, strict=True):
    shares = [100 * best[name, part] / sum(best[name, other] for other in PARTS) for name in VIEWS]
    ax.barh(list(VIEWS), shares, left=left, color=colour, hatch=hatch, edgecolor="white", label=part)
    left += shares
ax.set(xlabel="share of the parts' time (%)", xlim=(0, 100))
ax.invert_yaxis()
figure.legend(loc="outside upper center", ncols=5)
assert np.allclose(left, 100)

# %% [markdown]
# The exact natural gradient spends its time on forming the matrix and above all on factorising it. The Kronecker views spend
# theirs on eigenvectors of small factors: KFAC in the solve, EKFAC already in the view, which is computed in that basis. There
# are two remedies: `update_every=` recomputes the view only at some steps, and `jf.sampled_fisher(model, 1)` has one row per
# image, drawn from the model, instead of ten, at the price of noise.
#
# ## The short way
#
# A training loop of your own needs three lines: the step, its state, and the call. `jf.kfac` is KFAC that chooses its
# learning rate, momentum and damping itself. `training_step` passes the loss, the gradient and the Fisher to the optimiser,
# which uses what it needs.
#
# ```text
# step = jf.training_step(model, jf.kfac())
# state = step.init(params, x, y)
# params, state, value = jax.jit(step)(params, state, x, y)
# ```
