"""Scores against a loop of `jax.grad`, held and streamed, weighted, centred and padded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import N, assert_close, classifier, data, flat, loop_scores, mlp_params, reference
from programs.evaluate import evaluated, traced

import jaxfisher as jf

LOG_PROB = jf.log_likelihood(classifier)
BATCH_SIZES = [None, 1, 3, 7, 50]  # all at once, one by one, a remainder of one, exactly all, more than there are


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_every_quantity_equals_the_loop(batch_size, key):
    params, x, y, weights, rows = reference()
    v = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), params)
    w = jnp.linspace(-1.0, 2.0, N)
    omega = np.asarray(weights) / np.sum(weights)

    @traced
    def everything(params, x, y, weights):
        made = jf.scores(LOG_PROB, batch_size=batch_size)(params, x, y, weights=weights)
        return (
            made.mv(v),
            ravel_pytree(made.rmv(w))[0],
            made.gram(),
            made.squared_norms(),
            ravel_pytree(made.diagonal())[0],
            made.second_moment(),
            made.as_matrix(),
        )

    # A weight of zero is padding, and a row of zeros.
    padded = rows * (np.asarray(weights) > 0)[:, None]
    mv, rmv, gram, norms, diagonal, moment, matrix = everything(params, x, y, weights)
    assert_close(matrix, padded)
    assert_close(mv, padded @ flat(v))
    assert_close(rmv, padded.T @ np.asarray(w))
    assert_close(gram, padded @ padded.T)
    assert np.array_equal(gram, gram.T)
    assert_close(norms, np.sum(padded**2, axis=1))
    assert_close(diagonal, omega @ padded**2)
    assert_close(moment, padded.T @ (omega[:, None] * padded))


def shared(params, tokens, y):
    """A table, a weight shared over positions, and a lone scale."""
    hidden = jnp.tanh(params["table"][tokens] @ params["w"] + params["b"][None])
    return jf.Normal(params["scale"] * jnp.sum(hidden), 1.0).log_prob(y)


@functools.cache
def blocks_of_rows():
    """Two blocks of examples of `shared`, and vectors like its parameters."""
    keys = jax.random.split(jax.random.key(4), 6)
    params = {
        "table": jax.random.normal(keys[0], (5, 3)),
        "w": jax.random.normal(keys[1], (3, 4)),
        "b": jax.random.normal(keys[2], (4,)),
        "scale": jnp.asarray(0.7),
    }
    tokens, y = jax.random.randint(keys[3], (9, 2), 0, 5), jax.random.normal(keys[4], (9,))
    vectors = jax.tree.map(lambda leaf: jax.random.normal(keys[5], (4, *leaf.shape)), params)
    return params, (tokens[:6], y[:6]), (tokens[6:], y[6:]), vectors


WAYS = {
    "held": {},
    "in pieces": {"batch_size": 2},
    "in pieces with a rest": {"batch_size": 4},
    "centred": {"center": True},
    "in pieces, centred": {"center": True, "batch_size": 4},
}


@pytest.mark.parametrize("log_prob", [shared, LOG_PROB], ids=["shared", "network"])
def test_products_with_other_rows_and_with_many_vectors(log_prob):
    params, mine, theirs, vectors = blocks_of_rows()
    if log_prob is LOG_PROB:
        params, mine, theirs = mlp_params(jax.random.key(1)), data(jax.random.key(2), 6), data(jax.random.key(3), 3)
        vectors = jax.tree.map(lambda leaf: jnp.stack([jnp.cos(leaf + k) for k in range(4)]), params)
    weights = jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 3.0])
    flat_vectors = np.stack([flat(jax.tree.map(lambda leaf, k=k: leaf[k], vectors)) for k in range(4)])

    @traced
    def everything():
        made = {way: jf.scores(log_prob, **given)(params, *mine, weights=weights) for way, given in WAYS.items()}
        other = {way: jf.scores(log_prob, **given)(params, *theirs) for way, given in WAYS.items()}
        rows = {way: (made[way].as_matrix(), other[way].as_matrix()) for way in WAYS}
        pairs = [(a, b) for a in WAYS for b in WAYS if a == "held" or b == "held" or (a, b) == ("centred", "in pieces")]
        return (
            rows,
            {pair: made[pair[0]].cross_gram(other[pair[1]]) for pair in pairs},
            {w: made[w].cross_gram(vectors) for w in WAYS},
        )

    rows, crossed, products = everything()
    for (a, b), found in crossed.items():
        assert_close(found, np.asarray(rows[a][0]) @ np.asarray(rows[b][1]).T)
    for way, found in products.items():
        assert_close(found, np.asarray(rows[way][0]) @ flat_vectors.T)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_centred_scores_give_the_covariance(batch_size):
    params, x, y, weights, rows = reference()
    made = jf.scores(LOG_PROB, center=True, batch_size=batch_size)

    def views(params, x, y, weights):
        plain = made(params, x, y)
        return plain.as_matrix(), plain.second_moment(), made(params, x, y, weights=weights).second_moment()

    matrix, moment, weighted = evaluated(views, params, x, y, weights)
    assert_close(matrix, rows - rows.mean(0))
    assert_close(moment, np.cov(rows.T, bias=True))
    omega = np.asarray(weights) / np.sum(weights)
    assert_close(weighted, np.cov(rows.T, aweights=omega, ddof=0), factor=1e3)


def test_padding_may_hold_anything():
    params, x, y, weights, rows = reference()
    spoiled = x.at[1].set(jnp.nan)
    omega = np.asarray(weights) / np.sum(weights)
    for batch_size in (None, 2):
        made = jf.scores(LOG_PROB, batch_size=batch_size)(params, spoiled, y, weights=weights)
        assert_close(made.second_moment(), rows.T @ (omega[:, None] * rows))


def test_a_non_finite_score_is_not_hidden():
    params, x, y, _, _ = reference()
    moment = jf.scores(LOG_PROB)(params, x.at[1].set(jnp.nan), y).second_moment()
    assert not np.any(np.isfinite(moment))


def test_weights_are_scale_free_in_float32():
    params, x, y, weights, rows = reference()
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    omega = np.asarray(weights) / np.sum(weights)
    for scale in (1e-30, 1e30):
        scaled = (weights * scale).astype(jnp.float32)
        moment = jf.scores(LOG_PROB)(narrow, x.astype(jnp.float32), y, weights=scaled).second_moment()
        assert moment.dtype == jnp.float32
        assert_close(moment, rows.T @ (omega[:, None] * rows))


def test_columns_are_in_ravel_order(key):
    """A direction in one leaf selects the columns that `ravel_pytree` gives to that leaf."""
    params, x, y, _, _ = reference()
    direction = jax.tree.map(jnp.zeros_like, params)
    direction["out"][0] = jax.random.normal(key, direction["out"][0].shape)
    along = jax.jit(jax.vmap(lambda x, y: jax.jvp(lambda p: LOG_PROB(p, x, y), (params,), (direction,))[1]))(x, y)
    matrix = jf.scores(LOG_PROB)(params, x, y).as_matrix()
    assert_close(matrix @ flat(direction), np.asarray(along))


def test_bfloat16_parameters_have_float32_statistics():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mlp_params(jax.random.key(7)))
    x, y = data(jax.random.key(8), dtype=jnp.bfloat16)
    made = jf.scores(LOG_PROB)(params, x, y)
    assert made.as_matrix().dtype == jnp.float32
    expected = loop_scores(LOG_PROB, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), x.astype(jnp.float64), y)
    assert_close(made.as_matrix(), expected, factor=8, eps=float(jnp.finfo(jnp.bfloat16).eps))


def test_streaming_bounds_every_buffer():
    """With a batch size, the compiled diagonal and Gram matrix have no temporary array as large as all factors."""
    n, length, width, classes = 128, 32, 64, 16
    params = {"w": jnp.ones((width, classes), jnp.float32)}
    x = jnp.ones((n, length, width), jnp.float32)
    y = jnp.zeros((n, length), int)
    log_prob = jf.log_likelihood(lambda params, x: jf.Categorical(x @ params["w"]))
    factors = n * length * (width + classes) * 4

    def temporary(batch_size, quantity):
        run = jax.jit(lambda params, x: quantity(jf.scores(log_prob, batch_size=batch_size)(params, x, y)))
        return run.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    held = jax.jit(lambda params, x: jf.scores(log_prob)(params, x, y)).lower(params, x).compile().memory_analysis()
    assert held.output_size_in_bytes >= factors, "the control: what is held is that large"
    for quantity in (lambda s: s.diagonal(), lambda s: s.gram()):
        assert temporary(8, quantity) < 0.4 * factors + 4 * n * n * 4


def test_products_with_constant_vectors_inside_a_jit(key):
    """Vectors as constants of a program give the same as vectors as arguments. XLA's fusions once read wrong memory here."""
    keys = jax.random.split(key, 3)
    params = {"w": jax.random.normal(keys[0], (64, 256), jnp.float32), "v": jax.random.normal(keys[1], (256, 10), jnp.float32)}
    model = lambda p, x: jf.Categorical(logits=jnp.tanh(x @ p["w"]) @ p["v"])  # noqa: E731
    F = jf.exact_fisher(model)(params, jax.random.normal(keys[2], (256, 64), jnp.float32))
    constant = lambda value: jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), params)  # noqa: E731
    for value in (0.0, 1.0):
        expected = jax.jit(lambda S, v: (S.mv(v), S.rmv(S.mv(v))))(F.form.scores, constant(value))
        inside = jax.jit(lambda S, value=value: (S.mv(constant(value)), S.rmv(S.mv(constant(value)))))(F.form.scores)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), inside, expected)
        sums = jax.jit(lambda S, value=value: S.rmv(jnp.full(S.num_rows, value, jnp.float32)))(F.form.scores)
        given = jax.jit(lambda S, w: S.rmv(w))(F.form.scores, jnp.full(F.form.scores.num_rows, value, jnp.float32))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), sums, given)


def test_the_words_for_scores_are_one_line():
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    log_prob = lambda params, x: -jnp.sum((x @ params["w"]) ** 2)  # noqa: E731
    assert repr(jf.scores(log_prob)(params, x)) == "Scores(4 rows, params 6, held)"
    assert repr(jf.scores(log_prob, batch_size=2)(params, x)) == "Scores(4 rows, params 6, in pieces of 2)"
    assert repr(jf.scores(log_prob, center=True)(params, x)) == "Scores(4 rows, params 6, held, centred)"
