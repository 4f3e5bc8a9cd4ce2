"""Every function of the rooms that users import by name, and jobs of several steps, each in a call on tiny data."""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxfisher as jf
from jaxfisher import design, forecasts, geometry, statistics


def counts(params, x):
    """A Poisson regression."""
    return jf.Poisson(params["level"] + params["slope"] * x)


def slope(params):
    return jnp.exp(params["slope"])


def rate(theta):
    """A Poisson distribution in its rate, whose metric is not constant."""
    return jf.Poisson(jnp.log(theta))


def signal(params):
    return params["level"] + params["slope"] * jnp.arange(3.0).astype(params["slope"].dtype)


def spread(params):
    return jnp.exp(params["level"]) * jnp.eye(3, dtype=params["level"].dtype)


def torque(params, x):
    """A policy."""
    return jf.Normal(x @ params["w"] + params["b"], jnp.ones(2))


def surrogate(params, seen, target):
    acted, advantage, old = target
    return -jnp.mean(advantage * jnp.exp(jax.vmap(jf.log_likelihood(torque), (None, 0, 0))(params, seen, acted) - old))


LOG_PROB = jf.log_likelihood(counts)
GROUPS = [0, 0, 1, 1]


@functools.cache
def observed():
    """Parameters, places, and counts."""
    params = {"level": jnp.asarray(0.3), "slope": jnp.asarray(0.2)}
    return params, jnp.arange(4.0), jnp.array([1.0, 0.0, 3.0, 2.0])


@functools.cache
def information():
    return jf.exact_fisher(counts)(*observed()[:2])


@functools.cache
def covariance():
    return jf.covariance(information())


@functools.cache
def candidates():
    return design.informations(counts)(*observed()[:2])


def numbers():
    return jf.Normal(0.3, 1.2), jf.Normal(0.1, 0.8)


def vectors():
    return [jf.MultivariateNormal(jnp.array([mean, 0.2]), jnp.eye(2)) for mean in (0.0, 1.0)]


def policy_update(opt, *fisher):
    """One update inside a trust region, with advantages of either sign."""
    params = {"w": jnp.array([[0.5, -0.3], [0.2, 0.7]]), "b": jnp.array([0.1, -0.2])}
    seen = jnp.array([[0.3, 1.0], [-0.7, 0.4], [1.2, -0.5]])
    target = seen + 0.5, jnp.array([1.0, -0.5, 0.2]), jnp.full(3, -2.0)
    step = jf.training_step(torque, opt, *fisher, loss=surrogate)
    return step(params, opt.init(params), seen, target)


TRPO = optax.chain(jf.natural_gradient(1e3, 0.1, radius=0.01, solver=jf.CG(rtol=1e-2, max_steps=2)), jf.backtrack_kl(0.02))
POLICY_FISHER = jf.implicit_fisher(torque)
PENALTY = statistics.firth(counts)
FAR = geometry.geodesic(rate, steps=8)
ON = geometry.exponential_map(rate, steps=2)
DOWN = geometry.natural_gradient_flow(rate, time=0.5, steps=2)


ROOMS = {
    "statistics.aic": lambda: statistics.aic(LOG_PROB, batch_size=3)(*observed()),
    "statistics.cluster_factor": lambda: statistics.cluster_factor(GROUPS, p=1),
    "statistics.covariance": lambda: jf.covariance(information()).as_matrix(),
    "statistics.cramer_rao_bound": lambda: statistics.cramer_rao_bound(slope)(observed()[0], information()),
    "statistics.delta_method": lambda: statistics.delta_method(slope)(observed()[0], covariance()),
    "statistics.dispersion": lambda: statistics.dispersion(counts, batch_size=3)(*observed()),
    "statistics.firth": lambda: PENALTY(*observed()[:2], weights=None),
    "statistics.fit": lambda: jf.fit(counts, penalty=PENALTY, max_steps=3)(*observed()),
    "statistics.hc1": lambda: statistics.hc1(jnp.full(4, 0.5)),
    "statistics.hc2": lambda: statistics.hc2(jnp.full(4, 0.5)),
    "statistics.hc3": lambda: statistics.hc3(jnp.full(4, 0.5)),
    "statistics.leverages": lambda: statistics.leverages(counts)(*observed()[:2]),
    "statistics.likelihood_interval": lambda: statistics.likelihood_interval(counts, slope)(*observed()),
    "statistics.meat": lambda: statistics.meat(LOG_PROB)(*observed(), groups=GROUPS).as_matrix(),
    "statistics.sandwich": lambda: jf.sandwich(information(), statistics.meat(LOG_PROB)(*observed())).as_matrix(),
    "statistics.score_interval": lambda: statistics.score_interval(counts, slope)(*observed()),
    "statistics.standard_errors": lambda: jf.standard_errors(information()),
    "statistics.tic": lambda: statistics.tic(LOG_PROB)(*observed()),
    "statistics.wald_interval": lambda: statistics.wald_interval(slope)(observed()[0], covariance()),
    "geometry.alpha_divergence": lambda: geometry.alpha_divergence(*numbers(), 0.5),
    "geometry.christoffel": lambda: geometry.christoffel(counts)(*observed()[:2]),
    "geometry.covariance_distance": lambda: geometry.covariance_distance(*vectors()),
    "geometry.distance": lambda: geometry.distance(*numbers()),
    "geometry.exponential_map": lambda: ON(2.0, 0.5),
    "geometry.geodesic": lambda: FAR(1.0, 2.0),
    "geometry.log_jeffreys": lambda: geometry.log_jeffreys(counts)(*observed()[:2]),
    "geometry.mahalanobis_distance": lambda: geometry.mahalanobis_distance(*vectors()),
    "geometry.natural_gradient_flow": lambda: DOWN(2.0, jnp.array([1.0, 4.0])),
    "geometry.renyi_divergence": lambda: geometry.renyi_divergence(*numbers(), 0.5),
    "forecasts.bias": lambda: forecasts.bias(signal, spread)(
        observed()[0], forecasts.gaussian_fisher(signal, spread)(observed()[0]), jnp.array([0.1, 0.0, 0.2])
    ),
    "forecasts.conditional_errors": lambda: forecasts.conditional_errors(information()),
    "forecasts.gaussian_fisher": lambda: forecasts.gaussian_fisher(signal, spread)(observed()[0]).as_matrix(),
    "forecasts.gaussian_prior": lambda: forecasts.gaussian_prior(observed()[0], {"level": 0.5, "slope": 2.0}).as_matrix(),
    "design.a_criterion": lambda: design.a_criterion(jnp.sum(candidates(), 0)),
    "design.d_criterion": lambda: design.d_criterion(jnp.sum(candidates(), 0)),
    "design.e_criterion": lambda: design.e_criterion(jnp.sum(candidates(), 0)),
    "design.exchange": lambda: design.exchange(candidates(), design.d_criterion, jnp.array([0, 2, 3]), max_steps=3),
    "design.informations": lambda: design.informations(counts)(*observed()[:2]),
    "design.optimal_weights": lambda: design.optimal_weights(candidates(), design.d_criterion, max_steps=5),
    "policy, products": lambda: policy_update(TRPO, POLICY_FISHER),
    "laplace, a part": lambda: jf.laplace(counts, *observed(), prior=1.0, keep=lambda path: "slope" in path).log_evidence(),
    "laplace, a prior a leaf": lambda: jf.laplace(counts, *observed(), prior={"level": 0.5, "slope": 2.0}).precision().trace(),
}
