"""Kronecker views have the trace of the Fisher in every block, and positions without a gradient do not change them."""

import functools

import jax
import jax.numpy as jnp
import leaves
import numpy as np
import pytest
from programs.evaluate import evaluated, traced
from test_leaf import OMEGA, close

import jaxfisher as jf
from jaxfisher._engine import has_moments

pytestmark = pytest.mark.usefixtures("in_numpy")

# Sequences with padding of different lengths, which a mask removes from the log-density.

N, REAL, WIDTH = 3, 4, 2
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, REAL, 3))
LENGTHS = np.array([4, 2, 3])


def mask(length):
    return (np.arange(length) < LENGTHS[:, None]).astype(float)


def dense(p, x, keep):
    """A layer with a bias, applied to every position."""
    return jnp.sum(keep[:, None] * jnp.tanh(x @ p["w"] + p["b"][None]))


def causal(p, x, keep):
    """A convolution over the last two positions."""
    before = jnp.pad(x, ((1, 0), (0, 0)))[None]
    z = jax.lax.conv_general_dilated(before, p["k"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))[0]
    return jnp.sum(keep[:, None] * jnp.tanh(z + p["b"][None]))


def recurrent(p, x, keep):
    """A recurrence; the states where the mask is one enter the log-density."""

    def step(h, given):
        x, keep = given
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, keep * jnp.sum(h)

    return jnp.sum(jax.lax.scan(step, jnp.zeros(WIDTH), (x, keep))[1])


SHAPES = {
    dense: {"w": (3, WIDTH), "b": (WIDTH,)},
    causal: {"k": (2, 3, WIDTH), "b": (WIDTH,)},
    recurrent: {"w": (3, WIDTH), "u": (WIDTH, WIDTH), "b": (WIDTH,)},
}
PADDING = {"zeros": 0.0, "thirty": 30.0, "largest": 1.7e308, "rubbish": 1e3}


@functools.cache
def padded(kind, padding, length):
    """Parameters, sequences padded to this length, and their mask."""
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(0.5 * rng.standard_normal(shape)) for name, shape in SHAPES[kind].items()}
    fill = np.full((N, length, 3), PADDING[padding])
    x = fill * rng.standard_normal(fill.shape) if padding == "rubbish" else fill
    # Positions after the end of a shorter sequence are padding too.
    x = np.where(mask(length)[:, :, None] > 0, np.pad(X, ((0, 0), (0, length - REAL), (0, 0))), x)
    return params, jnp.asarray(x), jnp.asarray(mask(length))


@functools.cache
def views(log_prob, padding, length):
    """The Kronecker views as matrices, and the Fisher."""
    return _views(log_prob)(*padded(log_prob, padding, length))


@functools.cache
def _views(log_prob):
    def run(params, x, keep):
        held = jf.empirical_fisher(log_prob)(params, x, keep)
        streamed = jf.empirical_fisher(log_prob, batch_size=2)(params, x, keep)
        found = [view(fisher).as_matrix() for fisher in (held, streamed) for view in (jf.kronecker, jf.kronecker_reduce)]
        return [*found, jf.eigen_kronecker(held).as_matrix()], held.as_matrix()

    return traced(run)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("log_prob", SHAPES, ids=lambda function: function.__name__)
def test_padding_changes_no_view(log_prob, padding):
    short, fisher = views(log_prob, "zeros", REAL)
    for matrix in short:
        np.testing.assert_allclose(np.trace(matrix), np.trace(fisher), rtol=1e-12)
    long, padded = views(log_prob, padding, 64)
    np.testing.assert_allclose(padded, fisher, rtol=0, atol=1e-12 * np.abs(fisher).max())
    for matrix, expected in zip(long, short, strict=True):
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def masked(p, x, keep):
    """A layer whose outputs are the predictions where the mask is one; elsewhere the prediction is zero."""
    return jf.Normal(keep[:, None] * jnp.tanh(x @ p["w"] + p["b"][None]), 1.0)


@pytest.mark.parametrize("fisher", [None, jf.exact_fisher(masked)], ids=["default", "exact"])
def test_padding_changes_no_step_of_kfac(fisher):
    params, x, keep = padded(dense, "zeros", 6)
    y = jnp.asarray(np.random.default_rng(3).standard_normal((N, 6, WIDTH)))
    made = jf.training_step(masked, jf.kfac(), fisher)
    step, state = jax.jit(made), made.init(params, x, keep, y)
    # The default Fisher computes products by forward derivatives, which overflow at the largest numbers of the dtype.
    paddings = [padding for padding in PADDING if fisher is not None or padding != "largest"]
    first, *others = (step(params, state, padded(dense, padding, 6)[1], keep, y) for padding in paddings)
    for other in others:
        for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-11, atol=1e-12)


# Leaves with random factors.


@functools.cache
def factors():
    """The expanded and reduced Kronecker factors of the first leaf, for every case that has moments; and the cases."""
    cases = {name: case for name, case in leaves.cases(np.float64).items() if has_moments(case.leaves[0])}

    @jax.jit
    def run(held):
        made = {}
        for name, parts in held.items():
            scores = leaves.scores_of(parts, jnp.asarray(OMEGA))
            made[name] = [getattr(scores, how)()[0].factors()[:2] for how in ("expanded_moments", "reduced_moments")]
        return made

    return run({name: case.leaves for name, case in cases.items()}), cases


def test_every_block_has_the_trace_of_the_fishers_block():
    made, cases = factors()
    assert len(cases) > 30
    for name, case in cases.items():
        # The bias is part of its layer's block.
        trace = OMEGA @ np.sum(case.rows**2, 1)
        for inputs, outputs in made[name]:
            product = np.trace(inputs.whole(), axis1=1, axis2=2) @ np.trace(outputs, axis1=1, axis2=2)
            close(product, np.asarray(trace), OMEGA @ np.sum(case.sizes**2, 1), name)


def test_positions_without_a_gradient_are_not_there():
    """At positions where all right factors are zero, left factors have no effect."""
    rng = np.random.default_rng(5)
    layout = leaves.layout_of(rng, 1, 4, 3)
    whole = leaves.product(rng, np.float64, layout, 6)
    alive = np.array([0, 2, 3])
    gone = np.isin(np.arange(6), alive, invert=True)[:, None]
    form = whole.form
    masked = leaves.Product(jnp.where(gone, 1e3 * form.left, form.left), jnp.where(gone, 0, form.right), layout)
    fewer = leaves.Product(form.left[:, :, :, alive], form.right[:, :, :, alive], layout)
    made = [leaves.leaf(np.float64, leaves.Made(form, whole.rows, whole.sizes)).leaves for form in (masked, fewer)]
    for moments in ("expanded_moments", "reduced_moments"):
        found, expected = (getattr(leaves.scores_of(parts, jnp.asarray(OMEGA)), moments)()[0] for parts in made)
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-12 * np.abs(two).max())


# Weights of one output.


def once(p, x):
    return jnp.tanh(x[0] @ p["h"]) @ p["w"]


def summed(p, x):
    return jnp.sum(jnp.tanh(x @ p["h"]) @ p["w"], 0)


def heads(p, x):
    return jnp.stack([jnp.tanh(x[0] @ p["h"]) @ p["w"], jnp.cos(x[1] @ p["h"]) @ p["w"]])


def product(p, x):
    one, two = heads(p, x)
    return one * two


@pytest.mark.parametrize("column", [False, True], ids=["vector", "matrix of one column"])
@pytest.mark.parametrize("readout", [once, summed, heads, product], ids=lambda function: function.__name__)
def test_a_weight_of_one_output_has_its_exact_block(readout, column):
    rng = np.random.default_rng(2)
    x, h, w = (jnp.asarray(rng.standard_normal(size)) for size in ((N, 2, 3), (3, 6), (6,)))
    params = {"h": h, "w": w[:, None] if column else w, "b": jnp.zeros((1,) if column else ())}

    def model(p, x):
        z = readout(p, x)
        return jf.Normal(z + jnp.broadcast_to(p["b"], z.shape), 1.0)

    def both(params, x):
        fisher = jf.exact_fisher(model)(params, x)
        return jf.kronecker(fisher).as_matrix(), fisher.as_matrix()

    view, fisher = evaluated(both, params, x)
    # The bias comes first, then the 18 entries of the hidden layer. If the weight is used once, its block includes the bias.
    bias = [0] if readout is once else []
    block = np.ix_(*[[*bias, *range(19, 25)]] * 2)
    np.testing.assert_allclose(view[block], fisher[block], rtol=0, atol=1e-13 * np.abs(fisher[block]).max())
    explained = {leaf.path: leaf for leaf in jf.explain(model)(params, x).leaves}
    assert explained["['w']"].kronecker == "yes"
    assert explained["['b']"].kronecker == ("with ['w']" if bias else "no: no factors")
