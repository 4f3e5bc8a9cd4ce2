"""`paths`: the paths of optimisers over the contours of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar
from matplotlib.axes import Axes
from matplotlib.patheffects import Normal, Stroke

from jaxfisher._tree import check_function
from jaxfisher.plot._look import axes_or_new, counted, legend, look, named, numbers

RESOLUTION = 120
"""How many points the grid of losses has along each axis."""
MARGIN = 0.12
"""The margin around the paths, as a share of their extent."""


def paths(
    loss: Callable[[Float[Array, "2"]], Scalar], paths: Mapping[str, Float[Array, "steps 2"]], ax: Axes | None = None
) -> Axes:
    r"""The paths of optimisers over the contours of a loss of two parameters, such as those of Euclidean and natural gradients.

    .. math:: \theta_{k+1} = \theta_k - \eta\, \nabla L(\theta_k) \quad\text{against}\quad
        \theta_{k+1} = \theta_k - \eta\, F(\theta_k)^{-1} \nabla L(\theta_k).

    Contours are at evenly spaced quantiles of the loss over the area shown, so that they show a long valley as well as a steep
    wall. Every second contour is labelled. The area shown is that of the paths, with a margin around them.

    Args:
        loss: a JAX function from one point, of shape ``[2]``, to a scalar.
        paths: from the name of each path to its points, shape ``[steps + 1, 2]``, the start included. A ring marks the start,
            a larger marker the end.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with one line for each path in their order.

    Raises:
        ValueError: there are no paths, a path is not of shape ``[steps + 1, 2]`` or nowhere finite, or the loss is not a scalar
            or nowhere finite.
        TypeError: the loss is not a function, ``paths`` is not a mapping, or ``ax`` is not an Axes.

    Reference: Amari, Natural gradient works efficiently in learning (Neural Computation 1998), theorem 1.

    >>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> loss = lambda theta: theta[0] ** 2 + 10 * theta[1] ** 2
    >>> ax = plot.paths(loss, {"natural": jnp.array([[2.0, 1.0], [0.0, 0.0]])})
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['natural: 1 step']
    """
    check_function("loss", loss, "(theta of shape [2]) -> the scalar loss there")
    points = {name: _path(name, path) for name, path in named("paths", paths, "an array of shape [steps + 1, 2]").items()}
    every = np.concatenate(list(points.values()))
    low, high = _area(every[np.all(np.isfinite(every), axis=1)])
    across, up = (np.linspace(low[axis], high[axis], RESOLUTION) for axis in range(2))
    values = _losses(loss, np.stack(np.meshgrid(across, up), axis=-1))
    ax = axes_or_new(ax)
    _contours(ax, across, up, values)
    for k, (name, path) in enumerate(points.items()):
        _draw(ax, name, path, k, 50.0 + 70.0 * (len(points) - 1 - k))
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=r"$\theta_0$", ylabel=r"$\theta_1$")
    legend(ax)
    return ax


def _path(name: str, path: Any) -> Float[np.ndarray, "steps 2"]:
    where = f"paths[{name!r}]"
    points = numbers(where, path, 2)
    if points.shape[1] != 2:
        raise ValueError(f"`{where}` has shape {points.shape}; expected [steps + 1, 2], two parameters a point.")
    if not np.any(np.all(np.isfinite(points), axis=1)):
        raise ValueError(f"`{where}` has no finite point, so there is nothing to draw. Leave the path out.")
    return points


def _area(points: Float[np.ndarray, "m 2"]) -> tuple[np.ndarray, np.ndarray]:
    """The two corners of the points' bounding box with its margin; an axis along which they are equal gets a length of one."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = high - low
    room = np.where(extent > 0, MARGIN * extent, 0.5)
    return low - room, high + room


def _losses(loss: Callable[[Float[Array, "2"]], Scalar], grid: Float[np.ndarray, "up across 2"]) -> np.ma.MaskedArray:
    """The loss at every point of the grid, masked where it is not finite."""
    points = jnp.asarray(grid)
    shape = jnp.shape(jax.eval_shape(loss, points[0, 0]))
    if shape != ():
        raise ValueError(f"`loss` returned shape {shape}; expected a scalar, the loss at one point of shape (2,).")
    values = np.ma.masked_invalid(np.asarray(jax.jit(jax.vmap(jax.vmap(loss)))(points), np.float64))
    if values.mask.all():
        area = f"{grid[0, 0].tolist()} to {grid[-1, -1].tolist()}"
        raise ValueError(
            f"`loss` is nowhere finite over the area of the paths, {area}; expected one with values to draw there."
        )
    return values


def _contours(ax: Axes, across: np.ndarray, up: np.ndarray, values: np.ma.MaskedArray) -> None:
    finite = values.compressed()
    levels = np.unique(np.quantile(finite, np.linspace(0.02, 0.98, 13)))
    levels = levels[(levels > finite.min()) & (levels < finite.max())]
    if not levels.size:
        return  # a constant has no contours
    lines = ax.contour(across, up, values, levels, colors="0.72", linewidths=0.8, zorder=1)
    ax.clabel(lines, levels[::2], fmt=lambda level: f"{level:.3g}", fontsize=7, colors="0.35")


def _draw(ax: Axes, name: str, path: Float[np.ndarray, "steps 2"], k: int, end_size: float) -> None:
    kept = np.all(np.isfinite(path), axis=1)
    steps = len(path) - 1
    label = counted(f"{name}: {steps} step{'s' * (steps != 1)}", kept, "not finite")
    # A white edge under each line sets it off from the contours and from the paths that it crosses.
    halo = [Stroke(linewidth=3.2, foreground="white"), Normal()]
    ax.plot(*path.T, **look(k), linewidth=1.6, markersize=3.5, label=label, zorder=3, path_effects=halo)
    start, end = path[kept][0], path[kept][-1]
    # Later paths have smaller markers at their ends, so that coinciding ends all stay visible.
    colour, marker = look(k)["color"], look(k)["marker"]
    ax.scatter(end[0], end[1], s=end_size, color=colour, marker=marker, edgecolors="white", zorder=4)
    ax.scatter(start[0], start[1], s=130, facecolors="none", edgecolors="black", marker="o", zorder=4)
