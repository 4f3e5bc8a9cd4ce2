"""Several heads, each with its likelihood: a container of distributions as a model's output."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from others import library
from problems import assert_close, flat
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

N, INPUTS, HIDDEN = 5, 3, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.standard_normal((INPUTS, HIDDEN)),
    "label": RNG.standard_normal((HIDDEN, 3)),
    "box": RNG.standard_normal((HIDDEN, 2)),
    "count": 0.3 * RNG.standard_normal(HIDDEN),
    "scale": np.float64(0.3),
}
X = RNG.standard_normal((N, INPUTS))
ONES = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), PARAMS)


def hidden(params, x):
    return jnp.tanh(x @ params["w"])


HEADS = {
    "label": lambda p, x: jf.Categorical(logits=hidden(p, x) @ p["label"]),
    "box": lambda p, x: jf.Normal(hidden(p, x) @ p["box"], jnp.exp(p["scale"])),
    "count": lambda p, x: jf.Poisson(log_rate=hidden(p, x) @ p["count"]),
}


def model(params, x):
    """A class, a pair of numbers, and a count."""
    return {"label": HEADS["label"](params, x), "rest": (HEADS["box"](params, x), HEADS["count"](params, x))}


@functools.cache
def targets():
    """The targets in the model's container, and by the names of its heads."""
    rng = np.random.default_rng(1)
    parts = {"label": rng.integers(0, 3, N), "box": rng.standard_normal((N, 2)), "count": rng.poisson(1.0, N)}
    return {"label": parts["label"], "rest": (parts["box"], parts["count"])}, parts


def joint_scores(y):
    """The score of the sum of the heads' log-densities, written by hand, with one row per example."""

    def log_prob(p, x, label, box, count):
        h = hidden(p, x)
        rate = h @ p["count"]
        normal = -0.5 * jnp.sum(jnp.square((box - h @ p["box"]) / jnp.exp(p["scale"]))) - 2 * p["scale"]
        return jax.nn.log_softmax(h @ p["label"])[label] + normal + count.astype(float) * rate - jnp.exp(rate)

    gradients = evaluated(jax.vmap(jax.grad(log_prob), (None, 0, 0, 0, 0)), PARAMS, X, y["label"], y["box"], y["count"])
    return np.concatenate([leaf.reshape(N, -1) for leaf in jax.tree.leaves(gradients)], 1)


@traced
def fields_and_jacobians(params, x):
    """The fields of the three heads at one input, and their derivatives."""

    def fields(p):
        box = jnp.concatenate([hidden(p, x) @ p["box"], jnp.exp(p["scale"])[None]])
        return hidden(p, x) @ p["label"], box, (hidden(p, x) @ p["count"])[None]

    return fields(params), jax.jacrev(fields)(params)


@functools.cache
def dense_fisher():
    """The sum over heads of the mean of ``J^T M J``, with the metrics of the three families written by hand."""
    total = 0.0
    for x in np.asarray(X):
        values, jacobians = jax.tree.map(np.asarray, fields_and_jacobians(PARAMS, x))
        probs, scale = np.exp(values[0]) / np.sum(np.exp(values[0])), values[1][2]
        metrics = (
            np.diag(probs) - np.outer(probs, probs),
            np.diag([1, 1, 2 * 2]) / scale**2,
            np.diag(np.exp(values[2])),
        )
        for metric, jacobian in zip(metrics, jacobians, strict=True):
            rows = np.stack([flat(jax.tree.map(lambda leaf, i=i: leaf[i], jacobian)) for i in range(len(metric))])
            total = total + rows.T @ metric @ rows / N
    return total


def test_fishers_of_several_heads_are_the_dense_sum():
    """Exact, in products, in pieces, as a Hessian of the KL, and at the data."""
    dense, (y, parts) = dense_fisher(), targets()

    def fishers(params, x, y):
        made = jf.exact_fisher(model)(params, x)
        assert made.form.scores.num_rows == N * (3 + 4 + 1), "the rows of the heads, side by side"
        return {
            "held": made.as_matrix(),
            "in pieces": jf.exact_fisher(model, batch_size=2)(params, x).as_matrix(),
            "Hessian": jf.kl_hessian(model)(params, x).as_matrix(),
            "product": jf.implicit_fisher(model)(params, x).mv(ONES),
            "at the data": jf.empirical_fisher(jf.log_likelihood(model))(params, x, y).as_matrix(),
        }

    found, rows = evaluated(fishers, PARAMS, X, y), joint_scores(parts)
    for name, factor in (("held", 1e3), ("in pieces", 1e3), ("Hessian", 1e4)):
        assert_close(found[name], dense, factor=factor)
    assert_close(flat(found["product"]), dense @ flat(ONES), factor=1e3)
    assert_close(found["at the data"], rows.T @ rows / N, factor=1e3)


def test_draws_of_several_heads_give_the_fisher():
    drawn = jf.sampled_fisher(model, 2000)(PARAMS, jax.random.key(1), X)
    dense = dense_fisher()
    scale = np.sqrt(np.outer(np.diag(dense), np.diag(dense)))
    assert np.max(np.abs(np.asarray(drawn.as_matrix()) - dense) / scale) < 0.1


def test_every_view_and_a_step_of_kfac():
    """A view is that of the sum, and a jitted step runs and lowers the loss."""
    y, parts = targets()
    dense = dense_fisher()

    def views(params, x):
        F = jf.exact_fisher(model)(params, x)
        made = jf.block_diagonal, jf.kronecker, jf.eigen_kronecker, jf.kronecker_reduce
        return jf.diagonal(F).diagonal(), jnp.stack([view(F).trace() for view in made])

    diagonal, traces = evaluated(views, PARAMS, X)
    assert_close(flat(diagonal), np.diag(dense), factor=1e3)
    np.testing.assert_allclose(traces, np.full(4, np.trace(dense)), rtol=1e-10)
    step = jf.training_step(model, jf.kfac())
    state, step, params, losses = step.init(PARAMS, X, y), jax.jit(step), PARAMS, []
    for _ in range(5):
        params, state, loss = step(params, state, X, y)
        losses.append(float(loss))
    by_hand = [
        -np.sum(evaluated(jax.vmap(lambda x, y, head=head: jnp.sum(head(PARAMS, x).log_prob(y))), X, parts[name])) / N
        for name, head in HEADS.items()
    ]
    np.testing.assert_allclose(losses[0], sum(by_hand), rtol=1e-12)
    assert losses[-1] < losses[0] - 0.1


def test_what_a_joint_says_is_the_sum_of_its_parts():
    p, q = (evaluated(lambda x: jf.Joint(model(PARAMS, x)), x) for x in X[:2])
    parts = [jax.tree.leaves(d.parts, is_leaf=lambda leaf: isinstance(leaf, jf.Distribution)) for d in (p, q)]
    whole, same, each = evaluated(
        lambda: (p.kl(q), jf.kl_divergence(p.parts, q.parts), [a.kl(b) for a, b in zip(*parts, strict=True)])
    )
    assert_close(whole, sum(map(np.sum, each)))
    assert_close(same, whole)
    assert p.batch_shape == () and p.event_shape == {"label": (), "rest": ((2,), ())}
    assert_close(p.mean["rest"][0], parts[0][1].mean)
    pair = jf.Joint([parts[0][0], parts[0][1]])
    whole, each = evaluated(lambda: (pair.entropy(), [part.entropy() for part in parts[0][:2]]))
    assert_close(whole, sum(map(np.sum, each)))
    batch = jf.Joint([jf.Normal(jnp.zeros((4, 2)), 1.0), jf.Categorical(logits=jnp.zeros((4, 3)))])
    assert batch.batch_shape == (4,) and batch.event_shape == [(2,), ()] and batch.entropy().shape == (4,)


def test_a_head_may_be_masked():
    """A padded sequence beside a number; the content of the padding does not matter."""

    def ragged(params, x, length):
        logits = jnp.stack([hidden(params, x), 2 * x @ params["w"]])
        logits = jnp.where(jnp.arange(2)[:, None] < length, logits, jnp.nan)
        return jf.Masked(jf.Categorical(logits=logits), jnp.arange(2) < length), HEADS["count"](params, x)

    params, lengths = {"w": PARAMS["w"], "count": PARAMS["count"]}, np.array([2, 1, 1, 2, 1])
    models = [ragged, *(lambda p, x, n, i=i: ragged(p, x, n)[i] for i in (0, 1))]
    made, *alone = evaluated(
        lambda p, x, n: [jf.exact_fisher(model)(p, x, n).as_matrix() for model in models], params, X, lengths
    )
    assert np.all(np.isfinite(made)) and np.trace(made) > 0
    assert_close(made, sum(alone), factor=1e3)


def test_any_container_and_distributions_of_other_libraries():
    pair = collections.namedtuple("pair", ["number", "flag"])
    numpyro = library("numpyro.distributions")
    outputs = lambda w, x: pair(numpyro.Normal(w * x, 2.0), numpyro.OrderedLogistic(w * x, jnp.array([-1.0, 1.0])))  # noqa: E731
    w, x = np.float64(0.3), np.array([0.5, -1.0])
    models = [outputs, *(lambda w, x, i=i: outputs(w, x)[i] for i in (0, 1))]
    found, *alone = evaluated(lambda w, x: [jf.exact_fisher(model)(w, x).as_matrix() for model in models], w, x)
    assert_close(found, sum(alone), eps=1e-12)
    assert "sum over 3 outcomes" in repr(jax.eval_shape(jf.exact_fisher(outputs), w, x))
    assert np.isfinite(evaluated(jf.log_likelihood(outputs), w, x[0], pair(np.float64(0.1), np.int64(1))))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda y: {"label": y["label"]}, r"one target is a dict with the keys \['label'\].*nothing at \['rest'\]\[0\]"),
        (lambda y: y | {"rest": y["rest"][:1]}, r"nothing at \['rest'\]\[1\]"),
        (lambda y: y | {"more": y["label"]}, r"has \['more'\], where there is no distribution"),
        (lambda y: y | {"rest": list(y["rest"])}, r"expected a dict"),
        (lambda y: y["label"], r"one array of shape \(\).*nothing at \['label'\]"),
        (lambda y: y | {"label": y["label"][:, None]}, r"one target at \['label'\] has shape \(1,\).*over \(\)"),
    ],
)
def test_a_target_in_another_container_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(jf.empirical_fisher(jf.log_likelihood(model)), PARAMS, X, wrong(targets()[0]))


def test_what_is_no_joint_is_named():
    p = jf.Normal(0.0, 1.0)
    for make, error, words in (
        (lambda: jf.Joint({}), ValueError, "without a distribution"),
        (
            lambda: jf.Joint((p, jnp.zeros(2))),
            TypeError,
            r"the part at \[1\] is an array.*has_aux=True.*model\(params, x\)\[0\]",
        ),
        (lambda: jf.Joint([p]).kl(p), TypeError, "expected another Joint, got Normal"),
        (lambda: jf.Joint([p]).kl(jf.Joint([p, p])), ValueError, r"has \[1\]|nothing at \[1\]"),
        (lambda: jf.Joint([p]).kl(jf.Joint([jf.Laplace(0.0, 1.0)])), TypeError, "expected another Normal"),
        (lambda: jf.check_laws(jf.Joint([p]), key=jax.random.key(0)), TypeError, "laws of its parts"),
        (lambda: jf.log_likelihood(lambda m: jf.Normal(m, 1.0))(0.0, {"a": 1.0}), TypeError, "one target is a dict"),
    ):
        with pytest.raises(error, match=words):
            make()
