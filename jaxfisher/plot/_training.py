"""`training`: a loss against the steps of training, or against seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from jaxfisher.plot._look import axes_or_new, counted, legend, light_grid, look, named, numbers

ENTRY = "the values y, an array with one axis, or a tuple (x, y) of two such arrays"


def training(curves: Mapping[str, Any], xlabel: str = "step", ylabel: str = "loss (nats)", ax: Axes | None = None) -> Axes:
    r"""Training curves, one for each name, with the loss on a log axis.

    .. math:: y_k = L(\theta_k), \qquad k = 0, 1, 2, \dots

    Args:
        curves: from the name of each curve to its values y, an array ``[steps]``, drawn against 0, 1, 2, ...; or to a *tuple*
            ``(x, y)`` of two such arrays. A value that a log axis cannot show (zero, negative, not finite) leaves a gap, and
            the legend counts such values.
        xlabel: the label of the horizontal axis, with the unit of x.
        ylabel: the label of the vertical axis, with the unit of y.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with one line for each curve in their order.

    Raises:
        ValueError: there are no curves, an array is empty or has other than one axis, x and y have different lengths, or x is
            not finite.
        TypeError: ``curves`` is not a mapping, values are not real numbers, or ``ax`` is not an Axes.

    Reference: Martens and Grosse (2015), section 13, which plots a loss against steps and against seconds.

    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> ax = plot.training({"Adam": [2.0, 0.5, 0.1], "natural": ([0.0, 1.5], [2.0, 0.0])}, xlabel="seconds")
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['Adam', 'natural (1 of 2 not drawn:\nnot positive and finite)']
    """
    pairs = {name: _curve(name, curve) for name, curve in named("curves", curves, ENTRY).items()}
    ax = axes_or_new(ax)
    for k, (name, (x, y)) in enumerate(pairs.items()):
        drawn = np.isfinite(y) & (y > 0)
        label = counted(name, drawn, "not positive and finite")
        # Neighbouring curves have their markers at different steps, so that the markers do not hide each other.
        every = (0.03 * (k % 4), 0.12) if len(x) > 20 else None
        ax.plot(x, np.where(drawn, y, np.nan), **look(k), linewidth=1.5, markersize=5, markevery=every, label=label)
    ax.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    light_grid(ax)
    legend(ax)
    return ax


def _curve(name: str, curve: Any) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    where = f"curves[{name!r}]"
    if not isinstance(curve, tuple):
        y = numbers(where, curve, 1)
        return np.arange(len(y), dtype=np.float64), y
    if len(curve) != 2:
        raise ValueError(f"`{where}` is a tuple of {len(curve)}; expected {ENTRY}.")
    x, y = (numbers(f"{where}[{place}]", part, 1) for place, part in enumerate(curve))
    if x.shape != y.shape:
        raise ValueError(f"`{where}` has {len(x)} values of x and {len(y)} of y; expected as many of x as of y.")
    if not np.all(np.isfinite(x)):
        raise ValueError(f"`{where}[0]`, its x, holds {x[~np.isfinite(x)][0]}; expected finite numbers.")
    return x, y
