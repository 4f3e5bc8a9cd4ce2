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
# # What a fit knows
#
# At the end you will know how to get standard errors that hold if the model is right, others that hold if it is wrong, and
# intervals that do not depend on the parametrisation; and what happens if a fit has no maximum.
#
# The maximum-likelihood estimate from $n$ observations is close to normal, with the covariance $(n F)^{-1}$ where $F$ is the
# Fisher information. This notebook needs nothing else from classical statistics. All numbers are compared with statsmodels.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import statsmodels.api as sm

import jaxfisher as jf
from jaxfisher import statistics

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Counts of visits to a doctor
#
# The RAND experiment gave families health insurance with different shares of the cost to pay. The target is the number of
# visits in a year. There are 20,190 records.

# %%
table = sm.datasets.randhie.load_pandas()
names = ["constant", "log coinsurance", "chronic illnesses", "poor health"]
columns = table.exog[["lncoins", "disea", "hlthp"]].to_numpy()
visits = table.endog.to_numpy(float)
x = np.column_stack([np.ones(len(visits)), columns])


def model(beta, x):  # ONE person
    return jf.Poisson(log_rate=x @ beta)


found = jf.fit(model)(jnp.zeros(4), x, visits)
print(found)

log_prob = jf.log_likelihood(model)
bread = jf.observed_information(log_prob)(found.params, x, visits)
meat = statistics.meat(log_prob)(found.params, x, visits)
as_it_says, whatever = jf.covariance(found.fisher), jf.sandwich(bread, meat)

theirs = {kind: sm.GLM(visits, x, sm.families.Poisson()).fit(cov_type=kind, tol=1e-13) for kind in ("nonrobust", "HC0")}
print(f"{'':18s} estimate   error: the model's   the sandwich's")
for row in zip(names, found.params, jf.standard_errors(as_it_says), jf.standard_errors(whatever), strict=True):
    print("{:18s} {:8.4f} {:14.4f} {:16.4f}".format(*row))
for covariance, kind in ((as_it_says, "nonrobust"), (whatever, "HC0")):
    np.testing.assert_allclose(jf.standard_errors(covariance), theirs[kind].bse, rtol=1e-7)

# %% [markdown]
# The sandwich errors are several times larger. A Poisson model says that the variance of a count equals its mean; here it is
# much larger. The Fisher trusts the model, the sandwich trusts the data. The two agree if the model is right, so their ratio
# tests the model. TIC, which is AIC with an estimate of what each parameter actually costs, says the same in one number.

# %%
print(f"dispersion {statistics.dispersion(model)(found.params, x, visits):.2f}, where a Poisson model has 1")
aic, tic = statistics.aic(log_prob)(found.params, x, visits), statistics.tic(log_prob)(found.params, x, visits)
print(f"AIC counts 4 parameters, TIC {(tic - aic) / 2 + 4:.1f}")
np.testing.assert_allclose(aic, theirs["nonrobust"].aic, rtol=1e-12)

# %% [markdown]
# ## Is that true? Five hundred data sets
#
# Standard errors make a claim about repetitions of the experiment. If the truth is known, we can check it: we draw counts
# five hundred times with a variance larger than their mean, fit a Poisson model to each set, and ask each time
# whether the interval contains the true slope. One program does all of this.

# %%
REPEATS, SIZE, TRUTH = 500, 200, jnp.array([0.5, 0.4])
design = jnp.column_stack([jnp.ones(SIZE), jax.random.normal(jax.random.key(1), (SIZE,))])


def once(key):
    """Whether the true slope is in the interval of the model and in that of the sandwich."""
    shape, draw = jax.random.split(key)
    mean = jnp.exp(design @ TRUTH)
    counts = jax.random.poisson(draw, mean * jax.random.gamma(shape, 2.0, (SIZE,)) / 2.0).astype(float)
    fit = jf.fit(model, max_steps=20)(jnp.zeros(2), design, counts)
    bread = jf.observed_information(log_prob)(fit.params, design, counts)
    h = statistics.leverages(model)(fit.params, design)
    robust = jf.sandwich(bread, statistics.meat(log_prob)(fit.params, design, counts, factors=statistics.hc3(h)))
    slope = statistics.wald_interval(lambda beta: beta[1])
    inside = [
        (low < TRUTH[1]) & (TRUTH[1] < high)
        for low, high, _ in (slope(fit.params, c) for c in (jf.covariance(fit.fisher), robust))
    ]
    return jnp.stack(inside), fit.params[1], fit.converged


inside, slopes, converged = jax.jit(lambda keys: jax.lax.map(once, keys, batch_size=50))(
    jax.random.split(jax.random.key(2), REPEATS)
)
assert jnp.all(converged)
covered = np.mean(inside, axis=0)
print(f"intervals that should hold the truth in 95.0%: the model's {covered[0]:.1%}, the sandwich's {covered[1]:.1%}")
assert covered[0] < 0.9 and abs(covered[1] - 0.95) < 4 * np.sqrt(0.95 * 0.05 / REPEATS)

# %% [markdown]
# ## Intervals without coordinates
#
# With few data the log-likelihood is not a parabola. The example is a standard one for logistic regression: twenty-three
# flights of the space shuttle, seven of them with damaged rubber seals. The question is the temperature at which damage has
# probability one half, which is a ratio of two parameters.

# %%
temperature = np.array([53, 57, 58, 63, 66, 67, 67, 67, 68, 69, 70, 70, 70, 70, 72, 73, 75, 75, 76, 76, 78, 79, 81.0])
damage = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0.0])


def logistic(p, x):
    return jf.Bernoulli(logits=p["slope"] * (x - 70) + p["level"])


def even(p):
    return 70 - p["level"] / p["slope"]


fit = jf.fit(logistic)({"slope": 0.0, "level": 0.0}, temperature, damage)
print(fit)
wald = statistics.wald_interval(even)(fit.params, jf.covariance(fit.fisher))
profile = statistics.likelihood_interval(logistic, even)(fit.params, temperature, damage)
score = statistics.score_interval(logistic, even)(fit.params, temperature, damage)
print(f"even odds at {even(fit.params):.1f} degrees")
for name, (low, high, good) in {"Wald": wald, "likelihood": profile, "score": score}.items():
    print(f"{name:10s} {low:5.1f} to {high:5.1f}", "" if good else "(an end was not found)")

# %% [markdown]
# Wald's interval is symmetric by construction. The likelihood's interval reaches farther towards the cold, where no data
# contradict it. The picture shows why: the curve is the log-likelihood with all other parameters refitted, and Wald's interval
# replaces it by a parabola.

# %%
SHOWN = jnp.linspace(45.0, 72.0, 55)


@jax.jit
@jax.vmap
def profiled(place):
    """The log-likelihood where the odds are even at a place: the level follows from the slope."""
    held = lambda slope, x: logistic({"slope": slope, "level": slope * (70 - place)}, x)
    return jf.fit(held)(fit.params["slope"], temperature, damage).log_likelihood


curve = 2 * (fit.log_likelihood - profiled(SHOWN))
error = float(wald.upper - wald.lower) / 2 / scipy.stats.norm.ppf(0.975)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.hist(slopes, bins=30, color="#56B4E9", density=True)
grid = np.linspace(float(slopes.min()), float(slopes.max()), 200)
model_error = 1 / np.sqrt(SIZE * float(jf.exact_fisher(model)(TRUTH, design).as_matrix()[1, 1]))
left.plot(grid, scipy.stats.norm(TRUTH[1], np.std(slopes)).pdf(grid), color="#0072B2", label="their own spread")
left.plot(grid, scipy.stats.norm(TRUTH[1], model_error).pdf(grid), "--", color="#D55E00", label="what the model says")
left.set(xlabel="slope", ylabel="density", title="five hundred fits")
left.set_ylim(0, 11)
left.legend()
right.plot(SHOWN, curve, color="#0072B2", label="likelihood, all else fitted")
right.plot(SHOWN, ((np.asarray(SHOWN) - float(even(fit.params))) / error) ** 2, "--", color="#D55E00", label="Wald's parabola")
drop = scipy.stats.chi2.ppf(0.95, 1)
right.axhline(drop, color="0.5", linestyle=":")
right.plot([profile.lower, profile.upper], [drop, drop], "o", color="#0072B2")
right.set(xlabel="temperature of even odds (F)", ylabel="fall of twice the log-likelihood", ylim=(0, 8))
right.legend(loc="lower left", fontsize="small")
plt.show()

# %% [markdown]
# ## No maximum
#
# If one number separates the classes perfectly, the likelihood increases for ever. Most programs return the point
# where they gave up. Here the report names the parameters that diverge. With Firth's penalty, half the logarithm of the
# determinant of the information, a maximum exists.

# %%
damaged_when_cold = (temperature < 66).astype(float)
apart = jf.fit(logistic)({"slope": 0.0, "level": 0.0}, temperature, damaged_when_cold)
print(apart)
mended = jf.fit(logistic, penalty=statistics.firth(logistic))({"slope": 0.0, "level": 0.0}, temperature, damaged_when_cold)
print(mended)
print({name: round(float(leaf), 2) for name, leaf in mended.params.items()})
assert bool(apart.separated["slope"]) and not bool(apart.converged) and bool(mended.converged)

# %% [markdown]
# What to take home:
#
# - `jf.fit(model)(params, *data)` fits any model of one example, and says whether it converged.
# - `jf.covariance(F)` trusts the model, `jf.sandwich(bread, meat)` trusts the data. Report the second if you are not sure.
# - An interval is for a function of the parameters. With few data, use the likelihood's interval.
# - None of this applies to networks: their Fisher is singular, and their maximum is not a single point.
