"""Quotients that keep their digits, and their derivatives, at the ends of the floating-point range."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


@jax.custom_jvp
def ratio(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x / y`` with a derivative in ``y`` that never forms ``y^2`` or ``y^-2``.

    JAX differentiates ``x / y`` as ``-x y^-2``. In float32 at ``y = 1e-20`` the power overflows, and ``x = 0`` gives NaN.
    Two divisions in a row would not help, since XLA merges ``x / y / y`` into ``x / (y y)``; it does not merge products with
    ``1 / y``.
    """
    return x / y


@ratio.defjvp
def _ratio_jvp(
    primals: tuple[Float[Array, "*shape"], Float[Array, "*shape"]],
    tangents: tuple[Float[Array, "*shape"], Float[Array, "*shape"]],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    x, y = primals
    dx, dy = tangents
    quotient, inverse = ratio(x, y), ratio(jnp.ones_like(y), y)
    return quotient, dx * inverse - quotient * (dy * inverse)


@jax.custom_jvp
def log(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``log x`` with a second derivative that never forms ``x^-2``, which overflows in float32 at ``x = 1e-20``."""
    return jnp.log(x)


@log.defjvp
def _log_jvp(
    primals: tuple[Float[Array, "*shape"]], tangents: tuple[Float[Array, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    ((x,), (dx,)) = primals, tangents
    # A quotient by x would be transposed to a plain one.
    return log(x), dx * ratio(jnp.ones_like(x), x)


@jax.custom_jvp
def log_ratio_of(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``log(x/y)``, finite also where the quotient leaves the range, with slopes ``1/x`` and ``-1/y`` that never form it."""
    quotient = x / y
    fits = (quotient > jnp.finfo(x.dtype).tiny) & (quotient < jnp.inf)
    return jnp.where(fits, jnp.log(jnp.where(fits, quotient, 1)), jnp.log(x) - jnp.log(y))


@log_ratio_of.defjvp
def _log_ratio_of_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    return log_ratio_of(x, y), dx * ratio(jnp.ones_like(x), x) - dy * ratio(jnp.ones_like(y), y)


@jax.custom_jvp
def sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``1 / (1 + e^-x)`` with derivatives of all orders that keep their digits where it rounds to one."""
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(
    primals: tuple[Float[Array, "*shape"]], tangents: tuple[Float[Array, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    ((x,), (dx,)) = primals, tangents
    value = sigmoid(x)
    return value, dx * (value * sigmoid(-x))


@jax.custom_jvp
def log_sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``-log(1 + e^-x)``, with derivatives like those of `sigmoid`."""
    return jax.nn.log_sigmoid(x)


@log_sigmoid.defjvp
def _log_sigmoid_jvp(
    primals: tuple[Float[Array, "*shape"]], tangents: tuple[Float[Array, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    ((x,), (dx,)) = primals, tangents
    return log_sigmoid(x), dx * sigmoid(-x)


@jax.custom_jvp
def log_softmax(z: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """``z - log sum exp z`` on the last axis, with all digits of the logarithm of a probability near one, and of its slopes."""
    return _log_softmax(z)[0]


@log_softmax.defjvp
def _log_softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    ((z,), (dz,)) = primals, tangents
    _, top, rest = _log_softmax(z)
    # Changes relative to the likely class: its own slope is then a sum over the others, and not one minus its probability.
    likely = top & jnp.broadcast_to(rest < 1, top.shape)
    change = jnp.where(likely, 0, dz - jnp.sum(jnp.where(likely, dz, 0), axis=-1, keepdims=True))
    made = log_softmax(z)
    return made, change - jnp.sum(jnp.exp(made) * change, axis=-1, keepdims=True)


def _log_softmax(z: Array) -> tuple[Array, Array, Array]:
    """The logarithms, which class is the largest (the first of several), and the odds of the others against it."""
    axis = z.ndim - 1
    classes = jax.lax.broadcasted_iota(jnp.int32, z.shape, axis)
    # NaN is the largest for `argmax`, and equals nothing.
    top = (classes == jax.lax.argmax(z, axis, jnp.int32)[..., None]) & (z == z)  # noqa: PLR0124
    below = jnp.where(top, 0, z - jnp.max(z, axis=-1, keepdims=True))
    rest = jnp.sum(jnp.where(top, 0, jnp.exp(below)), axis=-1, keepdims=True)
    return below - jnp.log1p(rest), top, rest


def working_dtype(dtype: DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 if it is narrower: for special functions, triangular solves and uniform noise."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)
