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
# # The natural gradient
#
# At the end you will know what the natural gradient is best at, where its learning rate and its damping come from, when it
# is Newton's method, how it fits regressions with their standard errors, and why it does not care how you write your
# parameters.
#
# [Notebook 1](01_kl_and_fisher.ipynb) showed that near $\theta$ the divergence is
# $\mathrm{KL}(\theta \,\|\, \theta + d) \approx \frac12 d^\top F d$. Here is what follows for descent.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import scipy.stats
import statsmodels.api as sm

import jaxfisher as jf
from jaxfisher import plot

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 80
EPS = float(np.finfo(float).eps)

# %% [markdown]
# ## Steepest, measured by the divergence
#
# Which small step $d$ lowers a loss $L$ most? That depends on what "small" means. For a small Euclidean length the answer is
# the gradient. Let us instead allow every step that changes the model's predictions by at most $c$ nats,
#
# $$\min_d \; \nabla L(\theta)^\top d \quad \text{with} \quad \mathrm{KL}(\theta \,\|\, \theta + d) \le c.$$
#
# With the quadratic for the divergence, the Lagrangian is $\nabla L^\top d + \lambda (\frac12 d^\top F d - c)$. Its gradient
# in $d$ is zero at
#
# $$d = -\frac{1}{\lambda} F^{-1} \nabla L, \qquad \frac{1}{\lambda} = \sqrt{\frac{2c}{\nabla L^\top F^{-1} \nabla L}},$$
#
# the multiplier from the constraint. So the direction is $F^{-1} \nabla L$, the *natural gradient*, and the multiplier is
# absorbed into the learning rate. We check this on a logistic regression with two parameters, small enough to try every
# direction.


# %%
def logistic(theta, x):
    return jf.Bernoulli(logits=theta[0] + theta[1] * x)


keys = jax.random.split(jax.random.key(0), 2)
inputs = 2.0 + jax.random.normal(keys[0], (60,))
targets = (jax.random.uniform(keys[1], (60,)) < jax.nn.sigmoid(1.5 * inputs - 2.0)).astype(float)

log_prob = jf.log_likelihood(logistic)
exact = lambda theta, x, y: jf.exact_fisher(logistic)(theta, x)  # the exact Fisher needs no targets


def loss(theta):
    return -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(theta, inputs, targets))


theta = jnp.array([0.5, -0.5])
gradient = jax.jit(jax.grad(loss))(theta)
natural = jax.jit(jf.natural_grad(log_prob, exact, damping=0.0))(theta, inputs, targets)
F = jax.jit(jf.exact_fisher(logistic))(theta, inputs)  # an operator: it crosses jit like an array
print("gradient        ", gradient)
print("natural gradient", natural)
np.testing.assert_allclose(natural, np.linalg.solve(F.as_matrix(), gradient), rtol=1e4 * EPS)


# %% [markdown]
# Now the search: along each of many directions we go as far as the *actual* divergence allows, and keep the end with the
# lowest $\nabla L^\top d$. The search does not use the Fisher.


# %%
@jax.jit
def ends_of_ball(theta, radius, angles):
    """For every angle the step that uses up the radius, by bisection on the actual divergence."""
    unit = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)

    def halve(ends, _):
        low, high = ends
        middle = (low + high) / 2
        inside = jax.vmap(lambda t, ray: jf.kl(logistic)(theta, theta + t * ray, inputs))(middle, unit) < radius
        return (jnp.where(inside, middle, low), jnp.where(inside, high, middle)), None

    (low, _), _ = jax.lax.scan(halve, (jnp.zeros(len(angles)), jnp.full(len(angles), 4.0)), length=40)
    return low[:, None] * unit


def angle_between(a, b):
    return float(jnp.arccos(jnp.clip(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b), -1, 1)) * 180 / jnp.pi)


angles = jnp.linspace(0, 2 * jnp.pi, 8001)
slope = gradient @ natural  # gradient^T F^-1 gradient
print(f"angle between the gradient and the natural gradient: {angle_between(gradient, natural):.0f} degrees\n")
print("radius (nats)   best step found to -F^-1 grad L   best decrease / sqrt(2 c grad L^T F^-1 grad L)")
off, shares = [], []
for radius in (0.1, 0.01, 0.001, 0.0001):
    steps = ends_of_ball(theta, radius, angles)
    best = steps[jnp.argmin(steps @ gradient)]
    off.append(angle_between(best, -natural))
    shares.append(float(-best @ gradient / jnp.sqrt(2 * radius * slope)))
    print(f"{radius:13g}   {off[-1]:22.2f} degrees   {shares[-1]:.4f}")
assert off[-1] < 0.2 and abs(shares[-1] - 1) < 0.01 and np.all(np.diff(shares) > 0)

# %%
RADIUS = 0.05
ball = theta + ends_of_ball(theta, RADIUS, angles)
low, high = jnp.min(ball, axis=0) - 0.15, jnp.max(ball, axis=0) + 0.15
arrows = {
    "gradient": ("#D55E00", -gradient * jnp.sqrt(2 * RADIUS / F.quadratic(gradient))),
    "natural gradient": ("#0072B2", -natural * jnp.sqrt(2 * RADIUS / slope)),
}
fig, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
plot.metric_ellipses(logistic, theta[None], RADIUS, inputs, ax=ax)
ax.plot(*ball.T, "--", color="black", linewidth=1, label="actual KL ball")
for name, (colour, step) in arrows.items():
    ax.annotate("", theta + step, theta, arrowprops={"color": colour, "width": 1.5, "headwidth": 8})
    ax.annotate(name, theta + step, color=colour, xytext=(6, 6), textcoords="offset points")
best = ball[jnp.argmin(ball @ gradient)]
ax.plot(*best, "*", color="black", markersize=13, label="lowest linearised loss on it")
across, up = jnp.meshgrid(*jnp.linspace(low, high, 60).T)
linear = gradient[0] * (across - theta[0]) + gradient[1] * (up - theta[1])
ax.contour(across, up, linear, 16, colors="0.8", linewidths=0.8, linestyles="solid", zorder=0)
ax.set(xlabel=r"$\theta_0$ (intercept)", ylabel=r"$\theta_1$ (slope)", aspect="equal")
ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# The grey lines are the linearised loss. The gradient is perpendicular to them, but the ball is narrow in that direction. The
# step that lowers the loss most goes where the ball is long.
#
# In the library `jf.natural_grad` is a drop-in for `jax.grad`, and an optimiser with a `radius` finds the multiplier itself:
# it never takes a step of more than $c$ nats, by the quadratic.

# %%
opt = jf.natural_gradient(learning_rate=1e6, damping=0.0, radius=RADIUS)
step, _ = jax.jit(opt.update)(gradient, opt.init(theta), theta, fisher=F)
print(f"radius allowed {RADIUS}, used by the quadratic {0.5 * F.quadratic(step):.6f},", end=" ")
print(f"by the actual divergence {jf.kl(logistic)(theta, theta + step, inputs):.4f}")
np.testing.assert_allclose(step, arrows["natural gradient"][1], rtol=1e4 * EPS)

# %% [markdown]
# ## The second multiplier is the damping
#
# The linearised loss cannot be trusted far from $\theta$, and $F$ may be nearly singular: then the ball is very long in
# some direction, and so is the step. The remedy is a second constraint, on the Euclidean length, $\lVert d \rVert \le r$.
# It brings a second multiplier $\mu$, and the step becomes
#
# $$d = -(\lambda F + \mu I)^{-1} \nabla L = -\frac{1}{\lambda} \left(F + \frac{\mu}{\lambda} I\right)^{-1} \nabla L.$$
#
# The first multiplier gives the learning rate, and the quotient of the two is the *damping*. Every damping belongs to a length,
# so choosing a damping means choosing how far to trust the model. To check this, set $\lambda = 1$ and let SciPy minimise the
# quadratic model under the constraint on the length, without any damping; its answer gives the multiplier. `jf.solve_path`
# solves for many dampings from one factorisation.

# %%
matrix, g = np.asarray(F.as_matrix()), np.asarray(gradient)


def scipy_step(length):
    """The minimum of g d + d^T F d / 2 over |d| <= length, by sequential quadratic programming."""
    return scipy.optimize.minimize(
        lambda d: g @ d + 0.5 * d @ matrix @ d,
        -length * g / np.linalg.norm(g),
        jac=lambda d: g + matrix @ d,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda d: length**2 - d @ d, "jac": lambda d: -2 * d},
        options={"ftol": 1e-15, "maxiter": 200},
    ).x


dampings = jnp.logspace(-4, 2, 61)
path = -jax.jit(jf.solve_path)(F, gradient, dampings)[0]
print("damping    length of the step    multiplier in SciPy's answer")
for damping, d in zip(dampings[20:41:10], path[20:41:10], strict=True):
    found = scipy_step(float(jnp.linalg.norm(d)))
    multiplier = -found @ (g + matrix @ found) / (found @ found)  # stationary: g + F d = -multiplier d
    print(f"{damping:7.2f}    {jnp.linalg.norm(d):18.4f}    {multiplier:28.6f}")
    np.testing.assert_allclose(found, d, rtol=1e-4)
    np.testing.assert_allclose(multiplier, damping, rtol=1e-3)

# %% [markdown]
# As the damping grows, the step turns from the natural gradient to the plain one, and shrinks.

# %%
lengths = jnp.linalg.norm(path, axis=1)
turned = np.array([angle_between(-gradient, d) for d in path])
assert np.all(np.diff(lengths) < 0) and np.all(np.diff(turned) < 1e-6)
assert turned[-1] < 1 and angle_between(path[0], -natural) < 1

fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained")
across, up = jnp.meshgrid(jnp.linspace(-4.5, 2.0, 80), jnp.linspace(-0.6, 3.2, 80))
d = jnp.stack([across, up], axis=-1)
model = d @ gradient + 0.5 * jnp.einsum("abi,ij,abj->ab", d, F.as_matrix(), d)
axes[0].contour(across, up, model, 18, colors="0.8", linewidths=0.8, linestyles="solid")
axes[0].plot(*path.T, color="#0072B2", linewidth=2)
for damping, offset in ((1e-4, (4, 4)), (0.03, (8, 0)), (0.3, (8, 2))):
    k = int(jnp.argmin(jnp.abs(jnp.log(dampings / damping))))
    axes[0].plot(*path[k], "o", color="#0072B2", markersize=5)
    axes[0].annotate(f"damping {damping:g}", path[k], xytext=offset, textcoords="offset points", fontsize=9)
axes[0].plot(0, 0, "o", markersize=9, markerfacecolor="none", color="black")
axes[0].set(xlabel=r"$d_0$", ylabel=r"$d_1$", title="steps, over the quadratic model", aspect="equal")
axes[1].semilogx(dampings, turned / angle_between(gradient, natural), color="#D55E00", label="angle to the plain gradient")
axes[1].semilogx(dampings, lengths / jnp.linalg.norm(natural), "--", color="black", label="length")
axes[1].set(xlabel="damping (nats per squared parameter)", ylabel="relative to the natural gradient's", ylim=(0, 1.3))
axes[1].grid(color="0.9")
axes[1].legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Newton's method as a special case
#
# Newton's step uses the Hessian of the loss instead, $H = -\frac1n \sum_i \nabla^2 \log p_\theta(y_i \mid x_i)$: the *observed*
# information. The Fisher is its expectation under the model. If $\log p$ is linear in the parameters except for a term that
# does not depend on the targets, its Hessian does not depend on the targets either, and the expectation changes nothing. This
# is the case for an exponential family in its natural parameters: the logit of a Bernoulli, the log-rate of a Poisson. There
# the natural gradient is Newton's method. For the logistic regression above:

# %%
hessian = jax.jit(jax.hessian(loss))(theta)
newton = np.linalg.solve(hessian, gradient)
print("Newton ", newton)
print("natural", natural)
np.testing.assert_allclose(natural, newton, rtol=1e4 * EPS)


# %% [markdown]
# In other parameters the two differ. For a normal distribution in mean and scale, far from the maximum, the Hessian is not even
# positive definite, and Newton's step goes uphill. The Fisher is a covariance, so its step goes downhill unless it is zero.


# %%
def normal(theta):
    return jf.Normal(theta[0], theta[1])


numbers = jnp.array([0.9, 1.6, 2.1, 1.2])
start = jnp.array([0.0, 3.0])
log_p = jf.log_likelihood(normal)


@jax.jit
def steps_from(theta):
    plain = jax.grad(lambda t: -jnp.mean(jax.vmap(log_p, (None, 0))(t, numbers)))(theta)
    observed, fisher = jf.observed_information(log_p)(theta, numbers), jf.exact_fisher(normal)(theta)
    newton = jnp.linalg.solve(observed.as_matrix(), plain)
    return plain, {"Newton": (observed.eigvalsh(), newton), "natural": (fisher.eigvalsh(), fisher.solve(plain, damping=0.0))}


plain, both = steps_from(start)
changes = {}
for name, (eigenvalues, d) in both.items():
    changes[name] = float(-plain @ d)
    print(f"{name:7s}  eigenvalues {eigenvalues.round(3)}, change of the loss to first order {changes[name]:+.3f}")
assert both["Newton"][0][0] < 0 < changes["Newton"] and changes["natural"] < 0

# %% [markdown]
# ## Regressions on real data
#
# Generalised linear models have been fitted by the natural gradient for half a century, under the names of *Fisher scoring*
# and iteratively reweighted least squares. statsmodels fits them this way. We fit two of its data sets: visits to a doctor (a
# Poisson regression of 20,190 records) and passing an economics course (a probit regression of 32 students, whose link is not
# the natural one). The loop is one line.


# %%
def standardised(table):
    """Columns with mean zero and deviation one, after a constant."""
    columns = np.asarray(table, float)
    return np.column_stack([np.ones(len(columns)), (columns - columns.mean(axis=0)) / columns.std(axis=0)])


def poisson(beta, x):
    return jf.Poisson(log_rate=x @ beta)


def probit(beta, x):
    eta = x @ beta
    return jf.Bernoulli(logits=jax.scipy.stats.norm.logcdf(eta) - jax.scipy.stats.norm.logcdf(-eta))


def fitted(model, design, response, start, steps):
    """The iterates of undamped natural gradients with learning rate one, and the Fisher at the last."""

    def run(design, response, start):
        exact = lambda beta, x, y: jf.exact_fisher(model)(beta, x)
        direction = jf.natural_grad(jf.log_likelihood(model), exact, damping=0.0)
        step = lambda beta, _: (beta - direction(beta, design, response), beta)
        last, iterates = jax.lax.scan(step, start, length=steps)
        return iterates, last, jf.exact_fisher(model)(last, design).as_matrix()

    return map(np.asarray, jax.jit(run)(jnp.asarray(design), jnp.asarray(response), jnp.asarray(start)))


families, links = sm.families, sm.families.links
regressions = {
    "randhie": (poisson, families.Poisson(), np.log),
    "spector": (probit, families.Binomial(links.Probit()), scipy.stats.norm.ppf),
}
fits = {}
for name, (model, family, to_predictor) in regressions.items():
    data = getattr(sm.datasets, name).load_pandas()
    design, response = standardised(data.exog), np.asarray(data.endog, float)
    start = np.zeros(design.shape[1])
    start[0] = to_predictor(response.mean())
    iterates, beta, information = fitted(model, design, response, start, steps=9)
    errors = np.sqrt(np.diag(np.linalg.inv(len(design) * information)))

    theirs = sm.GLM(response, design, family).fit(start_params=start, tol=1e-13, maxiter=100)
    history = np.stack(theirs.fit_history["params"][1:6])  # the start, and the iterates
    largest = np.max(np.abs(iterates[:5] - history)) / np.max(np.abs(beta))
    print(f"{name}: first four iterates differ from statsmodels' by {largest:.1e}")
    print("                  coefficient       std error   of statsmodels")
    for column, b, error, t, te in zip(["constant", *data.exog], beta, errors, theirs.params, theirs.bse, strict=True):
        print(f"  {column:12s}  {b:13.8f}  {error:.8f}   {t:13.8f}  {te:.8f}")
    print()
    assert largest < 1e-10
    np.testing.assert_allclose(beta, theirs.params, rtol=0, atol=1e-8 * np.max(np.abs(beta)))
    np.testing.assert_allclose(errors, theirs.bse, rtol=1e-6)
    fits[name] = (design, response, beta, errors)

# %% [markdown]
# Not only the results agree: every iterate does, since the methods are the same. For the probit there is a second kind of
# standard error, from the observed information, which statsmodels uses in `Probit`. If the link is not the natural one, the two
# differ even at the maximum. Each takes one line.

# %%
design, response, beta, expected_errors = fits["spector"]
observed = jax.jit(jf.observed_information(jf.log_likelihood(probit)))(jnp.asarray(beta), design, response)
observed_errors = np.sqrt(np.diag(np.linalg.inv(len(design) * observed.as_matrix())))
theirs = sm.Probit(response, design).fit(start_params=beta, method="newton", tol=1e-12, disp=0)
print("expected information", expected_errors.round(5))
print("observed information", observed_errors.round(5))
print("statsmodels' Probit ", theirs.bse.round(5))
np.testing.assert_allclose(observed_errors, theirs.bse, rtol=1e-6)
assert np.max(np.abs(observed_errors / expected_errors - 1)) > 1e-3

# %% [markdown]
# ## Why that is a standard error: the bound of Cramer and Rao
#
# No unbiased estimator from $n$ independent observations can have a covariance below $(n F)^{-1}$, and maximum likelihood
# reaches this bound as $n$ grows. First a case that is exact for every $n$: the mean of normal numbers has the variance
# $\sigma^2 / n$, which is the bound. Their median is unbiased too, and its variance is larger.

# %%
n, repeats = 25, 4000
draws = jf.Normal(1.0, 2.0).sample(jax.random.key(4), (repeats, n))
bound = float(1 / (n * jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(1.0).as_matrix()[0, 0]))
relative_error = np.sqrt(2 / repeats)  # of a variance estimated from so many normal numbers
print(f"bound            {bound:.4f}")
ratios = {}
for name, estimates in (("mean", jnp.mean(draws, axis=1)), ("median", jnp.median(draws, axis=1))):
    ratios[name] = float(jnp.var(estimates)) / bound
    print(
        f"variance, {name:6s} {jnp.var(estimates):.4f}, {ratios[name]:.3f} +- {relative_error * ratios[name]:.3f} of the bound"
    )
np.testing.assert_allclose(bound, 4 / n, rtol=10 * EPS)
assert abs(ratios["mean"] - 1) < 5 * relative_error < ratios["median"] - 1

# %% [markdown]
# Then the Poisson regression, on the first 1,000 records. We take its fit as the truth, redraw the visits many times, fit
# each time, and compare the spread of the fits with the standard errors from the Fisher.

# %%
design, response, _, _ = fits["randhie"]
design = jnp.asarray(standardised(design[:1000, 1:]))
repeats = 400
start = jnp.zeros(design.shape[1]).at[0].set(jnp.log(response[:1000].mean()))


@jax.jit
def bootstrap(response, start, key):
    exact = lambda beta, x, y: jf.exact_fisher(poisson)(beta, x)
    direction = jf.natural_grad(jf.log_likelihood(poisson), exact, damping=0.0)

    def fit(response, start, steps):
        return jax.lax.fori_loop(0, steps, lambda _, beta: beta - direction(beta, design, response), start)

    truth = fit(response, start, 10)

    def again(key):
        return fit(jax.random.poisson(key, jnp.exp(design @ truth)).astype(float), truth, 4)

    return truth, jf.exact_fisher(poisson)(truth, design).as_matrix(), jax.lax.map(again, jax.random.split(key, repeats))


truth, information, refits = bootstrap(jnp.asarray(response[:1000]), start, jax.random.key(5))
errors = np.sqrt(np.diag(np.linalg.inv(len(design) * information)))
spread = np.std(refits, axis=0)
relative_error = 1 / np.sqrt(2 * repeats)
names = ["constant", *sm.datasets.randhie.load_pandas().exog]
print("              spread of the fits    from the Fisher    ratio")
for name, s, e in zip(names, spread, errors, strict=True):
    print(f"  {name:10s}  {s:18.4f}    {e:15.4f}    {s / e:.3f} +- {relative_error:.3f}")
assert np.all(np.abs(spread / errors - 1) < 5 * relative_error)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
ax.errorbar(
    names, spread / errors, 2 * relative_error, fmt="o", color="#0072B2", capsize=3, label="spread of the fits, +- 2 s.e."
)
ax.axhline(1, color="black", linestyle="--", linewidth=1, label="bound of Cramer and Rao")
ax.set(ylabel="standard deviation / bound", ylim=(0.7, 1.3))
ax.tick_params(axis="x", labelrotation=45)
ax.legend(loc="lower right", ncols=2, fontsize=9)
plt.show()

# %% [markdown]
# ## Any coordinates
#
# Write $\theta = \phi(\eta)$ with Jacobian $J$. A gradient becomes $J^\top \nabla L$ and the Fisher $J^\top F J$, so the
# natural gradient becomes $J^{-1} F^{-1} \nabla L$: exactly the components of the *same* step in the new coordinates. A
# plain gradient is multiplied by $J^\top$ where it would have to be divided by $J$. Take the logistic regression in two
# sets of units: with the input as it was, and with the input centred and divided by 5. Each path is run in its own units and
# drawn in those of the first.

# %%
START, STEPS = jnp.array([-1.5, 0.2]), 12
middle = jnp.mean(inputs)


def to_theta(eta):
    """From the coefficients of (x - middle) / 5 to those of x."""
    return jnp.array([eta[0] - eta[1] * middle / 5, eta[1] / 5])


def to_eta(theta):
    return jnp.array([theta[0] + theta[1] * middle, 5 * theta[1]])


def in_new_units(eta, x):
    return logistic(to_theta(eta), x)


def run(direction, start, rate, steps):
    step = lambda params, _: (params - rate * direction(params, inputs, targets), params)
    last, before = jax.lax.scan(step, start, length=steps)
    return jnp.concatenate([before, last[None]])


def natural_path(model, start, rate, steps, damping=0.0):
    exact = jf.exact_fisher(model)
    return run(jf.natural_grad(jf.log_likelihood(model), exact, damping=damping), start, rate, steps)


def euclidean_path(model, start, rate, steps):
    mean_loss = lambda params, x, y: -jnp.mean(jax.vmap(jf.log_likelihood(model), (None, 0, 0))(params, x, y))
    return run(jax.grad(mean_loss), start, rate, steps)


@jax.jit
def both_units(start):
    """The paths, all in the first units."""
    new, back = to_eta(start), jax.vmap(to_theta)
    return {
        "gradient": (euclidean_path(logistic, start, 0.5, STEPS), back(euclidean_path(in_new_units, new, 0.5, STEPS))),
        "natural": (natural_path(logistic, start, 0.5, STEPS), back(natural_path(in_new_units, new, 0.5, STEPS))),
        "damped by 0.1": (
            natural_path(logistic, start, 0.5, STEPS, damping=0.1),
            back(natural_path(in_new_units, new, 0.5, STEPS, damping=0.1)),
        ),
    }


paths = both_units(START)
for name in ("gradient", "natural", "damped by 0.1"):
    first, second = paths[name]
    print(f"{name:14s} largest difference between the two paths: {jnp.max(jnp.abs(first - second)):.1e}")
assert np.max(np.abs(paths["natural"][0] - paths["natural"][1])) < 1e4 * EPS
assert min(np.max(np.abs(paths[name][0] - paths[name][1])) for name in ("gradient", "damped by 0.1")) > 0.1

# %%
units = ("first units", "second units")
named = {f"{name}, {unit}": path for name in ("gradient", "natural") for unit, path in zip(units, paths[name], strict=True)}
ax = plot.paths(loss, named, ax=plt.subplots(figsize=(8, 4.8), layout="constrained")[1])
ax.set(xlabel=r"$\theta_0$ (intercept)", ylabel=r"$\theta_1$ (slope)")
plt.show()

# %% [markdown]
# The two plain paths differ from the first step on; the two natural paths are the same up to rounding. Damping breaks this: it
# adds a multiple of the identity, which measures Euclidean length again and has units. That is one more reason to keep it
# small.
#
# These coordinates were related by a linear map. If the map is curved, a step of finite length is a straight line in one set of
# coordinates and a curve in the other, and the paths agree only in the limit of small learning rates. The example is the normal
# distribution in $(\mu, \sigma)$ and in $(\mu, \log \sigma)$. The time $t$, the rate times the number of steps, is one for all
# rates:


# %%
def normal_of_log_scale(theta):
    return jf.Normal(theta[0], jnp.exp(theta[1]))


def flow(model):
    exact = lambda params, x: jf.exact_fisher(model)(params)
    direction = jf.natural_grad(jf.log_likelihood(model), exact, damping=0.0)

    def run(start, steps):
        return jax.lax.fori_loop(0, steps, lambda _, params: params - direction(params, numbers) / steps, start)

    return jax.jit(run)


in_scale, in_log_scale = flow(normal), flow(normal_of_log_scale)
print("learning rate    difference at t = 1")
differences = []
for steps in (25, 50, 100, 200):
    by_scale = in_scale(jnp.array([0.0, 3.0]), steps)
    by_log = in_log_scale(jnp.array([0.0, jnp.log(3.0)]), steps)
    differences.append(float(jnp.max(jnp.abs(by_scale - jnp.array([by_log[0], jnp.exp(by_log[1])])))))
    print(f"{1 / steps:13g}    {differences[-1]:.5f}")
ratios = np.array(differences[:-1]) / differences[1:]
np.testing.assert_allclose(ratios, 2, rtol=0.1)

# %% [markdown]
# Halving the rate halves the difference. So in the limit the paths are the same curve, and they differ only because the steps
# are finite.
#
# All of this holds for the exact Fisher. [Notebook 3](03_empirical_fisher.ipynb) shows what is lost when the data's own
# targets take the place of the model's.
