"""Examples of weight zero are padding: their rows are zero for any data, in every form of scores."""

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_close, class_sum_fisher, classifier, data, flat, loop_scores, mlp_params
from programs.evaluate import evaluated

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

WEIGHTS = np.array([0.0, 0.5, 1.0, 0.0, 3.0, 0.25, 0.0])
"""The weights of four examples, and of three entries of padding, one of them first and one last."""
LIVE = WEIGHTS > 0
OMEGA = WEIGHTS / WEIGHTS.sum()

# One model for every form that a leaf can be held in.
FORMS = ["conv_2d", "tied_autoencoder", "embedding", "rnn_scan", "masked_weight", "frozen_leaf"]
CASES = [
    *[("mlp", batch_size, center) for batch_size in (None, 3) for center in (False, True)],
    *[(name, None, False) for name in FORMS],
]


def padded(leaf):
    """The examples among padding: NaN for floating data, and an invalid class or index for integers."""
    leaf = np.asarray(leaf)
    rubbish = np.nan if np.issubdtype(leaf.dtype, np.floating) else 10**6
    whole = np.full((len(WEIGHTS), *leaf.shape[1:]), rubbish, leaf.dtype)
    whole[LIVE] = leaf[: LIVE.sum()]
    return jnp.asarray(whole)


def quantities(made, v, w):
    """All quantities that are computed from scores."""
    return {
        "as_matrix": made.as_matrix(),
        "mv": made.mv(v),
        "rmv": ravel_pytree(made.rmv(w))[0],
        "gram": made.gram(),
        "squared_norms": made.squared_norms(),
        "diagonal": ravel_pytree(made.diagonal())[0],
        "second_moment": made.second_moment(),
    }


def expected_of(rows, v, w):
    """The same quantities in NumPy, from the rows."""
    return {
        "as_matrix": rows,
        "mv": rows @ v,
        "rmv": rows.T @ w,
        "gram": rows @ rows.T,
        "squared_norms": np.sum(rows**2, 1),
        "diagonal": OMEGA @ rows**2,
        "second_moment": rows.T @ (OMEGA[:, None] * rows),
    }


def check(function, params, data, rows):
    """Check that the quantities of the scores are those of the rows, and that the rows of padding are exactly zero."""
    w = np.linspace(-1.0, 2.0, len(WEIGHTS))
    v = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)

    def run(params, data, v, w):
        return quantities(function(params, *data, weights=jnp.asarray(WEIGHTS)), v, w)

    found = evaluated(run, params, data, v, w)
    for name, value in expected_of(rows, flat(v), w).items():
        assert_close(found[name], value, factor=1e4)
    for name in ("as_matrix", "mv", "gram", "squared_norms"):
        assert not np.any(np.asarray(found[name])[~LIVE]), name


@pytest.mark.parametrize(("name", "batch_size", "center"), CASES)
def test_padding_is_rows_of_zeros(name, batch_size, center):
    row = catalogue.row(name)
    rows = np.zeros((len(WEIGHTS), ravel_pytree(row.params)[0].size))
    gradients = evaluated(jax.vmap(jax.grad(row.log_prob), (None, *(0 for _ in row.data))), row.params, *row.data)
    rows[LIVE] = [flat(jax.tree.map(lambda leaf, i=i: leaf[i], gradients)) for i in range(LIVE.sum())]
    if center:
        rows = LIVE[:, None] * (rows - OMEGA @ rows)
    function = jf.scores(row.log_prob, center=center, batch_size=batch_size)
    check(function, row.params, jax.tree.map(padded, row.data), rows)


def classified():
    """The classifier of `problems`, with its parameters and its data in padding."""
    params = mlp_params(jax.random.key(3))
    x, y = data(jax.random.key(4))
    return params, x[: LIVE.sum()], y[: LIVE.sum()], padded(x), padded(y)


def test_padding_in_a_sum_of_fishers():
    params, x, y, padded_x, padded_y = classified()
    log_prob = jf.log_likelihood(classifier)
    rows = np.zeros((len(WEIGHTS), flat(params).size))
    rows[LIVE] = loop_scores(log_prob, params, x, y)

    @jax.jit
    def joined(params, x, y):
        fisher = jf.empirical_fisher(log_prob)(params, x, y, weights=WEIGHTS)
        both = (fisher + 2.0 * fisher).form.scores
        return both.as_matrix(), both.squared_norms(), both.centered().as_matrix()

    matrix, norms, centred = joined(params, padded_x, padded_y)
    assert_close(matrix, np.concatenate([rows, rows]))
    assert_close(norms, np.tile(np.sum(rows**2, 1), 2))
    assert_close(centred, np.concatenate([LIVE[:, None] * (rows - 3 * OMEGA @ rows)] * 2))


def test_padding_in_an_exact_and_in_a_sampled_fisher():
    """The Fisher is that of the examples without padding. Padding has several rows per entry, and all of them are zero."""
    params, x, _, padded_x, _ = classified()

    @jax.jit
    def matrices(params, x):
        exact = jf.exact_fisher(classifier)(params, x, weights=WEIGHTS)
        sampled = jf.sampled_fisher(classifier, 2, batch_size=2)(params, jax.random.key(0), x, weights=WEIGHTS)
        return exact.as_matrix(), exact.form.scores.as_matrix(), sampled.form.scores.as_matrix()

    fisher, *scores = matrices(params, padded_x)
    assert_close(fisher, class_sum_fisher(params, x, WEIGHTS[LIVE]))
    for rows in scores:
        rows = np.asarray(rows).reshape(len(WEIGHTS), -1)
        assert not np.any(rows[~LIVE]) and np.all(np.any(rows[LIVE], axis=1))


def test_a_clipped_sum_does_not_see_padding():
    """Clipping uses rows without their weights; its sum must still be that of the examples without padding."""
    params, x, y, padded_x, padded_y = classified()
    log_prob = jf.log_likelihood(classifier)
    rows = loop_scores(log_prob, params, x, y)

    @jax.jit
    def clipped(params, x, y):
        made = jf.scores(log_prob)(params, x, y, weights=WEIGHTS)
        return ravel_pytree(made.rmv(1 / jnp.maximum(1.0, jnp.sqrt(made.squared_norms()) / 0.3)))[0]

    norms = np.linalg.norm(rows, axis=1)
    assert_close(clipped(params, padded_x, padded_y), (1 / np.maximum(1.0, norms / 0.3)) @ rows)


DAMPING, BOUND = 0.3, 2.0


def steps(params, x, y, share):
    """What takes roots of weights and of norms. The weights depend on a number, as do those of a robust fit."""
    log_prob, weights = jf.log_likelihood(classifier), jnp.asarray(WEIGHTS)
    weights = jnp.where(weights > 0, weights + share * jnp.square(weights), 0)
    scores, e = jf.scores(log_prob)(params, x, y, weights=weights), jnp.cos(jnp.arange(len(WEIGHTS), dtype=float))
    fisher = jf.fisher_from_scores(scores)
    made = {
        "natural_grad": jf.natural_grad(log_prob, damping=DAMPING)(params, x, y, weights=weights),
        "least_squares": jf.least_squares(scores, e, DAMPING)[0],
        "solve": fisher.solve(params, DAMPING),
        "sqrt_mv": fisher.sqrt_mv(params, DAMPING),
        "logdet": fisher.logdet(DAMPING),
        "clipped_sum": scores.clipped_sum(BOUND).sum,
    }
    return {name: ravel_pytree(value)[0] for name, value in made.items()}


def dense_steps(params, x, y, share):
    """The same of the examples without padding, from dense rows."""
    weights = jnp.asarray(WEIGHTS[LIVE])
    weights = weights + share * jnp.square(weights)
    omega, e = weights / jnp.sum(weights), jnp.cos(jnp.arange(len(WEIGHTS), dtype=float))[LIVE]
    rows = jax.vmap(jax.grad(jf.log_likelihood(classifier)), (None, 0, 0))(params, x, y)
    rows = jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(rows)], 1)
    damped = (rows.T * omega[None]) @ rows + DAMPING * jnp.eye(rows.shape[1])
    flat, norms = ravel_pytree(params)[0], jnp.sqrt(jnp.sum(jnp.square(rows), 1))
    root, inverse = damped, jnp.eye(len(damped))
    for _ in range(12):  # Denman and Beavers
        root, inverse = 0.5 * (root + jnp.linalg.inv(inverse)), 0.5 * (inverse + jnp.linalg.inv(root))
    return {
        "natural_grad": jnp.linalg.solve(damped, -rows.T @ omega),
        "least_squares": jnp.linalg.solve(damped, rows.T @ (omega * e)),
        "solve": jnp.linalg.solve(damped, flat),
        "sqrt_mv": root @ flat,
        "logdet": jnp.linalg.slogdet(damped)[1][None],
        "clipped_sum": jnp.minimum(1, BOUND / norms) @ rows,
    }


def test_padding_takes_no_part_in_derivatives():
    """Forward and in reverse, where the root of a weight of zero, or of the norm of a row of zeros, has no derivative."""
    params, x, y, padded_x, padded_y = classified()

    def both_ways(function, *data):
        along = jax.tree.map(lambda leaf: jnp.sin(1 + jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
        forward = jax.jvp(lambda p, s: function(p, *data, s), (params, 0.1), (along, 1.0))[1]
        total = lambda p, s: sum(jnp.sum(jnp.sin(value)) for value in function(p, *data, s).values())  # noqa: E731
        return forward | {"in reverse": ravel_pytree(jax.grad(total, (0, 1))(params, 0.1))[0]}

    found = evaluated(lambda *data: both_ways(steps, *data), padded_x, padded_y)
    expected = evaluated(lambda *data: both_ways(dense_steps, *data), x, y)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10 * np.max(np.abs(value)), err_msg=name)


def test_padding_of_random_keys():
    """Random keys may be part of an example, for instance for dropout, and padding of keys is replaced too."""
    keys = jax.random.split(jax.random.key(0), 3)
    model = lambda p, x, key: jf.Normal(p * x * jax.random.uniform(key, (), x.dtype), 1.0)  # noqa: E731
    x = jnp.array([1.0, 2.0, jnp.nan])
    trace = jf.exact_fisher(model)(jnp.ones(()), x, keys, weights=np.array([1.0, 1.0, 0.0])).trace()
    slopes = [x[i] * jax.random.uniform(keys[i], (), x.dtype) for i in range(2)]
    assert_close(trace, np.mean(np.square(slopes)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_have_no_scale(dtype, compiled):
    """Means are accurate at any scale of the weights, even for subnormal weights, which XLA flushes to zero on a CPU."""
    info = np.finfo(dtype)
    shape = np.random.default_rng(0).uniform(0.5, 1.0, 50)
    x = shape[::-1].astype(dtype)
    mean = jf.exact_fisher(lambda theta, x: jf.Normal(theta * x, jnp.ones((), dtype)))
    trace = lambda weights: mean(dtype(1), x, weights=weights).trace()  # noqa: E731
    for scale in (info.max, 1e30, 1.0, 1e-30, 2 * info.tiny, info.tiny, 1e-3 * info.tiny):
        weights = (shape * scale).astype(dtype)
        omega = weights.astype(np.longdouble) / np.sum(weights.astype(np.longdouble))
        found = (jax.jit(trace) if compiled else trace)(weights)
        expected = np.sum(omega * x.astype(np.longdouble) ** 2)
        np.testing.assert_allclose(float(found), float(expected), rtol=20 * info.eps)


def test_weights_that_are_none_give_nan_where_their_values_are_not_known():
    trace = jax.jit(
        lambda weights: jf.exact_fisher(lambda theta, x: jf.Normal(theta * x, 1.0))(1.0, np.ones(2), weights=weights).trace()
    )
    for weights in ([-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]):
        assert np.isnan(trace(jnp.array(weights))), weights
    assert trace(jnp.array([0.0, 2.0])) == 1


def makers():
    """Every function that computes a mean over examples, as a function of parameters, data and weights."""
    log_prob = jf.log_likelihood(classifier)
    key = jax.random.key(1)
    outputs, squares = lambda params, x: classifier(params, x).logits, lambda f, y: 0.5 * jnp.sum(jnp.square(f)) - f[y]
    in_data = {
        "exact": lambda p, x, y, **given: jf.exact_fisher(classifier)(p, x, **given),
        "exact, in pieces": lambda p, x, y, **given: jf.exact_fisher(classifier, batch_size=2)(p, x, **given),
        "sampled": lambda p, x, y, **given: jf.sampled_fisher(classifier, 2)(p, key, x, **given),
        "implicit": lambda p, x, y, **given: jf.implicit_fisher(classifier)(p, x, **given),
        "empirical": jf.empirical_fisher(log_prob),
        "centred": jf.empirical_fisher(log_prob, center=True),
        "Gauss-Newton": jf.gauss_newton(outputs, squares),
        "observed": jf.observed_information(log_prob),
        "of the KL": lambda p, x, y, **given: jf.kl_hessian(classifier)(p, x, **given),
    }
    for center in (False, True):
        for batch_size in (None, 2):
            scores = jf.scores(log_prob, center=center, batch_size=batch_size)
            in_data[f"of scores, {center}, {batch_size}"] = lambda *data, scores=scores, **given: jf.fisher_from_scores(
                scores(*data, **given)
            )
    return in_data


@pytest.mark.parametrize("name", makers())
def test_padding_is_not_counted(name):
    """The number of examples in a mean does not include padding, for any weights; it is zero for a batch of padding."""
    params, x, y, padded_x, padded_y = classified()
    made = makers()[name]
    alone, padded = (
        jax.jit(lambda *data, given=given: made(params, *data, weights=given).n)(*data)
        for data, given in (((x, y), WEIGHTS[LIVE]), ((padded_x, padded_y), WEIGHTS))
    )
    assert float(alone) == float(padded) == LIVE.sum()
    # A batch of zeros is an error only if the weights are known at trace time.
    of_nothing = jax.jit(lambda weights, *data: made(params, *data, weights=weights).n)
    assert float(of_nothing(jnp.zeros(len(WEIGHTS)), padded_x, padded_y)) == 0


VIEWS = {
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "blocks": jf.block_diagonal,
    "Kronecker": jf.kronecker,
    "Kronecker, reduced": jf.kronecker_reduce,
    "eigenbasis": jf.eigen_kronecker,
}
NOT_MERGED = {"blocks", "eigenbasis"}
"""Views that are held as scores, or in a basis of their own, so that `merge` refuses them."""


@pytest.mark.parametrize("name", ["exact, in pieces", "of scores, False, None"])
def test_padding_takes_no_part_in_a_view_and_in_what_is_merged(name):
    """A view of a batch with padding, and its merger with another, are those of its examples, and so is their count."""
    params, x, y, padded_x, padded_y = classified()
    made = makers()[name]
    other, more = (x[:2] - 1.0, y[:2]), np.array([1.0, 2.0])

    def run(weights, *data):
        views = {which: view(made(params, *data, weights=weights)) for which, view in VIEWS.items()}
        for which in views.keys() - NOT_MERGED:
            views[f"{which}, merged"] = jf.merge(views[which], VIEWS[which](made(params, *other, weights=more)))
        return {which: (fisher.as_matrix(), fisher.n) for which, fisher in views.items()}

    alone, padded = evaluated(run, WEIGHTS[LIVE], x, y), evaluated(run, WEIGHTS, padded_x, padded_y)
    for which, (matrix, n) in padded.items():
        assert float(n) == LIVE.sum() + 2 * which.endswith("merged"), which
        assert_close(matrix, alone[which][0], factor=1e4)
    if name.startswith("exact"):
        dense, beside = class_sum_fisher(params, x, WEIGHTS[LIVE]), class_sum_fisher(params, other[0], more)
        assert_close(padded["dense"][0], dense, factor=1e4)
        merged = (WEIGHTS.sum() * dense + more.sum() * beside) / (WEIGHTS.sum() + more.sum())
        assert_close(padded["dense, merged"][0], merged, factor=1e4)
        assert_close(padded["diagonal, merged"][0], np.diag(np.diag(merged)), factor=1e4)


TINY = np.array([1.0, 1e-40, 0.0, 2.0, 1e-320, 0.0, 1.0])
"""Weights of which some are below the smallest normal number of float32, or of float64."""


@pytest.mark.parametrize("given", [{}, {"weights": WEIGHTS}, {"weights": TINY}, {"counts": np.arange(7.0)}])
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fisher_of_scores_is_a_mean_over_what_the_empirical_fisher_is(given, batch_size, dtype):
    """`fisher_from_scores` and `empirical_fisher` give means over the same examples and mass, with the same description."""
    log_prob = jf.log_likelihood(lambda mu, x: jf.Normal(mu * x, jnp.ones((), dtype)))
    data = np.linspace(1.0, 2.0, 7, dtype=dtype), np.ones(7, dtype)
    for center in [False] if "counts" in given else [False, True]:
        fisher = jf.empirical_fisher(log_prob, center, batch_size=batch_size)(dtype(1), *data, **given)
        scores = jf.scores(log_prob, center, batch_size=batch_size)(dtype(1), *data, **given)
        found, expected = jf.fisher_from_scores(scores).provenance, fisher.provenance
        assert (float(found.n), float(found.mass)) == (float(expected.n), float(expected.mass))
        assert str(found) == str(expected).replace("empirical", "scores")
        assert found.together == expected.together == center


@pytest.mark.parametrize("view", [jf.kronecker, jf.diagonal])
def test_padding_takes_no_part_in_a_step_of_kfac(view):
    """The damping of kfac's direction depends on the number of examples. A batch with padding takes its examples' step."""
    params, x, y, _, _ = classified()
    step = jf.training_step(classifier, jf.kfac(view=view, solver=None))

    def path(x, y, weights):
        found, state = params, step.init(params, x, y, weights=weights)
        for _ in range(3):
            found, state, _ = step(found, state, x, y, weights=weights)
        return found, state.inner.direction_damping

    alone = evaluated(path, x, y, WEIGHTS[LIVE])
    # The padding comes last, so that each example keeps its place, from which its target's key is made.
    at_end = [jnp.concatenate([leaf, jnp.zeros((20, *leaf.shape[1:]), leaf.dtype)]) for leaf in (x, y)]
    padded = evaluated(path, *at_end, np.concatenate([WEIGHTS[LIVE], np.zeros(20)]))
    for found, expected in zip(padded, alone, strict=True):
        assert_close(flat(found), flat(expected), factor=1e6)


@pytest.mark.parametrize("view", [jf.dense, jf.diagonal, lambda F: F])
def test_the_derivative_by_a_weight_is_that_of_a_row_of_zeros_only_if_the_weight_is_zero(view):
    """Of ``sum w_i |s_i|^2 / sum w_i`` it is ``(|s_i|^2 - mean) / sum w_i``."""
    x = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 3.0]])

    def trace(w):
        return view(jf.empirical_fisher(jnp.dot)(jnp.zeros(2), x, weights=w)).trace()

    for last, square in ((0.0, 0.0), (1e-30, 10.0)):
        slope = jax.grad(trace)(jnp.array([1.0, 2.0, last]))
        np.testing.assert_allclose(slope, (np.array([4.0, 1.0, square]) - 2) / 3, rtol=1e-13)
