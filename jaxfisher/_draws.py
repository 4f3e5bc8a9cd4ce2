"""Random keys for the targets that are drawn at every step of training, one for each example, with little code to compile.

A threefry draw takes two hundred instructions of a compiled program. On a CPU it takes 2 to 30 times as long to compile as a
draw by a hash; the factor depends on what is drawn. Targets need uniform and independent numbers, and no adversary looks at
them. Here each number is a hash of the key's two words and of its place: rounds of xor, shift and multiplication by odd
constants. Each round is one to one, and after them each bit of the result depends on each bit of the input.

Reference: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014), for numbers as hashes of their
places; Mulvey, Hash functions (2012), for the avalanche criterion; Wellons, Prospecting for hash functions (2018), for the two
constants, found by a search with that criterion: their bias is 0.17 of what 32 bits allow at best.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jaxtyping import Array, PRNGKeyArray, UInt32

Words = UInt32[Array, "..."]
GOLDEN, SPLIT, FOLD = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77), np.uint32(0xC2B2AE3D)


def _mixed(h: Words) -> Words:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def _hashes(key: UInt32[Array, "2"], purpose: np.uint32, count: int) -> UInt32[Array, " count"]:
    """``count`` numbers of a key; other ones for each purpose."""
    of_key = _mixed(_mixed(key[0] ^ purpose) + key[1])
    return _mixed(jnp.arange(count, dtype=jnp.uint32) * GOLDEN + of_key)


def _seed(seed: Array) -> UInt32[Array, "2"]:
    return jnp.stack([jnp.zeros((), jnp.uint32), seed.astype(jnp.uint32)])


def _random_bits(key: UInt32[Array, "2"], width: int, shape: tuple[int, ...]) -> Array:
    words = -(-width // 32)
    bits = _hashes(key, np.uint32(0), words * math.prod(shape)).reshape(*shape, words)
    if words == 1:
        return bits[..., 0].astype(f"uint{width}")
    wide = bits.astype(jnp.uint64)
    return (wide[..., 0] << np.uint64(32)) | wide[..., 1]


def _split(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "... 2"]:
    return _hashes(key, SPLIT, 2 * math.prod(shape)).reshape(*shape, 2)


def _fold_in(key: UInt32[Array, "2"], number: Any) -> UInt32[Array, "2"]:
    folded = jnp.stack([key[0], _mixed(key[1] ^ FOLD) + _mixed(number.astype(jnp.uint32))])
    return _hashes(folded, FOLD, 2)


_IMPL: Any = define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name="jaxfisher_hash", tag="hash"
)


def draw_keys(seed: Any, count: Array, examples: int, *, hashed: bool) -> PRNGKeyArray:
    """A key for each example of a step: its first word says which step of which seed it is, its second which example.

    They are keys of this module if ``hashed``, threefry keys otherwise. For both, keys that differ in any bit give independent
    numbers, so no key has to be derived from another one.
    """
    high, low = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    # Multiplied by odd constants, so that the steps of one seed are not those of the next seed.
    step = low * GOLDEN + high * SPLIT + count.astype(jnp.uint32)
    words = jnp.stack([jnp.broadcast_to(step, examples), jnp.arange(examples, dtype=jnp.uint32)], 1)
    return jax.random.wrap_key_data(words, impl=_IMPL if hashed else "threefry2x32")
