"""One small regression problem of each kind, and its dense float64 answers written without the library's engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from programs.evaluate import traced

import jaxfisher as jf

N, INPUTS, HIDDEN, CLASSES = 7, 3, 4, 3


def drawn_once(draw):
    """Cache the results of a function that draws numbers for the whole process, since each module frees its programs."""
    known = {}

    @functools.wraps(draw)
    def call(key, *args, **kwargs):
        asked = (np.asarray(jax.random.key_data(key)).tobytes(), args, tuple(sorted(kwargs.items())))
        if asked not in known:
            known[asked] = draw(key, *args, **kwargs)
        return jax.tree.map(lambda leaf: leaf, known[asked])  # new containers, which a test may change

    return call


@drawn_once
def mlp_params(key, dtype=jnp.float64):
    """A two-layer network's parameters. In the pytree, b comes before w."""
    keys = jax.random.split(key, 2)
    return {
        "hidden": {
            "w": jax.random.normal(keys[0], (INPUTS, HIDDEN), dtype),
            "b": jnp.linspace(-0.5, 0.5, HIDDEN, dtype=dtype),
        },
        "out": [jax.random.normal(keys[1], (HIDDEN, CLASSES), dtype), jnp.zeros((CLASSES,), dtype)],
    }


def classifier(params, x):
    """A softmax classifier with one tanh layer."""
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    w, b = params["out"]
    return jf.Categorical(logits=hidden @ w + b)


def mean_loss(params, x, y):
    """The classifier's mean negative log-likelihood, by JAX alone."""
    log_prob = jf.log_likelihood(classifier)
    return -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))


@drawn_once
def data(key, n=N, dtype=jnp.float64):
    """Inputs ``[n, INPUTS]`` and class labels ``[n]``."""
    keys = jax.random.split(key, 2)
    return jax.random.normal(keys[0], (n, INPUTS), dtype), jax.random.randint(keys[1], (n,), 0, CLASSES)


@functools.lru_cache(maxsize=8)
def gradient_of(log_prob):
    """The gradient of a log-density, as one program that all tests share."""
    return traced(jax.grad(log_prob))


def loop_scores(log_prob, params, *examples):
    """The scores by a Python loop of `jax.grad`, one example at a time: rows ``[n, p]`` in NumPy float64."""
    gradient = gradient_of(log_prob)
    n = len(jax.tree.leaves(examples)[0])
    examples = jax.tree.map(np.asarray, examples)
    rows = [flat(gradient(params, *jax.tree.map(lambda leaf, i=i: leaf[i], examples))) for i in range(n)]
    return np.stack(rows).astype(np.float64)


@functools.lru_cache(maxsize=8)
def batched(log_prob):
    """The log-density of each example, as one program that all tests share."""
    return traced(jax.vmap(log_prob, (None, 0, 0)))


def class_sum_fisher(params, x, weights=None):
    """The exact Fisher of `classifier` by its definition: a loop over examples and a dense sum over classes."""
    log_prob = jf.log_likelihood(classifier)
    log_probs = batched(log_prob)
    weights = np.full(len(x), 1 / len(x)) if weights is None else np.asarray(weights) / np.sum(weights)
    total = 0
    for c in range(CLASSES):
        labels = np.full(len(x), c)
        scores = loop_scores(log_prob, params, x, labels)
        probability = np.exp(np.asarray(log_probs(params, x, labels), np.float64))
        total = total + scores.T @ ((weights * probability)[:, None] * scores)
    return total


@functools.cache
def reference():
    """The problem every operator test shares: ``(params, x, y, weights, scores)``."""
    key = jax.random.key(7)
    params = mlp_params(key)
    x, y = data(jax.random.key(8))
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 0.25])
    return params, x, y, weights, loop_scores(jf.log_likelihood(classifier), params, x, y)


def flat(tree):
    """A pytree as one NumPy vector in `ravel_pytree` order. JAX would compile a program for each shape."""
    leaves = [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def assert_close(actual, expected, factor=200, eps=None):
    """Within ``factor * eps`` of the largest expected entry."""
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    eps = np.finfo(actual.dtype).eps if eps is None else eps
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=factor * eps * scale)
