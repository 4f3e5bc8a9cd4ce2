"""The axes of products, and the steps by which they go through the entries of a value of the program."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One index of a product. Axes are compared by identity, not by size."""

    size: int


Steps = tuple[tuple[int, int], ...]
"""How an axis goes through the entries of a value in row-major order, as lengths and strides, the slowest first."""


class Origin(NamedTuple):
    """A value of the program whose entries a factor's ``array`` holds in another arrangement, from entry ``start`` on.

    ``steps`` are those of each axis.
    """

    array: Any
    value: Any
    steps: Mapping[Axis, Steps]
    start: int = 0


def rows_first(axes: Sequence[Axis]) -> dict[Axis, Steps]:
    """The steps of an array's own axes."""
    return {axis: ((axis.size, math.prod(a.size for a in axes[i + 1 :])),) for i, axis in enumerate(axes)}


def cut(steps: Steps, size: int) -> tuple[Steps, Steps] | None:
    """The steps of an axis that is split in two, the first part of this size; None if the parts have no steps."""
    for i, (length, stride) in enumerate(steps):
        if size == 1:
            return steps[:i], steps[i:]
        if size % length:
            inner = length // size
            return None if length % size else ((*steps[:i], (size, inner * stride)), ((inner, stride), *steps[i + 1 :]))
        size //= length
    return steps, ()


def dim(*axes: Axis) -> tuple[Axis, ...]:
    """A dimension made of these axes. Axes of size one are dropped: factors may have them, dimensions do not."""
    return tuple(axis for axis in axes if axis.size != 1)


def refined(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The sizes of the common refinement of two factorisations of one dimension.

    If one of the two has length one, they are those of the other; None if there is no common refinement.
    """
    if not a or not b:
        return a or b
    cuts = sorted({math.prod(a[:i]) for i in range(len(a) + 1)} | {math.prod(b[:i]) for i in range(len(b) + 1)})
    if any(high % low for low, high in itertools.pairwise(cuts)):
        return None
    return tuple(high // low for low, high in itertools.pairwise(cuts))
