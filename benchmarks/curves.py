"""The CURVES autoencoder: images of smooth curves through three random points, encoded in six numbers.

The data and the network follow Hinton and Salakhutdinov (Science 2006): 20,000 training images of curves generated from three
random points in two dimensions, and layers 784-400-200-100-50-25-6 and back, the six numbers linear. The initial weights follow
Martens (ICML 2010): fifteen connections into each unit, of variance one. The units are tanh, as in Martens and Grosse (ICML
2015), for which Sutskever, Martens, Dahl and Hinton (ICML 2013) take a quarter of these weights, and biases of one half. We
chose what these papers leave open: where the points may lie, that a curve is of second degree, and the width of its line.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from task import Metric, Task

import jaxfisher as jf

SIDE, TRAIN, TEST = 28, 20_000, 500
WIDTHS = (784, 400, 200, 100, 50, 25, 6)
CONNECTIONS = 15
WIDTH = 0.9
"""The standard deviation of the ink across a line, in pixels."""


@functools.partial(jax.jit, static_argnums=1)
def curves(key: jax.Array, count: int) -> jax.Array:
    """Images of ink between 0 and 1: the line integral of a Gaussian along each curve, at most one."""
    points = jax.random.uniform(key, (count, 3, 2), minval=6.0, maxval=SIDE - 6.0)
    t = jnp.linspace(0.0, 1.0, 40)[:, None]
    basis = jnp.concatenate([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], 1)
    speed = jnp.concatenate([4 * t - 3, 4 - 8 * t, 4 * t - 1], 1)
    places = jnp.einsum("tk,nkc->ntc", basis, points)
    length = jnp.linalg.norm(jnp.einsum("tk,nkc->ntc", speed, points), axis=-1) / len(t)
    across = jnp.exp(-0.5 * jnp.square((jnp.arange(SIDE) + 0.5 - places[..., None]) / WIDTH))
    ink = jnp.einsum("nt,ntx,nty->nxy", length, across[:, :, 0], across[:, :, 1]) / (WIDTH * (2 * jnp.pi) ** 0.5)
    return jnp.minimum(ink, 1.0).reshape(count, SIDE * SIDE)


def sparse(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """A layer in which each output has `CONNECTIONS` inputs on average."""
    chosen, drawn = jax.random.split(key)
    kept = jax.random.bernoulli(chosen, min(1.0, CONNECTIONS / inputs), (inputs, outputs))
    return {"w": jnp.where(kept, 0.25 * jax.random.normal(drawn, (inputs, outputs)), 0.0), "b": jnp.full(outputs, 0.5)}


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """The parameters of encoder and decoder."""
    pairs = list(itertools.pairwise(WIDTHS + WIDTHS[-2::-1]))
    return [sparse(k, *sizes) for k, sizes in zip(jax.random.split(key, len(pairs)), pairs, strict=True)]


def reconstructed(layers: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Logits of the pixels, with tanh after every layer except at the six numbers and at the end."""
    for k, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        if k not in (len(WIDTHS) - 2, len(layers) - 1):
            x = jnp.tanh(x)
    return x


def cross_entropy(logits: jax.Array, ink: jax.Array) -> jax.Array:
    """Minus the cross-entropy of each image: a Bernoulli's log-likelihood, continued to pixels between black and white."""
    return jnp.sum(ink * logits - jax.nn.softplus(logits), -1)


def curves_autoencoder() -> Task:
    """The task. The loss is the cross-entropy of the ink in nats per image, whose minimum is the entropy of the images."""
    x = curves(jax.random.key(0), TRAIN + TEST)
    train, test = x[:TRAIN], x[TRAIN:]
    watched = (train[:512],) * 2
    score = Metric("test loss", lambda p, x, y: -jnp.mean(cross_entropy(reconstructed(p, x), y)))
    return Task(
        "CURVES autoencoder", reconstructed, jf.Bernoulli, init, (train,) * 2, (test,) * 2, watched, score, 256, 80.0, 150,
        rates=(1e-3, 3e-3, 1e-2, 3e-2), log_likelihood=cross_entropy, seeds=1, lean=True,
    )  # fmt: skip
