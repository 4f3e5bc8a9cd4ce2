"""A distribution over part of the positions: closed forms, sums over outcomes, and nothing from where the mask is false."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, flat

import jaxfisher as jf

MASK = jnp.array([True, False, True])
RUBBISH = {"NaN": jnp.nan, "infinite": jnp.inf, "large": 1e300, "minus": -1e5}
FAMILIES = {
    "normal": lambda a: jf.Normal(a, jnp.exp(0.3 * a)),
    "multivariate": lambda a: jf.MultivariateNormal(
        jnp.stack([a, 2 * a], -1), jnp.exp(0.1 * a)[:, None, None] * jnp.array([[1.0, 0.0], [0.4, 2.0]])[None]
    ),
    "bernoulli": lambda a: jf.Bernoulli(logits=a),
    "categorical": lambda a: jf.Categorical(logits=jnp.stack([a, -a, 0 * a], -1)),
    "poisson": lambda a: jf.Poisson(a),
    "exponential": lambda a: jf.Exponential(a),
    "gamma": lambda a: jf.Gamma(jnp.exp(a), jnp.exp(-a)),
    "beta": lambda a: jf.Beta(jnp.exp(a), jnp.exp(-a)),
    "dirichlet": lambda a: jf.Dirichlet(jnp.exp(jnp.stack([a, -a, 0 * a], -1))),
    "laplace": lambda a: jf.Laplace(a, jnp.exp(a)),
    "student": lambda a: jf.StudentT(jnp.exp(a) + 2, a, jnp.exp(a)),
    "negative binomial": lambda a: jf.NegativeBinomial(a, 0.5 * a),
}
GOOD = jnp.array([0.3, 0.0, -0.7])


def at(name, rubbish=None):
    """The fields of the second member, which does not count, are as they come or rubbish."""
    inside = FAMILIES[name](GOOD)
    if rubbish is None:
        return inside
    return jax.tree.map(lambda leaf: leaf.at[1].set(rubbish), inside)


def draws(name):
    return at(name).sample(jax.random.key(0))


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_mask_lets_through_counts(name, rubbish):
    """Values, derivatives in the fields, KL, Fisher and draws are those of the members that count, one by one."""
    plain, bad, x = at(name), jf.Masked(at(name, RUBBISH[rubbish]), MASK), draws(name)
    spoiled = x.at[1].set(-7) if jnp.issubdtype(x.dtype, jnp.integer) else x.at[1].set(RUBBISH[rubbish])
    known = np.asarray(MASK)

    def total(inside, x):
        return jnp.sum(jf.Masked(inside, MASK).log_prob(x))

    assert_close(bad.log_prob(spoiled), np.where(known, plain.log_prob(x), 0.0))
    assert_close(jax.jit(total)(at(name, RUBBISH[rubbish]), spoiled), np.sum(np.asarray(plain.log_prob(x))[known]))
    wanted = jax.grad(lambda inside: jnp.sum(inside.log_prob(x)))(plain)
    for found, leaf in zip(
        jax.tree.leaves(jax.grad(total)(at(name, RUBBISH[rubbish]), spoiled)), jax.tree.leaves(wanted), strict=True
    ):
        assert np.all(np.asarray(found)[1] == 0)
        assert_close(np.asarray(found)[known], np.asarray(leaf)[known], factor=1e3)
    other = jax.tree.map(lambda leaf: 1.01 * leaf, plain)
    spoiled_other = jax.tree.map(lambda leaf: leaf.at[1].set(RUBBISH[rubbish]), other)
    assert_close(bad.kl(jf.Masked(spoiled_other, MASK)), np.where(known, plain.kl(other), 0.0), factor=1e4)
    slopes = jax.grad(lambda q: jnp.sum(bad.kl(jf.Masked(q, MASK))))(spoiled_other)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
    drawn = bad.sample(jax.random.key(3), (2,))
    assert np.all(np.isfinite(drawn)) and drawn.shape == (2, *x.shape)
    assert np.all(np.isfinite(jax.vmap(bad.log_prob)(drawn)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fisher_has_no_part_of_what_does_not_count(name):
    plain, masked = at(name), jf.Masked(at(name, jnp.nan), MASK)
    tangent = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), plain)
    keep = [np.broadcast_to(np.asarray(MASK).reshape(3, *[1] * (leaf.ndim - 1)), leaf.shape) for leaf in jax.tree.leaves(plain)]
    inside = np.concatenate([part.reshape(-1) for part in keep])
    matrix = np.where(inside[:, None] & inside[None], plain.fisher_matrix(), 0)
    assert_close(masked.fisher_matrix(), matrix, factor=1e3)
    moved = masked.fisher_mv(jax.tree.unflatten(jax.tree.structure(masked), [*jax.tree.leaves(tangent), MASK]))
    assert_close(flat(moved.distribution), matrix @ flat(tangent), factor=1e3)
    for moments in ("mean", "variance"):
        found, wanted = getattr(masked, moments), getattr(plain, moments)
        assert_close(np.asarray(found)[np.asarray(MASK)], np.asarray(wanted)[np.asarray(MASK)])
        assert np.all(np.isfinite(found))


def test_entropy_counts_what_is_there():
    masked = jf.Masked(at("categorical", jnp.nan), MASK)
    assert_close(masked.entropy(), np.where(MASK, at("categorical").entropy(), 0.0))


LENGTHS = jnp.array([4, 2, 3, 1])


def sequence(params, x, length):
    """Classes at the positions of a sequence in padding."""
    logits = jnp.tanh(x @ params["w"]) @ params["v"]
    return jf.Masked(jf.Categorical(logits=logits), jnp.arange(len(x)) < length)


def sequences(fill):
    keys = jax.random.split(jax.random.key(1), 4)
    params = {"w": jax.random.normal(keys[0], (3, 4)), "v": jax.random.normal(keys[1], (4, 3))}
    real = jnp.arange(4)[None] < LENGTHS[:, None]
    x = jnp.where(real[..., None], jax.random.normal(keys[2], (4, 4, 3)), fill)
    y = jnp.where(real, jax.random.randint(keys[3], (4, 4), 0, 3), -9)
    return params, x, y


def dense_fisher(params, x):
    """By its definition: over sequences, positions that count, and classes."""
    total = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(int(length)):
            for c in range(3):
                of = lambda p, i=i, t=t, c=c: jax.nn.log_softmax(jnp.tanh(x[i, t] @ p["w"]) @ p["v"])[c]  # noqa: E731
                score = flat(jax.grad(of)(params))
                total = total + np.exp(float(of(params))) * np.outer(score, score) / len(LENGTHS)
    return total


def test_fishers_losses_and_steps_of_sequences_in_padding():
    """Against loops over the positions that count; NaN in the padding changes nothing, held, implicit, drawn or in a step."""
    params, x, y = sequences(0.0)
    dense = dense_fisher(params, x)
    bad = sequences(jnp.nan)[1]
    clean = jnp.where(jnp.isnan(bad), 30.0, bad)
    assert_close(jf.exact_fisher(sequence)(params, clean, LENGTHS).as_matrix(), dense, factor=1e3)
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    assert_close(flat(jf.implicit_fisher(sequence)(params, clean, LENGTHS).mv(v)), dense @ flat(v), factor=1e3)
    losses = [
        -jax.nn.log_softmax(jnp.tanh(x[i, t] @ params["w"]) @ params["v"])[y[i, t]] for i in range(4) for t in range(LENGTHS[i])
    ]
    step = jf.training_step(sequence, jf.kfac())
    state = step.init(params, x, LENGTHS, y)
    (first, _, value), (second, _, same) = (jax.jit(step)(params, state, data, LENGTHS, y) for data in (x, clean))
    assert_close(value, sum(losses) / 4)
    np.testing.assert_allclose([same, *flat(second)], [value, *flat(first)], rtol=1e-11)
    assert np.max(np.abs(flat(first) - flat(params))) > 1e-3


# --- means over tokens -----------------------------------------------------------------------------------------------------

TOKENS = int(jnp.sum(LENGTHS))


def token_losses(params, x, y):
    return [
        -jax.nn.log_softmax(jnp.tanh(x[i, t] @ params["w"]) @ params["v"])[y[i, t]] for i in range(4) for t in range(LENGTHS[i])
    ]


def test_means_over_tokens():
    """Every Fisher, the KL divergence and a step are means over tokens that count; padding and pieces have no effect."""
    params, x, y = sequences(0.0)
    dense = dense_fisher(params, x) * len(LENGTHS) / TOKENS
    known = {"counts": LENGTHS}
    assert_close(jf.exact_fisher(sequence)(params, x, LENGTHS, **known).as_matrix(), dense, factor=1e3)
    assert_close(jf.exact_fisher(sequence, batch_size=3)(params, x, LENGTHS, **known).as_matrix(), dense, factor=1e3)
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    implicit = jf.implicit_fisher(sequence, batch_size=2)(params, x, LENGTHS, **known)
    assert_close(flat(implicit.mv(v)), dense @ flat(v), factor=1e3)
    assert_close(jf.kl_hessian(sequence)(params, x, LENGTHS, **known).as_matrix(), dense, factor=1e4)
    assert "mean over the counts of 4" in repr(implicit)
    longer, unit = (jnp.concatenate([leaf, leaf[:2]]) for leaf in (x, jnp.ones(4)))
    padded = {"weights": unit.at[4:].set(0), "counts": jnp.concatenate([LENGTHS, jnp.array([7, 10**6])])}
    made = jf.exact_fisher(sequence)(params, longer, jnp.concatenate([LENGTHS, LENGTHS[:2]]), **padded)
    assert_close(made.as_matrix(), dense, factor=1e3)
    np.testing.assert_allclose(jf.kronecker(made).trace(), np.trace(dense), rtol=1e-10)
    drawn = [jf.sampled_fisher(sequence)(params, jax.random.key(0), x, LENGTHS, **given).as_matrix() for given in ({}, known)]
    assert_close(drawn[1], np.asarray(drawn[0]) * len(LENGTHS) / TOKENS, factor=1e3)
    moved = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    p, q = (jax.nn.log_softmax(jnp.tanh(x @ each["w"]) @ each["v"]) for each in (params, moved))
    kept = jnp.arange(4)[None] < LENGTHS[:, None]
    divergence = np.sum(np.where(kept, np.sum(np.exp(p) * (np.asarray(p) - q), -1), 0)) / TOKENS
    assert_close(jf.kl(sequence)(params, moved, x, LENGTHS, **known), divergence, factor=1e4)
    step = jf.training_step(sequence, jf.natural_gradient(1.0, 0.1))
    new, _, loss = jax.jit(step)(params, step.init(params, x, LENGTHS, y, **known), x, LENGTHS, y, **known)
    assert_close(loss, np.sum(token_losses(params, x, y)) / TOKENS)
    gradient = flat(jax.grad(lambda params: sum(token_losses(params, x, y)) / TOKENS)(params))
    expected = np.linalg.solve(dense + 0.1 * np.eye(len(dense)), gradient)
    assert_close(flat(new), flat(params) - expected, factor=1e4)
    log_prob = jf.log_likelihood(sequence)
    natural = jf.natural_grad(log_prob, jf.exact_fisher(sequence), damping=0.1)(params, x, LENGTHS, y, **known)
    assert_close(flat(natural), expected, factor=1e4)


def test_batches_with_other_numbers_of_tokens_are_merged_by_them():
    params, x, _ = sequences(0.0)
    fisher = lambda params, x, lengths: jf.exact_fisher(sequence)(params, x, lengths, counts=lengths)  # noqa: E731
    batches = [(x[:1], LENGTHS[:1]), (x[1:], LENGTHS[1:])]
    merged = jf.accumulate(fisher, jf.dense)(params, batches)
    assert_close(merged.as_matrix(), dense_fisher(params, x) * len(LENGTHS) / TOKENS, factor=1e3)


def test_counts_that_are_none():
    params, x, y = sequences(0.0)
    fisher = jf.exact_fisher(sequence)
    for counts, error, words in (
        (LENGTHS[:2], ValueError, r"`counts` has shape \(2,\), but there are 4 examples"),
        (np.array([1, -2, 3, 1]), ValueError, "`counts` is -2 at entry 1"),
        (np.zeros(4), ValueError, "`counts` are all zero"),
        ("four", TypeError, "`counts` is 'four'"),
    ):
        with pytest.raises(error, match=words):
            fisher(params, x, LENGTHS, counts=counts)
    traced = jax.jit(lambda counts: fisher(params, x, LENGTHS, counts=counts).trace())
    assert np.isnan(traced(jnp.array([1, -2, 3, 1]))) and np.isnan(traced(jnp.zeros(4))) and np.isfinite(traced(LENGTHS))
    for made in (jf.empirical_fisher, jf.scores):
        with pytest.raises(ValueError, match="`counts` are given with center=True"):
            made(jf.log_likelihood(sequence), center=True)(params, x, LENGTHS, y, counts=LENGTHS)


def test_scores_carry_the_weights_of_means_over_terms():
    params, x, y = sequences(0.0)
    log_prob = jf.log_likelihood(sequence)
    S = jf.scores(log_prob)(params, x, LENGTHS, y, counts=LENGTHS)
    rows = np.asarray(jf.scores(log_prob)(params, x, LENGTHS, y).as_matrix())
    assert_close(S.as_matrix(), rows)
    assert_close(flat(S.diagonal()), np.sum(rows**2, 0) / TOKENS, factor=1e3)
    assert_close(jf.fisher_from_scores(S).as_matrix(), rows.T @ rows / TOKENS, factor=1e3)


def test_what_is_refused():
    p = jf.Normal(jnp.zeros(3), 1.0)
    for mask, error, words in (
        (jnp.ones(3), TypeError, "dtype float"),
        (jnp.ones(2, bool), ValueError, "broadcast"),
        (jnp.ones((2, 3), bool), ValueError, r"\(2, 3\)"),
    ):
        with pytest.raises((error, ValueError), match=words):
            jf.Masked(p, mask)
    with pytest.raises(TypeError, match="Expected a distribution"):
        jf.Masked(3.0, MASK)
    with pytest.raises(TypeError, match="expected one family"):
        jf.Masked(jf.Joint({"a": p}), MASK)
    with pytest.raises(TypeError, match="expected another Normal"):
        jf.Masked(p, MASK).kl(jf.Masked(jf.Laplace(jnp.zeros(3), 1.0), MASK))
