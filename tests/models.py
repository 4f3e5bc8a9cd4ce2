"""Models for tests: one head per family, on three bodies. A head maps raw real numbers to a distribution.

A body makes the raw numbers: linear and MLP from an input of two numbers, unconditional from the parameters alone. All three
use the same map from raw numbers to fields, an exponential wherever a field must be positive: no parameter has a boundary,
and a random displacement is always a valid one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.flatten_util import ravel_pytree

import jaxfisher as jf

INPUTS = jnp.array([[0.6, -0.4], [-0.9, 0.3], [0.2, 1.1]])
"""Three inputs of two numbers."""
HIDDEN = 3


@dataclasses.dataclass(frozen=True)
class Head:
    """A family and the map to its fields."""

    name: str
    predict: Callable[[Any], Any]
    """``raw [k] -> distribution``."""
    centre: tuple[float, ...]
    """Raw numbers about which the predictions of a model are spread."""
    rule: Callable[[Any], oracle.Rule]
    """Nodes and weights for expectations under a distribution, of a size that does not depend on it."""


def normal(raw):
    return jf.Normal(raw[0], jnp.exp(raw[1]))


def multivariate_normal(raw):
    tril = jnp.array([[jnp.exp(raw[2]), 0.0], [raw[3], jnp.exp(raw[4])]])
    return jf.MultivariateNormal(raw[:2], tril)


def student_t(raw):
    return jf.StudentT(jnp.exp(raw[0]), raw[1], jnp.exp(raw[2]))


# Predictions stay near enough to the centre for these numbers of outcomes to hold all but 1e-16 of the mass.
HEADS = [
    Head("Normal", normal, (0.3, 0.2), lambda p: oracle.real_line(p.loc, scale=p.scale)),
    Head(
        "MultivariateNormal",
        multivariate_normal,
        (0.3, -0.5, 0.2, 0.4, -0.1),
        lambda p: oracle.gaussian_grid(p.loc, p.scale_tril),
    ),
    Head("Bernoulli", lambda raw: jf.Bernoulli(raw[0]), (-0.7,), lambda p: oracle.outcomes(2)),
    Head("Categorical", lambda raw: jf.Categorical(raw), (0.3, -0.8, 0.5, 0.1), lambda p: oracle.outcomes(4)),
    Head("Poisson", lambda raw: jf.Poisson(raw[0]), (0.8,), lambda p: oracle.outcomes(60)),
    Head("Exponential", lambda raw: jf.Exponential(raw[0]), (0.4,), lambda p: oracle.half_line(0.0, np.exp(-p.log_rate))),
    Head("Gamma", lambda raw: jf.Gamma(*jnp.exp(raw)), (0.7, -0.2), lambda p: oracle.half_line(0.0, 1 / p.rate)),
    Head("Beta", lambda raw: jf.Beta(*jnp.exp(raw)), (0.9, 1.1), lambda p: oracle.interval(0.0, 1.0)),
    Head("Dirichlet", lambda raw: jf.Dirichlet(jnp.exp(raw)), (0.9, 1.1, 0.7), lambda p: oracle.simplex3()),
    Head(
        "Laplace",
        lambda raw: jf.Laplace(raw[0], jnp.exp(raw[1])),
        (0.3, 0.2),
        lambda p: oracle.real_line(p.loc, scale=p.scale),
    ),
    Head("StudentT", student_t, (1.2, 0.3, 0.2), lambda p: oracle.real_line(p.loc, scale=p.scale)),
    Head("NegativeBinomial", lambda raw: jf.NegativeBinomial(*raw), (0.7, -0.6), lambda p: oracle.outcomes(220)),
]


@dataclasses.dataclass(frozen=True)
class Body:
    """A function of parameters and one example that computes the raw numbers of a head, and its parameters."""

    name: str
    raw: Callable[..., Any]
    """``(params, *inputs) -> raw [k]``."""
    params: Callable[[tuple[float, ...]], Any]
    """From a centre to float64 parameters whose outputs are near it."""
    inputs: tuple[Any, ...] = (INPUTS,)

    def model(self, head):
        """The model of one example: the head on this body."""
        return lambda params, *inputs: head.predict(self.raw(params, *inputs))


def linear_raw(params, x):
    return x @ params["weight"] + params["bias"]


def mlp_raw(params, x):
    first, second = params
    return linear_raw(second, jnp.tanh(linear_raw(first, x)))


def layer(rng, width_in, bias, spread):
    """A layer with a random weight, and the given bias with a little noise."""
    bias = np.asarray(bias, float)
    return {
        "weight": jnp.asarray(spread * rng.standard_normal((width_in, bias.size))),
        "bias": jnp.asarray(bias + 0.1 * rng.standard_normal(bias.size)),
    }


def linear_params(centre):
    return layer(np.random.default_rng(1), 2, centre, 0.3)


def mlp_params(centre):
    rng = np.random.default_rng(2)
    return [layer(rng, 2, np.zeros(HIDDEN), 0.8), layer(rng, HIDDEN, centre, 0.3)]


BODIES = [
    Body("linear", linear_raw, linear_params),
    Body("MLP", mlp_raw, mlp_params),
    Body("unconditional", lambda params: params, lambda centre: jnp.asarray(centre), inputs=()),
]


def raw_rows(body, params):
    """The raw numbers of three examples, shape ``[3, k]``; three times the same if the body has no inputs."""
    return np.asarray(jax.vmap(body.raw, (None, *(0 for _ in body.inputs)), axis_size=len(INPUTS))(params, *body.inputs))


def flat_function(function, params):
    """A function of flat parameters and one example, and the flat parameters: the order of every `as_matrix`."""
    flat, unravel = ravel_pytree(params)
    return lambda flat, *inputs: function(unravel(flat), *inputs), flat


def compiled(function):
    """`jax.jit` for functions that run once, so that compiling takes most of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
