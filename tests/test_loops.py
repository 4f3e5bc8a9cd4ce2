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


def _written_in_steps(w, x):
    held = jax.new_ref(jnp.zeros(2))

    def step(carry, z):
        held[...] = jnp.tanh(z @ w + held[...])
        return carry + jnp.sum(held[...]), held[...] @ w

    last, read = jax.lax.scan(step, 0.0, x)
    return held[...] + last + jnp.sum(read, 0)


def _carried(w, x):
    def step(carry, z):
        last, held = carry
        held = jnp.tanh(z @ w + held)
        return (last + jnp.sum(held), held), held @ w

    (last, held), read = jax.lax.scan(step, (0.0, jnp.zeros(2)), x)
    return held + last + jnp.sum(read, 0)


def _written(w, x):
    held = jax.new_ref(jnp.zeros(2))
    held[...] = jnp.tanh(x[0] @ w)
    jax.jit(lambda: held.__setitem__(..., held[...] * w[0, 0]))()
    return held[...] @ w


def _replaced(w, x):
    return jnp.tanh(x[0] @ w) * w[0, 0] @ w


@pytest.mark.parametrize("with_reference, without", [(_written, _replaced), (_written_in_steps, _carried)])
def test_a_model_may_write_to_a_reference(with_reference, without):
    """Scores and exact Fishers are those of the same model without a `jax.Ref`."""
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 2), (4, 3, 2), (4, 2)))
    model = lambda function: lambda w, x: jf.Normal(function(w, x), 1.0)  # noqa: E731

    @jax.jit
    def both(w, x, y):
        scores = jf.scores(jf.log_likelihood(model(with_reference)))(w, x, y, weights=jnp.asarray([1.0, 0.0, 2.0, 1.0]))
        rows = jax.vmap(jax.grad(jf.log_likelihood(model(without))), (None, 0, 0))(w, x, y).reshape(4, 4)
        jacobian = jax.vmap(jax.jacobian(without), (None, 0))(w, x).reshape(8, 4)
        made = scores.as_matrix(), scores.gram(), jf.exact_fisher(model(with_reference))(w, x).as_matrix()
        rows = rows * jnp.asarray([[1.0], [0.0], [1.0], [1.0]])
        return made, (rows, rows @ rows.T, jacobian.T @ jacobian / 4)

    for made, plain in zip(*both(w, x, y), strict=True):
        np.testing.assert_allclose(made, plain, atol=1e-12 * np.max(np.abs(plain)), rtol=0)
