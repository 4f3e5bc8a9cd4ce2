"""Leaves of every form against their dense gradients: no models, only random factors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import leaves
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from leaves import OF_EXAMPLE, OF_ROW, OWN, ROWS, SHARED, N
from problems import assert_close

from jaxfisher._engine.forms import Formed, Layout, Leaf, Product, arrays, cross_gram, gram_upper
from jaxfisher._scores import JoinedScores

pytestmark = pytest.mark.usefixtures("in_numpy")

OMEGA = np.random.default_rng(1).uniform(0.1, 1, N * ROWS)
OMEGA = OMEGA / OMEGA.sum()


def close(actual, expected, size, what):
    """Compare up to a hundred roundings of ``size``, entry by entry, which is the sum of the absolute values of the terms."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, what
    info = np.finfo(actual.dtype)
    excess = np.abs(np.asarray(actual, np.float64) - expected) - 100 * (info.eps * size + float(info.tiny))
    # Written so that a NaN fails.
    assert np.all(excess <= 0), f"{what}: {np.max(excess)} too far, of {np.max(size)}"


@functools.cache
def vectors(size, count):
    """A vector of parameters and one of rows."""
    rng = np.random.default_rng(2)
    return rng.standard_normal(size), rng.standard_normal(count)


def asked(scores, v, w):
    """All quantities of scores."""
    return {
        "as_matrix": scores.as_matrix(),
        "mv": scores.mv(scores.spec.unravel(v)),
        "rmv": ravel_pytree(scores.rmv(w))[0],
        "gram": scores.gram(),
        "squared_norms": scores.squared_norms(),
        "diagonal": ravel_pytree(scores.diagonal())[0],
    }


def dense(rows, v, w):
    """The same quantities of dense rows."""
    return {
        "as_matrix": rows,
        "mv": rows @ v,
        "rmv": rows.T @ w,
        "gram": rows @ rows.T,
        "squared_norms": np.sum(rows**2, 1),
        "diagonal": np.resize(OMEGA, len(rows)) @ rows**2,
    }


def given(scores, dtype):
    """A vector of parameters and one of rows in a dtype."""
    return (jnp.asarray(x, dtype) for x in vectors(scores.spec.size, scores.num_rows))


def answers_of(cases, dtype):
    """The quantities of several cases, by one compiled program."""

    @jax.jit
    def run(held):
        all_scores = {name: leaves.scores_of(made, jnp.asarray(OMEGA, dtype)) for name, made in held.items()}
        return {name: asked(scores, *given(scores, dtype)) for name, scores in all_scores.items()}

    return run({name: case.leaves for name, case in cases.items()})


@functools.cache
def answers():
    return answers_of(leaves.cases(np.float64), np.float64)


def check(made, rows, sizes, what):
    """Every quantity against that of dense rows."""
    v, w = vectors(rows.shape[1], rows.shape[0])
    expected, terms = dense(rows, v, w), dense(sizes, np.abs(v), np.abs(w))
    # The rounding error of a product of factors is relative to the lengths of both rows, however their entries meet.
    lengths = np.linalg.norm(sizes, axis=1)
    terms["gram"] = lengths[:, None] * lengths[None, :]
    for name, value in made.items():
        close(value, expected[name], terms[name], f"{what}: {name}")


@pytest.mark.parametrize("name", leaves.cases(np.float64))
def test_every_quantity_is_that_of_the_dense_gradients(name):
    case = leaves.cases(np.float64)[name]
    check(answers()[name], case.rows, case.sizes, name)


WITH_ZEROS = (
    f"product {OF_EXAMPLE} x {OWN}",
    f"product {OWN} x {OF_ROW}",
    f"product {SHARED} x {OWN}",
    f"layer {OF_EXAMPLE} x {OWN}",
    f"layer of positions {OF_EXAMPLE} x {OF_ROW}",
    f"convolution {OF_EXAMPLE} x {OWN}",
    f"gradients formed of positions {OF_EXAMPLE} x {OWN}",
    f"groups {OF_EXAMPLE} x {OWN}",
    "two products",
    "a table and a product",
    "a product and a table",
)


def zeroed(leaf):
    """The leaf with some factors of zeros, as those of dead units, of empty inputs and of residuals that vanish."""
    flat, structure = jax.tree.flatten(leaf.forms)
    changed = []
    for k, array in enumerate(flat):
        axis = 0 if array.shape[0] > 1 else 1
        at = np.moveaxis(np.array(array), axis, 0)  # a copy
        if jnp.issubdtype(array.dtype, jnp.floating):
            at[[k % len(at), -1]] = 0
        changed.append(jnp.asarray(np.moveaxis(at, 0, axis)))
    return dataclasses.replace(leaf, forms=jax.tree.unflatten(structure, changed))


def moved(made, t):
    """The leaves with their factors moved along a line; the bias of a layer moves with the factors of its weight."""
    found = []
    for leaf in made:
        arrays = [
            array + t * np.cos(1.0 + k + np.arange(array.size)).reshape(array.shape) if array.dtype == float else array
            for k, array in enumerate(jax.tree.leaves(leaf.forms))
        ]
        forms = jax.tree.unflatten(jax.tree.structure(leaf.forms), arrays)
        if leaf.layer is not None:
            forms = (Formed(jnp.sum(found[leaf.layer].forms[0].right, 3)[:, :, 0]),)
        found.append(dataclasses.replace(leaf, forms=forms))
    return tuple(found)


@functools.cache
def derivatives():
    """For cases at factors with zeros: the rows at three points of a line, and two derivatives of each quantity along it."""
    held = {name: tuple(map(zeroed, leaves.cases(np.float64)[name].leaves)) for name in WITH_ZEROS}

    def along(made):
        def at(t):
            scores = leaves.scores_of(moved(made, t), jnp.asarray(OMEGA))
            return asked(scores, *given(scores, np.float64)) | {"second_moment": scores.second_moment()}

        slope = lambda t: jax.jvp(at, (t,), (1.0,))[1]  # noqa: E731
        first, second = jax.jvp(slope, (0.0,), (1.0,))
        return [leaves.scores_of(moved(made, t), jnp.asarray(OMEGA)).as_matrix() for t in (-1.0, 0.0, 1.0)], first, second

    return jax.jit(lambda held: {name: along(made) for name, made in held.items()})(held)


@pytest.mark.parametrize("name", WITH_ZEROS)
def test_derivatives_are_those_of_the_dense_gradients_also_at_factors_of_zeros(name):
    """Gradients are of second degree in their factors, so three points of a line give the derivatives of the rows along it."""
    points, *found = derivatives()[name]
    before, rows, after = map(np.asarray, points)
    first, second = (after - before) / 2, after + before - 2 * rows
    v, w = vectors(rows.shape[1], rows.shape[0])
    omega = np.resize(OMEGA, len(rows))
    crossed, moment = first @ rows.T, (first.T * omega) @ rows
    bent = (second.T * omega) @ rows
    expected = (
        {
            "as_matrix": first,
            "mv": first @ v,
            "rmv": first.T @ w,
            "gram": crossed + crossed.T,
            "squared_norms": 2 * np.diag(crossed),
            "diagonal": 2 * np.diag(moment),
            "second_moment": moment + moment.T,
        },
        {
            "as_matrix": second,
            "mv": second @ v,
            "rmv": second.T @ w,
            "gram": second @ rows.T + 2 * first @ first.T + rows @ second.T,
            "squared_norms": 2 * np.sum(second * rows + first**2, 1),
            "diagonal": 2 * omega @ (second * rows + first**2),
            "second_moment": bent + 2 * (first.T * omega) @ first + bent.T,
        },
    )
    for order, (made, dense) in enumerate(zip(found, expected, strict=True), 1):
        for what, value in dense.items():
            close(made[what], value, 10 + np.max(np.abs(value), initial=0.0), f"{name}: derivative {order} of {what}")


IN_TILES = (
    "a table and many positions",
    "two layouts",
    "two convolutions",
    f"groups {OF_EXAMPLE} x {OWN}",
    f"gradients formed of positions {OF_EXAMPLE} x {OWN}",
    f"product {OWN} x {OWN}",
)


def test_gradients_formed_tile_by_tile_are_the_same(monkeypatch):
    monkeypatch.setattr(arrays, "TILE", 37)
    cases = {name: leaves.cases(np.float64)[name] for name in IN_TILES}
    for name, made in answers_of(cases, np.float64).items():
        check(made, cases[name].rows, cases[name].sizes, name)


@functools.cache
def answers_of_two_blocks():
    """The rows of pairs of cases, one block after the other, and their dense gradients."""
    rng = np.random.default_rng(3)
    layout = leaves.layout_of(rng, 1, 6, 4)
    kinds = {
        "product": leaves.leaf(np.float64, leaves.product(rng, np.float64, layout)),
        "product of the rows": leaves.leaf(np.float64, leaves.product(rng, np.float64, layout, 1, leaves.OWN, leaves.OF_ROW)),
        "positions": leaves.leaf(np.float64, leaves.product(rng, np.float64, layout, 3)),
        "turned": leaves.leaf(np.float64, leaves.product(rng, np.float64, layout.turned())),
        "lookup": leaves.leaf(np.float64, leaves.lookup(rng, np.float64, layout, 2)),
        "formed": leaves.leaf(np.float64, leaves.formed(rng, np.float64, layout.shape)),
    }
    blocks = {(a, b): (kinds[a], kinds[b]) for a in kinds for b in kinds if a < b}
    layers = [leaves.layer(np.float64, leaves.product(rng, np.float64, layout)) for _ in range(2)]
    apart = leaves.leaf(np.float64, leaves.formed(rng, np.float64, (4,)))
    blocks["layer", "layer"] = tuple(layers)
    blocks["layer", "no layer"] = layers[0], leaves.beside(kinds["product"], apart)
    blocks["layer", "nothing to join"] = layers[0], leaves.beside(kinds["formed"], apart)

    @jax.jit
    def run(held):
        weights = jnp.asarray(OMEGA)
        joined = {name: JoinedScores(tuple(leaves.scores_of(part, weights) for part in parts)) for name, parts in held.items()}
        return {name: asked(scores, *given(scores, np.float64)) for name, scores in joined.items()}

    return run({name: [case.leaves for case in cases] for name, cases in blocks.items()}), blocks


def test_two_blocks_of_rows_are_those_of_both():
    made, blocks = answers_of_two_blocks()
    for name, cases in blocks.items():
        check(made[name], *(np.vstack([getattr(case, part) for case in cases]) for part in ("rows", "sizes")), name)


KINDS = {
    "a row each": ((N, 1), (N, 1), 1, 1),
    "rows that share inputs": ((N, 1), (N, ROWS), 1, 1),
    "groups, rows of their own": ((N, ROWS), (N, ROWS), 2, 1),
    "two positions": ((N, 1), (N, ROWS), 1, 2),
}
"""Row axes of left and of right factors, groups, positions."""


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inner_products_of_factors_that_deviate_from_constants(dtype, by_row):
    """Gradients less a constant, which need not be their mean: rows of one block share it, and another block has another."""
    rng = np.random.default_rng(7)
    given, expected = {}, {}
    for name, (left, right, groups, positions) in KINDS.items():
        size = 32 * positions
        layout = Layout((groups, size, size), (groups, size, size), (0, 1, 2), groups, size, size)
        blocks, rows = [], []
        for _ in range(2):
            a, g = (leaves.numbers(rng, *lead, groups, positions, size, dtype=dtype) for lead in (left, right))
            means = [
                leaves.numbers(rng, 1, lead[1] if by_row else 1, groups, positions, size, dtype=dtype, size=5.0)
                for lead in (left, right)
            ]
            full = (N, max(left[1], right[1]), groups, positions, size)
            wide = [np.broadcast_to(x, full).astype(np.float64) for x in (a, g, *means)]
            dense = [np.einsum("nrbti,nrbto->nrbio", x, y) for x, y in (wide[:2], wide[2:])]
            rows.append((dense[0] - dense[1]).reshape(N * full[1], -1))
            blocks.append((Leaf((Product(a, g, layout),), layout.shape, dtype, N, full[1]), tuple(means)))
        given[name], expected[name] = blocks, (rows[0] @ rows[0].T, rows[0] @ rows[1].T)

    @jax.jit
    def run(given):
        found = {}
        for name, blocks in given.items():
            one, other = (leaf.shifted((means,)) for leaf, means in blocks)
            found[name] = gram_upper([one], jnp.ones((), dtype)), cross_gram([one], [other], jnp.ones((), dtype))
        return found

    for name, (upper, cross) in run(given).items():
        for actual, dense in ((np.triu(upper), np.triu(expected[name][0])), (cross, expected[name][1])):
            assert_close(actual, dense, factor=50)
