"""Slow and dense answers in float64: rules for sums and integrals, and what follows from them. Never imports jaxfisher.

A rule is a pair (nodes, weights): ``sum_i w_i f(x_i)`` is the sum of ``f`` over the outcomes, or its integral over the support.
Integrals use the double exponential substitution (Takahasi and Mori 1974): the trapezoid rule converges exponentially
in it, endpoint singularities and algebraic tails included. A kink must be an end of one of the pieces.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """Nodes of shape ``[n, *event]`` and their weights, shape ``[n]``."""

    nodes: np.ndarray
    weights: np.ndarray

    def total(self, values):
        """The weighted sum of ``values``, shape ``[n, ...]``; where a weight is zero, nothing is added."""
        return np.tensordot(self.weights, values, axes=1)


STEP = 1 / 24


def outcomes(count):
    """Every integer ``0 .. count - 1``, weight one."""
    return Rule(np.arange(count), np.ones(count))


def half_line(start, scale, sign=1):
    """From ``start`` to infinity (``sign=1``) or to minus infinity (``sign=-1``), from 1e-40 to 1e40 scales away."""
    t = np.arange(-4.75, 4.75, STEP)
    away = scale * np.exp(np.pi / 2 * np.sinh(t))
    return Rule(start + sign * away, STEP * away * np.pi / 2 * np.cosh(t))


def interval(start, end, step=STEP):
    """The open interval from ``start`` to ``end``."""
    t = np.arange(-3.75, 3.75, step)
    part = 1 / (1 + np.exp(-np.pi * np.sinh(t)))
    nodes = start + (end - start) * part
    weights = step * (end - start) * part * (1 - part) * np.pi * np.cosh(t)
    inside = (nodes > start) & (nodes < end)
    return Rule(nodes[inside], weights[inside])


def real_line(*breaks, scale):
    """The real line in intervals that meet at ``breaks``."""
    breaks = sorted(breaks)
    pieces = [half_line(breaks[0], scale, -1), half_line(breaks[-1], scale)]
    pieces += [interval(a, b) for a, b in itertools.pairwise(breaks)]
    return Rule(*map(np.concatenate, zip(*pieces, strict=True)))


def simplex3():
    """The triangle of three probabilities, as the measure ``dx_1 dx_2``."""
    # A third of the nodes on each axis is enough for 1e-14 with the densities of the families under test.
    u, weight = interval(0.0, 1.0, step=3 * STEP)
    first, rest = u[:, None], 1 - u[:, None]
    nodes = np.stack(np.broadcast_arrays(first, rest * u, rest * (1 - u)), axis=-1)
    weights = weight[:, None] * rest * weight
    inside = np.all(nodes > 0, axis=-1)
    return Rule(nodes[inside], weights[inside])


def gaussian_grid(mean, tril):
    """A grid in whitened coordinates out to 8.25 standard deviations; the trapezoid rule is exact to 1e-15 on a Gaussian."""
    step = 0.75
    axis = np.arange(-11, 12) * step
    z = np.stack(np.meshgrid(*[axis] * len(mean), indexing="ij"), axis=-1).reshape(-1, len(mean))
    weight = step ** len(mean) * np.prod(np.diag(tril))
    return Rule(np.asarray(mean) + z @ np.asarray(tril).T, np.full(len(z), weight))
