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
# # Structure: how the engine works
#
# At the end you will know why this library needs neither layers of its own nor a list of your losses: how it reads the
# gradient's program, where it cuts it, what it computes from the pieces, and what that saves in memory and time.
#
# A Fisher is a sum over the rows of a matrix of scores, $F = S^\top S / n$, one row for each example. That matrix has $n$
# rows and as many columns as there are parameters, and the aim is not to form it.

# %%
import itertools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

import jaxfisher as jf
from jaxfisher import plot

plt.rcParams["figure.dpi"] = 80
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


# %% [markdown]
# ## The gradient is a program
#
# JAX can show the program of a gradient, its *jaxpr*. Here is a network with one hidden layer, a Gaussian log-density, and
# the program of its gradient for **one** example:


# %%
def log_prob(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return -0.5 * jnp.sum((y - hidden @ params["w2"]) ** 2)


params = {"b1": normal(3), "w1": normal(4, 3), "w2": normal(3, 2)}
x, y = normal(6, 4), normal(6, 2)

program = jax.make_jaxpr(jax.grad(log_prob))(params, x[0], y[0])
print(program.pretty_print(use_color=False))

# %% [markdown]
# The last line names the results: the gradients of `b1`, `w1` and `w2`. Follow those of the two weights backwards. Each is
# the transpose of a `dot_general` that contracts nothing (its `dimension_numbers` are empty), and that is an outer product:
#
# $$ \nabla_{w_1} \log p = a \, g^\top, \qquad \nabla_{w_2} \log p = h \, r^\top, $$
#
# with $a$ the input of a layer and $g$ the cotangent of its output; $h$ and $r$ are those of the second layer. The two vectors
# contain everything that the matrix does. The gradient of the bias is one of them.
#
# ## Cut one operation short
#
# A jaxpr is data. The program that stops *before* the outer products is the same program with other results: the operands in
# place of the products. Here is that idea in a dozen lines. The compiler drops the operations that are no longer needed (the
# transposes and the products).


# %%
def operands(jaxpr, result):
    """What a gradient is an outer product of; the gradient itself if it is none."""
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    equation = made_by[result]
    while equation.primitive.name == "transpose":
        equation = made_by[equation.invars[0]]
    contracted, batched = equation.params.get("dimension_numbers", (None, None))
    is_outer_product = equation.primitive.name == "dot_general" and not any((*contracted, *batched))
    return equation.invars if is_outer_product else [result]


def cut(closed):
    """The program with the operands of its outer products as results."""
    jaxpr = closed.jaxpr
    results = [operand for result in jaxpr.outvars for operand in operands(jaxpr, result)]
    return jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(outvars=results), closed.consts))


def factors_of_one(params, x, y):
    return cut(jax.make_jaxpr(jax.grad(log_prob))(params, x, y))(*jax.tree.leaves((params, x, y)))


# %% [markdown]
# The shortened program is mapped over the examples with `vmap`. It runs forward and backward for each example, and never forms
# the gradient of a weight. Multiplied out, the factors give what `vmap` of `jax.grad` gives:

# %%
bias, g, a, r, h = jax.jit(jax.vmap(factors_of_one, (None, 0, 0)))(params, x, y)
gradients = jax.jit(jax.vmap(jax.grad(log_prob), (None, 0, 0)))(params, x, y)
for name, left, right in (("w1", a, g), ("w2", h, r)):
    product = left[:, :, None] * right[:, None, :]
    print(f"{name}: {left.shape} and {right.shape} hold what {gradients[name].shape} says")
    assert jnp.allclose(product, gradients[name], rtol=1e-5, atol=1e-6)
assert jnp.allclose(bias, gradients["b1"], rtol=1e-5, atol=1e-6) and jnp.array_equal(bias, g)

# %% [markdown]
# The library's engine does the same for general models. It sees through `jit`, `checkpoint`, custom derivatives and `scan`;
# through reshapes, casts, sums of several uses, padding, convolutions and lookups in tables. It computes only once what all
# rows of an example share. If no rule applies, it forms the gradient as usual, and says so.
#
# `jf.scores` returns the map $S$ in this form. It is a pytree, so you can look at the arrays inside:

# %%
scores = jf.scores(log_prob)(params, x, y)
print("held:", [leaf.shape for leaf in jax.tree.leaves(scores)])
print(jf.explain(log_prob)(params, x, y))

# %% [markdown]
# The axes of length one are for rows, groups and positions, of which this model has one. The last array is the weights of the
# examples.
#
# ## The Gram matrix without scores
#
# Factors give first of all the inner products of all pairs of scores, $K = S S^\top$. The inner product
# of two outer products is a product of two numbers, so with the factors of all examples in the rows of $A$ and $G$, each
# layer adds one term:
#
# $$ K_{ij} = \sum_{\mathrm{layers}} (a_i^\top a_j) \, (g_i^\top g_j). $$
#
# All pairs together take two small matrix products and one entrywise product per layer, instead of one product of matrices as
# wide as the number of parameters.

# %%
by_hand = (a @ a.T + 1) * (g @ g.T) + (h @ h.T) * (r @ r.T)
flat = jnp.concatenate([leaf.reshape(6, -1) for leaf in jax.tree.leaves(gradients)], axis=1)
print("Gram matrix by hand against plain scores:  ", f"{jnp.max(jnp.abs(by_hand - flat @ flat.T)):.0e}")
print("Gram matrix of jf.scores against plain:    ", f"{jnp.max(jnp.abs(scores.gram() - flat @ flat.T)):.0e}")
size = jnp.max(jnp.abs(by_hand))
assert jnp.allclose(by_hand, flat @ flat.T, rtol=0, atol=1e-6 * size)
assert jnp.allclose(scores.gram(), flat @ flat.T, rtol=0, atol=1e-6 * size)

# %% [markdown]
# The $+1$ is the bias: it is the weight of an input that is always one, and costs nothing extra.
#
# A damped natural gradient needs nothing else. It is $(F + \lambda I)^{-1}$ times the gradient, the gradient is a combination
# of scores, and so is the result. With $e$ the vector of ones,
#
# $$ \left( \frac{1}{n} S^\top S + \lambda I \right)^{-1} \frac{1}{n} S^\top e = S^\top (S S^\top + n \lambda I)^{-1} e. $$
#
# The matrix on the left is as wide as the number of parameters, the one on the right as wide as the batch.

# %%
n, damping = 6, 0.1


@jax.jit
def three_ways(params, x, y):
    scores, mean = jf.scores(log_prob)(params, x, y), jnp.mean(flat, 0)
    by_parameters = jnp.linalg.solve(flat.T @ flat / n + damping * jnp.eye(flat.shape[1]), mean)
    by_examples = scores.rmv(jnp.linalg.solve(scores.gram() + n * damping * jnp.eye(n), jnp.ones(n)))
    return by_parameters, by_examples, jf.natural_grad(log_prob, damping=damping)(params, x, y)


by_parameters, by_examples, library = three_ways(params, x, y)
directions = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (by_examples, library)]
# The library gives the natural gradient of the loss, which is minus the mean log-density.
for direction in (directions[0], -directions[1]):
    assert jnp.allclose(direction, by_parameters, rtol=0, atol=1e-5 * jnp.max(jnp.abs(by_parameters)))
print(f"a {flat.shape[1]} x {flat.shape[1]} and a {n} x {n} system give one direction, which is that of jf.natural_grad")

# %% [markdown]
# ## Weights that are shared, and leaves of other kinds
#
# A weight that is used at $T$ positions of one example, as in a sequence or an image, has the gradient $\sum_t a_t g_t^\top$.
# Inner products of factors then cost $T^2 (I + O)$ for a pair of examples, with $I$ inputs and $O$ outputs; inner products of
# the gradients themselves cost $I O$. With many positions the factors cost more, and the engine forms those gradients, a tile
# at a time. `explain` shows the choice and both costs. Here is one model with many kinds of leaves, wrapped in `jit` and
# `checkpoint`:


# %%
@jax.jit
@jax.checkpoint
def mixed(params, image, tokens, y):
    convolved = jax.lax.conv(image[None], params["kernel"], (1, 1), "SAME")[0]
    words = jnp.tanh(params["table"][tokens] * params["scale"] @ params["shared"])
    unit = params["normed"] / jnp.linalg.norm(params["normed"], axis=0, keepdims=True)
    hidden = jnp.concatenate([jnp.mean(words, 0), jnp.mean(jnp.tanh(convolved), (1, 2))])
    return jnp.sum(y * jnp.tanh(hidden @ unit))


sizes = {"table": (500, 64), "scale": (64,), "shared": (64, 64), "kernel": (8, 3, 3, 3), "normed": (72, 10)}
leaves = {name: normal(*shape) for name, shape in sizes.items()}
data = normal(128, 3, 16, 16), jnp.asarray(rng.integers(0, 500, (128, 5))), normal(128, 10)
found = jf.explain(mixed)(leaves, *data)
print(found)
assert found.plain == ("['normed']",)

# %% [markdown]
# - `shared` is applied to five words, so it keeps factors. The `kernel` is applied at all positions of an image: its gradients
#   are formed, a few at a time, which is cheaper.
# - `table` is a table of rows: its gradient is nearly all zeros, and it is stored as positions and rows.
# - `scale` has a gradient that is no larger than its ingredients, so the gradient itself is stored.
# - `normed` is divided by the lengths of its own columns. No rule takes an outer product through that, so its gradient is
#   formed, and the table says why.
#
# If a rule is missing, the result is still right and only takes more memory. Put `assert not explanation.plain` into a test of
# your own to keep a model in the fast form.
#
# With more words the choice for `shared` is reversed:

# %%
for positions in (1, 4, 5, 6, 8, 16, 64):
    more = data[0], jnp.zeros((128, positions), jnp.int32), data[2]
    shared = next(leaf for leaf in jf.explain(mixed)(leaves, *more).leaves if leaf.path == "['shared']")
    print(f"T = {positions:2}: {shared.why}")
    assert ("inner products of factors" in shared.why) == (positions**2 * (64 + 64) <= 64 * 64)

# %% [markdown]
# ## Memory and time against the plain route
#
# Now we compute the Gram matrix of a network with two hidden layers by two routes: the plain one (`vmap` of `jax.grad`,
# flattened, and one product) and ours. First $n$ grows, with the network fixed; then the network grows, with $n$ fixed. The
# gradient of the mean log-density, which any training needs, is measured too, as a unit. Memory is what the compiled program
# allocates besides its arguments and results. Times are the best of a few repeats, taken in turn.


# %%
def network(params, x, y):
    *hidden, last = params
    for w, b in hidden:
        x = jnp.tanh(x @ w + b)
    return jax.nn.log_softmax(x @ last[0] + last[1])[y]


def mean_gradient(params, x, y):
    return jax.grad(lambda p: jnp.mean(jax.vmap(network, (None, 0, 0))(p, x, y)))(params)


def plain_gram(params, x, y):
    gradients = jax.vmap(jax.grad(network), (None, 0, 0))(params, x, y)
    flat = jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(gradients)], axis=1)
    return flat @ flat.T


def our_gram(params, x, y):
    return jf.scores(network)(params, x, y).gram()


def problem(n, width):
    widths = itertools.pairwise((64, width, width, 10))
    params = [(normal(i, o) * i**-0.5, jnp.zeros(o)) for i, o in widths]
    return params, normal(n, 64), jnp.asarray(rng.integers(0, 10, n))


ROUTES = {"gradient": mean_gradient, "plain Gram": plain_gram, "Gram from factors": our_gram}
EXAMPLES, WIDTHS = (32, 64, 128, 256), (64, 128, 256, 512)
points = sorted({(n, 256) for n in EXAMPLES} | {(64, width) for width in WIDTHS})
problems = {point: problem(*point) for point in points}
programs = {
    (point, route): jax.jit(function).lower(*problems[point]).compile()
    for point in points
    for route, function in ROUTES.items()
}

# %%
seconds = {key: [] for key in programs}
for k in range(12):
    for (point, route), program in programs.items():
        if route == "plain Gram" and k % 4:
            continue  # slow, and large next to the clock's noise
        began = time.perf_counter()
        jax.block_until_ready(program(*problems[point]))
        seconds[point, route].append(time.perf_counter() - began)

milliseconds = {key: 1e3 * min(values) for key, values in seconds.items()}
megabytes = {key: program.memory_analysis().temp_size_in_bytes / 1e6 for key, program in programs.items()}
parameters = {point: sum(leaf.size for leaf in jax.tree.leaves(problems[point][0])) for point in points}

short = dict(zip(ROUTES, ("gradient", "plain", "factors"), strict=True))
print(" " * 16 + f"{'temporary memory (MB)':^30}   {'time (ms)':^30}")
print(f"{'n':>5} {'p':>9} " + ("".join(f"{short[route]:>10}" for route in ROUTES) + "   ") * 2)
for point in points:
    numbers = ["".join(f"{values[point, route]:10.2f}" for route in ROUTES) for values in (megabytes, milliseconds)]
    print(f"{point[0]:5} {parameters[point]:9,} " + "   ".join(numbers))

# %%
SWEEPS = {
    f"examples n, with p = {parameters[64, 256]:,}": {(n, 256): n for n in EXAMPLES},
    "parameters p, with n = 64": {(64, width): parameters[64, width] for width in WIDTHS},
}
figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
for row, (what, values) in zip(axes, {"temporary memory (MB)": megabytes, "time (ms)": milliseconds}.items(), strict=True):
    for ax, (xlabel, sweep) in zip(row, SWEEPS.items(), strict=True):
        curves = {route: (list(sweep.values()), [values[point, route] for point in sweep]) for route in ROUTES}
        plot.training(curves, xlabel=xlabel, ylabel=what, ax=ax).set_xscale("log")
        ax.set_xticks(list(sweep.values()), [f"{value:,}" for value in sweep.values()])
        ax.minorticks_off()
        ax.get_legend().remove()
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, handlelength=4)
for ax in axes.flat:
    ax.label_outer()

for point, p in parameters.items():
    assert megabytes[point, "plain Gram"] >= 4e-6 * point[0] * p, "the plain route holds n x p numbers"
    assert megabytes[point, "Gram from factors"] < 0.25 * megabytes[point, "plain Gram"]
small, large = (64, WIDTHS[0]), (64, WIDTHS[-1])
growth = {route: megabytes[large, route] / megabytes[small, route] for route in ROUTES}
assert growth["Gram from factors"] < 0.5 * growth["plain Gram"]

# %% [markdown]
# The plain route stores $n$ times $p$ numbers, and grows with both. The factors take $n$ times the *widths* of the layers, and
# a width is about the square root of the number of weights of its layer: the wider the network, the larger the gap. The plain
# route also takes time to write and read all those numbers, and for a matrix product as wide as the number of parameters. The
# factors cost about one gradient plus the inner products of all pairs, which grow with the square of the batch.

# %%
largest = (64, WIDTHS[-1])
for what, values in (("memory", megabytes), ("time", milliseconds)):
    plain, ours, unit = (values[largest, route] for route in ("plain Gram", "Gram from factors", "gradient"))
    print(f"{what:6} at p = {parameters[largest]:,}: plain / ours {plain / ours:5.0f}   ours / gradient {ours / unit:4.1f}")

# %% [markdown]
# ## A whole step
#
# A natural-gradient step takes, besides the Gram matrix, a Cholesky factor as wide as the batch and one more pass through the
# factors:

# %%
steps = {
    "gradient": jax.jit(mean_gradient).lower(*problems[largest]).compile(),
    "natural gradient": jax.jit(jf.natural_grad(network, damping=1e-2)).lower(*problems[largest]).compile(),
}
taken = {name: [] for name in steps}
for _ in range(5):
    for name, step in steps.items():
        began = time.perf_counter()
        jax.block_until_ready(step(*problems[largest]))
        taken[name].append(1e3 * (time.perf_counter() - began))
for name, step in steps.items():
    used = step.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name:17} {min(taken[name]):6.2f} ms {used:6.2f} MB of temporary memory")
assert steps["natural gradient"].memory_analysis().temp_size_in_bytes < 4 * largest[0] * parameters[largest] / 10

# %% [markdown]
# How far does this scale? `explain` does not run the model, so you can ask it about networks that are too large to run here:

# %%
huge = [(jnp.zeros((i, o)), jnp.zeros(o)) for i, o in itertools.pairwise((64, 3072, 3072, 3072, 10))]
held = jf.explain(network)(huge, jnp.zeros((512, 64)), jnp.zeros(512, jnp.int32))
count = sum(leaf.size for leaf in jax.tree.leaves(huge))
print(f"p = {count:,}, n = {held.examples}: {held.bytes / 1e6:.0f} MB of factors, {held.plain_bytes / 1e9:.0f} GB of gradients")
assert held.bytes * 100 < held.plain_bytes

# %% [markdown]
# ## When even the factors are too many
#
# Then the factors are recomputed, a few examples at a time, whenever they are needed. `batch_size=` says how many, or
# `max_bytes=` lets the library choose. The result is the same matrix; the price is that the model runs again.

# %%
largest_batch = problems[256, 256]
found = {}
for batch_size in (16, 64, None):

    def diagonal(params, x, y, batch_size=batch_size):
        return jf.scores(network, batch_size=batch_size)(params, x, y).diagonal()

    program = jax.jit(diagonal).lower(*largest_batch).compile()
    found[batch_size] = program(*largest_batch), program.memory_analysis().temp_size_in_bytes / 1e6
    print(f"batch_size {batch_size!s:>4}: {found[batch_size][1]:5.2f} MB for the diagonal of the Fisher")

assert found[16][1] < found[64][1] < found[None][1]
for pieces in (16, 64):
    same = jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-9), found[pieces][0], found[None][0])
    assert all(jax.tree.leaves(same))

# %% [markdown]
# ## What to take away
#
# - The gradient's own program tells which gradients are products. Cutting it short needs no list of layers and no change to a
#   model.
# - Inner products, diagonals, products with vectors and solves come from the factors, which take $n$ times the widths of the
#   layers instead of $n p$ numbers.
# - Where factors do not pay (many positions) or do not exist (no rule), gradients are formed. `jf.explain` always shows the
#   latter case.
# - A gradient is still cheaper than a natural gradient. The Gram matrix grows with the square of the batch, and the cost of its
#   Cholesky factor with the cube.
