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
# # The Fisher as a precision
#
# At the end you will know how to turn a Fisher into error bars: draws from a Laplace posterior, predictive bands, the evidence
# for a model, and the number of parameters that the data actually determine.
#
# Near the best parameters $\theta$ the log-likelihood of $n$ examples is close to a quadratic, and on average over the
# model's own predictions the matrix of that quadratic is $n F$. With a Gaussian prior of precision $\alpha$ on every parameter,
# the posterior is close to a Gaussian,
#
# $$\mathrm{N}(\theta, P^{-1}), \qquad P = n F + \alpha I,$$
#
# called Laplace's approximation. Everything below comes from methods of the operator $P$, first for a model
# whose posterior is known in closed form, then for a small network.

# %%
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.special
import scipy.stats
import statsmodels.api as sm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct

import jaxfisher as jf
from jaxfisher import plot

jax.config.update("jax_enable_x64", True)  # evidence is compared with closed forms to many digits
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## The data
#
# The data are Engel's households of 1857: the yearly income of families of Belgian workers and what they spent on food. Half of
# the households, drawn at random, are for fitting. The logarithm of the income and the expenditure are standardised to mean
# zero and unit variance.

# %%
table = sm.datasets.engel.load_pandas().data / 1000  # thousand Belgian francs
income, food = table["income"].to_numpy(), table["foodexp"].to_numpy()
shuffled = np.random.default_rng(0).permutation(len(income))
fitted, held_out = shuffled[: len(income) // 2], shuffled[len(income) // 2 :]
n = len(fitted)


def standard(values):
    """The function that brings the fitted ones of these to mean zero and unit variance."""
    mean, scale = np.mean(values[fitted]), np.std(values[fitted])
    return lambda new: jnp.asarray((new - mean) / scale)


x_of, y_of = standard(np.log(income)), standard(food)
x, y = x_of(np.log(income[fitted])), y_of(food[fitted])
x_new, y_new = x_of(np.log(income[held_out])), y_of(food[held_out])
shown = np.geomspace(0.3, 6.0, 60)  # incomes for pictures
x_shown = x_of(np.log(shown))
print(f"{n} households to fit, {len(held_out)} held out; incomes from {income.min():.2f} to {income.max():.2f} thousand francs")

# %% [markdown]
# ## A model for which everything is known
#
# The model is a sum of twelve bumps, linear in its weights, with known noise. Its Fisher does not depend on the weights and its
# posterior *is* Gaussian, so Laplace's approximation is exact. `n * F + jf.scaled_identity(F, alpha)` is the posterior
# precision, an operator in the form of F. One solve with it gives the posterior mean.

# %%
NOISE, ALPHA, CENTRES = 0.4, 1.0, jnp.linspace(-3.0, 5.0, 12)


def bumps(x):
    return jnp.exp(-0.5 * (x[..., None] - CENTRES) ** 2)


def linear(weights, features):
    return jf.Normal(features @ weights, NOISE)


@jax.jit
def log_likelihood_of(weights):
    return jnp.sum(jax.vmap(jf.log_likelihood(linear), (None, 0, 0))(weights, bumps(x), y))


@jax.jit
def posterior(alpha):
    """The Fisher, the precision and the mean of the posterior under a prior of that precision."""
    origin = jnp.zeros(len(CENTRES))
    fisher = jf.exact_fisher(linear)(origin, bumps(x))
    precision = n * fisher + jf.scaled_identity(fisher, alpha)
    return fisher, precision, precision.solve(jax.grad(log_likelihood_of)(origin), damping=0.0)


F, P, weights = posterior(ALPHA)
print(P)

design = np.asarray(bumps(x)) / NOISE
covariance = np.linalg.inv(design.T @ design + ALPHA * np.eye(P.size))
np.testing.assert_allclose(weights, covariance @ design.T @ (np.asarray(y) / NOISE), rtol=1e-8)

# %% [markdown]
# ### Draws
#
# White noise multiplied by $P^{-1/2}$ has covariance $P^{-1}$. `inv_sqrt_mv` does this multiplication, and a draw from the
# posterior is the mean plus the result. Under `vmap` the factorisation is computed once for all draws.

# %%
DRAWS = 4000


@jax.jit
def deviations(precision, like, key):
    """Draws from the Gaussian of mean zero and this precision, shaped like the parameters."""

    def one(key):
        return precision.inv_sqrt_mv(optax.tree.random_like(key, like))

    return jax.vmap(one)(jax.random.split(key, DRAWS))


draws = weights + deviations(P, weights, jax.random.key(0))
sample = np.cov(draws, rowvar=False)
# The variance of an entry of a sample covariance of Gaussians.
error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / DRAWS)
z = (sample - covariance) / error
print(f"{DRAWS} draws: the covariance is off by {np.sqrt(np.mean(z**2)):.2f} standard errors, at worst {np.abs(z).max():.1f}")
assert np.abs(z).max() < 5

# %% [markdown]
# ### Predictive bands
#
# The band of a prediction $\phi(x)^\top w$ is the spread of the draws at $x$, or, without the noise of the draws, the length of
# $P^{-1/2} \phi$. scikit-learn computes the same posterior by another route, without a Fisher: a Gaussian process whose kernel
# is the inner product of the bumps.


# %%
def process(alpha):
    kernel = ConstantKernel(1 / alpha) * DotProduct(0.0, "fixed")
    return GaussianProcessRegressor(kernel, alpha=NOISE**2, optimizer=None).fit(bumps(x), y)


exact_mean, exact_std = process(ALPHA).predict(bumps(x_shown), return_std=True)
features = bumps(x_shown)
by_root = np.linalg.norm(jax.jit(jax.vmap(P.inv_sqrt_mv))(features), axis=1)
by_draws = np.std(draws @ features.T, axis=0)
np.testing.assert_allclose(features @ weights, exact_mean, atol=1e-8)
np.testing.assert_allclose(by_root, exact_std, rtol=1e-6)
z = (by_draws / exact_std - 1) * np.sqrt(2 * DRAWS)
print(f"bands against the Gaussian process: by the root to {np.max(np.abs(by_root / exact_std - 1)):.0e}, relative;")
print(f"by draws to {np.sqrt(np.mean(z**2)):.2f} standard errors, at worst {np.abs(z).max():.1f}")
assert np.abs(z).max() < 5

# %% [markdown]
# ### The log-determinant as evidence
#
# The evidence of a model is the probability that it gives to the data, with its parameters integrated out. If the posterior is
# a Gaussian, that integral is
#
# $$\log Z = \log p(y | \theta) - \frac{\alpha}{2} \lVert \theta \rVert^2 + \frac{p}{2} \log \alpha
# - \frac{1}{2} \log \det P,$$
#
# with $\theta$ the posterior mean and $p$ the number of parameters. It needs no held-out data. The log-determinant penalises
# complexity: the more precisely the data determine a parameter, the more it costs, and a parameter that they do not determine
# costs nothing.


# %%
def log_evidence(log_likelihood, params, precision, alpha):
    prior = 0.5 * precision.size * jnp.log(alpha) - 0.5 * alpha * optax.tree.norm(params, squared=True)
    return log_likelihood + prior - 0.5 * precision.logdet(damping=0.0)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def evidence_of_linear(alpha):
    """The log evidence; the effective dimension, and the squared norm of the posterior mean."""
    fisher, precision, mean = posterior(alpha)
    evidence = log_evidence(log_likelihood_of(mean), mean, precision, alpha)
    return evidence, (jf.effective_dimension(fisher, alpha / n), jnp.sum(mean**2))


alphas = np.geomspace(1e-3, 1e2, 26)
linear_path = [evidence_of_linear(alpha) for alpha in alphas.tolist()]
curve = np.array([value for (value, _), _ in linear_path])
known = np.array([process(alpha).log_marginal_likelihood_value_ for alpha in alphas[::5]])
print("prior precision    log evidence    of the Gaussian process")
for row in zip(alphas[::5], curve[::5], known, strict=True):
    print("{:15.3g}    {:12.3f}    {:23.3f}".format(*row))
np.testing.assert_allclose(curve[::5], known, rtol=1e-8)

# %% [markdown]
# ### How many parameters do the data determine?
#
# `jf.effective_dimension(F, damping)` with the damping $\alpha / n$ is MacKay's number of well-determined parameters,
#
# $$\gamma = \mathrm{tr}\, F (F + \frac{\alpha}{n} I)^{-1} = \sum_k \frac{\lambda_k}{\lambda_k + \alpha / n},$$
#
# which in linear regression is the trace of the matrix that maps targets to fitted values. It also tells where the evidence is
# largest: there
#
# $$\alpha \frac{\partial \log Z}{\partial \alpha} = \frac{1}{2} (\gamma - \alpha \lVert \theta \rVert^2)$$
#
# is zero, and iterating $\alpha \leftarrow \gamma / \lVert \theta \rVert^2$ finds that prior. The left-hand side comes from
# `jax.grad` through the solve and the log-determinant.

# %%
hat = design @ covariance @ design.T
(_, (gamma, _)), _ = evidence_of_linear(ALPHA)
print(f"{gamma:.4f} of {F.size} parameters are determined; the trace of the hat matrix is {np.trace(hat):.4f}")
np.testing.assert_allclose(gamma, np.trace(hat), rtol=1e-8)
for alpha, ((_, (gamma, squared)), slope) in zip(alphas, linear_path, strict=True):
    np.testing.assert_allclose(alpha * slope, 0.5 * (gamma - alpha * squared), atol=1e-8 * alpha * squared)

best = ALPHA
for _ in range(30):
    (value, (gamma, squared)), _ = evidence_of_linear(best)
    best = float(gamma / squared)
print(f"the iteration ends at a prior precision of {best:.3f}, with {gamma:.1f} parameters determined")
assert np.all(value >= curve)

# %%
INK = {"data": "0.35", "mean": "#0072B2", "band": "#56B4E9", "process": "#D55E00"}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(3, 2))


def in_francs(standardised):
    return np.mean(food[fitted]) + np.std(food[fitted]) * np.asarray(standardised)


def household_axes(ax):
    ax.plot(income[fitted], food[fitted], ".", color=INK["data"], markersize=4, label="households fitted")
    ax.set(xscale="log", xlabel="income (thousand francs a year)", xlim=(shown[0], shown[-1]), ylim=(0, 3))
    ax.set_xticks([0.3, 0.5, 1, 2, 5], labels=["0.3", "0.5", "1", "2", "5"])
    ax.xaxis.minorticks_off()


mean = features @ weights
household_axes(left)
left.fill_between(
    shown, in_francs(mean - 2 * by_draws), in_francs(mean + 2 * by_draws), color=INK["band"], alpha=0.5, label="draws"
)
left.plot(shown, in_francs(mean), color=INK["mean"], label="posterior mean")
for sign in (-2, 2):
    edge = in_francs(exact_mean + sign * exact_std)
    left.plot(shown, edge, "--", color=INK["process"], label="Gaussian process" if sign > 0 else None)
left.set(ylabel="food (thousand francs a year)", title="the mean, plus and minus two standard deviations")
left.legend(loc="upper left")
right.plot(alphas, curve, color=INK["mean"], label="Laplace")
right.plot(alphas[::5], known, "s", color=INK["process"], markerfacecolor="none", label="Gaussian process")
right.axvline(best, color="0.4", linestyle=":", label="end of the iteration")
right.set(xscale="log", xlabel="prior precision", ylabel="log evidence (nats)")
right.legend(loc="lower center")
plt.show()

# %% [markdown]
# The band is narrow where there are many households and widens where there are none. Every result of the operator agrees
# with the known posterior. From here on Laplace's method is an approximation.
#
# ## A small network
#
# The noise is not constant: the spending of rich families varies more. So the network returns a mean and the logarithm of a
# scale, and the exact Fisher covers both. It is fitted with the prior, for several prior precisions side by side, by natural
# gradients whose curvature is $F + \frac{\alpha}{n} I$. The fit continues until the gradient is zero, since Laplace's
# approximation is one around a maximum.


# %%
def outputs(params, x):
    return jnp.tanh(x * params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def of_outputs(out):
    return jf.Normal(out[..., 0], jnp.exp(out[..., 1]))


def network(params, x):
    return of_outputs(outputs(params, x))


log_prob = jf.log_likelihood(network)
keys = jax.random.split(jax.random.key(0), 3)
start = {
    "w1": jax.random.normal(keys[0], (8,)),
    "b1": jax.random.normal(keys[1], (8,)),
    "w2": 0.3 * jax.random.normal(keys[2], (8, 2)),
    "b2": jnp.zeros(2),
}


def fit(alpha):
    """The parameters of the largest posterior density, and the size of its gradient there."""

    def loss(params):
        data = -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))
        return data + 0.5 * alpha / n * optax.tree.norm(params, squared=True)

    opt = jf.adapt_damping(jf.natural_gradient(learning_rate=1.0), damping=1e-2)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        fisher = jf.exact_fisher(network)(params, x)
        fisher = fisher + jf.scaled_identity(fisher, alpha / n)
        updates, state = opt.update(gradient, state, params, fisher=fisher, value=value, value_fn=loss)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(gradient)

    (params, _), size = jax.lax.scan(step, (start, opt.init(start)), length=300)
    return params, size[-1]


ALPHAS = jnp.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
fits, sizes = jax.jit(jax.vmap(fit))(ALPHAS)
print("size of the gradient at the end:", *(f"{size:.0e}" for size in sizes))
assert jnp.all(sizes < 1e-3)

# %% [markdown]
# Now the evidence chooses the prior. The picture compares it with the log-likelihood of the held-out households, which the
# evidence does not use, and with the evidence from the Hessian at the data, `jf.observed_information`, in place of its
# expectation.


# %%
@jax.jit
@jax.vmap
def looked_at(params, alpha):
    fisher, hessian = jf.exact_fisher(network)(params, x), jf.observed_information(log_prob)(params, x, y)
    total = jnp.sum(jax.vmap(log_prob, (None, 0, 0))(params, x, y))
    unseen = jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x_new, y_new))
    evidences = [log_evidence(total, params, n * H + jf.scaled_identity(H, alpha), alpha) for H in (fisher, hessian)]
    return total / n, unseen, *evidences, jf.effective_dimension(fisher, alpha / n)


print("prior        log-likelihood per household      log evidence with the      parameters determined,")
print(f"precision         fitted     held out           Fisher     Hessian         of {optax.tree.size(start)}")
fitted_well, unseen, evidence, with_hessian, dimension = np.array(looked_at(fits, ALPHAS))
for row in zip(ALPHAS, fitted_well, unseen, evidence, with_hessian, dimension, strict=True):
    print("{:9.1f}       {:8.3f}     {:8.3f}         {:8.2f}    {:8.2f}         {:6.2f}".format(*map(float, row)))
chosen = int(np.argmax(evidence))
assert unseen[chosen] > np.max(unseen) - 0.02
assert np.all(np.isfinite(evidence)) and np.all(np.diff(dimension) < 0) and np.all(np.diff(fitted_well) < 0)

# %% [markdown]
# With a weak prior the model fits best but predicts the held-out households badly. The evidence shows this without seeing them,
# and its choice is as good as the best on those households. The Hessian is a different quadratic. If it is not positive
# definite, its log-determinant is NaN rather than a meaningless number; the Fisher is never negative. Where both exist, their
# difference tells how many nats of the evidence depend on the approximation.
#
# The spectrum shows what "determined" means. Eigenvalues of $F$ above $\alpha / n$ belong to directions that the data
# determine. In the directions below it, which are most of them, the posterior is as wide as the prior. (On the left, the curve
# of the held-out households is far below the picture at the weakest prior.)

# %%
alpha, params = ALPHAS[chosen], jax.tree.map(lambda leaf: leaf[chosen], fits)
F = jax.jit(lambda params, x: jf.dense(jf.exact_fisher(network)(params, x)))(params, x)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
left.plot(ALPHAS, evidence, "-o", color="#0072B2", label="log evidence (nats)")
left.plot(ALPHAS, unseen * len(held_out), "--s", color="#D55E00", label="log-likelihood held out (nats)")
left.set(xscale="log", xlabel="prior precision", ylabel="nats, all households together", ylim=(-120, 0))
left.legend(loc="lower center")
plot.spectrum(F, damping=float(alpha) / n, ax=right)
right.set_ylim(1e-10, None)
plt.show()

# %% [markdown]
# ### Bands of the network
#
# A draw of the parameters is again the maximum plus $P^{-1/2}$ times white noise. There are two ways to predict with it.
# One puts the parameters into the network. The other keeps the approximation that led to $P$: it replaces the network by its
# tangent at the maximum, $f(\theta) + J u$, with one `jax.jvp` per draw.


# %%
@jax.jit
def predictions(params, deviations, x):
    """What tangent and network give for each draw: distributions with batch axes [draws, x]."""

    def all_outputs(params):
        return jax.vmap(outputs, (None, 0))(params, x)

    at_maximum = all_outputs(params)
    tangent = jax.vmap(lambda u: at_maximum + jax.jvp(all_outputs, (params,), (u,))[1])(deviations)
    network = jax.vmap(lambda u: all_outputs(optax.tree.add(params, u)))(deviations)
    return of_outputs(at_maximum), of_outputs(tangent), of_outputs(network)


P = n * F + jf.scaled_identity(F, alpha)
both = predictions(params, deviations(P, params, jax.random.key(1)), jnp.concatenate([x_shown, x_new]))
in_picture = jax.tree.map(lambda leaf: leaf[..., : len(shown)], both)
at_held_out = jax.tree.map(lambda leaf: leaf[..., len(shown) :], both)
plug_in, tangent, sampled = in_picture

# The same by NumPy, from the Jacobian alone: a normal has information 1 / scale^2 on its mean and 2 on its log scale.
flat, unravel = jax.flatten_util.ravel_pytree(params)
jacobian = jax.jit(jax.vmap(jax.jacrev(lambda flat, x: outputs(unravel(flat), x)), (None, 0)))
rows = np.asarray(jacobian(flat, jnp.concatenate([x, x_shown])))
scale = np.exp(np.asarray(outputs(params, x[:, None]))[:, 1:])
on_mean, on_scale = rows[:n, 0] / scale, rows[:n, 1]
dense = on_mean.T @ on_mean + 2 * on_scale.T @ on_scale + float(alpha) * np.eye(F.size)
np.testing.assert_allclose(P.as_matrix(), dense, atol=1e-10 * np.abs(dense).max())
band = np.sqrt(np.sum(rows[n:, 0].T * np.linalg.solve(dense, rows[n:, 0].T), axis=0))
z = (np.std(tangent.loc, axis=0) / band - 1) * np.sqrt(2 * DRAWS)
print(
    f"tangent's band by draws against J P^-1 J^T: {np.sqrt(np.mean(z**2)):.2f} standard errors, at worst {np.abs(z).max():.1f}"
)
assert np.abs(z).max() < 5


# %%
def interval(predicted, key):
    """Where the middle nine tenths of the target lie, the uncertainty of the parameters included."""
    noise = jax.random.normal(key, (DRAWS, 1))
    return in_francs(np.quantile(predicted.loc + predicted.scale * noise, [0.05, 0.95], axis=0))


fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
noise_only = plug_in.loc + 1.645 * plug_in.scale * np.array([-1, 1])[:, None]
for ax, title, predicted in zip(axes, ("the tangent", "the network"), (tangent, sampled), strict=True):
    household_axes(ax)
    ax.fill_between(shown, *interval(predicted, jax.random.key(2)), color="0.85", label="90% of households")
    ax.fill_between(
        shown, *in_francs(np.quantile(predicted.loc, [0.05, 0.95], axis=0)), color=INK["band"], alpha=0.7, label="90% of means"
    )
    for k, edge in enumerate(in_francs(noise_only)):
        ax.plot(shown, edge, "--", color=INK["process"], label=None if k else "90%, noise alone")
    ax.plot(shown, in_francs(plug_in.loc), color=INK["mean"], label="mean at the maximum")
    ax.set_title(f"draws put into {title}")
axes[0].set_ylabel("food (thousand francs a year)")
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# Where there are households the parameters are known well enough, and the band is almost entirely noise. Beyond the richest
# families of the fit the mean itself becomes uncertain, and the band widens. Draws that are put into the network give bands
# that are far too wide, even where there are most data: in the many directions of eigenvalue zero the draws are as wide as the
# prior, and along these directions only the tangent is flat, not the network.
#
# ### Does it help?
#
# The held-out households decide. We compute the mean log of the predictive density, which is a mixture over the draws, and how
# many households fall into the central 90 % intervals.


# %%
def judged(predicted):
    """The log predictive density of every household held out, and whether it falls into the interval."""
    mixture = scipy.stats.norm(predicted.loc, predicted.scale)
    log_density = scipy.special.logsumexp(mixture.logpdf(y_new), axis=0) - np.log(len(predicted.loc))
    below = np.mean(mixture.cdf(y_new), axis=0)
    return log_density, (below > 0.05) & (below < 0.95)


maximum, of_tangent, of_network = at_held_out
maximum = jax.tree.map(lambda leaf: leaf[None], maximum)
scores = {}
print("                 log predictive density    in the 90% interval")
for name, predicted in {"maximum alone": maximum, "tangent": of_tangent, "network": of_network}.items():
    scores[name], inside = judged(predicted)
    print(f"{name:15s}  {np.mean(scores[name]):22.3f}    {np.mean(inside):19.1%}")
gain = scores["tangent"] - scores["maximum alone"]
print(f"gain of the tangent over the maximum: {np.mean(gain):.4f}, standard error {np.std(gain) / len(gain) ** 0.5:.4f}")
assert np.mean(scores["network"]) < np.mean(scores["tangent"]) - 0.5

# %% [markdown]
# What to take home:
#
# - `n * F + jf.scaled_identity(F, alpha)` is a posterior precision; `inv_sqrt_mv` draws from the posterior, `logdet` gives the
#   evidence, and `jf.effective_dimension(F, alpha / n)` counts the determined parameters.
# - Use the tangent for predictions. With so many households for so few determined parameters, its bands hardly differ from
#   those of the maximum alone on households like those of the fit; they differ where there are none.
# - A view in place of F, such as `jf.kronecker(F)`, has the same methods, for networks whose exact Fisher is too large.
# - Laplace's approximation describes one maximum. It misses other maxima, and posteriors that are not close to a Gaussian.
