"""The training tasks on data that comes with a package, and the table of all tasks."""

from __future__ import annotations

import itertools
import pydoc_data.topics
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from curves import curves_autoencoder
from gpt import byte_gpt
from resnet import resnet
from signals import mnist1d_cnn, mnist1d_gru, mnist1d_mlp
from sklearn import datasets
from task import Task, accuracy, dense, network, of_loss, split, standard

import jaxfisher as jf

# --- networks -----------------------------------------------------------------------------------------------------------------


def conv_params(key: jax.Array) -> dict[str, Any]:
    """Parameters of two 3 x 3 convolutions, of 16 and 32 channels, and a dense layer."""
    keys = jax.random.split(key, 3)
    shapes = [(3, 3, 1, 16), (3, 3, 16, 32)]
    return {
        "conv": [
            {"w": jax.random.normal(k, shape) * np.prod(shape[:3]) ** -0.5, "b": jnp.zeros(shape[3])}
            for k, shape in zip(keys, shapes, strict=False)
        ],
        "out": dense(keys[2], 2 * 2 * 32, 10),
    }


def convolutions(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Convolutions of stride two with tanh after each, then the dense layer."""
    images = x.reshape(-1, 8, 8, 1)
    for layer in params["conv"]:
        images = jax.lax.conv_general_dilated(images, layer["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        images = jnp.tanh(images + layer["b"])
    return network(params["out"], images.reshape(*x.shape[:-1], -1))


WIDTH, HEADS, DEPTH, CONTEXT, SYMBOLS = 32, 4, 2, 32, 48


def transformer_params(key: jax.Array) -> dict[str, Any]:
    """Parameters of pre-norm blocks of attention and a network of twice the width."""

    def block(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 3)
        return {
            "qkv": dense(keys[0], WIDTH, 3 * WIDTH),
            "mix": dense(keys[1], WIDTH, WIDTH),
            "mlp": dense(keys[2], WIDTH, 2 * WIDTH, WIDTH),
            "scale": jnp.ones((2, WIDTH)),
        }

    symbols, places, out, *keys = jax.random.split(key, 3 + DEPTH)
    return {
        "symbols": jax.random.normal(symbols, (SYMBOLS, WIDTH)),
        "places": jax.random.normal(places, (CONTEXT, WIDTH)),
        "blocks": [block(k) for k in keys],
        "scale": jnp.ones(WIDTH),
        "out": dense(out, WIDTH, SYMBOLS),
    }


def transformer(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits of the next character at each position, from the characters up to it."""
    h = params["symbols"][x] + params["places"]
    causal = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
    for block in params["blocks"]:
        heads = network(block["qkv"], _normalised(h, block["scale"][0])).reshape(*h.shape[:-1], 3, HEADS, WIDTH // HEADS)
        q, k, v = (heads[..., i, :, :] for i in range(3))
        scores = jnp.einsum("...thd,...shd->...hts", q, k) * (WIDTH // HEADS) ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        h = h + network(block["mix"], jnp.einsum("...hts,...shd->...thd", weights, v).reshape(h.shape))
        h = h + network(block["mlp"], _normalised(h, block["scale"][1]))
    return network(params["out"], _normalised(h, params["scale"]))


def _normalised(h: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6)


# --- tasks --------------------------------------------------------------------------------------------------------------------


def _digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = datasets.load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def mlp() -> Task:
    """Handwritten digits, by two hidden layers of 256 units."""
    train, test = split(*_digits(), 360)
    init = lambda k: dense(k, 64, 256, 256, 10)  # noqa: E731
    return Task("digits MLP", network, jf.Categorical, init, train, test, train, accuracy(network), 256, 0.01, 300)


def cnn() -> Task:
    """Handwritten digits, by two convolutions and a dense layer."""
    train, test = split(*_digits(), 360)
    score = accuracy(convolutions)
    return Task("digits CNN", convolutions, jf.Categorical, conv_params, train, test, train, score, 256, 0.01, 300)


def autoencoder() -> Task:
    """An autoencoder of black and white digits with a code of six numbers and Bernoulli pixels."""
    (x, _), (held, _) = split(*_digits(), 360)
    x, held = ((image > 0.5).astype(jnp.float32) for image in (x, held))
    init = lambda k: dense(k, 64, 64, 32, 6, 32, 64, 64)  # noqa: E731
    score = of_loss("test loss", 1.0, lambda p, x: jf.Bernoulli(network(p, x)))
    return Task("digits autoencoder", network, jf.Bernoulli, init, (x, x), (held, held), (x, x), score, 256, 12.0, 300)


def diabetes() -> Task:
    """Heteroscedastic regression: mean and log-scale of disease progression, from ten numbers, on all of the data."""
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    train, test = split(standard(x), standard(y), 90)
    init = lambda k: dense(k, 10, 32, 2)  # noqa: E731
    normal = lambda z: jf.Normal(z[..., 0], jnp.exp(z[..., 1]))  # noqa: E731
    score = of_loss("test loss", 1.0, lambda p, x: normal(network(p, x)))
    return Task("diabetes, heteroscedastic", network, normal, init, train, test, train, score, None, 0.6, 300)


def fair() -> Task:
    """How 6366 women rate their marriage, in five classes, from eight answers: statsmodels' `fair`."""
    from statsmodels import datasets as shipped

    table = shipped.fair.load_pandas().data
    y = table.pop("rate_marriage").to_numpy().astype(np.int32) - 1
    train, test = split(standard(table.to_numpy()), y, 1274)
    init = lambda k: dense(k, 8, 64, 64, 5)  # noqa: E731
    return Task("fair survey", network, jf.Categorical, init, train, test, train, accuracy(network), 512, 1.15, 300)


def poisson() -> Task:
    """Poisson regression of visits to a doctor on nine variables, their squares and products: statsmodels' `randhie`."""
    from statsmodels import datasets as shipped

    table = shipped.randhie.load_pandas().data
    y = table.pop("mdvis").to_numpy().astype(np.float32)
    x = standard(table.to_numpy())
    # The square of an indicator is the indicator again.
    pairs = [
        x[:, i] * x[:, j] for i, j in itertools.combinations_with_replacement(range(9), 2) if i != j or len(set(x[:, i])) > 2
    ]
    train, test = split(np.column_stack([x, standard(np.column_stack(pairs))]), y, 4038)

    def rate(z: jax.Array) -> jf.Poisson:
        return jf.Poisson(jnp.exp(z[..., 0]))

    init = lambda k: jax.tree.map(jnp.zeros_like, dense(k, train[0].shape[1], 1))  # noqa: E731
    score = of_loss("test loss", 1.0, lambda p, x: rate(network(p, x)))
    return Task("randhie, Poisson", network, rate, init, train, test, train, score, None, 3.021, 300)


def text() -> Task:
    """The next character of Python's own help texts, by a transformer of two blocks; the texts vary a little with Python."""
    string = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).lower()
    common = {symbol: k for k, (symbol, _) in enumerate(Counter(string).most_common(SYMBOLS - 1))}
    codes = np.array([common.get(symbol, SYMBOLS - 1) for symbol in string], np.int32)
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    train, test = split(windows[:, :-1], windows[:, 1:], 512)
    watched = (train[0][:512], train[1][:512])
    score = of_loss("test bits a character", 1 / (CONTEXT * np.log(2)), lambda p, x: jf.Categorical(transformer(p, x)))
    target = 2.2 * CONTEXT
    return Task(
        "text, transformer", transformer, jf.Categorical, transformer_params, train, test, watched, score, 64, target, 300
    )


SMALL = (mlp, cnn, autoencoder, diabetes, fair, poisson, text)
LARGER = (curves_autoencoder, mnist1d_mlp, mnist1d_cnn, mnist1d_gru, byte_gpt, resnet)
TASKS = {made.__name__: made for made in (*SMALL, *LARGER)}
