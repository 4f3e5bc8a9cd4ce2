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
# # Before the data
#
# At the end you will know how to forecast the errors of an experiment before it is made, how to choose where to measure, and
# what a distance between two distributions means.
#
# The Fisher information is an expectation. It needs no data, only a simulator and a guess of its parameters.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxfisher as jf
from jaxfisher import design, forecasts, geometry, plot

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## A star and its planet
#
# The speed of a star is measured forty times. A planet moves the star to and fro, with an amplitude, a period and a phase. The
# noise has two parts: each measurement has its own, and spots on the star add noise that measurements close in time share. The
# size of the second part is unknown too, so both the mean and the covariance depend on the parameters.

# %%
TIMES = jnp.sort(jax.random.uniform(jax.random.key(0), (40,), maxval=30.0))  # days
TRUTH = {"amplitude": 5.0, "period": 4.2, "phase": 0.3, "log_spots": jnp.log(2.0)}


def speed(p):
    return p["amplitude"] * jnp.sin(2 * jnp.pi * TIMES / p["period"] + p["phase"])


def noise(p):
    near = jnp.exp(-jnp.abs(TIMES[:, None] - TIMES[None, :]) / 2.0)
    return jnp.exp(2 * p["log_spots"]) * near + jnp.eye(40)


F = forecasts.gaussian_fisher(speed, noise)(TRUTH)
prior = forecasts.gaussian_prior(F, {name: 0.05 if name == "phase" else jnp.inf for name in TRUTH})  # seen in transit
covariances = {"speeds": jf.covariance(F), "and a transit": jf.covariance(F + prior)}

print(f"{'':12s} others known   others fitted   and a transit")
for name in TRUTH:
    errors = forecasts.conditional_errors(F)[name], *(jf.standard_errors(c)[name] for c in covariances.values())
    print("{:12s} {:12.4f} {:15.4f} {:15.4f}".format(name, *errors))

# %% [markdown]
# The period and the phase are hard to tell apart: a longer period with another phase gives nearly the same curve. A transit
# determines the phase, and with it the period. The triangle plot shows this.

# %%
plot.triangle(TRUTH, covariances)
plt.show()

# %% [markdown]
# ### Is the forecast right?
#
# We simulate two hundred data sets and fit each by natural-gradient steps. A second
# planet that the analysis leaves out shifts all fits, and `forecasts.bias` says by how much.

# %%
SECOND = 1.0 * jnp.sin(2 * jnp.pi * TIMES / 7.7)
moved = forecasts.bias(speed, noise)(TRUTH, F, SECOND)


def minus_log_likelihood(p, data):
    root = jnp.linalg.cholesky(noise(p))
    rest = jax.scipy.linalg.solve_triangular(root, data - speed(p), lower=True)
    return 0.5 * jnp.vdot(rest, rest) + jnp.sum(jnp.log(jnp.diagonal(root)))


@jax.jit
def fitted(data):
    """Ten natural-gradient steps from the truth."""

    def step(p, _):
        d = forecasts.gaussian_fisher(speed, noise)(p).solve(jax.grad(minus_log_likelihood)(p, data), 0.0)
        return jax.tree.map(jnp.subtract, p, d), None

    return jax.lax.scan(step, TRUTH, length=10)[0]


draws = speed(TRUTH) + jax.random.normal(jax.random.key(1), (200, 40)) @ jnp.linalg.cholesky(noise(TRUTH)).T
plain, with_second = (jax.lax.map(fitted, data) for data in (draws, draws + SECOND))
print(f"{'':12s} forecast    scatter of 200 fits    bias: forecast    of 200 fits")
for name in TRUTH:
    shift = np.mean(with_second[name] - plain[name])
    row = jf.standard_errors(F)[name], np.std(plain[name]), moved[name], shift
    print("{:12s} {:8.4f} {:20.4f} {:18.4f} {:14.4f}".format(name, *row))
    assert abs(row[1] / row[0] - 1) < 0.3 and abs(shift - moved[name]) < 0.5 * row[0]

# %% [markdown]
# The three numbers of the planet scatter as forecast. The size of the spots scatters a quarter more: a forecast is a lower
# bound, which forty measurements do not reach for a variance. The second planet also makes the spots look larger; this effect
# is of second order, and the formula contains only the first.

# %% [markdown]
# ## Where to measure
#
# We may request twelve more nights. Each of 120 times is a candidate, here with independent noise only. The criterion is the
# determinant of the information, which measures the volume of the error ellipsoid. First we find the optimal weights on the
# candidates; the report has a bound on how much better any other design could be. Twelve nights then follow by exchange. The
# design repeats as many distinct times as there are parameters: such a design trusts the model.

# %%
nights = jnp.linspace(0.0, 30.0, 120)


def measured(p, t):
    return jf.Normal(p["amplitude"] * jnp.sin(2 * jnp.pi * t / p["period"] + p["phase"]), 1.0)


planet = {name: TRUTH[name] for name in ("amplitude", "period", "phase")}
M = design.informations(measured)(planet, nights)
best = jax.jit(lambda M: design.optimal_weights(M, design.d_criterion))(M)
regular = jnp.linspace(0, 119, 12).astype(jnp.int32)
chosen = jax.jit(lambda M: design.exchange(M, design.d_criterion, regular))(M)
random = jax.random.randint(jax.random.key(3), (500, 12), 0, 120)
values = design.d_criterion(jnp.sum(M[random], axis=1))  # of 500 designs in one call
print(f"weights: {best.value:.3f}, within {best.gap:.0e} of the best; {int(jnp.sum(best.weights > 1e-3))} times in use")
every_ten, drawn = design.d_criterion(M[regular].sum(0)), values.max()
print(f"log det of twelve nights: every ten {every_ten:.2f}, best of 500 drawn {drawn:.2f}, chosen {chosen.value:.2f}")
error = lambda runs: float(jnp.sqrt(jnp.linalg.inv(M[runs].sum(0))[1, 1]))
print(f"error of the period: every ten {error(regular):.4f}, chosen {error(chosen.runs):.4f} days")
assert chosen.value > values.max()

# %% [markdown]
# ## How far apart are two distributions?
#
# With the Fisher as a metric, normal distributions are the points of a curved plane. The shortest way from one to another of
# the same width goes through wider ones. Its length is known in closed form, and `geometry.geodesic` finds the shortest way for
# any model.


# %%
def normal(theta):
    return jf.Normal(theta[0], theta[1])


exp = geometry.exponential_map(normal)
ways = []
for start, end in (([-2.0, 0.6], [2.0, 0.6]), ([-2.0, 0.6], [1.5, 1.8])):
    found = geometry.geodesic(normal)(jnp.array(start), jnp.array(end))
    closed = geometry.distance(normal(start), normal(end))
    print(f"by shooting {found.distance:.6f}, closed form {closed:.6f}")
    assert abs(found.distance / closed - 1) < 1e-5
    times = jnp.linspace(0, 1, 41)
    ways.append(jax.vmap(lambda t, start=start, v=found.velocity: exp(jnp.array(start), t * v))(times))

data = jnp.array([0.5, 1.5, 2.0, 2.6])
flow = geometry.natural_gradient_flow(normal, time=4.0, steps=80)(jnp.array([-2.0, 0.6]), data)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
mesh = jnp.stack([c.reshape(-1) for c in jnp.meshgrid(jnp.linspace(-2.5, 2.5, 6), jnp.array([0.5, 1.0, 1.6, 2.2]))], axis=1)
plot.metric_ellipses(normal, mesh, 0.03, ax=left)
for way, colour, label in zip(ways, ("#0072B2", "#56B4E9"), ("geodesics", None), strict=True):
    left.plot(way[:, 0], way[:, 1], color=colour, linewidth=2, label=label)
left.plot(flow[:, 0], flow[:, 1], "--", color="#D55E00", linewidth=2, label="natural-gradient flow")
left.set(xlabel="mean", ylabel="scale", title="", ylim=(0.3, 3.2))
left.legend(loc="upper right", fontsize="small")
curve = 5.0 * jnp.sin(2 * jnp.pi * nights / 4.2 + 0.3)
right.plot(nights, curve, color="0.6")
places, counts = np.unique(chosen.runs, return_counts=True)
right.plot(nights[places], curve[places], "o", color="#D55E00", label="nights chosen, and how often")
for place, count in zip(places, counts, strict=True):
    right.annotate(f"{count}", (nights[place], curve[place]), (8, 4), textcoords="offset points", color="#D55E00")
right.set(xlabel="days", ylabel="speed", ylim=(-6, 8))
right.legend(loc="upper center")
plt.show()

# %% [markdown]
# What to take home:
#
# - A Fisher needs a simulator and a guess. Add the Fishers of independent data, and priors, with `+`.
# - `jf.standard_errors` assumes that the other parameters are fitted, `forecasts.conditional_errors` that they are known. Look
#   at both.
# - A design comes with a bound. If the guess of the parameters is poor, so is the design.
# - Geodesics and distances are tools for families of a few parameters.
