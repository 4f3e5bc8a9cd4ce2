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


def working_dtype(dtype: DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 if it is narrower: for special functions, triangular solves and uniform noise."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)
