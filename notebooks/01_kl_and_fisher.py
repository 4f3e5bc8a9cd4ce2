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
# # KL divergence and the Fisher information
#
# At the end you will know why the distance between two parameter vectors says little about the distance between two
# models, how the KL divergence measures the latter, and why a single matrix, the Fisher information, describes the
# divergence between neighbours.
#
# The notebook checks everything to the last digits, so it runs in double precision. The library itself works in whatever
# precision its inputs have.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.integrate
import scipy.stats
from sklearn.datasets import load_iris

import jaxfisher as jf
from jaxfisher import plot

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 80
EPS = float(np.finfo(float).eps)

# %% [markdown]
# ## Equal distance, unequal difference
#
# Take two normal distributions whose means are one apart and whose scale is the same. Do this twice: with a small scale,
# and with a large one. As points $(\mu, \sigma)$ of the plane, both pairs are equally far apart.

# %%
pairs = {
    "small scale": (jf.Normal(0.0, 0.4), jf.Normal(1.0, 0.4)),
    "large scale": (jf.Normal(0.0, 3.0), jf.Normal(1.0, 3.0)),
}


def by_integration(p, q):
    """KL(p || q) by numerical integration of SciPy's densities."""
    p, q = scipy.stats.norm(p.loc, p.scale), scipy.stats.norm(q.loc, q.scale)
    low, high = p.mean() - 12 * p.std(), p.mean() + 12 * p.std()
    return scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high, epsabs=1e-12)[0]


print("pair           distance of (mu, sigma)    KL (nats)")
for name, (p, q) in pairs.items():
    distance = jnp.hypot(p.loc - q.loc, p.scale - q.scale)
    divergence = jf.kl_divergence(p, q)
    print(f"{name}    {distance:23.3f}    {divergence:9.4f}")
    np.testing.assert_allclose(divergence, by_integration(p, q), rtol=1e-9)

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained", sharex=True)
x = np.linspace(-7.0, 8.0, 400)
for ax, (name, (p, q)) in zip(axes, pairs.items(), strict=True):
    ax.plot(x, jnp.exp(p.log_prob(x)), color="#0072B2", linewidth=2, label="p: mean 0")
    ax.plot(x, jnp.exp(q.log_prob(x)), color="#D55E00", linewidth=2, linestyle="--", label="q: mean 1")
    ax.set(title=f"{name}: KL = {jf.kl_divergence(p, q):.2g} nats", xlabel="x", ylabel="density", ylim=(0, None))
axes[0].legend()
plt.show()

# %% [markdown]
# A single observation usually tells the first pair apart, while the second pair is nearly the same distribution. The
# Euclidean distance does not see this. The divergence
#
# $$\mathrm{KL}(p \,\|\, q) = \mathbb{E}_{x \sim p}\left[\log p(x) - \log q(x)\right]$$
#
# does, because it depends on the distributions and not on their coordinates. It is measured in nats: the evidence, on average,
# that one observation from $p$ gives against $q$.

# %% [markdown]
# ## What kind of a distance it is
#
# The divergence is zero for equal distributions and positive for others. It is additive over independent parts. It does not
# change when the parameters are written in another way, or the data in another unit. Yet it is not a distance: it is not
# symmetric, and a detour can be shorter than the direct way.

# %%
p, q = jf.Normal(0.0, 1.0), jf.Normal(1.0, 2.0)
print(f"to itself          {jf.kl_divergence(p, p):.4f}")
print(f"forwards           {jf.kl_divergence(p, q):.4f}")
print(f"backwards          {jf.kl_divergence(q, p):.4f}")
assert jf.kl_divergence(p, p) == 0
assert abs(jf.kl_divergence(p, q) - jf.kl_divergence(q, p)) > 0.1

# Positive: every pair of 200 random distributions.
keys = jax.random.split(jax.random.key(0), 2)
some = jf.Normal(jax.random.normal(keys[0], (200,)), jnp.exp(jax.random.normal(keys[1], (200,))))
each = jax.vmap(lambda p: jax.vmap(lambda q: jf.kl_divergence(p, q))(some))(some)
print(f"smallest of {each.size - len(each):,} pairs of different distributions: {np.min(each[~np.eye(200, dtype=bool)]):.1e}")
assert np.all(each[~np.eye(200, dtype=bool)] > 0) and np.all(np.diag(each) == 0)

# Additive: the joint distribution of two independent coordinates.
first, second = jf.kl_divergence(p, q), jf.kl_divergence(jf.Normal(0.0, 1.0), jf.Normal(-1.0, 0.5))
joint = jf.kl_divergence(
    jf.MultivariateNormal(jnp.array([0.0, 0.0]), jnp.diag(jnp.array([1.0, 1.0]))),
    jf.MultivariateNormal(jnp.array([1.0, -1.0]), jnp.diag(jnp.array([2.0, 0.5]))),
)
print(f"of two parts       {first:.4f} + {second:.4f} = {joint:.4f}")
np.testing.assert_allclose(joint, first + second, rtol=50 * EPS)

# The same in other units: y = 100 x.
scaled = jf.kl_divergence(jf.Normal(100 * p.loc, 100 * p.scale), jf.Normal(100 * q.loc, 100 * q.scale))
print(f"in other units     {scaled:.4f}")
np.testing.assert_allclose(scaled, jf.kl_divergence(p, q), rtol=50 * EPS)

# No triangle inequality: from 0 to 2 directly, and with a stop at 1.
stops = [jf.Normal(mean, 1.0) for mean in (0.0, 1.0, 2.0)]
direct, detour = jf.kl_divergence(stops[0], stops[2]), sum(map(jf.kl_divergence, stops[:2], stops[1:]))
print(f"direct {direct:.2f}, with a stop {detour:.2f}")
assert detour < direct

# %% [markdown]
# If there is no closed form, samples estimate the expectation, and their spread gives the error of the estimate.

# %%
log_prob = jf.log_likelihood(lambda theta: jf.Normal(theta["loc"], theta["scale"]))
theta_p, theta_q = {"loc": 0.0, "scale": 1.0}, {"loc": 1.0, "scale": 2.0}
samples = p.sample(jax.random.key(1), (20_000,))
estimate = jf.monte_carlo_kl(log_prob)(theta_p, theta_q, samples)
error = jnp.std(p.log_prob(samples) - q.log_prob(samples)) / jnp.sqrt(len(samples))
print(f"from samples {estimate:.4f} +- {error:.4f}, in closed form {jf.kl_divergence(p, q):.4f}")
assert abs(estimate - jf.kl_divergence(p, q)) < 5 * error

# %% [markdown]
# ## Gradient zero, Hessian the Fisher
#
# Now stay at one $\theta$ and look at the divergence to its neighbours, $d \mapsto \mathrm{KL}(\theta \,\|\, \theta + d)$.
# It is zero at $d = 0$ and nowhere negative, so its gradient there is zero. The first derivative that says anything is the
# second, and this Hessian is the Fisher information matrix,
#
# $$F(\theta) = \nabla_q^2\, \mathrm{KL}(\theta \,\|\, q) \,\big|_{q = \theta}.$$
#
# For the normal family with parameters $(\mu, \log \sigma)$ it is known on paper: $1 / \sigma^2$ for the mean, 2 for the
# log scale, and nothing between them. A family without inputs is a function of its parameters alone.


# %%
def normal(theta):
    return jf.Normal(theta[0], jnp.exp(theta[1]))


theta = jnp.array([0.3, -0.5])
divergence = jf.kl(normal)  # (params_p, params_q) -> nats
gradient, hessian = jax.jit(
    lambda theta: (jax.grad(divergence, argnums=1)(theta, theta), jax.hessian(divergence, argnums=1)(theta, theta))
)(theta)
print("gradient", gradient)
print("Hessian", *np.asarray(hessian).round(6), sep="\n")
np.testing.assert_allclose(gradient, 0, atol=10 * EPS)
np.testing.assert_allclose(hessian, np.diag([np.exp(2 * 0.5), 2.0]), rtol=0, atol=50 * EPS)
np.testing.assert_allclose(jax.jit(jf.kl_hessian(normal))(theta).as_matrix(), hessian, rtol=0, atol=50 * EPS)

# %% [markdown]
# Only one side moves. If both move, the divergence is that of a distribution to itself, which is zero everywhere, and so is
# every derivative. Code that differentiates both sides gets a matrix of zeros and no error.

# %%
both_move = jax.jit(jax.hessian(lambda theta: divergence(theta, theta)))(theta)
print(both_move)
assert np.all(np.abs(both_move) < 50 * EPS)

# %% [markdown]
# ## Three routes to one matrix
#
# The Fisher has two more definitions. With the *score* $s = \nabla_\theta \log p_\theta(y \mid x)$, and the expectation over
# targets $y$ that the model itself predicts,
#
# $$F = \mathbb{E}\left[s\, s^\top\right] = -\mathbb{E}\left[\nabla_\theta^2 \log p_\theta(y \mid x)\right]
# = \nabla_q^2\, \mathrm{KL}(\theta \,\|\, q) \,\big|_{q = \theta}.$$
#
# The first says that the Fisher is the covariance of the score, whose mean is zero. The second says that it is the average
# curvature of the log-density. We take a small network on Fisher's irises: three classes, so that the expectation over
# targets is a sum of three terms that can be written out. A model is a function of *one* example to a distribution over its
# target.

# %%
iris = load_iris()
inputs = jnp.asarray((iris.data - iris.data.mean(0)) / iris.data.std(0))
targets = jnp.asarray(iris.target)


def network(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jf.Categorical(logits=hidden @ params["w2"] + params["b2"])


keys = jax.random.split(jax.random.key(2), 2)
params = {
    "b1": jnp.linspace(-0.5, 0.5, 3),
    "b2": jnp.zeros(3),
    "w1": 0.7 * jax.random.normal(keys[0], (4, 3)),
    "w2": jax.random.normal(keys[1], (3, 3)),
}
log_prob = jf.log_likelihood(network)  # (params, x, y) -> scalar

# Every input with every class. Weighted by what the model thinks of the class, a mean over this list is the expectation,
# written out; weighted by what was observed, it is a mean over the data.
every_x, every_y = jnp.repeat(inputs, 3, axis=0), jnp.tile(jnp.arange(3), len(inputs))
probability = jnp.exp(jax.vmap(log_prob, (None, 0, 0))(params, every_x, every_y))
observed = jax.nn.one_hot(targets, 3).reshape(-1)


@jax.jit
def from_the_list(params, weights):
    data = (every_x, every_y)
    scores = jf.scores(log_prob)(params, *data, weights=weights)
    return scores.rmv(scores.weights), {
        "covariance of the score": jf.empirical_fisher(log_prob)(params, *data, weights=weights),
        "minus the mean Hessian": jf.observed_information(log_prob)(params, *data, weights=weights),
    }


hessian_of_kl, F = jax.jit(lambda params: (jf.kl_hessian(network)(params, inputs), jf.exact_fisher(network)(params, inputs)))(
    params
)
fisher = np.asarray(hessian_of_kl.as_matrix())


def difference(operator):
    """From the Hessian of KL, relative to its largest entry."""
    return np.max(np.abs(operator.as_matrix() - fisher)) / np.max(np.abs(fisher))


print(f"{'':26s}  difference from the Hessian of KL")
print(f"{'jf.exact_fisher':26s}  {difference(F):.1e}")
assert difference(F) < 100 * EPS
for whose, weights in (("model", probability), ("data", observed)):
    mean_score, routes = from_the_list(params, weights)
    for route, operator in routes.items():
        print(f"{route:26s}  {difference(operator):.1e} over the {whose}'s targets")
        assert (difference(operator) < 100 * EPS) == (whose == "model")
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(mean_score))
    print(f"{'mean of the score, largest':26s}  {largest:.1e} over the {whose}'s targets")
    assert (largest < 100 * EPS) == (whose == "model")

# %% [markdown]
# The three definitions agree to rounding, and so does `jf.exact_fisher`, which needs no list of targets: it works with
# the Jacobian $J_i$ of the network and the Fisher $M_i$ of the predicted distribution, $F = \frac1n \sum_i J_i^\top M_i J_i$.
# The last three rows use the targets of the data in place of the model's. Their matrices are not Fishers, and not even equal to
# each other: the first is called the empirical Fisher, the second the observed information.
# [Notebook 3](03_empirical_fisher.ipynb) continues from here.
#
# The Fisher is an operator over the parameters. In the picture its entries between two leaves of the parameters form a block.

# %%
print(F)
ax = plot.blocks(F, ax=plt.subplots(figsize=(6.4, 5.2), layout="constrained")[1])
ax.set_title("Fisher of the network on the irises", fontsize="medium")
plt.show()

# %% [markdown]
# A softmax depends only on differences of logits. So this Fisher is singular: moving all the biases of the last layer together
# changes no prediction, and neither does moving all columns of its weights together. The library counts those directions.

# %%
rank = int(F.rank())
together = {name: jnp.zeros_like(leaf) for name, leaf in params.items()} | {"b2": jnp.ones(3)}
print(f"{F.size} parameters, rank {rank}; quadratic form along equal biases: {F.quadratic(together):.1e}")
assert rank == F.size - 4 and abs(F.quadratic(together)) < 100 * EPS

# %% [markdown]
# ## The quadratic, and its cubic error
#
# With value and gradient zero, Taylor's theorem leaves
#
# $$\mathrm{KL}(\theta \,\|\, \theta + d) = \frac12\, d^\top F(\theta)\, d + O(\lVert d \rVert^3).$$
#
# This is what makes the Fisher useful: one matrix stands for the divergence to all neighbours. The pictures show both sides
# along one direction, first as curves, then their difference on log axes, where a slope of three shows the cube.

# %%
direction = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / jnp.sqrt(F.size), params)
direction["b2"] = direction["b2"] * jnp.array([1.0, -2.0, 0.5])

steps = 2.0 ** -jnp.arange(1.0, 9.0)
half = 0.5 * F.quadratic(direction)


@jax.jit
def remainders(steps):
    def at(t):
        moved = jax.tree.map(lambda leaf, d: leaf + t * d, params, direction)
        return jf.kl(network)(params, moved, inputs) - t**2 * half

    return jnp.abs(jax.lax.map(at, steps))


errors = np.asarray(remainders(steps))
orders = np.log2(errors[:-1] / errors[1:])
print("order from each halving:", orders.round(3))
np.testing.assert_allclose(orders[-1], 3, atol=0.05)

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
plot.kl_along(network, params, direction, jnp.linspace(-2.0, 2.0, 41), inputs, ax=axes[0])
axes[1].loglog(steps, errors, "o", color="black", label=r"$|$KL $-\ \frac{1}{2} t^2 d^T F d\,|$")
axes[1].loglog(steps, errors[-1] * (steps / steps[-1]) ** 3, "--", color="#D55E00", label=r"slope 3: $t^3$")
axes[1].set(xlabel="t, in multiples of the direction d", ylabel="error (nats)")
axes[1].grid(color="0.9")
axes[1].legend()
plt.show()

# %% [markdown]
# Halving the step divides the error by eight. Near $\theta$ the quadratic can replace the divergence. A step that
# leaves the region where the two curves agree is too long for the metric at its start.
#
# `jf.check_fisher` makes this comparison, and those of the routes above, for a model of your own.

# %%
check = jf.check_fisher(network)(params, jax.random.key(3), inputs)
print(check)
assert check.passed

# %% [markdown]
# ## Balls become ellipses
#
# All $\theta + d$ with a divergence of at most $c$ from $\theta$ form a ball of the divergence. To second order it is the
# ellipse $\frac12 d^\top F(\theta)\, d \le c$. Drawn over the plane of a family with two parameters, the ellipses show the
# metric: where an ellipse is long, the parameters may move far while the distribution hardly changes. Over each ellipse we draw
# the actual ball, from the divergence itself.

# %%
RADIUS = 0.02


def by_scale(theta):
    return jf.Normal(theta[0], theta[1])


def gamma(theta):
    return jf.Gamma(theta[0], theta[1])


def actual_ball(model, centre, radius, angles):
    """The boundary of {q : KL(centre || q) <= radius}, along each angle from the centre, by bisection."""
    unit = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    # In units of the ellipse itself the boundary is near 1 in every direction.
    to_ellipse = jnp.linalg.cholesky(2 * radius * jnp.linalg.inv(jf.exact_fisher(model)(centre).as_matrix()))
    rays = unit @ to_ellipse.T

    def halve(ends, _):
        low, high = ends
        middle = (low + high) / 2
        inside = jax.vmap(lambda t, ray: jf.kl(model)(centre, centre + t * ray))(middle, rays) < radius
        return (jnp.where(inside, middle, low), jnp.where(inside, high, middle)), None

    (low, _), _ = jax.lax.scan(halve, (jnp.zeros(len(rays)), jnp.full(len(rays), 2.0)), length=30)
    return centre + low[:, None] * rays, low


def grid(across, up):
    return jnp.stack(jnp.meshgrid(jnp.asarray(across), jnp.asarray(up)), axis=-1).reshape(-1, 2)


families = [
    (by_scale, grid([-1.5, 0.0, 1.5], [0.5, 1.0, 1.5, 2.0]), "normal", r"mean $\mu$", r"scale $\sigma$"),
    (gamma, grid([1.0, 2.5, 4.5], [0.5, 1.0, 2.0]), "Gamma", "concentration", "rate"),
]
fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.2), layout="constrained")
angles = jnp.linspace(0, 2 * jnp.pi, 90)
print("family    radius of the actual ball, in units of the ellipse: smallest, largest")
for ax, (model, points, name, across, up) in zip(axes, families, strict=True):
    plot.metric_ellipses(model, points, RADIUS, ax=ax)
    balls, radii = jax.jit(jax.vmap(lambda point, model=model: actual_ball(model, point, RADIUS, angles)))(points)
    for ball in balls:
        (line,) = ax.plot(*ball.T, color="#D55E00", linestyle="--", linewidth=1.2)
    ax.set(xlabel=across, ylabel=up, title=f"{name} family, radius {RADIUS} nats")
    print(f"{name:6s}    {jnp.min(radii):.3f}, {jnp.max(radii):.3f}")
    assert np.max(np.abs(radii - 1)) < 2 * np.sqrt(RADIUS), "the relative error is of the order of the radius' root"
fig.legend([axes[0].patches[0], line], ["ellipse of the Fisher", "actual KL ball"], loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Left: all ellipses have the same divergence, and they grow with the scale, in both directions. Of the two pairs at the
# beginning, the one at the bottom of this plane is far apart and the one at the top is close together. Right: the concentration
# and the rate of a Gamma distribution can compensate for each other, since their quotient is the mean, so the ellipses are
# tilted.
#
# The actual balls deviate by the cubic term. They get rounder as the radius shrinks:

# %%
print("radius (nats)    largest deviation from the ellipse")
deviations = []
for radius in (0.08, 0.02, 0.005, 0.00125):
    _, radii = jax.jit(lambda radius: actual_ball(by_scale, jnp.array([0.0, 1.0]), radius, angles))(radius)
    deviations.append(float(jnp.max(jnp.abs(radii - 1))))
    print(f"{radius:13g}    {deviations[-1]:.4f}")
ratios = np.array(deviations[:-1]) / deviations[1:]
np.testing.assert_allclose(ratios, 2, rtol=0.2)  # the root of 4, and better the smaller the radius
assert abs(ratios[-1] - 2) < 0.1

# %% [markdown]
# A quarter of the radius halves the deviation. In a small enough ball the Fisher alone describes the divergence, and
# [notebook 2](02_natural_gradient.ipynb) looks for the best step inside it.
