"""The public functions that no other script calls on examples spread over devices, against NumPy; run by `test_sharding`.

Examples are padded by three of weight zero, where they can have weights. Prints a line of JSON for each public name: the
largest difference, relative to the largest number.
"""

import functools
import json

import jax
import jax.numpy as jnp
import optax
import stack
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs.evaluate import evaluated, in_numpy
from sharded import EXAMPLES, model, off, problem

import jaxfisher as jf

LOG_PROB = jf.log_likelihood(model)


def of_one_fisher(params, x, y, weights, key):
    """The quantities of a Fisher, by public name."""
    F = jf.exact_fisher(model)(params, x, weights=weights)
    few = {"num_matvecs": 5}
    return {
        "covariance": jf.covariance(F + jf.scaled_identity(F, 0.1), EXAMPLES).diagonal(),
        "estimate_diagonal": jf.estimate_diagonal(F, key, max_samples=4).value,
        "estimate_logdet": jf.estimate_logdet(F, key, 0.1, max_samples=2, **few).value,
        "low_rank": jf.low_rank(F, 4).trace(),
        "marginal": jf.marginal(F + jf.scaled_identity(F, 0.1), lambda path: "c" in path).as_matrix(),
        "partial_cholesky": jf.partial_cholesky(F, 4).solve(jax.tree.map(jnp.ones_like, params), 0.1),
        "self_influence": jf.self_influence(LOG_PROB, F, EXAMPLES)(params, (x, y), damping=0.1)[0],
        "spectral_density": jf.spectral_density(F, key, jnp.array([0.1, 1.0]), width=0.3, num_samples=2, **few).value,
    }


def of_pieces(params, x, y, weights, key):
    """The quantities of a Fisher in pieces."""
    P = jf.exact_fisher(model, batch_size=8)(params, x, weights=weights)
    return {
        "dense": jf.dense(P).as_matrix(),
        "effective_dimension": jf.effective_dimension(P, 0.1),
        "estimate_trace": jf.estimate_trace(P, key, max_samples=4).value,
        "ewc_penalty": jax.grad(jf.ewc_penalty(jf.diagonal(P), params))(further(params)),
        "kronecker_reduce": jf.kronecker_reduce(P).solve(jax.tree.map(jnp.ones_like, params), 0.1),
        "relative_damping": jf.relative_damping(P, 0.1),
        "spectrum": jf.spectrum(P).eigenvalues,
    }


def of_data(params, x, y, weights, key):
    """The functions that take the examples themselves, their scores, or several Fishers."""
    F = jf.exact_fisher(model)(params, x, weights=weights)
    E = jf.empirical_fisher(LOG_PROB)(params, x, y, weights=weights)
    ones, moved = jax.tree.map(jnp.ones_like, params), further(params)
    scores = jf.scores(LOG_PROB)(params, x, y)
    posterior = jf.laplace(model, params, x, y, prior=1.0, view=jf.diagonal)
    log_psi = lambda params, x: jnp.tanh(x @ params["a"] + params["b"]) @ params["c"][:, 0]  # noqa: E731
    return {
        "acceleration": jf.acceleration(model)(params, ones, x),
        "energy_gradient": jf.energy_gradient(log_psi)(params, x, y * 1.0),
        "fisher_average": jf.fisher_average([params, moved], [jf.diagonal(F), jf.diagonal(E)], 0.1)[0],
        "fisher_from_scores": jf.fisher_from_scores(scores).solve(ones, 0.1),
        "fit": jf.fit(model, max_steps=2, penalty=ridge)(params, x, y, weights=weights).params,
        "least_squares": jf.least_squares(scores, jnp.ones(EXAMPLES), 0.1)[0],
        "monte_carlo_kl": jf.monte_carlo_kl(of_input)(params, moved, x, weights=weights),
        "tune_prior": jf.tune_prior(posterior, max_steps=2).log_evidence(),
    }


def further(params):
    return jax.tree.map(lambda leaf: leaf + 0.1, params)


def of_input(params, x):
    return model(params, x).log_prob(0)


def ridge(params, *data, weights):
    return 0.5 * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params))


def optimisers():
    """Transformations by public name."""
    return {
        "adapt_damping": jf.adapt_damping(jf.natural_gradient(1.0), 0.1),
        "backtrack_kl": optax.chain(jf.natural_gradient(1.0, 0.1), jf.backtrack_kl(0.01)),
        "geodesic_acceleration": optax.chain(jf.natural_gradient(1.0, 0.1), jf.geodesic_acceleration(0.1)),
        "quadratic_model": optax.chain(jf.scale_by_fisher(0.1, view=jf.kronecker), jf.quadratic_model(0.1)),
        "scale_to_kl": optax.chain(jf.scale_by_fisher(0.1, momentum=0.9), optax.scale(-1.0), jf.scale_to_kl(0.01)),
    }


def trained(name, opt, params, x, y, weights, key):
    """Two steps, as a loop that is compiled once."""
    step = jf.training_step(model, opt)
    once = lambda kept, _: (step(*kept, x, y, weights=weights)[:2], None)  # noqa: E731
    return {name: jax.lax.scan(once, (params, opt.init(params)), length=2)[0][0]}


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    params, x, y = problem()
    given = params, x, y, jnp.where(jnp.arange(EXAMPLES) < EXAMPLES - 3, 1.0, 0.0), jax.random.key(7)
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    places = everywhere, apart, apart, apart, everywhere
    spread = tuple(map(jax.device_put, given, places))
    # Several programs, since compiling a single one takes half as long again.
    asked = of_one_fisher, of_pieces, of_data, *(functools.partial(trained, *each) for each in optimisers().items())
    for answers in asked:
        expected = evaluated(answers, *given)
        for name, value in jax.jit(answers)(*spread).items():
            print(json.dumps({"name": name, "off": off(expected[name], value)}))


if __name__ == "__main__":
    stack.run(main)
