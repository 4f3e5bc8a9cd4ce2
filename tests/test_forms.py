"""Leaf forms: Kronecker moments, centring, tiles, exact Fishers, sums of Fishers, scale, derivatives and `jf.explain`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree
from programs.evaluate import evaluate, evaluated, traced

import jaxfisher as jf
from jaxfisher._engine import Basis
from jaxfisher._engine.forms import arrays as _arrays

N = 5
WEIGHTS = np.array([0.4, 1.0, 2.5, 0.7, 1.6])
OMEGA = WEIGHTS / WEIGHTS.sum()


def numbers(seed, *shape, mean=0.0, spread=1.0):
    """Fixed normal numbers in NumPy float64."""
    return mean + spread * np.random.default_rng(seed).standard_normal(shape)


def arrays(**shapes):
    """A dictionary of fixed normal arrays, about as large as initial weights are."""
    return {name: jnp.asarray(numbers(ord(name[0]), *shape, spread=0.5)) for name, shape in shapes.items()}


def narrow(tree):
    """The tree in float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def flat_rows(gradients):
    """Per-example gradients as the rows of a matrix, in the order of `ravel_pytree`."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(gradients)], axis=1)


def plain(log_prob, params, data):
    """The scores by ``vmap(grad)`` in float64."""
    wide = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, (params, data)
    )
    return flat_rows(evaluated(jax.vmap(jax.grad(log_prob), (None, *(0 for _ in data))), wide[0], *wide[1]))


def flat(tree):
    """A pytree as one float64 vector."""
    return problems.flat(tree).astype(np.float64)


def close(actual, expected, tolerance=1e-12):
    """Within ``tolerance`` of the largest expected number."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * (np.abs(expected).max() or 1.0))


# Kronecker moments: every case gives its activations and cotangents by NumPy loops.


def dense(params, x, y):
    """One position or many: the cotangent of ``x @ w`` is ``y cos(z)``."""
    return jnp.sum(y * jnp.sin(x @ params["w"] + jnp.broadcast_to(params["b"], y.shape)))


def dense_factors(params, x, y):
    w, b = np.asarray(params["w"]), np.asarray(params["b"])
    x, y = (np.reshape(z, (N, -1, z.shape[-1])) for z in (x, y))
    return x[:, :, None], (y * np.cos(x @ w + b))[:, :, None]


def tied(params, x, y):
    """A layer that uses its weight in both directions."""
    return jnp.sum(y * jnp.sin(jnp.tanh(x @ params["w"]) @ params["w"].T))


def tied_factors(params, x, y):
    w = np.asarray(params["w"])
    left, right = np.zeros((N, 2, 1, w.shape[0])), np.zeros((N, 2, 1, w.shape[1]))
    for n in range(N):
        hidden = np.tanh(x[n] @ w)
        out = y[n] * np.cos(w @ hidden)
        # The first use multiplies the input, the second one the hidden units: there the leaf's rows are the outputs.
        left[n, 0, 0], right[n, 0, 0] = x[n], (out @ w) * (1 - hidden**2)
        left[n, 1, 0], right[n, 1, 0] = out, hidden
    return left, right


def convolution(groups, stride):
    """A 2-D convolution, channels last, padded by one row above only."""

    def log_prob(params, x, y):
        z = jax.lax.conv_general_dilated(
            x[None],
            params["k"],
            (stride, stride),
            ((1, 0), (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision="highest",
        )
        return jnp.sum(y * jnp.sin(z[0]))

    return log_prob


def channels_first(params, x, y):
    """A convolution whose kernel has the layout of its windows, so that the image is stored instead of them."""
    numbers = ("NCHW", "OIHW", "NCHW")
    z = jax.lax.conv_general_dilated(x[None], params["k"], (1, 1), ((1, 0), (0, 0)), dimension_numbers=numbers)
    return jnp.sum(y * jnp.sin(z[0]))


def convolution_factors(groups, stride, params, x, y):
    """Patches ``[n, t, group, (h, w, c)]`` and cotangents, by loops over everything."""
    kernel = np.asarray(params["k"])
    height, width, depth, out = kernel.shape
    wide = out // groups
    x = np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))
    left, right = [], []
    for n in range(N):
        for i in range(y.shape[1]):
            for j in range(y.shape[2]):
                for b in range(groups):
                    part = slice(b * depth, (b + 1) * depth)
                    patch = x[n, i * stride : i * stride + height, j * stride : j * stride + width, part]
                    z = np.tensordot(patch, kernel[..., b * wide : (b + 1) * wide], 3)
                    left.append(patch.reshape(-1))
                    right.append(y[n, i, j, b * wide : (b + 1) * wide] * np.cos(z))
    shape = (N, y.shape[1] * y.shape[2], groups)
    return np.reshape(left, (*shape, -1)), np.reshape(right, (*shape, -1))


def biased_convolution(params, x, y):
    """A convolution with a bias, whose gradient is the cotangent of the kernel summed over positions."""
    z = jax.lax.conv_general_dilated(
        x[None], params["k"], (1, 1), ((1, 0), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    return jnp.sum(y * jnp.sin(z + params["b"][None, None, None])[0])


def biased_convolution_factors(params, x, y):
    left, _ = convolution_factors(1, 1, params, x, y)
    kernel = np.asarray(params["k"])
    z = left @ kernel.reshape(-1, kernel.shape[-1]) + np.asarray(params["b"])
    return left, y.reshape(z.shape) * np.cos(z)


MOMENTS = {
    "biased convolution": (
        biased_convolution,
        arrays(k=(2, 2, 2, 3), b=(3,)),
        (N, 4, 3, 2),
        (N, 4, 2, 3),
        biased_convolution_factors,
    ),
    "dense": (dense, arrays(w=(4, 3), b=(3,)), (N, 4), (N, 3), dense_factors),
    "positions": (dense, arrays(w=(4, 3), b=(3,)), (N, 6, 4), (N, 6, 3), dense_factors),
    "tied": (tied, arrays(w=(4, 3)), (N, 4), (N, 4), tied_factors),
    "grouped": (
        convolution(2, 2),
        arrays(k=(3, 2, 2, 6)),
        (N, 6, 5, 4),
        (N, 3, 2, 6),
        functools.partial(convolution_factors, 2, 2),
    ),
    "depthwise": (
        convolution(3, 1),
        arrays(k=(2, 2, 1, 3)),
        (N, 4, 3, 3),
        (N, 4, 2, 3),
        functools.partial(convolution_factors, 3, 1),
    ),
}


def order_of(layout):
    """The index in the raveled leaf of the entry at every ``[group, input, output]``."""
    return np.asarray(layout.matrix(jnp.arange(np.prod(layout.shape)).reshape(layout.shape)))


def rotations(layout, biased):
    """A random orthogonal basis for each side of every group; a bias is one more input."""

    def turn(seed, size):
        return jnp.asarray(np.linalg.qr(numbers(seed, layout.groups, size, size))[0])

    return turn(1, layout.inputs + biased), turn(2, layout.outputs)


@functools.cache
def moments_of(name):
    """Moments of a case from scores in memory and streamed ones, diagonals in random bases, and plain gradients."""
    log_prob, params, x, y, _ = MOMENTS[name]
    x, y = jnp.asarray(numbers(3, *x)), jnp.asarray(numbers(4, *y))
    weight = "k" if "k" in params else "w"
    place = sorted(params).index(weight)
    layouts = {}

    def run(params, x, y, weights):
        made = {}
        for how, size in (("held", None), ("streamed", 2)):
            scores = jf.scores(log_prob, batch_size=size)(params, x, y, weights=weights)
            expanded, reduced = scores.expanded_moments(), scores.reduced_moments()
            assert all((moments is None) == (k != place) for k, moments in enumerate(expanded))
            assert all((moments is None) == (k != place) for k, moments in enumerate(reduced))
            layouts[how] = expanded[place].layout
            owners = [role.layer for role in scores.roles]
            assert owners == [place if name == "b" else None for name in sorted(params)], owners
            assert reduced[place].layout == layouts[how]
            bias = sorted(params).index("b") if "b" in params else None
            basis = Basis(*rotations(layouts[how], bias is not None), layouts[how], place, bias)
            made[how] = expanded[place], reduced[place], scores.squares_along(basis)
        gradients = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, x, y)
        return made, (gradients[weight], gradients.get("b"))

    made, gradients = evaluated(run, params, x, y, WEIGHTS)
    assert layouts["held"] == layouts["streamed"]
    weights, biases = (None if part is None else np.asarray(part) for part in gradients)
    return made, layouts["held"], weights, biases, np.asarray(x), np.asarray(y)


def in_layout(layout, left, right, shape):
    """Factors ``[n, t, group, .]`` whose products are a leaf in the order (group's inputs, outputs), in the layout's order."""
    labels = order_of(layout)
    inputs, outputs = left.shape[-1], right.shape[-1]
    groups = left.shape[2]
    # The leaf is [inputs, groups x outputs]; a group's inputs are all of the first axes.
    rows, columns = np.divmod(labels, groups * outputs)
    assert labels.shape == (groups, inputs, outputs)
    assert np.array_equal(rows, np.broadcast_to(rows[:, :, :1], rows.shape))
    assert np.array_equal(columns, np.broadcast_to(columns[:, :1], columns.shape))
    assert np.prod(shape) == inputs * groups * outputs
    lefts, rights = [], []
    for b in range(groups):
        (group,) = set((columns[b] // outputs).ravel().tolist())
        lefts.append(left[:, :, group][..., rows[b, :, 0]])
        rights.append(right[:, :, group][..., columns[b, 0] % outputs])
    return np.stack(lefts, 2), np.stack(rights, 2)


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_equal_dense_sums(name):
    _, params, _, _, factors = MOMENTS[name]
    made, layout, gradients, biases, x, y = moments_of(name)
    left, right = in_layout(layout, *factors(params, x, y), gradients.shape[1:])
    # A control of the reference itself: its factors multiply to the gradients.
    formed = np.einsum("ntbi,ntbo->nbio", left, right).reshape(N, -1)
    close(formed, gradients.reshape(N, -1)[:, order_of(layout).ravel()])
    if biases is not None:
        left = np.concatenate([left, np.ones_like(left[..., :1])], -1)
        close(right.sum(1)[:, 0], biases)
    positions, groups = left.shape[1:3]
    mean, total = left.mean(1), right.sum(1)
    expected = [np.zeros((groups, z.shape[-1], z.shape[-1])) for z in (left, right, left, right)]
    trace = np.zeros(groups)
    for n in range(N):
        for b in range(groups):
            for t in range(positions):
                expected[0][b] += OMEGA[n] * np.outer(left[n, t, b], left[n, t, b])
                expected[1][b] += OMEGA[n] * np.outer(right[n, t, b], right[n, t, b])
            expected[2][b] += OMEGA[n] * np.outer(mean[n, b], mean[n, b])
            expected[3][b] += OMEGA[n] * np.outer(total[n, b], total[n, b])
            trace[b] += OMEGA[n] * np.sum((left[n, :, b].T @ right[n, :, b]) ** 2)
    for expanded, reduced, _ in made.values():
        for moments, inputs, outputs, count in ((expanded, *expected[:2], positions), (reduced, *expected[2:], 1)):
            close(moments.inputs.whole(), inputs)
            close(moments.outputs, outputs)
            close(moments.count, np.full(groups, count))
            close(moments.trace, trace)
            a, g, unit = moments.factors()
            close(a.whole(), inputs / count)
            scale = trace / np.trace(inputs / count, axis1=1, axis2=2) / np.trace(outputs, axis1=1, axis2=2)
            close(unit, scale)
            close(g, scale[:, None, None] * outputs)


@pytest.mark.parametrize("name", MOMENTS)
def test_rotated_diagonals_are_those_of_the_exact_block(name):
    made, layout, gradients, biases, _, _ = moments_of(name)
    basis = rotations(layout, biases is not None)
    order = order_of(layout)
    expected = np.zeros((layout.groups, layout.inputs + (biases is not None), layout.outputs))
    for b in range(layout.groups):
        rows = gradients.reshape(N, -1)[:, order[b].ravel()]
        rows = rows if biases is None else np.hstack([rows, biases])
        turn = np.kron(*(np.asarray(side[b]) for side in basis))
        block = rows.T @ (OMEGA[:, None] * rows)
        expected[b] = np.diag(turn.T @ block @ turn).reshape(expected.shape[1:])
    for *_, diagonal in made.values():
        close(diagonal, expected)


def test_moments_of_one_outer_product_are_its_block():
    params, x, y = arrays(w=(4, 3), b=(3,)), jnp.asarray(numbers(3, 1, 4)), jnp.asarray(numbers(4, 1, 3))
    for moments in (jf.scores(dense)(params, x, y).expanded_moments()[1], jf.scores(dense)(params, x, y).reduced_moments()[1]):
        both = plain(dense, params, (x, y))[0]
        row = np.concatenate([both[3:][order_of(moments.layout).ravel()], both[:3]])
        close(np.kron(moments.factors()[0].whole()[0], moments.factors()[1][0]), np.outer(row, row))


def test_moments_of_an_exact_fisher_share_the_input():
    params, x = arrays(w=(4, 3), b=(3,)), numbers(3, N, 4)
    logits = x @ np.asarray(params["w"]) + np.asarray(params["b"])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    inputs = sum(OMEGA[n] * np.outer([*x[n], 1], [*x[n], 1]) for n in range(N))
    outputs = sum(OMEGA[n] * (np.diag(p[n]) - np.outer(p[n], p[n])) for n in range(N))
    trace = sum(OMEGA[n] * (1 + x[n] @ x[n]) * (1 - p[n] @ p[n]) for n in range(N))

    @traced
    def run(params, x, weights):
        made = []
        for size in (None, 2):
            fisher = jf.exact_fisher(lambda p, x: jf.Categorical(logits=x @ p["w"] + p["b"]), batch_size=size)
            scores = fisher(params, x, weights=weights).form.scores
            made += [scores.expanded_moments()[1].factors(), scores.reduced_moments()[1].factors()]
        return made

    for found in run(params, x, WEIGHTS):
        close(found[0].whole()[0], inputs)
        close(found[1][0], outputs * (trace / np.trace(inputs) / np.trace(outputs)))


def test_leaves_that_are_no_dense_product_have_no_moments():
    params = arrays(table=(7, 4), w=(4, 3), scale=(4,), unused=(2, 2))
    tokens, y = jnp.asarray([[0, 1, 1], [2, 3, 6], [4, 4, 4], [5, 0, 1], [6, 6, 2]]), jnp.asarray(numbers(4, N, 3, 3))

    def log_prob(p, tokens, y):
        return jnp.sum(y * jnp.sin((p["table"][tokens] * p["scale"][None]) @ p["w"]))

    def check(params, tokens, y):
        for size in (None, 2):
            scores = jf.scores(log_prob, batch_size=size)(params, tokens, y)
            for moments in (scores.expanded_moments(), scores.reduced_moments()):
                assert [part is not None for part in moments] == [False, False, False, True]

    jax.eval_shape(check, params, tokens, y)


# Centring of scores whose mean dominates.


def linear(params, x, y):
    """Scores ``x (x) y``; ``x`` itself and a table are leaves' gradients too."""
    return jnp.sum((x @ params["w"]) * y) + jnp.sum(params["b"] * y)


CENTRED = {
    "outer product": (linear, arrays(w=(12, 8), b=(8,)), (12,), (8,)),
    "positions": (lambda p, x, y: jnp.sum((x @ p["w"]) * y), arrays(w=(4, 3)), (6, 4), (6, 3)),
    "convolution": (convolution(1, 1), arrays(k=(2, 2, 2, 4)), (4, 3, 2), (4, 2, 4)),
    "channels first": (channels_first, arrays(k=(4, 2, 2, 2)), (2, 4, 3), (4, 4, 2)),
    "elementwise": (lambda p, x, y: jnp.sum(x * p["s"] * y), arrays(s=(30,)), (30,), (30,)),
}


@pytest.mark.parametrize("name", CENTRED)
def test_centring_is_safe_where_the_mean_dominates(name):
    log_prob, params, x, y = CENTRED[name]
    if "k" in params:
        # The sine is only for the other tests; here the factors are those of a linear map.
        params = jax.tree.map(lambda leaf: 1e-6 * leaf, params)
    x, y = narrow((numbers(3, 12, *x, mean=100, spread=0.1), numbers(4, 12, *y, mean=5, spread=0.005)))
    params = narrow(params)
    rows = plain(log_prob, params, (x, y))
    rows = rows - rows.mean(0)
    expected = rows @ rows.T

    @jax.jit
    def run(params, x, y):
        made = [jf.scores(log_prob, center=True, batch_size=size)(params, x, y).gram() for size in (None, 5)]
        return made, jf.scores(log_prob)(params, x, y).gram()

    made, raw = run(params, x, y)
    for gram in made:
        assert gram.dtype == jnp.float32
        close(gram, expected, 1e-4)
        values = np.linalg.eigvalsh(np.asarray(gram, np.float64))
        assert values[0] > -1e-6 * values[-1]
    # The control: subtracting the mean after the Gram matrix was formed loses all digits.
    raw = np.asarray(raw)
    naive = raw - raw.mean(0) - raw.mean(1, keepdims=True) + raw.mean(dtype=np.float32)
    assert np.abs(naive - expected).max() > 1e-2 * np.abs(expected).max()


# Tiles.


def tied_tokens(p, tokens, y):
    """A table that is both the embedding and the output."""
    return jnp.sum(y * jnp.sin(jnp.tanh(p["table"][tokens] @ p["w"]) @ p["table"].T))


TILED = {
    "few positions": (dense, arrays(w=(13, 11), b=(11,)), (2, 13), (2, 11)),
    "positions": (dense, arrays(w=(23, 19), b=(19,)), (4, 23), (4, 19)),
    "tied": (tied, arrays(w=(13, 11)), (13,), (13,)),
    "tied table": (tied_tokens, arrays(table=(23, 19), w=(19, 19)), None, (3, 23)),
    "convolution": (convolution(1, 1), arrays(k=(3, 2, 7, 19)), (5, 4, 7), (4, 3, 19)),
    "grouped": (convolution(2, 2), arrays(k=(3, 3, 5, 22)), (5, 5, 10), (2, 2, 22)),
    "channels first": (channels_first, arrays(k=(5, 3, 3, 2)), (3, 5, 4), (5, 4, 3)),
}


def tiled(name):
    """A case's arguments."""
    log_prob, params, x, y = TILED[name]
    tokens = np.random.default_rng(5).integers(0, 23, (N, 3))
    x = jnp.asarray(tokens if x is None else numbers(3, N, *x))
    return log_prob, params, (x, jnp.asarray(numbers(4, N, *y)))


@pytest.mark.parametrize("name", TILED)
def test_work_in_tiles_changes_nothing(name, monkeypatch):
    log_prob, params, data = tiled(name)
    v, w = jax.tree.map(lambda leaf: jnp.asarray(numbers(6, *leaf.shape)), params), jnp.asarray(numbers(7, N))
    rows = plain(log_prob, params, data)
    expected = [rows @ rows.T, OMEGA @ rows**2, np.sum(rows**2, 1), rows @ flat(v), rows.T @ np.asarray(w), rows]

    def quantities(params, data, weights):
        scores = jf.scores(log_prob)(params, *data, weights=weights)
        return (
            scores.gram(),
            ravel_pytree(scores.diagonal())[0],
            scores.squared_norms(),
            scores.mv(v),
            ravel_pytree(scores.rmv(w))[0],
            scores.as_matrix(),
        )

    for size in (37, 300):
        monkeypatch.setattr(_arrays, "TILE", size)
        program = jax.make_jaxpr(lambda *args: quantities(*args))(params, data, WEIGHTS)
        assert size == 300 or "scan[" in str(program), "the control: there were tiles"
        for actual, dense_value in zip(evaluate(program, *jax.tree.leaves((params, data, WEIGHTS))), expected, strict=True):
            close(actual, dense_value)


# Exact Fishers: the rows of an example share their input.


def softmax(p, x):
    return jf.Categorical(logits=x @ p["w"] + p["b"])


def transposed(p, x):
    return jf.Categorical(logits=p["b"] + p["w"] @ x)


def network(p, x):
    return jf.Categorical(logits=p["o"] @ jnp.tanh(x @ p["w"] + p["b"]))


def normal(p, x):
    hidden = jnp.tanh(x @ p["w"] + p["b"])
    return jf.Normal(hidden @ p["m"], jnp.exp(hidden @ p["s"]))


def class_moment(model, params, x):
    """``sum_n omega sum_y p(y) s(y) s(y)^T``, a dense sum over the classes."""
    log_prob = jf.log_likelihood(model)
    total = 0
    for c in range(3):
        labels = np.full(N, c)
        rows = plain(log_prob, params, (x, labels))
        p = np.exp(evaluated(jax.vmap(log_prob, (None, 0, 0)), params, x, labels))
        total = total + rows.T @ ((OMEGA * p)[:, None] * rows)
    return total


def normal_moment(model, params, x):
    """``sum_n omega J^T diag(1 / s^2, 2 / s^2) J``, the Jacobian by loops over the outputs."""
    total = 0
    for k in range(2):
        fields = [lambda p, x, name=name, k=k: getattr(model(p, x), name)[k] for name in ("loc", "scale")]
        scale = evaluated(jax.vmap(fields[1], (None, 0)), params, x)
        for field, metric in zip(fields, (1.0, 2.0), strict=True):
            rows = plain(field, params, (x,))
            total = total + rows.T @ ((OMEGA * metric / scale**2)[:, None] * rows)
    return total


EXACT = {
    "softmax": (softmax, arrays(w=(4, 3), b=(3,)), class_moment),
    "transposed": (transposed, arrays(w=(3, 4), b=(3,)), class_moment),
    "network": (network, arrays(w=(4, 5), b=(5,), o=(3, 5)), class_moment),
    "normal": (normal, arrays(w=(4, 3), b=(3,), m=(3, 2), s=(3, 2)), normal_moment),
}


@pytest.mark.parametrize("name", EXACT)
def test_second_moment_of_an_exact_fisher_is_the_dense_sum(name, monkeypatch):
    model, params, reference = EXACT[name]
    monkeypatch.setattr(_arrays, "TILE", 100)  # sums over examples in pieces
    x = numbers(3, N, 4)

    @traced
    def run(params, x, weights):
        held, streamed = (jf.exact_fisher(model, batch_size=size)(params, x, weights=weights) for size in (None, 2))
        return held.as_matrix(), streamed.as_matrix(), held.form.scores.gram(), held.form.scores.as_matrix()

    held, streamed, gram, rows = run(params, x, WEIGHTS)
    expected = reference(model, params, x)
    close(held, expected)
    close(streamed, expected)
    rows = np.asarray(rows)
    close(rows.T @ (np.repeat(OMEGA, len(rows) // N)[:, None] * rows), expected)
    close(gram, rows @ rows.T)


# Sums of Fishers.


def without_bias(p, x, y):
    return jnp.sum(y * jnp.sin(x @ p["w"]))


def regularised(p, x, y):
    return dense(p, x, y) - 0.3 * jnp.sum(p["w"] ** 2)


def reversed_layout(p, y, x):
    return jnp.sum(x * jnp.sin(p["w"] @ y)) + jnp.sum(p["b"])


def sliced(p, x):
    return jnp.sum(jnp.sin(x @ p["w"][:3])) + p["b"][0]


SUMS = {
    "more examples": ((dense, (4,), (3,)), (dense, (4,), (3,))),
    "positions": ((dense, (4,), (3,)), (dense, (6, 4), (6, 3))),
    "no bias": ((dense, (4,), (3,)), (without_bias, (4,), (3,))),
    "a regulariser": ((dense, (4,), (3,)), (regularised, (4,), (3,))),
    "a regulariser without bias": ((without_bias, (4,), (3,)), (regularised, (4,), (3,))),
    "another layout": ((dense, (4,), (3,)), (reversed_layout, (3,), (4,))),
    "a part": ((dense, (4,), (3,)), (sliced, (3,))),
    "a prior": ((dense, (4,), (3,)), (lambda p, s: -s * (jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 3)), ())),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_fishers_is_that_of_all_rows(name):
    params = arrays(w=(4, 3), b=(3,))
    (first, *shapes), (second, *others) = SUMS[name]
    one = tuple(jnp.asarray(numbers(8 + k, 5, *shape)) for k, shape in enumerate(shapes))
    two = tuple(jnp.asarray(numbers(18 + k, 3, *shape)) for k, shape in enumerate(others))
    v = jax.tree.map(lambda leaf: jnp.asarray(numbers(6, *leaf.shape)), params)

    @traced
    def run(params, one, two):
        parts = jf.empirical_fisher(first)(params, *one), jf.empirical_fisher(second)(params, *two)
        both, turned = parts[0] + parts[1], parts[1] + parts[0]
        solution, _ = jf.solve(both, v, damping=0.1)
        return both.as_matrix(), both.mv(v), solution, both.form.scores.gram(), turned.form.scores.gram()

    matrix, product, solution, gram, turned = run(params, one, two)
    rows = plain(first, params, one), plain(second, params, two)
    expected = rows[0].T @ rows[0] / 5 + rows[1].T @ rows[1] / 3
    joined, back = np.concatenate(rows), np.concatenate(rows[::-1])
    close(matrix, expected)
    close(flat(product), expected @ flat(v))
    close(flat(solution), np.linalg.solve(expected + 0.1 * np.eye(len(expected)), flat(v)), 1e-11)
    close(gram, joined @ joined.T)
    close(turned, back @ back.T)


# Layers with a bias.


@pytest.mark.parametrize("name", ["bias repeated", "weight repeated", "both plain", "bias negative"])
def test_a_bias_is_joined_with_its_weight_only_where_it_is_one(name):
    def log_prob(p, x, y):
        w, b = p["w"], p["b"]
        w = w.sum(-1) if name == "weight repeated" else w
        b = b.sum(-1) if name == "bias repeated" else b
        return jnp.sum(y * jnp.sin(x @ w - b if name == "bias negative" else x @ w + b))

    params = arrays(w=(6, 4, 2) if name == "weight repeated" else (6, 4), b=(4, 2) if name == "bias repeated" else (4,))
    data = (jnp.asarray(numbers(3, N, 6)), jnp.asarray(numbers(4, N, 4)))
    rows = plain(log_prob, params, data)
    gram, norms = evaluated(lambda *args: (lambda s: (s.gram(), s.squared_norms()))(jf.scores(log_prob)(*args)), params, *data)
    close(gram, rows @ rows.T)
    close(norms, np.sum(rows**2, 1))


# Scale: nothing overflows on the way to a result that does not.


def least_squares(p, x, y):
    return -0.5 * jnp.sum((x @ p["w"] - y) ** 2)


@pytest.mark.parametrize(("scale", "batch_size"), [(1e-20, None), (1e20, 3)])
def test_scores_of_any_scale_solve(scale, batch_size):
    params, x, y = narrow((arrays(w=(6, 4)), numbers(3, N, 6), numbers(4, N, 4)))
    rows = plain(least_squares, params, (x, y))
    small = np.linalg.inv(rows @ rows.T / N) / N

    def scaled(p, x, y):
        return least_squares(p, x, y) * jnp.asarray(scale, jnp.float32)

    @jax.jit
    def run(params, x, y):
        fisher = jf.empirical_fisher(scaled, batch_size=batch_size)(params, x, y)
        gradient = fisher.form.scores.rmv(-fisher.form.scores.weights)
        return jf.natural_grad(scaled, damping=0.0, batch_size=batch_size)(params, x, y), jf.solve(
            fisher, gradient, damping=0.0
        )[0]

    for step in run(params, x, y):
        # (s^2 F)^+ (-s g)
        close(flat(step) * scale, -rows.T @ small @ np.ones(N), 1e-4)


@pytest.mark.parametrize(("scale", "batch_size"), [(1e-20, 3), (1e20, None)])
def test_inputs_of_any_scale_solve(scale, batch_size):
    params, x, y = arrays(w=(6, 4)), numbers(3, N, 6), numbers(4, N, 4)
    narrowed = narrow(({"w": params["w"] / scale}, x * scale, y))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), narrowed)
    w, x, y = wide[0]["w"] * scale, wide[1] / scale, wide[2]
    rows = np.stack([np.outer(x[n], y[n] - x[n] @ w).ravel() for n in range(N)])
    step = jax.jit(lambda p, *data: jf.natural_grad(least_squares, damping=0.0, batch_size=batch_size)(p, *data))(*narrowed)
    close(flat(step) / (1 / scale), -rows.T @ np.linalg.inv(rows @ rows.T) @ np.ones(N), 1e-4)


# Odd cases.

ODD = {
    "a prior in the log-density": (
        lambda p, x, y: dense(p, x, y) - 0.5 * jnp.sum(p["w"] ** 2) - jnp.sum(p["b"] ** 4),
        arrays(w=(4, 3), b=(3,)),
        (N, 4),
        (N, 3),
    ),
    "parameters without effect": (dense, arrays(w=(4, 3), b=(3,), a=(2, 2), z=()), (N, 4), (N, 3)),
    "one example": (dense, arrays(w=(4, 3), b=(3,)), (1, 4), (1, 3)),
    "one parameter": (lambda p, x, y: jnp.sum(y * jnp.sin(p["w"] * x)), arrays(w=()), (N, 4), (N, 4)),
    "one weight": (dense, arrays(w=(1, 1), b=(1,)), (N, 1), (N, 1)),
    "the same row for all": (
        lambda p, x, y: jnp.sum(jnp.sin(jnp.ones(4) @ p["w"])) + 0 * jnp.sum(x),
        arrays(w=(4, 3)),
        (N, 4),
        (N, 3),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_cases_equal_plain_gradients(name):
    log_prob, params, x, y = ODD[name]
    data = (jnp.asarray(numbers(3, *x)), jnp.asarray(numbers(4, *y)))
    rows = plain(log_prob, params, data)
    n, p = rows.shape
    w = jnp.asarray(numbers(7, n))

    @traced
    def run(params, data):
        found = []
        for options in ({}, {"batch_size": 2, "center": True}):
            scores = jf.scores(log_prob, **options)(params, *data)
            found.append((scores.gram(), ravel_pytree(scores.diagonal())[0], scores.mv(params), ravel_pytree(scores.rmv(w))[0]))
        return found, jf.natural_grad(log_prob, damping=0.3)(params, *data)

    found, step = run(params, data)
    for made, dense_rows in zip(found, (rows, rows - rows.mean(0)), strict=True):
        size = np.abs(rows).max()
        expected = dense_rows @ dense_rows.T, np.mean(dense_rows**2, 0), dense_rows @ flat(params), dense_rows.T @ np.asarray(w)
        for actual, value, power in zip(made, expected, (2, 2, 1, 1), strict=True):
            np.testing.assert_allclose(actual, value, rtol=0, atol=1e-12 * p * max(1, size) ** power)
    close(flat(step), np.linalg.solve(rows.T @ rows / n + 0.3 * np.eye(p), -rows.mean(0)), 1e-11)


# Derivatives of functions of scores, and batches of parameters.

DEEP = arrays(w=(6, 5), b=(5,), o=(5, 4))


def deep(p, x, y):
    return jnp.sum(y * jnp.sin(jnp.tanh(x @ p["w"] + p["b"]) @ p["o"]))


def plain_matrix(log_prob, params, x, y):
    rows = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, x, y)
    return jnp.concatenate([leaf.reshape(x.shape[0], -1) for leaf in jax.tree.leaves(rows)], axis=1)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_gram_matrix_is_differentiable(batch_size):
    x, y, mix = (jnp.asarray(numbers(k, N, size)) for k, size in ((3, 6), (4, 4), (5, N)))

    def of_gram(params):
        scores = jf.scores(deep, batch_size=batch_size)(params, x, y)
        return jnp.sum(mix * scores.gram()) + jnp.sum(jnp.sin(scores.squared_norms()))

    def of_rows(params):
        rows = plain_matrix(deep, params, x, y)
        return jnp.sum(mix * (rows @ rows.T)) + jnp.sum(jnp.sin(jnp.sum(rows**2, axis=1)))

    found, expected = evaluated(lambda p: (jax.grad(of_gram)(p), jax.grad(of_rows)(p)), DEEP)
    close(flat(found), flat(expected), 1e-11)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_natural_gradient_is_differentiable(batch_size):
    x, y = jnp.asarray(numbers(3, 4, 6)), jnp.asarray(numbers(4, 4, 3))
    params = arrays(w=(6, 3), b=(3,))

    def step(params):
        made = jf.natural_grad(dense, damping=0.3, batch_size=batch_size)(params, x, y)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(made))

    def dense_step(params):
        rows = plain_matrix(dense, params, x, y)
        made = jnp.linalg.solve(rows.T @ rows / 4 + 0.3 * jnp.eye(rows.shape[1]), -jnp.mean(rows, axis=0))
        return jnp.sum(jnp.sin(made))

    tangent = jax.tree.map(jnp.cos, params)
    slope, gradient = evaluated(lambda p: (jax.jvp(step, (p,), (tangent,))[1], jax.grad(step)(p)), params)
    expected = flat(evaluated(jax.grad(dense_step), params))
    close(flat(gradient), expected, 1e-11)
    close(slope, expected @ flat(tangent), 1e-11)


def test_the_natural_gradient_of_many_rows_is_differentiable():
    # More rows than one strip of the Gram matrix has.
    x, y, params = jnp.asarray(numbers(3, 300, 18)), jnp.asarray(numbers(4, 300, 18)), arrays(w=(18, 18))

    def step(params):
        return jnp.sum(jnp.sin(jf.natural_grad(without_bias, damping=0.3)(params, x, y)["w"]))

    def dense_step(params):
        rows = jax.vmap(jax.grad(without_bias), (None, 0, 0))(params, x, y)["w"].reshape(300, -1)
        return jnp.sum(jnp.sin(jnp.linalg.solve(rows.T @ rows / 300 + 0.3 * jnp.eye(324), -jnp.mean(rows, axis=0))))

    found, expected = jax.jit(lambda p: (jax.grad(step)(p), jax.grad(dense_step)(p)))(params)
    close(found["w"], expected["w"], 1e-11)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_scores_map_over_parameters(batch_size):
    x, y = jnp.asarray(numbers(3, N, 6)), jnp.asarray(numbers(4, N, 4))
    many = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, -leaf]), DEEP)

    def made(params):
        scores = jf.scores(deep, batch_size=batch_size)(params, x, y)
        return scores.gram(), scores.diagonal(), jf.natural_grad(deep, damping=0.3, batch_size=batch_size)(params, x, y)

    grams, diagonals, steps = evaluated(jax.vmap(made), many)
    for k in range(3):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (many, diagonals, steps))
        rows = evaluated(lambda params: plain_matrix(deep, params, x, y), one[0])
        close(grams[k], rows @ rows.T)
        close(flat(one[1]), np.mean(rows**2, 0))
        close(flat(one[2]), np.linalg.solve(rows.T @ rows / N + 0.3 * np.eye(rows.shape[1]), -rows.mean(0)), 1e-11)


# The explanation.

EXPLAINED = arrays(table=(11, 4), w=(4, 6), b=(6,), kernel=(5, 4, 2), unused=(3, 3))


def mixed(p, tokens, y):
    z = p["table"][tokens]
    z = jax.lax.conv_general_dilated(z[None], p["kernel"], (1,), "VALID", dimension_numbers=("NWC", "OIW", "NWC"))[0]
    return jnp.sum(y * jnp.sin(jnp.mean(z, 0)[:4] @ p["w"] + p["b"]))


def test_explain_states_what_is_held():
    tokens, y = jnp.zeros((N, 3), int), jnp.ones((N, 6))
    explanation = jf.explain(mixed)(EXPLAINED, tokens, y)
    held = jf.scores(mixed)(EXPLAINED, tokens, y)
    by_path = {leaf.path: leaf for leaf in explanation.leaves}
    assert [leaf.path for leaf in explanation.leaves] == ["['b']", "['kernel']", "['table']", "['unused']", "['w']"]
    for explained, leaf in zip(explanation.leaves, held.leaves, strict=True):
        assert explained.bytes == sum(array.nbytes for array in jax.tree.leaves(leaf.forms))
    assert explanation.bytes == sum(array.nbytes for array in jax.tree.leaves(held.leaves))
    p = sum(leaf.size for leaf in jax.tree.leaves(EXPLAINED))
    assert (explanation.plain_bytes, explanation.plain_flops) == (8 * N * p, 2 * N * N * p)
    assert (explanation.examples, explanation.rows, explanation.plain) == (N, 1, ())
    assert explanation.factored == ("['kernel']", "['table']", "['w']")
    forms = {path: (leaf.form, leaf.positions) for path, leaf in by_path.items()}
    assert forms == {
        "['b']": ("elementwise", 0),
        "['kernel']": ("convolution", 2),
        "['table']": ("embedding", 3),
        "['unused']": ("zero", 0),
        "['w']": ("outer product", 1),
    }
    # 2 T^2 n^2 (I + O) for inner products of factors. Nothing is computed, so shapes are enough.
    assert by_path["['w']"].flops == 2 * N * N * (4 + 6)
    assert by_path["['unused']"].why == "the function does not depend on it"
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (EXPLAINED, tokens, y))
    assert jf.explain(mixed)(*shapes) == jf.explain(mixed)(EXPLAINED, *shapes[1:]) == explanation


def test_explain_prints_a_table():
    text = str(jf.explain(mixed)(EXPLAINED, jnp.zeros((N, 3), int), jnp.ones((N, 6))))
    lines = text.splitlines()
    assert lines[0].split() == ["leaf", "shape", "held", "as", "T", "memory", "Gram", "flops", "Kronecker", "why"]
    assert set(lines[1]) == {"-"}
    assert [line.split("  ")[0] for line in lines[2:]] == [
        *("['b']", "['kernel']", "['table']", "['unused']", "['w']", "total", "plain gradients")
    ]
    assert all(line == line.rstrip() for line in lines)
    # 5 examples of w's gradient: an input of 4 and a cotangent of 6 numbers of 8 bytes.
    assert "400 B" in lines[6]
    assert "T^2 (I + O) = 10, I O = 24" in lines[6]
    explained = {
        leaf.path: leaf.kronecker for leaf in jf.explain(mixed)(EXPLAINED, jnp.zeros((N, 3), int), jnp.ones((N, 6))).leaves
    }
    assert explained["['w']"] == explained["['kernel']"] == "yes"
    assert explained["['table']"] == "no: a table" and explained["['unused']"] == "no: no factors"


def test_explain_takes_a_model():
    params, x = arrays(w=(4, 3), b=(3,)), jnp.ones((N, 4))
    explanation = jf.explain(softmax)(params, x)
    held = jf.exact_fisher(softmax)(params, x).form.scores
    assert (explanation.rows, explanation.examples) == (3, N)
    assert explanation.bytes == sum(array.nbytes for array in jax.tree.leaves(held.leaves))
    # The input is stored once per example: n I + 2 n C O numbers for the weight and the bias.
    assert explanation.bytes == 8 * (N * 4 + 2 * N * 3 * 3)
    assert "5 x 3 rows" in str(explanation)


def test_explain_refuses_what_is_neither():
    params, x = arrays(w=(4, 3), b=(3,)), jnp.ones((N, 4))
    with pytest.raises(TypeError, match="function"):
        jf.explain("log_prob")(params, x)
    with pytest.raises(TypeError, match="distribution"):
        jf.explain(lambda p, x: {"logits": x @ p["w"]})(params, x)
    with pytest.raises(ValueError, match="scalar"):
        jf.explain(lambda p, x: x @ p["w"])(params, x)
    with pytest.raises(ValueError, match="leading axis"):
        jf.explain(dense)(params, x, jnp.ones((N + 1, 3)))
    with pytest.raises(TypeError, match="float"):
        jf.explain(dense)({"w": jnp.ones((4, 3), int), "b": params["b"]}, x, jnp.ones((N, 3)))


def test_explain_says_what_had_to_be_formed():
    def log_prob(p, x):
        return jnp.sum(jnp.sin(x @ jnp.cumsum(p["w"], axis=0)))

    explanation = jf.explain(log_prob)({"w": jnp.ones((4, 3))}, jnp.ones((N, 4)))
    assert (explanation.plain, explanation.factored) == (("['w']",), ())
    assert "cumsum" in explanation.leaves[0].why
    assert explanation.leaves[0].why in str(explanation)
    assert explanation.leaves[0].bytes == explanation.plain_bytes
