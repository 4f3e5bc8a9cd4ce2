"""Options of `training_step`: the user's own loss, auxiliary outputs, and a key for each example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, reference
from problems import mean_loss as nll
from programs.evaluate import evaluated, traced

import jaxfisher as jf

P = 31
LOG_PROB = jf.log_likelihood(classifier)


def stepped(opt, *args, data, params=None, **options):
    """The parameters after a first step, and the value that it returned."""
    given = {name: options.pop(name) for name in ("weights", "key") if name in options}
    params = reference()[0] if params is None else params
    step = jf.training_step(*args[:1], opt, *args[1:], **options)

    def run(params, data, given):
        new, _, value = step(params, step.init(params, *data, **given), *data, **given)
        return new, value

    return evaluated(run, params, data, given)


# --- the user's own loss ---------------------------------------------------------------------------------------------------

STRENGTH = 0.3


def test_a_penalty_on_leaving_an_earlier_task():
    """Elastic weight consolidation: the penalty is part of the loss, and its curvature an operator added to the Fisher."""
    params, x, y, _, rows = reference()
    earlier = jax.tree.map(lambda leaf: 0.9 * np.asarray(leaf) + 0.1, params)
    old = evaluated(lambda params: jf.diagonal(jf.exact_fisher(classifier)(params, x[:3])), earlier)

    def loss(params, x, known):
        away = jax.tree.map(jnp.subtract, params, known["earlier"])
        return nll(params, x, known["y"]) + 0.5 * STRENGTH * known["old"].quadratic(away)

    def fisher(params, x):
        return jf.exact_fisher(classifier)(params, x) + STRENGTH * old

    data = (x, {"y": y, "earlier": earlier, "old": old})
    new, value = stepped(jf.natural_gradient(1.0, 0.1), classifier, fisher, data=data, loss=loss)
    diagonal, away = np.diag(class_sum_fisher(earlier, x[:3])), flat(params) - flat(earlier)
    dense = class_sum_fisher(params, x) + STRENGTH * np.diag(diagonal)
    gradient = -rows.mean(0) + STRENGTH * diagonal * away
    assert_close(value, evaluated(nll, params, x, y) + 0.5 * STRENGTH * away @ (diagonal * away))
    assert_close(flat(new), flat(params) - np.linalg.solve(dense + 0.1 * np.eye(P), gradient), factor=1e4)
    new, _ = stepped(jf.kfac(), classifier, fisher, data=data, loss=loss)
    assert evaluated(loss, new, *data) < value


def test_a_surrogate_with_advantages_inside_a_kl_ball():
    """The gradient is that of the surrogate; curvature and divergence are those of the policy, and only they use weights."""
    params, x, y, weights, rows = reference()
    advantage = np.cos(np.arange(7.0))
    old = evaluated(jax.vmap(LOG_PROB, (None, 0, 0)), params, x, y)

    def surrogate(new, seen, rest):
        ratio = jnp.exp(jax.vmap(LOG_PROB, (None, 0, 0))(new, seen, rest["action"]) - rest["old"])
        return -jnp.mean(ratio * rest["advantage"])

    data = (x, {"action": y, "old": old, "advantage": advantage})
    new, value = stepped(jf.natural_gradient(1.0, 0.1), classifier, data=data, loss=surrogate, weights=weights)
    omega = np.asarray(weights) / np.sum(weights)
    gradient = -np.asarray(advantage) @ rows / 7
    step = np.linalg.solve(class_sum_fisher(params, x, omega) + 0.1 * np.eye(P), gradient)
    assert_close(value, -np.mean(advantage))
    assert_close(flat(new), flat(params) - step, factor=1e4)
    opt = optax.chain(jf.natural_gradient(1.0, 1e-3, radius=0.01), jf.backtrack_kl(0.01))
    new, _ = stepped(opt, classifier, data=data, loss=surrogate)
    divergence, lower = evaluated(lambda new: (jf.kl(classifier)(params, new, x), surrogate(new, *data)), new)
    assert 1e-3 < divergence <= 0.01 and lower < value


def test_two_data_sets_of_different_lengths():
    """The user's own Fisher function gets both data sets. The model's Fisher, which could use only one, is not computed."""
    params, x, y, *_ = reference()
    inputs = (x[:4], x[4:])

    def loss(params, both, labels):
        return sum(nll(params, *part) for part in zip(both, labels, strict=True))

    def fisher(params, both):
        return sum(
            (jf.exact_fisher(classifier)(params, part) for part in both[1:]), jf.exact_fisher(classifier)(params, both[0])
        )

    new, value = stepped(jf.natural_gradient(1.0, 0.1), classifier, fisher, data=(inputs, (y[:4], y[4:])), loss=loss)
    dense = sum(class_sum_fisher(params, part) for part in inputs)
    expected, gradient = evaluated(jax.value_and_grad(loss), params, inputs, (y[:4], y[4:]))
    assert_close(value, expected)
    assert_close(flat(new), flat(params) - np.linalg.solve(dense + 0.1 * np.eye(P), flat(gradient)), factor=1e4)


# --- auxiliary outputs -----------------------------------------------------------------------------------------------------


def with_aux(params, x):
    p = classifier(params, x)
    return p, {"logits": p.logits, "norm": jnp.sum(jnp.square(x))}


def test_what_comes_along_is_stacked_and_costs_no_curvature():
    """Auxiliary outputs are stacked and change no step, for any optimiser, nor the factors that the engine holds."""
    params, x, y, *_ = reference()
    for opt in (jf.kfac(), optax.chain(jf.natural_gradient(1.0, 0.1), jf.backtrack_kl(0.1))):
        plain, value = stepped(opt, classifier, data=(x, y))
        new, (same, aux) = stepped(opt, with_aux, data=(x, y), has_aux=True)
        np.testing.assert_allclose([same, *flat(new)], [value, *flat(plain)], rtol=1e-12)
        assert_close(aux["logits"], evaluated(jax.vmap(lambda x: classifier(params, x).logits), x))
        assert_close(aux["norm"], np.sum(np.square(x), 1))
    explained = [str(jf.explain(model)(params, x)) for model in (classifier, lambda p, x: with_aux(p, x)[0])]
    assert explained[0] == explained[1]


def test_a_loss_of_one_s_own_has_its_own_aux():
    params, x, y, *_ = reference()
    loss = lambda p, x, y: (nll(p, x, y), jnp.arange(3))  # noqa: E731
    new, (value, aux) = stepped(jf.kfac(), classifier, data=(x, y), loss=loss, has_aux=True)
    np.testing.assert_array_equal(aux, [0, 1, 2])
    assert_close(value, evaluated(nll, params, x, y))
    assert_close(flat(new), flat(stepped(jf.kfac(), classifier, data=(x, y))[0]), factor=1e4)
    with pytest.raises(TypeError, match=r"no loss of your own.*the distribution alone, lambda params, x: model"):
        stepped(jf.kfac(), with_aux, data=(x, y), loss=loss, has_aux=True)


# --- a key for each example ------------------------------------------------------------------------------------------------


def dropout(params, x, key):
    """The classifier with dropout: half of the hidden units are kept."""
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    w, b = params["out"]
    return jf.Categorical(logits=(2 * hidden * jax.random.bernoulli(key, 0.5, hidden.shape).astype(hidden.dtype)) @ w + b)


def by_hand(params, x, y, keys):
    """The mean loss, its gradient and the Fisher, by a loop over examples and classes."""
    log_prob = lambda p, x, key, c: jax.nn.log_softmax(dropout(p, x, key).logits)[c]  # noqa: E731
    both = traced(jax.value_and_grad(log_prob))
    value, gradient, fisher = 0.0, 0.0, 0.0
    for i in range(len(x)):
        for c in range(3):
            found, score = both(params, x[i], keys[i], c)
            fisher = fisher + np.exp(float(found)) * np.outer(flat(score), flat(score)) / len(x)
            if c == y[i]:
                value, gradient = value - float(found) / len(x), gradient - flat(score) / len(x)
    return value, gradient, fisher


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_example_has_its_key_the_same_everywhere_in_a_step(impl):
    params, x, y, *_ = reference()
    key = jax.random.key(5, impl=impl)
    threefry = key
    if impl == "rbg":  # as in `jaxfisher.sampled_fisher`
        words = jax.random.key_data(key)
        threefry = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        for word in words[2:]:
            threefry = jax.random.fold_in(threefry, word)
    keys = [jax.random.fold_in(threefry, i) for i in range(len(x))]
    value, gradient, dense = by_hand(params, x, y, keys)
    expected = flat(params) - np.linalg.solve(dense + 0.1 * np.eye(P), gradient)
    in_pieces = jf.exact_fisher(dropout, batch_size=3)
    of_data = lambda params, x, keys: jf.exact_fisher(dropout)(params, x, keys)  # noqa: E731
    for fisher in (None, in_pieces, of_data):
        new, loss = stepped(jf.natural_gradient(1.0, 0.1), dropout, fisher, data=(x, y), key=key)
        assert_close(loss, value)
        assert_close(flat(new), expected, factor=1e4)


def test_keys_reach_a_loss_of_one_s_own_and_a_running_mean():
    _, x, y, *_ = reference()
    key = jax.random.key(5)

    def loss(params, x, keys, y):
        return -jnp.mean(jax.vmap(jf.log_likelihood(dropout), (None, 0, 0, 0))(params, x, keys, y))

    own = stepped(jf.kfac(), dropout, data=(x, y), loss=loss, key=key)
    usual = stepped(jf.kfac(), dropout, data=(x, y), key=key)
    other = stepped(jf.kfac(), dropout, data=(x, y), key=jax.random.key(6))
    np.testing.assert_allclose(flat(own), flat(usual), rtol=1e-10)
    assert abs(usual[1] - other[1]) > 1e-3


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "error", "words"),
    [
        ({"loss": 3.0}, {}, TypeError, "`loss` is 3.0; expected a function"),
        ({"loss": lambda p, x, y: x}, {}, TypeError, "`loss` returned .*expected one real floating number"),
        ({"loss": lambda p, x, y: (jnp.sum(x), y)}, {}, TypeError, "`loss` returned a tuple.*has_aux=True"),
        ({"has_aux": 1}, {}, TypeError, "`has_aux` is 1; expected True or False"),
        ({"has_aux": True}, {}, TypeError, r"`model` returned a Categorical with has_aux=True; expected a pair"),
        ({"has_aux": True, "loss": lambda p, x, y: jnp.sum(x)}, {}, TypeError, r"`loss` returned .* expected a pair"),
        ({}, {"key": 3}, TypeError, "`key` is 3; expected one random key"),
        ({}, {"key": jax.random.key(0)}, TypeError, "takes what its model does.*key="),
    ],
)
def test_what_is_refused(options, given, error, words):
    params, x, y, *_ = reference()
    with pytest.raises(error, match=words):
        jax.eval_shape(
            lambda p: jf.training_step(classifier, optax.sgd(0.1), **options)(p, optax.EmptyState(), x, y, **given), params
        )
