"""Undamped solves and ranks in any units of the parameters, in every form, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_solves import FORMS

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

UNITS = 10.0 ** np.array([12, -12, 3, 0, -7, 9])
RNG = np.random.default_rng(3)


@pytest.mark.parametrize("form", ["scores", "dense", "blocks", "sum of forms"])
def test_full_rank_in_any_units(form):
    """With columns of sizes 1e12 and 1e-12, the solution is the one in equal units, and the rank is full."""
    x, v = RNG.normal(size=(14, 6)), RNG.normal(size=6)
    x[:, 5] = x[:, 0] + 0.1 * x[:, 5]

    @jax.jit
    def run(x, v):
        F = FORMS[form](x)
        found, info = jf.solve(F, F.spec.unravel(v), 0.0)
        return F.spec.ravel(found, "x"), info, F.rank()

    scaled = np.asarray(x * UNITS, np.float32)
    equal = scaled / UNITS
    matrix = equal.T @ equal / len(x)
    if form == "sum of forms":
        matrix = 2 * matrix
    if form == "blocks":
        matrix[:3, 3:] = matrix[3:, :3] = 0
    found, info, rank = run(jnp.asarray(scaled), jnp.asarray(v * UNITS, jnp.float32))
    true = np.linalg.solve(matrix, np.asarray(v * UNITS, np.float32) / UNITS)
    np.testing.assert_allclose(np.asarray(found, float) * UNITS, true, rtol=0, atol=2e-3 * np.max(np.abs(true)))
    assert bool(info.converged) and int(rank) == int(info.rank) == 6


@pytest.mark.parametrize(("form", "rows"), [("scores", 14), ("scores", 4), ("dense", 14)])
def test_least_norm_in_own_units(form, rows):
    """If the rank is deficient, the solution depends on the units: it is that of NumPy's pseudo-inverse in the given ones."""
    units = 10.0 ** np.array([2, -2, 1, 0, -1, 1])
    x, v = RNG.normal(size=(rows, 6)) * units, RNG.normal(size=6) * units
    x[:, 3] = 4 * x[:, 1]
    x[:, 4] = 0
    F = FORMS[form](jnp.asarray(x))
    found, info = jf.solve(F, F.spec.unravel(jnp.asarray(v)), 0.0)
    rank = min(rows, 4)
    _, sizes, right = np.linalg.svd(x / np.sqrt(rows))
    true = right[:rank].T @ ((right[:rank] @ v) / sizes[:rank] ** 2)
    np.testing.assert_allclose(F.spec.ravel(found, "x"), true, rtol=0, atol=1e-7 * np.max(np.abs(true)))
    assert bool(info.converged) and int(info.rank) == int(F.rank()) == rank


MULTIPLIED = {
    "more rows": lambda x: jf.exact_fisher(of_line)(jnp.zeros(3, jnp.float32), x),
    "fewer rows": lambda x: jf.exact_fisher(of_line)(jnp.zeros(3, jnp.float32), x[:2]),
    "in pieces": lambda x: jf.exact_fisher(of_line, batch_size=2)(jnp.zeros(3, jnp.float32), x),
    "joined": lambda x: (
        jf.exact_fisher(of_line)(jnp.zeros(3, jnp.float32), x[:2]) + jf.exact_fisher(of_line)(jnp.zeros(3, jnp.float32), x[2:])
    ),
}


def of_line(w, x):
    return jf.Normal(jnp.dot(x, w), jnp.asarray(0.5, w.dtype))


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_multiple_of_a_fisher_is_solved_as_the_fisher_is(name):
    """``c F x = c v`` in float32, with and without damping, for any c: against NumPy's pseudo-inverse in float64."""
    x = np.random.default_rng(6).normal(size=(5, 3)).astype(np.float32)
    F = MULTIPLIED[name](jnp.asarray(x))
    matrix, vector = np.asarray(F.as_matrix(), float), np.array([0.3, -0.7, 0.5])
    v = matrix @ vector
    for c in (1.0, 1e-20, 1e-10, 1e10, 1e20):
        scaled = np.float32(c) * F
        for share in (0.0, 0.01):
            expected = np.linalg.pinv(matrix + share * np.eye(3), rcond=1e-5) @ v
            found = scaled.solve(jnp.asarray(c * v, jnp.float32), np.float32(share * c))
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=str((c, share)))
