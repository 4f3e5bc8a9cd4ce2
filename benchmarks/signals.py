"""MNIST-1D: signals of forty numbers in ten classes, by an MLP, a CNN and a GRU of the sizes that the authors publish.

Greydanus and Kobak (ICML 2024, arXiv 2011.14439). Their table has test accuracies of 68 %, 94 % and 91 %. The data come from
the generator of their package `mnist1d`, with its defaults, which needs no network connection.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from task import Arrays, Task, accuracy, dense

import jaxfisher as jf

LENGTH, CLASSES = 40, 10
CHANNELS, HIDDEN = 25, 6


@functools.cache
def data() -> tuple[Arrays, Arrays]:
    """4000 signals for training, and 1000 held out."""
    try:
        made = importlib.import_module("mnist1d.data").make_dataset()
    except ImportError as error:
        raise SystemExit("MNIST-1D is made by a package: pip install mnist1d") from error
    train, test = (
        (jnp.asarray(made["x" + part].astype(np.float32)), jnp.asarray(made["y" + part].astype(np.int32)))
        for part in ("", "_test")
    )
    return train, test


def perceptron(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The outputs of dense layers with ReLU in between."""
    *hidden, last = layers
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def convolution_params(key: jax.Array) -> dict[str, Any]:
    """Parameters of three convolutions of 25 channels, of widths 5, 3 and 3 and stride two, and of a dense layer."""
    *keys, last = jax.random.split(key, 4)
    shapes = [(5, 1, CHANNELS), (3, CHANNELS, CHANNELS), (3, CHANNELS, CHANNELS)]
    conv = [
        {"w": jax.random.normal(k, shape) * (2 / (shape[0] * shape[1])) ** 0.5, "b": jnp.zeros(CHANNELS)}
        for k, shape in zip(keys, shapes, strict=True)
    ]
    return {"conv": conv, "out": dense(last, 5 * CHANNELS, CLASSES)}


def convolutions(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Convolutions with ReLU after each, then the dense layer."""
    h = x.reshape(-1, LENGTH, 1)
    for layer in params["conv"]:
        h = jax.lax.conv_general_dilated(h, layer["w"], (2,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC"))
        h = jax.nn.relu(h + layer["b"])
    return perceptron(params["out"], h.reshape(*x.shape[:-1], -1))


def recurrent_params(key: jax.Array) -> dict[str, Any]:
    """Parameters of a GRU of six units in each direction, and of a dense layer on the states of both at all positions."""
    *keys, last = jax.random.split(key, 5)
    uniform = lambda k, *shape: jax.random.uniform(k, shape, minval=-(HIDDEN**-0.5), maxval=HIDDEN**-0.5)  # noqa: E731
    unit = lambda a, b: {  # noqa: E731
        "in": {"w": uniform(a, 1, 3 * HIDDEN), "b": jnp.zeros(3 * HIDDEN)},
        "state": {"w": uniform(b, HIDDEN, 3 * HIDDEN), "b": jnp.zeros(3 * HIDDEN)},
    }
    return {"units": [unit(*keys[:2]), unit(*keys[2:])], "out": dense(last, LENGTH * 2 * HIDDEN, CLASSES)}


def recurrent(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The GRU of Cho et al. (2014), with the reset gate after the product with the state, as in cuDNN."""
    read = jnp.concatenate([along(unit, jnp.moveaxis(x, -1, 0), bool(k)) for k, unit in enumerate(params["units"])], axis=-1)
    return perceptron(params["out"], jnp.moveaxis(read, 0, -2).reshape(*x.shape[:-1], -1))


def along(unit: dict[str, Any], signal: jax.Array, reverse: bool) -> jax.Array:
    """The states at all positions, in one direction."""

    def step(h: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        given, kept = (
            jnp.split(v @ unit[name]["w"] + unit[name]["b"], 3, -1) for name, v in (("in", z[..., None]), ("state", h))
        )
        reset, update = (jax.nn.sigmoid(given[k] + kept[k]) for k in range(2))
        h = update * h + (1 - update) * jnp.tanh(given[2] + reset * kept[2])
        return h, h

    return jax.lax.scan(step, jnp.zeros((*signal.shape[1:], HIDDEN)), signal, reverse=reverse)[1]


def task(name: str, forward: Callable[[Any, jax.Array], jax.Array], init: Callable[[jax.Array], Any], target: float) -> Task:
    """One of the three tasks."""
    train, test = data()
    watched = (train[0][:1024], train[1][:1024])
    return Task(
        f"MNIST-1D {name}", forward, jf.Categorical, init, train, test, watched, accuracy(forward), 256, target, 200,
        rates=(3e-3, 1e-2, 3e-2, 1e-1), seeds=1, lean=True,
    )  # fmt: skip


def mnist1d_mlp() -> Task:
    """MNIST-1D by two hidden layers of 100 units."""
    return task("MLP", perceptron, lambda k: dense(k, LENGTH, 100, 100, CLASSES), 0.6)


def mnist1d_cnn() -> Task:
    """MNIST-1D by three convolutions."""
    return task("CNN", convolutions, convolution_params, 0.6)


def mnist1d_gru() -> Task:
    """MNIST-1D by a GRU in both directions."""
    return task("GRU", recurrent, recurrent_params, 1.2)
