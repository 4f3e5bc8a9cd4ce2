"""The axes of products, and the steps by which they go through the entries of a value of the program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One index of a product. Axes are compared by identity, not by size."""

    size: int


Steps = tuple[tuple[int, int], ...]
"""How an axis goes through the entries of a value in row-major order, as lengths and strides, the slowest first."""


class Origin(NamedTuple):
    """A value of the program whose entries a factor's ``array`` holds in another arrangement, and the steps of each axis."""

    array: Array
    value: Any
    steps: Mapping[Axis, Steps]


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
