"""Loops: a gradient in a carry may be summed after the loop only if no step reads it; scores agree with plain gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs.evaluate import traced

import jaxfisher as jf

STEPS = {
    "kept": lambda w, c, z: c,
    "a sum": lambda w, c, z: c + z @ w,
    "a sum of the same": lambda w, c, z: c + z[:, :1] @ w[:1] * jnp.ones((2, 1)),
    "a sum with a constant": lambda w, c, z: c + z @ w + 1.0,
    "twice": lambda w, c, z: c + z @ w + jnp.tanh(z) @ w,
    "doubled": lambda w, c, z: c + c + z @ w,
    "scaled": lambda w, c, z: 0.5 * c + z @ w,
    "residual": lambda w, c, z: c + jnp.tanh(c @ w),
    "recurrent": lambda w, c, z: jnp.tanh(c + z @ w),
}
"""Steps from a weight, a carry and an input to the next carry."""

READS = {
    "nothing": lambda w, old, new: jnp.zeros(()),
    "the old carry": lambda w, old, new: jnp.sum(old**2),
    "the new carry": lambda w, old, new: jnp.sum(new**2),
    "both, with the weight": lambda w, old, new: jnp.sum((old @ w) * new),
}
"""What a step reads for its output."""


@pytest.mark.parametrize("name", STEPS)
def test_a_carry_is_left_to_be_summed_afterwards_only_where_nothing_reads_it(name):
    """Every way to change a carry, with every way to read it, a start that is learnt or not, and inputs scanned or closed over.

    For each step and read there are two of the four combinations of start and input: in turn those whose flags are equal, and
    those whose flags differ.
    """

    def log_prob(reads, learnt, scanned):
        def function(p, z):
            def step(carry, x):
                new = STEPS[name](p["w"], carry, x if scanned else z[0])
                return new, reads(p["w"], carry, new)

            start = p["start"] if learnt else jnp.ones((2, 2))
            last, read = jax.lax.scan(step, start, z if scanned else None, length=3)
            return jnp.sum(jnp.cos(last)) + jnp.sum(read)

        return function

    cells = itertools.product(enumerate(READS.values()), (False, True))
    turn = list(STEPS).index(name)
    functions = [log_prob(reads, learnt, learnt ^ bool((i + turn) % 2)) for (i, reads), learnt in cells]
    rng = np.random.default_rng(0)
    params = {"w": 0.3 * rng.standard_normal((2, 2)), "start": rng.standard_normal((2, 2))}
    z = rng.standard_normal((4, 3, 2, 2))

    @traced
    def both(params, z):
        made = [jf.scores(function)(params, z).as_matrix() for function in functions]
        plain = [jax.vmap(jax.grad(function), (None, 0))(params, z) for function in functions]
        return made, [jnp.concatenate([g.reshape(len(z), -1) for g in jax.tree.leaves(tree)], 1) for tree in plain]

    for made, plain in zip(*both(params, z), strict=True):
        np.testing.assert_allclose(made, plain, atol=1e-12 * np.max(np.abs(plain)), rtol=0)
