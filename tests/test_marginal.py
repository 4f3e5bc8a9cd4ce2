"""The information on some parameters if the others are unknown, and the attributes of operators that people try first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs.evaluate import evaluated

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")


def model(p, x):
    return jf.Normal(jnp.tanh(x @ p["w"]) @ p["v"] + p["level"], jnp.exp(p["log_scale"]))


rng = np.random.default_rng(0)
PARAMS = {"w": rng.standard_normal((2, 2)), "v": rng.standard_normal(2), "level": np.zeros(()), "log_scale": np.zeros(())}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
X = jnp.asarray(rng.standard_normal((30, 2)))


@pytest.mark.parametrize("names", [("v",), ("w", "log_scale"), ("level", "v", "w")])
def test_the_inverse_of_the_marginal_is_a_block_of_the_inverse(names):
    F = jf.exact_fisher(model)(PARAMS, X)
    whole = np.asarray(F)
    made = jf.marginal(F, lambda path: any(f"'{name}'" in path for name in names))
    flags = jax.tree.map_with_path(lambda path, leaf: np.full(leaf.shape, path[0].key in names), PARAMS)
    stays = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(flags)])
    expected = np.linalg.inv(np.linalg.inv(whole)[np.ix_(stays, stays)])
    tolerance = 100 * np.linalg.cond(whole) * np.finfo(float).eps
    np.testing.assert_allclose(made.as_matrix(), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    vector = {name: jnp.ones(leaf.shape) if name in names else None for name, leaf in PARAMS.items()}
    assert jax.tree.structure(made @ vector) == jax.tree.structure(vector)
    known = F.restrict(lambda path: any(f"'{name}'" in path for name in names))
    np.testing.assert_array_equal(known.as_matrix(), whole[np.ix_(stays, stays)])
    assert known.spec == made.spec


def test_nuisance_parameters_that_the_data_do_not_determine_take_nothing_away():
    """A leaf that nothing depends on has no information to lose: the minimum-norm solution leaves it out."""
    unused = jf.exact_fisher(lambda p, x: jf.Normal(x @ p["w"], 1.0))({"w": jnp.ones(2), "idle": jnp.ones(3)}, X)
    made = jf.marginal(unused, lambda path: "w" in path)
    np.testing.assert_allclose(made.as_matrix(), X.T @ X / len(X), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_some_parameters_are_known_to_does_not_change_where_the_others_are_dropped(dtype):
    """Of any rank and in any units, against the pseudo-inverse of the design in NumPy; other directions are unknown."""
    rng = np.random.default_rng(2)
    errors_of = jax.jit(
        lambda matrix, like: jf.standard_errors(jf.marginal(jf.from_matrix(matrix, like), lambda p: "a" in p), n=1)
    )
    infinite = 0
    for size, count, rank in [(p, k, r) for p in (2, 3, 5) for k in (1, p - 1) for r in range(1, p + 1) for _ in range(2)]:
        rows = rng.integers(-3, 4, size=(rank, size)).astype(float)
        rows[:, 0] += 1
        units = 10.0 ** rng.integers(-4, 5, size=size)
        inverse, seen = np.linalg.pinv(rows), np.linalg.pinv(rows) @ rows
        if np.linalg.cond(rows) > 30 or not np.all(np.any(rows, axis=0)):
            continue
        known = np.isclose(np.diag(seen), 1)
        expected = np.where(known, np.sqrt(np.sum(inverse**2, axis=1)) / units, np.inf)[:count]
        matrix = np.zeros((size, size), dtype)
        for row in (rows * units).astype(dtype):
            matrix += np.outer(row, row)
        found = errors_of(jnp.asarray(matrix), {"a": jnp.zeros(count, dtype), "b": jnp.zeros(size - count, dtype)})["a"]
        np.testing.assert_allclose(found, expected, rtol=1e5 * np.finfo(dtype).eps, err_msg=str((size, count, rank)))
        infinite += np.sum(np.isinf(expected))
    assert infinite > 10


def linear(p, x):
    return jf.Normal(x @ jnp.concatenate([p["a"], p["b"]]), jnp.ones((), x.dtype))


def halves(x):
    return [jf.exact_fisher(linear)(ZEROS, part) for part in jnp.split(x, 2)]


ZEROS = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
WEIGHTS = np.arange(24) % 5
BY_ROWS = {
    "scores": (lambda x: jf.exact_fisher(linear)(ZEROS, x), np.ones(24)),
    "pieces": (lambda x: jf.exact_fisher(linear, batch_size=7)(ZEROS, x), np.ones(24)),
    "weights": (lambda x: jf.exact_fisher(linear)(ZEROS, x, weights=jnp.asarray(WEIGHTS)), WEIGHTS),
    "sum": (lambda x: 0.5 * sum(halves(x)), np.ones(24)),
    "products only": (lambda x: jf.implicit_fisher(linear)(ZEROS, x), np.ones(24)),
    "a prior": (lambda x: jf.exact_fisher(linear)(ZEROS, x) + jf.scaled_identity(ZEROS, 2.0**-20), np.ones(24)),
}


@pytest.mark.parametrize("form", BY_ROWS)
def test_nearly_collinear_parameters_are_told_apart_as_well_as_their_scores_tell(form):
    """In float32, against least squares in float64 on the same scores: the error is that of rounding the scores."""
    make, weights = BY_ROWS[form]
    rng = np.random.default_rng(3)
    designs = rng.integers(-3, 4, size=(24, 24, 5)).astype(np.float32)
    nearness = 10.0 ** -np.tile(np.arange(1, 5), 6).astype(np.float32)
    # What the other parameters explain: all or nothing of the first one kept, and a part of the second.
    explained = np.where(np.arange(24) < 12, designs[..., 0].T, rng.integers(-3, 4, size=(24, 24))).T
    designs[..., 4] = designs[..., 2] + nearness[:, None] * explained
    found = jax.jit(jax.vmap(lambda x: make(x).marginal(lambda path: "a" in path).as_matrix()))(designs)
    for design, value, near in zip(designs.astype(float), np.asarray(found, float), nearness, strict=True):
        rows = np.sqrt(weights / weights.sum())[:, None] * design
        if form == "a prior":
            rows = np.concatenate([rows, 2.0**-10 * np.eye(5)])
        sizes = np.linalg.norm(rows, axis=0)
        by_others = np.linalg.lstsq(rows[:, 2:] / sizes[2:], rows[:, :2], rcond=None)[0]
        rest = rows[:, :2] - rows[:, 2:] / sizes[2:] @ by_others
        rounding = 20 * np.finfo(np.float32).eps * (sizes[:2] + np.linalg.norm(by_others, axis=0))
        lengths = np.linalg.norm(rest, axis=0)
        error = lengths[:, None] * rounding + rounding[:, None] * (lengths + rounding)
        assert np.all(np.abs(value - rest.T @ rest) <= error), (near, value, rest.T @ rest, error)


@pytest.mark.parametrize("view", [jf.dense, lambda F: F + jf.scaled_identity(F, 0.01)])
def test_first_and_second_derivatives_of_a_marginal(view):
    """By parameters and data, against the Schur complement of the matrix; an idle parameter takes nothing away."""
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((4, 4)))
    model = lambda p, x: jf.Normal(jnp.tanh(x @ p["w"]) @ p["v"] + p["level"], 1.0)  # noqa: E731
    whole = {name: leaf for name, leaf in PARAMS.items() if name != "log_scale"} | {"x": X[:9], "idle": jnp.zeros(1)}

    def fisher(t):
        moved = jax.tree.map(lambda leaf: leaf + t * jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), whole)
        x = moved.pop("x")
        return view(jf.exact_fisher(model)(moved, x))

    def found(t):
        return jnp.sum(weights * fisher(t).marginal(lambda path: "w" in path).as_matrix())

    def expected(t):
        matrix = fisher(t).as_matrix()[1:, 1:]  # without the idle one
        inverse = jnp.linalg.inv(matrix[:3, :3])
        return jnp.sum(weights * (matrix[3:, 3:] - matrix[3:, :3] @ inverse @ matrix[:3, 3:]))

    def derivatives(f):
        return lambda t: (f(t), jax.grad(f)(t), jax.jvp(jax.grad(f), (t,), (jnp.ones(()),))[1])

    one, other = (evaluated(derivatives(f), 0.3) for f in (found, expected))
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_what_cannot_be_marginalised_is_named():
    F = jf.exact_fisher(model)(PARAMS, X)
    for keep, said in ((lambda path: True, "keeps every leaf"), (lambda path: False, "keeps no leaf")):
        for part in (F.marginal, F.restrict):
            with pytest.raises(ValueError, match=f"{part.__name__}: `keep` {said}"):
                part(keep)
    for part in (F.marginal, F.restrict):
        with pytest.raises(TypeError, match=r"`keep` is .*expected a function, path -> bool"):
            part("w")
    with pytest.raises(TypeError, match="marginal: expected a Fisher operator"):
        jf.marginal(np.eye(8), lambda path: "w" in path)


def test_an_operator_reads_like_a_matrix():
    F = jf.exact_fisher(model)(PARAMS, X)
    assert F.shape == (8, 8) and F.n == 30 and (F + F).n == 60
    matrix = np.asarray(F)
    np.testing.assert_array_equal(matrix, F.as_matrix())
    v = jax.tree.map(jnp.ones_like, PARAMS)
    product = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(F @ v)])
    np.testing.assert_allclose(product, matrix @ np.ones(8), rtol=0, atol=1e-13 * np.abs(matrix).max())
