"""Scores as factors against plain per-example gradients, on every model of the catalogue, and the forms that store them."""

import sys
from functools import partial

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import flat
from programs.evaluate import evaluated

import jaxfisher as jf
from jaxfisher._engine import parts

pytestmark = pytest.mark.usefixtures("in_numpy")

ROWS = [pytest.param(name, marks=pytest.mark.relaxed) if name in catalogue.RELAXED else name for name in catalogue.names()]
ONE_OF_EACH_FORM = {
    "scalar_parameters",
    "mlp",
    "tied_autoencoder_wide",
    "weight_norm",
    "conv_strided",
    "conv_1d_wide",
    "rnn_scan",
    "scanned_layers_over_positions_wide",
    "positions_wide",
    "attention",
    "embedding_wide",
    "embedding_tied_to_the_output_wide",
    "mixture_of_experts",
    "chosen_expert",
}
"""Rows that together have every form. They are also tested in pieces and centred, which depends on the form only.

These rows are compiled. The others run in NumPy, which takes a tenth of the time of compiling.
"""
WEIGHTS = np.array([0.4, 1.0, 2.5, 0.7, 1.6])
TILTED = WEIGHTS / WEIGHTS.sum()
UNIFORM = np.full(catalogue.N, 1 / catalogue.N)


def tolerance(row):
    """The tolerance relative to the largest number of a quantity."""
    return 1e-12 if row.eps < 1e-15 else 30 * row.eps


def paths_of(params):
    """The path of every leaf, as `jaxfisher` names it."""
    return [jax.tree_util.keystr(path) or "params" for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def flat_rows(tree):
    """A tree of per-example gradients as rows, in the order of `ravel_pytree`."""
    leaves = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)


def quantities(scores, v, w):
    """The quantities that are compared for scores in memory and for streamed ones."""
    return {
        "mv": scores.mv(v),
        "rmv": ravel_pytree(scores.rmv(w))[0],
        "gram": scores.gram(),
        "diagonal": ravel_pytree(scores.diagonal())[0],
    }


def everything(log_prob, row):
    """All quantities of a row's scores, by the library, and the plain per-example gradients: one program."""
    rng = np.random.default_rng(20)
    v = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), row.params)
    w = jnp.asarray(rng.standard_normal(catalogue.N))

    def run(params, data, v, w, weights):
        held = jf.scores(log_prob)(params, *data, weights=weights)
        whole = {
            **quantities(held, v, w),
            "squared_norms": held.squared_norms(),
            "second_moment": held.second_moment(),
            "as_matrix": held.as_matrix(),
        }
        made = {"held": whole}
        if row.name in ONE_OF_EACH_FORM:
            made["centred"] = quantities(jf.scores(log_prob, center=True)(params, *data, weights=weights), v, w)
            streamed = jf.scores(log_prob, batch_size=2)(params, *data)
            made["streamed"] = quantities(streamed, v, w)
        plain = jax.vmap(jax.grad(row.log_prob), (None, *(0 for _ in data)))(params, *data)
        return made, plain

    run_once = jax.jit(run) if row.name in ONE_OF_EACH_FORM else partial(evaluated, run)
    made, plain = run_once(row.params, row.data, v, w, jnp.asarray(WEIGHTS))
    for path, leaf in zip(paths_of(row.params), jax.tree.leaves(plain), strict=True):
        alive = np.any(np.asarray(leaf, float).reshape(len(leaf), -1), axis=1)
        assert path not in row.factored + row.plain or alive.sum() > 1, f"{path}: the row's scores are zero"
    return made, flat_rows(plain), flat(v), np.asarray(w)


def expected(rows, omega, v, w):
    """Every quantity, computed from dense rows."""
    return {
        "mv": rows @ v,
        "rmv": rows.T @ w,
        "gram": rows @ rows.T,
        "diagonal": omega @ rows**2,
        "squared_norms": np.sum(rows**2, axis=1),
        "second_moment": rows.T @ (omega[:, None] * rows),
        "as_matrix": rows,
    }


def check(row, log_prob):
    """The scores of ``log_prob`` by the library are the per-example gradients of the row."""
    made, rows, v, w = everything(log_prob, row)
    dense = {
        "held": expected(rows, TILTED, v, w),
        "centred": expected(rows - TILTED @ rows, TILTED, v, w),
        "streamed": expected(rows, UNIFORM, v, w),
    }
    for how, values in made.items():
        for name, value in values.items():
            value = np.asarray(value, np.float64)
            size = np.abs(dense[how][name]).max()
            assert value.shape == dense[how][name].shape, (how, name)
            np.testing.assert_allclose(value, dense[how][name], rtol=0, atol=tolerance(row) * size, err_msg=f"{how} {name}")
        if row.eps < 1e-15:
            # One triangle mirrors the other. In narrow dtypes XLA may recompute a product for each of them.
            assert np.array_equal(values["gram"], values["gram"].T), how


@pytest.mark.parametrize("name", ROWS)
def test_every_quantity_equals_plain_gradients(name):
    row = catalogue.row(name)
    check(row, row.log_prob)


def test_the_comparison_sees_one_lost_use_of_a_tied_leaf():
    row = catalogue.row("tied_autoencoder")

    def broken(p, x):
        frozen = jax.lax.stop_gradient(p["w"])
        return -0.5 * jnp.sum((jnp.tanh(x @ p["w"] + p["b"]) @ frozen.T - x) ** 2)

    with pytest.raises(AssertionError, match=r"held|centred"):
        check(row, broken)


@pytest.mark.parametrize("name", ROWS)
def test_leaves_are_held_as_stated(name):
    row = catalogue.row(name)
    explained = jf.explain(row.log_prob)(row.params, *row.data)
    assert [leaf.path for leaf in explained.leaves] == paths_of(row.params)
    assert set(explained.factored) == set(row.factored)
    assert set(explained.plain) == set(row.plain)
    table = str(explained)
    for leaf in explained.leaves:
        assert leaf.path in table
        if leaf.path in row.plain:
            assert leaf.why, "a leaf that falls back says why"
            assert leaf.why in table


@pytest.mark.parametrize("name", ["unused_leaf", "scanned_layers", "positional_table", "cond"])
def test_what_is_explained_is_what_the_views_do(name):
    """As many Kronecker blocks as leaves that say so, biases in their weights' layers, and a diagonal of all the others."""
    row = catalogue.row(name)
    said = {leaf.path: leaf.kronecker for leaf in jf.explain(row.log_prob)(row.params, *row.data).leaves}
    F = jax.eval_shape(lambda params, *data: jf.empirical_fisher(row.log_prob)(params, *data), row.params, *row.data)
    K = jax.eval_shape(jf.kronecker, F)
    kinds = [form.name for form in K.form.blocks]
    assert kinds.count("Kronecker (expand)") == list(said.values()).count("yes"), (said, K)
    assert kinds.count("diagonal") == any(what.startswith("no") for what in said.values()), (said, K)
    owners = dict(zip(said, jax.tree.leaves(jf.layers(F)), strict=True))
    assert owners == {path: what.removeprefix("with ") if what.startswith("with") else path for path, what in said.items()}


@pytest.mark.parametrize("name", sorted(catalogue.WRAPPED))
def test_wrapping_a_model_changes_nothing(name):
    wrapped, bare = catalogue.row(name), catalogue.row(catalogue.row(name).like)
    assert jf.explain(wrapped.log_prob)(wrapped.params, *wrapped.data).leaves == (
        jf.explain(bare.log_prob)(bare.params, *bare.data).leaves
    )


@pytest.mark.parametrize("name", ["conv_strided", "conv_1d_wide", "embedding_wide", "scanned_layers"])
def test_a_model_is_held_in_the_same_forms_in_a_narrower_dtype(name):
    """As in mixed precision, the parameters and the data are cast on the way in, and so are the gradients on the way out."""
    row = catalogue.row(name)

    def narrow(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def log_prob(params, *data):
        return row.log_prob(narrow(params), *narrow(data)).astype(float)

    wide, found = (jf.explain(function)(row.params, *row.data).leaves for function in (row.log_prob, log_prob))
    assert [(leaf.form, leaf.kronecker) for leaf in found] == [(leaf.form, leaf.kronecker) for leaf in wide]


def calls_of(function, *args):
    """How many calls of Python functions in the library the abstract evaluation of a function takes."""
    calls = []

    def note(frame, event, _):
        if event == "call" and "/jaxfisher/_" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        jax.eval_shape(function, *args)
    finally:
        sys.setprofile(before)
    return len(calls)


def test_each_further_layer_takes_as_many_calls_to_trace():
    """A loop over all leaves for each leaf would make a network of 300 layers slow to trace."""

    def log_prob(layers, x):
        for w, b in layers:
            x = jnp.tanh(x @ w + b)
        return jnp.sum(x)

    def view(layers, x):
        return jf.kronecker(jf.empirical_fisher(log_prob)(layers, x))

    params, x = [(jnp.ones((2, 2)), jnp.ones(2))], jnp.ones((3, 2))
    view(params, x)
    few, more, most = (calls_of(view, params * count, x) for count in (4, 8, 16))
    assert abs((most - more) - 2 * (more - few)) <= 0.01 * most


# The exact and the sampled Fisher: several rows per example.


def mlp_classifier(p, x):
    return jf.Categorical(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])


def conv_classifier(p, x):
    hidden = jax.lax.conv_general_dilated(x[None], p["w"], (1, 1), "VALID", dimension_numbers=catalogue.NHWC)
    return jf.Categorical(jnp.tanh(hidden).reshape(-1) @ p["v"])


def embedding_regression(p, tokens):
    """Two parts, each with a location and a scale of its own."""
    raw = jnp.tanh(p["table"][tokens]).sum(0) @ p["w"]
    return jf.Normal(raw[:2], jnp.exp(raw[2:]))


def rnn_regression(p, xs):
    last, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x @ p["wx"] + h @ p["wh"]), None), jnp.zeros(3), xs)
    return jf.Normal(last @ p["out"], jnp.exp(p["log_scale"]))


def attention_classifier(p, x):
    """A categorical distribution at each position."""
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
    mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k)), v)
    return jf.Categorical(jnp.einsum("thk,hkc->tc", mixed, p["o"]))


MODELS = {
    mlp_classifier: ({"w1": (3, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}, (3,)),
    conv_classifier: ({"w": (2, 2, 1, 2), "v": (8, 3)}, (3, 3, 1)),
    embedding_regression: ({"table": (4, 3), "w": (3, 4)}, None),
    rnn_regression: ({"wx": (2, 3), "wh": (3, 3), "out": (3, 2), "log_scale": (2,)}, (3, 2)),
    attention_classifier: ({"q": (3, 2, 2), "k": (3, 2, 2), "v": (3, 2, 2), "o": (2, 2, 3)}, (2, 3)),
}


def problem(model):
    """Parameters and inputs of a model."""
    shapes, shape = MODELS[model]
    rng = np.random.default_rng(30)
    params = {name: jnp.asarray(0.7 * rng.standard_normal(shape)) for name, shape in shapes.items()}
    if shape is None:
        return params, jnp.asarray(rng.integers(0, 4, (catalogue.N, 3)))
    return params, jnp.asarray(rng.standard_normal((catalogue.N, *shape)))


def class_scores(logits, jacobian):
    """The root of the probability times the score of every class of every part, ``[classes * parts, p]``."""
    log_probs = jax.nn.log_softmax(logits)
    mean = jnp.sum(jnp.exp(log_probs)[..., None] * jacobian, axis=-2, keepdims=True)
    return (jnp.exp(0.5 * log_probs)[..., None] * (jacobian - mean)).reshape(-1, jacobian.shape[-1])


def field_scores(fields, jacobians):
    """The rows of a Normal, whose Fisher in location and scale is ``diag(1, 2) / scale^2``."""
    (_, scale), (location_rows, scale_rows) = fields, jacobians
    return jnp.concatenate([location_rows / scale[:, None], np.sqrt(2.0) * scale_rows / scale[:, None]])


def dense_rows(model, params, x):
    """Rows whose outer products add up to the exact Fisher, from the Jacobian of the fields: ``[examples, rows, p]``."""
    flat, unravel = ravel_pytree(params)

    def fields(flat, x):
        made = model(unravel(flat), x)
        return made.logits if isinstance(made, jf.Categorical) else (made.loc, made.scale)

    def rows(x):
        values, jacobians = fields(flat, x), jax.jacobian(fields)(flat, x)
        return field_scores(values, jacobians) if isinstance(values, tuple) else class_scores(values, jacobians)

    return jax.vmap(rows)(x)


def drawn_rows(model, params, x, key, num_samples):
    """The scores at targets drawn with each example's own key, divided by the root of the number of draws."""
    log_prob = jf.log_likelihood(model)

    def row(i, draw, x):
        key_of_draw = jax.random.split(jax.random.fold_in(key, i), num_samples)[draw]
        target = model(params, x).sample(key_of_draw)
        return ravel_pytree(jax.grad(log_prob)(params, x, target))[0] / np.sqrt(num_samples)

    rows = jax.vmap(jax.vmap(row, (None, 0, None)), (0, None, 0))
    return rows(jnp.arange(len(x)), jnp.arange(num_samples), x)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_fishers_of_models_equal_dense_sums(model, key):
    params, x = problem(model)
    rng = np.random.default_rng(31)
    v = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)

    def asked(fisher):
        """The quantities, and the rows themselves, from which the expected Gram matrix is computed."""
        scores = fisher.form.scores
        return {
            "as_matrix": fisher.as_matrix(),
            "diagonal": ravel_pytree(fisher.diagonal())[0],
            "mv": ravel_pytree(fisher.mv(v))[0],
            "trace": fisher.trace(),
            "gram": scores.gram(),
        }, scores.as_matrix()

    @jax.jit
    def run(params, x, weights):
        made = {
            "exact": asked(jf.exact_fisher(model)(params, x, weights=weights)),
            "exact in pieces": asked(jf.exact_fisher(model, batch_size=2)(params, x, weights=weights)),
            "sampled": asked(jf.sampled_fisher(model, 2)(params, key, x, weights=weights)),
        }
        return made, dense_rows(model, params, x), drawn_rows(model, params, x, key, 2)

    made, exact, sampled = run(params, x, jnp.asarray(WEIGHTS))
    direction = flat(v)
    for name, (values, matrix) in made.items():
        rows = np.asarray(sampled if name == "sampled" else exact)
        fisher = np.einsum("i,irp,irq->pq", TILTED, rows, rows)
        dense = {
            "as_matrix": fisher,
            "diagonal": np.diagonal(fisher),
            "mv": fisher @ direction,
            "trace": np.trace(fisher),
            "gram": np.asarray(matrix) @ np.asarray(matrix).T,
        }
        for quantity, value in values.items():
            atol = 1e-12 * np.abs(dense[quantity]).max()
            np.testing.assert_allclose(value, dense[quantity], rtol=0, atol=atol, err_msg=f"{name} {quantity}")
        assert np.array_equal(values["gram"], values["gram"].T), name


@pytest.mark.parametrize("merged", [parts._merged_by_comparison, parts._merged_by_sorting])
def test_lookups_of_a_row_add_up_where_it_occurs_first(merged):
    """Of any integers, for any number of lookups."""
    rng = np.random.default_rng(6)
    for count, dtype in ((1, np.int32), (2, np.int8), (7, np.uint8), (40, np.int64)):
        indices = rng.integers(0, 1 + count // 2, size=count).astype(dtype)
        right = rng.standard_normal((2, count, 3))
        expected = np.zeros_like(right)
        for position, index in enumerate(indices):
            expected[:, list(indices).index(index)] += right[:, position]
        np.testing.assert_allclose(evaluated(merged, indices, right), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("count", [parts._LONG - 1, parts._LONG])
def test_scores_of_short_and_long_sequences_of_lookups(count):
    rng = np.random.default_rng(7)
    tokens, y = rng.integers(0, 9, size=(3, count)), rng.standard_normal((3, count, 2))
    made = jf.scores(lambda p, tokens, y: jnp.sum(y * p[tokens]))(np.zeros((9, 2)), tokens, y)
    rows = np.stack([[np.sum(y[i][tokens[i] == k], 0) for k in range(9)] for i in range(3)]).reshape(3, -1)
    found = made.as_matrix(), made.gram(), made.diagonal().reshape(-1), made.squared_norms()
    expected = rows, rows @ rows.T, np.mean(rows**2, 0), np.sum(rows**2, 1)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
