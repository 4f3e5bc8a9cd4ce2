"""A distribution over some positions: closed forms, sums over outcomes, and no effect of positions where the mask is false."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from problems import assert_close, flat
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

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
    """The tree with rubbish in the second member, which is masked."""
    return jax.tree.map(lambda leaf: leaf.at[1].set(rubbish), tree)


def masked(name, rubbish):
    """A family, and the same masked, with rubbish in the masked member."""
    plain = FAMILIES[name](GOOD)
    return plain, jf.Masked(spoiled(plain, rubbish), MASK)


@functools.cache
def draws(name):
    """Draws of a masked family as a function of the rubbish: traced once for every kind of it."""
    return traced(lambda rubbish: masked(name, rubbish)[1].sample(jax.random.key(3), (2,)))


@functools.cache
def answers(name):
    """The compared quantities of a family, as a function of the rubbish: traced once for every kind of it."""

    def total(inside, x):
        return jnp.sum(jf.Masked(inside, MASK).log_prob(x))

    @traced
    def of(rubbish, drawn, x):
        plain, bad = masked(name, rubbish)
        other = jax.tree.map(lambda leaf: 1.01 * leaf, plain)
        # The rubbish differs in both: otherwise a divergence that ignores the mask would be zero there.
        inside, inside_other = bad.distribution, spoiled(other, -rubbish)
        bad_x = spoiled(x, -7 if jnp.issubdtype(x.dtype, jnp.integer) else rubbish)
        return {
            "log_prob": (bad.log_prob(bad_x), plain.log_prob(x)),
            "total": jax.value_and_grad(total)(inside, bad_x),
            "slopes": jax.grad(lambda inside: jnp.sum(inside.log_prob(x)))(plain),
            "kl": (bad.kl(jf.Masked(inside_other, MASK)), plain.kl(other)),
            "slopes of kl": jax.grad(lambda q: jnp.sum(bad.kl(jf.Masked(q, MASK))))(inside_other),
            "drawn": jax.vmap(bad.log_prob)(drawn),
        }

    return of


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_mask_lets_through_counts(name, rubbish):
    """Values, derivatives in the fields, KL, Fisher and draws are those of the members that count, one by one."""
    rubbish = np.float64(RUBBISH[rubbish])
    drawn = np.asarray(draws(name)(rubbish))
    assert np.all(np.isfinite(drawn)) and drawn.shape == (2, *FAMILIES[name](GOOD).mean.shape)
    x = drawn[0][[0, 0, 2]]  # the masked member must be in the support too
    seen = answers(name)(rubbish, drawn, x)
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
    assert np.all(np.isfinite(seen["drawn"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fisher_has_no_part_of_what_does_not_count(name):
    def views(rubbish):
        plain, bad = masked(name, rubbish)
        tangent = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), plain)
        moved = bad.fisher_mv(jax.tree.unflatten(jax.tree.structure(bad), [*jax.tree.leaves(tangent), MASK]))
        moments = [(inside.mean, inside.variance) for inside in (bad, plain)]
        return plain, plain.fisher_matrix(), bad.fisher_matrix(), tangent, moved.distribution, moments

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
    plain, bad = masked("categorical", np.nan)
    assert_close(bad.entropy(), np.where(MASK, plain.entropy(), 0.0))


LENGTHS = np.array([4, 2, 3, 1])


def sequence(params, x, length):
    """Categorical distributions at the positions of a padded sequence."""
    logits = jnp.tanh(x @ params["w"]) @ params["v"]
    return jf.Masked(jf.Categorical(logits=logits), jnp.arange(len(x)) < length)


def sequences(fill):
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((3, 4)), "v": rng.standard_normal((4, 3))}
    real = np.arange(4)[None] < LENGTHS[:, None]
    x = np.where(real[..., None], rng.standard_normal((4, 4, 3)), fill)
    y = np.where(real, rng.integers(0, 3, (4, 4)), -9)
    return params, x, y


def dense_fisher(params, x):
    """The exact Fisher by its definition: a sum over sequences, unmasked positions, and classes."""
    log_prob = traced(jax.value_and_grad(lambda p, x, c: jax.nn.log_softmax(jnp.tanh(x @ p["w"]) @ p["v"])[c]))
    total, x = 0.0, np.asarray(x)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            for c in range(3):
                value, score = log_prob(params, x[i, t], c)
                total = total + np.exp(float(value)) * np.outer(flat(score), flat(score)) / len(LENGTHS)
    return total


def token_losses(params, x, y):
    """The losses of the unmasked positions, one by one."""
    logits = {(i, t): jnp.tanh(x[i, t] @ params["w"]) @ params["v"] for i in range(4) for t in range(LENGTHS[i])}
    return jnp.stack([-jax.nn.log_softmax(z)[y[place]] for place, z in logits.items()])


def test_fishers_losses_and_steps_of_sequences_in_padding():
    """Against loops over the unmasked positions; the content of the padding has no effect in any form or in a step."""
    params, x, y = sequences(0.0)
    dense = dense_fisher(params, x)
    clean = sequences(30.0)[1]
    v = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)

    @traced
    def fishers(params, x):
        return jf.exact_fisher(sequence)(params, x, LENGTHS).as_matrix(), jf.implicit_fisher(sequence)(params, x, LENGTHS).mv(v)

    matrix, product = fishers(params, clean)
    assert_close(matrix, dense, factor=1e3)
    assert_close(flat(product), dense @ flat(v), factor=1e3)
    step = jf.training_step(sequence, jf.kfac())
    state = step.init(params, x, LENGTHS, y)
    run = traced(step)
    (first, _, value), (second, _, same) = (run(params, state, data, LENGTHS, y) for data in (x, clean))
    assert_close(value, np.sum(evaluated(token_losses, params, x, y)) / 4)
    np.testing.assert_allclose([same, *flat(second)], [value, *flat(first)], rtol=1e-11)
    assert np.max(np.abs(flat(first) - flat(params))) > 1e-3


# --- means over tokens -----------------------------------------------------------------------------------------------------

TOKENS = int(np.sum(LENGTHS))


def test_means_over_tokens():
    """Every Fisher, the KL divergence and a step are means over tokens that count; padding and pieces have no effect."""
    params, x, y = sequences(0.0)
    dense = dense_fisher(params, x) * len(LENGTHS) / TOKENS
    known = {"counts": LENGTHS}
    v = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    moved = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    weights, lengths = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]), np.concatenate([LENGTHS, LENGTHS[:2]])
    padded = {"weights": weights, "counts": np.concatenate([LENGTHS, [7, 10**6]])}
    log_prob, step = jf.log_likelihood(sequence), jf.training_step(sequence, jf.natural_gradient(1.0, 0.1))
    state = step.init(params, x, LENGTHS, y, **known)

    def views(params, x, longer, y):
        made = jf.exact_fisher(sequence)(params, longer, lengths, **padded)
        draw = lambda **given: jf.sampled_fisher(sequence)(params, jax.random.key(0), x, LENGTHS, **given)  # noqa: E731
        return {
            "exact": [
                jf.exact_fisher(sequence, batch_size=size)(params, x, LENGTHS, **known).as_matrix() for size in (None, 3)
            ],
            "implicit": jf.implicit_fisher(sequence, batch_size=2)(params, x, LENGTHS, **known).mv(v),
            "kl hessian": jf.kl_hessian(sequence)(params, x, LENGTHS, **known).as_matrix(),
            "padded": (made.as_matrix(), jf.kronecker(made).trace()),
            "drawn": (draw().as_matrix(), draw(**known).as_matrix()),
            "kl": jf.kl(sequence)(params, moved, x, LENGTHS, **known),
            "step": step(params, state, x, LENGTHS, y, **known),
            "natural": jf.natural_grad(log_prob, jf.exact_fisher(sequence), damping=0.1)(params, x, LENGTHS, y, **known),
        }

    assert "mean over the counts of 4" in repr(jf.implicit_fisher(sequence, batch_size=2)(params, x, LENGTHS, **known))
    seen = evaluated(views, params, x, np.concatenate([x, x[:2]]), y)
    for matrix in seen["exact"]:
        assert_close(matrix, dense, factor=1e3)
    assert_close(flat(seen["implicit"]), dense @ flat(v), factor=1e3)
    assert_close(seen["kl hessian"], dense, factor=1e4)
    matrix, trace = seen["padded"]
    assert_close(matrix, dense, factor=1e3)
    np.testing.assert_allclose(trace, np.trace(dense), rtol=1e-10)
    over_sequences, over_tokens = seen["drawn"]
    assert_close(over_tokens, over_sequences * len(LENGTHS) / TOKENS, factor=1e3)
    p, q = (scipy.special.log_softmax(np.tanh(x @ each["w"]) @ each["v"], -1) for each in (params, moved))
    kept = np.arange(4)[None] < LENGTHS[:, None]
    divergence = np.sum(np.where(kept, np.sum(np.exp(p) * (p - q), -1), 0)) / TOKENS
    assert_close(seen["kl"], divergence, factor=1e4)
    new, _, loss = seen["step"]
    loss_of = lambda params: jnp.sum(token_losses(params, x, y)) / TOKENS  # noqa: E731
    plain, gradient = evaluated(jax.value_and_grad(loss_of), params)
    assert_close(loss, plain)
    expected = np.linalg.solve(dense + 0.1 * np.eye(len(dense)), flat(gradient))
    assert_close(flat(new), flat(params) - expected, factor=1e4)
    assert_close(flat(seen["natural"]), expected, factor=1e4)


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
    scores = jf.scores(jf.log_likelihood(sequence))

    def views(params, x, y):
        S = scores(params, x, LENGTHS, y, counts=LENGTHS)
        plain = scores(params, x, LENGTHS, y)
        return plain.as_matrix(), S.as_matrix(), S.diagonal(), jf.fisher_from_scores(S).as_matrix()

    rows, matrix, diagonal, fisher = evaluated(views, params, x, y)
    assert_close(matrix, rows)
    assert_close(flat(diagonal), np.sum(rows**2, 0) / TOKENS, factor=1e3)
    assert_close(fisher, rows.T @ rows / TOKENS, factor=1e3)


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
