"""Predictions under uncertain parameters: a distribution's output field, and the distribution with it integrated out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.normal import Normal


@functools.singledispatch
def output_of(distribution: Any) -> Array:
    """The field of a distribution over which predictions in closed form integrate."""
    raise TypeError(
        f"the model returns a {type(distribution).__name__}, for which there is no prediction in closed form; expected "
        "jf.Normal, jf.MultivariateNormal, jf.Bernoulli or jf.Categorical. Take the mean over draws instead: "
        "posterior.sample_predictive(key, *inputs)."
    )


@functools.singledispatch
def integrated(distribution: Any, covariance: Float[Array, "outputs outputs"]) -> Any:
    """The distribution with its Gaussian outputs of this covariance integrated out."""
    raise NotImplementedError(type(distribution).__name__)


@output_of.register(Normal)
@output_of.register(MultivariateNormal)
def _(distribution: Any) -> Array:
    loc: Array = distribution.loc
    return loc


@output_of.register(Bernoulli)
@output_of.register(Categorical)
def _(distribution: Any) -> Array:
    logits: Array = distribution.logits
    return logits


@integrated.register
def _(distribution: Normal, covariance: Array) -> Normal:
    variance = jnp.diagonal(covariance).reshape(distribution.loc.shape)
    return Normal(distribution.loc, jnp.sqrt(jnp.square(distribution.scale) + variance))


@integrated.register
def _(distribution: MultivariateNormal, covariance: Array) -> MultivariateNormal:
    *batch, size = distribution.loc.shape
    count = math.prod(batch)
    blocks = covariance.reshape(count, size, count, size)[jnp.arange(count), :, jnp.arange(count)]
    spread = blocks.reshape(*batch, size, size)
    return MultivariateNormal(distribution.loc, covariance=distribution.covariance + spread)


@integrated.register(Bernoulli)
@integrated.register(Categorical)
def _(distribution: Any, covariance: Array) -> Any:
    variance = jnp.diagonal(covariance).reshape(distribution.logits.shape)
    return type(distribution)(logits=distribution.logits / jnp.sqrt(1 + math.pi / 8 * variance))


def free(distribution: Distribution) -> Distribution:
    """The distribution with the logarithms of its positive fields, as a pytree of unconstrained coordinates."""
    return _in_positive(jnp.log, distribution)


def bound(coordinates: Distribution) -> Distribution:
    """The distribution with these coordinates: the inverse of `free`."""
    return _in_positive(jnp.exp, coordinates)


def _in_positive(function: Callable[[Array], Array], distribution: Distribution) -> Distribution:
    if not distribution.positive:
        return distribution
    names = [field.name for field in dataclasses.fields(distribution)]  # type: ignore[arg-type]
    ndims = dict(zip(names, distribution.field_ndims, strict=True))

    def changed(path: Any, leaf: Array) -> Array:
        name = getattr(path[0], "name", None)
        if name not in distribution.positive:
            return leaf
        # In a matrix only the diagonal is positive.
        inside = jnp.eye(leaf.shape[-1], dtype=bool) if ndims[name] == 2 else jnp.ones((), bool)
        return jnp.where(inside, function(jnp.where(inside, leaf, 1)), leaf)

    made: Distribution = jax.tree_util.tree_map_with_path(changed, distribution)
    return made
