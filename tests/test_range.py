"""Float32 at the ends of its range: a huge example does not destroy the digits of others, and finite data give no NaN."""

import functools
import itertools

import jax
import jax.numpy as jnp
import leaves
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from leaves import KINDS, OF_EXAMPLE, OWN
from test_leaf import OMEGA, asked, check, close, given

import jaxfisher as jf
from jaxfisher._linalg import to_unit


@functools.cache
def extreme_cases():
    """Leaves with factors from 1e-30 to 1e30, of another size for every example and position."""
    rng = np.random.default_rng(4)
    small, tall, many = (leaves.layout_of(rng, *sizes) for sizes in ((1, 6, 4), (1, 40, 30), (3, 4, 2)))
    found = {}

    def product(layout, positions, left, right, biased=False):
        sizes = leaves.extreme(rng, left, right, positions, biased)
        return leaves.product(rng, np.float32, layout, positions, left, right, sizes)

    for left, right in itertools.product(KINDS, repeat=2):
        name = f"{left} x {right}"
        found[f"product {name}"] = leaves.leaf(np.float32, product(small, 1, left, right))
        found[f"positions {name}"] = leaves.leaf(np.float32, product(tall, 2, left, right))
    for left, right in leaves.USUAL:
        name = f"{left} x {right}"
        found[f"layer {name}"] = leaves.layer(np.float32, product(small, 1, left, right, biased=True))
        found[f"layer of positions {name}"] = leaves.layer(np.float32, product(tall, 2, left, right, biased=True))
        found[f"gradients formed {name}"] = leaves.leaf(np.float32, product(small, 4, left, right))
        found[f"groups {name}"] = leaves.leaf(np.float32, product(many, 2, left, right))
        sizes = leaves.extreme(rng, left, right, 1)
        found[f"convolution {name}"] = leaves.leaf(np.float32, leaves.convolution(rng, np.float32, 2, left, right, sizes=sizes))
    found["two products"] = leaves.leaf(np.float32, product(tall, 1, OF_EXAMPLE, OWN), product(tall, 2, OWN, OF_EXAMPLE))
    table = leaves.lookup(rng, np.float32, tall, 2)
    found["a product and a table"] = leaves.leaf(np.float32, product(tall, 1, OF_EXAMPLE, OWN), table)
    found["a table and a product"] = leaves.leaf(np.float32, table, product(tall, 1, OWN, OWN))
    return found


@functools.cache
def extreme_answers():
    @jax.jit
    def run(held):
        made = {}
        for name, parts in held.items():
            scores = leaves.scores_of(parts, jnp.asarray(OMEGA, np.float32))
            factor = to_unit(scores.bound())
            upper, moment = scores.gram_upper(factor), scores.scaled_moment(factor)
            made[name] = asked(scores, *given(scores, np.float32)), factor, upper, moment, scores.bound()
        return made

    return run({name: case.leaves for name, case in extreme_cases().items()})


@pytest.mark.parametrize("name", extreme_cases())
def test_no_row_silences_another(name):
    case = extreme_cases()[name]
    made, factor, gram, moment, bound = extreme_answers()[name]
    check(made, case.rows, case.sizes, name)
    unit = float(factor)
    check({"gram": np.triu(gram) + np.triu(gram, 1).T}, unit * case.rows, unit * case.sizes, f"{name}, in units of the bound")
    terms, sizes = unit * case.rows, unit * case.sizes
    close(moment, (terms.T * OMEGA) @ terms, (sizes.T * OMEGA) @ sizes, f"{name}: second moment")
    root = np.sqrt(OMEGA.reshape(-1, 1))
    largest = np.max(root * case.sizes)
    # The bound of a convolution is that of the whole image, not of its windows, so it may be larger.
    assert np.max(root * np.abs(case.rows)) * (1 - 1e-6) <= float(bound) <= 10 * largest, (bound, largest)


# Models with inputs of any size.

N, INPUTS, OUTPUTS = 6, 5, 3
SCALES = [1e-30, 3e-20, 6e-20, 1e-10, 1.0, 1e10, 1e16]


def layer(p, x, y):
    """Scores ``x (x) (y - b)`` and ``y - b``: the weight is zero."""
    return -0.5 * jnp.sum((x @ p["w"] + p["b"] - y) ** 2)


def dead(p, x, y):
    """A layer whose units are dead for every example with positive inputs, since its weights are negative."""
    return jnp.sum(y * (jax.nn.relu(x @ p["w"]) + p["b"]))


def saturated(p, x, y):
    """A layer that saturates at huge inputs."""
    return jnp.sum(y * (jnp.tanh(x @ p["w"]) + p["b"]))


def data(seed, scale):
    """Parameters and data in float32; the inputs of the first example have another scale."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0.5, 1.5, (N, INPUTS)), rng.standard_normal((N, OUTPUTS))
    x[0] *= scale
    w = -rng.uniform(0.05, 0.15, (INPUTS, OUTPUTS))
    return narrow({"w": w, "b": np.zeros(OUTPUTS)}), *narrow((x, y))


def narrow(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def dense_rows(log_prob, params, x, y):
    """The scores at the same float32 numbers, computed in float64: the bias and then the weight, as in the parameters."""
    p, x, y = wide((params, x, y))
    z = x @ p["w"]
    slope = {layer: -(z + p["b"] - y), dead: y * (z > 0), saturated: y * (1 - np.tanh(z) ** 2)}[log_prob]
    bias = slope if log_prob is layer else y
    return np.hstack([bias, (x[:, :, None] * slope[:, None, :]).reshape(len(x), -1)])


@functools.cache
def program(log_prob):
    """One compiled program for all quantities at a damping."""

    def run(params, x, y, damping):
        fisher = jf.empirical_fisher(log_prob)(params, x, y)
        scores = fisher.form.scores
        gradient = scores.rmv(-scores.weights)
        return {
            "natural_grad": ravel_pytree(jf.natural_grad(log_prob, damping=damping)(params, x, y))[0],
            "solve": ravel_pytree(jf.solve(fisher, gradient, damping)[0])[0],
            "gram": scores.gram(),
            "squared_norms": scores.squared_norms(),
            "diagonal": ravel_pytree(fisher.diagonal())[0],
            "trace": fisher.trace(),
            "eigvalsh": fisher.eigvalsh()[-N:],
            "matrix": fisher.as_matrix(),
            "rank": fisher.rank(),
        }

    return jax.jit(run)


def expected(rows, damping):
    """The same quantities in float64. The solution in the space of examples is accurate for columns of any size."""
    fisher = rows.T @ rows / len(rows)
    step = -rows.T @ np.linalg.solve(rows @ rows.T / len(rows) + damping * np.eye(len(rows)), np.full(len(rows), 1 / len(rows)))
    return {
        "natural_grad": step,
        "solve": step,
        "gram": rows @ rows.T,
        "squared_norms": np.sum(rows**2, 1),
        "diagonal": np.mean(rows**2, 0),
        "trace": np.asarray(np.trace(fisher)),
        "eigvalsh": np.linalg.eigvalsh(rows @ rows.T / len(rows)),
        "matrix": fisher,
    }


CASES = [
    *((layer, scale) for scale in SCALES),
    *((dead, scale) for scale in (1.0, 2e19, 1e30)),
    *((saturated, scale) for scale in (1.0, 1e15, 1e20, 1e30)),
]


@pytest.mark.parametrize(("log_prob", "scale"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_an_example_of_any_scale_leaves_the_others_right(log_prob, scale):
    params, x, y = data(8, scale)
    if log_prob is layer:
        params = {**params, "w": jnp.zeros_like(params["w"])}
    rows = dense_rows(log_prob, params, x, y)
    damping = 1e-2 * np.linalg.norm(rows, 2) ** 2 / N
    made = program(log_prob)(params, x, y, jnp.asarray(damping, jnp.float32))
    for name, value in expected(rows, damping).items():
        size = np.abs(value).max()
        np.testing.assert_allclose(made[name], value, rtol=0, atol=1e-4 * size, err_msg=name)
    # Entries of small examples are accurate relative to their own sizes.
    for name in ("gram", "squared_norms"):
        value = expected(rows, damping)[name]
        lengths = np.linalg.norm(rows, axis=1)
        sizes = np.outer(lengths, lengths) if name == "gram" else lengths**2
        assert np.all(np.abs(np.asarray(made[name], np.float64) - value) <= 1e-5 * sizes + 1e-36), name
    assert int(made["rank"]) == np.linalg.matrix_rank(rows / np.linalg.norm(rows, axis=1, keepdims=True)), "rank"


@pytest.mark.parametrize("scale", [1e15, 1e20, 1e30])
def test_a_saturated_example_is_none_for_the_others_in_any_form(scale):
    """A huge, saturated example does not affect the others, in pieces, centred, and in an exact Fisher."""

    def model(p, x):
        return jf.Categorical(jnp.tanh(x @ p["w"]) + p["b"])

    params, x, y = data(8, scale)

    @jax.jit
    def run(params, x, y):
        streamed = jf.empirical_fisher(saturated, batch_size=4)(params, x, y)
        centred = jf.scores(saturated, center=True)(params, x, y)
        exact = jf.exact_fisher(model)(params, x)
        return (
            streamed.form.scores.gram(),
            streamed.eigvalsh()[-N:],
            centred.gram(),
            exact.as_matrix(),
            exact.form.scores.as_matrix(),
        )

    streamed, values, centred, exact, roots = map(wide, run(params, x, y))
    rows = dense_rows(saturated, params, x, y)
    deviations = rows - rows.mean(0)
    pairs = (
        (streamed, rows @ rows.T),
        (values, np.linalg.eigvalsh(rows @ rows.T / N)),
        (centred, deviations @ deviations.T),
        (exact, roots.T @ roots / N),
    )
    for found, value in pairs:
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-5 * np.abs(value).max())
    # In the weight's part of the exact Fisher's rows, the huge input is multiplied by the slope of tanh, which is zero.
    assert np.all(roots.reshape(N, OUTPUTS, -1)[0, :, OUTPUTS:] == 0) and np.all(np.isfinite(roots))


@pytest.mark.parametrize("scale", SCALES)
def test_inputs_of_any_scale_beside_a_bias(scale):
    params, x, y = data(8, 1.0)
    params, x = {**params, "w": jnp.zeros_like(params["w"])}, x * jnp.float32(scale)
    rows = dense_rows(layer, params, x, y)
    for damping in (0.1, 0.1 * scale**2) if scale > 1 else (0.1,):
        made = program(layer)(params, x, y, jnp.asarray(damping, jnp.float32))
        for name, value in expected(rows, damping).items():
            # The weight and its bias are each accurate relative to their own largest entries.
            parts = (slice(0, OUTPUTS), slice(OUTPUTS, None)) if value.shape == rows.shape[1:] else (...,)
            for part in parts:
                atol = 1e-4 * np.abs(value[part]).max() + 1e-37
                np.testing.assert_allclose(
                    np.asarray(made[name], np.float64)[part], value[part], rtol=0, atol=atol, err_msg=name
                )


def test_data_that_are_constants_of_a_program_are_taken_like_any():
    """Functions that close over their data. XLA squares the factors of constants, which once underflowed and gave 0 / 0."""
    params, x, y = data(8, 1.0)
    scales = [scale for scale in SCALES if scale <= 1]  # larger ones have squares beyond float32
    inputs = [(x * jnp.float32(scale)).at[0].set(0) for scale in scales]

    @jax.jit
    def made(params):
        of = [jf.scores(layer)(params, x, y) for x in inputs]
        return [{"diagonal": ravel_pytree(S.diagonal())[0], "norms": S.squared_norms(), "gram": S.gram()} for S in of]

    for x, found in zip(inputs, made(params), strict=True):
        rows = dense_rows(layer, params, x, y)
        dense = {"diagonal": np.mean(rows**2, 0), "norms": np.sum(rows**2, 1), "gram": rows @ rows.T}
        for name, value in dense.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).min() + 1e-36, err_msg=name)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_the_cotangent_of_an_undamped_solve_is_the_solve_of_the_cotangent(rows, scale):
    """Also in float32 for small scores, whose units are large."""
    x = jnp.array([[1.0, 2.0, 0.5], [0.5, -1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0]], jnp.float32)[:rows]
    F = jf.empirical_fisher(jnp.dot)(jnp.zeros(3, jnp.float32), jnp.float32(scale) * x)
    ones = jnp.ones(3, jnp.float32)
    back = jax.grad(lambda v: jnp.sum(F.solve(v, 0.0)))(ones)
    np.testing.assert_allclose(back, F.solve(ones, 0.0), rtol=1e-4)
