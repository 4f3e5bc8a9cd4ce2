r"""The special functions of the gamma families, each in a form that keeps its digits.

Stirling's formula splits :math:`\log\Gamma(a) = (a - \tfrac12)\log a - a + \tfrac12\log 2\pi + J(a)`. Densities,
divergences and Fishers of the families here are differences of such terms whose large parts cancel on paper. So the families
write the cancelled form and need only what is left: the remainder :math:`J`, its Bregman divergence, ``trigamma(a) - 1/a``, and
elementary functions that are differences too (``x - 1 - log x``, ``1 - log(1 + y)/y``, ``1 - (1 - exp(-x))/x``).

All functions act elementwise on float32 or float64 (`aligned` widens anything narrower), have no loops, and can be
differentiated to any order by JAX itself, because every branch is a polynomial or an elementary function. Below ten, the
argument is shifted up by ten through a recurrence whose terms all have one sign; above, the series is exact to float64.

Reference: NIST Digital Library of Mathematical Functions, 5.11 (series) and 5.5 (recurrences).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxfisher._distributions.stable import log, log_ratio_of, ratio, working_dtype

_SHIFT = 10
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330)
_STIRLING = tuple(b / ((2 * k + 2) * (2 * k + 1)) for k, b in enumerate(_BERNOULLI))  # of a^-(2k+1)
_EXP = tuple((-1) ** k / math.factorial(k + 2) for k in range(18))  # (exp(-x) - 1 + x)/x^2 in powers of x
_ATANH = tuple(1 / (2 * k + 3) for k in range(17))  # (atanh(z)/z - 1)/z^2 in powers of z^2, enough for z^2 <= 1/9

# Gauss-Legendre nodes and weights on [0, 1].
_GAUSS_NODES = (
    0.019855071751231884,
    0.10166676129318663,
    0.2372337950418355,
    0.4082826787521751,
    0.5917173212478249,
    0.7627662049581645,
    0.8983332387068134,
    0.9801449282487681,
)
_GAUSS_WEIGHTS = (
    0.05061426814518813,
    0.11119051722668724,
    0.15685332293894363,
    0.18134189168918100,
    0.18134189168918100,
    0.15685332293894363,
    0.11119051722668724,
    0.05061426814518813,
)


def aligned(*arrays: Shaped[Array, "..."]) -> list[Float[Array, "..."]]:
    """The arrays in one floating dtype of at least float32 and one shape: promotion and broadcasting, written out.

    The dtype follows from the first, which is a field of the distribution. The half-precision types have too few digits to
    form the differences below in.
    """
    dtype = working_dtype(arrays[0].dtype)
    shape = jnp.broadcast_shapes(*[array.shape for array in arrays])
    return [jnp.broadcast_to(array.astype(dtype), shape) for array in arrays]


def last_axis(values: Sequence[float] | Array, like: Array) -> Array:
    """One-dimensional ``values`` as a new last axis beside the axes of ``like``, in its dtype."""
    return jnp.asarray(values, like.dtype).reshape((1,) * like.ndim + (-1,))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def polynomial(coefficients: tuple[float, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``sum_k c_k x^k`` by Horner's rule; its derivative is again one polynomial, not the derivative of each step."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


@polynomial.defjvp
def _polynomial_jvp(
    coefficients: tuple[float, ...], primals: tuple[Float[Array, "..."]], tangents: tuple[Float[Array, "..."]]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    (x,), (dx,) = primals, tangents
    slopes = tuple(k * c for k, c in enumerate(coefficients))[1:] or (0.0,)
    return polynomial(coefficients, x), polynomial(slopes, x) * dx


def log_gap(excess: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``x - 1 - log x`` for ``x > 0``, given both ``x`` and ``excess = x - 1``.

    Never negative, zero to second order at one. Two arguments, because the caller knows ``x - 1`` without rounding when ``x``
    is near one, and ``x`` without rounding when it is near zero.
    """
    near = jnp.abs(excess) < 0.5
    small = jnp.where(near, excess, 0)
    return jnp.where(near, small * log_gap_ratio(small), excess - log(jnp.where(near, 1, x)))


def rate_gap(rate: Float[Array, "..."], c: Float[Array, "..."], excess: Float[Array, "..."]) -> Float[Array, "..."]:
    """``rate - c - c log(rate/c)``, given ``excess = rate/c - 1`` too: never negative, zero to second order at ``rate = c``.

    ``c`` times `log_gap` of ``rate/c``, with ``rate`` standing alone far from equality: the derivative in ``c`` needs that.
    """
    near = jnp.abs(excess) < 0.5
    small = jnp.where(near, excess, 0)
    return jnp.where(
        near, c * small * log_gap_ratio(small), rate - c - c * log_ratio_of(jnp.where(near, 1, rate), jnp.where(near, 1, c))
    )


def rate_divergence(
    c: Float[Array, "..."], a: Float[Array, "..."], factor: Float[Array, "..."], rise: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`rate_gap` of ``rate = a f`` for the given factor ``f`` and ``rise = f - 1``, whose excess follows from differences."""
    change = ratio(c - a, a)
    near = jnp.abs(change) < 0.5
    # Where c and a are far apart the first form loses digits, and nothing is near equality in all parameters.
    by_differences = (rise - change) / (1 + jnp.where(near, change, 0))
    return rate_gap(a * factor, c, jnp.where(near, by_differences, ratio(a, c) * factor - 1))


def log_gap_slope(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """``(y - log(1 + y))/y^2`` for ``y > -1``: a half at zero."""
    near = jnp.abs(y) < 0.5
    small = jnp.where(near, y, 0)
    far = jnp.where(near, 1, y)
    return jnp.where(near, _log_gap_slope_near(small), ratio(1 - ratio(jnp.log1p(far), far), far))


def log_gap_ratio(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """``1 - log(1 + y)/y`` for ``y > -1``: ``y/2`` near zero."""
    return y * log_gap_slope(y)


def _log_gap_slope_near(y: Float[Array, "..."]) -> Float[Array, "..."]:
    # log(1 + y) = 2 atanh(z) with z = y/(2 + y); y = 2z/(1 - z) takes the leading terms away exactly.
    z = y / (2 + y)
    return 0.5 * (1 - z) * (1 - z * (1 - z) * polynomial(_ATANH, z * z))


def exp_gap_slope(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``(exp(-x) - 1 + x)/x^2`` for real ``x``: a half at zero."""
    near = jnp.abs(x) < 1
    far = jnp.where(near, 1, x)
    return jnp.where(near, polynomial(_EXP, jnp.where(near, x, 0)), ratio(1 + ratio(jnp.expm1(-far), far), far))


def exp_gap_ratio(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``1 - (1 - exp(-x))/x`` for real ``x``: ``x/2`` near zero, and ``x`` times it is ``exp(-x) - 1 + x``."""
    return x * exp_gap_slope(x)


def log_ratio(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log(1 + y)/y`` for ``y > -1``: one at zero."""
    near = jnp.abs(y) < 0.5
    far = jnp.where(near, 1, y)
    return jnp.where(near, 1 - log_gap_ratio(jnp.where(near, y, 0)), ratio(jnp.log1p(far), far))


def exp_ratio(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``(1 - exp(-x))/x`` for real ``x``: one at zero."""
    near = jnp.abs(x) < 1
    far = jnp.where(near, 1, x)
    return jnp.where(near, 1 - exp_gap_ratio(jnp.where(near, x, 0)), -ratio(jnp.expm1(-far), far))


def stirling(a: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Stirling's remainder ``J(a) = lgamma(a) - (a - 1/2) log a + a - log(2 pi)/2``, for ``a > 0``; near ``1/(12 a)``."""
    low, high, shift = _shifted(a)
    z = 1 / high
    series = z * polynomial(_STIRLING, z * z)
    return series + jnp.where(shift, jnp.sum(_stirling_step(low), axis=-1), 0)


def gamma_entropy(a: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``a + lgamma(a) + (1 - a) digamma(a)`` for ``a > 0``: the entropy of a gamma variable of rate one.

    By Stirling's remainder J it is ``log(2 pi e a)/2 - 1/(2 a) + J + (1 - a) J'``, of which no term is large.
    """
    rest, slope = jax.jvp(stirling, (a,), (jnp.ones_like(a),))
    return 0.5 * jnp.log(a) + 0.5 * (1 + math.log(2 * math.pi)) - 0.5 / a + rest + (1 - a) * slope


def _shifted(a: Array) -> tuple[Array, Array, Array]:
    """The arguments ``a .. a + 9`` of the recurrence on a last axis, the argument of the series, and which ones are shifted."""
    shift = a < _SHIFT
    steps = last_axis(range(_SHIFT), a)
    return jnp.where(shift, a, 1)[..., None] + steps, jnp.where(shift, a + _SHIFT, a), shift


def _stirling_step(a: Array) -> Array:
    """``J(a) - J(a + 1) = (a + 1/2) log(1 + 1/a) - 1``."""
    big = a >= 1
    z = 1 / (2 * jnp.where(big, a, 1) + 1)
    small = jnp.where(big, 1, a)
    return jnp.where(big, z * z * polynomial(_ATANH, z * z), (small + 0.5) * (jnp.log1p(small) - log(small)) - 1)


def stirling_bregman(b: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``J(b) - J(a) - (b - a) J'(a)``, the Bregman divergence of Stirling's remainder: never negative, zero at ``b = a``."""
    shift = jnp.minimum(a, b) < _SHIFT
    steps = last_axis(range(_SHIFT), a)
    low_a, low_b = (jnp.where(shift, v, 1)[..., None] + steps for v in (a, b))
    high_a, high_b = (jnp.where(shift, v + _SHIFT, v) for v in (a, b))
    # The difference of the shifted arguments is the difference of the given ones: taking it here keeps its digits.
    change = b - a
    tail = _series_bregman(high_b, high_a, change)
    return tail + jnp.where(shift, jnp.sum(_step_bregman(low_b, low_a, change[..., None]), axis=-1), 0)


def _series_bregman(b: Array, a: Array, change: Array) -> Array:
    # a^-m has the divergence a^-m (x - 1)^2 sum_{i=1}^m (m + 1 - i) x^-i with x = b/a: all terms positive. With p = 1/a and
    # q = 1/b this is change^2 p sum_{i=1}^m (m + 1 - i) p^(m + 1 - i) q^i; the sums for m and m + 1 differ by a partial sum.
    p, q = 1 / a, 1 / b
    total = jnp.zeros_like(a)
    weighted = jnp.zeros_like(a)  # sum_i (m + 1 - i) p^(m + 1 - i) q^i
    plain = jnp.zeros_like(a)  # sum_i p^(m + 1 - i) q^i
    q_power = jnp.ones_like(a)
    for m in range(1, 2 * len(_STIRLING)):
        q_power = q_power * q
        plain = p * (plain + q_power)
        weighted = p * weighted + plain
        if m % 2 == 1:
            total = total + _STIRLING[m // 2] * weighted
    return (change * p) * (change * total)


def _step_bregman(b: Array, a: Array, change: Array) -> Array:
    """The divergence of ``h(a) = (a + 1/2) log(1 + 1/a) - 1``."""
    # Near: the parts of first order in `change` removed by hand. The two left grow like a/b; far below, the plain difference.
    far = b < 0.5 * a
    b_near = jnp.where(far, a, b)
    change_near = jnp.where(far, 0, change)
    # No quotient has a product of the two below it, whose square, in a derivative, leaves the range of float32. Far apart
    # the derivatives of the change over b are differences of nearly equal numbers.
    x = ratio(a, b_near) * (b_near + 1) / (a + 1)
    gap = jnp.where(b_near > 2 * a, 1 - x, ratio(change_near, b_near) / (a + 1))  # log(1 + 1/b) - log(1 + 1/a) = log(1 - gap)
    near = 0.5 * ratio(change_near, a) * gap - (b_near + 0.5) * log_gap(-gap, x)
    return jnp.where(far, _stirling_step(b) - _stirling_step(a) - change * _stirling_step_slope(a), near)


def _stirling_step_slope(a: Array) -> Array:
    big = a >= 1
    z = 1 / (2 * jnp.where(big, a, 1) + 1)
    slopes = tuple((2 * k + 2) * c for k, c in enumerate(_ATANH))
    small = jnp.where(big, 1, a)
    below = jnp.log1p(small) - log(small) - ratio((small + 0.5) / (small + 1), small)
    return jnp.where(big, -2 * z * z * z * polynomial(slopes, z * z), below)


def gammaln_bregman_rest(b: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""The divergence ``g(b) - g(a) - (b - a) g'(a)`` of ``g(a) = lgamma(a) - a log a + a``; never negative.

    It is the divergence of ``lgamma`` without that of ``a log a - a``, which the families cancel by hand.
    """
    return 0.5 * log_gap(ratio(b - a, a), ratio(b, a)) + stirling_bregman(b, a)


def gammaln_bregman_rest_drop(
    b: Float[Array, "..."], a: Float[Array, "..."], b_rise: Float[Array, "..."], a_rise: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`gammaln_bregman_rest` of ``b`` and ``a`` minus that of ``b + b_rise`` and ``a + a_rise``, for small rises ``>= 0``.

    It is exact however small the rises are: minus the integral of the slope along the line from one to the other, which is
    ``b_rise (g'(b) - g'(a)) - a_rise (b - a) g''(a)``.
    """
    along, weights = last_axis(_GAUSS_NODES, a), last_axis(_GAUSS_WEIGHTS, a)
    b_rise, a_rise = b_rise[..., None], a_rise[..., None]
    a_nodes = a[..., None] + a_rise * along
    change = (b - a)[..., None] + (b_rise - a_rise) * along
    near = jnp.abs(change) < 0.25 * a_nodes
    at_a = trigamma_excess(a_nodes)
    # Near equality the change of g' beyond its tangent comes from differences of g'': at equality it and its slopes are zero.
    step = jnp.where(near, change, 0)
    further = trigamma_excess(a_nodes[..., None] + step[..., None] * last_axis(_GAUSS_NODES, a_nodes)) - at_a[..., None]
    beyond = step * jnp.sum(last_axis(_GAUSS_WEIGHTS, a_nodes) * further, axis=-1)
    ends = jnp.stack([jnp.where(near, a_nodes, a_nodes + change), a_nodes])
    slopes = jax.jvp(stirling, (ends,), (jnp.ones_like(ends),))[1] - 0.5 / ends  # g'
    far = b_rise * (slopes[0] - slopes[1]) - a_rise * change * at_a
    slope = jnp.where(near, b_rise * beyond + (b_rise - a_rise) * change * at_a, far)
    return -jnp.sum(weights * slope, axis=-1)


def trigamma_excess(a: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``trigamma(a) - 1/a`` for ``a > 0``: ``1/(2 a^2)`` for large ``a`` and ``1/a^2`` for small."""
    low, high, shift = _shifted(a)
    z = 1 / high
    series = z * z * (0.5 + z * polynomial(_BERNOULLI, z * z))
    # 1/a = 1/(a + n) + sum 1/((a + k)(a + k + 1)) turns the recurrence of trigamma into one of positive terms.
    return series + jnp.where(shift, jnp.sum(1 / (low * low * (low + 1)), axis=-1), 0)


def trigamma_excess_drop(a: Float[Array, "..."], rise: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``c(a) - c(a + rise)`` for ``c(a) = a trigamma(a) - 1`` and ``rise >= 0``, exact however small ``rise`` is."""
    near = rise < 0.25 * a
    step = jnp.where(near, rise, 0)
    a_nodes = a[..., None] + step[..., None] * last_axis(_GAUSS_NODES, a)
    inside = jnp.sum(last_axis(_GAUSS_WEIGHTS, a) * _scaled_excess_slope(a_nodes), axis=-1)
    far = a + rise
    return jnp.where(near, step * inside, a * trigamma_excess(a) - far * trigamma_excess(far))


def _scaled_excess_slope(a: Array) -> Array:
    """``-d/da (a trigamma(a) - 1)``, positive."""
    low, high, shift = _shifted(a)
    z = 1 / high
    falls = tuple((2 * k + 3) * b for k, b in enumerate(_BERNOULLI))
    excess = z * z * (0.5 + z * polynomial(_BERNOULLI, z * z))
    slope = z * z * z * (1 + z * polynomial(falls, z * z))  # -d/da of the excess
    terms = 1 / (low * low * (low + 1))
    excess = excess + jnp.where(shift, jnp.sum(terms, axis=-1), 0)
    slope = slope + jnp.where(shift, jnp.sum(terms * (2 / low + 1 / (low + 1)), axis=-1), 0)
    return a * slope - excess


def half_step_gammaln(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``lgamma(x + 1/2) - lgamma(x) - log(x)/2`` for ``x > 0``: ``-1/(8 x)`` for large ``x``."""
    return stirling(x + 0.5) - stirling(x) - 0.5 * log_gap_ratio(0.5 / x)


_STUDENT_SHIFT = 16
_STUDENT_SERIES = (  # (2^(2k) - 1) B_2k of v^-(2k+1), from k = 2: the alternating sum of 1/(v + j)^2
    *((4.0 ** (k + 1) - 1) * b for k, b in enumerate(_BERNOULLI) if k > 0),
)


def student_excess(df: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``v^4 S(v)`` with ``S = (trigamma(v/2) - trigamma((v+1)/2))/4 - (v+3)/(2 v (v+1)^2)``; tends to 3/2.

    ``S`` is the information on the degrees of freedom of Student's t if its scale is unknown. It obeys
    ``S(v) - S(v + 2) = 6 (2v + 3)/(v^2 (v+1) (v+2) (v+3)^2)``.
    """
    shift = df < 2 * _STUDENT_SHIFT
    high = jnp.where(shift, df + 2 * _STUDENT_SHIFT, df)
    z = 1 / high
    # (3v + 1)/(2 v^3 (v+1)^2) times v^4, then the series times v^4.
    series = 0.5 * (3 + z) / jnp.square(1 + z) + z * polynomial(_STUDENT_SERIES, z * z)
    low = jnp.where(shift, df, 1)
    v = low[..., None] + last_axis(range(0, 2 * _STUDENT_SHIFT, 2), df)
    part = low[..., None] / v
    terms = part**2 * low[..., None] ** 2 * 6 * (2 * v + 3) / ((v + 1) * (v + 2) * jnp.square(v + 3))
    scale = jnp.square(jnp.square(low / jnp.where(shift, high, 1)))
    return jnp.where(shift, scale * series + jnp.sum(terms, axis=-1), series)
