"""A distribution."""

import math

import jax
import jax.numpy as jnp

import jaxfisher as jf


@jf.family
class Rayleigh(jf.Distribution):
    """The length of a vector of two normal variables of mean zero and deviation ``exp(log_scale)``."""

    log_scale: jax.Array

    field_ndims = (0,)
    event_ndim = 0

    @property
    def mean(self):
        return math.sqrt(math.pi / 2) * jnp.exp(self.log_scale)

    @property
    def variance(self):
        return (2 - math.pi / 2) * jnp.exp(2 * self.log_scale)

    @property
    def mode(self):
        return jnp.exp(self.log_scale)

    def entropy(self):
        return 1 + self.log_scale - 0.5 * math.log(2) + 0.5 * 0.5772156649015329

    def log_prob(self, x):
        inside = jnp.where(x > 0, x, 1)
        log_prob = jnp.log(inside) - 2 * self.log_scale - 0.5 * jnp.square(inside * jnp.exp(-self.log_scale))
        return jnp.where(x > 0, log_prob, -jnp.inf)

    def sample(self, key, shape=()):
        squares = 2 * jax.random.exponential(key, shape + self.batch_shape, self.log_scale.dtype)
        return jnp.sqrt(squares) * jnp.exp(self.log_scale)

    def kl(self, other):
        twice = 2 * (self.log_scale - other.log_scale)
        return jnp.expm1(twice) - twice

    def fisher_sqrt_mv(self, u):
        return jax.tree.map(lambda of_field: 2 * of_field, u)  # the Fisher in the log-scale is 4
