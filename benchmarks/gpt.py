"""The next byte of the source of Python's standard library, by a GPT: four blocks of width 128, 128 bytes, tied embedding."""

from __future__ import annotations

import itertools
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from task import Task, dense, of_loss, split

import jaxfisher as jf

WIDTH, HEADS, DEPTH, CONTEXT, BYTES = 128, 4, 4, 128, 256
ENOUGH = 2_000_000
"""The most bytes of text: the first modules of the standard library in alphabetical order."""


def source(context: int = CONTEXT) -> np.ndarray:
    """Windows of text, each with the byte after it; they vary a little with the version of Python."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sizes = itertools.accumulate(file.stat().st_size for file in files)
    enough = [file for file, size in zip(files, sizes, strict=True) if size < ENOUGH]
    text = np.frombuffer(b"".join(file.read_bytes() for file in enough), np.uint8).astype(np.int32)
    return text[: len(text) // (context + 1) * (context + 1)].reshape(-1, context + 1)


def init(key: jax.Array, width: int = WIDTH, depth: int = DEPTH, context: int = CONTEXT) -> dict[str, Any]:
    """The parameters. Embeddings have standard deviation 0.02; layers that add to the residual stream shrink with the depth."""

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}

    def block(key: jax.Array) -> dict[str, Any]:
        qkv, mix, mlp = jax.random.split(key, 3)
        layers = {
            "qkv": dense(qkv, width, 3 * width),
            "mix": dense(mix, width, width),
            "mlp": dense(mlp, width, 4 * width, width),
        }
        for added in (layers["mix"][-1], layers["mlp"][-1]):
            added["w"] = added["w"] / (2 * depth) ** 0.5
        return layers | {"norms": [norm(), norm()]}

    symbols, places, *keys = jax.random.split(key, 2 + depth)
    return {
        "symbols": 0.02 * jax.random.normal(symbols, (BYTES, width)),
        "places": 0.02 * jax.random.normal(places, (context, width)),
        "blocks": [block(k) for k in keys],
        "norm": norm(),
    }


def gpt(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits of the next byte at each position, from the bytes up to it."""
    h = params["symbols"][x] + params["places"][: x.shape[-1]]
    for block in params["blocks"]:
        h = h + attention(block, normalised(h, block["norms"][0]))
        h = h + linear(block["mlp"][1], jax.nn.gelu(linear(block["mlp"][0], normalised(h, block["norms"][1]))))
    return normalised(h, params["norm"]) @ params["symbols"].T


def attention(block: dict[str, Any], h: jax.Array) -> jax.Array:
    """Causal attention: each position attends to those up to it."""
    length, size = h.shape[-2], h.shape[-1] // HEADS
    heads = linear(block["qkv"][0], h).reshape(*h.shape[:-1], 3, HEADS, size)
    q, k, v = (heads[..., i, :, :] for i in range(3))
    scores = jnp.einsum("...thd,...shd->...hts", q, k) * size**-0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf))
    return linear(block["mix"][0], jnp.einsum("...hts,...shd->...thd", weights, v).reshape(h.shape))


def linear(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer with a weight and a bias."""
    return x @ layer["w"] + layer["b"]


def normalised(h: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
    """Layer norm."""
    h = h - jnp.mean(h, -1, keepdims=True)
    return norm["scale"] * h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-5) + norm["shift"]


def byte_gpt() -> Task:
    """The task. The loss is in nats per window, which is 128 times that per byte."""
    windows = source()
    train, test = split(windows[:, :-1], windows[:, 1:], 16)
    watched = (train[0][:8], train[1][:8])
    score = of_loss("test bits a byte", 1 / (CONTEXT * np.log(2)), lambda p, x: jf.Categorical(gpt(p, x)))
    return Task(
        "byte-level GPT", gpt, jf.Categorical, init, train, test, watched, score, 4, 3.0 * CONTEXT, 80,
        rates=(3e-4, 1e-3, 3e-3, 1e-2), seeds=1, lean=True,
    )  # fmt: skip
