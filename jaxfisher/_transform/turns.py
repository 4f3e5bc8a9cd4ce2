r"""The schedule of `jaxfisher.kfac`: which parts of a step are due, and a period chosen by counting operations."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxfisher._operators.form import Form
from jaxfisher._operators.kronecker import Kronecker

CHECK = 3
"""The longest gap between two steps at which the quadratic model and the ratio are computed."""
FEWEST, MOST, USUAL = 4, 16, 8
"""The bounds of a counted period, and the period where the cost of the model is unknown."""
AIM = 9.0
"""The target cost of the average step, in forward passes: three steps of Adam, each of which is one gradient."""
NARROW = 1.5
"""The most that the target grows by for batches of fewer positions than the widest layer has outputs: inverses cost most."""
INVERSE = 7.0
"""The cost of an inverse, in cubes of its size, on a scale where a product of two matrices costs two.

Timed on two cores with sizes of 64, 128, 256, 512 and 1024 it is 4, 7, 9, 7 and 4: LAPACK runs at a lower rate than products,
until from 512 on products do most of the work.
"""


class Turns:
    """The turns at step ``count`` of parts that are recomputed at every e-th step in the end, and more often before.

    The gap between two turns is the power of two in (count / 4, count / 2], and at most e. The curvature changes less from one
    step to the next the longer training lasts, so the gap grows with the count: each doubling of the count has two turns, until
    the gap reaches e.
    """

    def __init__(self, count: Int[Array, ""], every: chex.Numeric) -> None:
        self._count, self._always = count, isinstance(every, numbers.Integral) and every == 1
        self._every = jnp.asarray(every, count.dtype)
        # All numbers are nonnegative, so primitives suffice: they make a third of the program that `jax.numpy` makes.
        log = jax.lax.min(_digits(count) - 2, _digits(self._every - 1))
        self._log = jax.lax.max(log, jnp.zeros_like(log))
        self._gap = jax.lax.min(jax.lax.shift_left(jnp.ones_like(log), self._log), self._every)

    def due(self, phase: chex.Numeric = 0) -> bool | Bool[Array, ""]:
        """Whether the part whose turn is at this place of the period is due."""
        if self._always:
            return True
        return jax.lax.rem(self._count, self._gap) == jax.lax.div(phase * self._gap, self._every)

    def before(self) -> Int[Array, ""]:
        """How many times the part with the first turn of each period was made before this step."""
        periods = lambda count: jax.lax.div(count + self._gap - 1, self._gap)  # noqa: E731
        # Two in each doubling of the count before the gap took its present length, and the turns since.
        return 2 * (self._log + 1) + periods(self._count) - periods(2 << self._log)


def _digits(number: Int[Array, ""]) -> Int[Array, ""]:
    """The number of binary digits; none for zero."""
    return 32 - jax.lax.clz(number)


def phases(layers: int, every: chex.Numeric) -> list[chex.Numeric]:
    """The turn of each layer, spread over a period."""
    return [k * every // layers for k in range(layers)]


def counted_period(forward: float | None, form: Form) -> int:
    r"""The period e, in steps, of the factors of a form, chosen so that the average step costs at most c forward passes.

    It is the least power of two from 4 to 16 with the following bound, or 16 if there is none,

    .. math:: e \ge \frac{m + s}{c - 3 - a - (7 + a) / 3}, \qquad
        m = 2 + \frac{2 N}{f} \sum_l (i_l^2 + o_l^2), \quad s = \frac7f \sum_l (i_l^3 + o_l^3), \quad
        a = \frac2f \sum_l i_l o_l (i_l + o_l), \quad c = 9 \min\Big(\max\Big(1, \frac{\max_l o_l}{N}\Big), \frac32\Big)

    in forward passes of ``f`` operations, for layers of i inputs and o outputs at N positions. The gradient takes 3, the
    moments m, the inverses s, and applying them a. At every third step the quadratic model and the loss after the step take 7,
    and the derivative of the direction by its damping takes another a.

    Args:
        forward: the operations of a forward pass over the batch, with a multiplication and an addition counted as two; None if
            unknown.
        form: a Kronecker view, whose arrays may be without values.
    """
    is_layer = lambda part: isinstance(part, Kronecker)  # noqa: E731
    layers = [part for part in jax.tree.leaves(form, is_leaf=is_layer) if is_layer(part)]
    sizes = [(x.outputs.shape[-3], *x.sizes) for x in layers]
    if not forward or not sizes:
        return USUAL
    weights = sum(g * i * o for g, i, o in sizes)
    # In a network of dense layers every position of every example costs two operations a weight.
    positions = forward / (2 * weights)
    moments = 2 + 2 * positions * sum(g * (i * i + o * o) for g, i, o in sizes) / forward
    inverses = INVERSE * sum(g * (i**3 + o**3) for g, i, o in sizes) / forward
    applied = 2 * sum(g * i * o * (i + o) for g, i, o in sizes) / forward
    most = AIM * np.clip(max(o for _, _, o in sizes) / positions, 1, NARROW)
    left = most - 3 - applied - (7 + applied) / CHECK
    return min(2 ** int(np.ceil(np.log2(max((moments + inverses) / left, FEWEST)))), MOST) if left > 0 else MOST


def forward_cost(function: Callable[..., Any], *args: Any) -> float:
    """The operations in a function's matrix products and convolutions; a multiplication and an addition count as two."""
    return _operations(jax.make_jaxpr(function)(*args).jaxpr)


def _operations(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inside = sum(_operations(inner) for value in eqn.params.values() for inner in _programs(value))
        total += inside * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else inside
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * np.prod([left[axis] for axis in contracted], dtype=float)
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / outputs
    return total


def _programs(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation, which is one, holds several, or has none."""
    held = value if isinstance(value, (tuple, list)) else (value,)
    bare = [getattr(part, "jaxpr", part) for part in held]
    return [part for part in bare if hasattr(part, "eqns")]
