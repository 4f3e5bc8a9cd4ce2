"""Inverses of the sum of two Kronecker views by common eigenvectors, against dense float64 matrices in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, flat

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

SHAPES = {"b": (3,), "c": (2,), "v": (3, 2), "w": (4, 3)}


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def model(p, x):
    """A model of two layers; the second depends little on its second input."""
    hidden = x @ p["w"] + p["b"]
    return jf.Normal(jnp.concatenate([hidden, hidden[:3] @ p["v"] + p["c"]]), jnp.array([0.5, 1.0, 2.0, 0.7, 1.5]))


def params(seed):
    return {name: numbers(seed + k, *shape) for k, (name, shape) in enumerate(SHAPES.items())}


PARAMS = params(0)
DATA = [numbers(10, 9, 4), numbers(11, 7, 4) * np.array([3.0, 0.1, 1.0, 1.0])]
DEAD = [x * np.array([1.0, 0.0, 1.0, 1.0]) for x in DATA]
"""An input that is zero in both data sets."""


@jax.jit
def views(one, two, x, y, scale):
    fisher = jf.exact_fisher(model)
    return jf.kronecker(fisher(one, x)), scale * jf.kronecker(fisher(two, y))


@jax.jit
def solved(F, G, v, damping):
    return jf.solve(F + G, v, damping, jf.factored_solve)


def vector(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e10])
def test_the_sum_of_two_is_solved_exactly_without_a_damping(scale):
    F, G = views(PARAMS, params(5), *DATA, scale)
    matrix, v = np.asarray(F.as_matrix()) + np.asarray(G.as_matrix()), vector(3)
    x, info = solved(F, G, v, 0.0)
    expected = np.linalg.solve(matrix, flat(v))
    np.testing.assert_allclose(flat(x), expected, rtol=0, atol=1e-15 * np.linalg.cond(matrix) * np.max(np.abs(expected)))
    assert info.converged and info.residual < 1e-9
    # A damping that is a plain number may also be zero.
    again, _ = jf.solve(F + G, v, 0.0, jf.factored_solve)
    assert_close(flat(again), flat(x), factor=1e6)


def test_the_solution_of_least_norm_where_neither_has_an_input():
    F, G = views(PARAMS, params(5), *DEAD, 1.0)
    v = vector(3)
    expected = np.linalg.pinv(np.asarray((F + G).as_matrix()), rcond=1e-12, hermitian=True) @ flat(v)
    x, info = solved(F, G, v, 0.0)
    assert_close(flat(x), expected, factor=1e6)
    assert not info.converged and 0.1 < info.residual < 1  # the part of v that no x reaches


def test_a_damping_is_in_the_factors_of_both():
    F, G = views(PARAMS, params(5), *DATA, 2.0)
    damping, v = 0.3, vector(4)
    x, info = solved(F, G, v, damping)
    expected = {}
    for one, two, group in zip(F.form.blocks, G.form.blocks, F.form.members, strict=True):
        total = 0
        for block in (one, two):
            a, g = np.asarray(block.inputs[0]), np.asarray(block.outputs[0])
            pi, root = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g))), np.sqrt(damping / 2)
            total = total + np.kron(a + pi * root * np.eye(len(a)), g + root / pi * np.eye(len(g)))
        leaves = {np.ndim(jax.tree.leaves(v)[i]): i for i in group}
        right = np.concatenate([flat(jax.tree.leaves(v)[leaves[2]]), flat(jax.tree.leaves(v)[leaves[1]])])
        found = np.linalg.solve(total, right)
        width = jax.tree.leaves(v)[leaves[1]].size
        expected[leaves[2]], expected[leaves[1]] = found[:-width], found[-width:]
    assert_close(flat(x), np.concatenate([expected[i] for i in range(4)]), factor=1e4)
    off = flat(v) - np.asarray((F + G).as_matrix()) @ flat(x) - damping * flat(x)
    np.testing.assert_allclose(info.residual, np.linalg.norm(off) / np.linalg.norm(flat(v)), rtol=1e-8)
    # A prior acts as a damping that is always there.
    with_prior = jf.solve(F + G + jf.scaled_identity(F, 0.2), v, 0.1, jf.factored_solve)[0]
    assert_close(flat(with_prior), flat(x), factor=1e4)


def test_models_merge_by_their_kronecker_views_of_layers_of_any_size():
    """For 8,192 parameters no full matrix is made. At the merged model the gradients of both quadratics cancel."""
    models = [0.1 * numbers(seed, 64, 128).astype(jnp.float32) for seed in (1, 2)]
    inputs = [numbers(seed, 300, 64).astype(jnp.float32) for seed in (3, 4)]
    outputs = jnp.linspace(0.5, 2.0, 128, dtype=jnp.float32)
    fisher = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, outputs))
    views = [jf.kronecker(fisher(w, x)) for w, x in zip(models, inputs, strict=True)]
    with pytest.raises(ValueError, match="dense 8192 x 8192"):
        jf.fisher_average(models, views)
    merged, info = jf.fisher_average(models, views, solver=jf.factored_solve)
    assert info.converged
    # In float64, where the outputs' factors are equal, so that only those of the inputs differ.
    a, b = (np.asarray(x, float).T @ np.asarray(x, float) / len(x) for x in inputs)
    one, two = (np.asarray(w, float) for w in models)
    np.testing.assert_allclose(merged, np.linalg.solve(a + b, a @ one + b @ two), atol=1e-5)
