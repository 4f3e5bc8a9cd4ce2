"""A model, a log-density and a Fisher function, as classes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxfisher as jf
from theirs.family import Rayleigh


@dataclasses.dataclass(frozen=True)
class Wind(jf.Model):
    """The speed of the wind as a function of features of the day."""

    floor: float = -1.0

    def __call__(self, params: Any, /, *inputs: Any) -> jf.Distribution:
        (x,) = inputs
        return Rayleigh(self.floor + jnp.tanh(x @ params["w"]) + params["b"])


@dataclasses.dataclass(frozen=True)
class WindSpeed(jf.LogProb):
    """The log-density of that model, written out."""

    floor: float = -1.0

    def __call__(self, params: Any, /, *example: Any) -> jax.Array:
        *inputs, speed = example
        return Wind(self.floor)(params, *inputs).log_prob(speed)


@dataclasses.dataclass(frozen=True)
class Mixed(jf.FisherFunction):
    """The mean of the exact and the empirical Fisher of all the data."""

    model: jf.Model

    def __call__(self, params: Any, /, *data: Any, weights: Any = None) -> jf.Operator:
        exact = jf.exact_fisher(self.model)(params, *data[:-1], weights=weights)
        return 0.5 * exact + 0.5 * jf.empirical_fisher(jf.log_likelihood(self.model))(params, *data, weights=weights)
