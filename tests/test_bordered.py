"""Matrices whose last row and column are stored separately, against whole ones in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfisher._bordered import Bordered, bordered


def matrices(mean):
    """Two second moments of inputs with this mean and a last input of one, plus a multiple of the identity."""
    rng = np.random.default_rng(0)
    inputs = mean + rng.standard_normal((2, 40, 5))
    inputs[..., -1] = 1
    return inputs.swapaxes(1, 2) @ inputs / 40 + 0.1 * np.eye(5)


def test_the_parts_are_those_of_the_whole():
    whole, rng = matrices(1.0), np.random.default_rng(1)
    apart, v = bordered(jnp.asarray(whole)), rng.standard_normal((2, 5, 3))
    assert apart.size == 5 and apart.core.shape == (2, 4, 4)
    np.testing.assert_array_equal(apart.whole(), whole)
    np.testing.assert_array_equal(apart.diagonals(), np.einsum("gii->gi", whole))
    np.testing.assert_allclose(apart.traces(), np.einsum("gii->g", whole), rtol=1e-14)
    np.testing.assert_allclose(jnp.concatenate(apart.times(v[:, :-1], v[:, -1:]), 1), whole @ v, rtol=0, atol=1e-13)
    without = Bordered(jnp.asarray(whole))
    assert without.size == 5 and without.times(jnp.asarray(v), None)[1] is None
    wide = np.zeros((2, 6, 6))
    wide[:, :-1, :-1] = whole
    np.testing.assert_array_equal(without.widened().whole(), wide)
    assert apart.widened() is apart


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_inverses_by_the_core_are_those_of_the_whole(mean, dtype):
    """Inputs may have a mean a hundred times their deviation; the elimination leaves only the deviations in the core."""
    given = matrices(mean).astype(dtype)
    found = bordered(jnp.asarray(given)).inverses(jax.vmap(jnp.linalg.inv))
    expected = np.linalg.inv(given.astype(np.float64))
    bound = 10 * np.finfo(dtype).eps * np.linalg.cond(given.astype(np.float64)).max() * np.abs(expected).max()
    np.testing.assert_allclose(found.whole(), expected, rtol=0, atol=bound)
    assert found.whole().dtype == dtype
