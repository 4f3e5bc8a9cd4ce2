"""Helpers of all plots: the axes to draw on, the look of the curves, legends, and checks of the arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from jaxfisher._tree import described

BLACK, ORANGE, SKY, GREEN, VERMILION, BLUE, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7",
)  # fmt: skip
"""The palette of Okabe and Ito, without its yellow, which is hard to see on white."""

# Neighbours in the list also differ in lightness, for prints in grey.
_COLOURS = (BLACK, VERMILION, SKY, BLUE, ORANGE, GREEN, PURPLE)
INSIDE = 4
"""A legend with more entries than this stands beside the axes."""
COLUMN = 20
"""The most entries in one column of a legend."""

_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def look(k: int) -> dict[str, Any]:
    """Colour, dash and marker of curve ``k``: no two of the first 49 share both colour and dash."""
    count = len(_COLOURS)
    return {"color": _COLOURS[k % count], "linestyle": _DASHES[(k + k // count) % count], "marker": _MARKERS[k % count]}


def axes_or_new(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new figure."""
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, Axes):
        hint = " Give one of its entries." if isinstance(ax, np.ndarray) else ""
        raise TypeError(f"`ax` is {described(ax)}; expected a matplotlib Axes, or None for a new figure.{hint}")
    return ax


def ellipse(centre: Any, covariance: Float[np.ndarray, "2 2"], squared: float, **style: Any) -> Ellipse:
    """The points ``x`` with ``(x - centre)^T covariance^-1 (x - centre) = squared``; the width is of the axis nearer to level.

    An eigensolver finds eigenvalues to rounding of the largest, which in other units may hide the smallest. This closed form
    does not: the tilt is small where the units are far apart, and the smaller eigenvalue comes from the determinant.
    """
    (across, both), (_, up) = covariance
    large = 0.5 * (across + up + math.hypot(across - up, 2 * both))
    small = max(across * up - both**2, 0.0) / large
    width, height, sign = (large, small, 1) if across >= up else (small, large, -1)
    angle = math.degrees(0.5 * math.atan2(2 * sign * both, abs(across - up)))
    size = [2 * math.sqrt(squared * value) for value in (width, height)]
    return Ellipse((float(centre[0]), float(centre[1])), *size, angle=angle, **style)


def light_grid(ax: Axes) -> None:
    """Draw grid lines underneath everything else."""
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def legend(ax: Axes) -> None:
    """Draw the legend: inside the axes if it has few entries, and beside them if so many that it would cover the curves."""
    entries = len(ax.get_legend_handles_labels()[1])
    if entries <= INSIDE:
        ax.legend(handlelength=3)
    else:
        columns = -(-entries // COLUMN)
        ax.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, ncols=columns, fontsize="small", handlelength=3.5
        )


def numbers(name: str, value: Any, ndim: int) -> Float[np.ndarray, "..."]:
    """``value`` as a float64 array, checked to have ``ndim`` axes and at least one number. The numbers need not be finite."""
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and not _is_wide_float(array):
        raise TypeError(f"`{name}` is {described(value)}; expected an array of real numbers with {ndim} axes.")
    if array.ndim != ndim or not array.size:
        raise ValueError(f"`{name}` has shape {array.shape}; expected at least one number, in an array with {ndim} axes.")
    return array.astype(np.float64)


def _is_wide_float(array: np.ndarray) -> bool:
    # NumPy gives bfloat16 and similar dtypes the kind of raw bytes, but can cast them to float64.
    return array.dtype.kind == "V" and np.can_cast(array.dtype, np.float64)


def named(name: str, value: Any, entry: str) -> Mapping[str, Any]:
    """``value``, checked to be a mapping with at least one entry."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` is {described(value)}; expected a mapping from the name of each to {entry}.")
    if not value:
        raise ValueError(f"`{name}` has no entries; expected at least one, from a name to {entry}.")
    return value


def counted(label: str, drawn: np.ndarray, why: str) -> str:
    """The label of a curve; if some of its numbers are not drawn, with how many and why."""
    lost = int(np.sum(~drawn))
    return f"{label} ({lost} of {drawn.size} not drawn:\n{why})" if lost else label
