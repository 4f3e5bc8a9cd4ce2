"""A small ResNet with batch normalisation in training mode, by the recipe of docs/models.md, on handwritten digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets
from task import Metric, Task, dense, split

import jaxfisher as jf

CHANNELS = (8, 16)
"""The channels of each stage. A stage is one block of two convolutions, and every stage but the first halves the image."""
SMALLEST = 1e-3
"""The constant added to a variance."""

Statistics = list[tuple[jax.Array, jax.Array]]


def init(key: jax.Array) -> dict[str, Any]:
    """Parameters by He et al. (2015): variance two over the inputs. The normalisation has the biases."""

    def layer(key: jax.Array, size: int, inputs: int, outputs: int) -> dict[str, jax.Array]:
        w = jax.random.normal(key, (size, size, inputs, outputs)) * (2 / (size * size * inputs)) ** 0.5
        return {"w": w, "scale": jnp.ones(outputs), "shift": jnp.zeros(outputs)}

    stem, out, *keys = jax.random.split(key, 2 + len(CHANNELS))
    stages, inputs = [], CHANNELS[0]
    for k, outputs in zip(keys, CHANNELS, strict=True):
        a, b, c = jax.random.split(k, 3)
        stage = {"first": layer(a, 3, inputs, outputs), "second": layer(b, 3, outputs, outputs)}
        stages.append(stage if inputs == outputs else stage | {"across": layer(c, 1, inputs, outputs)})
        inputs = outputs
    return {"stem": layer(stem, 3, 1, CHANNELS[0]), "stages": stages, "out": dense(out, CHANNELS[-1], 10)}


def run(params: dict[str, Any], x: jax.Array, given: Statistics | None) -> tuple[jax.Array, Statistics]:
    """The logits, and the statistics used to normalise: those given, or those of the batch."""
    used: Statistics = []

    def normalised(layer: dict[str, jax.Array], h: jax.Array, stride: int = 1) -> jax.Array:
        h = jax.lax.conv_general_dilated(h, layer["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        mean, variance = (jnp.mean(h, (0, 1, 2)), jnp.var(h, (0, 1, 2))) if given is None else given[len(used)]
        used.append((mean, variance))
        return layer["scale"] * (h - mean) * jax.lax.rsqrt(variance + SMALLEST) + layer["shift"]

    h = jax.nn.relu(normalised(params["stem"], x.reshape(-1, 8, 8, 1)))
    for stage in params["stages"]:
        stride = 2 if "across" in stage else 1
        past = normalised(stage["across"], h, stride) if "across" in stage else h
        h = jax.nn.relu(normalised(stage["first"], h, stride))
        h = jax.nn.relu(past + normalised(stage["second"], h))
    out = params["out"][0]
    logits = jnp.mean(h, (1, 2)) @ out["w"] + out["b"]
    return logits.reshape(*x.shape[:-1], -1), used


def forward(params: dict[str, Any], x: jax.Array, given: Statistics | None = None) -> jax.Array:
    """The logits."""
    return run(params, x, given)[0]


def statistics(params: dict[str, Any], x: jax.Array) -> Statistics:
    """The statistics of a batch."""
    return run(params, x, None)[1]


def resnet() -> Task:
    """Five 3 x 3 convolutions and a dense layer. Held-out images are normalised by the statistics of all training images."""
    x, y = datasets.load_digits(return_X_y=True)
    train, test = split((x / 16).astype(np.float32), y.astype(np.int32), 360)

    def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = forward(params, x, statistics(params, train[0]))
        return jnp.mean((jnp.argmax(logits, -1) == y).astype(float))

    return Task(
        "digits ResNet", forward, jf.Categorical, init, train, test, (train[0][:256], train[1][:256]),
        Metric("test accuracy", accuracy), 128, 0.2, 80, statistics=statistics, rates=(3e-3, 1e-2, 3e-2, 1e-1), lean=True,
        seeds=1,
    )  # fmt: skip
