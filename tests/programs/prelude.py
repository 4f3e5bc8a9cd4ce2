"""The names that a random program uses, and nothing else: ``from programs.prelude import *`` and it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

__all__ = ["checkpoint_name", "complex_const", "const", "functools", "ints", "jax", "jnp", "lax", "mask", "np", "promoted"]


def const(seed, *shape):
    """Fixed normal numbers."""
    return jnp.asarray(0.7 * np.random.default_rng(seed).standard_normal(shape))


def complex_const(seed, *shape):
    """Fixed complex numbers."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(0.7 * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)))


def mask(seed, *shape):
    """Fixed booleans."""
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.6)


def ints(seed, high, *shape):
    """Fixed integers from 0 to below ``high``."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape))


def promoted(*arrays):
    """Arrays cast to their common dtype."""
    dtype = jnp.result_type(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays]
