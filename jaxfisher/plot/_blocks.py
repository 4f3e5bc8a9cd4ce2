"""`blocks`: a Fisher as a heat map, with one block for each pair of parameter leaves."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patheffects import Normal, Stroke

from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher.plot._look import axes_or_new

LARGEST = 2048
"""The largest number of parameters that is drawn. A screen has fewer rows of pixels than that."""
DECADES = 6
"""How many decades below the largest entry the colours reach. Zeros with rounding errors get the lightest of them."""
SHARE = 0.06
"""The rows of a leaf with less than this share of the p rows are repeated until they reach it."""


def blocks(fisher: Operator, ax: Axes | None = None) -> Axes:
    r"""A heat map of the absolute values of the entries of F, in blocks of one parameter leaf by another.

    .. math:: |F_{ij}|, \qquad i, j = 1, \dots, p,

    The colours have a log scale of six decades below the largest entry. Smaller entries have the lightest colour, and zeros are
    white. The plot helps to choose a view: dark entries outside the diagonal blocks are those that `jaxfisher.block_diagonal`
    drops, and dark entries off the diagonal those that `jaxfisher.diagonal` drops.

    The rows of a small leaf are repeated, each of them equally often, until the leaf takes at least 3 % of the side (less if
    there are more than 16 leaves), so that a bias can be seen and labelled beside its weight.

    Args:
        fisher: an operator over at most 2048 parameters. The colour bar gives its entries in nats per squared parameter.
        ax: the axes to draw on; None makes a figure. The colour bar takes some of its space.

    Returns:
        The axes, with a tick at every leaf and lines between the leaves.

    Raises:
        ValueError: there are more than 2048 parameters, or F is not finite.
        TypeError: ``fisher`` is not an operator, or ``ax`` is not an Axes.

    Reference: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature (2015), figure 2.

    >>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> params = {"b": 0.0, "w": jnp.zeros(2)}
    >>> F = jf.exact_fisher(lambda p, x: jf.Bernoulli(logits=x @ p["w"] + p["b"]))(params, jnp.array([[1.0, 0.0], [3.0, 0.0]]))
    >>> ax = plot.blocks(F)
    >>> print(ax.images[0].get_array())  # the second input is always zero
    [[0.25 0.5 --]
     [0.5 1.25 --]
     [-- -- --]]
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ["['b']", "['w']"]
    """
    operator = as_operator(fisher, "plot.blocks")
    p = operator.size
    if p > LARGEST:
        raise ValueError(
            f"plot.blocks: {operator} has {p:,} parameters; expected at most {LARGEST:,}, since more cannot be told apart on a "
            "screen. Close over some of the parameters in the model, and plot the Fisher of the others."
        )
    sizes = np.abs(np.asarray(operator.as_matrix(), np.float64))
    if not np.all(np.isfinite(sizes)):
        raise ValueError(
            f"{operator} has entries that are not finite. Look for NaN or infinity in the parameters and the data."
        )
    ax = axes_or_new(ax)
    leaves = [(path, size) for path, size in zip(operator.spec.paths, operator.spec.sizes, strict=True) if size]
    repeats = _repeats([size for _, size in leaves], p)
    rows = np.repeat(np.arange(p), np.repeat(repeats, [size for _, size in leaves]))
    edges = np.concatenate([[0], np.cumsum([count * size for count, (_, size) in zip(repeats, leaves, strict=True)])]) - 0.5

    image = ax.imshow(np.ma.masked_equal(sizes[np.ix_(rows, rows)], 0.0), norm=_norm(sizes), cmap="Blues", aspect="equal")
    bar = ax.figure.colorbar(image, ax=ax, extend="min", shrink=0.85)
    bar.set_label(r"$|F_{ij}|$ (nats per squared parameter)")
    _separate(ax, edges[1:-1])
    _name(ax, edges, [path for path, _ in leaves])
    return ax


def _repeats(sizes: list[int], p: int) -> list[int]:
    """How often the rows of each leaf are repeated. There are at most 2 p rows plus one for each leaf in the end."""
    least = p * min(SHARE, 1 / len(sizes))
    return [max(1, math.ceil(least / size)) for size in sizes]


def _norm(sizes: Float[np.ndarray, "p p"]) -> LogNorm:
    top = float(sizes.max()) or 1.0
    return LogNorm(top * 10.0**-DECADES, top)


def _separate(ax: Axes, where: Float[np.ndarray, " lines"]) -> None:
    # A black line with a white edge shows on light blocks and on dark ones.
    halo = [Stroke(linewidth=2.4, foreground="white"), Normal()]
    for line in where:
        ax.axhline(line, color="black", linewidth=0.8, path_effects=halo)
        ax.axvline(line, color="black", linewidth=0.8, path_effects=halo)


def _name(ax: Axes, edges: Float[np.ndarray, " leaves_and_one"], names: list[str]) -> None:
    centres, ends = (edges[1:] + edges[:-1]) / 2, (edges[0], edges[-1])
    # The size at which slanted labels do not touch on a side of about 250 points. Below 4 points they are illegible.
    nearest = np.min(np.diff(centres), initial=np.inf) / (ends[1] - ends[0])
    size = float(np.clip(250 * nearest / 1.5, 4.0, 10.0))
    ax.set_xticks(centres, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    ax.set_yticks(centres, names, fontsize=size)
    ax.tick_params(length=2)
