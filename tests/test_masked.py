"""A distribution over part of the positions: closed forms, sums over outcomes, and nothing from where the mask is false."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, flat
from programs.evaluate import evaluated

import jaxfisher as jf

MASK = np.array([True, False, True])
RUBBISH = {"NaN": np.nan, "infinite": np.inf, "large": 1e300, "minus": -1e5}
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
GOOD = np.array([0.3, 0.0, -0.7])


def spoiled(tree, rubbish):
    """The second member, which does not count, is rubbish."""
    return jax.tree.map(lambda leaf: leaf.at[1].set(rubbish), tree)


@functools.cache
def answers(name):
    """What is compared of a family, as a function of the rubbish: one program for every kind of it."""

    def total(inside, x):
        return jnp.sum(jf.Masked(inside, MASK).log_prob(x))

    @jax.jit
    def of(rubbish):
        plain = FAMILIES[name](GOOD)
        other = jax.tree.map(lambda leaf: 1.01 * leaf, plain)
        # Not the same in both: a divergence that does not look at the mask would be zero there.
        inside, inside_other = spoiled(plain, rubbish), spoiled(other, -rubbish)
        bad, x = jf.Masked(inside, MASK), plain.sample(jax.random.key(0))
        bad_x = spoiled(x, -7 if jnp.issubdtype(x.dtype, jnp.integer) else rubbish)
        drawn = bad.sample(jax.random.key(3), (2,))
        return {
            "log_prob": (bad.log_prob(bad_x), plain.log_prob(x)),
            "total": jax.value_and_grad(total)(inside, bad_x),
            "slopes": jax.grad(lambda inside: jnp.sum(inside.log_prob(x)))(plain),
            "kl": (bad.kl(jf.Masked(inside_other, MASK)), plain.kl(other)),
            "slopes of kl": jax.grad(lambda q: jnp.sum(bad.kl(jf.Masked(q, MASK))))(inside_other),
            "drawn": (drawn, jax.vmap(bad.log_prob)(drawn)),
            "draw": x,
        }

    return of


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_mask_lets_through_counts(name, rubbish):
    """Values, derivatives in the fields, KL, Fisher and draws are those of the members that count, one by one."""
    seen = jax.tree.map(np.asarray, answers(name)(np.float64(RUBBISH[rubbish])))
    found, plain = seen["log_prob"]
    assert_close(found, np.where(MASK, plain, 0.0))
    total, slopes = seen["total"]
    assert_close(total, np.sum(plain[MASK]))
    for found, wanted in zip(jax.tree.leaves(slopes), jax.tree.leaves(seen["slopes"]), strict=True):
        assert np.all(found[1] == 0)
        assert_close(found[MASK], wanted[MASK], factor=1e3)
    divergence, plain = seen["kl"]
    assert_close(divergence, np.where(MASK, plain, 0.0), factor=1e4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(seen["slopes of kl"]))
    drawn, log_prob = seen["drawn"]
    assert np.all(np.isfinite(drawn)) and drawn.shape == (2, *seen["draw"].shape)
    assert np.all(np.isfinite(log_prob))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fisher_has_no_part_of_what_does_not_count(name):
    def views(rubbish):
        plain = FAMILIES[name](GOOD)
        masked = jf.Masked(spoiled(plain, rubbish), MASK)
        tangent = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), plain)
        moved = masked.fisher_mv(jax.tree.unflatten(jax.tree.structure(masked), [*jax.tree.leaves(tangent), MASK]))
        moments = [(inside.mean, inside.variance) for inside in (masked, plain)]
        return plain, plain.fisher_matrix(), masked.fisher_matrix(), tangent, moved.distribution, moments

    plain, matrix, found, tangent, moved, moments = evaluated(views, np.nan)
    keep = [np.broadcast_to(MASK.reshape(3, *[1] * (leaf.ndim - 1)), leaf.shape) for leaf in jax.tree.leaves(plain)]
    inside = np.concatenate([part.reshape(-1) for part in keep])
    matrix = np.where(inside[:, None] & inside[None], matrix, 0)
    assert_close(found, matrix, factor=1e3)
    assert_close(flat(moved), matrix @ flat(tangent), factor=1e3)
    for found, wanted in zip(*moments, strict=True):
        assert_close(found[MASK], wanted[MASK])
        assert np.all(np.isfinite(found))


def test_entropy_counts_what_is_there():
    plain = FAMILIES["categorical"](GOOD)
    masked = jf.Masked(spoiled(plain, np.nan), MASK)
    assert_close(masked.entropy(), np.where(MASK, plain.entropy(), 0.0))


LENGTHS = np.array([4, 2, 3, 1])


def sequence(params, x, length):
    """Classes at the positions of a sequence in padding."""
    logits = jnp.tanh(x @ params["w"]) @ params["v"]
    return jf.Masked(jf.Categorical(logits=logits), jnp.arange(len(x)) < length)


def sequences(fill):
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((3, 4)), "v": rng.standard_normal((4, 3))}
    real = np.arange(4)[None] < LENGTHS[:, None]
    x = np.where(real[..., None], rng.standard_normal((4, 4, 3)), fill)
    y = np.where(real, rng.integers(0, 3, (4, 4)), -9)
    return jax.tree.map(jnp.asarray, (params, x, y))


def dense_fisher(params, x):
    """By its definition: over sequences, positions that count, and classes."""
    log_prob = jax.jit(jax.value_and_grad(lambda p, x, c: jax.nn.log_softmax(jnp.tanh(x @ p["w"]) @ p["v"])[c]))
    total, x = 0.0, np.asarray(x)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            for c in range(3):
                value, score = log_prob(params, x[i, t], c)
                total = total + np.exp(float(value)) * np.outer(flat(score), flat(score)) / len(LENGTHS)
    return total


@jax.jit
def token_losses(params, x, y):
    """Of the positions that count, one by one."""
    logits = {(i, t): jnp.tanh(x[i, t] @ params["w"]) @ params["v"] for i in range(4) for t in range(LENGTHS[i])}
    return jnp.stack([-jax.nn.log_softmax(z)[y[place]] for place, z in logits.items()])


def test_fishers_losses_and_steps_of_sequences_in_padding():
    """Against loops over the positions that count; what is in the padding changes nothing, held, implicit or in a step."""
    params, x, y = sequences(0.0)
    dense = dense_fisher(params, x)
    clean = sequences(30.0)[1]
    assert_close(jf.exact_fisher(sequence)(params, clean, LENGTHS).as_matrix(), dense, factor=1e3)
    v = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    assert_close(flat(jf.implicit_fisher(sequence)(params, clean, LENGTHS).mv(v)), dense @ flat(v), factor=1e3)
    step = jf.training_step(sequence, jf.kfac())
    state = step.init(params, x, LENGTHS, y)
    (first, _, value), (second, _, same) = (jax.jit(step)(params, state, data, LENGTHS, y) for data in (x, clean))
    assert_close(value, np.sum(token_losses(params, x, y)) / 4)
    np.testing.assert_allclose([same, *flat(second)], [value, *flat(first)], rtol=1e-11)
    assert np.max(np.abs(flat(first) - flat(params))) > 1e-3


# --- means over tokens -----------------------------------------------------------------------------------------------------

TOKENS = int(np.sum(LENGTHS))


def test_means_over_tokens():
    """Every Fisher, the KL divergence and a step are means over tokens that count; padding and pieces have no effect."""
    params, x, y = sequences(0.0)
    dense = dense_fisher(params, x) * len(LENGTHS) / TOKENS
    known = {"counts": LENGTHS}
    assert_close(jf.exact_fisher(sequence)(params, x, LENGTHS, **known).as_matrix(), dense, factor=1e3)
    assert_close(jf.exact_fisher(sequence, batch_size=3)(params, x, LENGTHS, **known).as_matrix(), dense, factor=1e3)
    v = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
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
    gradient = flat(jax.jit(jax.grad(lambda params: jnp.sum(token_losses(params, x, y)) / TOKENS))(params))
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
