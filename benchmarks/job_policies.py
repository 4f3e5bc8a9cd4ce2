"""Policies: a TRPO update, against the usual one by conjugate gradients on the Hessian of the KL divergence."""

from __future__ import annotations

from engine import Row, Sizes, compiled, gains, time_in_turn

# isort: split

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import jaxfisher as jf

RADIUS, DAMPING, ITERATIONS = 0.02, 1e-3, 10


def policy(params: Any, seen: jax.Array) -> jf.Normal:
    """A Gaussian policy over one torque."""
    hidden = jnp.tanh(seen @ params["w1"] + params["b1"])
    return jf.Normal(hidden @ params["w2"], jnp.exp(params["log_scale"]))


def surrogate(params: Any, seen: jax.Array, target: Any) -> jax.Array:
    """Minus the mean advantage, estimated from the old policy's samples."""
    acted, advantage, old = target
    new = jax.vmap(jf.log_likelihood(policy), (None, 0, 0))(params, seen, acted)
    return -jnp.mean(advantage * jnp.exp(new - old))


def plain_update(params: Any, seen: jax.Array, target: Any) -> Any:
    """The update as usually written: products with the Hessian of the KL by `jax.jvp` of its gradient, and halving the step."""
    start, unravel = ravel_pytree(params)

    def divergence(flat: jax.Array) -> jax.Array:
        old, new = (jax.vmap(policy, (None, 0))(each, seen) for each in (params, unravel(flat)))
        ratio = (old.scale / new.scale) ** 2
        return jnp.mean(0.5 * (ratio + ((old.loc - new.loc) / new.scale) ** 2 - 1 - jnp.log(ratio)))

    def loss(flat: jax.Array) -> jax.Array:
        return surrogate(unravel(flat), seen, target)

    def product(v: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(divergence), (start,), (v,))[1]

    value, gradient = jax.value_and_grad(loss)(start)
    direction, _ = jax.scipy.sparse.linalg.cg(lambda v: product(v) + DAMPING * v, gradient, maxiter=ITERATIONS, tol=0.0)
    step = -direction * jnp.sqrt(2 * 0.7 * RADIUS / jnp.vdot(direction, product(direction)))

    def outside(k: jax.Array) -> jax.Array:
        new = start + step * 0.5**k
        return ((divergence(new) > RADIUS) | (loss(new) >= value)) & (k < 10)

    return unravel(start + step * 0.5 ** jax.lax.while_loop(outside, lambda k: k + 1, jnp.zeros(())))


def our_update(params: Any, seen: jax.Array, target: Any) -> Any:
    """The update by the library: as many iterations, on products with the Fisher, with the same radii."""
    solver = jf.CG(rtol=1e-3, max_steps=ITERATIONS)
    opt = optax.chain(jf.natural_gradient(1e3, damping=DAMPING, radius=0.7 * RADIUS, solver=solver), jf.backtrack_kl(RADIUS))
    step = jf.training_step(policy, opt, jf.implicit_fisher(policy), loss=surrogate)
    return step(params, opt.init(params), seen, target)[0]


def rows(sizes: Sizes) -> list[Row]:
    """A TRPO update against ten conjugate gradients on Hessian-vector products of the KL."""
    n, hidden = sizes.examples(6400), sizes.widths(3, 32, 1)[1]
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w1": jax.random.normal(keys[0], (3, hidden)),
        "b1": jnp.zeros(hidden),
        "w2": 0.1 * jax.random.normal(keys[1], (hidden,)),
        "log_scale": jnp.zeros(()),
    }
    seen = jax.random.normal(keys[2], (n, 3))
    acted = jax.random.normal(keys[3], (n,))
    old = jax.vmap(jf.log_likelihood(policy), (None, 0, 0))(params, seen, acted)
    target = acted, jnp.tanh(acted * seen[:, 0]), old
    cases = [compiled(each, params, seen, target) for each in (plain_update, our_update)]
    falls = [float(surrogate(case(), seen, target) - surrogate(params, seen, target)) for case in cases]
    note = f"fall of the surrogate {falls[0]:.4f} and {falls[1]:.4f}"
    return [gains(f"3-{hidden}-1, {n:,} states", *time_in_turn(cases, sizes.repeats), goal=1, note=note)]
