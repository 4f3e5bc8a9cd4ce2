"""Views of a Fisher: the models for which each is exact, its error for others, damping, null spaces, and hard cases."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, reference
from programs.evaluate import evaluated

import jaxfisher as jf
from jaxfisher._operators.apart import factorised
from jaxfisher._operators.averaging import arrays_of, with_arrays

pytestmark = pytest.mark.usefixtures("in_numpy")

F64 = np.finfo(np.float64).eps


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def flat_jax(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def layer_blocks(F):
    return jf.block_diagonal(F, jf.layers(F))


def matrices(model, params, x, *views):
    """The matrices of the exact Fisher's layer blocks and of its views."""
    made = lambda params, x: [view(jf.exact_fisher(model)(params, x)).as_matrix() for view in (layer_blocks, *views)]  # noqa: E731
    return evaluated(made, params, x)


# Exactness.


def deep_linear(params, x):
    """Three linear layers, two with a bias, and Gaussian outputs."""
    for layer in params:
        x = x @ layer["w"] + layer.get("b", jnp.zeros(layer["w"].shape[1]))
    return jf.Normal(x, jnp.ones(x.shape))


DEEP = [
    {"w": jnp.asarray(numbers(0, 4, 5)), "b": jnp.asarray(numbers(1, 5))},
    {"w": jnp.asarray(numbers(2, 5, 3))},
    {"w": jnp.asarray(numbers(3, 3, 2)), "b": jnp.asarray(numbers(4, 2))},
]


def test_kfac_is_the_block_fisher_of_a_deep_linear_network():
    blocks, *views = matrices(deep_linear, DEEP, numbers(5, 9, 4), jf.kronecker, jf.kronecker_reduce, jf.eigen_kronecker)
    for matrix in views:
        assert_close(matrix, blocks, factor=1e3)


def test_kfac_is_the_block_fisher_of_one_example():
    params, x, _, _, _ = reference()
    blocks, *views = matrices(classifier, params, x[:1], jf.kronecker, jf.kronecker_reduce, jf.eigen_kronecker)
    for matrix in views:
        assert_close(matrix, blocks)
    blocks, matrix = matrices(classifier, params, x[:2], jf.kronecker)
    assert np.linalg.norm(matrix - blocks) > 1e-3, "the control: of two it is not"


def per_position(params, x):
    """A model with a prediction for every position, for which *expand* is exact."""
    z = (x @ params["w"] + params["b"][None]) @ params["v"]
    return jf.Normal(z, jnp.ones(z.shape))


def of_the_mean(params, x):
    """A model that averages the positions before its prediction, for which *reduce* is exact."""
    z = jnp.mean(x @ params["w"], 0) @ params["v"]
    return jf.Normal(z, jnp.ones(z.shape))


SHARED = {"w": jnp.asarray(numbers(0, 4, 5)), "b": jnp.asarray(numbers(1, 5)), "v": jnp.asarray(numbers(2, 5, 3))}


def test_expand_and_reduce_are_each_exact_in_their_own_setting():
    x = numbers(3, 6, 7, 4)
    assert jf.layers(jf.implicit_fisher(per_position)(SHARED, x)) == {"b": "['w']", "v": "['v']", "w": "['w']"}
    blocks, expand, reduce = matrices(per_position, SHARED, x, jf.kronecker, jf.kronecker_reduce)
    assert_close(expand, blocks)
    assert np.linalg.norm(reduce - blocks) > 0.01 * np.linalg.norm(blocks)
    weights = {name: SHARED[name] for name in ("w", "v")}
    blocks, expand, reduce = matrices(of_the_mean, weights, x, jf.kronecker, jf.kronecker_reduce)
    assert_close(reduce, blocks)
    assert np.linalg.norm(expand - blocks) > 0.01 * np.linalg.norm(blocks)


def test_ekfac_is_nearer_than_kfac_and_than_its_neighbours():
    params, x, _, _, _ = reference()

    def moved(by):
        """An eigen-Kronecker view in the basis of other data, with one eigenvalue changed."""

        def view(F):
            stale = jf.eigen_kronecker(F, basis=jf.kronecker(jf.exact_fisher(classifier)(params, x[:3])))
            first, *others = stale.form.blocks
            first = dataclasses.replace(first, values=first.values.at[0, 1, 2].add(by))
            return dataclasses.replace(stale, form=dataclasses.replace(stale.form, blocks=(first, *others)))

        return view

    views = (jf.kronecker, jf.eigen_kronecker, moved(0.0), moved(1e-3), moved(-1e-3))
    blocks, *made = matrices(classifier, params, x, *views)
    kfac, ekfac, stale, above, below = (np.linalg.norm(matrix - blocks) for matrix in made)
    assert ekfac < 0.95 * kfac
    assert stale < above and stale < below, "of all diagonals in a basis it is the nearest"


# Damping means the same for every view.


def test_all_structures_of_one_layer_and_one_datum_are_one_matrix_at_any_damping():
    params = {"w": jnp.asarray(numbers(0, 3, 4)), "b": jnp.asarray(numbers(1, 4))}
    model = lambda p, x: jf.Categorical(logits=x @ p["w"] + p["b"])  # noqa: E731
    F = jax.jit(lambda p, x: jf.exact_fisher(model)(p, x))(params, jnp.asarray(numbers(2, 1, 3)))
    views = {
        "scores": lambda F: F,
        "dense": jf.dense,
        "block": layer_blocks,
        "kronecker": jf.kronecker,
        "reduce": jf.kronecker_reduce,
        "eigen-kronecker": jf.eigen_kronecker,
        "low rank": lambda F: jf.low_rank(F, 4),
        "nystrom": lambda F: jf.nystrom(F, jax.random.key(0), 16),
        "prior": lambda F: F + jf.scaled_identity(F, 0.0),
    }
    dampings = jnp.array([1e-4, 1e-1, 10.0])

    @jax.jit
    def solutions(F, v):
        v = F.spec.unravel(v)
        return {name: jax.lax.map(lambda d, view=view: jf.solve(view(F), v, d), dampings) for name, view in views.items()}

    v = numbers(3, 16)
    matrix = np.asarray(jax.jit(lambda F: F.as_matrix())(F))
    for name, (x, info) in solutions(F, jnp.asarray(v)).items():
        assert np.all(info.converged) and np.all(info.rank == 16)
        for i, damping in enumerate(np.asarray(dampings)):
            expected = np.linalg.solve(matrix + damping * np.eye(16), v)
            found = flat(jax.tree.map(lambda leaf, i=i: leaf[i], x))
            assert np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected), (name, damping)


def test_factored_damping_is_another_thing_and_says_so():
    params, x, _, _, _ = reference()
    K = jax.jit(lambda p, x: jf.kronecker(jf.exact_fisher(classifier)(p, x)))(params, x)
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    damping = 0.2
    found, info = jax.jit(lambda K, v: jf.solve(K, v, damping, solver=jf.factored_solve))(K, v)
    expected = []
    for block, group in zip(K.form.blocks, K.form.members, strict=True):
        a, g = np.asarray(block.inputs[0]), np.asarray(block.outputs[0])
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
        root = np.sqrt(damping)
        leaves = [np.asarray(jax.tree.leaves(v)[i]) for i in group]
        weight, bias = sorted(leaves, key=np.ndim, reverse=True)
        right = np.vstack([weight, bias])
        solved = np.linalg.solve(a + pi * root * np.eye(len(a)), right) @ np.linalg.inv(g + root / pi * np.eye(len(g)))
        parts = [solved[:-1].ravel(), solved[-1]]
        expected += parts if leaves[0].ndim == 2 else parts[::-1]
    assert_close(flat(found), np.concatenate(expected), factor=1e4)
    off = flat(v) - np.asarray(K.as_matrix()) @ flat(found) - damping * flat(found)
    np.testing.assert_allclose(info.residual, np.linalg.norm(off) / np.linalg.norm(flat(v)), rtol=1e-8)
    assert info.residual > 0.05
    by_vectors = lambda K: dataclasses.replace(K, form=factorised(K.form))  # noqa: E731
    held, again = jax.jit(lambda K, v: jf.solve(by_vectors(K), v, damping, solver=jf.factored_solve))(K, v)
    assert_close(flat(held), flat(found), factor=1e4)  # by eigenvectors, as between refreshes
    np.testing.assert_allclose(again.residual, info.residual, rtol=1e-8)
    for other in (jf.dense(K), jf.eigen_kronecker(jf.exact_fisher(classifier)(params, x))):
        with pytest.raises(TypeError, match=r"jf\.kronecker"):
            jf.factored_solve(other, v, damping)


def test_relative_damping_is_a_share_of_the_mean_eigenvalue():
    params, x, _, _, _ = reference()
    F = jf.dense(jf.exact_fisher(classifier)(params, x))
    assert_close(jf.relative_damping(F, 0.3), 0.3 * np.mean(np.linalg.eigvalsh(F.as_matrix())))
    with pytest.raises(ValueError, match="`share` is -1"):
        jf.relative_damping(F, -1.0)


# Leaves without Kronecker structure, and what the repr says of them.


def normed(params, tokens):
    """A model with a table, a scale, a layer without a bias, and a bias without a layer."""
    x = params["table"][tokens] * params["scale"]
    return jf.Normal(jnp.tanh(x @ params["w"]) + params["lone"][0], jnp.ones(3))


NORMED = {
    "table": jnp.asarray(numbers(0, 6, 4)),
    "scale": jnp.asarray(numbers(1, 4)),
    "w": jnp.asarray(numbers(2, 4, 3)),
    "lone": jnp.asarray(numbers(3, 2)),
}
ORDER = {"lone": np.r_[0:2], "scale": np.r_[2:6], "table": np.r_[6:30], "w": np.r_[30:42]}


def test_leaves_without_kronecker_structure_are_an_exact_diagonal_or_exact_blocks():
    tokens = jnp.array([0, 1, 1, 5])

    @jax.jit
    def views(params, tokens):
        F = jf.exact_fisher(normed)(params, tokens)
        streamed = jf.exact_fisher(normed, batch_size=3)(params, tokens)
        return jf.dense(F), jf.kronecker(F), jf.kronecker(F, rest=jf.block_diagonal), jf.kronecker(streamed)

    full, diagonal, blocks, streamed = views(NORMED, tokens)
    full, made, exact, pieces = (np.asarray(jax.jit(lambda F: F.as_matrix())(F)) for F in (full, diagonal, blocks, streamed))
    for index in (ORDER[name] for name in ("lone", "scale", "table")):
        inside = np.ix_(index, index)
        assert_close(made[inside], np.diag(np.diag(full))[inside])
        assert_close(exact[inside], full[inside])
    assert_close(pieces, made)
    assert "1 Kronecker (expand), 1 diagonal" in repr(diagonal)
    assert "1 Kronecker (expand), 3 exact as scores" in repr(blocks)
    assert repr(streamed) == repr(diagonal)


def test_views_of_an_implicit_fisher_may_be_of_another(key):
    """Products are those of the exact Fisher and views those of the drawn one, also for multiples and for some parameters."""
    params, x, _, _, _ = reference()
    drawn = jf.sampled_fisher(classifier, num_samples=2)(params, key, x)
    F = jf.implicit_fisher(classifier)(params, x, views_of=drawn)
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    exact = class_sum_fisher(params, x)
    assert_close(flat((2 * F).mv(v)), 2 * exact @ flat(v))
    assert_close(F.trace(), np.trace(exact))
    assert np.linalg.norm(drawn.as_matrix() - exact) > 0.1 * np.linalg.norm(exact), "the control: they differ"
    views = (jf.dense, jf.diagonal, jf.block_diagonal, jf.kronecker, jf.kronecker_reduce, jf.eigen_kronecker)
    views += tuple(functools.partial(view, rank=3) for view in (jf.low_rank, jf.partial_cholesky))
    views += (functools.partial(jf.nystrom, rank=3, key=key),)
    weights = lambda path: "w" in path  # noqa: E731
    for view in views:
        assert_close(view(F).as_matrix(), view(drawn).as_matrix())
        assert_close(view(3 * F).as_matrix(), 3 * np.asarray(view(drawn).as_matrix()), factor=1e3)
        assert_close(view(F.restrict(weights)).as_matrix(), view(drawn.restrict(weights)).as_matrix())
    assert jf.layers(F) == jf.layers(drawn)
    assert repr(F).endswith("implicit, products only; views of sampled, 2 draws, mean over 7)")


def test_views_of_what_holds_no_scores_are_refused():
    params, x, _, _, _ = reference()
    F = jf.implicit_fisher(classifier)(params, x)
    for view in (jf.kronecker, jf.kronecker_reduce, jf.eigen_kronecker, jf.layers):
        with pytest.raises(TypeError, match="scores"):
            view(jf.dense(F))
    with pytest.raises(ValueError, match="prefix"):
        jf.block_diagonal(F, {"hidden": 0})
    with pytest.raises(ValueError, match="from 1 to 31"):
        jf.low_rank(F, 32)
    with pytest.raises(TypeError, match="rest"):
        jf.kronecker(F, rest="diagonal")


# Jit, pickle, checkpoints and derivatives.


@functools.cache
def held_forms():
    params, x, _, _, _ = reference()
    return jax.jit(lambda params, x: _forms(jf.exact_fisher(classifier)(params, x)))(params, x)


def _forms(F):
    return {
        "scores": F,
        "blocks": jf.block_diagonal(F, jf.layers(F)),
        "kronecker": jf.kronecker(F),
        "eigen-kronecker": jf.eigen_kronecker(F),
        "low rank": jf.low_rank(F, 4),
        "prior": jf.kronecker(F) + jf.scaled_identity(F, 0.5),
    }


@pytest.mark.parametrize("name", ["scores", "blocks", "kronecker", "eigen-kronecker", "low rank", "prior"])
def test_round_trips_through_pickle_and_a_checkpoint(name, tmp_path):
    F = held_forms()[name]
    again = pickle.loads(pickle.dumps(F))
    assert repr(again) == repr(F) and jax.tree.structure(again) == jax.tree.structure(F)
    for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(F), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "fisher", F)
        files.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, F)
        restored = files.restore(tmp_path / "fisher", shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(F)
    for mine, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(F), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["blocks", "kronecker", "eigen-kronecker", "low rank", "prior"])
def test_derivatives_in_the_damping(name):
    """The derivatives of ``v^T (F + d)^-1 v`` and of the log-determinant, against their closed forms."""
    F = held_forms()[name]
    v, dense = np.cos(np.arange(F.size)), np.asarray(jax.jit(lambda F: F.as_matrix())(F))

    def both(d):
        return v @ jax.flatten_util.ravel_pytree(F.solve(F.spec.unravel(jnp.asarray(v)), d))[0], F.logdet(d)

    inverse = np.linalg.inv(dense + 0.3 * np.eye(F.size))
    # One cotangent after the other, since a solve for a batch of cotangents takes longer to compile.
    slope = jax.jit(lambda d, *cotangents: jax.vjp(both, d)[1](cotangents)[0])
    slopes = slope(0.3, 1.0, 0.0), slope(0.3, 0.0, 1.0)
    np.testing.assert_allclose(slopes[0], -v @ inverse @ inverse @ v, rtol=1e-8)
    np.testing.assert_allclose(slopes[1], np.trace(inverse), rtol=1e-8)


def test_a_running_mean_of_kfac_is_one_of_its_factors():
    K = held_forms()["kronecker"].form
    assert K.averages and not held_forms()["eigen-kronecker"].form.averages
    half = with_arrays(K, jax.tree.map(lambda leaf: 0.5 * leaf, arrays_of(K)))
    both = jax.jit(lambda *forms: [form.as_matrix() for form in forms])(half, K)
    assert_close(both[0], 0.25 * np.asarray(both[1]))


# Null spaces.


def test_rank_and_null_space_name_what_the_data_do_not_identify():
    """In a softmax over all classes with one feature a multiple of another, six directions leave all predictions unchanged."""
    x = numbers(0, 20, 3)
    x[:, 2] = 5 * x[:, 0]
    params = {"b": jnp.zeros(3), "w": jnp.zeros((3, 3))}
    model = lambda p, x: jf.Categorical(logits=x @ p["w"] + p["b"])  # noqa: E731
    F = jax.jit(lambda p, x: jf.dense(jf.exact_fisher(model)(p, x)))(params, jnp.asarray(x))
    basis = F.null_space()
    rows = np.hstack([np.asarray(basis["b"]), np.asarray(basis["w"]).reshape(-1, 9)])
    # One shift of all classes in b, one for each feature in w, and two more for the repeated feature.
    assert int(F.rank()) == 6 and rows.shape == (6, 12)
    assert_close(rows @ rows.T, np.eye(6), factor=1e3)
    assert np.max(np.abs(rows @ np.asarray(F.as_matrix()))) < 1e3 * F64
    # Their number is part of a shape.
    for call in (
        lambda: jax.jit(lambda F: F.null_space())(F),
        lambda: jax.grad(lambda s: jnp.sum((s * F).null_space()["b"]))(1.0),
    ):
        with pytest.raises(TypeError, match=r"null_space: the number of its vectors depends on the values.*F\.rank"):
            call()


def test_a_feature_in_other_units_is_not_taken_for_a_null_direction():
    units = np.array([1.0, 1e-5, 1e5, 1.0])
    x = numbers(0, 30, 4) * units
    model = lambda w, x: jf.Normal(jnp.dot(x, w, precision="highest"), 1.0)  # noqa: E731
    for dtype, rtol in ((jnp.float64, 1e-12), (jnp.float32, 1e-4)):
        narrow = np.asarray(x, np.dtype(dtype)).astype(np.float64)
        F = jf.exact_fisher(model)(jnp.zeros(4, dtype), jnp.asarray(x, dtype))
        right = narrow.T @ np.ones(30) / 30
        for form in (F, jf.dense(F)):
            (solution, info), rank = jax.jit(lambda F, v: (jf.solve(F, v, 0.0), F.rank()))(form, jnp.asarray(right, dtype))
            assert info.rank == 4 and int(rank) == 4
            expected = np.linalg.lstsq(narrow / units, np.ones(30), rcond=None)[0] / units
            np.testing.assert_allclose(solution, expected, rtol=rtol)


LONGLEY = """60323 83 234289 2356 1590 107608 1947
61122 88.5 259426 2325 1456 108632 1948
60171 88.2 258054 3682 1616 109773 1949
61187 89.5 284599 3351 1650 110929 1950
63221 96.2 328975 2099 3099 112075 1951
63639 98.1 346999 1932 3594 113270 1952
64989 99.0 365385 1870 3547 115094 1953
63761 100.0 363112 3578 3350 116219 1954
66019 101.2 397469 2904 3048 117388 1955
67857 104.6 419180 2822 2857 118734 1956
68169 108.4 442769 2936 2798 120445 1957
66513 110.8 444546 4681 2637 121950 1958
68655 112.6 482704 3813 2552 123366 1959
69564 114.2 502601 3931 2514 125368 1960
69331 115.7 518173 4806 2572 127852 1961
70551 116.9 554894 4007 2827 130081 1962"""
CERTIFIED = [
    -3482258.63459582,
    15.0618722713733,
    -0.358191792925910e-01,
    -2.02022980381683,
    -1.03322686717359,
    -0.511041056535807e-01,
    1829.15146461355,
]
"""The certified values of the coefficients for Longley's data, from the NIST StRD, the constant first."""


def test_longley_in_one_undamped_step():
    table = np.array([[float(word) for word in line.split()] for line in LONGLEY.splitlines()])
    y, x = table[:, 0], np.hstack([np.ones((16, 1)), table[:, 1:]])
    model = lambda w, x: jf.Normal(jnp.dot(x, w, precision="highest"), 1.0)  # noqa: E731
    fisher = lambda w, x, y: jf.exact_fisher(model)(w, x)  # noqa: E731
    step = jax.jit(jf.natural_grad(jf.log_likelihood(model), fisher, damping=0.0))
    w = -step(jnp.zeros(7), jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(w, CERTIFIED, rtol=1e-4)
    assert int(jax.jit(lambda w, x: jf.exact_fisher(model)(w, x).rank())(w, jnp.asarray(x))) == 7


# Hard cases.


def softmax(params, x):
    return jf.Categorical(logits=x @ params["w"] + params["b"])


VIEWS = {
    "scores": lambda F: F,
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "blocks": jf.block_diagonal,
    "kronecker": jf.kronecker,
    "eigen-kronecker": jf.eigen_kronecker,
    "low rank": lambda F: jf.low_rank(F, 1),
    "nystrom": lambda F: jf.nystrom(F, jax.random.key(0), 2),
    "partial cholesky": lambda F: jf.partial_cholesky(F, 2),
}
CASES = {
    "duplicated rows": (1.0, np.ones((4, 3))),
    "one example": (1.0, np.ones((1, 3))),
    "logits of 1e4": (1e4, numbers(0, 4, 3)),
    "rank zero": (1.0, np.zeros((4, 3))),
    "inputs of 1e-10": (1.0, 1e-10 * numbers(1, 4, 3)),
    "inputs of 1e5": (1e-5, 1e5 * numbers(1, 4, 3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_hard_cases_are_finite_and_right(name):
    """Float32 against the view's own matrix in float64: nothing is NaN, and the report flags an inaccurate solution."""

    @jax.jit
    def run(params, x, v):
        F = VIEWS[name](jf.exact_fisher(softmax)(params, x))
        damped, undamped = jf.solve(F, v, 0.5), jf.solve(F, v, 0.0)
        return F.as_matrix(), damped, undamped, F.logdet(0.5), F.eigvalsh()

    for case, (scale, x) in CASES.items():
        params = {"w": jnp.asarray(scale * numbers(2, 3, 4), jnp.float32), "b": jnp.zeros(4, jnp.float32)}
        v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
        matrix, (solution, info), (least, undamped), logdet, values = run(params, jnp.asarray(x, jnp.float32), v)
        matrix = np.asarray(matrix, np.float64)
        everything = [*jax.tree.leaves(solution), *jax.tree.leaves(least), matrix, logdet, values, info.residual]
        assert all(np.all(np.isfinite(leaf)) for leaf in everything), case
        damped = matrix + 0.5 * np.eye(16)
        expected = np.linalg.solve(damped, flat(v).astype(np.float64))
        assert info.finite, case
        if 0.5 > 100 * np.finfo(np.float32).eps * np.linalg.norm(matrix, 2):
            assert np.linalg.norm(flat(solution) - expected) < 1e-3 * np.linalg.norm(expected), case
            assert info.converged and info.rank == 16, case
            np.testing.assert_allclose(logdet, np.linalg.slogdet(damped)[1], rtol=1e-4, atol=1e-4, err_msg=case)
        elif np.linalg.norm(flat(solution) - expected) > 1e-3 * np.linalg.norm(expected):
            # The damping is below the rounding error of the matrix in float32: the report must not claim success.
            assert info.rank < 16 or info.residual > 1e-3, (case, info)
        assert undamped.finite, case


@functools.cache
def spread_fisher(dtype):
    """An exact Fisher from scores with singular values from 1e-2 to 1, and these scores in float64."""
    n, p = 30, 80
    u, v = (np.linalg.qr(numbers(seed, size, n))[0] for seed, size in ((0, n), (1, p)))
    x = np.sqrt(n) * (u * np.geomspace(1e-2, 1, n)) @ v.T
    model = lambda w, x: jf.Normal(jnp.dot(x, w, precision="highest"), jnp.ones((), dtype))  # noqa: E731
    x = np.asarray(x, np.dtype(dtype))
    return jf.exact_fisher(model)(jnp.zeros(p, dtype), jnp.asarray(x)), x.astype(np.float64) / np.sqrt(n)


@pytest.mark.parametrize("relative", [1e-6, 1e-3, 1.0])
def test_float32_log_determinants(relative):
    F, X = spread_fisher(jnp.float32)
    damping = relative * np.sum(X**2) / 80
    expected = np.linalg.slogdet(X.T @ X + damping * np.eye(80))[1]
    scores, low_rank, dense = jax.jit(lambda F, d: [form.logdet(d) for form in (F, jf.low_rank(F, 30), jf.dense(F))])(
        F, damping
    )
    np.testing.assert_allclose([scores, low_rank], expected, rtol=1e-4)
    # In a p x p matrix in float32, fifty zero eigenvalues have rounding errors of 1e-6 of the others.
    np.testing.assert_allclose(dense, expected, rtol=1e-4 if relative > 1e-5 else 5e-3)


@pytest.mark.parametrize("view", [jf.low_rank, jf.sketch])
@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-7])
def test_eigenvectors_of_fewer_rows_are_orthonormal_for_any_spectrum(view, smallest):
    """In float32: lengths of 1 and right angles to rounding, and so solves as accurate as the eigenvalues are."""
    n, p = 8, 20
    u, v = (np.linalg.qr(numbers(seed, size, n))[0] for seed, size in ((0, n), (1, p)))
    x = np.asarray(np.sqrt(n) * (u * np.sqrt(np.geomspace(smallest, 1, n))) @ v.T, np.float32)
    model = lambda w, x: jf.Normal(jnp.dot(x, w, precision="highest"), jnp.ones((), x.dtype))  # noqa: E731
    F = view(jf.exact_fisher(model)(jnp.zeros(p, jnp.float32), jnp.asarray(x)), n)
    vectors, eps = np.asarray(F.form.vectors, float), float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(vectors.T @ vectors, np.diag(np.asarray(F.form.values) > 0), rtol=0, atol=20 * eps)
    matrix, right = x.astype(float).T @ x / n, np.asarray(numbers(2, p), np.float32)
    for damping in (1e-2, 1e-3):
        expected = np.linalg.solve(matrix + damping * np.eye(p), right.astype(float))
        off = np.linalg.norm(np.asarray(F.solve(right, damping)) - expected) / np.linalg.norm(expected)
        assert off < 5 * eps / damping, (damping, off)


def test_a_weight_of_one_output_or_one_input_is_a_layer_of_its_own():
    """The cotangents of the last layer of a regression do not depend on its inputs, so that its Kronecker block is exact."""

    def model(p, x):
        hidden = jnp.tanh(x[None] @ p["in"] + p["b"])
        return jf.Normal((hidden @ p["out"] + p["c"])[0], jnp.asarray(0.5))

    rng = np.random.default_rng(0)
    shapes = {"in": (1, 4), "b": (4,), "out": (4, 1), "c": (1,)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal(6))
    F = jf.exact_fisher(model)(params, x)
    K = jax.jit(jf.kronecker)(F)
    assert repr(K).endswith("block-diagonal: 2 Kronecker (expand))"), repr(K)

    hidden = np.tanh(np.asarray(x)[:, None] @ np.asarray(params["in"]) + np.asarray(params["b"]))
    inputs = [np.column_stack([side, np.ones(6)]) for side in (np.asarray(x), hidden)]
    back = np.asarray(params["out"])[:, 0] * (1 - hidden**2) / 0.5
    first = np.kron(inputs[0].T @ inputs[0], back.T @ back)
    first *= np.mean(np.sum(inputs[0] ** 2, 1) * np.sum(back**2, 1)) / np.trace(first)
    last = inputs[1].T @ inputs[1] / 6 / 0.25
    expected = np.zeros((13, 13))
    # In the order of the parameters: b, c, in, out.
    b, c, w, v = np.arange(4), [4], np.arange(5, 9), np.arange(9, 13)
    expected[np.ix_([*w, *b], [*w, *b])] = first
    expected[np.ix_([*v, *c], [*v, *c])] = last
    assert_close(K.as_matrix(), expected)
    assert_close(np.asarray(F.as_matrix())[np.ix_([*v, *c], [*v, *c])], last)


@pytest.mark.relaxed
@pytest.mark.parametrize("sizes", [(3, 4), (1, 4), (4, 1)])
def test_a_weight_stored_as_outputs_by_inputs_has_its_bias(sizes):
    """A layer of Equinox is ``weight @ x + bias``: its Kronecker block is the same, with the parameters in another order."""
    import equinox as eqx

    layer = eqx.nn.Linear(*sizes, key=jax.random.key(0), dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, sizes[0])))
    scores = jf.scores(lambda layer, x: jnp.sum(jnp.sin(layer(x))))(layer, x)
    K = jf.kronecker(jf.empirical_fisher(lambda layer, x: jnp.sum(jnp.sin(layer(x))))(layer, x))
    assert repr(K).endswith("block-diagonal: 1 Kronecker (expand))"), repr(K)
    a = np.column_stack([x, np.ones(5)])
    g = np.cos(np.asarray(x) @ np.asarray(layer.weight).T + np.asarray(layer.bias))
    rows = np.einsum("no,ni->noi", g, a)
    # The parameters are the weight, row by row, and then the bias.
    order = np.r_[
        (np.arange(sizes[1])[:, None] * (sizes[0] + 1) + np.arange(sizes[0])).ravel(),
        np.arange(sizes[1]) * (sizes[0] + 1) + sizes[0],
    ]
    expected = np.kron(g.T @ g, a.T @ a)[np.ix_(order, order)]
    trace = np.mean(np.sum(rows**2, (1, 2)))
    assert_close(K.as_matrix(), expected * (trace / np.trace(expected)))
    rows = rows.reshape(5, -1)[:, order]
    assert_close(scores.gram(), rows @ rows.T)
    assert_close(scores.as_matrix(), rows)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_factored_damping_of_singular_factors(dtype):
    """A zero damping is an error; one that turns out to be zero at run time gives a finite solution that has not converged."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), dtype)
    model = lambda w, x: jf.Normal(x @ w, jnp.ones(3, dtype) * jnp.array([1, 1, 0], dtype) + 1)  # noqa: E731
    K = jf.kronecker(jf.exact_fisher(model)(jnp.ones((4, 3), dtype), x))
    v = jnp.ones((4, 3), dtype)
    with pytest.raises(ValueError, match=r"`damping` is 0, and without damping factors may be singular"):
        jf.solve(K, v, 0.0, solver=jf.factored_solve)
    found, info = jax.jit(lambda K, v, d: jf.solve(K, v, d, solver=jf.factored_solve))(K, v, 0.0)
    assert np.all(np.isfinite(found)) and info.finite and not info.converged


def test_the_views_of_a_stack_of_layers_are_those_of_its_layers():
    """A scan over stacked weights, outputs by inputs, and biases, beside the same two layers as leaves of their own."""
    p = {"b": jnp.asarray(numbers(2, 2, 3)), "w": jnp.asarray(numbers(1, 2, 3, 3))}
    x, v = jnp.asarray(numbers(3, 5, 2, 3)), jax.tree.map(lambda leaf: jnp.sin(7 * leaf), p)

    def layer(x, w, b):
        return jnp.sin(x @ w.T + b[None])

    def stacked(p, x):
        return jnp.sum(jax.lax.scan(lambda x, p: (layer(x, p["w"], p["b"]), None), x, p)[0])

    def apart(p, x):
        return jnp.sum(layer(layer(x, p["w"][0], p["b"][0]), p["w"][1], p["b"][1]))

    def asked(F, v):
        found = F.mv(v), F.diagonal(), F.solve(v, 0.1), F.logdet(0.1), F.trace()
        return F.as_matrix(), F.restrict(lambda path: "b" in path).as_matrix(), *map(flat_jax, found)

    views = jf.kronecker, jf.kronecker_reduce, jf.eigen_kronecker

    def both(p, v, x):
        made = []
        for model, split in ((stacked, False), (apart, True)):
            q, u = ({k: [*leaf] for k, leaf in tree.items()} if split else tree for tree in (p, v))
            F = jf.empirical_fisher(model)(q, x)
            assert len(set(jax.tree.leaves(jf.layers(F)))) == 1 + split
            made.append([asked(view(F), u) for view in views])
            made[-1].append(flat_jax(jf.solve(jf.kronecker(F), u, 0.1, solver=jf.factored_solve)[0]))
        return made

    for found, expected in zip(*map(jax.tree.leaves, evaluated(both, p, v, x)), strict=True):
        assert_close(found, expected, factor=1e4)
