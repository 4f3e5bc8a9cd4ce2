"""Answers where examples are spread over explicit axes of a mesh, against those of one device; run by `test_sharding`.

Answers are computed one by one, training steps inside ``jit``. Prints a line of JSON for each: the largest difference, relative
to the largest number.
"""

import json

import jax
import numpy as np
import optax
import stack
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import LOG_PROB, answers, model, problem
from programs.evaluate import evaluated, in_numpy

import jaxfisher as jf
from jaxfisher import design, statistics

EXAMPLES, DEVICES = 8, 2


def noisy(params, x, key):
    """The model with a random key for each example."""
    return model(params, x * jax.random.uniform(key, x.shape, x.dtype))


def trained(params, keys, x, y):
    """Steps of the optimisers that users train with, in the ways they are called."""
    exact, drawn = jf.natural_gradient(0.1, 0.1), jf.kfac(like=jf.exact_fisher(model)(params, x))
    by_factors, state, _ = jf.training_step(model, drawn)(params, drawn.init(params), x, y)
    in_pieces = jf.training_step(noisy, exact, jf.exact_fisher(noisy, batch_size=3))
    steps = {
        "step": jf.training_step(model, exact)(params, exact.init(params), x, y)[0],
        "kfac": by_factors,
        "direction's damping": state.inner.direction_damping,
        "noisy": in_pieces(params, exact.init(params), x, y, key=keys[0], counts=y + 1)[0],
        "descent": jax.tree.map(lambda p, d: p - 0.1 * d, params, jf.natural_grad(LOG_PROB, damping=0.1)(params, x, y)),
    }
    forms = [float(len(leaf.form)) for leaf in jf.explain(model)(params, x).leaves]
    return {"explained": jax.numpy.array(forms)} | {
        name: jax.flatten_util.ravel_pytree(found)[0] for name, found in steps.items()
    }


def ridged(information):
    """A criterion that is finite where the information is singular."""
    return jax.numpy.linalg.slogdet(information + 0.1 * jax.numpy.eye(len(information)))[1]


def jobs(params, keys, x, y):
    """The quantities that jobs other than training need."""
    F, E, n = jf.exact_fisher(model)(params, x), jf.empirical_fisher(LOG_PROB)(params, x, y), len(x)
    made = {
        "clipped": jf.clipped_grad(LOG_PROB, 0.5, batch_size=4)(params, x, y)[0],
        "standard errors": jf.standard_errors(F + jf.scaled_identity(F, 0.1), n),
        "sandwich": jf.sandwich(F + jf.scaled_identity(F, 0.1), E, n).diagonal(),
        "influence": jf.influence(LOG_PROB, F, n)(params, (x[:4], y[:4]), (x, y), 0.1),
        "self-influence": jf.self_influence(LOG_PROB, jf.diagonal(F), n, batch_size=5)(params, (x, y), 0.1),
        "clusters": statistics.meat(LOG_PROB)(params, x, y, groups=y).trace() * statistics.cluster_factor(y, 2),
        "design": design.optimal_weights(design.informations(model)(params, x), ridged, max_steps=2).value,
        "tracin": jf.tracin(LOG_PROB)([params, params], (x[:4], y[:4]), (x, y), np.array([0.1, 0.2])),
        "evidence": jf.laplace(model, params, x, y, prior=1.0, view=jf.kronecker).log_evidence(),
    }
    return {name: jax.flatten_util.ravel_pytree(value)[0] for name, value in made.items()}


def solves(params, keys, x, y):
    """Solves of every other kind, and other views."""
    F, E = jf.exact_fisher(model)(params, x), jf.empirical_fisher(LOG_PROB)(params, x, y)
    ones = jax.tree.map(jax.numpy.ones_like, params)
    curvature = jf.gauss_newton(
        lambda params, x: model(params, x).logits, lambda logits, y: -jf.Categorical(logits).log_prob(y)
    )
    made = {
        "Gauss-Newton": curvature(params, x, y).trace(),
        "path": jf.solve_path(F, ones, jax.numpy.array([0.1, 1.0]))[0],
        "eigenvectors of factors": jf.eigen_kronecker(F).solve(ones, 0.1),
        "two views": jf.factored_solve(jf.kronecker(F) + jf.kronecker(E), ones, 0.1)[0],
        "LSMR": jf.solve(F, ones, 0.1, solver=jf.LSMR(rtol=1e-14))[0],
        "sketch": jf.sketch(F, 4).trace(),
        "low rank": jf.nystrom(F, keys[0], 4).solve(ones, 0.1),
    }
    return {name: jax.flatten_util.ravel_pytree(value)[0] for name, value in made.items()}


def in_a_loop(params, keys, x, y):
    """Two steps as a loop, so that the step is compiled once."""
    step = jf.training_step(model, optax.MultiSteps(jf.kfac(), 2).gradient_transformation())
    once = lambda kept, _: (step(*kept, x, y)[:2], None)  # noqa: E731
    found, _ = jax.lax.scan(once, (params, step.init(params, x, y)), length=2)[0]
    return {"two batches a step": jax.flatten_util.ravel_pytree(found)[0]}


@in_numpy()
def main():
    jax.config.update("jax_enable_x64", True)
    params, x, y, key = problem(EXAMPLES)
    mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(AxisType.Explicit,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    # Several programs, since a single one takes longer to compile than all of them together.
    for ask, run in ((answers, answers), *((inside, jax.jit(inside)) for inside in (trained, jobs, solves, in_a_loop))):
        expected = evaluated(ask, params, key[None], x, y)
        with jax.set_mesh(mesh):
            given = (*jax.device_put((params, key[None]), everywhere), *jax.device_put((x, y), apart))
            for name, value in run(*given).items():
                off = np.abs(np.asarray(value) - np.asarray(expected[name])).max() / np.abs(expected[name]).max()
                print(json.dumps({"name": name, "off": float(off)}))


if __name__ == "__main__":
    stack.run(main)
